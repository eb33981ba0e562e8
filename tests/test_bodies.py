"""MuJoCo bodies: native families against stock Gymnasium environments stepped alone."""

from __future__ import annotations

import pickle

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from expecting import refused
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from metarl.config.options import Config
from metarl.envs import MujocoFamily, Uniform, make_family
from metarl.envs.mujoco.bodies import BODIES
from metarl.envs.mujoco.parameters import scaled_parameters
from metarl.envs.mujoco.rewards import costs_and_bonus
from metarl.envs.mujoco.simulation import load_model
from metarl.evaluation.breakdown import physics_seconds
from metarl.sampling.rollouts import RandomKey
from metarl.training.run import new_trainer

DISABLED = AutoresetMode.DISABLED
SEEDS = [21, 22, 23, 24]


def bare(env: str = "Hopper-v5", **changes) -> MujocoFamily:
    """A stock body as it is, with a task that changes nothing."""
    values = {"name": "bare", "env": env, "tasks": Uniform({"nothing": (0.0, 1.0)}), "horizon": 60}
    return MujocoFamily(**{**values, **changes})


def stock_envs(env: str, horizon: int, **options) -> list[gym.Env]:
    return [gym.make(env, max_episode_steps=horizon, **options) for _ in SEEDS]


def compare(family: MujocoFamily, stock: list[gym.Env], tasks, *, threads=1, reward=None) -> int:
    """Step a family beside stock environments until all have ended; return how many fell.

    Actions exceed the bounds, and fade so that some episodes last longer. `reward` is of
    (stock environment, its qpos before, clipped action, task, stock reward).
    """
    vector = family.make_vec(len(tasks), len(SEEDS) // len(tasks), autoreset_mode=DISABLED,
                             threads=threads)  # fmt: skip
    vector.set_tasks(tasks)
    assert vector.single_action_space == stock[0].action_space
    assert vector.single_observation_space == stock[0].observation_space
    per_env = np.repeat(np.asarray(tasks), vector.episodes, axis=0)
    expected = np.stack([e.reset(seed=s)[0] for e, s in zip(stock, SEEDS, strict=True)])
    observation, _ = vector.reset(seed=SEEDS)
    assert np.array_equal(observation, expected)
    space = stock[0].action_space
    ended = np.zeros(len(stock), bool)
    fell = np.zeros(len(stock), bool)
    rng = np.random.default_rng(5)
    for _ in range(family.horizon):
        scale = 1.5 * space.high * np.linspace(0.02, 1.0, len(stock))[:, None]
        action = (scale * rng.standard_normal((len(stock), *space.shape))).astype(np.float32)
        observation, paid, terminated, truncated, info = vector.step(action)
        assert "diverged" not in info
        for i, env in enumerate(stock):
            if ended[i]:
                assert paid[i] == 0.0
            else:
                before = env.unwrapped.data.qpos.copy()
                # In float64, so that the stock cost of control is too.
                clipped = np.clip(action[i], space.low, space.high).astype(np.float64)
                expected[i], stock_reward, fell[i], over, _ = env.step(clipped)
                wanted = stock_reward
                if reward is not None:
                    wanted = reward(env.unwrapped, before, clipped, per_env[i], stock_reward)
                assert paid[i] == pytest.approx(wanted, rel=0, abs=1e-9)
                ended[i] = fell[i] or over
                assert truncated[i] == over
            assert terminated[i] == fell[i]
        assert np.array_equal(observation, expected)
        if ended.all():
            break
    assert ended.all()
    return int(fell.sum())


# Stock bodies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("env", list(BODIES))
def test_a_stock_body_equals_the_stock_environment_bit_for_bit(env, threads):
    fell = compare(bare(env), stock_envs(env, 60), [[0.5], [0.6]], threads=threads)
    # The test sees both kinds of ends, early ones at different times.
    if env in ("Hopper-v5", "Walker2d-v5", "Humanoid-v5"):
        assert fell > 0


def test_contact_forces_are_seen_by_the_comparison():
    vector = bare("Ant-v5").make_vec(1, 2, autoreset_mode=DISABLED)
    vector.reset(seed=0)
    assert not vector.sim["cfrc_ext"].any()
    for _ in range(30):
        vector.step(np.zeros((2, 8), np.float32))
    assert vector.sim["cfrc_ext"].any(axis=(1, 2)).all()
    vector.reset(seed=0, options={"reset_mask": np.array([True, False])})
    assert vector.sim["cfrc_ext"].any(axis=(1, 2)).tolist() == [False, True]


