"""Meta-World's benchmarks for meta-learning (Yu et al. 2020, arXiv:1910.10897; McLean et al. 2025).

In ML1 a robot arm does one job. In ML10 and ML45 it does ten or 45 jobs, and other jobs are for
tests. The benchmark draws each task: the job, and the positions of its object and goal. The
observation contains neither the job nor the goal. Rewards, horizon (500) and the tasks of both
splits come from the `metaworld` package, whose environments are stepped one after the other. The
package needs an older MuJoCo and is therefore only imported when one of these families is made.
"""

# metaworld and mujoco bring no type stubs.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

import functools
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, get_args

import gymnasium as gym
import mujoco
import numpy as np
from numpy.typing import ArrayLike, NDArray

from metarl.envs.errors import UserError, check_one_of, did_you_mean
from metarl.envs.family import TaskFamily
from metarl.envs.memory import Copies
from metarl.envs.registry import register
from metarl.envs.single import SingleTaskEnv
from metarl.envs.tasks import Split, TaskDistribution, Tasks
from metarl.envs.vector import CLOSE, RESET, STEP, Advanced, Floats, TaskVectorEnv

MAX_HORIZON = 500
# Values drawn at a reset: the object's initial position and, in some environments, the goal.
PLACES = ("object_x", "object_y", "object_z", "goal_x", "goal_y", "goal_z")
_DIVERGED = slice(mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADCTRL + 1)


def import_metaworld() -> ModuleType:
    """Return the `metaworld` package.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import metaworld
    except ModuleNotFoundError as error:
        if error.name != "metaworld":
            raise
        raise UserError(
            "Meta-World is not installed here; run `bash scripts/setup_metaworld.sh FOLDER` to make"
            " a Python environment with it and the MuJoCo version that it needs"
        ) from error
    return metaworld


def jobs() -> list[str]:
    """Return the names of all jobs; a task's component `job` is an index of this list."""
    return list(import_metaworld().ALL_V3_ENVIRONMENTS)


@functools.cache
def benchmark_tasks(benchmark: str, job: str | None, seed: int) -> dict[Split, Floats]:
    """Return a benchmark's tasks by split, [variations, jobs, 1 + 6]; large ones take seconds.

    The first component is the job; positions that a job does not draw are 0.
    """
    metaworld = import_metaworld()
    made = getattr(metaworld, benchmark)(*([job] if job else []), seed=seed)
    every = jobs()

    def vectors(tasks: Sequence[Any], count: int) -> Floats:
        found = np.zeros((len(tasks), 1 + len(PLACES)))
        for row, task in zip(found, tasks, strict=True):
            places = pickle.loads(task.data)["rand_vec"]
            row[0] = every.index(task.env_name)
            row[1 : 1 + len(places)] = places
        return found.reshape(count, -1, found.shape[1]).swapaxes(0, 1)  # listed job by job

    return {
        "train": vectors(made.train_tasks, len(made.train_classes)),
        "test": vectors(made.test_tasks, len(made.test_classes)),
    }


class BenchmarkTasks(TaskDistribution):
    """Tasks of a benchmark, made at the first request.

    Jobs are drawn equally often. No task is drawn twice before all tasks were drawn.
    """

    def __init__(self, benchmark: str, job: str | None, seed: int) -> None:
        self.benchmark, self.job, self.seed = benchmark, job, seed
        self.names = PLACES if job else ("job", *PLACES)

    def _tasks(self, split: Split) -> Floats:
        """Return the tasks of a split, [variations, jobs, task_dim]."""
        check_one_of("split", split, get_args(Split))
        return benchmark_tasks(self.benchmark, self.job, self.seed)[split][..., -self.dim :]

    def sample(self, rng: np.random.Generator, n: int, split: Split = "train") -> Tasks:
        tasks = self._tasks(split)
        variations, count, _ = tasks.shape
        job = rng.permutation(count)
        variation = rng.permuted(np.tile(np.arange(variations)[:, None], count), axis=0)
        drawn = tasks[variation, job].reshape(-1, self.dim)
        return drawn[np.arange(n) % len(drawn)]

    def grid(self, n: int, split: Split = "test") -> Tasks:
        tasks = self._tasks(split).reshape(-1, self.dim)
        return tasks[np.arange(n) % len(tasks)]

    def describe(self) -> str:
        return f"{self.benchmark}'s own, train and test; components {', '.join(self.names)}"

    def bounds(self, split: Split = "train") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        tasks = self._tasks(split)
        return tasks.min((0, 1)), tasks.max((0, 1))


