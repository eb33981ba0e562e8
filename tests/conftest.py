"""Shared by the tests: one intra-op thread, as in training, small runs and random problems."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import rounding
import torch

import metarl  # noqa: F401  (before the first matrix product)
from metarl.algorithms import Algorithm
from metarl.config.options import Config
from metarl.distributed.chunk_pool import ChunkPool
from metarl.domains.reinforcement import PolicyOptions
from metarl.envs import GymnasiumFamily, Uniform
from metarl.learning.losses import Batch
from metarl.models.distributions import Categorical, Distribution, Gaussian
from metarl.models.encoders import Encoder
from metarl.models.networks import MLP, Params
from metarl.models.policies import PolicyModel
from metarl.runs.metrics import measured_time, read_metrics

STRICT = ("rollouts", "serial_batch", "meta_gradients", "policies")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rounding-noise",
        type=int,
        metavar="SEED",
        help="round results as another processor might: see tests/rounding.py",
    )


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
    seed = config.getoption("--rounding-noise")
    if seed is not None:
        rounding.install(seed)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what compares numbers to their last bits or nearly: see scripts/matrix.sh."""
    for item in items:
        if item.path.stem.removeprefix("test_") in STRICT or "bit_for_bit" in item.name:
            item.add_marker(pytest.mark.strict)


@pytest.fixture(autouse=True)
def _one_intraop_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pool() -> Iterator[ChunkPool]:
    with ChunkPool(2) as made:
        yield made


def gaussian_policy(
    *,
    observation_dim: int,
    action_dim: int,
    distribution: type[Distribution] = Gaussian,
    normalize: bool = False,
    encoder: Encoder | None = None,
    context_dim: int = 0,
    hidden: tuple[int, ...] = (64, 64),
    activation: Any = "tanh",
    output_scale: float = 1.0,
    **options: Any,
) -> PolicyModel:
    """Return a Gaussian policy on an MLP; `options` are those of the distribution."""
    actions = gym.spaces.Box(-1.0, 1.0, (action_dim,))
    over = distribution(**options).over(actions)
    network = MLP(
        inputs=(observation_dim,) if encoder is None else encoder.shape,
        outputs=over.size(actions), hidden=hidden, activation=activation, context_dim=context_dim,
        encoder=encoder, images=encoder is not None, output_scale=output_scale,
    )  # fmt: skip
    return PolicyModel(network=network, distribution=over, normalize=normalize)


def categorical_policy(
    *, observation_dim: int, categories: tuple[int, ...], encoder: Encoder | None = None,
    normalize: bool = False, **options: Any,
) -> PolicyModel:  # fmt: skip
    """Return a policy of categorical actions on an MLP; `options` are those of the network."""
    over = Categorical().over(gym.spaces.MultiDiscrete(categories))
    network = MLP(
        inputs=(observation_dim,) if encoder is None else encoder.shape,
        outputs=sum(categories), encoder=encoder, images=encoder is not None, **options,
    )  # fmt: skip
    return PolicyModel(network=network, distribution=over, normalize=normalize)


def policy_options(**options: Any) -> PolicyOptions:
    """Return the options of a policy, `hidden` for policy.hidden."""
    config = Config().with_options({f"policy.{name}": x for name, x in options.items()})
    assert isinstance(config.setup.policy, PolicyOptions)
    return config.setup.policy


def reals(*shape: int) -> gym.spaces.Box:
    """Return the space of all arrays of a shape."""
    return gym.spaces.Box(-np.inf, np.inf, shape, np.float32)


@pytest.fixture
def small_policy() -> PolicyModel:
    return gaussian_policy(observation_dim=3, action_dim=2, hidden=(5, 4))


