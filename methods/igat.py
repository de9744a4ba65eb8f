"""Understanding and Improving Ensemble Adversarial Defense (Deng, Mu; NeurIPS 2023, arXiv:2310.18477): interactive
global adversarial training, iGAT, which fine-tunes another ensemble defence.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from ensdef.methods._allocation import draw_probabilities, misclassification_penalty
from torch import Tensor, nn

from ensdef import combine
from ensdef.adversary import AlreadyCrafted
from ensdef.defense import Batch, EnsembleDefense, MakeNetwork, Terms, register_defense, require
from ensdef.losses import member_cross_entropy
from ensdef.notation import fill, parse_call
from ensdef.recipe import InnerAttack, Recipe
from ensdef.registry import METHODS
from ensdef.specs import TrainSpec


@dataclass(frozen=True)
class IgatHyper:
    """Hyper-parameters of ``igat``.

    Args:
        base: the defence that is fine-tuned, a call: the released scripts have ``adp[adversarial=ce]`` and
            ``dverge[adversarial=true,distill_eps=0.05]``.
        distribute_weight, penalty_weight: alpha and beta. None: 5 and 10, or 0.25 and 0.5 for a base that selects
            among its members, as the paper has it for SoE. Both 0: training goes on with the base's loss alone.
        rule: which member an adversarial example goes to. ``soft``: drawn by rank, Eq. (14); ``hard``: the best,
            Eq. (13); ``opposite`` (the worst) and ``random`` are the paper's ablations.
        mask: examples that are distributed: ``all`` (paper), or those the ensemble gets ``misclassified`` (code).
        penalty: on which probability. ``sum``: over members, each its worst wrong class (the code's default);
            ``worst``: the worst of all members (half the code's other type); ``literal``: Eq. (15) as printed, where
            the true class counts too, so that a right and confident member is punished.
        combiner: of the attacked ensemble and of ``predict``; the paper reports both.
        halves: the base's loss on one half of the batch, adversarial examples from the other (released script for
            DVERGE, first of two for ADP). None: for a base that draws several batches or takes several steps.
    """

    base: str = "adp"
    distribute_weight: float | None = None
    penalty_weight: float | None = None
    rule: Literal["soft", "hard", "opposite", "random"] = "soft"
    mask: Literal["all", "misclassified"] = "all"
    penalty: Literal["sum", "worst", "literal"] = "sum"
    combiner: Literal["avg", "max"] = "avg"
    halves: bool | None = None

    def __post_init__(self) -> None:
        for name in ("distribute_weight", "penalty_weight"):
            weight = getattr(self, name)
            require(weight is None or weight >= 0, f"{name} is {weight}; expected at least 0")
        base, own = base_of(self)
        require(base.member_count(own) != 1, f"base is {self.base}, a single network; name an ensemble, such as adp")


def base_of(hyper: IgatHyper) -> tuple[type[EnsembleDefense], Any]:
    """Class and hyper-parameters of the defence inside."""
    name, params = parse_call(hyper.base)
    base: type[EnsembleDefense] = METHODS.get(name)
    itself = issubclass(base, InteractiveGlobalAdversarialTraining)
    require(not itself, f"base is {hyper.base}; igat does not wrap itself, name the defence inside, such as base=adp")
    return base, fill(base.Hyper, params, name)


def weights_of(hyper: IgatHyper, base: EnsembleDefense | type[EnsembleDefense]) -> tuple[float, float]:
    """alpha and beta."""
    usual = (0.25, 0.5) if base.combiner == "select" else (5.0, 10.0)
    alpha, beta = hyper.distribute_weight, hyper.penalty_weight
    return usual[0] if alpha is None else alpha, usual[1] if beta is None else beta


@register_defense("igat")
class InteractiveGlobalAdversarialTraining(EnsembleDefense):
    """Wraps any ensemble: examples that attack it as a whole go to the members that handle them best."""

    Hyper = IgatHyper
    recipe = Recipe(lr=0.01, epochs=85, batch_size=512, milestones=(0.5,), gamma=0.2, attack=InnerAttack(20, "eps/4"))
    deviations = (
        "Every adversarial example is distributed, as in the paper; the released code leaves out those the ensemble "
        "gets right (mask=misclassified).",
        "The penalty is on clean and adversarial images, as in Eq. (16); as in the released code it sums over members "
        "and leaves the true class out, but probabilities above its cap of 0.99 keep their gradient.",
        "85 epochs are the paper's 163 if those have the 51 batches of the released code; the one milestone, half-way, "
        "is ours.",
    )

    def __init__(self, base: EnsembleDefense, hyper: IgatHyper | None = None) -> None:
        super().__init__([], hyper)
        self.base = base
        self.weights = weights_of(self.hyper, base)
        self.several = base.streams > 1 or inspect.isgeneratorfunction(base.loss)
        self.halves = any(self.weights) and (self.several if self.hyper.halves is None else self.hyper.halves)
        self.combiner = "max" if self.hyper.combiner == "max" else "mean"  # type: ignore[misc]
        self.streams, self.batch_coupled = base.streams, base.batch_coupled  # type: ignore[misc]

    def loss(self, batch: Batch, progress: float) -> Terms | Iterator[Terms]:
        """L_E + alpha CE of the drawn members + beta L_R, Eq. (16). Terms: base_..., distributed, penalty.

        A base that draws several batches or takes several steps goes first; the added terms follow in a step of their
        own (released script for DVERGE).
        """
        own, attacked = batch.halves() if self.halves else (batch, batch)
        crafted = None
        if any(self.weights):
            crafted = replace(attacked, x=self.adversary(self, attacked.x, attacked.y))
            if self.hyper.combiner == "avg" and type(self.base).predict is EnsembleDefense.predict:
                self.base.lend(AlreadyCrafted(self._lent(), self.base, attacked, crafted.x))
        terms = self.base.loss(own, progress)
        self.base.lend(self._adversary)  # a generator has not begun: what it attacks has the weights of its own steps
        if isinstance(terms, dict) and not self.several:
            return {**of_base(terms), **self._added(own, crafted)}
        return self._steps(iter([terms]) if isinstance(terms, dict) else terms, own, crafted)

    def _steps(self, steps: Iterator[Terms], own: Batch, crafted: Batch | None) -> Iterator[Terms]:
        yield from map(of_base, steps)
        if added := self._added(own, crafted):
            yield added

    def _added(self, clean: Batch, crafted: Batch | None) -> Terms:
        """The terms beside the base's, batch means as released: not divided by the images that a member gets."""
        terms: Terms = {}
        if crafted is None:
            return terms
        alpha, beta = self.weights
        logits = self.member_logits(crafted.x)
        if alpha:
            losses = member_cross_entropy(logits, crafted.y)
            chances = draw_probabilities(-losses.detach(), self.hyper.rule)
            drawn = torch.multinomial(chances.T, 1, generator=crafted.rng)
            given = losses.gather(0, drawn.T).squeeze(0)
            if self.hyper.mask == "misclassified":
                given = given * self._wrong(logits, crafted.y)
            terms["distributed"] = alpha * given.mean()
        if beta:
            on_clean = self._penalty(self.member_logits(clean.x), clean.y)
            terms["penalty"] = beta * (on_clean + self._penalty(logits, crafted.y))
        return terms

    def _penalty(self, logits: Tensor, y: Tensor) -> Tensor:
        penalty: Tensor = misclassification_penalty(logits, y, self._wrong(logits, y), self.hyper.penalty)
        return penalty.mean()

    def _wrong(self, logits: Tensor, y: Tensor) -> Tensor:
        """Whether the ensemble misclassifies, (B,) bool."""
        return combine.COMBINERS[self.hyper.combiner](logits.detach()).argmax(dim=1) != y

    def predict(self, x: Tensor) -> Tensor:
        """Log of the members' mean or largest probability, (B, C), whatever the base would answer."""
        return combine.COMBINERS[self.hyper.combiner](self.member_logits(x))

    def warm_start(self, prerequisites: Mapping[str, EnsembleDefense]) -> None:
        self.base.load_state_dict(prerequisites["base"].state_dict())

    # -- what the base decides ----------------------------------------------------------------------------------

    @property
    def members(self) -> Any:
        return self.base.members

    def member_logits(self, x: Tensor) -> Tensor:
        return self.base.member_logits(x)

    def begin_epoch(self, epoch: int, rng: torch.Generator) -> None:
        self.base.begin_epoch(epoch, rng)

    def trainable(self) -> Iterable[nn.Parameter]:
        return self.base.trainable()

    @classmethod
    def build(cls, make_network: MakeNetwork, members: int, num_classes: int, hyper: Any) -> EnsembleDefense:
        require(members > 1, f"igat with {members} member: it distributes examples among members; use at least 2")
        base, own = base_of(hyper)
        return cls(base.build(make_network, members, num_classes, own), hyper)

    @classmethod
    def member_count(cls, hyper: IgatHyper) -> int | None:
        base, own = base_of(hyper)
        return base.member_count(own)

    @classmethod
    def network_params(cls, hyper: IgatHyper) -> Mapping[str, Any]:
        base, own = base_of(hyper)
        return base.network_params(own)

    @classmethod
    def trains_on_attacks(cls, hyper: IgatHyper) -> bool:
        base, own = base_of(hyper)
        return any(weights_of(hyper, base)) or base.trains_on_attacks(own)

    @classmethod
    def prerequisites(cls, spec: TrainSpec) -> Mapping[str, TrainSpec]:
        return {"base": spec.derive(*parse_call(spec.hyper.base))}


def of_base(terms: Terms) -> Terms:
    """The base's terms under names of their own."""
    return {f"base_{name}": value for name, value in terms.items()}
