"""Input gradients of losses as terms of a loss: second derivatives, and how gradients of members compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def input_gradients(losses: Sequence[Tensor], x: Tensor) -> Tensor:
    """Gradient of every member's loss with respect to the images, differentiable once more.

    Args:
        losses: K members' losses, each (B,) and from a pass of its own over ``x``: differentiating one slice of a
            stack would walk through all members. Nothing may couple the examples of a batch but batch norm.
        x: images that require a gradient, (B, ...).
    Returns:
        (K, B, D) with D values an image. The sum over the batch is differentiated, not its mean, so that an
        example's gradient does not depend on the size of its batch.
    """
    gradients = [torch.autograd.grad(loss.sum(), x, create_graph=True)[0].flatten(1) for loss in losses]
    return torch.stack(gradients)


def pairwise_cosines(gradients: Tensor) -> Tensor:
    """Cosine between every two members' gradients, (K, B, D) -> (P, B) with P = K(K-1)/2 pairs (a, b), a < b.

    A gradient of zero has cosine 0 with anything and passes no gradient on; all others are normalised at full
    precision, however small: confident examples have gradients far below the usual floor of 1e-8.
    """
    largest = gradients.detach().abs().amax(dim=2, keepdim=True)
    alive = largest > 0
    # before the division, not after: the derivative of a root at 0 is infinite, and 0 times it NaN
    scaled = torch.where(alive, gradients, 0.0) / torch.where(alive, largest, 1.0)
    squared = scaled.square().sum(dim=2, keepdim=True)
    units = scaled / torch.where(alive, squared, 1.0).sqrt()
    a, b = torch.triu_indices(len(gradients), len(gradients), offset=1, device=gradients.device)
    return (units[a] * units[b]).sum(dim=2)
