"""Building what a config describes: the network for a family's environments, and the adapter."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarl.algorithms.table import INNER_LOSSES, Algorithm
from metarl.config.options import Config, PolicyConfig
from metarl.envs import TaskFamily, guard
from metarl.envs.errors import UserError
from metarl.envs.family import Family
from metarl.envs.gymnasium.family import is_image
from metarl.envs.policy_spaces import categories, check_policy_spaces
from metarl.envs.supervised.family import SupervisedFamily
from metarl.learning.inner_update import Adapter
from metarl.learning.losses import Loss, clipped_ratio, dice
from metarl.models.encoders import ENCODERS, FourBlocks, make_encoder
from metarl.models.networks import Model
from metarl.models.policies import CategoricalMLP, GaussianMLP, MLPPolicy
from metarl.models.predictors import Classifier, Predictor, Regressor
from metarl.sampling.spaces import bounded


def context_dim(row: Algorithm, config: Config, task_dim: int) -> int:
    """Return the size of the context input that an algorithm's policy has."""
    return config.policy.context if row.fast == "context" else task_dim if row.observes_task else 0


def scaled_tasks(family: Family, tasks: NDArray) -> Tensor:
    """Return tasks [T, task_dim] with their training bounds mapped onto [-1, 1], float32."""
    low, high = family.tasks.bounds()
    scaled = (2.0 * tasks - low - high) / np.where(high > low, high - low, 1.0)
    return torch.from_numpy(scaled.astype(np.float32))


def make_adapter(row: Algorithm, config: Config, model: Model) -> Adapter:
    """Return what adapts in a config's algorithm, and how."""
    return Adapter(
        model,
        _inner_loss(row, config, model),
        config.inner.step_sizes,
        fast=row.fast,
        learned=row.learned_steps,
        updates=config.inner.updates,
        proximal=config.inner.proximal,
        backtrack=config.inner.backtrack,
        fitted=config.inner.kl > 0.0,
    )


def _inner_loss(row: Algorithm, config: Config, model: Model) -> Loss:
    """Return an algorithm's inner loss; for supervised tasks the model's in place of a policy's."""
    loss = row.with_inner_loss(config.inner.loss).inner_loss
    if not isinstance(model, Predictor):
        return partial(dice, decay=config.inner.dice_decay) if loss is dice else loss
    if loss in INNER_LOSSES.values():
        return model.loss
    function = loss.func if isinstance(loss, partial) else loss
    if function in (dice, clipped_ratio, *INNER_LOSSES.values()):
        raise UserError(
            f"{row.name} needs a policy, for its inner loss {function.__name__}; these tasks are"
            " supervised"
        )
    return loss


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
    elif chosen.network not in ("auto", "mlp"):
        raise UserError(
            f"policy.network {chosen.network} is for few-shot classification: leave it out"
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
        assert isinstance(actions, gym.spaces.Box)
        if chosen.action == "scale" and not bounded(actions).any():
            raise UserError(f"policy.action scale has no effect on unbounded actions, {actions}")
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


def row_for(row: Algorithm, family: Family) -> Algorithm:
    """Return an algorithm's row as a family's tasks take it: supervised ones by Adam.

    Raises:
        UserError: it needs a policy, and the tasks are supervised ones; or classes.
    """
    if not isinstance(family, SupervisedFamily):
        if row.head != "meta":
            raise UserError(f"{row.name} is for few-shot classification; {family.name} has none")
        return row
    if row.needs_policy:
        raise UserError(
            f"{row.name} needs a policy, for {row.needs_policy}; the tasks of {family.name} are"
            " supervised ones: take maml-trpo, say"
        )
    classes = family.kind == "classification"
    if row.head != "meta" and not classes:
        raise UserError(f"{row.name} is for few-shot classification; {family.name} is regression")
    if row.observes_task and classes:
        raise UserError(f"{row.name} is told its task; of classes there is nothing to be told")
    return row.with_adam()


def model_for(row: Algorithm, config: Config, family: Family) -> Model:
    """Return a config's network for a family's tasks."""
    if isinstance(family, SupervisedFamily):
        return predictor_for(row, config, family)
    assert isinstance(family, TaskFamily)
    return policy_for(row, config, family)


def predictor_network(config: Config, family: SupervisedFamily) -> str:
    """Return the name of the network that a config takes for a family's tasks."""
    if config.policy.network == "auto":
        return "mlp" if len(family.input_shape) == 1 else "conv4"
    return config.policy.network


def predictor_for(row: Algorithm, config: Config, family: SupervisedFamily) -> Predictor:
    """Return a config's network for a family of supervised tasks."""
    chosen, shape = config.policy, family.input_shape
    network = predictor_network(config, family)
    if network not in ("mlp", "conv4") or (network == "conv4" and len(shape) == 1):
        raise UserError(
            f"policy.network {network} does not read inputs of {list(shape)}: take mlp, or conv4"
            " for images"
        )
    common: dict[str, Any] = {
        "inputs": shape,
        "outputs": family.outputs,
        "context_dim": context_dim(row, config, family.tasks.dim),
        "encoder": FourBlocks(shape, chosen.filters) if network == "conv4" else None,
        "hidden": chosen.hidden,
        "activation": chosen.activation,
        "output_scale": chosen.output_scale,
    }
    if row.head == "prototypes" and network == "mlp" and not chosen.hidden:
        raise UserError(
            f"{row.name} makes the last layer of the support, and learns what lies below it: give"
            f" policy.hidden, such as 64, for inputs of {list(shape)}"
        )
    if family.kind == "classification":
        return Classifier(head=row.head, **common)
    return Regressor(**common)


def policy_for(row: Algorithm, config: Config, family: TaskFamily) -> MLPPolicy:
    """Return a config's network for a family's environments."""
    observation, action = spaces_of(family)
    check_policy_spaces(family.name, observation, action)
    assert observation.shape is not None
    context = context_dim(row, config, family.tasks.dim)
    return make_policy(config, observation.shape, action, context)
