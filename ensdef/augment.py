"""Augmentation of whole batches on the device: images in [0, 1], (B, C, H, W), and a generator in, images out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ensdef import weather
from ensdef.recipe import check_augmentation


def crop(x: Tensor, rng: torch.Generator) -> Tensor:
    """Zero-pad by an eighth of the side (4 pixels at 32) and crop at random, each image by itself."""
    pad = max(1, x.shape[-1] // 8)
    return _window(F.pad(x, (pad, pad, pad, pad)), x.shape, 2 * pad + 1, rng)


def shift(x: Tensor, rng: torch.Generator) -> Tensor:
    """Shift by up to 10 % of the side, edges replicated, bilinear (CCE, ADP: Keras' shift with nearest fill)."""
    batch = len(x)
    offset = (torch.rand(batch, 2, generator=rng, device=x.device) - 0.5) * 0.2 * 2
    theta = torch.zeros(batch, 2, 3, device=x.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1
    theta[:, :, 2] = offset
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def flip(x: Tensor, rng: torch.Generator) -> Tensor:
    """Mirror every other image left to right."""
    coin = torch.rand(len(x), 1, 1, 1, generator=rng, device=x.device) < 0.5
    return torch.where(coin, x.flip(-1), x)


def noise(x: Tensor, rng: torch.Generator) -> Tensor:
    """Gaussian noise of standard deviation 0.045 on every other image, not clipped (GAL, CLDL)."""
    coin = torch.rand(len(x), 1, 1, 1, generator=rng, device=x.device) < 0.5
    drawn = torch.randn(x.shape, generator=rng, device=x.device) * 0.045
    return torch.where(coin, x + drawn, x)


def fog(x: Tensor, rng: torch.Generator, density: float, light: float) -> Tensor:
    """Every image in the same fog (MoRE); see :func:`ensdef.weather.fog`."""
    return weather.fog(x, density, light)


def snow(x: Tensor, rng: torch.Generator, brightness: float) -> Tensor:
    """Snow on every image (MoRE), with one draw an image; see :func:`ensdef.weather.snow`."""
    return weather.snow(x, torch.rand(len(x), generator=rng, device=x.device), brightness)


_BY_NAME: Mapping[str, Callable[..., Tensor]] = {
    "crop": crop,
    "shift": shift,
    "flip": flip,
    "noise": noise,
    "fog": fog,
    "snow": snow,
}


def parse(text: str) -> list[Callable[[Tensor, torch.Generator], Tensor]]:
    """``"crop+fog[light=0.8]"`` -> functions of (images, generator), in order; ``"none"`` -> []."""
    return [
        partial(_BY_NAME[name], **options) if options else _BY_NAME[name] for name, options in check_augmentation(text)
    ]


def _window(padded: Tensor, shape: torch.Size, positions: int, rng: torch.Generator) -> Tensor:
    batch, _, height, width = shape
    top, left = torch.randint(positions, (2, batch), generator=rng, device=padded.device)
    rows = top[:, None] + torch.arange(height, device=padded.device)
    columns = left[:, None] + torch.arange(width, device=padded.device)
    index = torch.arange(batch, device=padded.device)[:, None, None]
    # (B, H, W, C): advanced indices move to the front
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