# Built-in families --------------------------------------------------------------------------------


def moved(env, before, axis: int = 0) -> float:
    return (env.data.qpos[axis] - before[axis]) / env.dt


def ant_costs(env, action) -> float:
    forces = np.clip(env.data.cfrc_ext, -1.0, 1.0)
    return 0.005 * np.sum(action**2) + 5e-4 * np.sum(forces**2)


def ant_dir(env, before, action, task, _):
    return task[0] * moved(env, before) + 0.05 - ant_costs(env, action)


def ant_vel(env, before, action, task, _):
    return 1.0 - abs(moved(env, before) - task[0]) + 0.05 - ant_costs(env, action)


def ant_goal(env, before, action, task, _):
    gap = np.abs(env.data.qpos[:2] - task).sum()
    return 4.0 - gap + 0.05 - ant_costs(env, action)


def walker2d_dir(env, before, action, task, _):
    return task[0] * moved(env, before) + 1.0 - 1e-3 * np.sum(action**2)


def walker2d_vel(env, before, action, task, _):
    return 15.0 - abs(moved(env, before) - task[0]) - 1e-3 * np.sum(action**2)


def swimmer_vel(env, before, action, task, _):
    return -abs(moved(env, before) - task[0]) - 1e-4 * np.sum(action**2)


class Heading:
    """The humanoid's reward; remembers where each environment's centre of mass was."""

    def __init__(self):
        self.was = {}

    def __call__(self, env, before, action, task, _):
        mass = env.model.body_mass[:, None]
        if id(env) not in self.was:
            start = mujoco.MjData(env.model)
            start.qpos[:] = before
            mujoco.mj_kinematics(env.model, start)
            self.was[id(env)] = (mass * start.xipos).sum(0) / mass.sum()
        now = (mass * env.data.xipos).sum(0) / mass.sum()
        velocity = (now - self.was[id(env)])[:2] / env.dt
        self.was[id(env)] = now
        along = velocity @ [np.cos(task[0]), np.sin(task[0])]
        return 1.25 * along + 5.0 - 0.1 * np.sum(action**2)


NO_FORCES = {"include_cfrc_ext_in_observation": False}
WITH_POSITION = {"exclude_current_positions_from_observation": False}


