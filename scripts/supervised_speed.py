"""Measure MAML meta-gradients per second, compared with a plain torch.func loop on the same tasks.

    python scripts/supervised_speed.py

Sinusoids (40-40, 10 shots, 25 tasks) and characters (four blocks of 32 filters, 5-way 1-shot, 8
tasks), one inner step, second order. The plain loop is typical user code: vmap of grad over tasks
if the network allows it, else task by task. Both gradients are compared first.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from metarl import resolve
from metarl.learning.meta_gradients.problem import Objective, Sampled
from metarl.models.networks import Params, unflatten
from metarl.models.samples import Examples
from metarl.sampling.rollouts import RandomKey
from metarl.training.run import new_trainer

THREADS, SECONDS = 2, 10.0


class Blocks(torch.nn.Module):
    """The four blocks with torch's layers."""

    def __init__(self, filters: int, features: int, ways: int) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        for i in range(4):
            conv = torch.nn.Conv2d(filters if i else 1, filters, 3, padding=1)
            norm = torch.nn.BatchNorm2d(filters, track_running_stats=False)
            layers += [conv, norm, torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
        self.blocks = torch.nn.Sequential(*layers)
        self.last = torch.nn.Linear(features, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(x.unsqueeze(1)).flatten(1))


def sine_network() -> torch.nn.Module:
    relu = torch.nn.ReLU
    return torch.nn.Sequential(
        torch.nn.Linear(1, 40), relu(), torch.nn.Linear(40, 40), relu(), torch.nn.Linear(40, 1)
    )


def named_as_torch(meta: Params, sine: bool) -> Params:
    """Return the meta-parameters with the names and layout of the torch module."""
    found = {}
    for name, p in meta.items():
        part, kind = name.split(".")
        if part.startswith("layer"):
            place = str(2 * int(part[5:])) if sine else "last"
            found[f"{place}.{kind}"] = p.T.contiguous() if kind == "weight" else p
        else:
            shift = 4 * int(part[5:]) + (kind in ("scale", "shift"))
            kind = {"scale": "weight", "shift": "bias"}.get(kind, kind)
            found[f"blocks.{shift}.{kind}"] = p
    return found


def plain(network: torch.nn.Module, sine: bool, size: float) -> Callable[..., Tensor]:
    """Return (parameters, support, query) -> the mean query loss after a step."""

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        output = functional_call(network, params, (x,))
        if sine:
            return (output - y).square().mean()
        return torch.nn.functional.cross_entropy(output, y)

    def one(params: Params, x: Tensor, y: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        slope = grad(loss)(params, x, y)
        return loss({n: p - size * slope[n] for n, p in params.items()}, xq, yq)

    def together(params: Params, support: Examples, query: Examples) -> Tensor:
        parts = (support.inputs, support.targets, query.inputs, query.targets)
        if sine:
            return vmap(one, in_dims=(None, 0, 0, 0, 0))(params, *parts).mean()
        return torch.stack([one(params, *each) for each in zip(*parts, strict=True)]).mean()

    return together


def rate(function: Callable[[], object], tasks: int) -> float:
    """Return tasks per second."""
    function()
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < SECONDS:
        function()
        count += tasks
    return count / (time.perf_counter() - begin)


def main() -> None:
    for name, values in (
        ("sinusoid", {}),
        ("characters", {"policy.filters": 32, "tasks": 8, "family_options": {"size": 16}}),
    ):
        config = resolve(None, name, "maml-trpo", {"threads": THREADS, **values})
        sine, size = name == "sinusoid", config.setup.algorithm.inner.step_sizes[0]
        with new_trainer(config) as trainer:
            opened = trainer.source.open(RandomKey(0), {})
            meta, adapter = trainer.state.params, trainer.inner_loop.adapter
            adapted = trainer.inner_loop.draw(
                opened.sample, meta, config.run.tasks, steps=1, query=True
            )
            objective = Objective(trainer.domain.outer_loss(trainer.model))
            problem = config.setup.algorithm.meta.problem(
                Sampled(adapter, adapted, trainer.pool, objective)
            )
            support, query = adapted.batches
            assert isinstance(support, Examples)
            assert isinstance(query, Examples)
            network = sine_network() if sine else Blocks(32, 32, 5)
            params = named_as_torch(meta, sine)
            mean_loss = plain(network, sine, size)

            def reference(params=params, objective=mean_loss, s=support, q=query) -> Params:
                return grad(objective)(params, s, q)

            ours = named_as_torch(unflatten(problem.gradient(meta)[0], meta), sine)
            gap = max(float((ours[n] - p).abs().max()) for n, p in reference().items())
            metarl_rate = rate(
                lambda problem=problem, meta=meta: problem.gradient(meta), config.run.tasks
            )
            torch.set_num_threads(THREADS)
            plain_rate = rate(reference, config.run.tasks)
            torch.set_num_threads(1)
            print(
                f"{name}: metarl {metarl_rate:.0f} tasks/s, plain torch.func {plain_rate:.0f}"
                f" tasks/s, gradients within {gap:.1g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
