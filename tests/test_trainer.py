"""Runs: metrics, exact resume, threads, faults; on a small navigation task."""

from __future__ import annotations

import dataclasses
import math
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CountingEnv, counting_family, same_params, small, timeless
from expecting import mentions, refused, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metarl import evaluate, load, resolve, train
from metarl.envs import GymnasiumFamily, MujocoFamily, Uniform, make_family
from metarl.envs.mujoco.family import MujocoVectorEnv
from metarl.models.distributions import Gaussian
from metarl.policies.loading import newest_checkpoint, run_config
from metarl.policies.meta_policy import MetaPolicy
from metarl.runs.checkpoints import CheckpointError
from metarl.runs.folder import RunError, load_state, locked
from metarl.runs.metrics import read_metrics
from metarl.training.run import new_trainer


def test_a_run_leaves_metrics_events_config_and_checkpoints(tmp_path):
    seen: list = []
    meta = train(small(), tmp_path / "run", callbacks=[seen.append])
    rows = read_metrics(tmp_path / "run")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert len(seen) == 4
    needed = (
        "env_steps return_pre return_post kl surrogate_before surrogate_after line_search_steps"
        " policy_std seconds_rollout seconds_update seconds_iteration env_steps_per_second"
    )
    assert set(needed.split()) <= set(rows[0])
    assert rows[-1]["env_steps"] <= 4 * 2 * 5 * 4 * 12
    assert abs(rows[0]["surrogate_before"]) < 1e-6  # advantages are normalized, ratios are 1
    assert run_config(tmp_path / "run") == small()
    names = [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert names == [f"{i:06d}.safetensors" for i in (0, 2, 4)]
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    points = events.Scalars("rollout/ep_rew_mean_post")
    assert [p.step for p in points] == [row["env_steps"] for row in rows]
    assert points[-1].value == pytest.approx(rows[-1]["return_post"], rel=1e-6)
    assert same_params(load(tmp_path / "run"), meta)
    assert load(tmp_path / "run").provenance["iteration"] == 4


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    whole = train(small(iterations=6), tmp_path / "whole")
    train(small(iterations=2), tmp_path / "parts")
    # A crash may leave metrics beyond the checkpoint and a line cut short.
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 3, "env_steps": 1}\n{"iterat')
    for iterations in (3, 6):
        parts = train(small(iterations=iterations), tmp_path / "parts", resume=True)
    assert same_params(whole, parts)
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")
    events = EventAccumulator(str(tmp_path / "parts")).Reload()
    assert len(events.Scalars("rollout/ep_rew_mean_post")) == 6


@pytest.mark.parametrize("name", ["navigation-2d", "half-cheetah-vel"])
def test_a_run_is_the_same_at_any_number_of_threads(tmp_path, name):
    runs = []
    for threads in (1, 2, 3):
        config = small(family=name, threads=threads, iterations=2, **{"inner.steps": 2})
        runs.append(train(config, tmp_path / str(threads)))
    for threads in (2, 3):
        assert same_params(runs[0], runs[threads - 1])
        assert timeless(tmp_path / "1") == timeless(tmp_path / str(threads))
    other = train(small(family=name, iterations=2, seed=1), tmp_path / "other")
    assert not same_params(runs[0], other)


def test_the_inner_step_is_fitted_to_a_kl_and_kept_with_the_policy(tmp_path):
    def config(**changes):
        return small(**{"inner.min_kl": 0.3, **changes})

    whole = train(config(), tmp_path / "whole")
    rows = read_metrics(tmp_path / "whole")
    assert all(row["inner_kl"] == pytest.approx(0.3, rel=0.1) for row in rows)
    assert len({row["step_size"] for row in rows}) > 1
    train(config(iterations=2), tmp_path / "parts")
    parts = train(config(threads=1), tmp_path / "parts", resume=True)
    assert same_params(whole, parts)
    size = rows[-1]["step_size"]
    result = evaluate(load(tmp_path / "whole"), tasks=2, episodes=2, steps=2, threads=1)
    assert result.curve.step_sizes == [pytest.approx(size)] * 2
    fixed = evaluate(whole, tasks=2, episodes=2, steps=2, threads=1, step_sizes=[size])
    assert np.allclose(result.curve.per_task, fixed.curve.per_task)
    with refused("inner.min_kl"):
        train(config(algorithm="meta-sgd"), tmp_path / "learned")


def test_a_step_that_reaches_the_kl_is_not_rescaled(tmp_path):
    config = small(**{"inner.min_kl": 1e-4, "inner.step_sizes": (0.4, 0.2)})
    train(config, tmp_path / "fitted")
    train(config.with_options({"inner.min_kl": 0.0}), tmp_path / "given")
    fitted, given = (read_metrics(tmp_path / name) for name in ("fitted", "given"))
    assert [row["step_size"] for row in fitted] == [pytest.approx(0.4)] * len(fitted)
    assert all(row["inner_kl"] > 1e-3 for row in fitted)
    assert [row["return_post"] for row in fitted] == [row["return_post"] for row in given]


def test_a_stopped_run_has_saved_its_last_iteration(tmp_path):
    rows: list = []
    meta = train(small(), tmp_path / "run", callbacks=[rows.append], stop=lambda: len(rows) == 2)
    assert meta.provenance["iteration"] == 2
    assert newest_checkpoint(tmp_path / "run").stem == "000002"


def test_a_user_family_trains_by_module_and_attribute(tmp_path, monkeypatch):
    (tmp_path / "own_family.py").write_text(
        "from metarl.envs import GymnasiumFamily, Uniform\n"
        "def put(env, task):\n    env.g = float(task[0])\n"
        "pendulums = GymnasiumFamily(name='pendulum', env='Pendulum-v1', set_task=put,\n"
        "    tasks=Uniform({'gravity': (5.0, 15.0)}), horizon=20)\n"
    )
    monkeypatch.chdir(tmp_path)
    config = small(family="own_family:pendulums", family_options={}, iterations=2)
    meta = train(config, tmp_path / "run")
    assert load(tmp_path / "run").family.name == "pendulum"
    assert same_params(meta, load(tmp_path / "run"))


# Faults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"mine": 1}'), ("checkpoints/best.pt", "mine"), (".git/HEAD", "ref"),
        (".notes.2024", "mine"), ("lock", "mine"),
    ],
)  # fmt: skip
def test_a_folder_of_other_things_is_refused_and_stays_as_it_is(tmp_path, name, text):
    path = tmp_path / "project" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    never_run = small(family="test_trainer:failing", family_options={})
    with refused(tmp_path / "project", "--out", error=RunError) as caught:
        train(never_run, tmp_path / "project")
    assert not mentions(str(caught.value), "--resume")  # there is nothing to continue
    assert [p for p in (tmp_path / "project").rglob("*") if p.is_file()] == [path]
    assert path.read_text() == text


