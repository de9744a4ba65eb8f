"""A defence's first breath: build it and ask for scores, before anything expensive depends on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ensdef.build import build_defense
from ensdef.defense import EnsembleDefense
from ensdef.errors import PluginError, UsageError
from ensdef.specs import ModelSpec


def rehearse(spec: ModelSpec, x: Tensor) -> tuple[EnsembleDefense, Any]:
    """The untrained defence and its scores for a few images.

    Raises:
        UsageError: the method or architecture refuses the combination.
        PluginError: building or predicting raises.
    """
    try:
        defense = build_defense(spec)
        with torch.no_grad():
            return defense, defense.predict(x)
    except UsageError:
        raise
    except Exception as error:
        raise PluginError(
            f"{spec.method} on {spec.architecture} cannot predict {tuple(x.shape)} images: "
            f"{type(error).__name__}: {error}"
        ) from error
