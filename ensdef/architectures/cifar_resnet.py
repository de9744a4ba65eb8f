"""Deep Residual Learning for Image Recognition (He, Zhang, Ren, Sun; CVPR 2016), section 4.2.

Depth 6n+2: stem of 16 channels, three stages of n basic blocks with 16, 32, 64 channels, global average pool.
Basic blocks at every depth; some published code switches to bottlenecks from depth 44 on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ensdef.architecture import Activation, ImageSpec, ResidualBlock, register_architecture
from ensdef.architectures._residual import ResidualNetwork
from ensdef.errors import UsageError


@dataclass(frozen=True)
class FixedDepthParams:
    """Parameters of ``resnet8`` and the like.

    Args:
        activation: after every batch norm.
        shortcut: where a block changes the shape. ``projection``: 1x1 convolution and batch norm, as in the
            defences' code (272,474 parameters at depth 20); ``identity``: strided subsampling and zero
            channels, no parameters, as in the paper (its option A; 269,722).
    """

    activation: Activation = "relu"
    shortcut: Literal["projection", "identity"] = "projection"


@dataclass(frozen=True)
class CifarResNetParams(FixedDepthParams):
    """Parameters of ``resnet``.

    Args:
        depth: 6n+2, the number of layers.
    Raises:
        UsageError: another depth.
    """

    depth: int = 20

    def __post_init__(self) -> None:
        if self.depth < 2 or (self.depth - 2) % 6:
            lower = max(2, 6 * ((self.depth - 2) // 6) + 2)
            raise UsageError(f"resnet: depth is {self.depth}; expected 6n+2, the nearest are {lower} and {lower + 6}")


class Subsample(nn.Module):
    """Shortcut without parameters: every ``stride``-th pixel, missing channels zero."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.missing = outputs - inputs
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.missing))


@register_architecture("resnet")
class CifarResNet(ResidualNetwork):
    """CIFAR ResNet of any depth 6n+2."""

    Params: ClassVar[type] = CifarResNetParams

    def __init__(self, spec: ImageSpec, params: CifarResNetParams) -> None:
        blocks = (params.depth - 2) // 6
        stages = [(channels, blocks) for channels in (16, 32, 64)]
        super().__init__(spec, 16, stages, params.activation)
        if not blocks:
            self._pool_stem(spec)
        if params.shortcut == "identity":
            for block in self.residual_blocks():
                self._drop_projection(block)

    def _pool_stem(self, spec: ImageSpec) -> None:
        # a global pool would leave 16 numbers; the window of 8 at 32x32 (4x4 positions) is kept in proportion
        _, height, width = spec.shape
        window = (height // 4, width // 4)
        self.pool = nn.AvgPool2d(window)
        self.embedding_size = 16 * (height // window[0]) * (width // window[1])
        self.classifier = nn.Linear(self.embedding_size, spec.num_classes)

    @staticmethod
    def _drop_projection(block: ResidualBlock) -> None:
        if isinstance(block.shortcut, nn.Sequential):
            conv = block.shortcut[0]
            assert isinstance(conv, nn.Conv2d)
            block.shortcut = nn.Sequential(Subsample(conv.in_channels, conv.out_channels, conv.stride[0]))


class FixedDepth(CifarResNet):
    """A CIFAR ResNet whose depth is part of its name."""

    Params: ClassVar[type] = FixedDepthParams
    depth: ClassVar[int]

    def __init__(self, spec: ImageSpec, params: FixedDepthParams) -> None:
        super().__init__(spec, CifarResNetParams(params.activation, params.shortcut, self.depth))


@register_architecture("resnet2")
class ResNet2(FixedDepth):
    """CIFAR ResNet-2: stem, average pool to 4x4, classifier."""

    depth = 2


@register_architecture("resnet8")
class ResNet8(FixedDepth):
    """CIFAR ResNet-8."""

    depth = 8


@register_architecture("resnet14")
class ResNet14(FixedDepth):
    """CIFAR ResNet-14."""

    depth = 14


@register_architecture("resnet20")
class ResNet20(FixedDepth):
    """CIFAR ResNet-20, what most ensemble defences use."""

    depth = 20


@register_architecture("resnet26")
class ResNet26(FixedDepth):
    """CIFAR ResNet-26."""

    depth = 26


@register_architecture("resnet32")
class ResNet32(FixedDepth):
    """CIFAR ResNet-32."""

    depth = 32
