"""Slopes of losses in weight space by differences: they tell whether a part of a loss is detached."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from toys_defense import generator, number


def slopes(module: nn.Module, loss: Callable[[], Tensor], seed: int = 0, step: float = 1e-6) -> tuple[float, float]:
    """Slope of a loss along one random direction in weight space: by autograd, and by central differences.

    Give float64 modules. Leaky ReLUs are straight on either side, so a kink is met with a chance near 0.
    """
    rng = generator(seed)
    parameters = list(module.parameters())
    directions = [torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype) for parameter in parameters]
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    slope = sum(number((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
    values = []
    for move in (step, -2 * step, step):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(move * direction)
        values.append(number(loss()))
    return slope, (values[0] - values[1]) / (2 * step)


def per_image_gradients(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Gradient of ``loss(image, label)`` with respect to the image, each image by itself, (B, D)."""
    rows = []
    for image, label in zip(x, y, strict=True):
        alone = image[None].clone().requires_grad_()
        rows.append(torch.autograd.grad(loss(alone, label[None]), alone)[0].flatten())
    return torch.stack(rows)


def moved_by(term: Tensor, modules: Sequence[nn.Module]) -> list[bool]:
    """For each module, whether the term has a non-zero gradient in every one of its parameters."""
    parameters = [list(module.parameters()) for module in modules]
    flat = [parameter for group in parameters for parameter in group]
    gradients = iter(torch.autograd.grad(term, flat, retain_graph=True, allow_unused=True))
    return [
        all(gradient is not None and bool((gradient != 0).any()) for gradient in [next(gradients) for _ in group])
        for group in parameters
    ]
