"""Run folders: their config, lock, checkpoints, and what must agree when one is continued."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

from torch import Tensor

from metarl.config.options import Config
from metarl.envs.errors import UserError
from metarl.learning.outer import OuterState
from metarl.models.networks import Params
from metarl.plain_json import json_text
from metarl.runs import checkpoints, fingerprint
from metarl.runs.checkpoints import (
    CheckpointError,
    changes,
    checkpoint_path,
    checkpoints_of,
    config_of,
    count_of,
    machine,
    newest_good,
    versions,
)
from metarl.runs.files import is_aside, set_aside, sweep, write_atomically
from metarl.runs.fingerprint import Fingerprint
from metarl.runs.metrics import read_metrics

_log = logging.getLogger(__name__)

CHANGEABLE_ON_RESUME = ("iterations", "threads", "workers", "worker_timeout")
"""Config keys that may change when a run is continued."""


class RunError(UserError):
    """A run cannot start or go on; the message says why and what to do."""


CallbackState = dict[str, tuple[dict[str, Any], dict[str, Tensor]]]
"""States of callbacks by their names: values of JSON, and tensors."""

_NO_COUNTERS = ("params", "outer", "baseline", "callbacks")


@dataclass
class State:
    """What a checkpoint holds besides the config."""

    params: Params
    outer: OuterState
    baseline: Params = field(default_factory=dict)
    callbacks: CallbackState = field(default_factory=dict)
    iteration: int = 0
    env_steps: int = 0
    skipped_updates: int = 0
    skipped_in_a_row: int = 0


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Callable[[], None]]:
    """Hold a run folder; a second process is refused for as long as this one lives.

    Returns:
        what raises RunError once the folder is no longer at its place.

    Raises:
        RunError: another process holds it.
    """
    path = folder.absolute() / "lock"
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            busy = f"another process is training in {folder}; wait for it, or"
            raise RunError(
                f"{busy} give another folder as out", f"{busy} choose another --out"
            ) from error
        except OSError as error:
            raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(path)) from error

        def check() -> None:
            try:
                there = os.path.samestat(os.stat(path), os.fstat(file.fileno()))
            except FileNotFoundError:
                there = False
            if not there:
                gone = (
                    f"{folder} was moved or deleted while it was trained in; where it is now, go on"
                )
                raise RunError(
                    f"{gone} with resume=True", f"{gone} with: metarl train --resume FOLDER"
                )

        check()  # it may have been replaced before it was locked
        for inner in (folder, folder / "checkpoints"):
            sweep(inner)
        yield check


def is_free(folder: Path) -> bool:
    """Whether a run can begin in a folder.

    It must not exist, be empty, or hold what a run that was killed before its first checkpoint
    leaves behind.
    """
    return not folder.exists() or (folder.is_dir() and all(map(_is_left, folder.iterdir())))


def _is_left(path: Path) -> bool:
    if path.name == "lock":
        return path.is_file() and not path.stat().st_size
    if path.name == "config.json":
        return _is_config(path)
    if path.name == "checkpoints":
        return path.is_dir() and all(map(is_aside, path.iterdir()))
    return is_aside(path)


def _is_config(path: Path) -> bool:
    try:
        run_config(path.parent)
    except UserError:
        return False
    return True


def check_free(folder: Path) -> None:
    """Raise RunError unless a run can begin in a folder; see `is_free`."""
    if is_free(folder):
        return
    if checkpoints_of(folder) or _is_config(folder / "config.json"):
        raise RunError(
            f"{folder} exists; continue it with resume=True, or give another folder as out",
            f"{folder} exists; continue it with --resume {folder}, or choose another --out",
        )
    kind = "a folder with other things in it" if folder.is_dir() else "a file"
    raise RunError(
        f"{folder} is {kind}; give another folder as out",
        f"{folder} is {kind}; choose another --out",
    )


def create_run(folder: Path, config: Config, family: Fingerprint | None = None) -> None:
    """Make a run folder with its `config.json`, and in it what identifies the family.

    Raises:
        RunError: the folder holds something else.
    """
    check_free(folder)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    data = {
        "config": config.to_json(), "family": dict(family or {}), "versions": versions(),
        "machine": machine(),
    }  # fmt: skip
    write_atomically(folder / "config.json", json_text(data, indent=2).encode())


def plan(folder: Path, config: Config) -> None:
    """Let a run folder's config have another number of iterations: the run's length from now on."""
    path = folder / "config.json"
    data = json.loads(path.read_text("utf-8"))
    data["config"]["options"]["iterations"] = config.iterations
    write_atomically(path, json_text(data, indent=2).encode())


def run_config(folder: Path, given: Config | None = None) -> Config:
    """Return the config of a run folder.

    Args:
        given: see `Config.from_json`.

    Raises:
        RunError: the folder is not a run.
        UserError: its config is not one this version takes.
    """
    try:
        data = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} is not a run folder: it has no readable config.json") from error
    return config_of(folder / "config.json", data if isinstance(data, dict) else {}, given)


def check_family(folder: Path, config: Config, family: Fingerprint) -> None:
    """Raise RunError if a run was trained on a family that differs from this one of its name."""
    data = json.loads((folder / "config.json").read_text())
    if found := fingerprint.changes(data.get("family") or {}, family):
        raise RunError(_other_family(folder, config, found))


def _other_family(where: Path, config: Config, found: Sequence[str]) -> str:
    return (
        f"{where} was trained on another {config.family} (then -> now): {'; '.join(found)}; put the"
        " family back as it was, or start a new run"
    )


def save_checkpoint(
    folder: Path, config: Config, state: State, family: Fingerprint | None = None
) -> None:
    """Save a run's state as its newest checkpoint; the one before goes, unless it is kept."""
    tensors = {f"meta.{name}": p for name, p in state.params.items()}
    tensors |= {f"outer.{name}": p for name, p in state.outer.items()}
    tensors |= {f"baseline.{name}": p for name, p in state.baseline.items()}
    for name, (_, arrays) in state.callbacks.items():
        tensors |= {f"callback.{name}/{key}": array for key, array in arrays.items()}
    counters = {k: v for k, v in vars(state).items() if k not in _NO_COUNTERS}
    metadata = {
        "kind": "checkpoint", "config": config.to_json(), "family": dict(family or {}),
        "versions": versions(), "machine": machine(), **counters,
        "callbacks": {name: values for name, (values, _) in state.callbacks.items()},
    }  # fmt: skip
    checkpoints.save(checkpoint_path(folder, state.iteration), tensors, metadata)
    for before, path in checkpoints_of(folder).items():
        if before < state.iteration and before % config.checkpoint_every:
            path.unlink(missing_ok=True)


