"""Defences whose answers are written into the images, for the diagnostics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from toys_defense import Plain

from ensdef import combine


class Slice(nn.Module):
    """A member that reads its logits off the image: (N, K, C) -> (N, C)."""

    def __init__(self, index: int, classes: int) -> None:
        super().__init__()
        self.index, self.classes = index, classes

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.index, : self.classes]


class Written(Plain):
    """Members that answer what image (N, K, C) says; their probabilities are averaged."""

    def __init__(self, members: int, classes: int) -> None:
        super().__init__([Slice(index, classes) for index in range(members)])


class WrittenChoice(Written):
    """The image (N, K, C + 1) also says, in its last column, how much each member is trusted."""

    combiner = "select"

    def predict(self, x: Tensor) -> Tensor:
        return combine.select(self.member_logits(x), self.selection(x))

    def selection(self, x: Tensor) -> Tensor:
        return x[:, :, -1]


def images_of(predictions: Any, classes: int, height: float = 5.0) -> Tensor:
    """Images (N, K, C) on which member k predicts class ``predictions[k][n]``."""
    return height * nn.functional.one_hot(torch.as_tensor(predictions), classes).transpose(0, 1).float()
