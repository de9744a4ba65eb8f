"""What an attacker may do to an image: a ball around it, inside the box [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ensdef.notation import parse_eps
from ensdef.rng import Random

#: Floor under gradient norms: a zero gradient gives a zero step, not NaN.
TINY = 1e-12


@dataclass(frozen=True)
class Threat:
    """A norm and a radius.

    Args:
        norm: ``"linf"``, ``"l2"``, or None for attacks without a budget (weather).
        eps: the radius for images in [0, 1]; ignored when ``norm`` is None.
    """

    norm: str | None
    eps: float

    @classmethod
    def parse(cls, norm: str, eps: str | float | Fraction, dimensions: int | None = None) -> Threat:
        """From text, with the checks of :func:`ensdef.notation.parse_eps`."""
        return cls(norm, float(parse_eps(eps, norm, dimensions)))

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point of the ball around ``x``, then of the box; (B, ...) like ``x``."""
        if self.norm == "linf":
            x_adv = x + (x_adv - x).clamp(-self.eps, self.eps)
        elif self.norm == "l2":
            delta = x_adv - x
            size = _length(delta).clamp_min(TINY)
            x_adv = x + delta * (self.eps / size).clamp(max=1.0)
        return x_adv.clamp(0.0, 1.0)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Size of the perturbation in this norm, (B,), computed in float64; zeros when there is no norm."""
        delta = (x_adv.double() - x.double()).flatten(1)
        if self.norm == "linf":
            return delta.abs().amax(dim=1)
        if self.norm == "l2":
            return delta.square().sum(dim=1).sqrt()
        return delta.new_zeros(len(delta))

    def ascent(self, gradient: Tensor) -> Tensor:
        """The direction of unit size that raises a linear loss most: sign(g) in linf, g / ||g|| in l2."""
        if self.norm == "l2":
            largest = gradient.abs().amax(dim=tuple(range(1, gradient.dim())), keepdim=True)
            scaled = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
            return scaled / _length(scaled).clamp_min(TINY)
        return torch.sign(gradient)

    def random_start(self, x: Tensor, rng: Random) -> Tensor:
        """linf: x + U(-eps, eps) each pixel; l2: Gaussian direction of length U(0, 1) eps; then the box."""
        if self.norm == "l2":
            direction = rng.normal(*x.shape[1:])
            length = rng.uniform(*([1] * (x.dim() - 1)))
            noise = self.ascent(direction) * length * self.eps
        else:
            noise = rng.uniform(*x.shape[1:], low=-self.eps, high=self.eps)
        return (x + noise).clamp(0.0, 1.0)


def _length(delta: Tensor) -> Tensor:
    """l2 norm per image, kept broadcastable: (B, 1, ..., 1)."""
    length: Tensor = torch.linalg.vector_norm(delta, dim=tuple(range(1, delta.dim())), keepdim=True)
    return length
