"""Run folders: their config, lock, checkpoints, and what must agree when one is continued."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metarl.envs.errors import UserError
from metarl.learning.policies import Params
from metarl.learning.trust_region import OuterState
from metarl.running import checkpoints
from metarl.running.checkpoints import CheckpointError, versions, write_atomically
from metarl.running.config import Config
from metarl.running.meta_policy import newest_checkpoint

FREE = ("iterations", "threads", "workers", "worker_timeout")
"""Config keys that may change when a run is continued."""


class RunError(UserError):
    """A run cannot start or go on; the message says why and what to do."""


@dataclass
class State:
    """What a checkpoint holds besides the config."""

    params: Params
    outer: OuterState
    iteration: int = 0
    env_steps: int = 0
    skipped_updates: int = 0
    skipped_in_a_row: int = 0


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder; a second process is refused for as long as this one lives.

    Raises:
        RunError: another process holds it.
    """
    with open(folder / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"another process is training in {folder}; wait for it, or choose another --out"
            ) from error
        yield


def create_run(folder: Path, config: Config) -> None:
    """Make a run folder with its `config.json`.

    Raises:
        RunError: the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(
            f"{folder} exists; continue it with --resume {folder}, or choose another --out"
        )
    (folder / "checkpoints").mkdir(parents=True)
    text = json.dumps({"config": config.to_json(), "versions": versions()}, indent=2)
    write_atomically(folder / "config.json", text.encode())


def run_config(folder: Path) -> Config:
    """Return the config of a run folder.

    Raises:
        RunError: the folder is not a run.
        UserError: its config is not one this version takes.
    """
    try:
        data = json.loads((folder / "config.json").read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder} is not a run folder: it has no readable config.json") from error
    return Config.from_json(data)


def save_checkpoint(folder: Path, config: Config, state: State) -> None:
    """Save a run's state as its newest checkpoint; the one before goes, unless it is kept."""
    tensors = {f"meta.{name}": p for name, p in state.params.items()}
    tensors |= {f"outer.{name}": p for name, p in state.outer.items()}
    counters = {k: v for k, v in vars(state).items() if k not in ("params", "outer")}
    metadata = {
        "kind": "checkpoint", "config": config.to_json(), "versions": versions(), **counters,
    }  # fmt: skip
    where = folder / "checkpoints"
    checkpoints.save(where / f"{state.iteration:06d}.safetensors", tensors, metadata)
    before = state.iteration - 1
    if before % config.checkpoint_every:
        (where / f"{before:06d}.safetensors").unlink(missing_ok=True)


def load_state(folder: Path, config: Config, like: State) -> State:
    """Return the newest checkpoint's state, of the names and shapes of another.

    Raises:
        CheckpointError: there is none, it is damaged, or it is another run's or network's.
    """
    path = newest_checkpoint(folder)
    tensors, metadata = checkpoints.load(path)
    stored = Config.from_json(metadata["config"])
    if replace(stored, **{k: getattr(config, k) for k in FREE}) != config:
        other = differences(stored, config)[0]
        raise CheckpointError(f"{path} is of another run: {other}")
    params, outer = (
        checkpoints.in_shapes(
            path,
            {n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)},
            {name: tuple(t.shape) for name, t in kept.items()},
        )
        for part, kept in (("meta.", like.params), ("outer.", like.outer))
    )
    counters = {k: metadata[k] for k in State.__dataclass_fields__ if k in metadata}
    return State(params, outer, **counters)


def differences(old: Config, new: Config) -> list[str]:
    """Return where two configs differ, but for what is FREE: "key old, not new"."""

    def flat(config: Config) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in config.to_json().items():
            if isinstance(value, dict) and key != "family_options":
                result.update({f"{key}.{name}": v for name, v in value.items()})
            else:
                result[key] = value
        return result

    a, b = flat(old), flat(new)
    return [f"{key} is {a[key]}, not {b[key]}" for key in a if key not in FREE and a[key] != b[key]]


def group_name(names: Sequence[str]) -> str:
    """Return the common beginning of run folders' or policies' names."""
    paths = [Path(os.path.abspath(name)) for name in names]
    short = [path.stem if path.suffix == ".safetensors" else path.name for path in paths]
    return os.path.commonprefix(short).rstrip("-_. ")  # noqa: RUF071  (names, not paths)


def but_seed(config: Config) -> Config:
    """Return a config without its seed and what results do not depend on."""
    return replace(
        config, seed=0, threads=1, workers=0, worker_timeout=60.0, device="cpu", checkpoint_every=1
    )