def small(
    algorithm: str | Algorithm = "maml-trpo",
    family: str = "navigation-2d",
    family_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Config:
    """Return the config of a small run.

    Args:
        algorithm: its own options stay as they are.
        family: to train on.
        family_options: of the family; None makes navigation's episodes short.
        options: values by key, such as `**{"inner.steps": 2}`.
    """
    if family_options is None:
        family_options = {"horizon": 12}
    values = {
        "iterations": 4, "tasks": 5, "episodes": 4, "threads": 2, "policy.hidden": (8,),
        "checkpoint_every": 2,
    }  # fmt: skip
    config = Config.of(family, algorithm, family_options)
    if "policy.hidden" not in config.options():  # a recurrent network
        values["policy.units"] = values.pop("policy.hidden")[0]
    return config.with_options(values | options)


def mostly_slow(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Return parameters of a test, all marked slow except a few. A tuple is several arguments."""

    def slow(value: Any) -> Any:
        arguments = value if isinstance(value, tuple) else (value,)
        return pytest.param(*arguments, marks=pytest.mark.slow)

    return [value if value in quick else slow(value) for value in values]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave pictures empty; drawing them takes most of the time of an evaluation."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)


def timeless(folder) -> list[dict]:
    """Return the rows of a run's metrics without those that measure time."""
    rows = read_metrics(folder)
    return [{k: v for k, v in row.items() if not measured_time(k)} for row in rows]


def same_params(a, b) -> bool:
    """Return whether two meta-policies have the same parameters, to the last bit."""
    return all(torch.equal(a.params[name], b.params[name]) for name in a.params)


def double_params(policy: PolicyModel, seed: int = 0) -> Params:
    """Parameters in float64 with every entry, biases and log_std too, drawn at random."""
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(0.5 * rng.standard_normal(shape))
        for name, shape in policy.shapes().items()
    }


def random_batch(
    policy: PolicyModel, tasks: int, samples: int, seed: int, ragged: bool = True
) -> Batch:
    """A float64 batch as some other policy would have drawn it, a part of it not valid."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape))

    shape = (tasks, samples, policy.action_size)
    old = {"mean": draw(*shape), "log_std": 0.3 * draw(tasks, 1, policy.action_size).expand(shape)}
    action = policy.sample(old, draw(*shape))
    valid = torch.ones(tasks, samples, dtype=torch.float64)
    if ragged:
        valid[:, samples - samples // 4 :] = 0.0
        valid[0, samples // 2 :] = 0.0
    return Batch(
        observation=draw(tasks, samples, policy.observation_shape[0]),
        action=action,
        advantage=draw(tasks, samples) * valid,
        weight=valid / valid.sum(dim=1, keepdim=True),
        old_log_prob=policy.log_prob(old, action),
        old=old,
        episodes=1,
    )


class CountingEnv(gym.Env):
    """Observes and pays the number of steps taken; an episode ends after `length` of them."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))
    length = 3.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0.0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.count += 1.0
        done = self.count >= self.length
        return np.array([self.count], np.float32), self.count, done, False, {}


def set_length(env: gym.Env, task: np.ndarray) -> None:
    env.length = task[0]  # type: ignore[attr-defined]


def counting_family(horizon: int = 6) -> GymnasiumFamily:
    """Task g: episodes of g steps."""
    return GymnasiumFamily(
        name="counting",
        env=CountingEnv,
        tasks=Uniform({"length": (1.0, 9.0)}),
        set_task=set_length,
        horizon=horizon,
    )


class CodeEnv(gym.Env):
    """Pays 1 for each component of the action that equals the last observed digit."""

    def __init__(self, action_space: gym.Space) -> None:
        self.observation_space = gym.spaces.Dict(
            {"digit": gym.spaces.Discrete(3), "time": gym.spaces.Box(0.0, 9.0, (1,))}
        )
        self.action_space = action_space
        self.shift = 0.0

    def _observe(self):
        return {"digit": self.digit, "time": np.array([self.time], np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.digit, self.time = int(self.np_random.integers(3)), 0
        return self._observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        reward = float(np.sum(np.asarray(action) == self.digit)) + self.shift
        self.digit, self.time = int(self.np_random.integers(3)), self.time + 1
        return self._observe(), reward, False, False, {}


SPACES = {
    "discrete": gym.spaces.Discrete(3),
    "shifted": gym.spaces.Discrete(4, start=-1),
    "multi": gym.spaces.MultiDiscrete([3, 2]),
    "binary": gym.spaces.MultiBinary(4),
}


def code_family(kind: str = "discrete") -> GymnasiumFamily:
    """Task g: g is added to every reward."""
    return GymnasiumFamily(
        name="code",
        env=lambda: CodeEnv(SPACES[kind]),
        tasks=Uniform({"shift": (-1.0, 1.0)}),
        set_task=lambda env, task: setattr(env, "shift", float(task[0])),
        horizon=7,
    )