@pytest.mark.parametrize(
    ("name", "options", "env", "stock_options", "reward"),
    [
        ("ant-dir", {}, "Ant-v5", {}, ant_dir),
        ("ant-dir", {"contact_forces": False}, "Ant-v5", NO_FORCES, ant_dir),
        ("ant-vel", {"contact_forces": False}, "Ant-v5", NO_FORCES, ant_vel),
        ("ant-goal", {}, "Ant-v5", WITH_POSITION, ant_goal),
        ("walker2d-dir", {}, "Walker2d-v5", {}, walker2d_dir),
        ("walker2d-vel", {"frame_skip": 8}, "Walker2d-v5", {"frame_skip": 8}, walker2d_vel),
        ("swimmer-vel", {}, "Swimmer-v5", {}, swimmer_vel),
        ("humanoid-dir", {}, "Humanoid-v5", {}, Heading()),
        ("humanoid-dir", {"contact_forces": False}, "Humanoid-v5", NO_FORCES, Heading()),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*Overriding environment.*")
def test_a_family_is_the_stock_body_with_the_reward_of_its_task(
    name, options, env, stock_options, reward
):
    family = make_family(name, horizon=40, **options)
    stock = stock_envs(env, 40, **stock_options)
    if "frame_skip" not in options:
        assert family.make().unwrapped.vector.dt == stock[0].unwrapped.dt
    compare(family, stock, family.tasks.grid(2), threads=2, reward=reward)


@pytest.mark.parametrize("name", ["ant-dir", "ant-vel", "ant-goal"])
def test_the_ant_of_icml2017_equals_the_ant_of_rllab(name):
    # A loop over MjData, as rllab's: one step, then all of mj_forward at the new state.
    family = make_family(name, variant="icml2017")
    model = family.model
    assert model.opt.timestep == 0.02
    assert (model.geom_solimp[:, :3] == [0.8, 0.8, 0.01]).all()
    tasks = family.tasks.grid(2)
    vector = family.make_vec(2, 1, autoreset_mode=DISABLED, threads=2)
    vector.set_tasks(tasks)
    observation, _ = vector.reset(seed=3)
    assert observation.shape == (2, 125)
    # Standing at 0.55 m on the model's own pose, not at its default.
    assert np.abs(vector.sim.qpos[:, 2] - 0.55).max() < 0.05
    assert np.abs(np.abs(vector.sim.qpos[:, [8, 10, 12, 14]]) - 1.0).max() < 0.05
    data = [mujoco.MjData(model) for _ in range(2)]
    for i, d in enumerate(data):
        d.qpos[:], d.qvel[:] = vector.sim.qpos[i], vector.sim.qvel[i]
        mujoco.mj_forward(model, d)
    rng = np.random.default_rng(0)
    touched = 0.0
    for _ in range(40):
        action = (0.7 * rng.standard_normal((2, 8))).astype(np.float32)
        observation, reward, *_ = vector.step(action)
        for i, d in enumerate(data):
            d.ctrl[:] = np.clip(action[i], -1, 1)
            mujoco.mj_step(model, d)
            mujoco.mj_forward(model, d)
            mujoco.mj_rnePostConstraint(model, d)
            mujoco.mj_subtreeVel(model, d)
            forces = np.clip(d.cfrc_ext, -1, 1)
            com = d.subtree_com[1]
            expected = np.concatenate([d.qpos, d.qvel, forces.ravel(), d.xmat[1], com])
            np.testing.assert_allclose(observation[i], expected, rtol=0, atol=1e-9)
            speed, goal = d.subtree_linvel[1, 0], tasks[i]
            task_part = {
                "ant-dir": goal[0] * speed,
                "ant-vel": 1.0 - abs(speed - goal[0]),
                "ant-goal": 4.0 - np.abs(com[:2] - goal).sum(),
            }[name]
            cost = 0.005 * np.square(d.ctrl).sum() + 5e-4 * np.square(forces).sum()
            assert reward[i] == pytest.approx(task_part + 0.05 - cost, abs=1e-9)
            touched += np.square(forces).sum()
    assert touched > 0.0


def test_variants_of_the_ant_set_horizon_and_bounds():
    for variant, horizon, bound in (
        ("stock", 200, 1),
        ("promp2019", 100, 10),
        ("pearl2019", 200, 10),
    ):
        family = make_family("ant-dir", variant=variant)
        assert family.horizon == horizon
        assert family.make().action_space.high.tolist() == [bound] * 8
    with refused("variant", "icml", "icml2017"):
        make_family("ant-goal", variant="icml")


# Bodies that vary ---------------------------------------------------------------------------------


def edit_by_hand(model: mujoco.MjModel, names: tuple[str, ...], task: np.ndarray) -> None:
    """Change a model as the names of a task's components say."""
    axes = {"x": 0, "y": 1, "z": 2, "slide": 0, "spin": 1, "roll": 2}
    # Powers of an array: NumPy's of a single number may differ in the last bit.
    by_3_halves, by_13_tenths = np.power(1.5, task), np.power(1.3, task)
    for i, name in enumerate(names):
        kind, _, owner = name.partition("_")
        if kind == "mass":
            model.body(owner).mass *= by_3_halves[i]
        elif kind == "damping":
            model.joint(owner).damping *= by_13_tenths[i]
        else:
            owner, _, axis = owner.rpartition("_")
            values = model.body(owner).inertia if kind == "inertia" else model.geom(owner).friction
            values[axes[axis]] *= by_3_halves[i]
    mujoco.mj_setConst(model, mujoco.MjData(model))


@pytest.mark.parametrize(
    ("name", "env"), [("hopper-params", "Hopper-v5"), ("walker2d-params", "Walker2d-v5")]
)
def test_varied_bodies_equal_stock_bodies_edited_by_hand(name, env):
    family = make_family(name, horizon=40)
    tasks = family.tasks.sample(np.random.default_rng(2), 2)
    stock = stock_envs(env, 40)
    for one, task in zip(stock, np.repeat(tasks, 2, axis=0), strict=True):
        edit_by_hand(one.unwrapped.model, family.tasks.names, task)
    compare(family, stock, tasks, threads=2)
    # Every parameter that can be scaled is.
    model, edited = family.model, stock[0].unwrapped.model
    for field in ("body_mass", "body_inertia", "dof_damping", "geom_friction"):
        before, after = getattr(model, field), getattr(edited, field)
        assert np.array_equal(before == after, before == 0.0)


def test_a_body_changes_at_its_own_reset_only():
    family = make_family("hopper-params")
    vector = family.make_vec(2, 1, autoreset_mode=DISABLED)
    first, second = family.tasks.sample(np.random.default_rng(0), 2)
    vector.set_tasks([first, first])
    vector.reset(seed=0)
    vector.set_tasks([second, second])
    assert np.array_equal(*vector.batch.expanded("body_mass"))
    vector.reset(seed=0, options={"reset_mask": np.array([False, True])})
    for i, task in enumerate((first, second)):
        edited = load_model("hopper.xml")
        edit_by_hand(edited, family.tasks.names, task)
        ours = vector.batch.get_model(i)
        for field in ("body_mass", "dof_damping", "body_subtreemass", "body_invweight0"):
            assert np.array_equal(getattr(ours, field), getattr(edited, field)), field


def test_a_varied_body_does_not_depend_on_the_other_tasks():
    family = make_family("walker2d-params")
    tasks = family.tasks.sample(np.random.default_rng(0), 5)
    together = scaled_parameters(family.model, tasks)
    for i in range(5):
        for field, values in scaled_parameters(family.model, tasks[i : i + 1]).items():
            assert np.array_equal(values[0], together[field][i])


def test_tasks_cover_the_range_of_each_of_many_components():
    tasks = make_family("walker2d-params").tasks
    grid = tasks.grid(12)
    assert grid.shape == (12, tasks.dim)
    assert np.array_equal(grid, tasks.grid(12))
    np.testing.assert_allclose(np.sort(grid, axis=0)[:, 0], np.linspace(-2.75, 2.75, 12))
    np.testing.assert_allclose(np.sort(grid, axis=0)[:, -1], np.linspace(-2.75, 2.75, 12))
    assert len(np.unique(np.argsort(grid, axis=0), axis=1).T) > 50  # no two axes alike
    assert f"({tasks.dim} components)" in tasks.describe()


# A family of one's own ----------------------------------------------------------------------------


def heavier(model, tasks):
    masses, inertias = tasks[:, :1] * model.body_mass, tasks[:, :, None] * model.body_inertia
    return {"body_mass": masses, "body_inertia": inertias}


def tip_height(sim):
    return np.concatenate([sim.qpos, sim.qvel, sim["site_xpos"][:, 0, 2:]], axis=1)


def start(rng, model):
    return rng.uniform(-0.1, 0.1, model.nq), np.zeros(model.nv)


def alive(step):
    return costs_and_bonus(step, control=0.1, bonus=1.0)


PENDULUM = """<mujoco><option timestep="0.01" gravity="0 0 0"/><worldbody><body>
<joint name="hinge" type="hinge" axis="0 1 0"/>
<geom size="0.05" fromto="0 0 0 0 0 1" type="capsule"/>
<site name="tip" pos="0 0 1"/></body></worldbody>
<actuator><motor joint="hinge" ctrllimited="true" ctrlrange="-1 1"/></actuator></mujoco>"""


@pytest.mark.filterwarnings("ignore:.*A Box observation space m.*imum value is .*infinity")
def test_a_users_own_model_becomes_a_family(tmp_path):
    path = tmp_path / "pendulum.xml"
    path.write_text(PENDULUM)
    family = MujocoFamily(
        name="own", xml=str(path), frame_skip=3, horizon=50, tasks=Uniform({"mass": (0.5, 2.0)}),
        observe=tip_height, reward=alive, initial_state=start, model_fields=heavier,
        fields=("site_xpos",), stage=int(mujoco.mjtStage.mjSTAGE_POS),
    )  # fmt: skip
    family = pickle.loads(pickle.dumps(family))
    vector = family.make_vec(2, 2, autoreset_mode=DISABLED)
    vector.set_tasks([[0.5], [2.0]])
    vector.reset(seed=[1, 2, 1, 2])
    for _ in range(5):
        observation, reward, *_ = vector.step(np.full((4, 1), 5.0, np.float32))
        np.testing.assert_allclose(observation[:, 2], np.cos(observation[:, 0]), atol=1e-12)
        np.testing.assert_allclose(reward, 0.9)
    # The same torque turns one of four times the inertia a fourth as fast.
    np.testing.assert_allclose(observation[:2, 1], 4 * observation[2:, 1], rtol=1e-9)
    check_env(family.make(np.array([1.0])), skip_render_check=True)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"env": "Hoper-v5"}, ["Hoper-v5", "Hopper-v5"]),
        (
            {"env": None, "xml": "ant.xml"},
            ["bare", "frame_skip", "observe", "reward", "initial_state", "env"],
        ),
        ({"frame_skip": 0}, ["bare", "frame_skip", 0]),
        ({"fields": ("xpso",)}, ["bare", "xpso", "xpos"]),
    ],
)
def test_wrong_and_missing_arguments_of_a_family_are_refused(changes, names):
    with refused(*names):
        bare(**changes)


