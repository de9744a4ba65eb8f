"""Resizing of 8-bit images held as tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ensdef.errors import DataError

#: Images resized at once: 64 MB of float32 for 128x128 RGB, where the whole of CIFAR would take 10 GB.
CHUNK = 340


def check_size(image_size: int | None) -> None:
    """Refuse sides below one pixel.

    Raises:
        DataError: ``image_size`` is below 1.
    """
    if image_size is not None and image_size < 1:
        raise DataError(f"image size is {image_size}; expected a side of at least 1 pixel")


def resized(images: Tensor, image_size: int | None) -> Tensor:
    """Square images of another size, bilinear with antialias.

    Args:
        images: (N, C, H, W), uint8.
        image_size: side in pixels; None: as they are.
    Returns:
        (N, C, image_size, image_size), uint8, rounded.
    Raises:
        DataError: ``image_size`` is below 1.
    """
    check_size(image_size)
    if image_size is None or images.shape[2:] == (image_size, image_size):
        return images
    result = torch.empty(*images.shape[:2], image_size, image_size, dtype=torch.uint8)
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK].float()
        chunk = F.interpolate(chunk, size=(image_size, image_size), mode="bilinear", antialias=True)
        # float rounding may leave [0, 255] by a hair, which would wrap around
        result[start : start + CHUNK] = chunk.round_().clamp_(0, 255)
    return result
