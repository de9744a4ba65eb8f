"""The memory layout a defence is trained in."""

from __future__ import annotations

import torch
from torch import nn


def training_layout(module: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels-last, which is faster, except where it is not safe.

    On CPUs without AVX-512, oneDNN's weight gradient of a 1x1 convolution in channels-last writes past its buffer
    when the number of input channels is no multiple of 8 (seen with torch 2.15: 3 -> 16 and 4 -> 8 corrupt the heap,
    16 -> 32 does not). Passes without weight gradients, as in attacks, are not affected.
    """
    if device.type == "cpu":
        for part in module.modules():
            if isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) and part.in_channels % 8:
                return torch.contiguous_format
    return torch.channels_last
