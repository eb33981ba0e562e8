"""Worker processes: the same rollouts as in this process, whatever happens to the workers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import counting_family, gaussian_policy, mostly_slow
from expecting import mentions, refused, run
from worker_envs import FAULTY, walk, walk_by_lambda

import metarl.sampling.workers
from metarl.config.options import Config
from metarl.distributed.chunk_pool import ChunkPool
from metarl.envs import TaskFamily, make_family
from metarl.envs.errors import NonFiniteError, UserError
from metarl.envs.processes import pack, unpack
from metarl.evaluation.benchmark import loop_seconds, raw_environment
from metarl.learning.advantages import Advantages, to_batch
from metarl.learning.baselines import LinearFeatures
from metarl.learning.inner_loop import InnerLoop
from metarl.learning.inner_update import GradientUpdate
from metarl.learning.losses import log_likelihood
from metarl.models.networks import Params
from metarl.models.policies import PolicyModel
from metarl.sampling.rollouts import Collector, RandomKey
from metarl.sampling.trajectories import Rollout
from metarl.sampling.workers import WorkerCollector, WorkerError, make_collector
from metarl.training.run import new_trainer

POLICY = gaussian_policy(observation_dim=2, action_dim=1, hidden=(8,))
TASKS = np.array([[0.0], [0.3], [0.5], [FAULTY]])
TIMEOUT = 1.0


def params_for(policy: PolicyModel, tasks: int) -> Params:
    each = [policy.init(np.random.default_rng(t)) for t in range(tasks)]
    return {name: torch.stack([p[name] for p in each]) for name in each[0]}


def in_process(
    family: TaskFamily, tasks: np.ndarray, key: RandomKey, policy: PolicyModel = POLICY
) -> Rollout:
    collector = Collector(family, policy, len(tasks), 3, ChunkPool(1))
    return collector.collect(params_for(policy, len(tasks)), tasks, key)


def assert_equal(a: Rollout, b: Rollout) -> None:
    for field in dataclasses.fields(Rollout):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name in ("behaviour", "info"):
            assert x.keys() == y.keys()
            assert all(torch.equal(x[name], y[name]) for name in x)
        elif x is not None:
            assert torch.equal(x, y), field.name


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def assert_gone(pids: list[int], seconds: float = 5.0) -> None:
    assert pids
    end = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end, "orphan processes"
        time.sleep(0.02)


# Equality -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", mostly_slow([1, 2, 8], 1, 2))
def test_rollouts_are_bit_identical_for_any_number_of_workers(workers):
    family = make_family("worker_envs:walk_by_lambda")  # made again by its name
    tasks = family.tasks.sample(np.random.default_rng(0), 8)
    params = params_for(POLICY, 8)
    collector = WorkerCollector(family, POLICY, 8, 3, workers=workers)
    try:
        rollouts = [collector.collect(params, tasks, RandomKey(1, i)) for i in (5, 6)]
        means = collector.collect(params, tasks, RandomKey(1), deterministic=True)
    finally:
        collector.close()
    lengths = rollouts[0].valid.sum(-1)
    assert len(lengths.unique()) > 3  # ragged
    for i, rollout in zip((5, 6), rollouts, strict=True):  # the first outlives the second
        assert_equal(rollout, in_process(walk_by_lambda(), tasks, RandomKey(1, i)))
    assert torch.equal(means.action, means.behaviour["mean"])


def test_only_families_without_threads_and_with_workers_get_processes():
    policy = gaussian_policy(observation_dim=2, action_dim=2)
    with ChunkPool(1) as pool:
        navigation = make_collector(make_family("navigation-2d"), policy, 2, 1, pool, workers=2)
        here = make_collector(walk(), POLICY, 2, 1, pool)
    assert isinstance(navigation, Collector)
    assert isinstance(here, Collector)


def test_training_does_not_depend_on_workers():
    values = {"tasks": 4, "episodes": 3, "threads": 1}
    config = Config.of("worker_envs:walk", "maml-trpo").with_options(values)
    trained = []
    for workers in (0, 2):
        with new_trainer(config.with_options({"workers": workers})) as trainer:
            row = trainer.iterate()
            trained.append((trainer.state.params, row["returns"]))
    assert trained[0][1] == trained[1][1]
    for name, p in trained[0][0].items():
        assert torch.equal(p, trained[1][0][name])
    with refused("workers", -1):
        config.with_options({"workers": -1})
    with refused("worker_timeout", 0.0):
        config.with_options({"worker_timeout": 0.0})


# Families that workers can or cannot make -------------------------------------------------------


def test_a_family_that_a_worker_cannot_make_again_is_refused_with_the_remedy():
    family = dataclasses.replace(counting_family(), set_task=lambda env, task: None)
    with refused("counting", "module:attribute", "workers"):
        WorkerCollector(family, POLICY, 1, 1, workers=1)
    changed = dataclasses.replace(make_family("worker_envs:walk_by_lambda"), horizon=5)
    with refused("walk", "horizon", 12, 5):
        WorkerCollector(changed, POLICY, 1, 1, workers=1)


def test_a_policy_of_other_sizes_is_refused():
    policy = gaussian_policy(observation_dim=3, action_dim=1)
    with refused("walk", "(2,)", "(3,)"):
        WorkerCollector(walk(), policy, 1, 1, workers=1)


SCRIPT = """
import sys
import gymnasium as gym
import numpy as np
from metarl.envs import GymnasiumFamily, Uniform, make_family, register
from metarl.distributed.chunk_pool import ChunkPool
from metarl.models.distributions import Gaussian
from metarl.models.networks import MLP, stack
from metarl.models.policies import PolicyModel
from metarl.sampling.rollouts import Collector, RandomKey
from metarl.sampling.workers import WorkerCollector
from worker_envs import Walk

