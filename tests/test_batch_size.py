"""The batch size of attack passes: fixed on the CPU, elsewhere the largest that pays, found by timing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toys_queries import images, linear

from ensdef.batch_size import LARGEST, ON_CPU, choose_batch_size, fastest_batch_size
from ensdef.target import Target


class Clock:
    """Time stands still but for passes: ``cost`` seconds for so many rows."""

    def __init__(self, overhead: float, each: float) -> None:
        self.overhead, self.each = overhead, each
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed(nn.Module):
    """A linear model whose passes move a clock; above ``most`` rows there is no memory."""

    def __init__(self, clock: Clock, most: int = 10**6) -> None:
        super().__init__()
        self.model, self.clock, self.most = linear(10), clock, most

    def __deepcopy__(self, memo: dict[int, object]) -> Timed:
        return Timed(self.clock, self.most)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.clock.now += self.clock.overhead + self.clock.each * len(x)
        scores: Tensor = self.model(x)
        return scores


def fastest(overhead: float, each: float, count: int = 10_000, most: int = 10**6) -> int:
    clock = Clock(overhead, each)
    return fastest_batch_size(Target(Timed(clock, most)), images(count), clock)


@pytest.mark.parametrize(
    ("overhead", "expected"),
    # an image costs 1 + overhead / rows: doubling saves a tenth of it while overhead / rows > 0.25
    [(0.0, 128), (16.0, 128), (40.0, 256), (100.0, 512), (10_000.0, LARGEST)],
)
def test_it_doubles_while_an_image_gets_a_tenth_cheaper(overhead: float, expected: int) -> None:
    assert fastest(overhead, 1.0) == expected


def test_it_stops_where_memory_ends() -> None:
    assert fastest(10_000.0, 1.0, most=600) == 512
    assert fastest(10_000.0, 1.0, most=100) == ON_CPU, "the attack itself will go on halving"


def test_it_looks_no_further_than_the_images_go() -> None:
    assert fastest(10_000.0, 1.0, count=200) == 256
    assert fastest(10_000.0, 1.0, count=5) == ON_CPU


def test_on_the_cpu_nothing_is_measured() -> None:
    clock = Clock(10_000.0, 1.0)
    assert choose_batch_size(Timed(clock), images(500), "cpu", clock) == ON_CPU
    assert clock.now == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu_it_is_measured() -> None:
    size = choose_batch_size(linear(10), images(2000), "cuda")
    assert size in (128, 256, 512, 1024, 2048)
