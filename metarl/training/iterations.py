"""What one meta-iteration optimizes, and what it records; functions of the algorithm's row, the
config, the iteration and its samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from metarl.algorithms.table import Algorithm
from metarl.config.options import Config
from metarl.distributed.chunk_pool import ChunkPool
from metarl.distributed.process_group import ALONE, CHUNK, Ranks, device_of
from metarl.envs.errors import check_one_of
from metarl.learning.credit import post_update_credit
from metarl.learning.first_order import Adam, NoUpdate
from metarl.learning.inner_loop import Adapted
from metarl.learning.inner_update import Adapter
from metarl.learning.losses import Loss, clipped_ratio, likelihood_ratio
from metarl.learning.meta_gradients import (
    DisplacementProblem,
    ImplicitProblem,
    Objective,
    Problem,
    UnrolledProblem,
    annealed_weights,
    cosine,
)
from metarl.learning.trajectories import Rollout
from metarl.learning.trust_region import TrustRegion
from metarl.models.networks import Params
from metarl.models.policies import GaussianMLP, MLPPolicy
from metarl.models.predictors import Predictor
from metarl.models.samples import Samples
from metarl.sampling.seeding import stream
from metarl.sampling.spaces import beyond_bounds

FISHER_SAMPLES = 200
"""Valid samples of a task that Fisher products use at least, where it has them."""


@dataclass(frozen=True)
class Schedule:
    """What changes from iteration to iteration of a run."""

    rate: float
    """Share of Adam's learning rate, or of the trust region's `max_kl`."""
    curvature: float
    """Share of the inner steps' curvature in the meta-gradient."""
    step_weights: tuple[float, ...]
    """Weights of the losses of iterates 1 ... K; none: the last alone."""


def schedule(row: Algorithm, config: Config, iteration: int) -> Schedule:
    """Return what holds in an iteration, counted from 0, of a run of `config.iterations`."""
    progress = iteration / config.iterations
    fraction = config.meta.anneal_fraction
    annealed = progress / fraction if fraction else 1.0
    first_order = row.first_order or (row.annealed and annealed < 1.0)
    return Schedule(
        rate=cosine(progress) if config.meta.cosine else 1.0,
        curvature=0.0 if first_order else config.meta.curvature,
        step_weights=annealed_weights(config.inner.steps, annealed) if row.annealed else (),
    )


def schedule_change(row: Algorithm, config: Config, planned: int, iteration: int) -> str | None:
    """Say in one line what becomes of a run's schedules when its end is another than was planned.

    Args:
        row: the algorithm's.
        config: as the run goes on.
        planned: iterations that it was to have in all.
        iteration: how many it has had.

    Returns:
        None, where nothing depends on the run's length.
    """
    total = config.iterations
    parts = []
    if config.meta.cosine:
        before, now = (cosine(iteration / end) for end in (planned, total))
        scaled = "trust_region.max_kl" if row.outer == "trust-region" else "adam.learning_rate"
        parts.append(
            f"{scaled} goes on at {now:.2f} of its size, not {before:.2f}, and is zero at iteration"
            f" {total}"
        )
    if row.annealed and config.meta.anneal_fraction:
        ends = [math.ceil(config.meta.anneal_fraction * end) for end in (planned, total)]
        parts.append(
            f"multi-step loss and first order last until iteration {ends[1]}, not {ends[0]}"
        )
    if planned == total or not parts:
        return None
    return f"{total} iterations instead of {planned}: {'; '.join(parts)}"


def make_problem(
    row: Algorithm,
    config: Config,
    iteration: int,
    adapted: Adapted,
    params: Params,
    adapter: Adapter,
    pool: ChunkPool,
) -> Problem:
    """Return what the outer step of an iteration is to solve.

    Args:
        row: the config's algorithm.
        config: of the run.
        iteration: counted from 0.
        adapted: what the inner loop sampled and found.
        params: the meta-parameters it started from.
        adapter: how tasks adapt.
        pool: threads to share the work.
    """
    batches = adapted.batches
    common: dict[str, Any] = {
        "chunk": chunk_size(adapter, config, batches),
        "device": device_of(config.device),
        "sampled_with": params,
        "iterates": adapted.iterates[1:],
    }
    if row.gradient == "displacement":
        return DisplacementProblem(adapter, batches, pool, **common)
    model = adapter.model
    outer_loss: Loss = model.loss if isinstance(model, Predictor) else likelihood_ratio
    if row.outer == "clipped":
        outer_loss = partial(clipped_ratio, clip=config.adam.clip)
    if row.gradient == "implicit":
        return ImplicitProblem(adapter, batches, pool, Objective(outer_loss), **common)
    check_one_of("gradient", row.gradient, ("unrolled",))
    now = schedule(row, config, iteration)
    credit, ranks = None, pool.ranks
    if config.meta.credit:
        credit = config.meta.credit * post_update_credit(adapted, ranks)
    objective = Objective(
        outer_loss, step_weights=now.step_weights, inner_kl=config.meta.inner_kl, credit=credit
    )
    trust_region = row.outer == "trust-region"
    return UnrolledProblem(
        adapter,
        batches,
        pool,
        objective,
        curvature=now.curvature,
        fisher_samples=(
            fisher_samples(row, config, iteration, batches, ranks) if trust_region else ()
        ),
        minibatches=() if trust_region else minibatches(config, iteration, batches),
        **common,
    )


_CACHED = 1 << 18  # activations, 1 MB of them


