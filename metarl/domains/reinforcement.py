"""Reinforcement learning: policies, episodes in environments, returns."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from metarl.algorithms import Algorithm
from metarl.distributed.chunk_pool import ChunkPool, slices
from metarl.distributed.process_group import ALONE, CHUNK, ProcessGroup
from metarl.domains.domain import (
    Domain,
    ModelOptions,
    TaskSamples,
    TaskSource,
    context_dim,
)
from metarl.domains.memory import check_memory, need
from metarl.envs import TaskFamily, guard
from metarl.envs.errors import UserError, check_one_of
from metarl.envs.family import Family
from metarl.envs.gymnasium.observations import flattened, is_image, structure_of
from metarl.envs.policy_spaces import check_pixels, check_policy_spaces
from metarl.envs.tasks import Tasks
from metarl.learning.adapter import Adapter
from metarl.learning.advantages import to_batch
from metarl.learning.density import check_density
from metarl.learning.losses import Batch, Loss, likelihood_ratio, log_likelihood
from metarl.learning.stopwatch import Stopwatch
from metarl.models.distribution import Distribution, check_distribution
from metarl.models.distributions import AutoDistribution
from metarl.models.modules import check_normalized
from metarl.models.network_parts import POLICY_NETWORKS, AutoPolicyNetwork, NetworkPart
from metarl.models.networks import Model, Params
from metarl.models.policies import PolicyModel
from metarl.models.samples import Samples
from metarl.parts import Part, fixed
from metarl.sampling.rollouts import RandomKey
from metarl.sampling.spaces import ActionMode, beyond_bounds, bounded
from metarl.sampling.trajectories import Rollout
from metarl.sampling.workers import START_SECONDS, AnyCollector, make_collector


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(ModelOptions):
    """Policy: a network and a distribution over actions."""

    network: NetworkPart = fixed(AutoPolicyNetwork())
    distribution: Distribution = fixed(AutoDistribution())
    action: ActionMode = "clip"
    """Mapping of actions to the environment's bounds: clip clips them; scale first maps [-1, 1] to
    the bounds."""
    normalize: bool = False
    """Scale observations by their running mean and standard deviation."""

    def __post_init__(self) -> None:
        check_one_of(self.key("action"), self.action, ("clip", "scale"))

    @property
    def parts(self) -> dict[str, Part]:
        return {**super().parts, "policy.distribution": self.distribution}


class Reinforcement(Domain):
    """Policies that adapt to environments."""

    name: ClassVar[str] = "reinforcement"
    measure: ClassVar[str] = "return"
    unit: ClassVar[str] = "env steps"

    def algorithm(self, algorithm: Algorithm, family: str) -> Algorithm:
        if algorithm.head != "meta":
            raise UserError(f"{algorithm.name} is for few-shot classification, not for {family}")
        return algorithm

    @property
    def networks(self) -> Mapping[str, type[NetworkPart]]:
        return POLICY_NETWORKS

    def model_options(self) -> PolicyOptions:
        return PolicyOptions()

    def model(self, algorithm: Algorithm, options: ModelOptions, family: Family) -> PolicyModel:
        assert isinstance(family, TaskFamily)
        assert isinstance(options, PolicyOptions)
        observation, action = policy_spaces(algorithm.played(family), options.network)
        context = context_dim(algorithm, family.tasks.dim)
        return make_policy(options, observation, action, context)

    def environments(self, family: Family) -> TaskFamily:
        assert isinstance(family, TaskFamily)
        return family

    def policy(self, model: Model) -> PolicyModel:
        assert isinstance(model, PolicyModel)
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
    options: PolicyOptions, observations: gym.Space, actions: gym.Space, context: int = 0
) -> PolicyModel:
    """Return the policy for an environment's spaces.

    Args:
        observations: observation space, flat or images; other spaces if the network reads them.
        actions: action space of the environment.
        context: size of the network's context input.

    Raises:
        UserError: the network or the distribution does not fit, or an option has no effect.
    """
    distribution = options.distribution.over(actions)
    if not type(distribution).__module__.startswith("metarl."):
        check_distribution(distribution, actions)
    size = distribution.size(actions)
    network = options.network.make(observations, size, context)
    images = network.input_dtype is np.uint8
    if options.normalize and not images:  # images are scaled to [0, 1]
        check_normalized(network)
    if isinstance(actions, gym.spaces.Box):
        _check_bounds(options.action, distribution, actions)
    elif options.action != PolicyOptions.action:
        raise UserError(f"policy.action has no effect on {actions} actions")
    return PolicyModel(
        network=network, distribution=distribution, normalize=options.normalize and not images
    )


def policy_of_parameters(params: Params, options: ModelOptions, context: int) -> PolicyModel | None:
    """Return the policy of parameters that determine its sizes: a Gaussian for vectors.

    It needs no family. None for other models.
    """
    images = any(p.dim() == 4 for p in params.values())
    if images or not {"log_std", "layer0.weight"} <= params.keys():
        return None
    assert isinstance(options, PolicyOptions)
    size = params["layer0.weight"].shape[0] - context
    observations = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
    actions = gym.spaces.Box(-1.0, 1.0, params["log_std"].shape)
    return make_policy(options, observations, actions, context)


def _check_bounds(mode: ActionMode, distribution: Distribution, actions: gym.spaces.Box) -> None:
    """Raise UserError if the policy's actions cannot be mapped to the bounds of a Box."""
    if mode == "scale" and not bounded(actions).any():
        raise UserError(f"policy.action scale has no effect on unbounded actions, {actions}")
    if not distribution.scaled:
        return
    if not bounded(actions).all():
        raise UserError(
            f"policy.distribution {distribution.label} needs bounded actions, got {actions}"
        )
    if mode != "scale" and not ((actions.low == -1.0).all() and (actions.high == 1.0).all()):
        raise UserError(
            f"policy.distribution {distribution.label} draws actions in [-1, 1], but the bounds are"
            f" {actions}: add policy.action scale"
        )


