"""Deep Residual Learning for Image Recognition (He, Zhang, Ren, Sun; CVPR 2016): ResNet-18.

The stem is one 3x3 convolution of stride 1 without max-pool, as is usual for images of 32x32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ensdef.architecture import Activation, ImageSpec, register_architecture
from ensdef.architectures._residual import ResidualNetwork
from ensdef.notation import at_least


@dataclass(frozen=True)
class ResNet18Params:
    """Parameters of ``resnet18``.

    Args:
        activation: after every batch norm.
        width: channels of stem and first stage; each later stage has twice as many as the one before.
    """

    activation: Activation = "relu"
    width: int = 64

    def __post_init__(self) -> None:
        at_least("resnet18", width=(self.width, 1))


@register_architecture("resnet18")
class ResNet18(ResidualNetwork):
    """ResNet-18 with a stem for 32x32 images (MoRE's experts)."""

    Params: ClassVar[type] = ResNet18Params

    def __init__(self, spec: ImageSpec, params: ResNet18Params) -> None:
        stages = [(params.width * 2**stage, 2) for stage in range(4)]
        super().__init__(spec, params.width, stages, params.activation)
