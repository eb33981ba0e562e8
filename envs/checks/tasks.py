"""Checks of a task's effect in one environment, in many, and in a worker process.

Each check yields messages of its findings.
"""

from __future__ import annotations

import multiprocessing
import pickle
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields, replace
from functools import partial

import numpy as np

from metarl.envs.checks.traces import (
    BEHAVIOURS,
    EPISODES,
    LONGEST,
    Doubt,
    Trace,
    all_equal,
    close,
    example_tasks,
    first_difference,
    named_task,
    play,
    play_together,
    raised,
    random_actions,
)
from metarl.envs.errors import UserError, did_you_mean
from metarl.envs.family import TaskFamily
from metarl.envs.gymnasium import task_arrival
from metarl.envs.gymnasium.family import GymnasiumFamily
from metarl.envs.processes import Parcel, pack, unpack
from metarl.envs.seeds import training_seeds
from metarl.envs.tasks import Tasks, Uniform
from metarl.envs.vector import Floats

MOST_COMPONENTS = 8  # of a task that are varied one by one


def check_batch(family: TaskFamily) -> Iterator[str]:
    tasks = example_tasks(family)
    for task, together in zip(tasks, play_together(family, tasks), strict=True):
        env = family.make(task)
        for e, seed in enumerate(training_seeds(EPISODES)):
            alone = play(
                env, seed, random_actions(env.action_space, min(family.horizon, LONGEST), e)
            )
            # Vectorised functions may round differently with another number of rows.
            difference = alone.first_difference(together[e], tolerance=1e-5)
            if difference is not None:
                yield (
                    f"{difference[0]} of make_vec differ from those of make after {difference[1]}"
                    f" steps of task {named_task(family, task)}: {_why_otherwise(family)}"
                )
                return
        close(env)


def _why_otherwise(family: TaskFamily) -> str:
    """Describe why an environment may behave differently in a vector environment."""
    rows = "each row that {} returns must depend only on that row (task[:, 0], not task[0])"
    if not isinstance(family, GymnasiumFamily):
        return rows.format("a vectorised function")
    if family.reward is not None:
        return rows.format("reward") + ", not on state that copies share"
    return (
        "possible causes are state that copies share, such as a module-level object or a class"
        " attribute, and a task that set_task sets only in part"
    )


def check_dependence(family: TaskFamily) -> Iterator[str]:
    tasks = example_tasks(family)
    if not _differ(family, tasks):
        yield _why_equal(family, tasks)
        return
    yield from _idle_way(family, tasks)
    if isinstance(family.tasks, Uniform) and 1 < family.tasks.dim <= MOST_COMPONENTS:
        for i, name in enumerate(family.tasks.names):
            pair = np.repeat(family.tasks.grid(1, "train"), 2, axis=0)
            pair[:, i] = [bound[i] for bound in family.tasks.bounds()]
            if not _differ(family, pair):
                yield Doubt(
                    f"{name} changed neither observations nor rewards, from {pair[0, i]:g} to"
                    f" {pair[1, i]:g}, under {_TRIED}: use it, or remove it from the task; if it"
                    " only matters in states that these actions do not reach, ignore this"
                )


def _idle_way(family: TaskFamily, tasks: Tasks) -> Iterator[str]:
    """Yield a doubt if setting a task does not change the environment and a reward hides this."""
    if not isinstance(family, GymnasiumFamily) or family.reward is None:
        return
    way = "set_task" if family.set_task else "keywords" if family.keywords else None
    if way is None:
        env = family.make_bare()
        way = "the environment's own way" if task_arrival.takes_tasks(env) else None
        close(env)
    if way is None:
        return
    bare = replace(family, reward=None)
    try:
        idle = not _differ(bare, tasks) and not _infos_differ(bare, tasks)
    except UserError:  # the environment's own, unused reward is not a number
        return
    if idle:
        yield Doubt(
            f"the reward depends on the task, but {way} did not change the environment's"
            f" observations, rewards or info under {_TRIED}; make it set the values that the"
            " environment reads, or remove it"
        )


def _infos_differ(family: TaskFamily, tasks: Tasks) -> bool:
    """Return whether the info of steps differs between tasks, under random actions."""
    said = []
    for task in tasks:
        env = family.make(task)
        env.reset(seed=training_seeds(1)[0])
        infos = []
        for action in random_actions(env.action_space, min(family.horizon, LONGEST)):
            *_, terminated, truncated, info = env.step(action)
            infos.append(repr({k: v for k, v in info.items() if k != "task"}))
            if terminated or truncated:
                break
        close(env)
        said.append(infos)
    return any(infos != said[0] for infos in said)