def policy_spaces(family: TaskFamily, network: NetworkPart) -> tuple[gym.Space, gym.Space]:
    """Return the spaces of a family's environments as the network uses them.

    Raises:
        UserError: the network does not support the spaces.
    """
    structure, action = spaces_of(family, structured=True)
    observation = flattened(structure)
    check_policy_spaces(family.name, observation, action)
    if network.structured:
        return structure, action
    check_pixels(family.name, structure)
    return observation, action


def spaces_of(family: TaskFamily, *, structured: bool = False) -> tuple[gym.Space, gym.Space]:
    """Return the observation and the action space of a family's environments.

    Args:
        structured: return a Dict or Tuple unchanged, not flattened.
    """
    with guard.opened(family.make) as env:
        observation = structure_of(env) if structured else env.observation_space
        action = env.action_space
    if is_image(observation):
        # If Python deallocates a closed renderer later, it destroys the OpenGL context of a living
        # renderer. All later frames would be black.
        del env
        gc.collect()
    return observation, action


class Environments(TaskSource):
    """Episodes in a family's environments."""

    independent_of_policy: ClassVar[bool] = False
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
        assert isinstance(adapter.model, PolicyModel)
        self.model, self.episodes, self.options = adapter.model, episodes, options
        self.played = algorithm.played(family)
        self.spaces = spaces_of(family)
        self.action_space = self.spaces[1]
        self._check_memory(workers)
        self.collector: AnyCollector = make_collector(
            self.played, self.model, self.tasks, episodes, pool, options.action,
            self.played.kept, workers=workers, timeout=timeout, check=pool.process_group.is_main,
        )  # fmt: skip

    def _check_memory(self, workers: int) -> None:
        algorithm = self.algorithm
        second = not algorithm.reference and algorithm.meta.needs_query
        needed = need(
            self.model,
            tasks=self.tasks,
            episodes=self.episodes,
            horizon=self.played.horizon,
            rollouts=algorithm.inner.steps + 1,
            info_keys=len(self.played.kept),
            workers=0 if self.family.parallel else workers,
            chunks=self.pool.threads if second else 1,
            fisher_fraction=getattr(algorithm.outer, "fisher_fraction", 0.0),
            threads=self.pool.threads,
            baseline=algorithm.baseline,
        )
        check_memory(needed, self.family.name)

    def open(self, key: RandomKey, baseline: Params, tasks: Tasks | None = None) -> EpisodeSamples:
        return EpisodeSamples(key, *self.draw_tasks(key, tasks), source=self, baseline=baseline)

    def chunk(self, batches: list[Samples], device: str) -> int:
        return CHUNK if device == "cpu" else self.count

    def close(self) -> None:
        self.collector.close()


