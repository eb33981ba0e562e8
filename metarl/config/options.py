"""What a run is made of: frozen, validated where declared. The field texts are the flags' help."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import tyro

from metarl.distributed.process_group import local_ranks
from metarl.envs.errors import UserError, check_one_of, did_you_mean
from metarl.learning.advantages import AdvantageConfig
from metarl.learning.first_order import AdamConfig
from metarl.learning.trust_region import TrustRegionConfig
from metarl.models.networks import Activation
from metarl.runs.plain_json import plain
from metarl.sampling.spaces import ActionMode

Network = Literal["auto", "mlp", "nature", "impala", "conv4"]
InnerLoss = Literal["auto", "log-likelihood", "likelihood-ratio"]
_CHOICES = {
    "policy.network": Network,
    "policy.activation": Activation,
    "policy.action": ActionMode,
    "inner.loss": InnerLoss,
}


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy: an MLP gives a Gaussian's mean, or the logits of Discrete actions."""

    network: Network = "auto"
    """Network before the hidden layers. For image observations (uint8): nature, the Nature CNN, or
    impala, a small residual network. auto: none for vectors, nature for images of at least 36 x 36
    pixels, impala for smaller ones. In few-shot classification: conv4, the papers' four blocks, or
    mlp."""
    filters: int = 64
    """Filters in each block of conv4."""

    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers."""
    activation: Activation = "tanh"
    """Activation of the hidden layers."""
    initial_std: float = 1.0
    """Standard deviation of the actions at the start."""
    min_std: float = 1e-6
    """Smallest standard deviation of the actions."""
    context: int = 8
    """Size of the context vector, where the algorithm adapts one (CAVIA)."""
    action: ActionMode = "clip"
    """How actions are fitted to the environment's bounds: clip cuts them off there; scale maps
    [-1, 1] onto the bounds first."""
    normalize: bool = False
    """Scale observations by their running mean and standard deviation."""
    output_scale: float = 1.0
    """Factor of the last layer's initial weights. With a small one, mean actions start near zero,
    within the bounds, for every seed."""

    def __post_init__(self) -> None:
        for name in ("network", "activation", "action"):
            _one_of(f"policy.{name}", getattr(self, name))
        if any(not isinstance(size, int) or size < 1 for size in self.hidden):
            raise UserError(
                f"policy.hidden sizes must be whole numbers of at least 1, got {self.hidden}"
            )
        if self.filters < 1:
            raise UserError(f"policy.filters must be at least 1, got {self.filters}")
        if self.context < 1:
            raise UserError(f"policy.context must be at least 1, got {self.context}")
        for name in ("initial_std", "min_std", "output_scale"):
            _positive(f"policy.{name}", getattr(self, name))
        if self.min_std > self.initial_std:
            raise UserError(
                f"policy.min_std must not be above policy.initial_std, {self.initial_std}, got"
                f" {self.min_std}"
            )


@dataclass(frozen=True, kw_only=True)
class InnerConfig:
    """How one task adapts."""

    steps: int = 1
    """Gradient steps per task in training, each on fresh episodes."""
    step_sizes: tuple[float, ...] = (0.1,)
    """Size of each inner step; steps beyond those given repeat the last."""
    test_step_sizes: tuple[float, ...] = ()
    """Size of each inner step in evaluation; by default those learned, else those of training."""
    loss: InnerLoss = "auto"
    """Inner loss: log-likelihood, as in MAML's paper; likelihood-ratio, of the same gradient and
    low-variance curvature, which credits what was sampled before the step; auto: the
    algorithm's."""
    updates: int = 1
    """Gradient steps on each batch of episodes; more than one need an inner loss with likelihood
    ratios."""
    kl: float = 0.0
    """Lower bound on the mean KL of the first inner step: if --inner.step-sizes move policies less,
    training scales them all up to it, and the policy keeps the factor; 0: off."""
    proximal: float = 0.0
    """Strength of the pull towards the initialization (iMAML's lambda)."""
    backtrack: bool = False
    """Take no update of iMAML that raises a task's inner objective, and halve its later ones."""
    dice_decay: float = 1.0
    """Discount of earlier actions' scores at later time steps (lambda of loaded DiCE): 1 is
    unbiased, smaller values have less variance."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"inner.steps must not be negative, got {self.steps}")
        _one_of("inner.loss", self.loss)
        if self.updates < 1:
            raise UserError(f"inner.updates must be at least 1, got {self.updates}")
        for name in ("kl", "proximal"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise UserError(f"inner.{name} must not be negative, got {value}")
        if not 0.0 <= self.dice_decay <= 1.0:
            raise UserError(f"inner.dice_decay must be within [0, 1], got {self.dice_decay}")
        if not self.step_sizes:
            raise UserError("inner.step_sizes must not be empty")
        for name in ("step_sizes", "test_step_sizes"):
            for size in getattr(self, name):
                _positive(f"inner.{name}", size)


@dataclass(frozen=True, kw_only=True)
class MetaConfig:
    """What algorithms add to the meta-objective."""

    credit: float = 0.0
    """Weight of the term that credits pre-update sampling for the post-update return (E-MAML)."""
    inner_kl: float = 0.0
    """Weight of the penalty on the KL from the policies that drew the support samples (ProMP)."""
    curvature: float = 1.0
    """Share of the inner steps' curvature in the meta-gradient: 1 is exact, 0 of first order."""
    anneal_fraction: float = 0.0
    """Share of the run in which the losses of earlier inner steps fade out and the meta-gradient is
    of first order; afterwards it is of second order (MAML++)."""
    cosine: bool = False
    """Decay Adam's learning rate (MAML++) or the trust region's `max_kl` along a cosine to zero at
    the end of the run."""

    def __post_init__(self) -> None:
        for name in ("credit", "inner_kl"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"meta.{name} must not be negative, got {value}")
        for name in ("curvature", "anneal_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"meta.{name} must be within [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run. `metarl.resolve` makes one from a preset, a family and an algorithm.

    Raises:
        UserError: a value is out of range.
    """

    family: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[FAMILY]")] = ""
    """Task family: a name that `metarl families` lists, or module:attribute of your own."""
    family_options: Annotated[Mapping[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """Options of the family; --family-options on the command line."""
    preset: str | None = None
    """Preset that sets the defaults: metarl2026, icml2017, promp2019, pearl2019, or reptile2018 for
    sinusoids; None takes none. If this flag is not given, metarl train takes metarl2026 on
    half-cheetah-dir, half-cheetah-vel, ant-dir, ant-vel and navigation-2d."""
    algorithm: str = "maml-trpo"
    """Meta-learning algorithm (metarl algorithms lists them)."""
    iterations: int = 100
    """Meta-iterations in total, including those before a resume."""
    tasks: int = 40
    """Tasks per meta-iteration."""
    stratified: bool = False
    """Spread the tasks of an iteration evenly over their distribution instead of drawing them
    independently."""
    episodes: int = 20
    """Episodes per task, for each inner step and for the outer step."""
    seed: int = 0
    """Seed of all random numbers."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    trust_region: TrustRegionConfig = field(default_factory=TrustRegionConfig)
    adam: AdamConfig = field(default_factory=AdamConfig)
    threads: int = field(default_factory=lambda: available_threads())
    """Threads for the physics and for the update; results do not depend on their number."""
    workers: int = 0
    """Worker processes for environments without a native backend; 0 steps them in this process.
    Results do not depend on their number."""
    worker_timeout: float = 60.0
    """Seconds after which an environment that does not return from a step is considered dead."""
    device: str = "cpu"
    """Where the update runs: cpu, or cuda on a GPU."""
    checkpoint_every: int = 10
    """Iterations between checkpoints that are kept; the newest one is always kept."""

    def __post_init__(self) -> None:
        for name in ("iterations", "tasks", "episodes", "threads", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.workers < 0:
            raise UserError(f"workers must not be negative, got {self.workers}")
        _positive("worker_timeout", self.worker_timeout)
        if self.seed < 0:
            raise UserError(f"seed must not be negative, got {self.seed}")
        # As a file of the run gives them back: a tuple is a list there.
        object.__setattr__(self, "family_options", plain(self.family_options))

    def to_json(self) -> dict[str, Any]:
        """Return the config as plain JSON values."""
        return plain(dataclasses.asdict(self))

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Config:
        """Return the config that `to_json` wrote.

        Raises:
            UserError: a key is unknown, or a value is not allowed.
        """
        parts = {
            "policy": PolicyConfig,
            "inner": InnerConfig,
            "advantage": AdvantageConfig,
            "meta": MetaConfig,
            "trust_region": TrustRegionConfig,
            "adam": AdamConfig,
        }
        values = _renamed(data)
        for name, kind in parts.items():
            values[name] = _build(kind, values.get(name, {}), f"{name}.")
        return _build(Config, values, "")


def config_keys(config: Config) -> list[str]:
    """Return every key of a config, those of its sections as "inner.steps"."""
    keys = []
    for f in dataclasses.fields(config):
        part = getattr(config, f.name)
        inside = dataclasses.fields(part) if dataclasses.is_dataclass(part) else ()
        keys += [f"{f.name}.{g.name}" for g in inside] or [f.name]
    return keys


def check_type(key: str, value: Any, like: Any) -> None:
    """Raise UserError unless a value is of the kind that `like`, the key's usual value, is of."""
    kinds: dict[type, tuple[str, tuple[type, ...]]] = {
        bool: ("True or False", (bool,)),
        int: ("a whole number", (int,)),
        float: ("a number", (int, float)),
        str: ("a text", (str,)),
        tuple: ("numbers", (tuple, list)),
    }
    said, allowed = kinds.get(type(like), ("", (object,)))
    inside = value if isinstance(like, tuple) and isinstance(value, (tuple, list)) else ()
    good = isinstance(value, allowed) and isinstance(value, bool) <= isinstance(like, bool)
    if not good or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in inside):
        raise UserError(f"{key} must be {said}, got {value!r}")


def _renamed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored config's values by the keys of today."""
    values = {k: dict(v) if isinstance(v, Mapping) else v for k, v in data.items()}
    adam, meta = values.get("adam", {}), values.get("meta", {})
    if "epochs" in adam:
        adam["steps"] = adam.pop("epochs")
    if "anneal" in meta:  # iterations, as those of `decay`
        total = values.get("iterations", Config.iterations)
        meta["anneal_fraction"] = min(meta.pop("anneal") / total, 1.0)
    if "decay" in meta:
        meta["cosine"] = meta.pop("decay") > 0
    # It did next to nothing: what it was to add had been fitted to be 0 at the horizon.
    values.get("advantage", {}).pop("bootstrap", None)
    return values


def _build(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    usual = kind()
    for name, value in values.items():
        if name not in known:
            raise UserError(f"no config key {prefix + name!r}{did_you_mean(name, known)}")
        check_type(prefix + name, value, getattr(usual, name))
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _one_of(key: str, value: Any) -> None:
    check_one_of(key, value, get_args(_CHOICES[key]))


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0.0):
        raise UserError(f"{name} must be positive, got {value}")


def available_threads() -> int:
    """Return the processors this process may use, container limits included; of several ranks on
    the machine each has its share."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="utf-8") as file:
            quota, period = file.read().split()
        if quota != "max":
            count = min(count or 1, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max((count or 1) // local_ranks(), 1)


def default_workers() -> int:
    """Return the processors there are, 0 for one: for a command, which unlike a script can always
    start workers."""
    processors = available_threads()
    return processors if processors > 1 else 0
