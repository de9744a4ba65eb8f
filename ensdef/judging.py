"""What the true model answers, and whether that is right: what every verdict of a record rests on."""

from __future__ import annotations

import torch
from torch import Tensor

from ensdef.backend import free_memory, is_out_of_memory
from ensdef.rows import SMALLEST_BATCH
from ensdef.scores import check_scores
from ensdef.target import Target

#: Scores this close, relative to their size, may change places between kernels, batch sizes and machines.
BORDERLINE = 1e-5


def scores_of(judge: Target, x: Tensor, batch_size: int, check: bool = True) -> Tensor:
    """Scores of the true model, (N, C); in smaller batches where memory does not suffice.

    Args:
        x: images, (N, ...), on the judge's device.
        check: refuse scores that cannot be attacked meaningfully.
    """
    try:
        return _in_batches(judge, x, batch_size, check)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or batch_size <= SMALLEST_BATCH:
            raise
    judge.forget()
    free_memory()
    return scores_of(judge, x, batch_size // 2, check)


def _in_batches(judge: Target, x: Tensor, batch_size: int, check: bool) -> Tensor:
    scores = []
    judge.passes.share = 1.0
    for part in x.split(batch_size):
        rows = torch.arange(max(len(part), SMALLEST_BATCH), device=x.device).clamp(max=len(part) - 1)
        with torch.no_grad():
            answer = judge(part[rows].contiguous())
        judge.forget()
        if check:
            check_scores(answer, len(rows))
        scores.append(answer[: len(part)])
    return torch.cat(scores)


def is_right(scores: Tensor, y: Tensor) -> Tensor:
    """Whether finite scores choose the label, (N,) bool."""
    return torch.isfinite(scores).all(dim=1).logical_and(scores.argmax(dim=1) == y)


def is_borderline(scores: Tensor, y: Tensor) -> Tensor:
    """Whether rounding decides between the label and the best other class, (N,) bool.

    A tie to the last bit is none: the first class wins it everywhere. Nor are scores that are no numbers.
    """
    own = scores.gather(1, y.unsqueeze(1)).squeeze(1)
    other = scores.scatter(1, y.unsqueeze(1), -torch.inf).amax(dim=1)
    size = torch.maximum(own.abs(), other.abs())
    close = (own != other) & ((own - other).abs() <= BORDERLINE * size)
    return close & torch.isfinite(scores).all(dim=1)
