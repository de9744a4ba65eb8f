"""What the residual networks share: stem, basic blocks in a row, average pool, linear classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ensdef.architecture import Activation, ImageSpec, Network, ResidualBlock, activation, conv_norm
from ensdef.errors import UsageError


class ResidualNetwork(Network):
    """Basic blocks in stages; every stage but the first halves height and width.

    Layers: 1 = stem, then two a block (first convolution, block sum), the last = logits.

    Args:
        stem: channels of the stem.
        stages: (channels, number of blocks) of each stage.
        kind: activation everywhere.
    Raises:
        UsageError: images smaller than 4x4.
    """

    def __init__(self, spec: ImageSpec, stem: int, stages: Sequence[tuple[int, int]], kind: Activation) -> None:
        super().__init__(spec)
        channels, height, width = spec.shape
        if min(height, width) < 4:
            raise UsageError(f"{type(self).__name__} needs images of at least 4x4, got {height}x{width}")
        self.stem = conv_norm(channels, stem, 3, 1)
        self.activation = activation(kind)
        self.blocks = nn.ModuleList()
        before = stem
        for number, (after, blocks) in enumerate(stages):
            for block in range(blocks):
                stride = 2 if number > 0 and block == 0 else 1
                self.blocks.append(ResidualBlock(before, after, stride, kind))
                before = after
        self.pool: nn.Module = nn.AdaptiveAvgPool2d(1)
        self.embedding_size = before
        self.classifier: nn.Module = nn.Linear(before, spec.num_classes)

    @property
    def num_layers(self) -> int:
        return 2 * len(self.blocks) + 2

    def trunk(self, x: Tensor) -> Iterator[Tensor]:
        h = self.stem(x)
        yield h
        for block in self.blocks:
            inner, h = block(self.activation(h))
            yield inner
            yield h

    def embed(self, last: Tensor) -> Tensor:
        embedding: Tensor = self.pool(self.activation(last)).flatten(1)
        return embedding
