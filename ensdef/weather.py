"""Fog and snow on images in [0, 1], as the released code of MoRE (arXiv:2104.10586) draws them: no depth map, 8-bit
colours. The code follows Ozdag et al. (2019), who divide the density by a depth that such images do not have.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ensdef.errors import UsageError

#: Of a level; keeps a colour that is an 8-bit level up to float rounding from falling to the one below.
SLACK = 1e-3


def fog(x: Tensor, density: float, light: float, quantize: bool = True) -> Tensor:
    """tau x + (1 - tau) light with transmission tau = sigmoid(-density).

    Args:
        x: images in [0, 1], (B, ...), any number of channels.
        density: t in paper and code; any number.
        light: colour of the fog, in [0, 1].
        quantize: floor to 8 bits, as an image file would.
    Returns:
        (B, ...), in [0, 1].
    """
    tau = 0.5 * (1.0 - math.tanh(0.5 * density))  # the sigmoid, without an overflow at either end
    foggy = tau * x + (1.0 - tau) * light
    return _levels(foggy) / 255.0 if quantize else foggy


def snow(x: Tensor, u: Tensor, brightness: float) -> Tensor:
    """Multiply the lightness of pixels darker than s = 85 + 127.5 u, of 255, by ``brightness``.

    In 8-bit HLS, as OpenCV keeps it: hue in steps of 2 degrees, lightness and saturation of 255, rounded; the new
    lightness is floored, at most 255. So a colour may come back a few levels off. A single channel is its own
    lightness: it becomes what the same grey would become in RGB.

    Args:
        x: images in [0, 1], (B, 3, H, W) or (B, 1, H, W); floored to 8 bits first.
        u: one draw from [0, 1) an image, (B,).
        brightness: factor of at least 1 ("darkness" in the paper).
    Returns:
        like ``x``, in [0, 1], on 8-bit levels.
    Raises:
        UsageError: images of another shape.
    """
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise UsageError(f"snow falls on images (B, 3, H, W) or (B, 1, H, W), got {tuple(x.shape)}")
    hue, lightness, saturation = _hls(_levels(x).expand(-1, 3, -1, -1))
    dark = lightness < (85.0 + 127.5 * u).view(-1, 1, 1)
    raised = torch.where(dark, (lightness * brightness + SLACK).floor().clamp(max=255.0), lightness)
    return _rgb(hue, raised, saturation)[:, : x.shape[1]] / 255.0


def _levels(x: Tensor) -> Tensor:
    """8-bit levels, as whole numbers 0 ... 255 in floating point."""
    return (255.0 * x + SLACK).floor().clamp(0.0, 255.0)


def _hls(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit RGB (B, 3, H, W) -> hue (0 ... 180), lightness, saturation (0 ... 255), whole numbers, (B, H, W) each.

    One division each of whole numbers that float32 holds exactly, so that every device rounds alike, ties included.
    """
    red, green, blue = rgb.unbind(1)
    high, low = rgb.amax(dim=1), rgb.amin(dim=1)
    span, total = high - low, high + low
    width = span.clamp_min(1.0)
    hue = torch.where(
        high == red,
        30.0 * (green - blue) / width,
        torch.where(high == green, 60.0 + 30.0 * (blue - red) / width, 120.0 + 30.0 * (red - green) / width),
    )
    saturation = 255.0 * span / torch.minimum(total, 510.0 - total).clamp_min(1.0)
    return (hue % 180.0).round(), (0.5 * total).round(), saturation.round()


def _rgb(hue: Tensor, lightness: Tensor, saturation: Tensor) -> Tensor:
    """The way back, (B, H, W) each -> (B, 3, H, W), rounded; as exact as the way there."""
    room = torch.minimum(lightness, 255.0 - lightness)
    channels = []
    for offset in (0.0, 120.0, 60.0):
        sector = (offset + hue) % 180.0
        ramp = torch.minimum(sector - 45.0, 135.0 - sector).clamp(-15.0, 15.0)
        channels.append(lightness - saturation * room * ramp / 3825.0)
    return torch.stack(channels, dim=1).round()
