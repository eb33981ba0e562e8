"""Reinforcement learning: policies, episodes in environments, returns."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import gymnasium as gym
import torch
from torch import Tensor

from metarl.algorithms import Algorithm
from metarl.distributed.chunk_pool import ChunkPool, slices
from metarl.distributed.process_group import ALONE, CHUNK, ProcessGroup, local_ranks
from metarl.domains.domain import (
    Domain,
    NetworkOptions,
    TaskSamples,
    TaskSource,
    context_dim,
)
from metarl.domains.memory import check_memory, need
from metarl.envs import TaskFamily, guard
from metarl.envs.errors import UserError, check_one_of
from metarl.envs.family import Family
from metarl.envs.gymnasium.family import is_image
from metarl.envs.policy_spaces import categories, check_policy_spaces
from metarl.learning.advantages import to_batch
from metarl.learning.density import check_density
from metarl.learning.inner_update import Adapter
from metarl.learning.losses import Batch, Loss, likelihood_ratio, log_likelihood
from metarl.models.encoders import ENCODERS, make_encoder
from metarl.models.networks import Model, Params
from metarl.models.policies import CategoricalMLP, GaussianMLP, MLPPolicy
from metarl.models.samples import Samples
from metarl.sampling.rollouts import RandomKey
from metarl.sampling.spaces import ActionMode, beyond_bounds, bounded
from metarl.sampling.trajectories import Rollout
from metarl.sampling.workers import START_SECONDS, AnyCollector, make_collector


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(NetworkOptions):
    """The policy: an MLP gives a Gaussian's mean, or the logits of Discrete actions."""

    network: str = "auto"
    """Network before the hidden layers. For image observations (uint8): nature, the Nature CNN, or
    impala, a small residual network. auto: none for vectors, nature for images of at least 36 x 36
    pixels, impala for smaller ones."""
    initial_std: float = 1.0
    """Standard deviation of the actions at the start."""
    min_std: float = 1e-6
    """Smallest standard deviation of the actions."""
    action: ActionMode = "clip"
    """How actions are fitted to the environment's bounds: clip cuts them off there; scale maps
    [-1, 1] onto the bounds first."""
    normalize: bool = False
    """Scale observations by their running mean and standard deviation."""

    networks: ClassVar[tuple[str, ...]] = ("auto", "mlp", *ENCODERS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of(self.key("action"), self.action, ("clip", "scale"))
        self.require_positive("initial_std", "min_std")
        below = self.min_std <= self.initial_std
        self.require("min_std", below, f"at most {self.key('initial_std')}, {self.initial_std}")


class Reinforcement(Domain):
    """Policies that adapt to environments."""

    name: ClassVar[str] = "reinforcement"
    measure: ClassVar[str] = "return"
    unit: ClassVar[str] = "env steps"

    def algorithm(self, algorithm: Algorithm, family: str) -> Algorithm:
        if algorithm.head != "meta":
            raise UserError(f"{algorithm.name} is for few-shot classification, not for {family}")
        return algorithm

    def network_options(self) -> PolicyOptions:
        return PolicyOptions()

    def model(self, algorithm: Algorithm, options: NetworkOptions, family: Family) -> MLPPolicy:
        assert isinstance(family, TaskFamily)
        assert isinstance(options, PolicyOptions)
        observation, action = spaces_of(family)
        check_policy_spaces(family.name, observation, action)
        assert observation.shape is not None
        context = context_dim(algorithm, family.tasks.dim)
        return make_policy(options, observation.shape, action, context)

    def environments(self, family: Family) -> TaskFamily:
        assert isinstance(family, TaskFamily)
        return family

    def policy(self, model: Model) -> MLPPolicy:
        assert isinstance(model, MLPPolicy)
        return model

    def inner_loss(self, model: Model) -> Loss:
        return log_likelihood

    def outer_loss(self, model: Model) -> Loss:
        return likelihood_ratio

    def check(
        self, adapter: Adapter, pool: ChunkPool, fast: Params, slow: Params, samples: Samples
    ) -> None:
        assert isinstance(samples, Batch)
        assert samples.rollout is not None
        whole = not bool(samples.rollout.diverged.any())
        check_density(adapter, fast, slow, samples, pool, whole=whole)

    def source(
        self,
        family: Family,
        algorithm: Algorithm,
        adapter: Adapter,
        pool: ChunkPool,
        **options: Any,
    ) -> Environments:
        assert isinstance(family, TaskFamily)
        return Environments(family, algorithm, adapter, pool, **options)


def make_policy(
    options: PolicyOptions, observation_shape: tuple[int, ...], actions: gym.Space, context: int = 0
) -> MLPPolicy:
    """Return the network for an environment's observations and action space.

    Observations with more than one axis are images.

    Raises:
        UserError: no policy acts in such a space, or options have no effect in it.
    """
    base = PolicyOptions()
    encoder = None
    size = observation_shape[0]
    if len(observation_shape) > 1:
        encoder = make_encoder(options.network, observation_shape)
    elif options.network in ENCODERS:
        raise UserError(
            f"policy.network {options.network} reads images, and observations are"
            f" {size} numbers: leave it out"
        )
    common: dict[str, Any] = {
        "context_dim": context,
        "observation_dim": size if encoder is None else encoder.features,
        "encoder": encoder,
        "hidden": options.hidden,
        "activation": options.activation,
        "normalize": options.normalize and encoder is None,  # images are scaled to [0, 1]
        "output_scale": options.output_scale,
    }
    found = categories(actions)
    if found is None:
        assert isinstance(actions, gym.spaces.Box)
        if options.action == "scale" and not bounded(actions).any():
            raise UserError(f"policy.action scale has no effect on unbounded actions, {actions}")
        return GaussianMLP(
            action_dim=actions.shape[0],
            initial_std=options.initial_std,
            min_std=options.min_std,
            **common,
        )
    for name in ("initial_std", "min_std", "action"):
        if getattr(options, name) != getattr(base, name):
            raise UserError(f"policy.{name} has no effect on {actions} actions")
    return CategoricalMLP(categories=found, **common)


def spaces_of(family: TaskFamily) -> tuple[gym.Space, gym.Space]:
    """Return the observation and the action space of a family's environments."""
    with guard.opened(family.make) as env:
        observation, action = env.observation_space, env.action_space
    if is_image(observation):
        # A closed renderer that Python takes apart later takes the OpenGL context of a living one
        # along, which gives black frames from then on.
        del env
        gc.collect()
    return observation, action


class Environments(TaskSource):
    """Episodes in a family's environments."""

    fixed: ClassVar[bool] = False
    family: TaskFamily

    def __init__(
        self,
        family: TaskFamily,
        algorithm: Algorithm,
        adapter: Adapter,
        pool: ChunkPool,
        *,
        tasks: int,
        stratified: bool,
        episodes: int,
        options: PolicyOptions,
        workers: int = 0,
        timeout: float = 60.0,
    ) -> None:
        super().__init__(family, algorithm, adapter, pool, tasks=tasks, stratified=stratified)
        group = pool.process_group
        if group.size > 1 and workers and not family.parallel and group.limit <= START_SECONDS:
            raise UserError(
                f"rank_timeout must be above {START_SECONDS:g}, the seconds that workers may take"
                f" to start, got {group.limit:g}"
            )
        assert isinstance(adapter.model, MLPPolicy)
        self.model, self.episodes, self.options = adapter.model, episodes, options
        self.spaces = spaces_of(family)
        self.action_space = self.spaces[1]
        self._check_memory(workers)
        self.collector: AnyCollector = make_collector(
            family, self.model, self.tasks, episodes, pool, options.action,
            workers=workers, timeout=timeout, check=pool.process_group.is_main,
        )  # fmt: skip

    def _check_memory(self, workers: int) -> None:
        algorithm = self.algorithm
        second = not algorithm.reference and algorithm.meta.needs_query
        needed = need(
            self.model,
            tasks=self.tasks,
            episodes=self.episodes,
            horizon=self.family.horizon,
            rollouts=algorithm.inner.steps + 1,
            workers=0 if self.family.parallel else workers,
            chunks=self.pool.threads if second else 1,
            fisher_fraction=getattr(algorithm.outer, "fisher_fraction", 0.0),
            threads=self.pool.threads,
            baseline=algorithm.baseline,
        )
        check_memory(needed, self.family.name, local_ranks())

    def open(self, key: RandomKey, baseline: Params) -> EpisodeSamples:
        return EpisodeSamples(key, *self.draw_tasks(key), source=self, baseline=baseline)

    def chunk(self, batches: list[Samples], device: str) -> int:
        return CHUNK if device == "cpu" else self.count

    def close(self) -> None:
        self.collector.close()


@dataclass
class EpisodeSamples(TaskSamples):
    """The episodes of one iteration."""

    source: Environments = field(kw_only=True)
    baseline: Params = field(kw_only=True)

    def sample(self, params: Params, k: int) -> Batch:
        begin = time.perf_counter()
        source = self.source
        where = replace(self.key, inner_step=k)
        rollout = source.collector.collect({**params, **self.context}, self.tasks, where)
        self.seconds += time.perf_counter() - begin
        self.rollouts.append(rollout)
        algorithm = source.algorithm
        assert algorithm.advantage is not None
        assert algorithm.baseline is not None
        return to_batch(
            source.model, rollout, algorithm.advantage, algorithm.baseline, self.baseline,
            source.pool,
        )  # fmt: skip

    @property
    def count(self) -> int:
        return sum(rollout.env_steps for rollout in self.rollouts)

    def mean_returns(self) -> Tensor:
        return self.rollouts[-1].mean_returns()

    def updated_baseline(self) -> Params:
        algorithm = self.source.algorithm
        assert algorithm.advantage is not None
        assert algorithm.baseline is not None
        return algorithm.baseline.update(
            self.baseline, self.rollouts, algorithm.advantage.discount,
            self.source.pool.process_group,
        )  # fmt: skip

    def observed(self, params: Params) -> Params:
        source = self.source
        if not source.options.normalize:
            return params
        chunks = slices(len(self.tasks), CHUNK)
        parts = [r.observation[c][r.valid[c]] for c in chunks for r in self.rollouts]
        return source.model.track_observations(params, parts, source.pool.process_group)

    def metrics(self, before: Params, after: Params, stats: Mapping[str, Any]) -> dict[str, Any]:
        source = self.source
        return rollout_metrics(
            source.algorithm, source.model, after, source.action_space, source.options.action,
            self.rollouts, source.count * source.episodes, source.pool.process_group,
        )  # fmt: skip


def rollout_metrics(
    algorithm: Algorithm,
    policy: MLPPolicy,
    params: Params,
    space: gym.Space,
    mode: ActionMode,
    rollouts: Sequence[Rollout],
    episodes: int,
    process_group: ProcessGroup = ALONE,
) -> dict[str, Any]:
    """Return the metrics of an iteration's rollouts, support first: returns, spread of actions.

    Args:
        params: meta-parameters after the update.
        space: actions of the environments.
        rollouts: of this process's tasks; fewer than planned if the iteration broke off.
        episodes: of all tasks together.
        process_group: has the other tasks.
    """
    returns = [
        float(process_group.gather(rollout.mean_returns()).nanmean()) for rollout in rollouts
    ]
    # Reptile samples nothing with its last parameters: those before count.
    query = algorithm.meta.needs_query
    planned = algorithm.inner.steps + query
    adapted_all = len(returns) == planned and (query or planned > 1)
    first, last = rollouts[0], rollouts[-1]
    entropy = policy.entropy(last.behaviour).double().where(last.valid, 0.0).sum(dim=(1, 2))
    steps = process_group.total(last.env_steps)
    std = math.nan
    if isinstance(policy, GaussianMLP):
        std = float(policy.confined(params)["log_std"].exp().mean())
    return {
        "return_pre": returns[0],
        "return_post": returns[-1] if adapted_all else math.nan,
        "gain": returns[-1] - returns[0] if adapted_all else math.nan,
        "returns": [r if math.isfinite(r) else None for r in returns],
        "episode_length": steps / episodes,
        "diverged_episodes": process_group.total(sum(int(r.diverged.sum()) for r in rollouts)),
        "policy_std": std,
        "clip_fraction": _clip_fraction(first, space, mode, process_group),
        "policy_entropy": float(process_group.gather(entropy).sum() / steps),
    }


def _clip_fraction(
    rollout: Rollout, space: gym.Space, mode: ActionMode, process_group: ProcessGroup
) -> float:
    """Return the share of the components of actions that a Box's bounds cut; else NaN."""
    cut = beyond_bounds(rollout.action.numpy(), space, mode)
    if cut is None:
        return math.nan
    counts = (torch.from_numpy(cut) & rollout.valid.unsqueeze(-1)).sum(dim=(1, 2, 3))
    total = process_group.total(rollout.env_steps) * cut.shape[-1]
    return float(process_group.gather(counts.double()).sum() / total)
