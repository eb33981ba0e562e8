"""Meta-policy: a trained initialization that can adapt to a task and be saved."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from metarl.algorithms import Algorithm
from metarl.config.options import RunOptions
from metarl.config.setup import Setup
from metarl.distributed.chunk_pool import ChunkPool
from metarl.domains.domain import Domain, context_dim, scaled_tasks
from metarl.domains.reinforcement import policy_of_parameters
from metarl.envs import TaskFamily, guard
from metarl.envs.checks.start import log_finding, start_findings
from metarl.envs.errors import UserError, check_whole, kind_of
from metarl.envs.family import Family
from metarl.envs.registry import find_family
from metarl.envs.single import task_vector
from metarl.learning.adapter import FACTOR
from metarl.learning.advantages import to_batch
from metarl.learning.inner_loop import InnerLoop
from metarl.learning.inner_update import checked_sizes
from metarl.learning.losses import Batch
from metarl.models.networks import Model, Params, copied
from metarl.models.policies import PolicyModel
from metarl.models.settings import own_settings
from metarl.policies.adapted_predictor import AdaptedPredictor, as_examples
from metarl.policies.online import OnlineAdapter
from metarl.policies.policy import Policy
from metarl.runs import checkpoints
from metarl.runs.files import as_path
from metarl.runs.fingerprint import Fingerprint, Spaces, fingerprint, notices
from metarl.sampling.episodes import collect_episodes
from metarl.sampling.rollouts import RandomKey
from metarl.sampling.trajectories import Rollout
from metarl.sampling.trials import check_plays_trials

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetaPolicy:
    """Meta-parameters with the method of adaptation and their provenance."""

    params: Params = field(repr=False)
    """Meta-parameters by name, float32, not stacked. Network parameters, such as `layer0.weight`
    [inputs, outputs]; also learned step sizes or the fitted factor of step sizes, if any."""
    setup: Setup
    """Task family, algorithm and model."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Iterations, env steps and versions of the training."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """`config` of the training and fingerprint of the `family`, as files contain them."""
    baseline: Params = field(default_factory=dict)
    """State of the baseline, if it has one."""

    def __post_init__(self) -> None:
        # Copies: the parameters of a running training or of another policy must not change it.
        for name in ("params", "baseline"):
            object.__setattr__(self, name, copied(getattr(self, name)))
        record = self.record or {"config": self.setup.to_json(), "family": {}}
        object.__setattr__(self, "record", copy.deepcopy(dict(record)))
        object.__setattr__(self, "provenance", copy.deepcopy(dict(self.provenance)))

    def __repr__(self) -> str:
        return f"<MetaPolicy {self.algorithm.name} on {self.setup.family}>"

    @classmethod
    def of(cls, params: Mapping[str, ArrayLike | Tensor], setup: Setup) -> MetaPolicy:
        """Return the meta-policy of parameters from elsewhere, such as another library.

        Args:
            params: every parameter of the network by name, see `params`; converted to float32.
            setup: network, family and algorithm that they are for.

        Raises:
            UserError: a parameter is missing, unknown, of another shape or not finite.
        """
        if not isinstance(params, Mapping):
            raise UserError(f"params are parameters by name, got {kind_of(params)}")
        try:
            tensors = {name: torch.as_tensor(p, dtype=torch.float32) for name, p in params.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"params must be arrays or tensors of numbers: {error}") from error
        model = setup.domain.model(setup.algorithm, setup.policy, cls({}, setup).source)
        shapes = setup.domain.adapter(setup.algorithm, model).shapes()
        return cls(checkpoints.in_shapes("params", tensors, shapes), setup)

    @property
    def algorithm(self) -> Algorithm:
        """Algorithm of the training."""
        return self.setup.algorithm

    @property
    def domain(self) -> Domain:
        """Reinforcement or supervised learning."""
        return self.setup.domain

    @property
    def trained_on(self) -> Fingerprint:
        """Fingerprint of the family in training; empty if unknown."""
        return self.record["family"]

    @property
    def origin(self) -> Mapping[str, Any]:
        """Policy that the training started from, its iteration and checksum; empty: random."""
        return self.record["config"].get("origin", {})

    @cached_property
    def run_options(self) -> RunOptions:
        """Options of the training run; without a run, the defaults."""
        usual = RunOptions(policies=self.setup.policy.policies)
        options = self.record["config"]["options"]
        return usual.with_options({k: options[k] for k in usual.options() if k in options})

    @cached_property
    def source(self) -> Family:
        """Training family, of environments or of supervised tasks.

        Raises:
            UserError: the family cannot be created, or the policy cannot be used with its
                changes. Changes of its horizon or task range are logged in one line.
        """
        family = find_family(self.setup.family, **self.setup.family_options)
        self.check_family(family)
        return family

    def check_family(self, family: Family) -> None:
        """Compare a family with the training family, as `source` does."""
        if found := self.family_changes(family):
            _log.warning(
                "%s was trained with other settings (then -> now): %s",
                self.setup.family, "; ".join(found),
            )  # fmt: skip

    def check_spaces(self, observation: gym.Space, action: gym.Space) -> None:
        """Raise UserError if spaces differ from the training spaces, if those are known."""
        self.family_changes(self.source, (observation, action))

    def family_changes(self, family: Family, spaces: Spaces | None = None) -> list[str]:
        """Return the known differences between a family and the training family, in words.

        Args:
            spaces: observation and action space of its environments; None: not compared.

        Raises:
            UserError: the policy cannot be used with the family.
        """
        return notices(self.setup.family, self.trained_on, fingerprint(family, spaces))

    @property
    def family(self) -> TaskFamily:
        """Training family, if it has environments.

        Raises:
            UserError: the policy was trained on supervised tasks.
        """
        return self.domain.environments(self.source)

    @cached_property
    def played(self) -> TaskFamily:
        """Family that the policy plays: the training family, or trials of its episodes (RL^2)."""
        return self.algorithm.played(self.family)

    @cached_property
    def _checked_at_start(self) -> None:
        """Log the findings of a quick check of the family's environments."""
        for finding in start_findings(self.family):
            log_finding(self.family, finding)

    @cached_property
    def model(self) -> Model:
        """Model that adapts: the policy, or the predictor of supervised tasks."""
        dim = self.source.tasks.dim if self.algorithm.task_conditioned else 0
        context = context_dim(self.algorithm, dim)
        found = policy_of_parameters(self.params, self.setup.policy, context)
        return found or self.domain.model(self.algorithm, self.setup.policy, self.source)

    @property
    def policy(self) -> PolicyModel:
        """Policy network.

        Raises:
            UserError: the policy was trained on supervised tasks.
        """
        return self.domain.policy(self.model)

    def inner_loop(
        self, pool: ChunkPool, step_sizes: Sequence[float] | None = None
    ) -> tuple[InnerLoop, Params]:
        """Return the inner loop and the meta-parameters that it starts from.

        The step sizes are the given ones; else the algorithm's for evaluation; else the learned
        ones; else the training step sizes.
        """
        given = checked_sizes("step_sizes", step_sizes) or self.algorithm.inner.sizes_in_evaluation
        adapter = self.domain.adapter(self.algorithm, self.model)
        params = copied(self.params)
        if given:
            adapter = dataclasses.replace(adapter, step_sizes=given, learned="no", fitted=False)
            params = {name: params[name] for name in adapter.shapes()}
        return InnerLoop(adapter, pool), params

    def batch(self, rollout: Rollout, pool: ChunkPool) -> Batch:
        """Return a rollout's samples with the advantages for adaptation.

        Raises:
            NonFiniteError: a sampled value is not a finite number.
        """
        advantage, baseline = self.algorithm.estimator
        return to_batch(self.policy, rollout, advantage, baseline, self.baseline, pool)

    @property
    def digest(self) -> str:
        """Fingerprint of the parameters: SHA-256, hexadecimal."""
        whole = hashlib.sha256()
        for name, value in sorted(self.params.items()):
            whole.update(name.encode())
            whole.update(value.detach().cpu().numpy().tobytes())
        return whole.hexdigest()

    @property
    def training_step_sizes(self) -> tuple[float, ...]:
        """Step sizes in training, including sizes fitted to a KL; not the learned ones."""
        factor = float(self.params[FACTOR]) if FACTOR in self.params else 1.0
        return tuple(factor * size for size in self.algorithm.inner.sizes_in_training)

    def context(self, tasks: NDArray[Any]) -> Params:
        """Return the policy's observation of tasks [T, task_dim], as an entry of its parameters."""
        conditioned = self.algorithm.task_conditioned
        return {"context": scaled_tasks(self.source, tasks)} if conditioned else {}

    @own_settings()
    def adapt(
        self,
        env: gym.Env[Any, Any] | Sequence[float] | NDArray[Any],
        *,
        steps: int = 1,
        episodes: int = 20,
        seed: int = 0,
        step_sizes: Sequence[float] | None = None,
    ) -> Policy:
        """Adapt to one task and return an ordinary policy for it.

        Args:
            env: a Gymnasium environment with the spaces of the training family, or a task vector
                [task_dim] of that family. An oracle needs the task vector and takes no inner step.
            steps: inner steps; 0 returns the initialization unchanged. RL^2 takes none: its policy
                learns about the task in its state. It plays trials: `played.make(task)`, or
                `played.wrap(env)` for your own environment.
            episodes: episodes sampled for each step.
            seed: seed of the environment's resets and of the actions.
            step_sizes: one for each step, the last repeated. Default: the evaluation step sizes;
                else the learned ones; else the training step sizes.

        Raises:
            UserError: a number is out of range, the environment or the task does not fit the
                family, or the family has supervised tasks.
            NonFiniteError: a sample or an adapted parameter is not finite, or every episode of a
                step diverged (a subclass of UserError).
        """
        steps = check_whole("steps", steps, 0)
        episodes = check_whole("episodes", episodes, 1)
        seed = check_whole("seed", seed, 0)
        if isinstance(env, gym.vector.VectorEnv):
            raise UserError("adapt takes one environment, got a vector environment")
        given = None if isinstance(env, gym.Env) else task_vector(self.family.tasks, env)
        if given is not None:
            _ = self._checked_at_start  # logged at the first call
        elif self.algorithm.task_conditioned:
            raise UserError("an oracle needs the task vector: pass it instead of an environment")
        elif self.algorithm.trial is not None:
            check_plays_trials(env, self.policy.observation_shape)
        context = {} if given is None else self.context(given[None])
        steps = steps if self.algorithm.takes_inner_steps else 0
        mode = self.setup.action_mode

        def sample(params: Params, k: int) -> Batch:
            rollout = collect_episodes(
                target,
                self.policy,
                {name: p[0] for name, p in {**params, **context}.items()},
                episodes=episodes,
                horizon=self.family.horizon,
                key=RandomKey(seed, split="test", inner_step=k),
                mode=mode,
            )
            return self.batch(rollout, pool)

        with contextlib.ExitStack() as stack:
            if isinstance(env, gym.Env):
                target = env
            else:
                target = stack.enter_context(guard.opened(lambda: self.family.make(given)))
                self.check_spaces(target.observation_space, target.action_space)
            with ChunkPool(1) as pool:
                loop, meta = self.inner_loop(pool, step_sizes)
                adapted = loop.run(sample, meta, 1, steps=steps, query=False)
            space = target.action_space
        params = loop.adapter.params(adapted.iterates[-1], adapted.slow, 1) | context
        params = {name: p[0].clone() for name, p in params.items()}
        task = None if given is None else given.tolist()
        provenance = {"task": task, "steps": steps, "episodes": episodes, "seed": seed}
        horizon = self.played.horizon
        return Policy(self.policy, params, space, horizon, mode, provenance, self.record)

    @own_settings()
    def adapt_to(
        self,
        inputs: ArrayLike,
        targets: ArrayLike,
        *,
        steps: int = 1,
        step_sizes: Sequence[float] | None = None,
    ) -> AdaptedPredictor:
        """Adapt to one supervised task with its examples.

        Args:
            inputs: [n, *input_shape]; bytes are scaled to [0, 1].
            targets: for regression [n, size] or [n]; for classification class numbers from 0, [n].
            steps: inner steps, each on all examples.
            step_sizes: one for each step, the last repeated. Default: the evaluation step sizes.

        Raises:
            UserError: the examples do not fit the model, steps is negative, the policy was trained
                on environments, or it is an oracle.
            NonFiniteError: an adapted parameter is not finite (a subclass of UserError).
        """
        model = self.domain.predictor(self.model)
        if self.algorithm.task_conditioned:
            raise UserError("an oracle observes its task and does not adapt")
        steps = check_whole("steps", steps, 0)
        support = as_examples(model, inputs, targets)
        with ChunkPool(1) as pool:
            loop, meta = self.inner_loop(pool, step_sizes)
            adapted = loop.run(lambda params, k: support, meta, 1, steps=steps, query=False)
            theta = adapted.iterates[-1]
            if not steps:
                theta = loop.start(theta, adapted.slow, support)
        params = {**adapted.slow, **{name: p[0].clone() for name, p in theta.items()}}
        provenance = {"steps": steps, "examples": support.weight.numel()}
        return AdaptedPredictor(model, params, support.classes, provenance)

    @own_settings()
    def adapter(
        self,
        action_space: gym.Space | None = None,
        *,
        seed: int = 0,
        step_sizes: Sequence[float] | None = None,
    ) -> OnlineAdapter:
        """Return an `OnlineAdapter`, which adapts to one task from a stream of transitions.

        Args:
            action_space: action space of your environment; by default the family's.
            seed: seed of the actions.
            step_sizes: one for each step, the last repeated. Default: the evaluation step sizes.

        Raises:
            UserError: the policy takes no inner steps or was trained on supervised tasks.
        """
        if not self.algorithm.takes_inner_steps:
            raise UserError(
                f"{self.algorithm.name} takes no inner steps, so there is nothing to adapt: use"
                " MetaPolicy.adapt, and act with the policy"
            )
        seed = check_whole("seed", seed, 0)
        if action_space is not None and not isinstance(action_space, gym.Space):
            raise UserError(f"action_space must be a space, got {kind_of(action_space)}")
        if action_space is None:
            with guard.opened(self.family.make) as env:
                self.check_spaces(env.observation_space, env.action_space)
                action_space = env.action_space
        loop, params = self.inner_loop(ChunkPool(1), step_sizes)
        limits = self.family.horizon, self.setup.action_mode
        return OnlineAdapter(loop, params, self.batch, action_space, *limits, self.record, seed)

    def save(self, path: str | Path) -> None:
        """Write a policy file that `load` reads.

        Raises:
            OSError: the file cannot be written.
        """
        metadata = {"kind": "policy", **self.record, **self.provenance}
        state = {f"baseline.{name}": p for name, p in self.baseline.items()}
        checkpoints.save(as_path("the file", path), self.params | state, metadata)
