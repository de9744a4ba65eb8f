"""What a defence author implements: a loss and an inference rule. Everything else has a default."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ensdef import combine
from ensdef.errors import PluginError, UsageError
from ensdef.recipe import InnerAttack, Recipe
from ensdef.registry import METHODS

if TYPE_CHECKING:
    from ensdef.specs import TrainSpec
    from ensdef.threat import Threat

#: Named scalars, already signed and weighted; the trainer adds them up, steps and logs them.
Terms = dict[str, Tensor]
Objective = nn.Module | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """One training batch, or the part of it that this process has where several devices share it.

    Args:
        x: images in [0, 1], augmented, (B, C, H, W).
        y: labels, (B,).
        ids: positions in the training set, (B,).
        streams: further independent (x, y) batches, where the defence asks for them (``streams = 2``: one).
        rng: generator on the device of ``x``, seeded by (training seed, epoch, batch); each of several processes has
            its own, so what is to be the same for the whole batch is drawn in ``begin_epoch``.
    """

    x: Tensor
    y: Tensor
    ids: Tensor
    streams: tuple[tuple[Tensor, Tensor], ...] = ()
    rng: torch.Generator = field(default_factory=torch.Generator)

    def halves(self) -> tuple[Batch, Batch]:
        """The first and the second half of the images, and of every further stream's.

        Raises:
            UsageError: a batch of one image.
        """
        cut = len(self.x) // 2
        require(cut > 0, "each batch is cut into halves; use a batch_size of at least 2")

        def part(rows: slice) -> Batch:
            streams = tuple((x[rows], y[rows]) for x, y in self.streams)
            return replace(self, x=self.x[rows], y=self.y[rows], ids=self.ids[rows], streams=streams)

        return part(slice(cut)), part(slice(cut, None))


class InnerAdversary(Protocol):
    """What the trainer lends a defence for crafting; see :meth:`EnsembleDefense.adversary`."""

    #: Norm and radius of the present batch, and the settings that calls fall back to.
    threat: Threat
    attack: InnerAttack

    def __call__(
        self,
        objective: Objective,
        x: Tensor,
        y: Tensor | None = None,
        *,
        threat: Threat | None = None,
        steps: int | None = None,
        step_size: float | None = None,
        momentum: float = 0.0,
        start: Literal["uniform", "zero"] | None = None,
        descend: bool = False,
    ) -> Tensor: ...

    def as_attacked(self, module: nn.Module) -> nn.Module: ...


class MakeNetwork(Protocol):
    """Gives a freshly initialised network; ``outputs`` logits instead of one a class (MoRE's gate)."""

    def __call__(self, outputs: int | None = None) -> nn.Module: ...


@dataclass(frozen=True)
class NoHyper:
    """A defence without hyper-parameters."""


class EnsembleDefense(nn.Module, ABC):
    """An ensemble of K member networks with a training loss and an inference rule.

    Subclasses implement :meth:`loss`, and where they differ from a plain ensemble :meth:`predict` and the class
    attributes. Calling the module is calling ``predict``.

    A training that was stopped goes on after its last kept epoch: what epochs leave to later ones must be a parameter,
    a buffer, or a number, text or None in a public attribute. Anything else begins anew.
    """

    #: Frozen dataclass of hyper-parameters, readable from text (``adp[entropy_weight=1]``).
    Hyper: ClassVar[type] = NoHyper
    #: The authors' optimiser, schedule and budget; protocols and the command line override it.
    recipe: ClassVar[Recipe] = Recipe()
    #: Independent training batches per step (DVERGE draws two).
    streams: ClassVar[int] = 1
    #: How members become one decision; picks the adaptive attacks.
    combiner: ClassVar[Literal["mean", "max", "vote", "select", "gate", "other"]] = "mean"
    #: True when the loss is not a mean over examples, so that splitting a batch over devices changes it: refused there.
    batch_coupled: ClassVar[bool] = False
    #: Number of members, where the defence fixes it; None: ``--members`` decides.
    fixed_members: ClassVar[int | None] = None
    #: Footnotes of every table with this method: where this implementation departs from the paper or its released code.
    deviations: ClassVar[tuple[str, ...]] = ()

    #: K networks, images in [0, 1] -> logits (B, C). A wrapper exposes its base's members as a property instead.
    members: Any
    hyper: Any
    #: The ``ModelSpec`` it was built from; None for a defence assembled by hand.
    spec: Any = None
    #: Key of the training whose checkpoint it was loaded from.
    training_key: str | None = None
    #: Of weights that were not trained here: the files they are from, as told by ``ensdef import-pth``.
    imported: Mapping[str, Any] | None = None

    def __init__(self, members: Sequence[nn.Module], hyper: Any = None) -> None:
        super().__init__()
        self.hyper = self.Hyper() if hyper is None else hyper
        self._adversary: InnerAdversary | None = None
        if members:
            self.members = nn.ModuleList(members)

    # -- construction -------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, make_network: MakeNetwork, members: int, num_classes: int, hyper: Any) -> EnsembleDefense:
        """Assemble the defence; ``make_network`` gives a freshly initialised member network each time.

        Raises:
            UsageError: an impossible combination, such as more members than classes allow.
        """
        return cls([cls.build_member(make_network(), hyper) for _ in range(members)], hyper)

    @classmethod
    def build_member(cls, network: nn.Module, hyper: Any) -> nn.Module:
        """Extend a member network (SoE adds a confidence head); must still map images to logits when called."""
        return network

    @classmethod
    def member_count(cls, hyper: Any) -> int | None:
        """Number of members where the hyper-parameters fix it (MoRE), else None."""
        return cls.fixed_members

    @classmethod
    def network_params(cls, hyper: Any) -> Mapping[str, Any]:
        """Architecture parameters that belong to the method (GAL: leaky ReLU), where the architecture has them and
        the user's call does not set them."""
        return {}

    @classmethod
    def trains_on_attacks(cls, hyper: Any) -> bool:
        """False when training never calls :meth:`adversary`: radius and inner attack then leave the training key."""
        return True

    @classmethod
    def prerequisites(cls, spec: TrainSpec) -> Mapping[str, TrainSpec]:
        """Trainings that must exist first, by role; see :meth:`TrainSpec.derive`. Default: none."""
        return {}

    def warm_start(self, prerequisites: Mapping[str, EnsembleDefense]) -> None:
        """Take over what the prerequisites learned, before training begins."""

    # -- training -----------------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, batch: Batch, progress: float) -> Terms | Iterator[Terms]:
        """Training objective.

        Args:
            batch: images, labels and randomness.
            progress: fraction of all training steps done, in [0, 1).
        Returns:
            named scalar terms, already signed and weighted, whose sum is minimised in one optimiser step; or a
            generator that yields several such dicts, one optimiser step each. Neither names nor number of dicts may
            depend on the images or on draws from ``batch.rng``: processes that share a batch step together.
        """

    def begin_epoch(self, epoch: int, rng: torch.Generator) -> None:
        """Called before each epoch (0, 1, ...) with a CPU generator of that epoch."""

    def trainable(self) -> Iterable[nn.Parameter]:
        """Parameters that training moves; modules without any of them stay frozen, buffers included."""
        return self.parameters()

    def lend(self, adversary: InnerAdversary | None) -> None:
        """Receive the inner adversary for the time of a training; defences inside this one receive it too."""
        for module in self.modules():
            if isinstance(module, EnsembleDefense):
                module._adversary = adversary

    def as_attacked(self, module: nn.Module) -> nn.Module:
        """A member (or the whole defence) as the inner adversary sees it, for objectives of one's own.

        With attacks in batch-norm eval mode a folded, frozen copy of the present weights, valid until the next
        optimiser step; with attacks in train mode the module itself.
        """
        return self._lent().as_attacked(module)

    @property
    def training_threat(self) -> Threat:
        """Norm and radius of the training, this batch's where the radius is drawn anew for every batch."""
        return self._lent().threat

    def _lent(self) -> InnerAdversary:
        if self._adversary is None:
            raise RuntimeError(
                f"{type(self).__name__}.adversary is lent by the trainer; outside training use "
                "ensdef.testing.lend_adversary(defense, ...)"
            )
        return self._adversary

    def adversary(
        self,
        objective: Objective,
        x: Tensor,
        y: Tensor | None = None,
        *,
        threat: Threat | None = None,
        steps: int | None = None,
        step_size: float | None = None,
        momentum: float = 0.0,
        start: Literal["uniform", "zero"] | None = None,
        descend: bool = False,
    ) -> Tensor:
        """Perturb a batch; what is not given comes from the training specification.

        Args:
            objective: a module, whose cross-entropy against ``y`` is raised (attacked through a folded copy when the
                inner attack runs with batch norm in eval mode); or a callable x -> (B,) of values to raise.
            x, y: images (B, ...) and labels (B,); a callable objective needs no labels.
            threat: norm and radius.
            steps, step_size, start: of the gradient attack; ``start`` is ``"uniform"`` or ``"zero"``.
            momentum: factor on the accumulated l1-normalised gradient; 0: none.
            descend: lower the objective instead.
        Returns:
            detached points in ball and box, (B, ...).
        Raises:
            RuntimeError: called outside training.
        """
        return self._lent()(
            objective,
            x,
            y,
            threat=threat,
            steps=steps,
            step_size=step_size,
            momentum=momentum,
            start=start,
            descend=descend,
        )

    # -- inference ----------------------------------------------------------------------------------------------

    def member_logits(self, x: Tensor) -> Tensor:
        """Logits of every member, (K, B, C)."""
        return torch.stack([member(x) for member in self.members])

    def predict(self, x: Tensor) -> Tensor:
        """Log-scores (B, C), the only function that is scored; never sees labels. Default: log mean probability."""
        return combine.mean_of_probabilities(self.member_logits(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.predict(x)

    def views(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Differentiable readings of the same weights for adaptive attacks: images -> (B, C) log-scores.

        They must reach weights through ``self`` alone: the harness calls them on a prepared copy. Default: ``predict``,
        mean probability, mean logit, and each member.
        """
        views: dict[str, Callable[[Tensor], Tensor]] = {
            "predict": self.predict,
            "mean_probability": lambda x: combine.mean_of_probabilities(self.member_logits(x)),
            "mean_logit": lambda x: combine.mean_of_logits(self.member_logits(x)),
        }
        for index in range(len(self.members)):
            views[f"member{index}"] = lambda x, index=index: combine.log_probs(  # type: ignore[misc]
                self.members[index](x)
            )
        return views

    def selection(self, x: Tensor) -> Tensor | None:
        """(B, K) unnormalised log-weights of the members with gradient, for defences that choose among them."""
        return None


D = TypeVar("D", bound=type[EnsembleDefense])


def register_defense(name: str) -> Callable[[D], D]:
    """Class decorator: makes ``--method name`` find this class.

    Raises:
        PluginError: the name is taken, or the class is no defence.
    """

    def check(plugin: Any) -> None:
        if not (isinstance(plugin, type) and issubclass(plugin, EnsembleDefense)):
            raise PluginError(
                f"@register_defense({name!r}) expects a subclass of ensdef.EnsembleDefense, got {plugin!r}"
            )

    return METHODS.register(name, check)


def require(condition: bool, message: str) -> None:
    """Refuse an impossible combination of hyper-parameters before anything is trained."""
    if not condition:
        raise UsageError(message)
