"""What an attack author implements. The harness (``ensdef.evaluation``) owns everything that could go wrong.

An :class:`IterativeAttack` writes one update; the loop, the projection, the box, survivors, restarts, the judgement
of success and the counting of passes are the harness's. A :class:`WholeAttack` wraps a library that has its own loop.
A :class:`CompositeAttack` is a list of others, each run on what the ones before it left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from torch import Tensor

from ensdef.errors import PluginError, UsageError
from ensdef.registry import ATTACKS
from ensdef.rng import KeyedRandom
from ensdef.target import Target, Traits
from ensdef.threat import Threat

if TYPE_CHECKING:
    from ensdef.adversarial_sets import AdversarialSets
    from ensdef.attack_spec import AttackSpec
    from ensdef.defense import EnsembleDefense
    from ensdef.progress import Progress
    from ensdef.specs import TrainSpec

#: Per-image memory of an attack: tensors with leading dimension B. ``"x_adv"`` in the state that ``start`` returns is
#: where the run begins (default: the clean image); a bool ``"done"`` (B,) in what ``step`` returns ends runs early.
#: It is all that a stopped search takes up: what an attack keeps on itself between steps begins anew.
State = dict[str, Tensor]


@dataclass(frozen=True)
class NoParams:
    """An attack without parameters."""


class Attack(ABC):
    """Base of all attacks; ``self.params`` is an instance of ``Params``."""

    #: Frozen dataclass of this attack's parameters, readable from text (``pgd[steps=50]``).
    Params: ClassVar[type] = NoParams
    #: What the attacker sees of the target.
    access: ClassVar[Literal["gradient", "score", "decision", "transfer"]] = "gradient"
    #: Norms the attack can be run in; empty for attacks without a budget.
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    #: Whether two attack seeds can give different points.
    random: ClassVar[bool] = True
    #: ``"eps"``: stays in the ball; ``"min_norm"``: shortest perturbation, compared with eps; ``"none"``: no ball.
    budget: ClassVar[Literal["eps", "min_norm", "none"]] = "eps"
    #: Whether ``eps`` and the images alone decide the result (no labels of other images, no batch statistics).
    per_image: ClassVar[bool] = True
    #: Whether the search is of use in bf16; one that lives on small differences of scores stays in fp32.
    low_precision: ClassVar[bool] = True

    def __init__(self, params: Any = None) -> None:
        self.params = self.Params() if params is None else params
        #: What a reader of the result should know (a library doubts its own verdict, steps were left out).
        self.warnings: list[str] = []

    @classmethod
    def norms_for(cls, params: Any) -> tuple[str, ...]:
        """Those of ``norms`` that an instance of ``Params`` can be run in."""
        return cls.norms

    @classmethod
    def prerequisites(cls, params: Any, training: TrainSpec) -> Mapping[str, TrainSpec]:
        """Trainings this attack needs, by role (transfer attacks: their surrogates); see :meth:`TrainSpec.derive`.

        Args:
            params: an instance of ``Params``.
            training: of the attacked defence.
        """
        return {}

    @classmethod
    def uses(cls, params: Any) -> Sequence[str]:
        """Names of other attacks that this one looks up: their code becomes part of its keys."""
        return ()

    @classmethod
    def made_of(cls, params: Any) -> Sequence[str]:
        """Calls of other attacks that this one runs in its own norm and radius, from its parameter ``attacks``."""
        return ()

    def warm_start(self, prerequisites: Mapping[str, EnsembleDefense]) -> None:  # noqa: B027 - a hook
        """Take the trained prerequisites, on the device of the attack, before it begins."""

    def prepare(  # noqa: B027 - a hook
        self, x: Tensor, y: Tensor, ids: Tensor, spec: AttackSpec, sets: AdversarialSets, progress: Progress
    ) -> None:
        """Do what needs no target, once for all of them: craft images on surrogates.

        Args:
            x, y, ids: all images that will be attacked, (N, ...), labels and ids, (N,).
            spec: this attack as it will be run.
            sets: keeps what is crafted.
        """

    def fits(self, traits: Traits) -> None:
        """Refuse a model before it is trained.

        Raises:
            UsageError: the attack needs something the model does not have.
        """
        if self.access == "gradient":
            require_gradient("predict", traits)


def require_gradient(view: str, traits: Traits) -> None:
    """Refuse a view that is not there or has no gradient, naming the attacks that need none.

    Raises:
        UsageError: see above.
    """
    if view not in traits.views:
        raise UsageError(f"the target has no view {view!r}; it has: {', '.join(traits.views)}")
    if view not in traits.differentiable:
        others = [name for name in traits.differentiable if name != view]
        known = [(name, ATTACKS.get(name)) for name in ATTACKS.names()]
        blind = [name for name, one in known if one.access in ("score", "decision") and one.budget != "none"]
        raise UsageError(
            f"{view} has no gradient with respect to the image, which a gradient attack needs; "
            + (f"attack another view ({', '.join(others)}), or " if others else "")
            + f"use attacks on scores or decisions: {', '.join(blind)}"
        )


class IterativeAttack(Attack):
    """An attack that improves every image by itself, step by step."""

    @property
    def steps(self) -> int:
        """Updates per run."""
        return int(self.params.steps)

    def runs(self, num_classes: int) -> int:
        """Independent runs per image (restarts, or restarts times targets); the worst one counts."""
        return int(getattr(self.params, "restarts", 1))

    def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
        """Begin a run. ``rng.run`` (B,) tells which run of 0 ... runs-1 each image begins."""
        return {}

    @abstractmethod
    def step(
        self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
    ) -> tuple[Tensor, State]:
        """One update.

        Args:
            target: the attacked model; ``target(x_adv)`` gives (B, C) log-scores. Evaluating ``x_adv`` itself (or
                ``x_adv.detach().requires_grad_()``) costs nothing extra: the harness reads success off that pass.
            x_adv: current points, (B, ...), in ball and box, without gradient.
            y: true labels, (B,).
            state: what ``start`` or the last step returned for these images.
            threat: norm and eps.
            rng: one stream an image, keyed by (seed, image, run, step).
        Returns:
            new points, (B, ...), which the harness projects, and the new state.
        """

    def foresee(self, x_adv: Tensor, state: State, threat: Threat, rng: KeyedRandom) -> Tensor:
        """Optional: where runs will stand after the step ``rng.step`` if no step until then changes their state.

        Random searches know it: a refused proposal changes nothing, and the next one depends on its number alone. The
        harness then asks about several proposals of a run in one batch. It compares every guess with what ``step``
        returns, bit by bit, so a wrong one costs time and cannot change a result.

        Args:
            x_adv, state: of the runs now, (B, ...).
            rng: one stream an image, keyed as ``step`` gets it at ``rng.step``, (B,).
        Returns:
            points, (B, ...), which the harness projects.
        """
        raise NotImplementedError


class WholeAttack(Attack):
    """An attack with a loop of its own (wrapped libraries): images in canonical order, a fixed batch size."""

    #: Part of the cell key, because wrapped attacks draw per batch.
    batch_size: ClassVar[int] = 250
    per_image: ClassVar[bool] = False

    @abstractmethod
    def perturb(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> Tensor:
        """Adversarial candidates for one batch, (B, ...) like ``x``."""


class CompositeAttack(Attack):
    """Several attacks one after the other, each on the images that withstood those before it."""

    per_image: ClassVar[bool] = True

    @abstractmethod
    def parts(self, traits: Traits) -> Sequence[tuple[str, Attack]]:
        """The attacks in their order, under names that tell a reader what each tries; at least one.

        Every part has norms, budget and random numbers of its own; success is judged on ``predict`` alone.
        """


A = TypeVar("A", bound="type[Attack] | Callable[[str], type[Attack]]")


def register_attack(name: str) -> Callable[[A], A]:
    """Class decorator: makes ``--attack name`` find this class.

    A name that ends in ``.*`` registers a family instead: a function that is given what stands after the dot
    (``PGD`` of ``--attack library.PGD``) and returns the attack class.

    Raises:
        PluginError: the name is taken, or the class is no attack.
    """

    kinds = (IterativeAttack, WholeAttack, CompositeAttack)

    def check(plugin: Any) -> None:
        if name.endswith(".*"):
            if isinstance(plugin, type) or not callable(plugin):
                raise PluginError(
                    f"@register_attack({name!r}) expects a function from the name after the dot to an attack class, "
                    f"got {plugin!r}"
                )
            return
        if not (isinstance(plugin, type) and issubclass(plugin, kinds)):
            raise PluginError(
                f"@register_attack({name!r}) expects a subclass of ensdef.IterativeAttack, ensdef.WholeAttack or "
                f"ensdef.CompositeAttack, got {plugin!r}"
            )

    return ATTACKS.register(name, check)
