"""Theoretically Principled Trade-off between Robustness and Accuracy (Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan; ICML
2019, arXiv:1901.08573): every member of an ensemble trained by TRADES.

A published defence that no paper of this suite compares, added from outside: one file, nothing in the engine changed.

    ensdef check trades --plugin examples/trades.py
    ensdef bench --plugin examples/trades.py --method trades,adv_en --attack pgd
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ensdef
from ensdef.combine import log_probs
from ensdef.defense import Terms, require
from ensdef.losses import member_cross_entropy


@dataclass(frozen=True)
class TradesHyper:
    """Hyper-parameters of ``trades``.

    Args:
        beta: weight of the divergence (1 / lambda in the paper); 6 in the authors' CIFAR-10 runs.
    """

    beta: float = 6.0

    def __post_init__(self) -> None:
        require(self.beta >= 0, f"beta is {self.beta}; expected a weight of at least 0")


@ensdef.register_defense("trades")
class Trades(ensdef.EnsembleDefense):
    """Members learn clean images and to answer the same in the ball around each; probabilities are averaged."""

    Hyper = TradesHyper
    recipe = ensdef.Recipe(lr=0.1, weight_decay=2e-4, epochs=76, milestones=(75 / 76,))
    deviations = ("The attack starts uniformly in the ball; the authors' starts at Gaussian noise of deviation 0.001.",)

    def loss(self, batch: ensdef.Batch, progress: float) -> Terms:
        """Sum over members of CE(z(x), y) + beta KL(p(x) || p(x_adv)), Eq. (5). Terms: ce, divergence."""
        clean, crafted = [], []
        for member in self.members:
            net = self.as_attacked(member)
            with torch.no_grad():
                answer = log_probs(net(batch.x))
            x_adv = self.adversary(divergence_from(answer, net), batch.x)
            clean.append(member(batch.x))
            crafted.append(member(x_adv))
        logits, adversarial = torch.stack(clean), torch.stack(crafted)
        return {
            "ce": member_cross_entropy(logits, batch.y).mean(dim=1).sum(),
            "divergence": self.hyper.beta * divergence(log_probs(logits), adversarial).mean(dim=1).sum(),
        }


def divergence_from(answer: Tensor, net: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the attack raises: images -> divergence of the network's answers from those on the clean images, (B,)."""
    return lambda x: divergence(answer, net(x))


def divergence(clean: Tensor, logits: Tensor) -> Tensor:
    """KL(p_clean || softmax(logits)) in nats: (..., B, C) log-probabilities and logits -> (..., B)."""
    return F.kl_div(log_probs(logits), clean, reduction="none", log_target=True).sum(dim=-1)
