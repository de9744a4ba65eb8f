"""A residual network for images of 8x8: two stages of one basic block (He et al., CVPR 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ensdef.architecture import Activation, ImageSpec, register_architecture
from ensdef.architectures._residual import ResidualNetwork
from ensdef.notation import at_least


@dataclass(frozen=True)
class SmallResNetParams:
    """Parameters of ``small_resnet``.

    Args:
        width: channels of stem and first stage; the second has twice as many.
        activation: after every batch norm.
    """

    width: int = 16
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        at_least("small_resnet", width=(self.width, 1))


@register_architecture("small_resnet")
class SmallResNet(ResidualNetwork):
    """Two residual blocks (16 and 32 channels), for digits; trains in seconds on a CPU."""

    Params: ClassVar[type] = SmallResNetParams

    def __init__(self, spec: ImageSpec, params: SmallResNetParams) -> None:
        width = params.width
        super().__init__(spec, width, [(width, 1), (2 * width, 1)], params.activation)
