"""Run folders: config, lock and checkpoints, and checks before a run is continued."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from torch import Tensor

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
    count_of,
    machine,
    newest_good,
    versions,
)
from metarl.runs.files import is_aside, lock, set_aside, sweep, write_atomically
from metarl.runs.metrics import read_metrics

_log = logging.getLogger(__name__)

CHANGEABLE_ON_RESUME = ("iterations", "threads", "workers", "worker_timeout")
"""Options that may change when a run is continued."""

_WITHOUT_EFFECT = ("threads", "workers", "worker_timeout", "device", "checkpoint_every")
"""Options that results do not depend on."""


class RunError(UserError):
    """A run cannot start or continue. The message gives the reason and the remedy."""


CallbackState = dict[str, tuple[dict[str, Any], dict[str, Tensor]]]
"""State of each callback by name: JSON values and tensors."""

_NO_COUNTERS = ("params", "outer", "baseline", "callbacks")


@dataclass
class State:
    """Content of a checkpoint, except the config."""

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
    """Lock a run folder. Other processes are refused until this context ends.

    Returns:
        a check that raises RunError if the folder was moved or deleted.

    Raises:
        RunError: another process holds the lock.
    """
    path = folder.absolute() / "lock"
    with open(path, "a", encoding="utf-8") as file:
        try:
            mine = lock(file.fileno())
        except OSError as error:
            raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(path)) from error
        if not mine:
            busy = f"another process is training in {folder}; wait for it, or"
            raise RunError(f"{busy} give another folder as out", f"{busy} choose another --out")

        def check() -> None:
            try:
                there = os.path.samestat(os.stat(path), os.fstat(file.fileno()))
            except FileNotFoundError:
                there = False
            if not there:
                gone = f"{folder} was moved or deleted during training; continue from its new place"
                raise RunError(
                    f"{gone} with resume=True", f"{gone} with: metarl train --resume FOLDER"
                )

        check()  # the folder may have been replaced before it was locked

        for inner in (folder, folder / "checkpoints"):
            sweep(inner)
        yield check


def is_free(folder: Path) -> bool:
    """Whether a run can start in a folder.

    The folder must not exist, or be empty. Leftovers of a run that was killed before its first
    checkpoint are also accepted.
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
        read_record(path.parent)
    except RunError:
        return False
    return True


def check_free(folder: Path) -> None:
    """Raise RunError if a run cannot start in a folder; see `is_free`."""
    if is_free(folder):
        return
    if checkpoints_of(folder) or _is_config(folder / "config.json"):
        raise RunError(
            f"{folder} exists; continue it with resume=True, or give another folder as out",
            f"{folder} exists; continue it with --resume {folder}, or choose another --out",
        )
    kind = "a folder with other files in it" if folder.is_dir() else "a file"
    raise RunError(
        f"{folder} is {kind}; give another folder as out",
        f"{folder} is {kind}; choose another --out",
    )


def create_run(folder: Path, record: Mapping[str, Any]) -> None:
    """Make a run folder.

    Args:
        record: what `config.json` and every checkpoint contain: `config`, the result of
            `Config.to_json`, and `family`, the fingerprint of the family.

    Raises:
        RunError: the folder contains other files.
    """
    check_free(folder)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    data = {**record, "versions": versions(), "machine": machine()}
    write_atomically(folder / "config.json", json_text(data, indent=2).encode())


def plan(folder: Path, iterations: int) -> None:
    """Set the number of iterations in a run folder's config: the new length of the run."""
    data = read_record(folder)
    data["config"]["options"]["iterations"] = iterations
    write_atomically(folder / "config.json", json_text(data, indent=2).encode())


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a run folder, see `create_run`, with versions and machine.

    Raises:
        RunError: the folder is not a run folder.
    """
    try:
        data = json.loads((folder / "config.json").read_text("utf-8"))
        _ = data["config"]["options"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder} is not a run folder: it has no readable config.json") from error
    return data


def check_family(folder: Path, record: Mapping[str, Any]) -> None:
    """Raise RunError if the run's family has the same name but differs from the record's."""
    if found := _family_changes(folder, read_record(folder), record):
        raise RunError(found)


def _family_changes(where: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    found = "; ".join(fingerprint.changes(old.get("family") or {}, new.get("family") or {}))
    return found and (
        f"{where} was trained on a different {new['config']['family']} (then -> now): {found}; put"
        " the family back as it was, or start a new run"
    )


def save_checkpoint(folder: Path, record: Mapping[str, Any], state: State) -> None:
    """Save a run's state as its newest checkpoint. Remove the previous one unless it is kept."""
    tensors = {f"meta.{name}": p for name, p in state.params.items()}
    tensors |= {f"outer.{name}": p for name, p in state.outer.items()}
    tensors |= {f"baseline.{name}": p for name, p in state.baseline.items()}
    for name, (_, arrays) in state.callbacks.items():
        tensors |= {f"callback.{name}/{key}": array for key, array in arrays.items()}
    counters = {k: v for k, v in vars(state).items() if k not in _NO_COUNTERS}
    metadata = {
        "kind": "checkpoint", **record, "versions": versions(), "machine": machine(), **counters,
        "callbacks": {name: values for name, (values, _) in state.callbacks.items()},
    }  # fmt: skip
    checkpoints.save(checkpoint_path(folder, state.iteration), tensors, metadata)
    every = record["config"]["options"]["checkpoint_every"]
    for before, path in checkpoints_of(folder).items():
        if before < state.iteration and before % every:
            path.unlink(missing_ok=True)


