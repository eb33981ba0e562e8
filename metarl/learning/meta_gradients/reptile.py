"""Meta-gradient of Reptile: the displacement of the adapted parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarl.envs.errors import UserError
from metarl.learning.meta_gradients.problem import MetaGradient, Problem, Sampled
from metarl.models.networks import Params, flatten, stack


@dataclass
class ReptileProblem(Problem):
    """Reptile (Nichol et al. 2018, arXiv:1803.02999): theta - theta_K serves as the gradient.

    All batches are support batches: no samples are drawn with theta_K.
    """

    def gradient(
        self, meta: Params, iterates: Sequence[Params] = ()
    ) -> tuple[Tensor, dict[str, Any]]:
        def one(chunk: slice) -> Tensor:
            batches, found = self._part(chunk), self._chunk_of(iterates, chunk)
            tasks = len(batches[-1].weight)
            fast, slow, step_sizes = self.adapter.split(self._leaves(meta))
            start = {name: p.detach() for name, p in stack(fast, tasks).items()}
            if not found:
                found = self.adapter.adapt(start, slow, step_sizes, batches)
            moved = {n: self._displaced(start[n] - found[-1][n], chunk) for n in start}
            gradient = {n: moved.get(n, torch.zeros_like(p)) for n, p in meta.items()}
            return flatten(gradient).cpu()

        mean, _ = self._regularized(meta, self._average(self.pool.map(one, self._slices)))
        return mean, {}

    def _displaced(self, moved: Tensor, chunk: slice) -> Tensor:
        """Return the weighted sum of a chunk's displacements [T, ...]."""
        return self._weighted(moved.movedim(0, -1), chunk).movedim(-1, 0).sum(0)


@dataclass(frozen=True, kw_only=True)
class Reptile(MetaGradient):
    """Displacement of the adapted parameters; no query episodes are sampled."""

    needs_query: ClassVar[bool] = False

    def problem(self, sampled: Sampled) -> ReptileProblem:
        return ReptileProblem(**sampled.common())

    def check(self, steps: int) -> None:
        if steps < 1:
            raise UserError(f"reptile needs inner.steps of at least 1, got {steps}")