@dataclass
class EpisodeSamples(TaskSamples):
    """Episodes of one iteration."""

    source: Environments = field(kw_only=True)
    baseline: Params = field(kw_only=True)
    seconds_baseline: float = 0.0
    """Seconds spent on baselines and advantages so far."""

    def sample(self, params: Params, k: int) -> Batch:
        watch, source = Stopwatch(), self.source
        where = replace(self.key, inner_step=k)
        rollout = source.collector.collect({**params, **self.context}, self.tasks, where)
        self.seconds += watch.lap()
        self.rollouts.append(rollout)
        advantage, baseline = source.algorithm.estimator
        batch = to_batch(source.model, rollout, advantage, baseline, self.baseline, source.pool)
        self.seconds_baseline += watch.lap()
        return batch

    @property
    def count(self) -> int:
        return sum(rollout.env_steps for rollout in self.rollouts)

    def mean_returns(self) -> Tensor:
        return self.rollouts[-1].mean_returns()

    def updated_baseline(self) -> Params:
        advantage, baseline = self.source.algorithm.estimator
        group = self.source.pool.process_group
        return baseline.update(self.baseline, self.rollouts, advantage.discount, group)

    def observed(self, params: Params) -> Params:
        source = self.source
        if not source.options.normalize:
            return params
        chunks = slices(len(self.tasks), CHUNK)
        parts = [r.observation[c][r.valid[c]] for c in chunks for r in self.rollouts]
        return source.model.track_observations(params, parts, source.pool.process_group)

    def metrics(self, before: Params, after: Params, stats: Mapping[str, Any]) -> dict[str, Any]:
        source = self.source
        found = rollout_metrics(
            source.algorithm, source.model, after, source.action_space, source.options.action,
            self.rollouts, source.count * source.episodes, source.pool.process_group,
        )  # fmt: skip
        return {**found, "seconds_baseline": self.seconds_baseline}


def rollout_metrics(
    algorithm: Algorithm,
    policy: PolicyModel,
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
        space: action space of the environments.
        rollouts: rollouts of this process's tasks; fewer than planned if the iteration stopped
            early.
        episodes: number of episodes, or trials, of all tasks.
        process_group: group with the other tasks.
    """
    measured = algorithm.measured(rollouts)
    returns = [
        float(process_group.gather(rollout.mean_returns()).nanmean()) for rollout in measured
    ]
    # Reptile samples nothing with its last parameters; the samples before them count instead.
    query = algorithm.meta.needs_query
    planned = algorithm.inner.steps + query
    adapted_all = len(rollouts) == planned and (query or planned > 1)
    first, last = rollouts[0], rollouts[-1]
    entropy = policy.entropy(last.behaviour).double().where(last.valid, 0.0).sum(dim=(1, 2))
    steps = process_group.total(last.env_steps)
    return {
        "return_pre": returns[0],
        "return_post": returns[-1] if adapted_all else math.nan,
        "gain": returns[-1] - returns[0] if adapted_all else math.nan,
        "returns": [r if math.isfinite(r) else None for r in returns],
        "episode_length": steps / episodes / (len(measured) / len(rollouts)),
        "diverged_episodes": process_group.total(sum(int(r.diverged.sum()) for r in rollouts)),
        "policy_std": policy.distribution.std(params),
        "clip_fraction": _clip_fraction(first, space, mode, process_group),
        "policy_entropy": float(process_group.gather(entropy).sum() / steps),
    }


def _clip_fraction(
    rollout: Rollout, space: gym.Space, mode: ActionMode, process_group: ProcessGroup
) -> float:
    """Return the share of action components that the bounds of a Box clip; NaN for other spaces."""
    cut = beyond_bounds(rollout.action.numpy(), space, mode)
    if cut is None:
        return math.nan
    counts = (torch.from_numpy(cut) & rollout.valid.unsqueeze(-1)).sum(dim=(1, 2, 3))
    total = process_group.total(rollout.env_steps) * cut.shape[-1]
    return float(process_group.gather(counts.double()).sum() / total)
