"""A target as the plain PyTorch model that pyautoattack (the official AutoAttack code) is written for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient has the memory layout that ``Tensor.view`` wants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class PlainModel(nn.Module):
    """Images (B, ...) to logits (B, C), in eval mode and without parameters (the library must not see the weights)."""

    def __init__(self, target: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.target = target
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        scores = self.target(_ContiguousGradient.apply(x.contiguous()))
        # Square writes -inf into what it gets: it must never be a tensor that anyone else holds
        return scores.to(torch.float32).clone(memory_format=torch.contiguous_format)


def as_plain_model(target: Callable[[Tensor], Tensor]) -> nn.Module:
    """A module that pyautoattack can attack: contiguous in, fresh contiguous float32 logits out, contiguous gradients.

    Args:
        target: the attacked model, images (B, ...) to log-scores (B, C), such as an :class:`ensdef.target.Target`.
    """
    return PlainModel(target)