def test_a_lengthened_run_that_was_stopped_continues_to_its_new_length(tmp_path):
    folder, done = tmp_path / "run", []
    train(small(iterations=1), folder)
    stop = {"callbacks": [done.append], "stop": lambda: len(done) == 1}
    train(small(iterations=4), folder, resume=True, **stop)
    assert len(read_metrics(folder)) == 2
    train(run_config(folder), folder, resume=True)
    assert len(read_metrics(folder)) == 4
    train(small(iterations=4), tmp_path / "whole")
    assert timeless(folder) == timeless(tmp_path / "whole")


def test_asking_for_fewer_iterations_than_a_run_has_keeps_its_length(tmp_path):
    folder, done, told = tmp_path / "run", [], []
    config = small(**{"outer.schedule": "cosine"})
    train(config, folder, callbacks=[done.append], stop=lambda: len(done) == 2)
    before = (folder / "config.json").read_bytes()
    fewer = config.with_options({"iterations": 1})
    train(fewer, folder, resume=True, notice=told.append)
    assert not told
    assert (folder / "config.json").read_bytes() == before
    assert len(read_metrics(folder)) == 2
    with refused("start", 2, "resume"):
        train(config, tmp_path / "new", start=2)
    with refused("resume", "yes", "auto"):
        train(config, tmp_path / "new", resume="yes")  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_a_deviation_never_stays_below_its_floor(tmp_path):
    # It starts there, and the first updates lower it: without a bound its parameter goes below.
    options = {"policy.initial_std": 0.5, "policy.min_std": 0.5, "outer.max_kl": 0.1}
    meta = train(small(**options), tmp_path / "run")
    floor = torch.tensor(math.log(0.5))
    assert (meta.params["log_std"] >= floor).all()
    std = float(meta.params["log_std"].exp().mean())
    assert read_metrics(tmp_path / "run")[-1]["policy_std"] == pytest.approx(std)
    with refused("policy.min_std", 2.0, "policy.initial_std", 0.5):
        small(**{**options, "policy.min_std": 2.0})


