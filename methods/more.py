"""Mixture of Robust Experts (MoRE): A Robust Denoising Method towards multiple perturbations (Cheng, Xu, Wang,
Kailkhura, Lin, Goldhahn; 2021, arXiv:2104.10586).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ensdef import augment, combine
from ensdef.defense import Batch, EnsembleDefense, MakeNetwork, Terms, register_defense, require
from ensdef.losses import cross_entropy
from ensdef.notation import relative
from ensdef.recipe import Recipe, joined, parse_train_eps
from ensdef.specs import TrainSpec
from ensdef.threat import Threat

#: The paper's; its released code has fog (0.12, 0.8) and (0.13, 0.6).
WEATHER = (
    "fog[density=0.13,light=0.8]",
    "fog[density=0.15,light=0.6]",
    "snow[brightness=2.0]",
    "snow[brightness=2.5]",
)


@dataclass(frozen=True)
class MoreHyper:
    """Hyper-parameters of ``more``.

    Args:
        experts: ``lp``: a clean expert and one for every radius; ``all``: two for fog and two for snow besides.
        linf, l2: radii of experts and of attacks on the mixture, joined by ``+``: numbers, or in units of the training
            radius where that is in the same norm. Paper: 6/255 and 8/255; 0.5 and 1.
        settings: what the mixture learns from a batch, one optimiser step for each setting (clean twice, every radius,
            every weather): ``all``, which makes an epoch as long as the released code's, or one in ``turns``.
    """

    experts: Literal["lp", "all"] = "lp"
    linf: tuple[str, ...] = ("0.75*eps", "eps")
    l2: tuple[str, ...] = ("0.5", "1")
    settings: Literal["all", "turns"] = "all"

    def __post_init__(self) -> None:
        require(len(self.roles) > 1, "linf and l2 are empty, which leaves one expert and nothing to mix; give a radius")
        require(len(set(self.roles)) == len(self.roles), f"linf {self.linf} or l2 {self.l2} has a radius twice")
        for norm, radii in (("linf", self.linf), ("l2", self.l2)):
            for radius in radii:
                relative(radius, 1.0, norm)

    @property
    def roles(self) -> list[str]:
        """What each expert is for, in the order of the members: ``clean``, ``l2 0.5``, ``fog[...]``."""
        balls = [f"l2 {radius}" for radius in self.l2] + [f"linf {radius}" for radius in self.linf]
        return ["clean", *balls, *(WEATHER if self.experts == "all" else ())]


@register_defense("more")
class MixtureOfRobustExperts(EnsembleDefense):
    """Frozen experts for clean images, lp balls and weather; a gate weighs their logits for every image."""

    Hyper = MoreHyper
    recipe = Recipe(optimizer="adam", lr=1e-3, weight_decay=0.0, epochs=100, batch_size=100, schedule="onecycle")
    combiner = "gate"
    deviations = (
        "Attacks in gate training are on the mixture, as the paper says; the released code's are on an untrained "
        "network.",
        "Images stay in [0, 1], and l2 steps follow the gradient; in the released code they are normalised, and signs.",
        "Experts' batch norms stay as trained; the released code lets gate training move them.",
        "The rate for Adam rises to 1e-3, not 0.1. Experts train by the recipes of nat and adv. The last epoch is "
        "kept, on all training images; the released code picks one by validation accuracy.",
    )

    def __init__(self, members: Sequence[nn.Module], gate: nn.Module, hyper: Any = None) -> None:
        super().__init__(members, hyper)
        self.gate = gate
        self.turn = 0

    @classmethod
    def build(cls, make_network: MakeNetwork, members: int, num_classes: int, hyper: Any) -> EnsembleDefense:
        return cls([make_network() for _ in range(members)], make_network(outputs=members), hyper)

    @classmethod
    def member_count(cls, hyper: MoreHyper) -> int:
        return len(hyper.roles)

    # -- training -----------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, progress: float) -> Iterator[Terms]:
        """CE(f(x'), y), one step for every setting x' in the released code's order. Terms: named after the setting."""
        settings = ["clean", *self.hyper.roles]
        if self.hyper.settings == "turns":
            settings = [settings[self.turn % len(settings)]]
            self.turn += 1
        for setting in settings:
            yield {setting: cross_entropy(self.predict(self.perturbed(batch, setting)), batch.y).mean()}

    def perturbed(self, batch: Batch, setting: str) -> Tensor:
        """The batch as it is, in the weather, or attacked: PGD on the present mixture, gate included."""
        if setting == "clean":
            return batch.x
        if setting in WEATHER:
            return augment.parse(setting)[0](batch.x, batch.rng)
        norm, radius = setting.split(maxsplit=1)
        threat = Threat.relative(norm, radius, self.training_threat)
        # linf: the step of the recipe; in l2 a step given in pixels would not reach the sphere
        step_size = 2.5 * threat.eps / max(1, self._lent().attack.steps) if threat.norm == "l2" else None
        return self.adversary(self, batch.x, batch.y, threat=threat, step_size=step_size)

    def begin_epoch(self, epoch: int, rng: torch.Generator) -> None:
        if epoch == 0:  # and at no other: the batches of one epoch may be fewer than the settings
            self.turn = 0

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from self.gate.parameters()
        for expert in self.members:
            yield from expert.classifier.parameters()

    @classmethod
    def prerequisites(cls, spec: TrainSpec) -> Mapping[str, TrainSpec]:
        """A single network for every expert: plain, adversarially trained, or plain on images in the weather."""
        setting, experts = spec.setting, {}
        for role in spec.hyper.roles:
            if role == "clean":
                experts[role] = spec.derive("nat", members=1)
            elif role in WEATHER:
                recipe = {**setting.recipe, "augment": joined(str(spec.recipe.augment), role)}
                experts[role] = spec.derive("nat", members=1, recipe=recipe)
            else:
                norm, radius = role.split(maxsplit=1)
                experts[role] = spec.derive("adv", members=1, norm=norm, train_eps=expert_eps(spec, norm, radius))
        return experts

    def warm_start(self, prerequisites: Mapping[str, EnsembleDefense]) -> None:
        for expert, role in zip(self.members, self.hyper.roles, strict=True):
            expert.load_state_dict(prerequisites[role].members[0].state_dict())

    # -- inference ----------------------------------------------------------------------------------------------

    def predict(self, x: Tensor) -> Tensor:
        """Log-softmax of the experts' logits weighed by the gate (Eq. 2 and 3)."""
        return mixture_of_logits(self.member_logits(x), self.gate(x))

    def selection(self, x: Tensor) -> Tensor:
        scores: Tensor = self.gate(x)
        return scores

    def views(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        return {
            **super().views(),
            "top_expert": lambda x: combine.select(self.member_logits(x), self.gate(x)),
            "fixed_gate": lambda x: mixture_of_logits(self.member_logits(x), self.gate(x).detach()),
        }


def expert_eps(spec: TrainSpec, norm: str, radius: str) -> str:
    """The training radius of an expert, of a run whose own may be drawn between two ends: ``"3/20"``."""
    setting, ends = spec.setting, []
    for end in parse_train_eps(setting.train_eps, setting.norm):
        run = Threat(setting.norm, float(end))
        eps = Threat.relative(norm, radius, run, dimensions=setting.data.dimensions, owner=spec.method).eps
        # a fraction again, so that the expert at the run's own radius is the run's own row of adv
        ends.append(Fraction(eps).limit_denominator(10**6))
    low, high = ends
    return str(low) if low == high else f"uniform({low},{high})"


def mixture_of_logits(logits: Tensor, scores: Tensor) -> Tensor:
    """log softmax of sum_k w_k z_k, w = softmax(scores): (K, B, C) and (B, K) -> (B, C).

    Source: MoRE, Eq. (2) and (3). Logits are mixed, as the released code does; the paper does not say what E_k is.
    """
    return combine.log_probs(torch.einsum("bk,kbc->bc", scores.softmax(dim=1), logits))
