"""Member networks: images in [0, 1] to logits, with the parts that defences and attacks need to reach by number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from ensdef.errors import PluginError, UsageError
from ensdef.registry import ARCHITECTURES

Activation = Literal["relu", "leaky_relu"]


@dataclass(frozen=True)
class ImageSpec:
    """What a network sees and must tell apart.

    Args:
        shape: (C, H, W).
        num_classes: number of logits.
        mean, std: per channel, for the normalisation inside the network; one value serves all channels.
    """

    shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.shape[0]):
                raise UsageError(f"{name} has {len(values)} values for {self.shape[0]} channels")
        if min(self.std) <= 0:
            raise UsageError(f"std is {self.std}; expected positive values")


class Normalize(nn.Module):
    """(x - mean) / std per channel, so that attacks live in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ImageSpec) -> None:
        super().__init__()
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(
                name, torch.tensor(values, dtype=torch.float32).expand(spec.shape[0]).clone().view(1, -1, 1, 1)
            )

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Network(nn.Module, ABC):
    """A member network.

    ``forward(x)`` gives logits (B, C). Layers are numbered from 1 as in DVERGE's code: the last is the logits, the
    others are what ``trunk`` yields, taken before the activation.
    """

    #: Frozen dataclass of this architecture's parameters (``resnet[depth=26]``).
    Params: ClassVar[type]

    #: Width of the embedding that ``classifier`` reads.
    embedding_size: int
    classifier: nn.Module

    def __init__(self, spec: ImageSpec) -> None:
        super().__init__()
        self.normalize = Normalize(spec)

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Highest layer index; that layer is the logits."""

    @abstractmethod
    def trunk(self, x: Tensor) -> Iterator[Tensor]:
        """Pre-activation features of layers 1, 2, ... of a normalised image; nothing follows the last yield."""

    @abstractmethod
    def embed(self, last: Tensor) -> Tensor:
        """The embedding (B, embedding_size) from the last tensor that ``trunk`` yielded."""

    def forward(self, x: Tensor, layer: int | None = None, with_embedding: bool = False) -> Any:
        """Logits (B, C).

        Args:
            x: images in [0, 1], (B, C, H, W).
            layer: return the features of this layer instead.
            with_embedding: return (logits, embedding).
        Raises:
            UsageError: no such layer.
        """
        if layer is not None and not 1 <= layer <= self.num_layers:
            raise UsageError(f"layer is {layer}; {type(self).__name__} has layers 1 to {self.num_layers}")
        h = self.normalize(x)
        for index, h in enumerate(self.trunk(h), start=1):  # noqa: B020 - the last features are what is wanted
            if index == layer:
                return h
        embedding = self.embed(h)
        logits = self.classifier(embedding)
        return (logits, embedding) if with_embedding else logits

    def features(self, x: Tensor, layer: int) -> Tensor:
        """Features of ``layer`` (1 = first convolution, before its activation), any shape with leading dimension B."""
        features: Tensor = self(x, layer=layer)
        return features

    def residual_blocks(self) -> list[ResidualBlock]:
        """The blocks whose branch gradient an attack may scale (SGM); empty for plain networks."""
        return [part for part in self.modules() if isinstance(part, ResidualBlock)]


def activation(kind: Activation) -> nn.Module:
    """ReLU, or leaky ReLU with slope 0.1 (GAL, CLDL: dead units make input gradients vanish)."""
    return nn.ReLU() if kind == "relu" else nn.LeakyReLU(0.1)


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    """Convolution without bias and its batch norm, side by side so that folding finds them. He-normal, fan k*k*out."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """Post-activation basic block: two 3x3 convolutions and a 1x1 projection where the shape changes.

    ``branch_scale`` scales the gradient through the residual branch and leaves the value bit for bit (SGM, gamma).
    """

    branch_scale: float = 1.0

    def __init__(self, inputs: int, outputs: int, stride: int, kind: Activation) -> None:
        super().__init__()
        self.first = conv_norm(inputs, outputs, 3, stride)
        self.second = conv_norm(outputs, outputs, 3, 1)
        same = inputs == outputs and stride == 1
        self.shortcut: nn.Module = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)
        self.activation = activation(kind)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(first convolution's output, block sum), both before their activation; ``x`` is after its own."""
        inner = self.first(x)
        branch = self.second(self.activation(inner))
        if self.branch_scale != 1.0:
            fixed = branch.detach()
            branch = fixed + self.branch_scale * (branch - fixed)
        return inner, self.shortcut(x) + branch


N = TypeVar("N", bound=type[Network])


def register_architecture(name: str) -> Callable[[N], N]:
    """Class decorator: makes ``--arch name`` find this class, built as ``cls(image_spec, params)``."""

    def check(plugin: Any) -> None:
        if not (isinstance(plugin, type) and issubclass(plugin, Network)):
            raise PluginError(
                f"@register_architecture({name!r}) expects a subclass of ensdef.architecture.Network, got {plugin!r}"
            )

    return ARCHITECTURES.register(name, check)
