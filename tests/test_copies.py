"""Arrays that cross the API are copies: whoever keeps or changes one changes nothing else."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from expecting import refused

from metarl import load, resolve, train
from metarl.envs import (
    Finite,
    FunctionFamily,
    GymnasiumFamily,
    MujocoFamily,
    TaskFamily,
    Uniform,
    make_family,
)
from metarl.envs.mujoco.simulation import Sim, Step
from metarl.envs.supervised.few_shot import FewShotFamily
from metarl.policies.adapted_predictor import AdaptedPredictor
from metarl.policies.meta_policy import MetaPolicy
from metarl.policies.policy import Policy
from metarl.runs.metrics import read_metrics
from metarl.training.callbacks import Iteration
from metarl.training.run import new_trainer

ARM = """
<mujoco><option timestep="0.01"/><worldbody><body pos="0 0 1">
  <joint name="swing" type="hinge" axis="0 1 0" damping="0.1"/>
  <geom type="capsule" size="0.03" fromto="0 0 0 0 0 -0.4" mass="1"/>
</body></worldbody><actuator><motor joint="swing" gear="3" ctrlrange="-1 1"/></actuator></mujoco>
"""


# Families that hand out arrays which they go on writing to ---------------------------------------


def live_observation(sim: Sim) -> np.ndarray:
    return sim.qpos


def live_reward(step: Step) -> tuple[np.ndarray, dict[str, Any]]:
    return step.sim.qpos[:, 0], {"angle": step.sim.qpos[:, 0], "velocity": step.sim.qvel[:, 0]}


def copied_observation(sim: Sim) -> np.ndarray:
    return sim.qpos.copy()


def copied_reward(step: Step) -> tuple[np.ndarray, dict[str, Any]]:
    reward, info = live_reward(step)
    return reward.copy(), {key: value.copy() for key, value in info.items()}


def start(rng: np.random.Generator, model: Any) -> tuple[np.ndarray, np.ndarray]:
    return rng.uniform(-0.1, 0.1, model.nq), np.zeros(model.nv)


def arm(folder: str, live: bool = True) -> MujocoFamily:
    path = Path(folder) / "arm.xml"
    path.write_text(ARM)
    return MujocoFamily(
        name="arm", xml=str(path), frame_skip=5, tasks=Uniform({"angle": (-1.0, 1.0)}), horizon=8,
        observe=live_observation if live else copied_observation,
        reward=live_reward if live else copied_reward, initial_state=start,
    )  # fmt: skip


class Selfish(gym.Env):
    """Observes, and reports in info, arrays that it goes on writing to; writes to its action."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    task = np.zeros(1)

    def __init__(self, gain: np.ndarray | None = None, render_mode: str | None = None) -> None:
        self.gain = np.ones(1) if gain is None else gain
        self.render_mode = render_mode
        self.state = np.zeros(2, np.float32)
        self.info = {"state": self.state, "nested": {"state": self.state}}
        self.frame = np.zeros((8, 8, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state[:] = self.np_random.uniform(-0.1, 0.1, 2)
        return self.state, self.info

    def step(self, action):
        self.state[0] += self.gain[0] * action[0]
        self.state[1] += 1.0
        action[:] = 0.0
        self.gain *= 1.0
        self.frame += 1
        return self.state, -abs(float(self.state[0] - self.task[0])), False, False, self.info

    def render(self):
        return self.frame


def paid_by_action(before, action, after, info, task) -> np.ndarray:
    return action[:, 0] * task[:, 0]


def selfish(**changes: Any) -> GymnasiumFamily:
    values = {"name": "selfish", "env": Selfish, "tasks": Uniform({"goal": (-1.0, 1.0)})}
    return GymnasiumFamily(**{**values, "horizon": 6, **changes})


@pytest.fixture(params=["native", "gymnasium", "navigation-2d", "bandit"])
def family(request, tmp_path) -> TaskFamily:
    if request.param == "native":
        return arm(str(tmp_path))
    return selfish() if request.param == "gymnasium" else make_family(request.param, horizon=6)


def arrays(value: Any) -> list[np.ndarray]:
    """Return all arrays in a value."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [a for inner in value for a in arrays(inner)] if isinstance(value, (list, tuple)) else []


def an_action(space: gym.Space) -> Any:
    space.seed(0)
    return space.sample()


# Environments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True])
def test_what_an_environment_returned_stays_as_it_was(family, several):
    env: Any = family.make_vec(2, 2) if several else family.make(family.tasks.grid(1)[0])
    with contextlib.closing(env):
        kept = [env.reset(seed=1)]
        kept += [env.step(an_action(env.action_space)) for _ in range(3)]
        as_they_were = copy.deepcopy(kept)
        for _ in range(2):
            env.step(an_action(env.action_space))
        env.reset(seed=2)
    for now, before in zip(arrays(kept), arrays(as_they_were), strict=True):
        np.testing.assert_array_equal(now, before)


@pytest.mark.parametrize("several", [False, True])
def test_writing_to_what_an_environment_returned_changes_no_episode(family, several):
    def played(writing: bool) -> list[Any]:
        env: Any = family.make_vec(2, 2) if several else family.make(family.tasks.grid(1)[0])
        with contextlib.closing(env):
            seen = []
            result: Any = env.reset(seed=1)
            for _ in range(8):
                seen.append(copy.deepcopy(result))
                for array in arrays(result) if writing else []:
                    array[...] = 1
                if not several and len(seen) == 6:  # it has ended
                    break
                result = env.step(an_action(env.action_space))
        return seen

    for one, other in zip(arrays(played(True)), arrays(played(False)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_tasks_of_an_environment_are_not_changed_from_outside(family):
    given = family.tasks.grid(2)
    with contextlib.closing(family.make_vec(2, 2)) as env:
        env.set_tasks(given)
        given[...] = 0.123
        _, info = env.reset(seed=0)
        wanted = np.repeat(family.tasks.grid(2), 2, axis=0)
        np.testing.assert_array_equal(info["task"], wanted)
        env.tasks[...] = 0.123
        info["task"][...] = 0.123
        np.testing.assert_array_equal(env.tasks, wanted)
    task = family.tasks.grid(1)[0]
    with contextlib.closing(family.make(task)) as env:
        task[...] = 0.123
        np.testing.assert_array_equal(env.reset(seed=0)[1]["task"], family.tasks.grid(1)[0])


def test_actions_that_were_given_stay_as_they_were():
    with contextlib.closing(selfish().make_vec(2, 1)) as env:
        env.reset(seed=0)
        actions = np.full((2, 1), 0.5, np.float32)
        env.step(actions)
    np.testing.assert_array_equal(actions, 0.5)


@pytest.mark.parametrize("several", [False, True])
def test_a_reward_sees_the_action_as_it_was_given(several):
    family = selfish(reward=paid_by_action)
    with contextlib.closing(family.make_vec(1, 1) if several else family.make([1.0])) as env:
        if several:
            env.set_tasks([[1.0]])  # type: ignore[union-attr]
        env.reset(seed=0)
        action = np.full((1, 1) if several else (1,), 0.5, np.float32)
        assert float(np.squeeze(env.step(action)[1])) == 0.5


def test_frames_stay_as_they_were():
    with contextlib.closing(selfish().make(np.zeros(1), render_mode="rgb_array")) as env:
        env.reset(seed=0)
        frames = []
        for _ in range(3):
            env.step(np.zeros(1, np.float32))
            frames.append(env.render())
    assert [int(frame.max()) for frame in frames] == [1, 2, 3]  # type: ignore[union-attr]


def test_options_of_an_environment_are_each_ones_own():
    gain = np.ones(1)
    family = selfish(env_options={"gain": gain})
    gain[0] = 7.0
    with contextlib.closing(family.make()) as one, contextlib.closing(family.make()) as other:
        one.unwrapped.gain[0] = 5.0  # type: ignore[attr-defined]
        assert other.unwrapped.gain[0] == 1.0  # type: ignore[attr-defined]


def test_a_family_that_observes_live_arrays_trains_as_one_that_copies(tmp_path):
    def trained(live: bool) -> MetaPolicy:
        overrides = {
            "family_options": {"folder": str(tmp_path), "live": live}, "tasks": 3, "episodes": 3,
            "iterations": 2, "policy.hidden": (4,), "threads": 1,
        }  # fmt: skip
        config = resolve(None, "test_copies:arm", overrides=overrides)
        return train(config, tmp_path / f"run-{live}")

    live, copied = trained(True), trained(False)
    assert all(torch.equal(live.params[name], copied.params[name]) for name in live.params)


@pytest.mark.parametrize("role", ["observe", "track"])
def test_a_function_that_writes_to_the_simulations_is_stopped(tmp_path, role):
    def write(sim: Sim) -> np.ndarray:
        sim.qpos[:] = 0.0
        return sim.qpos

    family = dataclasses.replace(arm(str(tmp_path)), **{role: write})
    with pytest.raises(ValueError):  # noqa: PT011  (NumPy's)
        family.make_vec(1, 1)


def position_before(sim: Sim) -> np.ndarray:
    return sim.qpos[:, 0]


def moved(step: Step) -> tuple[np.ndarray, dict[str, Any]]:
    return np.abs(step.sim.qpos[:, 0] - step.before), {}


def test_what_is_tracked_is_that_before_the_step(tmp_path):
    family = dataclasses.replace(arm(str(tmp_path)), track=position_before, reward=moved)
    with contextlib.closing(family.make(np.zeros(1))) as env:
        env.reset(seed=0)
        assert float(env.step(np.ones(1, np.float32))[1]) > 0.0


def writes_to_its_task(step: Step) -> tuple[np.ndarray, dict[str, Any]]:
    step.task[...] += 1.0
    return step.task[:, 0], {}


def test_a_reward_that_writes_to_the_task_changes_it_for_nobody_else(tmp_path):
    family = dataclasses.replace(arm(str(tmp_path)), reward=writes_to_its_task)
    with contextlib.closing(family.make(np.array([0.5]))) as env:
        env.reset(seed=0)
        rewards = [float(env.step(np.zeros(1, np.float32))[1]) for _ in range(3)]
    assert rewards == [1.5] * 3


# Tasks and data -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tasks",
    [
        Uniform({"a": (0.0, 1.0), "b": (2.0, 3.0)}, test={"a": (1.0, 2.0), "b": (3.0, 4.0)}),
        Finite(("a", "b"), [[0.0, 1.0], [2.0, 3.0]]),
        make_family("ant-goal").tasks,
        make_family("bandit").tasks,
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_writing_to_what_a_distribution_gave_does_not_change_it(tasks, split):
    def given() -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        drawn = [tasks.sample(rng, 4, split), tasks.stratified(rng, 4)]
        return [*tasks.bounds(split), tasks.grid(4, split), *drawn]

    before = copy.deepcopy(given())
    for array in given():
        array[...] = 9.0
    for now, then in zip(given(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_values_that_a_list_of_tasks_was_made_of_may_change():
    values, held_out = np.zeros((2, 1)), np.ones((2, 1))
    tasks = Finite(("a",), values, test=held_out)  # type: ignore[arg-type]
    values += 5.0
    held_out += 5.0
    assert tasks.grid(2, "train").max() == 0.0
    assert tasks.grid(2, "test").max() == 1.0


def few_shot(images: np.ndarray, labels: np.ndarray) -> FewShotFamily:
    return FewShotFamily(images, labels, ways=2, shots=1, queries=2, test_queries=2)


def test_images_that_a_family_was_made_of_may_change():
    images, labels = np.random.default_rng(0).random((60, 4, 4)), np.repeat(np.arange(10), 6)
    family = few_shot(images, labels)
    tasks = family.tasks.grid(3, "train")

    def drawn() -> list[np.ndarray]:
        return arrays(family.draw(tasks, np.random.default_rng(1), supports=1, queries=2))

    before = copy.deepcopy(drawn())
    images[...], labels[...] = 0.0, 0
    again = dataclasses.replace(family, description="the same")
    for now, then in zip(drawn(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    np.testing.assert_array_equal(again.pixels, family.pixels)


def test_read_only_images_are_not_copied():
    images = np.random.default_rng(0).random((60, 4, 4))
    images.flags.writeable = False
    family = few_shot(images, np.repeat(np.arange(10), 6))
    assert np.shares_memory(family.pixels, images)


def doubles_in_place(x: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    tasks *= 2.0
    x *= 2.0
    return x * tasks[:, :1]


def test_a_function_that_writes_to_its_arguments_changes_no_task_and_no_input():
    family = FunctionFamily(
        name="lines", function=doubles_in_place, interval=(-1.0, 1.0), shots=3,
        tasks=Uniform({"slope": (1.0, 2.0)}),
    )  # fmt: skip
    tasks = family.tasks.grid(2)
    data = family.at(np.ones((2, 3)), tasks)
    np.testing.assert_array_equal(tasks, family.tasks.grid(2))
    np.testing.assert_array_equal(data.inputs, 1.0)


def test_options_of_a_family_may_change_after_the_config_is_made():
    values = [1, 2]
    config = resolve(
        None, "navigation-2d", overrides={"family_options": {"horizon": 5, "odd": values}}
    )
    values.append(3)
    assert config.setup.family_options["odd"] == [1, 2]


# Runs ---------------------------------------------------------------------------------------------


def small(**overrides: Any):
    values = {
        "family_options": {"horizon": 8}, "tasks": 3, "episodes": 3, "iterations": 3,
        "policy.hidden": (4,), "threads": 1, "preset": None, **overrides,
    }  # fmt: skip
    values.pop("preset")
    return resolve(None, "navigation-2d", overrides=values)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("copies") / "run"
    train(small(), folder)
    return folder


def test_a_callback_that_writes_to_its_metrics_changes_no_record(tmp_path, whole):
    def spoil(iteration: Iteration) -> None:
        row = iteration.metrics
        row["returns"][:] = [0.0]
        row.update(dict.fromkeys(row, 0))

    train(small(), tmp_path / "run", callbacks=[spoil])
    keys = ("iteration", "env_steps", "returns", "return_post", "kl")
    one, other = (
        [[row[key] for key in keys] for row in read_metrics(folder)]
        for folder in (tmp_path / "run", whole)
    )
    assert one == other


def test_writing_to_shown_rollouts_changes_no_metric_and_no_parameter():
    def spoil(rollouts: list[Any]) -> None:
        for rollout in rollouts:
            for value in vars(rollout).values():
                parts = value.values() if isinstance(value, dict) else [value]
                for part in parts:
                    if isinstance(part, torch.Tensor):
                        part.zero_()
        rollouts.clear()

    def two(show: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
        with new_trainer(small()) as trainer:
            rows = [trainer.iterate(show) for _ in range(2)]
            return [row["returns"] for row in rows], trainer.meta_policy().params

    (one, params), (other, others) = two(spoil), two(None)
    assert one == other
    assert all(torch.equal(params[name], others[name]) for name in params)


def test_a_policy_taken_from_a_trainer_is_apart_from_it():
    with new_trainer(small()) as trainer, new_trainer(small()) as untouched:
        for p in trainer.meta_policy().params.values():
            p.zero_()
        assert trainer.iterate()["returns"] == untouched.iterate()["returns"]


# Policies -----------------------------------------------------------------------------------------


def zeroed(params: dict[str, torch.Tensor]) -> None:
    for p in params.values():
        p.zero_()


def test_policies_own_their_parameters(whole):
    meta = load(whole)
    given = {name: p.clone() for name, p in meta.params.items()}
    made = MetaPolicy(given, meta.setup)
    policy = meta.adapt(np.zeros(2), steps=0, episodes=1)
    online = meta.adapter()
    again = Policy(policy.policy, dict(policy.params), gym.spaces.Box(-1.0, 1.0, (2,)), 8,
                   "clip", policy.provenance, meta.record)  # fmt: skip
    seen = np.array([0.1, 0.2])
    before = [p.act(seen, deterministic=True) for p in (policy, again, online.adapted())]
    zeroed(given)
    zeroed(meta.params)
    assert any(p.any() for p in made.params.values())
    after = [policy.act(seen, deterministic=True), online.adapted().act(seen, deterministic=True)]
    zeroed(policy.params)
    after.insert(1, again.act(seen, deterministic=True))
    np.testing.assert_array_equal(before, after)


def test_a_module_may_be_trained_without_changing_the_policy(whole):
    policy = load(whole).adapt(np.zeros(2), episodes=1)
    seen = np.array([0.1, 0.2])
    before = policy.act(seen, deterministic=True)
    with torch.no_grad():
        for p in policy.module().parameters():
            p.zero_()
    np.testing.assert_array_equal(policy.act(seen, deterministic=True), before)


def test_an_adapted_predictor_is_apart_from_its_meta_policy(tmp_path):
    overrides = {"iterations": 1, "tasks": 2, "policy.hidden": (4,)}
    # ANIL adapts the last layer: the others are as they were.
    meta = train(resolve(None, "sinusoid", "anil", overrides=overrides), tmp_path / "run")
    x = np.linspace(-1.0, 1.0, 5)[:, None]
    predictor = meta.adapt_to(x, x)
    assert isinstance(predictor, AdaptedPredictor)
    before = predictor.predict(x)
    zeroed(meta.params)
    np.testing.assert_array_equal(predictor.predict(x), before)


def adapted_online(whole: Path, reused: bool) -> dict[str, torch.Tensor]:
    """Adapt on made-up transitions; with `reused`, from arrays that the caller writes to again."""
    adapter = load(whole).adapter()
    rng = np.random.default_rng(0)
    observation, action = np.zeros(2, np.float32), np.zeros(2, np.float32)
    for _ in range(8):
        if not reused:
            observation, action = observation.copy(), action.copy()
        observation[:] = rng.normal(size=2)
        action[:] = adapter.act(observation)
        adapter.add(observation, action, float(rng.normal()))
        if reused:
            observation[:] = action[:] = 0.0
    return adapter.adapted().params


def test_an_online_adapter_keeps_what_it_was_given(whole):
    one, other = adapted_online(whole, reused=True), adapted_online(whole, reused=False)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_documented_loop_adapts_alike_on_live_observations(tmp_path):
    def adapted(live: bool) -> dict[str, torch.Tensor]:
        family = arm(str(tmp_path), live)
        overrides = {
            "family_options": {"folder": str(tmp_path)}, "tasks": 2, "episodes": 2,
            "policy.hidden": (4,), "threads": 1,
        }  # fmt: skip
        with new_trainer(resolve(None, "test_copies:arm", overrides=overrides)) as trainer:
            adapter = trainer.meta_policy().adapter(family.make().action_space)
        with contextlib.closing(family.make(np.array([0.5]))) as env:
            observation, _ = env.reset(seed=3)
            for _ in range(8):
                action = adapter.act(observation)
                following, reward, terminated, truncated, _ = env.step(action)
                adapter.add(observation, action, float(reward), terminated, truncated)
                observation = following
        return adapter.adapted().params

    live, copied = adapted(True), adapted(False)
    assert all(torch.equal(live[name], copied[name]) for name in live)


def test_writing_to_an_action_does_not_change_what_the_adapter_drew(whole):
    adapter, other = load(whole).adapter(), load(whole).adapter()
    for spoiled, each in ((True, adapter), (False, other)):
        for _ in range(8):
            seen = np.array([0.1, 0.2])
            action = each.act(seen)
            taken = action.copy()
            if spoiled:
                action[:] = 0.0
                seen_again = np.array([0.1, 0.2])
                seen[:] = 0.0
                seen = seen_again
            each.add(seen, taken, float(taken[0]))
    one, two = adapter.adapted().params, other.adapted().params
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_policy_from_an_online_adapter_is_apart_from_it(whole):
    adapter, untouched = load(whole).adapter(), load(whole).adapter()
    zeroed(adapter.adapted().params)
    seen = np.array([0.1, 0.2])
    np.testing.assert_array_equal(adapter.act(seen), untouched.act(seen))


def test_step_sizes_that_are_no_numbers_are_still_refused(whole):
    with refused("0.0"):
        load(whole).adapt(np.zeros(2), step_sizes=np.array([0.0]))
