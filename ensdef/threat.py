"""What an attacker may do to an image: a ball around it, inside the box [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ensdef.errors import UsageError
from ensdef.notation import parse_eps, relative
from ensdef.rng import Random

#: Floor under gradient norms: a zero gradient gives a zero step, not NaN.
TINY = 1e-12


@dataclass(frozen=True)
class Threat:
    """A norm and a radius.

    Args:
        norm: ``"linf"``, ``"l2"``, ``"l1"`` (in training alone: no attack of the harness runs in it), or None for
            attacks without a budget (weather).
        eps: the radius for images in [0, 1]; ignored when ``norm`` is None.
    """

    norm: str | None
    eps: float

    @classmethod
    def parse(cls, norm: str, eps: str | float | Fraction, dimensions: int | None = None) -> Threat:
        """From text, with the checks of :func:`ensdef.notation.parse_eps`."""
        return cls(norm, float(parse_eps(eps, norm, dimensions)))

    @classmethod
    def relative(
        cls, norm: str, radius: str, run: Threat, *, dimensions: int | None = None, owner: str | None = None
    ) -> Threat:
        """A radius as a hyper-parameter states it: a number, or in units of the training radius (``"0.75*eps"``).

        Args:
            run: the threat of the training.
            dimensions: as in :func:`ensdef.notation.parse_eps`.
            owner: the method, for the messages.
        Raises:
            UsageError: in units of a radius in another norm, or larger than the box.
        """
        what = f"{owner}[{norm}]" if owner else norm
        if "eps" in radius and norm != run.norm:
            raise UsageError(f"{what} is {radius!r}, but the training radius is in {run.norm}; write it as a number")
        eps = relative(radius, run.eps, what)
        try:
            parse_eps(eps, "linf" if norm == "linf" else "l2", dimensions if norm == "l2" else None)
        except UsageError as error:
            raise UsageError(f"{what} is {radius!r}: {error}") from None
        return cls(norm, eps)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point of the ball around ``x``, then of the box; (B, ...) like ``x``."""
        if self.norm == "linf":
            x_adv = x + (x_adv - x).clamp(-self.eps, self.eps)
        elif self.norm == "l2":
            delta = x_adv - x
            size = _length(delta).clamp_min(TINY)
            x_adv = x + delta * (self.eps / size).clamp(max=1.0)
        elif self.norm == "l1":
            x_adv = x + _onto_l1(x_adv - x, self.eps)
        return x_adv.clamp(0.0, 1.0)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Size of the perturbation in this norm, (B,), computed in float64; zeros when there is no norm."""
        delta = (x_adv.double() - x.double()).flatten(1)
        if self.norm == "linf":
            return delta.abs().amax(dim=1)
        if self.norm == "l2":
            return delta.square().sum(dim=1).sqrt()
        if self.norm == "l1":
            return delta.abs().sum(dim=1)
        return delta.new_zeros(len(delta))

    def ascent(self, gradient: Tensor, sparsity: int = 1) -> Tensor:
        """The direction of unit size that raises a linear loss most: sign(g) in linf, g / ||g|| in l2.

        In l1 the sign of the largest coordinate alone, or a step shared evenly by the ``sparsity`` largest (MSD).
        """
        if self.norm == "l2":
            largest = gradient.abs().amax(dim=tuple(range(1, gradient.dim())), keepdim=True)
            scaled = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
            return scaled / _length(scaled).clamp_min(TINY)
        if self.norm == "l1":
            flat = gradient.flatten(1)
            largest = flat.abs().topk(min(sparsity, flat.shape[1]), dim=1).indices
            signs = flat.gather(1, largest).sign() / largest.shape[1]
            return torch.zeros_like(flat).scatter(1, largest, signs).view_as(gradient)
        return torch.sign(gradient)

    def random_start(self, x: Tensor, rng: Random) -> Tensor:
        """linf: x + U(-eps, eps) each pixel; l2, l1: Gaussian direction of length U(0, 1) eps; then the box."""
        if self.norm in ("l2", "l1"):
            direction = rng.normal(*x.shape[1:])
            length = rng.uniform(*([1] * (x.dim() - 1)))
            unit = self.ascent(direction) if self.norm == "l2" else direction / _length(direction, order=1)
            noise = unit * length * self.eps
        else:
            noise = rng.uniform(*x.shape[1:], low=-self.eps, high=self.eps)
        return (x + noise).clamp(0.0, 1.0)


def _length(delta: Tensor, order: int = 2) -> Tensor:
    """l2 (or l1) norm per image, kept broadcastable: (B, 1, ..., 1)."""
    length: Tensor = torch.linalg.vector_norm(delta, ord=order, dim=tuple(range(1, delta.dim())), keepdim=True)
    return length


def _onto_l1(delta: Tensor, eps: float) -> Tensor:
    """The nearest point of the l1 ball: all coordinates shrink by one threshold (Duchi et al., ICML 2008)."""
    size = delta.flatten(1).abs()
    ordered = size.sort(dim=1, descending=True).values
    # the threshold, were the k largest coordinates the ones that stay
    thresholds = (ordered.cumsum(dim=1) - eps) / torch.arange(1, size.shape[1] + 1, device=size.device)
    staying = (ordered > thresholds).sum(dim=1, keepdim=True).clamp_min(1)
    shrunk = (size - thresholds.gather(1, staying - 1).clamp_min(0)).clamp_min(0)
    return delta.sign() * shrunk.view_as(delta)
