"""Images on their way through an attack, as tensors with one row an (image, run)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from ensdef.attack import State

#: Convolution kernels for small batches round differently; smaller batches are padded up to this many rows.
SMALLEST_BATCH = 16


@dataclass
class Rows:
    """Work in progress, one row an (image, run): all tensors have the same leading dimension."""

    index: Tensor
    run: Tensor
    step: Tensor
    final: Tensor
    x: Tensor
    y: Tensor
    x_adv: Tensor
    candidate: Tensor
    state: State = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def select(self, rows: Tensor) -> Rows:
        picked = {item.name: getattr(self, item.name)[rows] for item in fields(self) if item.name != "state"}
        return Rows(**picked, state={name: value[rows] for name, value in self.state.items()})

    @staticmethod
    def join(parts: Iterable[Rows]) -> Rows:
        parts = [part for part in parts if len(part)]
        if len(parts) == 1:
            return parts[0]
        joined = {
            item.name: torch.cat([getattr(part, item.name) for part in parts])
            for item in fields(Rows)
            if item.name != "state"
        }
        return Rows(**joined, state={name: torch.cat([part.state[name] for part in parts]) for name in parts[0].state})


def finish(rows: Rows) -> Rows:
    """Rows to be judged at their last iterate."""
    rows.candidate = rows.x_adv
    rows.final = torch.ones_like(rows.final)
    return rows


def padding(rows: Rows) -> Tensor:
    """Row numbers that fill a small batch up with copies of its last row, (max(B, SMALLEST_BATCH),)."""
    return torch.arange(max(len(rows), SMALLEST_BATCH), device=rows.index.device).clamp(max=len(rows) - 1)
