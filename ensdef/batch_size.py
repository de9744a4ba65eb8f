"""How many rows an attack pass takes, measured where it matters; no result depends on it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ensdef.backend import free_memory, is_out_of_memory
from ensdef.losses import margin
from ensdef.scores import check_scores
from ensdef.target import Target

#: On a CPU the time an image takes is flat from about 32 rows on: `python benchmarks/speed/batch_sizes.py`.
ON_CPU = 128
LARGEST = 4096
#: A doubling must save this share of the time an image takes.
WORTH = 0.1
#: Passes that are timed; the fastest counts.
TIMED = 3


def choose_batch_size(model: nn.Module, x: Tensor, device: str, clock: Callable[[], float] = time.perf_counter) -> int:
    """A fixed size on the CPU; elsewhere doubled for as long as an image gets cheaper and memory suffices.

    Args:
        model: images in [0, 1] -> (B, C) scores.
        x: images, (N, ...); they are repeated where more are needed.
        device: where the attack will run.
        clock: seconds; called before and after every pass that is timed.
    Returns:
        rows a pass, at most twice the number of images: more there would never be.
    Raises:
        PluginError: what the model returns are no log-scores.
    """
    return ON_CPU if device == "cpu" else fastest_batch_size(Target(model, device=device), x.to(device), clock)


def fastest_batch_size(target: Target, x: Tensor, clock: Callable[[], float] = time.perf_counter) -> int:
    """See :func:`choose_batch_size`; this one measures on any device."""
    check_scores(target(x[:1]), 1)
    best, cheapest, size = ON_CPU, float("inf"), ON_CPU
    while size <= max(ON_CPU, min(LARGEST, 2 * len(x))):
        rows = x[torch.arange(size, device=x.device) % len(x)]
        try:
            seconds = min(_seconds(target, rows, clock) for _ in range(1 + TIMED))  # the first warms up
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            break
        if seconds / size > (1 - WORTH) * cheapest:
            break
        best, cheapest, size = size, seconds / size, 2 * size
    target.forget()
    free_memory()
    return best


def _seconds(target: Target, x: Tensor, clock: Callable[[], float]) -> float:
    """One step of a gradient attack, or one pass where there is no gradient."""
    y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    began = clock()
    point = x.detach().requires_grad_()
    scores = target(point)
    if scores.requires_grad:
        torch.autograd.grad(margin(scores, y).sum(), point)
    if x.is_cuda:
        torch.cuda.synchronize()
    target.forget()
    return clock() - began
