"""Evaluation of meta-learned predictors: loss or accuracy on query examples after 0 ... K steps.

All predictors use the same supports and queries. They are drawn for one group of tasks at a time,
and freed before the next group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarl.algorithms import Algorithm
from metarl.distributed.chunk_pool import slices
from metarl.distributed.process_group import ALONE, ProcessGroup
from metarl.domains.supervised import make_examples
from metarl.envs.errors import UserError
from metarl.envs.family import Family
from metarl.envs.supervised.family import FunctionFamily, SupervisedFamily
from metarl.evaluation.curves import ACCURACY, SQUARED_ERROR, Curve, Measure, RowRole
from metarl.evaluation.evaluator import EPISODES, Evaluator, OneTask, Options, Sizes
from metarl.evaluation.statistics import Floats
from metarl.learning.adapter import Adapter
from metarl.learning.losses import Loss, task_losses
from metarl.models.networks import Params, stack
from metarl.models.predictors import Predictor, accuracy, class_means, squared_error
from metarl.models.samples import Examples
from metarl.policies.loading import random_meta_policy
from metarl.policies.meta_policy import MetaPolicy

UPDATES = 30
"""Adam updates of training from scratch for each inner step of a meta-learned predictor."""

_GROUP = 24  # tasks
_CHUNK = 4
_SHOWN = 4  # number of tasks whose functions are kept
_POINTS = 201  # points of a function


MEASURES = {"classification": ACCURACY, "regression": SQUARED_ERROR}


class PredictorEvaluator(Evaluator):
    """Evaluator of predictors by their loss or accuracy."""

    family: SupervisedFamily

    @property
    def measure(self) -> Measure:
        return MEASURES[self.family.kind]

    @property
    def steps(self) -> int:
        """Number of inner steps."""
        return self.options.steps

    @staticmethod
    def require(family: Family, options: Options, process_group: ProcessGroup) -> None:
        if options.deterministic or options.episodes != EPISODES:
            key = "deterministic" if options.deterministic else "episodes"
            raise UserError(f"{key} has no effect on the supervised tasks of {family.name}")
        if options.experience:
            raise UserError(
                f"experience is measured in episodes, and {family.name} has supervised tasks"
            )
        if process_group.size > 1:
            raise UserError(f"{family.name}: supervised tasks are evaluated on one rank")

    @staticmethod
    def on_one_task(
        meta: MetaPolicy,
        task: NDArray,
        *,
        steps: int = 1,
        episodes: int = EPISODES,
        seed: int = 0,
        step_sizes: Sequence[float] | None = None,
    ) -> OneTask:
        family = meta.source
        assert isinstance(family, SupervisedFamily)
        PredictorEvaluator.require(family, Options(episodes=episodes), ALONE)
        rng = np.random.default_rng(seed)
        drawn = family.draw(task[None], rng, supports=1, queries=family.test_queries)
        (x, y), (query_x, truth) = ((d.inputs[d.valid], d.targets[d.valid]) for d in drawn)
        values = []
        for k in (0, steps):
            found = meta.adapt_to(x, y, steps=k, step_sizes=step_sizes).predict(query_x)
            right = family.kind == "classification"
            scores = 100.0 * (found == truth) if right else np.square(found - truth).sum(axis=-1)
            values.append(float(scores.mean()))
        measure = MEASURES[family.kind]
        return OneTask((values[0], values[1]), measure, steps, f"on {len(x)} examples")

    def groups(self) -> Iterator[tuple[slice, Examples, Examples]]:
        """Yield support and query, one group of tasks after another."""
        for i, group in enumerate(slices(len(self.all_tasks), _GROUP)):
            rng = dataclasses.replace(self.key, inner_step=i).examples()
            support, query = (
                make_examples(data)
                for data in self.family.draw(
                    self.all_tasks[group], rng, supports=1, queries=self.family.test_queries
                )
            )
            yield group, support, query

    def curve(self, members: Sequence[MetaPolicy], sizes: Sizes) -> Curve:
        algorithm = members[0].algorithm
        adapts = algorithm.takes_inner_steps
        scores, used, functions = [], [], None
        for i, member in enumerate(members):
            given = sizes(member) if callable(sizes) else sizes
            loop, meta = member.inner_loop(self.pool, given)
            parts = []
            for group, support, query in self.groups():
                told = member.context(self.all_tasks[group]).get("context")
                support, query = (
                    dataclasses.replace(part, context=told) for part in (support, query)
                )
                count, steps = len(support.weight), self.steps if adapts else 0
                adapted = loop.run(_same(support), meta, count, steps=steps, query=False)
                iterates = adapted.iterates
                if not steps:
                    iterates = [loop.start(iterates[0], adapted.slow, support)]
                found = [self._scores(loop.adapter, it, adapted.slow, query) for it in iterates]
                parts.append(np.stack(found * (1 if adapts else self.steps + 1), axis=1))
                if isinstance(self.family, FunctionFamily) and i == group.start == 0:
                    shown = iterates * (1 if adapts else self.steps + 1)
                    functions = self._functions(loop.adapter, shown, adapted.slow, told)
            if i == 0:
                used = loop.adapter.mean_step_sizes(meta, self.steps) if adapts else []
            scores.append(np.concatenate(parts))
        return Curve(
            used,
            np.stack(scores),
            algorithm.name,
            [member.run_options.seed for member in members],
            functions=functions,
            measure=self.measure,
            role=algorithm.role,
        )

    def scratch(
        self, like: MetaPolicy, learning_rate: float
    ) -> tuple[dict[str, Curve], dict[str, Curve]]:
        """Return the curve of training a random initialization on each support alone."""
        if like.algorithm.task_conditioned:  # training uses only examples
            plain = like.domain.algorithm(Algorithm(name="from-scratch"), like.setup.family)
            like = MetaPolicy(like.params, dataclasses.replace(like.setup, algorithm=plain))
        start = random_meta_policy(like, self.key.seed)
        loop, meta = start.inner_loop(self.pool)
        parts = []
        for _, support, query in self.groups():
            fast, slow, _ = loop.adapter.split(meta)
            count = len(support.weight)
            own = loop.start(stack(fast, count), slow, support)
            params = {**stack(slow, count), **own}
            parts.append(self._trained(loop.adapter, params, support, query, learning_rate))
        name = f"from scratch, {UPDATES} updates a step"
        return {name: self._reference("from-scratch", np.concatenate(parts))}, {}

    def own_rows(self) -> dict[str, Curve]:
        """Return the accuracy of the nearest class mean of the inputs, without any network."""
        if self.family.kind != "classification":
            return {}
        parts = []
        for _, support, query in self.groups():
            means = class_means(support.inputs.flatten(2), support, self.family.outputs)
            logits = -torch.cdist(query.inputs.flatten(2), means)
            if query.classes is not None:
                logits = logits.masked_fill(~query.classes.unsqueeze(1), -torch.inf)
            right = 100.0 * accuracy(None, {"logits": logits}, query)
            parts.append(right.double().numpy()[:, None].repeat(self.steps + 1, axis=1))
        curve = self._reference("nearest-prototype", np.concatenate(parts))
        return {"nearest prototype": curve}

    def _reference(self, role: RowRole, scores: Floats) -> Curve:
        return Curve([], scores[None], role, [self.key.seed], measure=self.measure, role=role)

    def _scores(self, adapter: Adapter, fast: Params, slow: Params, query: Examples) -> Floats:
        """Return the score of each task, [T]."""
        model = adapter.model
        score: Loss = accuracy if self.family.kind == "classification" else squared_error

        def one(chunk: slice) -> Tensor:
            part = query.map(lambda x: x[chunk])
            theta = {name: p[chunk] for name, p in fast.items()}
            with torch.no_grad():
                return score(model, adapter.output(theta, slow, part), part)

        found = torch.cat(self.pool.map(one, slices(len(query.weight), _CHUNK))).double().numpy()
        return 100.0 * found if self.family.kind == "classification" else found

    def _trained(
        self, adapter: Adapter, params: Params, support: Examples, query: Examples, rate: float
    ) -> Floats:
        """Return the scores along training on each support, [T, K + 1]."""
        model = adapter.model
        assert isinstance(model, Predictor)

        def one(chunk: slice) -> list[Params]:
            # Adam is elementwise: all tasks' parameters train at once, independently.
            part = support.map(lambda x: x[chunk])
            leaves = {n: p[chunk].clone().requires_grad_() for n, p in params.items()}
            optimizer = torch.optim.Adam(leaves.values(), lr=rate)
            kept = []
            for k in range(self.steps + 1):
                kept.append({name: p.detach().clone() for name, p in leaves.items()})
                for _ in range(UPDATES if k < self.steps else 0):
                    optimizer.zero_grad()
                    output = model.output(leaves, part)
                    task_losses(model.loss, model, output, part).sum().backward()
                    optimizer.step()
            return kept

        chunks = self.pool.map(one, slices(len(support.weight), _CHUNK))
        columns = []
        for parts in zip(*chunks, strict=True):
            joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            columns.append(self._scores(adapter, joined, {}, query))
        return np.stack(columns, axis=1)

    def _functions(
        self, adapter: Adapter, iterates: Sequence[Params], slow: Params, told: Tensor | None
    ) -> Floats:
        """Return the predicted functions of the first tasks, [tasks, K + 1, points]."""
        x, truth = self._grid()
        examples = Examples(
            torch.from_numpy(np.repeat(x[None, :, None], len(truth), axis=0)).float(),
            torch.zeros(0),
            torch.ones(()),
            context=None if told is None else told[:_SHOWN],
        )
        found = []
        for iterate in iterates:
            theta = {name: p[:_SHOWN] for name, p in iterate.items()}
            with torch.no_grad():
                found.append(adapter.output(theta, slow, examples)["prediction"][..., 0].numpy())
        return np.stack(found, axis=1)

    def _grid(self) -> tuple[Floats, Floats]:
        """Return x [points] and the true functions of the first tasks, [tasks, points]."""
        assert isinstance(self.family, FunctionFamily)
        x = np.linspace(*self.family.interval, _POINTS)
        goals = self.all_tasks[:_SHOWN]
        return x, self.family.function(np.tile(x, (len(goals), 1)), goals)

    def setting(self) -> dict[str, Any]:
        setting: dict[str, Any] = {
            "measure": self.measure.name,
            "digits": self.measure.digits,
            "support": self.family.support_size,
            "samples": f"{self.family.support_size} examples",
            "test_queries": self.family.test_queries,
        }
        if isinstance(self.family, FunctionFamily):
            x, truth = self._grid()
            _, support, _ = next(self.groups())
            seen = (part[:_SHOWN, :, 0].tolist() for part in (support.inputs, support.targets))
            names = ("x", "truth", "support_x", "support_y")
            values = (x.tolist(), truth.tolist(), *seen)
            setting["functions"] = dict(zip(names, values, strict=True))
        return setting


def _same(support: Examples) -> Callable[[Params, int], Examples]:
    return lambda params, k: support