def load_state(
    folder: Path, record: Mapping[str, Any], like: State, start: int | None = None
) -> State:
    """Return the state of a checkpoint. Names and shapes must match `like`.

    A run that was killed before its first checkpoint starts from `like`. If versions or the machine
    changed since the run started, and this changes the last bits, one line reports it.

    Args:
        record: config and family of the run, see `create_run`; a checkpoint with others is refused.
        start: iteration of the checkpoint; by default the newest. Later checkpoints are set aside.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or belongs to another run or network.
            The message names the newest usable checkpoint.
    """
    found = checkpoints_of(folder)
    if start is not None and start not in found:
        there = ", ".join(map(str, found)) or "none"
        raise CheckpointError(f"{folder} has no checkpoint of iteration {start} (there: {there})")
    if not found:
        if read_metrics(folder):
            raise CheckpointError(
                f"{folder} has metrics but no checkpoint: restore its checkpoints, or start a"
                " new run"
            )
        (folder / "checkpoints").mkdir(exist_ok=True)
        return like
    chosen = max(found) if start is None else start
    try:
        state, metadata = _load_state(found[chosen], record, like)
    except CheckpointError as error:
        older = newest_good(folder, chosen, lambda path: _load_state(path, record, like))
        if older is None:
            raise
        good = f"{error}; continue from the newest good one with"
        raise CheckpointError(
            f"{good} resume=True, start={older}",
            f"{good}: metarl train --resume {quote(str(folder))} --from {older}",
        ) from error
    for later in sorted(found, reverse=True):
        if later > chosen:
            set_aside(found[later], found[later].read_bytes())
            found[later].unlink()
    here = {"versions": versions(), "machine": machine()}
    if changed := changes(read_record(folder), here) or changes(metadata, here):
        _log.warning(
            "%s started with %s: from here on, results agree with such a run in distribution,"
            " not in every bit", folder, ", ".join(changed),
        )  # fmt: skip
    return state


def _load_state(path: Path, record: Mapping[str, Any], like: State) -> tuple[State, dict[str, Any]]:
    tensors, metadata = checkpoints.load(path)
    if metadata.get("kind") != "checkpoint":
        raise CheckpointError(f"{path} is not a checkpoint of a run but {metadata.get('kind')!r}")
    config = metadata.get("config")
    if not isinstance(config, Mapping) or not isinstance(config.get("options"), Mapping):
        raise CheckpointError(f"{path} has no readable config")
    if other := differences(config, record["config"]):
        raise CheckpointError(f"{path} belongs to another run; its config differs: {other[0]}")
    if changed := _family_changes(path, metadata, record):
        raise CheckpointError(changed)
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
            f"{path} contains iteration {counters['iteration']}, not the one in its name"
        )
    return State(params, outer, baseline, callbacks, **counters), metadata


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config, given as JSON values, with its options by key."""
    return {**{k: v for k, v in config.items() if k != "options"}, **config["options"]}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the differences of two configs that prevent a resume: "key old, not new".

    An option that an older version did not have is not compared.
    """
    a, b = flat(old), flat(new)
    later = new["options"].keys() - old["options"].keys()
    return [
        f"{key} is {a.get(key)!r}, not {b.get(key)!r}"
        for key in {**a, **b}
        if key not in {*CHANGEABLE_ON_RESUME, *later} and a.get(key) != b.get(key)
    ]


def group_name(names: Sequence[str]) -> str:
    """Return the common prefix of the names of run folders or policies.

    Example: `a` for checkpoints of the runs a-0 and a-1, and `a-0-000040` for one checkpoint of
    a-0.
    """
    short = [short_name(name) for name in names]
    return os.path.commonprefix(short).rstrip("-_. ")  # noqa: RUF071  (names, not paths)


def short_name(name: str) -> str:
    """Return the display name of a run folder or policy. A checkpoint's name includes its run."""
    path = Path(os.path.abspath(name))
    if path.suffix != ".safetensors":
        return path.name
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}-{path.stem}"
    return path.stem


def group_names(groups: Sequence[Sequence[str]], taken: Collection[str] = ()) -> list[str]:
    """Return a unique name for each group of run folders or policies.

    The name is `group_name`. If another group has it, or if it is in `taken`, the name is the
    group's first member. A number is added if necessary.
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


def but_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config that results depend on, except the seed."""
    return {k: v for k, v in flat(config).items() if k not in ("seed", *_WITHOUT_EFFECT)}


def alike(settings: Sequence[Any], seeds: Sequence[int]) -> list[list[int]]:
    """Return groups of indices of equal settings with different seeds, in order.

    If a seed repeats, for instance in another checkpoint or file, it starts a new group.
    """
    groups: list[list[int]] = []
    for i, setting in enumerate(settings):
        for group in groups:
            if settings[group[0]] == setting and seeds[i] not in {seeds[j] for j in group}:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups
