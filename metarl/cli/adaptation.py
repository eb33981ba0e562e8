"""Options and steps of the commands on one task: adapt, export, record, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from metarl.cli.streams import note
from metarl.envs.errors import UserError
from metarl.envs.family import Family
from metarl.envs.registry import make_family

if TYPE_CHECKING:
    from metarl.policies.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """Options of the adaptation to a task."""

    steps: int = 1
    """Number of inner steps."""
    episodes: int = 20
    """Episodes for each inner step."""
    step_sizes: tuple[float, ...] = ()
    """Size of each inner step, the last repeated; by default the policy's step sizes."""
    seed: int = 0
    """Seed of the episodes."""

    def options(self) -> dict[str, Any]:
        """Return the arguments of `MetaPolicy.adapt` other than task and steps."""
        sizes = self.step_sizes or None
        return {"episodes": self.episodes, "seed": self.seed, "step_sizes": sizes}


def steps_of(count: int, unit: str = "inner step") -> str:
    return f"{count} {unit}{'s' if count != 1 else ''}"


def one_of(what: Sequence[str]) -> str:
    if len(what) != 1:
        raise UserError(
            f"name one run folder, policy file or shipped policy, got {' '.join(what) or 'none'}"
        )
    return what[0]


def parse_task(family: Family, texts: Sequence[str]) -> NDArray[np.float64]:
    """Return the task vector of ("velocity=1.7",). Report components outside the training range.

    Raises:
        UserError: a text is not component=value, or a component is unknown, missing or repeated.
    """
    task = _vector(family, texts)
    for name, value, low, high in zip(
        family.tasks.names, task, *family.tasks.bounds(), strict=True
    ):
        if not low <= value <= high:
            outside = f"{name}={value:g} is outside the training tasks"
            note(f"note: {outside}, which are from {low:g} to {high:g}")
    return task


def parse_tasks(family: Family, texts: Sequence[str]) -> NDArray[np.float64]:
    """Return the tasks [n, task_dim] of ("velocity=1.7", "velocity=2.5").

    Raises:
        UserError: see `parse_task`.
    """
    size = family.tasks.dim
    each = [texts[i : i + size] for i in range(0, len(texts), size)]
    return np.stack([_vector(family, one) for one in each])


def _vector(family: Family, texts: Sequence[str]) -> NDArray[np.float64]:
    components: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name in components:
            raise UserError(f"task component {name!r} is given twice")
        try:
            components[name] = float(value)
        except ValueError as error:
            raise UserError(f"a task must be component=value, got {text!r}") from error
    return family.tasks.vector(components)


def families_of(policy: Policy) -> tuple[Family, Family]:
    """Return the family that an adapted policy was trained on, and the one that it plays."""
    from metarl.sampling.trials import Trials

    config = policy.record["config"]
    family = make_family(config["family"], **config["family_options"])
    episodes = config["options"].get("trial.episodes")
    return family, family if episodes is None else Trials(episodes=episodes).family(family)


def film(
    what: str,
    texts: Sequence[str],
    *,
    steps: int = 1,
    episodes: int = 20,
    step_sizes: Sequence[float] | None = None,
    seed: int = 0,
    deterministic: bool = False,
    speed: float = 1.0,
) -> Any:
    """Return a video of a meta-policy before and after adaptation, or of an adapted policy."""
    from metarl.plots import video as videos
    from metarl.policies.loading import is_adapted, load, load_policy

    videos.prepare()
    if is_adapted(what):
        policy = load_policy(what)
        family, played = families_of(policy)
        task = policy.provenance["task"] if not texts else parse_task(family, texts)
        if task is None:
            raise UserError(f"{what} does not contain its task: give it with --task")
        policies = {steps_of(policy.provenance["steps"]): policy}
    else:
        meta = load(what)
        family, played = meta.family, meta.played
        # Not the first task of the grid: in the middle of the plane, nothing is visible.
        task = parse_task(family, texts) if texts else family.tasks.grid(4)[-1]
        options: dict[str, Any] = {"episodes": episodes, "seed": seed, "step_sizes": step_sizes}

        def after(steps: int) -> Any:
            return meta.adapt(task, steps=steps, **options)

        if meta.algorithm.task_conditioned:
            policies = {"observes its task": after(0)}
        elif not meta.algorithm.takes_inner_steps:
            policies = {"a trial of several episodes": after(0)}
        else:
            policies = {"pre-adaptation": after(0), steps_of(steps): after(steps)}
    return videos.record(
        policies, played, np.asarray(task), seed=seed, deterministic=deterministic, speed=speed
    )