@pytest.mark.parametrize("found", [-1e-9, 0.0])
def test_a_kl_below_zero_by_rounding_leaves_the_step_size(monkeypatch, found):
    kl = Gaussian.kl
    monkeypatch.setattr(Gaussian, "kl", lambda *given: torch.full_like(kl(*given), found))
    inner = {"inner.min_kl": 0.3, "inner.step_sizes": (0.4,)}
    with new_trainer(small("random", **inner)) as trainer:
        assert trainer.iterate()["step_size"] == pytest.approx(0.4)


def test_a_folder_that_exists_or_is_no_run_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("mine")
    with refused(tmp_path / "full", "--out", error=RunError):
        train(small(), tmp_path / "full")
    with refused(tmp_path / "full" / "thing", "--out", error=RunError):
        train(small(), tmp_path / "full" / "thing")
    train(small(iterations=1), tmp_path / "run")
    with refused(tmp_path / "run", "--resume", error=RunError):
        train(small(), tmp_path / "run")
    with refused(tmp_path / "full", "config.json", error=RunError):
        train(small(), tmp_path / "full", resume=True)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thing"]


def test_a_bad_family_leaves_no_folder(tmp_path):
    with refused("navigation-3d", "navigation-2d"):
        train(small(family="navigation-3d"), tmp_path / "run")
    with refused("device", "cuda"):
        train(small(device="cuda"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_in_use_is_refused(tmp_path):
    train(small(iterations=1), tmp_path / "run")
    with locked(tmp_path / "run"), refused(tmp_path / "run", error=RunError):
        train(small(iterations=2), tmp_path / "run", resume=True)
    train(small(iterations=2), tmp_path / "run", resume=True)


def test_resuming_with_other_options_names_the_key(tmp_path):
    train(small(iterations=1), tmp_path / "run")
    other = small(**{"outer.max_kl": 0.05})
    with refused("outer.max_kl", 0.01, 0.05, error=RunError):
        train(other, tmp_path / "run", resume=True)


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    train(small(iterations=1), tmp_path / "run")
    train(small(iterations=1, seed=5), tmp_path / "other")
    train(small(iterations=1, **{"policy.hidden": (9,)}), tmp_path / "wide")
    path = newest_checkpoint(tmp_path / "run")
    good = path.read_bytes()
    for name, names in (("other", ("seed", 5, 0)), ("wide", ("policy.hidden", 9, 8))):
        path.write_bytes(newest_checkpoint(tmp_path / name).read_bytes())
        with refused(path, *names, error=CheckpointError):
            train(small(), tmp_path / "run", resume=True)
    flipped = bytearray(good)
    flipped[-3] ^= 4
    path.write_bytes(bytes(flipped))
    with refused(path, error=CheckpointError):
        train(small(), tmp_path / "run", resume=True)
    with refused(path, error=CheckpointError):
        load(tmp_path / "run")
    path.write_bytes(good)
    train(small(), tmp_path / "run", resume=True)


class Poisoned(CountingEnv):
    """Pays its action, but NaN in the tasks whose length is above `bad_above`."""

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, math.nan if self.length > bad_above else float(action[0]), *rest


bad_above = 0.0


def poisoned() -> GymnasiumFamily:
    return dataclasses.replace(counting_family(), env=Poisoned)


POISONED = small(family="test_trainer:poisoned", family_options={}, iterations=20)


def test_rewards_that_are_not_numbers_skip_the_update(monkeypatch):
    monkeypatch.setitem(globals(), "bad_above", 0.0)
    with new_trainer(POISONED) as trainer:
        before = dict(trainer.state.params)
        row = trainer.iterate()
        assert mentions(row["skipped"], "reward")
        assert row["skipped_updates"] == 1
        assert all(torch.equal(before[n], trainer.state.params[n]) for n in before)
        monkeypatch.setitem(globals(), "bad_above", 100.0)
        for _ in range(3):  # on so few samples a line search may find no improvement
            row = trainer.iterate()
            assert "skipped" not in row
            assert row["skipped_updates"] == 1
        assert trainer.state.skipped_in_a_row == 0
        assert not all(torch.equal(before[n], trainer.state.params[n]) for n in before)


def breaking() -> MujocoFamily:
    """Gravity that no simulation survives."""

    def heavier(model, tasks):
        gravity = np.tile(model.opt.gravity, (len(tasks), 1))
        gravity[:, 2] *= 1e12 * tasks[:, 0]
        return {"opt.gravity": gravity}

    return MujocoFamily(
        name="breaking", env="HalfCheetah-v5", tasks=Uniform({"times": (1.0, 2.0)}), horizon=20,
        model_fields=heavier,
    )  # fmt: skip


def test_if_every_episode_diverges_the_update_is_skipped_and_the_cause_named(tmp_path):
    config = resolve(None, "test_trainer:breaking", overrides={"tasks": 4, "episodes": 2})
    with new_trainer(config) as trainer:
        before = dict(trainer.state.params)
        row = trainer.iterate()
        assert mentions(row["skipped"], "diverged")
        assert row["skipped_updates"] == 1
        assert all(torch.equal(before[n], trainer.state.params[n]) for n in before)
    with refused(10, "diverged", error=RunError):
        train(config.with_options({"iterations": 12}), tmp_path / "run")
    result = evaluate(MetaPolicy(before, config.setup), tasks=4, episodes=2, steps=1)
    assert mentions(result.curve.verdict(), "diverged")


def test_ten_skipped_updates_in_a_row_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "bad_above", 0.0)
    with refused(10, "reward", error=RunError):
        train(POISONED, tmp_path / "run")
    with new_trainer(POISONED) as trainer:
        state = load_state(tmp_path / "run", trainer.record, trainer.state)
    assert state.iteration == 9
    assert all(torch.isfinite(p).all() for p in state.params.values())


def test_stratified_tasks_cover_every_stratum():
    def goals(stratified: bool) -> np.ndarray:
        rollouts: list = []
        with new_trainer(small(tasks=10, threads=1, stratified=stratified)) as trainer:
            trainer.iterate(rollouts.extend)
        return rollouts[0].tasks.numpy()

    for axis in np.floor((goals(True) + 0.5) * 10).T:
        assert sorted(axis) == list(range(10))
    assert any(len(set(axis)) < 10 for axis in np.floor((goals(False) + 0.5) * 10).T)


class ThrownVectorEnv(MujocoVectorEnv):
    """Some sub-environments start at a velocity that no simulation survives."""

    def reset(self, **options):
        found = super().reset(**options)
        self.sim.qvel[self.family.thrown, 0] = 1e11
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThrownFamily(MujocoFamily):
    thrown: list[int]

    def make_vec(self, num_tasks, episodes, **options):
        return ThrownVectorEnv(self, num_tasks, episodes, **options)


def thrown(which: list[int]) -> ThrownFamily:
    plain = make_family("half-cheetah-dir", horizon=8)
    values = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain) if f.init}
    return ThrownFamily(**values, thrown=which)


