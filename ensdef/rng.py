"""Random numbers that belong to an image, not to a batch.

Every draw is a hash of (seed, image id, run, step, how many draws came before, coordinate). So batch size, order,
dropped rows and the number of workers cannot change a draw, and CPU and GPU agree bit for bit.
The mixer is SplitMix64 (Steele, Lea and Flood 2014), evaluated with int64 tensor arithmetic.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = x * 1 + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


class KeyedRandom:
    """One stream of random numbers an image.

    Args:
        seed: the attack seed.
        ids: image ids, (B,), int64.
        run: which restart (or restart and target) of the attack, an int or (B,).
        step: which step of the run, an int or (B,).
    Every method returns a tensor with leading dimension B on the device of ``ids``. Two draws in a row differ; the
    same draws after ``at(run, step)`` with equal arguments are equal.
    """

    def __init__(self, seed: int, ids: Tensor, run: int | Tensor = 0, step: int | Tensor = 0) -> None:
        self.seed = seed
        self.ids = ids.to(torch.int64)
        self.run = run if isinstance(run, Tensor) else torch.full_like(self.ids, run)
        self.step = step if isinstance(step, Tensor) else torch.full_like(self.ids, step)
        self._draws = 0

    def at(self, run: int | Tensor | None = None, step: int | Tensor | None = None) -> KeyedRandom:
        """The same images at another run or step, from its first draw."""
        return KeyedRandom(self.seed, self.ids, self.run if run is None else run, self.step if step is None else step)

    @cached_property
    def _stream(self) -> Tensor:
        """What all draws of this step have in common, (B,)."""
        key = _mix(torch.full_like(self.ids, self.seed))
        for part in (self.ids, self.run, self.step):
            key = _mix(key ^ part)
        return key

    def bits(self, *shape: int) -> Tensor:
        """63 random bits an entry, int64, non-negative, (B, *shape)."""
        key = _mix(self._stream ^ self._draws)
        self._draws += 1
        coordinates = torch.arange(math.prod(shape), device=self.ids.device) * _GOLDEN
        drawn = _shift(_mix(key[:, None] + coordinates[None, :]), 1)
        return drawn.view(len(self.ids), *shape)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform in [low, high), float32, (B, *shape)."""
        drawn = (self.bits(*shape) >> 39).to(torch.float32).mul_((high - low) / 2**24).add_(low)
        return drawn.clamp_(max=float(torch.nextafter(torch.tensor(high), torch.tensor(low))))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float32, (B, *shape), by Box and Muller."""
        radius = torch.sqrt(-2 * torch.log1p(-self.uniform(*shape)))
        return radius * torch.cos(2 * math.pi * self.uniform(*shape))

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high), int64, (B, *shape)."""
        return self.bits(*shape) % high

    def signs(self, *shape: int) -> Tensor:
        """-1 or +1 with equal odds, float32, (B, *shape)."""
        return (self.bits(*shape) >> 62).to(torch.float32).mul_(2).sub_(1)


class Random(Protocol):
    """What a random start may draw: leading dimension B, float32."""

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor: ...

    def normal(self, *shape: int) -> Tensor: ...


class BatchRandom:
    """The draws of :class:`Random` from an ordinary generator, for training batches of ``size`` images.

    With ``rows``, those of a part of the batch: drawn for the whole batch all the same, so that every process of a
    training gets its own part of the same draws.
    """

    def __init__(self, generator: torch.Generator, size: int, rows: slice = slice(None)) -> None:
        self.generator = generator
        self.size = size
        self.rows = rows

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform in [low, high), float32, (size, *shape), or as many as ``rows`` are."""
        drawn = torch.rand(self.size, *shape, generator=self.generator, device=self.generator.device)
        return drawn[self.rows].mul_(high - low).add_(low)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float32, (size, *shape), or as many as ``rows`` are."""
        drawn = torch.randn(self.size, *shape, generator=self.generator, device=self.generator.device)
        return drawn[self.rows]


def derived_generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator that depends on the whole key, so (seed, epoch, batch) can be resumed anywhere."""
    state = torch.zeros(1, dtype=torch.int64)
    for part in key:
        state = _mix(state ^ part)
    return torch.Generator(device).manual_seed(int(_shift(state, 1)))
