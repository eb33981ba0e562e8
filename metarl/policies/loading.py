"""Policies from run folders, from policy files, by the name of a shipped one, or random."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from metarl.config.options import Config
from metarl.config.setup import Setup
from metarl.learning.adapter import FACTOR
from metarl.models.networks import Params
from metarl.models.settings import own_settings
from metarl.policies.meta_policy import MetaPolicy
from metarl.policies.policy import Policy
from metarl.runs import checkpoints
from metarl.runs.checkpoints import (
    CheckpointError,
    checkpoint_path,
    newest_checkpoint,
    newest_good,
)
from metarl.runs.files import as_path
from metarl.runs.folder import read_record
from metarl.sampling.seeding import stream
from metarl.sampling.spaces import space_from_json

_POLICY = "a policy (a run folder, a file or the name of a shipped one)"


def shipped() -> list[str]:
    """Return the names of the policies that come with the package."""
    folder = resources.files("metarl") / "trained"
    if not folder.is_dir():
        return []
    return sorted(
        entry.name.removesuffix(".safetensors")
        for entry in folder.iterdir()
        if entry.name.endswith(".safetensors")
    )


def run_config(folder: Path, given: Setup | None = None) -> Config:
    """Return the config of a run folder.

    Args:
        given: see `Config.from_json`.

    Raises:
        RunError: the folder is not a run folder.
        CheckpointError: this version does not accept its config.
    """
    return _config_of(folder / "config.json", read_record(folder), given)


def _config_of(path: Path, record: Mapping[str, Any], given: Setup | None = None) -> Config:
    try:
        return Config.from_json(record["config"], given)
    except KeyError as error:
        raise CheckpointError(f"{path} contains no config") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} contains a config that cannot be used: {error}") from error


def is_adapted(what: str | Path) -> bool:
    """Whether this is a file of an adapted policy, not of an initialization."""
    return Path(what).is_file() and _read(Path(what))[1]["kind"] == "adapted"


def _read(path: Path) -> tuple[Params, dict[str, Any]]:
    """Return the tensors and metadata of a file, which must contain a policy."""
    tensors, metadata = checkpoints.load(path)
    if metadata.get("kind") not in ("policy", "checkpoint", "adapted"):
        raise CheckpointError(f"{path} contains no policy but {metadata.get('kind')!r}")
    return tensors, metadata


def _meta_policy(
    path: Path, params: Params, metadata: Mapping[str, Any], given: Setup | None = None
) -> MetaPolicy:
    """Return the meta-policy of a file's parameters and metadata."""
    config = _config_of(path, metadata, given)
    origin = {key: value for key, value in metadata["config"].items() if key == "origin"}
    record = {"config": config.to_json() | origin, "family": metadata.get("family") or {}}
    return MetaPolicy(params, config.setup, record=record)


@own_settings()
def load(what: str | Path, setup: Setup | None = None) -> MetaPolicy:
    """Return a meta-policy.

    Args:
        what: a run folder (its newest checkpoint is read); a checkpoint file of a run; a
            file that `MetaPolicy.save` wrote; or the name of a shipped policy.
        setup: setup of the run, if its algorithm, network or distribution has no importable name.

    Raises:
        CheckpointError: no policy is found, or its file is damaged.
        UserError: the training family is needed and cannot be created.
    """
    path = as_path(_POLICY, what)
    if path.is_dir():
        newest = newest_checkpoint(path)
        try:
            return load(newest, setup)
        except CheckpointError as error:
            older = newest_good(path, int(newest.stem), partial(load, setup=setup))
            if older is None:
                raise
            good = checkpoint_path(path, older)
            raise CheckpointError(f"{error}; the newest good checkpoint is {good}") from error
    if not path.exists():
        names = shipped()
        if str(what) not in names:
            close = difflib.get_close_matches(str(what), names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise CheckpointError(
                f"no run folder, policy file or shipped policy {str(what)!r}{hint}"
                f" (shipped: {', '.join(names) or 'none'})"
            )
        with resources.as_file(
            resources.files("metarl") / "trained" / f"{what}.safetensors"
        ) as file:
            return load(file)
    tensors, metadata = _read(path)
    if metadata["kind"] == "adapted":
        raise CheckpointError(
            f"{path} is a policy adapted to one task, not an initialization: metarl record shows"
            " it, metarl.load_policy reads it"
        )
    others = ("outer.", "baseline.", "callback.")
    params = {n.removeprefix("meta."): t for n, t in tensors.items() if not n.startswith(others)}
    counts = (k for k in ("iteration", "env_steps") if k in metadata)
    provenance: dict[str, Any] = {k: checkpoints.count_of(path, metadata, k) for k in counts}
    if "versions" in metadata:
        provenance["versions"] = metadata["versions"]
    if not params:
        raise CheckpointError(f"{path} contains no policy")
    meta = _meta_policy(path, params, metadata, setup)
    shapes = meta.domain.adapter(meta.algorithm, meta.model).shapes()
    baseline = {
        n.removeprefix("baseline."): t for n, t in tensors.items() if n.startswith("baseline.")
    }
    return dataclasses.replace(
        meta,
        params=checkpoints.in_shapes(path, params, shapes),
        provenance=provenance,
        baseline=baseline,
    )


@own_settings()
def load_policy(path: str | Path, setup: Setup | None = None) -> Policy:
    """Return an adapted policy from a file that `metarl adapt` or `Policy.save` wrote.

    Args:
        path: the file.
        setup: setup of the run, if its algorithm, network or distribution has no importable name.

    Raises:
        CheckpointError: the file is missing, damaged or not an adapted policy.
        UserError: the training family cannot be created. A custom family must be importable by its
            name.
    """
    path = as_path("an adapted policy", path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: metarl adapt creates a policy from a run")
    tensors, metadata = _read(path)
    if metadata["kind"] != "adapted":
        raise CheckpointError(f"{path} is an initialization: metarl adapt creates a policy from it")
    if "actions" not in metadata:
        raise CheckpointError(f"{path} does not contain its action space")
    meta = _meta_policy(path, tensors, metadata, setup)
    shapes = meta.policy.shapes()
    if meta.policy.context_dim:
        shapes["context"] = (meta.policy.context_dim,)
    space = space_from_json(metadata["actions"])
    params = checkpoints.in_shapes(path, tensors, shapes)
    return Policy(
        meta.policy, params, space, meta.played.horizon, meta.setup.action_mode,
        metadata["adapted"], meta.record,
    )  # fmt: skip


def random_meta_policy(like: MetaPolicy, seed: int = 0) -> MetaPolicy:
    """Return the random initialization of a run with this seed.

    It keeps the step sizes of the other meta-policy. Sizes that training fitted to a KL are not
    random.
    """
    adapter = like.domain.adapter(like.algorithm, like.model)
    params = adapter.init(like.model.init(stream(seed, 0, "init")))
    if FACTOR in params and FACTOR in like.params:
        params[FACTOR] = like.params[FACTOR]
    return dataclasses.replace(like, params=params, provenance={})