def chunk_size(adapter: Adapter, config: Config, batches: Sequence[Samples]) -> int:
    """Return how many tasks are differentiated together.

    A GPU takes all tasks at once; a processor's cache a few of those that policies sample, and of
    small data sets so many that calls do not cost more than numbers.
    """
    if config.device != "cpu":
        return config.tasks
    if not isinstance(adapter.model, Predictor):
        return CHUNK
    each = max(batch.weight.shape[1] for batch in batches) * adapter.model.activations
    return min(max(_CACHED // each, 1), config.tasks)


def fisher_samples(
    row: Algorithm,
    config: Config,
    iteration: int,
    batches: Sequence[Samples],
    ranks: Ranks = ALONE,
) -> list[Tensor | None]:
    """Return for each batch the samples that Fisher products use, as `Batch.select` takes them.

    Of every task they are at least the config's fraction of its valid samples, and no fewer than
    `FISHER_SAMPLES` or all; samples that are not valid only fill rows, after all valid ones. None
    stands for a whole batch. An algorithm that needs whole episodes gets whole episodes. The number
    is that of the task, of all ranks, that needs most.
    """
    chosen: list[Tensor | None] = []
    for batch in batches:
        valid = batch.weight > 0
        tasks, samples = valid.shape
        rng = stream(config.seed, iteration, "fisher")  # the same order for every batch
        units = config.episodes if row.whole_episodes else samples
        order = torch.from_numpy(rng.permutation(units))
        known = valid.sum(dim=1)
        needed = (config.trust_region.fisher_fraction * known.double()).round().long()
        needed = needed.clamp(min=FISHER_SAMPLES).minimum(known)
        if row.whole_episodes:
            steps = valid.view(tasks, units, -1).sum(dim=2)[:, order]
            place = (steps == 0).long().argsort(dim=1, stable=True)
            seen = steps.gather(1, place).cumsum(dim=1)
            most = ranks.largest(int((seen < needed.unsqueeze(1)).sum(dim=1).max()))
            count = min(most + 1, units)
            horizon = samples // units
            first = order[place[:, :count]] * horizon
            some = first.unsqueeze(2) + torch.arange(horizon)
        else:
            count = max(ranks.largest(int(needed.max())), 1)
            place = (~valid[:, order]).long().argsort(dim=1, stable=True)
            some = order[place[:, :count]].sort(dim=1).values
        chosen.append(None if some[0].numel() >= samples else some)
    return chosen


def minibatches(config: Config, iteration: int, batches: Sequence[Samples]) -> list[Tensor]:
    """Return the samples of each minibatch; none where there is but one."""
    if config.adam.minibatches == 1:
        return []
    samples = batches[-1].weight.shape[1]
    rng = stream(config.seed, iteration, "minibatches")
    shuffled = torch.from_numpy(rng.permutation(samples))
    parts = shuffled.tensor_split(min(config.adam.minibatches, samples))
    return [part.sort().values for part in parts]


def make_outer(row: Algorithm, config: Config) -> TrustRegion | Adam | NoUpdate:
    """Return an algorithm's outer optimizer."""
    if row.outer == "none":
        return NoUpdate()
    if row.outer == "trust-region":
        return TrustRegion(config.trust_region)
    check_one_of("outer", row.outer, ("adam", "clipped"))
    return Adam(config.adam)


def rollout_metrics(
    row: Algorithm,
    config: Config,
    policy: MLPPolicy,
    params: Params,
    space: gym.Space,
    rollouts: Sequence[Rollout],
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Return what an iteration's rollouts, support first, tell: returns and how actions spread.

    Args:
        row: the config's algorithm.
        config: of the run.
        policy: that sampled.
        params: meta-parameters after the update.
        space: actions of the environments.
        rollouts: of this rank's tasks; fewer than planned where the iteration broke off.
        ranks: that have the other tasks.
    """
    returns = [float(ranks.gather(rollout.mean_returns()).nanmean()) for rollout in rollouts]
    # Reptile samples nothing with its last parameters: what counts are those before.
    query = row.gradient != "displacement"
    planned = config.inner.steps + query
    adapted_all = len(returns) == planned and (query or planned > 1)
    first, last = rollouts[0], rollouts[-1]
    entropy = policy.entropy(last.behaviour).double().where(last.valid, 0.0).sum(dim=(1, 2))
    steps = ranks.total(last.env_steps)
    std = math.nan
    if isinstance(policy, GaussianMLP):
        std = float(policy.confined(params)["log_std"].exp().mean())
    return {
        "return_pre": returns[0],
        "return_post": returns[-1] if adapted_all else math.nan,
        "gain": returns[-1] - returns[0] if adapted_all else math.nan,
        "returns": [r if math.isfinite(r) else None for r in returns],
        "episode_length": steps / (config.tasks * config.episodes),
        "diverged_episodes": ranks.total(sum(int(r.diverged.sum()) for r in rollouts)),
        "policy_std": std,
        "saturation": _saturation(first, space, config, ranks),
        "policy_entropy": float(ranks.gather(entropy).sum() / steps),
    }


def _saturation(rollout: Rollout, space: gym.Space, config: Config, ranks: Ranks) -> float:
    """Return the share of the components of actions that a Box's bounds cut; else NaN."""
    cut = beyond_bounds(rollout.action.numpy(), space, config.policy.action)
    if cut is None:
        return math.nan
    counts = (torch.from_numpy(cut) & rollout.valid.unsqueeze(-1)).sum(dim=(1, 2, 3))
    total = ranks.total(rollout.env_steps) * cut.shape[-1]
    return float(ranks.gather(counts.double()).sum() / total)
