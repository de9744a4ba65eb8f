"""What the tests of query attacks share: a linear model, a small trained network, and what hides their gradients."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ensdef.attack import IterativeAttack
from ensdef.attack_spec import AttackSpec
from ensdef.harness import Outcome, attack_model
from ensdef.registry import ATTACKS
from ensdef.testing import LinearClassifier

SHAPE = (3, 4, 4)
PIXELS = 48


def linear(classes: int = 2, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> LinearClassifier:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.Size(shape).numel()
    return LinearClassifier(
        torch.randn(classes, pixels, generator=generator) / 2, torch.randn(classes, generator=generator) / 4
    )


def images(count: int, low: float = 0.3, high: float = 0.7, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    return low + (high - low) * torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def decisions(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(dim=1)


def difference(model: LinearClassifier, y: Tensor, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """D = w_y - w_other of a two-class model, (N, *shape)."""
    weight = model.weight.detach()
    return (weight[y] - weight[1 - y]).view(-1, *shape)


def margins(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Best wrong score minus true score, (N,), in float64 where the model is linear."""
    with torch.no_grad():
        scores = model(x).double()
    true = scores.gather(1, y[:, None]).squeeze(1)
    return scores.scatter(1, y[:, None], -torch.inf).amax(dim=1) - true


def attacked(
    model: nn.Module, x: Tensor, y: Tensor, name: str, eps: float, norm: str = "linf", seed: int = 0, **params: Any
) -> Outcome:
    return attack_model(model, x, y, AttackSpec.create(name, params, norm, eps, seed=seed), batch_size=128)


def build(name: str, **params: Any) -> IterativeAttack:
    """The attack itself, to be driven by hand."""
    attack: IterativeAttack = ATTACKS.get(name)(ATTACKS.get(name).Params(**params))
    return attack


class Masked(nn.Module):
    """The same scores, with a gradient of exactly zero."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        scores = self.model(x)
        hidden: Tensor = scores.detach() + 0 * scores
        return hidden


@cache
def trained_network() -> tuple[nn.Module, Tensor, Tensor]:
    """A convolutional network that learnt digits under noise, and 150 images it never saw."""
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(digits.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 10),
        )
        optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
        for _ in range(150):
            rows = torch.randint(0, 1500, (64,))
            noisy = (x[rows] + 0.15 * torch.randn(64, 1, 8, 8).sign()).clamp(0, 1)
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(noisy), y[rows]).backward()
            optimiser.step()
    return network.eval(), x[1500:1650], y[1500:1650]
