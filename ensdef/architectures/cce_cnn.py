"""Improving Ensemble Robustness by Collaboratively Promoting and Demoting Adversarial Robustness
(Bui, Le, Zhao, Montague, deVel, Abraham, Phung; AAAI 2021), supplement, table 8.

Convolutions are padded to keep the size, as in the authors' code; the weight decay there belongs to training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ensdef.architecture import Activation, ImageSpec, Network, activation, register_architecture
from ensdef.errors import UsageError


@dataclass(frozen=True)
class CCECNNParams:
    """Parameters of ``cce_mnist``, ``cce_cifar10`` and ``cce_cifar100``.

    Args:
        activation: after every convolution and hidden layer.
        dropout: probability after the first hidden layer, in training mode only. 0.5 in the paper; the
            released code has no dropout, which is 0.
    """

    activation: Activation = "relu"
    dropout: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout is {self.dropout}; expected a probability of at least 0 and below 1")


class CCECNN(Network):
    """Two blocks of 3x3 convolutions, each with a 2x2 max-pool behind, then linear layers; no batch norm.

    Layers: one per convolution, one per hidden linear layer, then the logits.

    Raises:
        UsageError: images that two 2x2 pools leave empty.
    """

    Params: ClassVar[type] = CCECNNParams
    #: Channels of the convolutions, block by block, and widths of the hidden layers.
    convolutions: ClassVar[tuple[tuple[int, ...], ...]]
    hidden: ClassVar[tuple[int, ...]]

    def __init__(self, spec: ImageSpec, params: CCECNNParams) -> None:
        super().__init__(spec)
        before, height, width = spec.shape
        if min(height, width) < 4:
            raise UsageError(f"{type(self).__name__} needs images of at least 4x4, got {height}x{width}")
        self.activation = activation(params.activation)
        self.blocks = nn.ModuleList()
        for channels in self.convolutions:
            block = nn.ModuleList()
            for after in channels:
                block.append(_he_normal(nn.Conv2d(before, after, 3, padding=1)))
                before = after
            self.blocks.append(block)
            height, width = height // 2, width // 2
        self.pool = nn.MaxPool2d(2)
        before *= height * width
        self.linears = nn.ModuleList()
        for after in self.hidden:
            self.linears.append(_he_normal(nn.Linear(before, after)))
            before = after
        self.dropout = nn.Dropout(params.dropout)
        self.embedding_size = before
        self.classifier: nn.Module = _he_normal(nn.Linear(before, spec.num_classes))

    @property
    def num_layers(self) -> int:
        return sum(map(len, self.convolutions)) + len(self.hidden) + 1

    def trunk(self, x: Tensor) -> Iterator[Tensor]:
        h = x
        for block in self.blocks:
            assert isinstance(block, nn.ModuleList)
            for convolution in block:
                pre = convolution(h)
                yield pre
                h = self.activation(pre)
            h = self.pool(h)
        h = h.flatten(1)
        # activations come before a layer, not after it: embed applies the last one
        for index, linear in enumerate(self.linears):
            if index > 0:
                h = self.activation(h)
            if index == 1:
                h = self.dropout(h)
            h = linear(h)
            yield h

    def embed(self, last: Tensor) -> Tensor:
        embedding: Tensor = self.activation(last)
        return embedding


def _he_normal(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    assert layer.bias is not None
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


@register_architecture("cce_mnist")
class CCEMnist(CCECNN):
    """CCE's network for MNIST: convolutions 2x32, 2x64, hidden 2x200."""

    convolutions = ((32, 32), (64, 64))
    hidden = (200, 200)


@register_architecture("cce_cifar10")
class CCECifar10(CCECNN):
    """CCE's network for CIFAR-10: convolutions 2x64, 2x128, hidden 2x256."""

    convolutions = ((64, 64), (128, 128))
    hidden = (256, 256)


@register_architecture("cce_cifar100")
class CCECifar100(CCECNN):
    """CCE's network for CIFAR-100: convolutions 3x64, 3x128, hidden 3x256."""

    convolutions = ((64, 64, 64), (128, 128, 128))
    hidden = (256, 256, 256)