def test_unknown_fields_and_files_that_a_family_uses_are_refused():
    with refused("site_xpos", "fields"):
        bare(observe=tip_height).make_vec(1, 1)
    with refused("nowhere.xml"):
        bare(xml="nowhere.xml").make_vec(1, 1)
    vector = bare(model_fields=lambda model, tasks: {"body_mss": tasks}).make_vec(1, 1)
    with refused("bare", "model_fields", "body_mss", "body_mass"):
        vector.reset(seed=0)
    vector = bare(model_fields=lambda model, tasks: {"body_mass": np.ones((1, 2))}).make_vec(1, 1)
    with refused("bare", "model_fields", "body_mass"):
        vector.reset(seed=0)


# Gymnasium ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("id", "task"),
    [
        ("metarl/AntDir-v0", {"direction": -1.0}),
        ("metarl/AntGoal-v0", {"goal": (1.0, -2.0)}),
        ("metarl/AntVel-v0", {"velocity": 2.0, "contact_forces": False}),
        ("metarl/HopperParams-v0", {}),
        ("metarl/HumanoidDir-v0", {"angle": 3.0}),
        ("metarl/SwimmerVel-v0", {"velocity": 0.15}),
        ("metarl/Walker2dDir-v0", {"direction": 1.0}),
        ("metarl/Walker2dParams-v0", {}),
        ("metarl/Walker2dVel-v0", {"velocity": 3.0}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*A Box observation space m.*imum value is .*infinity")
def test_gymnasium_ids_make_single_and_vector_environments(id, task):
    assert id in gym.registry
    env = gym.make(id, **task)
    check_env(env.unwrapped, skip_render_check=True)
    vector = gym.make_vec(id, num_envs=2, **task)
    action = env.action_space.sample()
    assert np.array_equal(vector.reset(seed=4)[0][0], env.reset(seed=4)[0])
    one, two = env.step(action), vector.step(np.stack([action] * 2))
    assert np.array_equal(two[0][0], one[0])
    assert two[1][0] == one[1]


# The physics ceiling ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "action"), [("ant-dir", "clip"), ("hopper-params", "clip"), ("humanoid-dir", "scale")]
)
def test_the_physics_ceiling_replays_the_states_of_the_rollout(name, action, monkeypatch):
    values = {"iterations": 1, "tasks": 2, "episodes": 3, "threads": 2}
    network = {"policy.hidden": (8,), "policy.action": action}
    config = Config.of(name, "maml-trpo", {"horizon": 40}).with_options(values | network)
    made = []
    with new_trainer(config) as trainer:
        seen: list = []
        trainer.iterate(on_rollouts=seen.extend)
        make_vec = MujocoFamily.make_vec
        monkeypatch.setattr(
            MujocoFamily, "make_vec", lambda *a, **k: made.append(make_vec(*a, **k)) or made[-1]
        )
        assert len({int(n) for n in seen[0].valid.sum(-1).flatten()}) > 1 or name == "ant-dir"
        for k, rollout in enumerate(seen):
            assert (
                physics_seconds(trainer, rollout, RandomKey(config.run.seed, 0, inner_step=k)) > 0.0
            )
    for env, rollout in zip(made, seen, strict=True):
        last = rollout.last_observation.flatten(0, 1).numpy()
        root = {"ant-dir": 2, "hopper-params": 1, "humanoid-dir": 2}[name]
        size = env.model.nq - root
        # Positions head these observations, whatever else they hold.
        assert np.array_equal(last[:, :size], env.sim.qpos[:, root:].astype(np.float32))