@register
def mine():
    return GymnasiumFamily(
        name="mine", env=Walk, tasks=Uniform({"drift": (0.0, 1.0)}),
        set_task=lambda env, task: setattr(env, "drift", task[0]), horizon=12,
        env_options={"faults": sys.argv[1]},
    )

def run():
    box = gym.spaces.Box(-1.0, 1.0, (1,))
    distribution = Gaussian().over(box)
    network = MLP(inputs=(2,), outputs=1, hidden=(8,))
    policy = PolicyModel(network=network, distribution=distribution)
    family, tasks = make_family("mine"), np.array([[0.2], [0.8]])
    params = stack(policy.init(np.random.default_rng(0)), 2)
    collector = WorkerCollector(family, policy, 2, 2, workers=1)
    print(collector.pids, flush=True)
    here = Collector(family, policy, 2, 2, ChunkPool(1)) if not sys.argv[1] else collector
    print((collector.collect(params, tasks, RandomKey(0)).reward
           == here.collect(params, tasks, RandomKey(0)).reward).all().item())
"""


def script(tmp_path: Path, end: str, faults: str = "") -> subprocess.Popen:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT + end)
    path = os.pathsep.join(str(p) for p in (Path(__file__).parents[1], Path(__file__).parent))
    return subprocess.Popen(
        [sys.executable, str(file), faults],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_family_of_the_main_script_works_and_no_process_outlives_the_script(tmp_path):
    process = script(tmp_path, 'if __name__ == "__main__":\n    run()\n')
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    pids, same = out.splitlines()
    assert same == "True"
    assert_gone(json.loads(pids))
    assert not err


def test_a_script_without_a_main_guard_is_an_error_that_names_it(tmp_path):
    process = script(tmp_path, "run()\n")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert mentions(err, "__name__", "__main__", "workers")
    assert err.count("Traceback") == 1  # that of the script itself, none of the workers


# Faults -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults") / "fault"


@pytest.fixture(scope="module")
def shared(faults) -> Iterator[WorkerCollector]:
    family = walk(str(faults))
    collector = WorkerCollector(family, POLICY, 4, 3, workers=2, timeout=TIMEOUT)
    yield collector
    collector.close()


@pytest.fixture
def collector(shared, faults) -> Iterator[WorkerCollector]:
    yield shared
    faults.unlink(missing_ok=True)


def sample(collector: WorkerCollector, key: RandomKey = RandomKey(2)) -> Rollout:  # noqa: B008
    return collector.collect(params_for(POLICY, 4), TASKS, key)


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        ("kill step", ["SIGKILL"]),
        ("hang reset", ["worker_envs.py"]),
        ("raise step", ["ArithmeticError", "the fault", "worker_envs.py"]),
        *mostly_slow(
            [
                ("exit step", [3]),  # the exit code
                ("hold step", ["worker_envs.py"]),
                ("leave reset", ["SystemExit", "left", "worker_envs.py"]),
            ]
        ),
    ],
)
def test_a_worker_that_fails_once_is_named_and_replaced_and_its_rollout_repeated(
    collector, faults, fault, names, caplog
):
    sample(collector, RandomKey(9))  # a worker as it is in the middle of a run
    first, second = collector.pids
    faults.write_text(fault)
    assert_equal(sample(collector), in_process(walk(), TASKS, RandomKey(2)))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    phase = fault.split()[1]
    assert mentions(record.getMessage(), 1, phase, FAULTY, *names)  # the first is the worker
    assert collector.pids[0] == first
    assert collector.pids[1] != second
    assert_gone([second])


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        ("kill reset", ["SIGKILL", 3]),  # three tries
        ("raise reset", ["ArithmeticError", "the fault", "worker_envs.py"]),
        *mostly_slow([("hang step", ["worker_timeout", "worker_envs.py"])]),
    ],
)
def test_a_worker_that_fails_at_every_try_is_an_error(collector, faults, fault, names):
    faults.write_text(f"always {fault}")
    with refused("walk", 1, fault.split()[1], FAULTY, *names, error=WorkerError):
        sample(collector)
    faults.unlink()
    assert_equal(sample(collector), in_process(walk(), TASKS, RandomKey(2)))


def test_an_observation_of_a_wrong_shape_is_refused_here_and_in_workers(collector, faults):
    names = ("walk", "step", FAULTY, "(1,)", "observation_space", "(2,)")
    faults.write_text("always shape step")
    with refused(*names):
        sample(collector)
    with refused(*names):
        in_process(walk(str(faults)), TASKS, RandomKey(2))


def test_a_nan_observation_is_an_error_that_names_its_task(collector, faults, pool):
    sample(collector)
    faults.write_text("always nan step")
    loop = InnerLoop(GradientUpdate().adapter(POLICY, log_likelihood), pool)

    def again(params, k):
        rollout = collector.collect(params, TASKS, RandomKey(0))
        return to_batch(POLICY, rollout, Advantages(), LinearFeatures(), {}, pool)

    before, params = collector.pids, POLICY.init(np.random.default_rng(0))
    with refused("observation", FAULTY, error=NonFiniteError):
        loop.run(again, params, 4, steps=1, query=False)
    assert collector.pids == before


def test_an_exception_in_this_process_has_a_note_that_names_the_task(faults):
    faults.write_text("raise step")
    with pytest.raises(ArithmeticError) as caught:
        in_process(walk(str(faults)), TASKS, RandomKey(2))
    (note,) = caught.value.__notes__
    assert mentions(note, "walk", "step", FAULTY)


def test_a_worker_killed_between_collects_or_stopped_is_replaced(collector, caplog):
    for number in (signal.SIGKILL, signal.SIGSTOP):
        os.kill(collector.pids[0], number)
        assert_equal(sample(collector), in_process(walk(), TASKS, RandomKey(2)))
    assert len(caplog.records) == 2


def test_the_collect_after_an_interrupted_one_is_unaffected(collector, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metarl.sampling.workers, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sample(collector, RandomKey(7))
    assert_equal(sample(collector), in_process(walk(), TASKS, RandomKey(2)))


def test_workers_leave_interruptions_to_their_parent(collector, caplog):
    before = collector.pids
    for pid in before:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    sample(collector)
    assert collector.pids == before
    assert not caplog.records


# Ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        ("raise close", ["ArithmeticError", "the fault", "worker_envs.py"]),
        *mostly_slow([("hang close", [])]),
    ],
)
def test_close_ends_every_worker_and_may_be_repeated(faults, fault, names, caplog):
    family = walk(str(faults))
    collector = WorkerCollector(family, POLICY, 4, 3, workers=1, timeout=TIMEOUT)
    sample(collector)
    mine = collector.pids
    faults.write_text(fault)
    collector.close()
    assert_gone(mine, 0.5)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert mentions(record.getMessage(), 0, "close", FAULTY, *names)  # the first is the worker
    collector.close()
    with refused() as caught:
        sample(collector)
    assert caught.type is UserError  # no fault of a worker


@pytest.mark.parametrize("fault", mostly_slow(["hang", "hold"], "hold"))
def test_workers_end_with_a_parent_killed_while_an_environment_hangs(tmp_path, fault):
    file = tmp_path / "fault"
    file.write_text(f"{fault} step")
    process = script(tmp_path, 'if __name__ == "__main__":\n    run()\n', str(file))
    assert process.stdout is not None
    mine = json.loads(process.stdout.readline())
    while file.exists():
        time.sleep(0.01)
    assert all(alive(pid) for pid in mine)
    process.kill()
    process.communicate()
    assert_gone(mine)
    left = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    assert not [name for name in left if name.startswith(f"pym-{process.pid}-")]


def test_the_command_names_the_environment_that_raises_and_its_task(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "fault"
    file.write_text("always raise step")
    arguments = ["--tasks", "2", "--episodes", "1", "--workers", "1", "--threads", "1"]
    options = ["--family-options", f"faults={file}", "--out", "run"]
    assert run("train", "worker_envs:always_faulty", *arguments, *options) == 2
    names = ("walk", "step", FAULTY, "ArithmeticError", "the fault")
    assert mentions(capsys.readouterr().err, *names)


def test_the_benchmark_compares_workers_with_one_process_and_async_vector_env(capsys):
    arguments = ["--tasks", "2", "--episodes", "2", "--repeats", "1", "--workers", "1", "--json"]
    assert run("benchmark", "worker_envs:walk", *arguments) == 0
    result = json.loads(capsys.readouterr().out)["processes"]
    assert result["environments"] == 40
    assert result["workers"] == 1
    rate = {
        name: result[f"{name}_env_steps_per_second"]
        for name in ("plain_loop", "one_process", "workers", "async_vector_env")
    }
    for name in ("plain_loop", "one_process", "async_vector_env"):
        assert result[f"workers_to_{name}"] == pytest.approx(rate["workers"] / rate[name])
    ratio = rate["one_process"] / rate["plain_loop"]
    assert result["one_process_to_plain_loop"] == pytest.approx(ratio)


def test_the_plain_loop_replays_the_rollout():
    family, key = walk(), RandomKey(3)
    rollout = in_process(family, TASKS, key)
    paid = []

    class Noted(gym.Wrapper):
        def step(self, action):
            result = self.env.step(action)
            paid.append(result[1])
            return result

    envs = [Noted(raw_environment(family, task)) for task in TASKS]
    loop_seconds(family, envs, rollout, key, "clip")
    np.testing.assert_array_equal(np.float32(paid), rollout.reward[rollout.valid].numpy())


# Programs that a worker cannot read ---------------------------------------------------------------


def test_worker_processes_of_a_program_from_standard_input_are_refused():
    program = """