_TRIED = f"{', '.join(list(BEHAVIOURS)[:-1])} and {list(BEHAVIOURS)[-1]} actions"


def _differ(family: TaskFamily, tasks: Tasks) -> bool:
    """Return whether tasks differ under one of `BEHAVIOURS`."""
    return any(not all_equal(play_together(family, tasks, way)) for way in BEHAVIOURS.values())


def _why_equal(family: TaskFamily, tasks: Tasks) -> str:
    same = f"observations and rewards were the same for every task under {_TRIED}"
    elsewhere = "; if it only matters in states that these actions do not reach, ignore this"
    if not isinstance(family, GymnasiumFamily):
        return Doubt(f"{same}: step must depend on the task{elsewhere}")
    if family.reward is not None or family.keywords:
        what = "reward" if family.reward is not None else "the effect of the keyword arguments"
        return Doubt(f"{same}: {what} must depend on the task{elsewhere}")
    for way in BEHAVIOURS.values():
        late = []  # with the task set after the reset, which then cannot lose it
        for task in tasks:
            env = family.make_bare()
            family.apply_task(env, tasks[0])
            actions = way(env.action_space, min(family.horizon, LONGEST), 0)
            put = partial(family.apply_task, env, task)
            late.append([play(env, training_seeds(1)[0], actions, after_reset=put)])
            close(env)
        if not all_equal(late):
            return (
                f"reset loses the task: {same}, but not if it is set after the reset; reset must"
                " not change the values that set_task sets"
            )
    if added := new_attribute(family, tasks[0]):
        return f"{same}: {added}"
    return Doubt(f"{same}: step must depend on the values that set_task sets{elsewhere}")


def new_attribute(family: GymnasiumFamily, task: Floats) -> str:
    """Return a finding if setting a task adds an attribute to the environment, else ""."""
    env = family.make_bare()
    known = set(dir(env.unwrapped))
    family.apply_task(env, task)
    added = sorted(set(vars(env.unwrapped)) - known)
    close(env)
    if not added:
        return ""
    return (
        f"set_task sets a new attribute {added[0]!r}, which the environment did not have"
        f"{did_you_mean(added[0], known)}"
    )


def check_pickling(family: TaskFamily) -> Iterator[str]:
    if family.source is not None:
        return  # a worker can make the family again from its name
    parts = {f.name: getattr(family, f.name) for f in fields(family)}
    for name, part in {**parts, "the family": family}.items():
        try:
            pickle.dumps(part)
        except Exception as error:  # PicklingError, AttributeError, TypeError, the user's own
            yield (
                f"{name} cannot be sent to a worker process ({type(error).__name__}: {error}); use"
                " functions and classes at the top level of a module, no lambda or nested def, and"
                " open files and simulators in the environment, not in the family"
            )
            return


def check_worker(family: TaskFamily) -> Iterator[str]:
    tasks = example_tasks(family)
    try:
        here, again = (play_together(family, tasks) for _ in range(2))
    except Exception:  # an earlier check reported it; only check that a worker starts
        here = again = None
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            there = pool.submit(_play_there, pack(family), tasks, here is not None).result()
    except BrokenProcessPool:
        yield "a worker process died while it played the family; see its output for the cause"
        return
    except RuntimeError as error:
        if "bootstrapping" not in str(error):
            raise
        yield (
            "worker processes import the script that starts them; put its code under"
            " if __name__ == '__main__':"
        )
        return
    if here is None or again is None or first_difference(here, again) is not None:
        return  # nothing to compare
    if all_equal(there) and not all_equal(here):
        yield (
            "all tasks are the same in a worker process, but not in this one, so the task is lost"
            f" on the way; {_NEEDED_THERE}"
        )
    elif (difference := first_difference(here, there)) is not None:
        i, kind, t = difference
        yield (
            f"{kind} differ in a worker process after {t} steps of task"
            f" {named_task(family, tasks[i])}; {_NEEDED_THERE}, or files, environment variables,"
            " hash order and devices that differ between processes"
        )


_NEEDED_THERE = (
    "a possible cause is a value set only in the main program: set_task, reward and the environment"
    " must read all values from the family or from their module"
)


def _play_there(parcel: Parcel, tasks: Tasks, play: bool) -> list[list[Trace]]:
    warnings.simplefilter("ignore")  # the parent reports them
    try:
        family = unpack(parcel)
        if play:
            return play_together(family, tasks)
        family.make().close()
        return []
    except Exception as error:  # the traceback cannot be sent
        raise UserError(f"in a worker process, {raised(error)}") from None
