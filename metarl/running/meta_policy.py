"""A trained initialization as its user holds it: load, adapt to a task, act, save."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarl.envs import TaskFamily, make_family
from metarl.envs.errors import UserError
from metarl.envs.gymnasium_family import is_image
from metarl.learning.adaptation import FACTOR, Adapter
from metarl.learning.algorithms import find_algorithm
from metarl.learning.encoders import ENCODERS, make_encoder
from metarl.learning.inner_loop import InnerLoop
from metarl.learning.objectives import dice
from metarl.learning.parallel import ChunkPool, one_intraop_thread
from metarl.learning.policies import CategoricalMLP, GaussianMLP, MLPPolicy, Params
from metarl.running import checkpoints
from metarl.running.checkpoints import CheckpointError, config_of
from metarl.running.config import Config, PolicyConfig
from metarl.running.online import OnlineAdapter
from metarl.running.policy import Policy
from metarl.sampling.rollouts import Address, categories, collect_episodes
from metarl.sampling.seeding import stream


@dataclass(frozen=True)
class MetaPolicy:
    """Meta-parameters, how they adapt, and where they come from."""

    params: Params
    config: Config
    record: Mapping[str, Any] = field(default_factory=dict)
    """Iterations, env steps and versions of the training behind it."""

    @cached_property
    def family(self) -> TaskFamily:
        """The family it was trained on."""
        return make_family(self.config.family, **self.config.family_options)

    @cached_property
    def policy(self) -> MLPPolicy:
        """The network; the sizes of a Gaussian that reads vectors are read off the parameters."""
        images = any(p.dim() == 4 for p in self.params.values())
        if "log_std" not in self.params or images:
            return policy_for(self.config, self.family)
        told = find_algorithm(self.config.algorithm).told
        context = context_dim(self.config, self.family.tasks.dim if told else 0)
        observation = self.params["layer0.weight"].shape[0] - context
        actions = gym.spaces.Box(-1.0, 1.0, self.params["log_std"].shape)
        return make_policy(self.config, (observation,), actions, context)

    def inner_loop(
        self, pool: ChunkPool, step_sizes: Sequence[float] | None = None
    ) -> tuple[InnerLoop, Params]:
        """Return how this policy adapts, and the meta-parameters it adapts from.

        The step sizes are those given, else the config's for evaluation, else those learned, else
        those of training.
        """
        given = tuple(step_sizes or self.config.inner.test_step_sizes)
        adapter = make_adapter(self.config, self.policy)
        params = dict(self.params)
        if given:
            adapter = dataclasses.replace(adapter, step_sizes=given, learned="no", fitted=False)
            params = {name: params[name] for name in adapter.shapes()}
        return InnerLoop(adapter, self.config.advantage, pool), params

    @property
    def training_step_sizes(self) -> tuple[float, ...]:
        """Sizes of its inner steps in training, those fitted to a KL included; learned ones not."""
        factor = float(self.params[FACTOR]) if FACTOR in self.params else 1.0
        return tuple(factor * size for size in self.config.inner.step_sizes)

    def context(self, tasks: NDArray) -> Params:
        """Return what the policy is told of tasks [T, task_dim], as an entry of its parameters."""
        if not find_algorithm(self.config.algorithm).told:
            return {}
        return {"context": scaled_tasks(self.family, tasks)}

    def adapt(
        self,
        env: gym.Env | Sequence[float] | NDArray,
        *,
        steps: int = 1,
        episodes: int = 20,
        seed: int = 0,
        step_sizes: Sequence[float] | None = None,
    ) -> Policy:
        """Adapt to one task and return an ordinary policy for it.

        Args:
            env: a Gymnasium environment with the spaces of the training family, or a task vector
                of that family.
            steps: inner steps; 0 returns the initialization as it is.
            episodes: episodes sampled for each step.
            seed: of the environment's resets and the actions.
            step_sizes: one a step, the last repeated; by default those of evaluation.

        Raises:
            UserError: a number is out of range, or the environment has other spaces.
        """
        for name, value, least in (
            ("steps", steps, 0),
            ("episodes", episodes, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        if isinstance(env, gym.vector.VectorEnv):
            raise UserError("adapt takes one environment, got a vector environment")
        made = None if isinstance(env, gym.Env) else self.family.make(np.asarray(env, np.float64))
        target = env if isinstance(env, gym.Env) else made
        assert target is not None
        mode = self.config.policy.action
        task = None if made is None else np.asarray(env, np.float64).tolist()
        told: Params = {}
        if find_algorithm(self.config.algorithm).told:
            if made is None:
                raise UserError(
                    "an oracle is told its task: give the task vector, not an environment"
                )
            told = self.context(np.asarray(env, np.float64)[None])

        def sample(params: Params, k: int) -> Any:
            return collect_episodes(
                target,
                self.policy,
                {name: p[0] for name, p in {**params, **told}.items()},
                episodes=episodes,
                horizon=self.family.horizon,
                address=Address(seed, split="test", inner_step=k),
                mode=mode,
            )

        try:
            with one_intraop_thread(), ChunkPool(1) as pool:
                loop, meta = self.inner_loop(pool, step_sizes)
                adapted = loop.run(sample, meta, 1, steps=steps, query="none")
            space = target.action_space
        finally:
            if made is not None:
                made.close()
        params = loop.adapter.params(adapted.iterates[-1], adapted.slow, 1) | told
        params = {name: p[0].clone() for name, p in params.items()}
        record = {"task": task, "steps": steps, "episodes": episodes, "seed": seed}
        return Policy(self.policy, params, space, self.family.horizon, self.config, record)

    def adapter(
        self,
        action_space: gym.Space | None = None,
        *,
        seed: int = 0,
        step_sizes: Sequence[float] | None = None,
    ) -> OnlineAdapter:
        """Return what adapts to one task by transitions as they come; see `OnlineAdapter`.

        Args:
            action_space: of the environment that is acted in; by default the family's.
            seed: of the actions.
            step_sizes: one a step, the last repeated; by default those of evaluation.
        """
        if find_algorithm(self.config.algorithm).told:
            raise UserError("an oracle is told its task and does not adapt")
        if action_space is None:
            with contextlib.closing(self.family.make()) as env:
                action_space = env.action_space
        loop, params = self.inner_loop(ChunkPool(1), step_sizes)
        return OnlineAdapter(loop, params, action_space, self.family.horizon, self.config, seed)

    def save(self, path: str | Path) -> None:
        """Write a policy file that `load` reads."""
        metadata = {"kind": "policy", "config": self.config.to_json(), **self.record}
        checkpoints.save(Path(path), self.params, metadata)


def context_dim(config: Config, task_dim: int) -> int:
    """Return the size of the context input that an algorithm's policy has."""
    row = find_algorithm(config.algorithm)
    return config.policy.context if row.fast == "context" else task_dim if row.told else 0


