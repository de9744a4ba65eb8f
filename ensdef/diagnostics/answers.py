"""What a defence and its members answer on a set of images: the input of most diagnostics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ensdef.defense import EnsembleDefense
from ensdef.errors import UsageError
from ensdef.folding import frozen_copy


@dataclass(frozen=True)
class Answers:
    """Answers on N images.

    Args:
        scores: log-scores of the defence's own rule, (N, C).
        logits: of every member, (K, N, C).
        selection: log-weights of the members, (N, K); None for a defence that does not choose among them.
    """

    scores: Tensor
    logits: Tensor
    selection: Tensor | None


def answer(defense: EnsembleDefense, x: Tensor, batch_size: int = 256) -> Answers:
    """Ask a defence in eval mode, without gradient; it is left untouched.

    Args:
        x: images in [0, 1] on the device of the defence, (N, ...), N at least 1.
        batch_size: images a pass.
    """
    if not len(x):
        raise UsageError("there are no images to ask the defence about; expected at least 1")
    model = frozen_copy(defense)
    assert isinstance(model, EnsembleDefense)
    scores, logits, selection = [], [], []
    with torch.no_grad():
        for part in x.split(batch_size):
            scores.append(model(part))
            logits.append(model.member_logits(part))
            selection.append(model.selection(part))
    chosen = [part for part in selection if part is not None]
    return Answers(torch.cat(scores), torch.cat(logits, dim=1), torch.cat(chosen) if chosen else None)


def right(scores: Tensor, y: Tensor) -> Tensor:
    """Whether finite scores choose the label, (..., N, C) and (N,) -> (..., N) bool."""
    return torch.isfinite(scores).all(dim=-1) & (scores.argmax(dim=-1) == y)
