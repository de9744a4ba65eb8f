"""What a model may return: log-scores that an attack can work with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ensdef.errors import PluginError


def check_scores(scores: Any, batch: int, owner: str = "predict", classes: int | None = None) -> None:
    """Refuse what cannot be attacked meaningfully.

    Raises:
        PluginError: not (B, C), other than ``classes`` classes, NaN or infinite, or rows that are probabilities.
    """
    if not isinstance(scores, Tensor) or scores.dim() != 2 or len(scores) != batch or scores.shape[1] < 2:
        came = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise PluginError(f"{owner} returned {came} for {batch} images; expected log-scores of shape ({batch}, C)")
    if classes is not None and scores.shape[1] != classes:
        raise PluginError(f"{owner} returned {scores.shape[1]} classes; expected {classes}")
    if not bool(torch.isfinite(scores).all()):
        raise PluginError(f"{owner} returned NaN or infinite scores; combine in log space (ensdef.combine)")
    if bool((scores >= 0).all()) and bool(((scores.sum(dim=1) - 1).abs() < 1e-4).all()):
        raise PluginError(f"{owner} returned probabilities (rows sum to 1); attacks need log-scores: return their log")


def claims(scores: Tensor, y: Tensor) -> Tensor:
    """Whether scores choose another class than the label, or are no numbers, (B,) bool."""
    return (scores.argmax(dim=1) != y) | ~torch.isfinite(scores).all(dim=1)