def scaled_tasks(family: TaskFamily, tasks: NDArray) -> Tensor:
    """Return tasks [T, task_dim] with their training bounds mapped onto [-1, 1], float32."""
    low, high = family.tasks.bounds()
    scaled = (2.0 * tasks - low - high) / np.where(high > low, high - low, 1.0)
    return torch.from_numpy(scaled.astype(np.float32))


def make_adapter(config: Config, policy: MLPPolicy) -> Adapter:
    """Return what adapts in a config's algorithm, and how."""
    row = find_algorithm(config.algorithm)
    loss = row.inner_loss
    if loss is dice:
        loss = partial(dice, decay=config.inner.dice_decay)
    return Adapter(
        policy,
        loss,
        config.inner.step_sizes,
        fast=row.fast,
        learned=row.learned_steps,
        updates=config.inner.updates,
        proximal=config.inner.proximal,
        fitted=config.inner.kl > 0.0,
    )


def make_policy(
    config: Config, observation_shape: tuple[int, ...], actions: gym.Space, context: int = 0
) -> MLPPolicy:
    """Return a config's network for an environment's observations and action space.

    Observations that are no vectors are images.

    Raises:
        UserError: no policy acts in such a space, or options have no effect in it.
    """
    chosen, base = config.policy, PolicyConfig()
    encoder = None
    size = observation_shape[0]
    if len(observation_shape) > 1:
        encoder = make_encoder(chosen.network, observation_shape)
    elif chosen.network in ENCODERS:
        raise UserError(
            f"policy.network {chosen.network} reads images, and observations are"
            f" {size} numbers: leave it out"
        )
    common: dict[str, Any] = {
        "context_dim": context,
        "observation_dim": size if encoder is None else encoder.features,
        "encoder": encoder,
        "hidden": chosen.hidden,
        "activation": chosen.activation,
        "normalize": chosen.normalize and encoder is None,  # images are scaled to [0, 1]
        "output_scale": chosen.output_scale,
    }
    found = categories(actions)
    if found is None:
        assert actions.shape is not None
        return GaussianMLP(
            action_dim=actions.shape[0],
            initial_std=chosen.initial_std,
            min_std=chosen.min_std,
            **common,
        )
    for name in ("initial_std", "min_std", "action"):
        if getattr(chosen, name) != getattr(base, name):
            raise UserError(f"policy.{name} has no effect on {actions} actions")
    return CategoricalMLP(categories=found, **common)


