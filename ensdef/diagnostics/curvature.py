"""How fast the input gradient of a loss turns.

iGAT: Understanding and Improving Ensemble Adversarial Defense (Deng, Mu; NeurIPS 2023, arXiv:2310.18477), supplement:
the curvature that its error bounds assume to be small, about 0.06 for its ADP networks (perturbations not stated).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ensdef.defense import EnsembleDefense
from ensdef.diagnostics.crafting import loss_of, view_of
from ensdef.errors import UsageError
from ensdef.folding import frozen_copy


def loss_curvature(loss: Callable[[Tensor], Tensor], x: Tensor, delta: Tensor) -> Tensor:
    """||grad loss(x + delta) - grad loss(x)||_2 / ||delta||_2 of every image, (N,), in loss units per squared unit.

    Args:
        loss: images (N, ...) -> (N,), image by image.
        x: images, (N, ...).
        delta: perturbations, (N, ...), none of them 0.
    Raises:
        UsageError: a perturbation is 0.
    """
    length = _norm(delta)
    if bool((length == 0).any()):
        raise UsageError(f"{int((length == 0).sum())} of {len(delta)} perturbations are 0; the curvature needs a step")
    return _norm(gradient(loss, x + delta) - gradient(loss, x)) / length


def defense_curvature(
    defense: EnsembleDefense, x: Tensor, y: Tensor, delta: Tensor, *, view: str = "predict", batch_size: int = 128
) -> Tensor:
    """:func:`loss_curvature` of the cross-entropy of one view of a defence in eval mode, (N,).

    Args:
        x, y, delta: images, labels, (N,), and perturbations, such as ``craft(defense, x, y, eps=...) - x``.
        view: ``"predict"``, or ``"member0"`` for a single network, ...
        batch_size: images a pass.
    Raises:
        UsageError: no such view, or a perturbation is 0.
    """
    model = frozen_copy(defense)
    assert isinstance(model, EnsembleDefense)
    surface = view_of(model, view)
    batches = zip(x.split(batch_size), y.split(batch_size), delta.split(batch_size), strict=True)
    return torch.cat([loss_curvature(loss_of(surface, labels), images, step) for images, labels, step in batches])


def _norm(x: Tensor) -> Tensor:
    """l2 norm of every image, (N,) float64: in float32 the squares of small gradients may underflow."""
    norm: Tensor = torch.linalg.vector_norm(x.flatten(1).double(), dim=1)
    return norm


def gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradient of every image's own loss, (N, ...) like ``x``."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss(x).sum(), x)[0]