from conftest import counting_family
from metarl.envs.errors import UserError
from metarl.envs.processes import pack
try:
    pack(counting_family())
except UserError as error:
    print(error)
"""
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-"],
        input=program,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(tests)},
    )
    assert done.returncode == 0, done.stderr
    assert mentions(done.stdout, "<stdin>", "workers")


def test_a_packed_family_registers_or_imports_its_environment(tmp_path, monkeypatch):
    module = """
import gymnasium as gym
from metarl.envs import GymnasiumFamily, Uniform
if "Late-v0" not in gym.registry:
    gym.register("Late-v0", entry_point={entry})
family = GymnasiumFamily(name="late", env="Late-v0", keywords=True, horizon=5,
    tasks=Uniform({{"g": (5.0, 15.0)}}))
"""
    stock = "gymnasium.envs.classic_control.pendulum:PendulumEnv"
    entries = {"text": repr(stock), "lambda": f"lambda **k: gym.envs.registration.load_env_creator"
               f"({stock!r})(**k)"}  # fmt: skip
    monkeypatch.syspath_prepend(str(tmp_path))
    for kind, entry in entries.items():
        (tmp_path / f"late_{kind}.py").write_text(module.format(entry=entry))
        parcel = pack(make_family(f"late_{kind}:family"))
        if kind == "text":
            parcel = dataclasses.replace(parcel, source=None)  # the registration alone
        # What another process knows.
        monkeypatch.delitem(gym.registry, "Late-v0")
        monkeypatch.delitem(sys.modules, f"late_{kind}")
        assert "Late-v0" not in gym.registry
        with contextlib.closing(unpack(parcel).make()) as env:
            assert env.observation_space.shape == (3,)
        assert gym.registry.pop("Late-v0").id == "Late-v0"
