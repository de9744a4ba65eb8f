"""What the machine underneath can do: which convolution kernels are safe, and what running out of memory looks like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def safe_convolutions(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Train with oneDNN's kernels, which are faster, except where they are not safe.

    On CPUs without AVX-512, oneDNN's weight gradient of a 1x1 convolution in the channels-last layout writes past its
    buffer when the number of input channels is no multiple of 8 (seen with torch 2.15: 3 -> 16 and 4 -> 8 corrupt
    the heap, 16 -> 32 does not). Passes without weight gradients, as in attacks, are not affected.
    """
    if device.type == "cpu" and not _multiples_of_eight(module):
        before = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.set_flags(False)  # not flags(): it also sets tf32, which warns
        try:
            yield
        finally:
            torch.backends.mkldnn.set_flags(before)
    else:
        yield


def _multiples_of_eight(module: nn.Module) -> bool:
    return not any(
        isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) and part.in_channels % 8 for part in module.modules()
    )


#: What PyTorch and the libraries under it say when they get no memory.
_NO_MEMORY = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, NumPy or PyTorch could not get memory; of PyTorch only CUDA's allocator has a class for that."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(said in str(error) for said in _NO_MEMORY)


def free_memory() -> None:
    """Give back what PyTorch keeps for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
