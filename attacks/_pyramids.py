"""The l2 moves of Square: pairs of pyramids of opposite sign, and energy shifted from one window to another."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ensdef.rng import KeyedRandom
from ensdef.threat import TINY


@lru_cache(maxsize=256)
def stamp(side: int) -> Tensor:
    """A pyramid in the upper half and a negative one in the lower half, of length 1 together, (side, side)."""
    upper = side // 2
    both = torch.cat([_pyramid(upper, side), -_pyramid(side - upper, side)])
    scaled: Tensor = both / both.norm()
    return scaled


def _pyramid(height: int, width: int) -> Tensor:
    """Falls with the distance d from the middle (the larger of both axes) as sum_{m > d} 1 / m^2; of length 1."""
    rows, columns = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    distance = torch.maximum(rows.abs()[:, None], columns.abs()[None, :])
    falls = 1 / torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float32) ** 2
    values = falls.flip(0).cumsum(0).flip(0)[distance]
    scaled: Tensor = values / values.norm().clamp_min(TINY)
    return scaled


def window(side: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Which pixels lie in a square that starts at (top, left), all (B,) -> (B, 1, height, width) bool."""
    rows = torch.arange(height, device=side.device) - top[:, None]
    columns = torch.arange(width, device=side.device) - left[:, None]
    inside = (rows >= 0) & (rows < side[:, None])
    across = (columns >= 0) & (columns < side[:, None])
    return inside[:, None, :, None] & across[:, None, None, :]


def place(side: Tensor, height: int, width: int, rng: KeyedRandom) -> tuple[Tensor, Tensor]:
    """Upper left corners of squares, every place in the image as likely, (B,) each."""
    return rng.bits() % (height - side + 1), rng.bits() % (width - side + 1)


def tiled(x: Tensor, rng: KeyedRandom) -> Tensor:
    """The start: a grid of at least five by five stamps, signs by channel and tile, upright or lying by tile.

    Returns:
        perturbation of length 1, like ``x`` (B, C, H, W).
    """
    channels, height, width = x.shape[1:]
    side = max(min(height, width) // 5, 1)
    down, across = height // side, width // side
    row = torch.arange(height, device=x.device) - (height - side * down) // 2
    column = torch.arange(width, device=x.device) - (width - side * across) // 2
    inside = ((row >= 0) & (row < side * down))[:, None] & ((column >= 0) & (column < side * across))[None, :]
    row, column = row.clamp(0, side * down - 1)[:, None], column.clamp(0, side * across - 1)[None, :]
    lying = rng.signs(down, across)[:, row // side, column // side] > 0
    signs = rng.signs(channels, down, across)[:, :, row // side, column // side]
    upright = stamp(side).to(x.device)
    pattern = torch.where(lying, upright[column % side, row % side], upright[row % side, column % side])
    return unit(pattern[:, None] * signs * inside)


def moved(x: Tensor, best: Tensor, eps: float, sides: list[int], choice: Tensor, rng: KeyedRandom) -> Tensor:
    """The proposal: one window is emptied, and its energy and what is unused goes into a stamp on another.

    Args:
        x, best: clean image and best point, (B, C, H, W).
        eps: l2 radius.
        sides: possible sides of the windows; ``choice`` (B,) says which one each image takes.
    """
    channels, height, width = x.shape[1:]
    side = torch.tensor(sides, device=x.device)[choice]
    (top, left), other = place(side, height, width, rng), place(side, height, width, rng)
    filled, emptied = window(side, top, left, height, width), window(side, *other, height, width)
    delta = best - x
    unused = (eps**2 - delta.square().sum(dim=(1, 2, 3), keepdim=True)).clamp_min(0) / channels
    energy = (delta * (filled | emptied)).square().sum(dim=(2, 3), keepdim=True)
    old = delta * filled
    fresh = _stamps(sides, choice, top, left, height, width, rng.signs() > 0)[:, None] * filled
    fresh = fresh * rng.signs(channels, 1, 1) + old / _plane_length(old)
    fresh = fresh / _plane_length(fresh) * (unused + energy).sqrt()
    return x + eps * unit(torch.where(filled, fresh, delta * ~emptied))


def unit(delta: Tensor) -> Tensor:
    """Length 1 for every image; zero stays zero."""
    return delta / delta.square().sum(dim=(1, 2, 3), keepdim=True).sqrt().clamp_min(TINY)


def _plane_length(delta: Tensor) -> Tensor:
    return delta.square().sum(dim=(2, 3), keepdim=True).sqrt().clamp_min(TINY)


def _stamps(
    sides: list[int], choice: Tensor, top: Tensor, left: Tensor, height: int, width: int, lying: Tensor
) -> Tensor:
    """Each image's stamp laid at its place, (B, height, width); outside its window the values mean nothing."""
    largest = max(sides)
    sheet = torch.zeros(len(sides), largest, largest, device=choice.device)
    for number, side in enumerate(sides):
        sheet[number, :side, :side] = stamp(side)
    row = (torch.arange(height, device=choice.device) - top[:, None]).clamp(0, largest - 1)[:, :, None]
    column = (torch.arange(width, device=choice.device) - left[:, None]).clamp(0, largest - 1)[:, None, :]
    turned = lying[:, None, None]
    return sheet[choice[:, None, None], torch.where(turned, column, row), torch.where(turned, row, column)]