def load_state(
    folder: Path,
    config: Config,
    like: State,
    start: int | None = None,
    family: Fingerprint | None = None,
) -> State:
    """Return a checkpoint's state, of the names and shapes of another.

    A run that was killed before its first checkpoint begins as it would have: with `like`. What
    differs from where the run began, and changes its last bits, is told in a line.

    Args:
        start: the checkpoint's iteration; by default the newest. Later ones are set aside.
        family: what identifies the family; a checkpoint of another is refused.

    Raises:
        CheckpointError: there is none, it is damaged, or it is another run's or network's; the
            message names the newest that can be used.
    """
    found = checkpoints_of(folder)
    if start is not None and start not in found:
        there = ", ".join(map(str, found)) or "none"
        raise CheckpointError(f"{folder} holds no checkpoint of iteration {start} (there: {there})")
    if not found:
        if read_metrics(folder):
            raise CheckpointError(
                f"{folder} holds metrics but no checkpoint: put its checkpoints back, or start a"
                " new run"
            )
        (folder / "checkpoints").mkdir(exist_ok=True)
        return like
    chosen = max(found) if start is None else start
    try:
        state, metadata = _load_state(found[chosen], config, like, family)
    except CheckpointError as error:
        older = newest_good(folder, chosen, lambda path: _load_state(path, config, like, family))
        if older is None:
            raise
        good = f"{error}; go on from the newest good one with"
        raise CheckpointError(
            f"{good} resume=True, start={older}",
            f"{good}: metarl train --resume {quote(str(folder))} --from {older}",
        ) from error
    for later in sorted(found, reverse=True):
        if later > chosen:
            set_aside(found[later], found[later].read_bytes())
            found[later].unlink()
    here = {"versions": versions(), "machine": machine()}
    began = json.loads((folder / "config.json").read_text("utf-8"))
    if changed := changes(began, here) or changes(metadata, here):
        _log.warning(
            "%s began with %s: from here on it agrees with a run there in distribution, not in"
            " every bit", folder, ", ".join(changed),
        )  # fmt: skip
    return state