def test_diverged_episodes_are_counted_and_training_continues():
    # Every episode of task 0, and one of task 1.
    options = {"which": [0, 1, 2, 3, 5]}
    config = small(family="test_trainer:thrown", family_options=options, threads=1)
    with new_trainer(config) as trainer:
        row = trainer.iterate()
    assert row["diverged_episodes"] == 2 * 5
    assert row["env_steps"] == 2 * 15 * 8
    assert np.isfinite([row["return_pre"], row["return_post"], row["kl"]]).all()
    assert row["line_search_steps"] > 0


# Killed -------------------------------------------------------------------------------------------

RUN = [
    sys.executable, "-m", "metarl", "train", "navigation-2d", "--family-options", "horizon=12",
    "--tasks", "5", "--episodes", "4", "--policy.hidden", "8", "--threads", "1",
]  # fmt: skip


def wait_for_rows(folder, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(read_metrics(folder)) < count and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(read_metrics(folder)) >= count


def test_a_run_killed_at_random_moments_resumes_to_the_same_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*RUN[3:], "--iterations", "60", "--out", "whole") == 0
    command = [*RUN, "--iterations", "60", "--out", "parts"]
    rng = random.Random(0)
    for rows in (3, 20):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        wait_for_rows(tmp_path / "parts", rows)
        time.sleep(0.05 * rng.random())
        process.kill()
        process.wait()
        command = [*RUN[:4], "--iterations", "60", "--resume", "parts"]
    assert run(*command[3:]) == 0
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")
    assert same_params(load(tmp_path / "whole"), load(tmp_path / "parts"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_iteration_and_prints_the_resume_command(tmp_path, number, code):
    process = subprocess.Popen(
        [*RUN, "--iterations", "100000", "--out", "my run"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    folder = tmp_path / "my run"
    wait_for_rows(folder, 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "metarl train --resume 'my run'" in out
    assert "Traceback" not in err
    assert int(newest_checkpoint(folder).stem) == len(read_metrics(folder))


def test_a_second_ctrl_c_leaves_at_once_with_the_checkpoint_intact(tmp_path):
    slow = [*RUN, "--tasks", "40", "--episodes", "200", "--iterations", "50", "--out", "run"]
    slow[slow.index("horizon=12")] = "horizon=100"
    process = subprocess.Popen(slow, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for_rows(tmp_path / "run", 1)
    time.sleep(0.3)  # well into the second iteration
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert load(tmp_path / "run").provenance["iteration"] >= 1


class Failing(CountingEnv):
    def step(self, action):
        raise ZeroDivisionError("mine")


def failing() -> GymnasiumFamily:
    return dataclasses.replace(counting_family(), env=Failing)


def test_an_error_in_a_user_environment_keeps_its_traceback(tmp_path):
    with refused("mine", error=ZeroDivisionError) as caught:
        train(small(family="test_trainer:failing", family_options={}), tmp_path / "run")
    assert caught.traceback[-1].name == "step"
    assert not (tmp_path / "run").exists()  # so that the same command works once it is mended


def test_the_random_algorithm_never_changes_its_parameters():
    # Observations' moments and a fitted factor of the step sizes are none of its.
    base = resolve("metarl2026", "half-cheetah-dir", "random")
    assert base.setup.policy.normalize
    assert base.setup.algorithm.inner.min_kl
    with new_trainer(base.with_options({"tasks": 2, "episodes": 2, "threads": 1})) as trainer:
        before = {name: p.clone() for name, p in trainer.state.params.items()}
        row = trainer.iterate()
        assert row["inner_kl"] > 0.1
        assert same_params(trainer.meta_policy(), replace(trainer.meta_policy(), params=before))


@pytest.mark.parametrize(
    ("family", "options", "algorithm"),
    [
        ("navigation-2d", {"horizon": 12}, "maml-trpo"),
        ("navigation-2d", {"horizon": 12}, "reptile"),
        ("conftest:code_family", {"kind": "multi"}, "promp"),
        ("conftest:code_family", {"kind": "shifted"}, "cavia"),
    ],
)
def test_normalized_observations_and_discrete_actions_train_resume_and_load(
    tmp_path, family, options, algorithm
):
    def config(iterations):
        return small(
            algorithm, family, options, iterations=iterations, tasks=3, threads=1,
            **{"policy.normalize": True},
        )  # fmt: skip

    whole = train(config(4), tmp_path / "whole")
    train(config(2), tmp_path / "parts")
    parts = train(config(4), tmp_path / "parts", resume=True)
    assert same_params(whole, parts)
    loaded = load(tmp_path / "whole")
    assert same_params(whole, loaded)
    steps = read_metrics(tmp_path / "whole")[-1]["env_steps"]
    assert loaded.params["norm.count"].item() == pytest.approx(steps)
    assert loaded.params["norm.var"].min() < 0.9  # no longer 1
    result = evaluate(loaded, tasks=2, episodes=2, steps=2, threads=1)
    assert np.isfinite(result.curve.per_task).all()
    policy = loaded.adapt(np.zeros(loaded.family.tasks.dim), steps=1, episodes=2)
    env = loaded.family.make()
    observation, _ = env.reset(seed=0)
    for deterministic in (False, True):
        assert env.action_space.contains(policy.act(observation, deterministic=deterministic))
    assert len(policy.act(np.stack([observation] * 5))) == 5