def policy_for(config: Config, family: TaskFamily) -> MLPPolicy:
    """Return a config's network for a family's environments."""
    env = family.make()
    try:
        observation, action = env.observation_space, env.action_space
        if observation.shape is None or not (len(observation.shape) == 1 or is_image(observation)):
            raise UserError(
                f"{family.name}: observations must be a flat Box or a uint8 image, got"
                f" {observation}"
            )
        context = context_dim(config, family.tasks.dim)
        return make_policy(config, observation.shape, action, context)
    finally:
        env.close()


def random_meta_policy(like: MetaPolicy, seed: int = 0) -> MetaPolicy:
    """Return the random initialization that a run with this seed starts from."""
    params = make_adapter(like.config, like.policy).init(like.policy.init(stream(seed, 0, "init")))
    return dataclasses.replace(like, params=params, record={})


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


def checkpoint_path(run: Path, iteration: int) -> Path:
    """Return where a run keeps the checkpoint of an iteration."""
    return run / "checkpoints" / f"{iteration:06d}.safetensors"


def checkpoints_of(run: Path) -> dict[int, Path]:
    """Return a run folder's checkpoints by their iterations, in order."""
    found = (run / "checkpoints").glob("*.safetensors")
    return dict(sorted((int(path.stem), path) for path in found if path.stem.isdecimal()))


def newest_checkpoint(run: Path) -> Path:
    """Return a run folder's newest checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    found = checkpoints_of(run)
    if not found:
        raise CheckpointError(f"{run} holds no checkpoint yet")
    return found[max(found)]


def newest_good(run: Path, before: int, use: Callable[[Path], Any]) -> int | None:
    """Return the newest iteration before another whose checkpoint is used without complaint."""
    for iteration, path in sorted(checkpoints_of(run).items(), reverse=True):
        if iteration < before:
            with contextlib.suppress(CheckpointError):
                use(path)
                return iteration
    return None


def load(what: str | Path) -> MetaPolicy:
    """Return a meta-policy from a run folder, a policy file or the name of a shipped policy.

    Raises:
        CheckpointError: it is none of them, or its file is damaged.
    """
    path = Path(what)
    if path.is_dir():
        newest = newest_checkpoint(path)
        try:
            return load(newest)
        except CheckpointError as error:
            older = newest_good(path, int(newest.stem), load)
            if older is None:
                raise
            good = checkpoint_path(path, older)
            raise CheckpointError(f"{error}; the newest good one is {good}") from error
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
    tensors, metadata = checkpoints.load(path)
    if metadata.get("kind") == "adapted":
        raise CheckpointError(
            f"{path} is a policy adapted to one task, no initialization: metarl record shows it,"
            " metarl.load_policy reads it"
        )
    if metadata.get("kind") not in ("policy", "checkpoint"):
        raise CheckpointError(f"{path} holds no policy but {metadata.get('kind')!r}")
    config = config_of(path, metadata)
    params = {n.removeprefix("meta."): t for n, t in tensors.items() if not n.startswith("outer.")}
    record = {k: metadata[k] for k in ("iteration", "env_steps", "versions") if k in metadata}
    if "layer0.weight" not in params:
        raise CheckpointError(f"{path} holds no policy")
    shapes = make_adapter(config, MetaPolicy(params, config).policy).shapes()
    return MetaPolicy(checkpoints.in_shapes(path, params, shapes), config, record)


def load_policy(path: str | Path) -> Policy:
    """Return an adapted policy from the file that `metarl adapt` or `Policy.save` wrote.

    Raises:
        CheckpointError: it is missing, damaged or no adapted policy.
    """
    path = Path(path)
    tensors, metadata = checkpoints.load(path)
    if metadata.get("kind") != "adapted":
        raise CheckpointError(f"{path} is an initialization: metarl adapt makes a policy of it")
    config = config_of(path, metadata)
    meta = MetaPolicy(tensors, config)
    shapes = meta.policy.shapes()
    if meta.policy.context_dim:
        shapes["context"] = (meta.policy.context_dim,)
    env = meta.family.make()
    try:
        space = env.action_space
    finally:
        env.close()
    params = checkpoints.in_shapes(path, tensors, shapes)
    return Policy(meta.policy, params, space, meta.family.horizon, config, metadata["adapted"])