@dataclass(frozen=True, kw_only=True)
class MetaWorldFamily(TaskFamily):
    """Benchmark of Meta-World; `job` is the job of ML1, or None if it is part of the task."""

    job: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.horizon > MAX_HORIZON:
            raise UserError(f"Meta-World's horizon is at most {MAX_HORIZON}, got {self.horizon}")

    def make(
        self, task: ArrayLike | None = None, *, render_mode: str | None = None
    ) -> gym.Env[Any, Any]:
        return SingleTaskEnv(self, task, render_mode)

    def make_vec(self, num_tasks: int, episodes: int, **options: Any) -> MetaWorldVectorEnv:
        options.pop("threads", None)  # Python environments share one interpreter
        return MetaWorldVectorEnv(self, num_tasks, episodes, **options)

    def job_of(self, task: Floats) -> str:
        """Return the name of a task's job.

        Raises:
            UserError: the job does not exist.
        """
        if self.job is not None:
            return self.job
        every = jobs()
        if task[0] not in range(len(every)):
            raise UserError(f"job must be a whole number below {len(every)}, got {task[0]:g}")
        return every[int(task[0])]


class MetaWorldVectorEnv(TaskVectorEnv):
    """Vector environment of Meta-World's environments, about 20 MB each; unused ones are kept.

    `info["success"]` is 1 if the job is done in the current state, else 0.
    """

    family: MetaWorldFamily

    def __init__(
        self,
        family: MetaWorldFamily,
        num_tasks: int,
        episodes: int,
        *,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        # `info` reports a divergence, instead of a message and MuJoCo's log file.
        mujoco.set_mju_user_warning(lambda message: None)
        self.render_mode = render_mode
        self._free: dict[str, list[Any]] = {}
        # All jobs have the same spaces.
        first = self._take(family.job or jobs()[0])
        super().__init__(
            family,
            num_tasks,
            episodes,
            observation_space=first.observation_space,
            action_space=first.action_space,
            metadata=dict(first.metadata),
            **options,
        )
        self._jobs = [family.job or jobs()[0]] + [""] * (self.num_envs - 1)
        self._envs: list[Any] = [first] + [None] * (self.num_envs - 1)
        self._observation = np.zeros((self.num_envs, *first.observation_space.shape))

    def _take(self, job: str) -> Any:
        """Return an unused environment of a job."""
        if self._free.get(job):
            return self._free[job].pop()
        kind = import_metaworld().ALL_V3_ENVIRONMENTS[job]
        return kind(render_mode=self.render_mode, camera_name="corner2")

    def _begin(self, ids: NDArray[np.int64], seeds: Sequence[int | None]) -> None:
        wanted = {int(i): self.family.job_of(self._tasks[i]) for i in ids}
        watch = None
        if not self._ready.any():
            watch = Copies(self.family.name, self.num_tasks, self.episodes)
        changed = [i for i, job in wanted.items() if job != self._jobs[i]]
        for i in changed:
            if self._envs[i] is not None:
                self._free.setdefault(self._jobs[i], []).append(self._envs[i])
        for i in changed:
            self.begun(RESET, i)  # making an environment takes a while
            self._jobs[i], self._envs[i] = wanted[i], self._take(wanted[i])
            if watch is not None:
                watch.one_more()
        for i, job in wanted.items():
            self.begun(RESET, i)
            # A reset depends only on the task; nothing else is random.
            self._observation[i] = _reset(self._envs[i], job, self._tasks[i, -len(PLACES) :])

    def advance(self, ids: NDArray[np.int64] | None, actions: Any) -> Advanced:
        reward, success = np.zeros(self.num_envs), np.zeros(self.num_envs)
        diverged = np.zeros(self.num_envs, np.bool_)
        for i in range(self.num_envs) if ids is None else ids.tolist():
            self.begun(STEP, i)
            env = self._envs[i]
            self._observation[i], reward[i], _, _, info = env.step(actions[i])
            success[i] = info["success"]
            diverged[i] = env.data.warning.number[_DIVERGED].any()
        return reward, None, None, diverged if diverged.any() else None, {"success": success}

    def _observe(self) -> NDArray[Any]:
        return self._observation

    def render(self) -> Any:
        frames = [env.render() for env in self._envs]
        if self.render_mode == "human":
            return None
        return tuple(np.rot90(frame, 2) for frame in frames)  # its cameras hang upside down

    def close_extras(self, **kwargs: Any) -> None:
        waiting = [env for free in self._free.values() for env in free]
        for i, env in enumerate([*self._envs, *waiting]):
            if env is not None:
                self.begun(CLOSE, i if i < self.num_envs else -1)
                env.close()


def _reset(env: Any, job: str, places: Floats) -> Floats:
    """Put an environment at the start of a task and return the observation.

    Raises:
        UserError: the environment refuses the task.
    """
    low = env._random_reset_space.low
    vector = places[: low.size].copy()
    asked = 0

    def drawn() -> Floats:
        # If object and goal are too close, an environment draws again, without a limit.
        nonlocal asked
        asked += 1
        if asked > 10:
            raise UserError(f"{job}: object and goal are too close to each other in {vector}")
        return vector

    data = {"rand_vec": vector, "env_cls": type(env), "partially_observable": True}
    metaworld = import_metaworld()
    env.set_task(metaworld.Task(env_name=job, data=pickle.dumps(data)))
    env._get_state_rand_vec = drawn
    return env.reset()[0]


def _family(
    benchmark: str, job: str | None, description: str, horizon: int, seed: int
) -> MetaWorldFamily:
    import_metaworld()
    if not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed must be a whole number of at least 0, got {seed!r}")
    return MetaWorldFamily(
        name=f"metaworld-{benchmark.lower()}",
        description=description,
        tasks=BenchmarkTasks(benchmark, job, seed),
        horizon=horizon,
        job=job,
    )


@register(gymnasium_id="metarl/MetaWorldML1-v0", max_episode_steps=MAX_HORIZON)
def metaworld_ml1(
    task: str = "reach-v3", seed: int = 0, horizon: int = MAX_HORIZON
) -> MetaWorldFamily:
    """ML1: one job, 50 training and 50 test variations, drawn by `seed`."""
    job = task if task.endswith("-v3") else f"{task}-v3"
    known = jobs()
    if job not in known:
        raise UserError(
            f"no Meta-World task {task!r}{did_you_mean(job, known)} (tasks: {', '.join(known)})"
        )
    return _family("ML1", job, f"a robot arm does {job} at a hidden place", horizon, seed)


@register(gymnasium_id="metarl/MetaWorldML10-v0", max_episode_steps=MAX_HORIZON)
def metaworld_ml10(seed: int = 0, horizon: int = MAX_HORIZON) -> MetaWorldFamily:
    """ML10: ten training and five other test jobs, 50 variations each, drawn by `seed`."""
    return _family("ML10", None, "a robot arm does one of ten jobs; five to test", horizon, seed)


@register(gymnasium_id="metarl/MetaWorldML45-v0", max_episode_steps=MAX_HORIZON)
def metaworld_ml45(seed: int = 0, horizon: int = MAX_HORIZON) -> MetaWorldFamily:
    """ML45: 45 training and five other test jobs, 50 variations each, drawn by `seed`."""
    return _family("ML45", None, "a robot arm does one of 45 jobs; five to test", horizon, seed)