def _load_state(
    path: Path, config: Config, like: State, family: Fingerprint | None
) -> tuple[State, dict[str, Any]]:
    tensors, metadata = checkpoints.load(path)
    if metadata.get("kind") != "checkpoint":
        raise CheckpointError(f"{path} is no checkpoint of a run but {metadata.get('kind')!r}")
    stored = config_of(path, metadata, config)
    if replace(stored, **{k: getattr(config, k) for k in CHANGEABLE_ON_RESUME}) != config:
        other = differences(stored, config)[0]
        raise CheckpointError(f"{path} is of another run: {other}")
    if found := fingerprint.changes(metadata.get("family") or {}, family or {}):
        raise CheckpointError(_other_family(path, config, found))
    params, outer, baseline = (
        checkpoints.in_shapes(
            path,
            {n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)},
            {name: tuple(t.shape) for name, t in kept.items()},
        )
        for part, kept in (
            ("meta.", like.params), ("outer.", like.outer), ("baseline.", like.baseline),
        )
    )  # fmt: skip
    callbacks: CallbackState = {}
    for name, values in metadata.get("callbacks", {}).items():
        start = f"callback.{name}/"
        arrays = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
        callbacks[name] = (values, arrays)
    names = State.__dataclass_fields__.keys() - set(_NO_COUNTERS)
    counters = {name: count_of(path, metadata, name) for name in sorted(names)}
    if counters["iteration"] != int(path.stem):
        raise CheckpointError(
            f"{path} is of iteration {counters['iteration']}, which is not its name"
        )
    return State(params, outer, baseline, callbacks, **counters), metadata


def differences(old: Config, new: Config) -> list[str]:
    """Return where two configs differ, but for what may change on resume: "key old, not new"."""

    def flat(config: Config) -> dict[str, Any]:
        data = config.to_json()
        return {**data.pop("options"), **data}

    a, b = flat(old), flat(new)
    return [
        f"{key} is {a.get(key)}, not {b.get(key)}"
        for key in {**a, **b}
        if key not in CHANGEABLE_ON_RESUME and a.get(key) != b.get(key)
    ]


def group_name(names: Sequence[str]) -> str:
    """Return the common beginning of run folders' or policies' names.

    Of checkpoints of the runs a-0 and a-1 it is `a`, of one of them a-0-000040.
    """
    short = [short_name(name) for name in names]
    return os.path.commonprefix(short).rstrip("-_. ")  # noqa: RUF071  (names, not paths)


def short_name(name: str) -> str:
    """Return what a run folder or policy is called; a checkpoint in a run folder by both."""
    path = Path(os.path.abspath(name))
    if path.suffix != ".safetensors":
        return path.name
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}-{path.stem}"
    return path.stem


def group_names(groups: Sequence[Sequence[str]], taken: Collection[str] = ()) -> list[str]:
    """Return a name of its own for each group of run folders or policies.

    It is `group_name`, or where that is another's too, or one of those `taken`, the group's first
    member, numbered if need be.
    """
    short = [group_name(names) for names in groups]
    found: list[str] = []
    for names, name in zip(groups, short, strict=True):
        if not name or name in taken or short.count(name) > 1:
            name = names[0]
        numbered = (f"{name} ({i})" for i in itertools.count(2))
        used = {*taken, *found}
        found.append(next(n for n in itertools.chain([name], numbered) if n not in used))
    return found


def alike(configs: Sequence[Config]) -> list[list[int]]:
    """Return groups of the indices of configs that differ by the seed alone, in order.

    The same seed once more, of another checkpoint or file say, begins another group.
    """
    groups: list[list[int]] = []
    for i, config in enumerate(configs):
        for group in groups:
            seeds = {configs[j].seed for j in group}
            if but_seed(configs[group[0]]) == but_seed(config) and config.seed not in seeds:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def but_seed(config: Config) -> Config:
    """Return a config without its seed and what results do not depend on."""
    return replace(
        config, seed=0, threads=1, workers=0, worker_timeout=60.0, device="cpu", checkpoint_every=1
    )
