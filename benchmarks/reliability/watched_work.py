"""A plug-in for ``kill.py``: defences and attacks that do what built-in ones do, and note every batch in a file.

A line of the file that ``ENSDEF_EVENTS`` names is an event: ``{"key": training or cell, "epoch": 3}`` for a batch of a
training, ``{"key": ..., "runs": [[id, run, step], ...]}`` or ``{"key": ..., "ids": [...]}`` for one of an attack,
``{"key": ..., "journal": seconds}`` for a state that was written. It is there when the process is killed just after.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ensdef
from ensdef import jobs
from ensdef.attack import State
from ensdef.defense import Batch, Terms
from ensdef.journal import Journal, Snapshot
from ensdef.losses import cross_entropy
from ensdef.registry import ATTACKS, METHODS
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.threat import Threat

#: Images of the batch with which a training's passes are counted when it is over: none of the training's own.
COUNTED = 8


def note(**event: Any) -> None:
    """Append an event; nothing where nobody asked for it."""
    if path := os.environ.get("ENSDEF_EVENTS"):
        with Path(path).open("a") as file:
            file.write(json.dumps({"key": WatchedJournal.key, "time": time.monotonic(), **event}) + "\n")


class WatchedJournal(Journal):
    """Notes whose state is kept, which is what is worked at, and how long every write took."""

    key = ""

    def __init__(self, path: Path, work: Mapping[str, Any], *rest: Any, **more: Any) -> None:
        super().__init__(path, work, *rest, **more)
        WatchedJournal.key = work["key"]

    def keep(self, snapshot: Callable[[], Snapshot]) -> bool:
        before = self.seconds
        if written := super().keep(snapshot):
            note(journal=self.seconds - before)
        return written


jobs.Journal = WatchedJournal  # type: ignore[misc]
note(loaded=True)


class Noting:
    """What both defences add to theirs."""

    epoch = 0

    def begin_epoch(self, epoch: int, rng: torch.Generator) -> None:
        self.epoch = epoch

    def loss(self, batch: Batch, progress: float) -> Terms | Iterator[Terms]:
        if len(batch.y) > COUNTED:
            note(epoch=self.epoch)
        return super().loss(batch, progress)  # type: ignore[misc, no-any-return]


@ensdef.register_defense("watched_adv")
class WatchedAdversarial(Noting, METHODS.get("adv_en")):  # type: ignore[misc]
    """``adv_en``, noted."""


@ensdef.register_defense("watched_nat")
class WatchedNatural(Noting, METHODS.get("nat")):  # type: ignore[misc]
    """``nat``, noted."""


@ensdef.register_attack("watched")
class Watched(ATTACKS.get("pgd")):  # type: ignore[misc]
    """``pgd``, noted."""

    def step(
        self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
    ) -> tuple[Tensor, State]:
        columns = (rng.ids.tolist(), rng.run.tolist(), rng.step.tolist())
        note(runs=sorted({*zip(*columns, strict=True)}))  # padding repeats the last row
        return super().step(target, x_adv, y, state, threat, rng)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class WholeParams:
    """Steps of the library's loop."""

    steps: int = 60


@ensdef.register_attack("watched_whole")
class WatchedWhole(ensdef.WholeAttack):
    """Signed gradient steps in a loop of its own, as a wrapped library has it, noted."""

    Params = WholeParams
    batch_size = 20

    def perturb(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> Tensor:
        note(ids=rng.ids.tolist())
        x_adv = x
        for _ in range(self.params.steps):
            x_adv = x_adv.detach().requires_grad_()
            gradient = torch.autograd.grad(cross_entropy(target(x_adv), y).sum(), x_adv)[0]
            x_adv = threat.project(x_adv.detach() + threat.eps / 10 * threat.ascent(gradient), x)
        return x_adv
