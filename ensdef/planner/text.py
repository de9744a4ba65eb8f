"""A plan as a reader and as a program get it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ensdef.planner.plan import Plan, PlannedCell, PlannedTraining
from ensdef.planner.work import Work

#: Characters of a key that are shown.
SHOWN = 16


def cell_lines(plan: Plan) -> Iterator[str]:
    """A line a cell: what is left to do, defence, attack, images, key, and what the attack costs."""
    for planned in plan.cells:
        cell = planned.cell
        yield (
            f"{planned.state:17} {cell.training.model.method_call} seed {cell.training.setting.seed}  "
            f"{cell.attack.call} {cell.attack.norm or ''} {cell.attack.written or ''}  n={cell.samples}  "
            f"{cell.key[:SHOWN]}" + ("" if planned.state == "done" else "  " + _cost(planned))
        )


def summary_lines(plan: Plan, device: str) -> Iterator[str]:
    """Trainings, totals, and what they rest on; nothing for a plan with nothing to do."""
    if not plan.to_do:
        yield "nothing to do"
        return
    if plan.trainings:
        yield "trainings, each once:"
    for planned in plan.trainings:
        spec = planned.spec
        yield f"  {spec.model.method_call} seed {spec.setting.seed}  {spec.key[:SHOWN]}  {_cost(planned)}"
    total = plan.total
    least = "at least " if plan.unknown else ""
    where = "allocated on the GPU" if device == "cuda" else "of the whole process"
    yield (
        f"to do: {_count(len(plan.trainings), 'training')}, {_count(len(plan.to_do), 'cell')} of {len(plan.cells)}; "
        f"{least}{quantity(total.passes)} passes, {least}{duration(total.seconds)}, "
        f"memory {memory(total.memory)} ({where})"
    )
    if plan.unknown:
        yield f"not in these numbers: {_count(plan.unknown, 'item')} whose cost could not be told"
    yield (
        "times were measured just now, by short probes of the real work, and grow with whatever else runs here; passes "
        "are of one member over one image, forward and backward"
    )
    yield from plan.assumptions


def as_json(plan: Plan) -> dict[str, Any]:
    """JSON values: totals, trainings, cells, assumptions; seconds, passes by direction, bytes."""
    return {
        **_numbers(plan.total),
        "startup": plan.startup if plan.to_do else 0.0,
        "unknown": plan.unknown,
        "trainings": [
            {
                "key": planned.spec.key,
                "method": planned.spec.model.method_call,
                "seed": planned.spec.setting.seed,
                **_numbers(planned.work),
                "reason": planned.reason,
            }
            for planned in plan.trainings
        ],
        "cells": [
            {
                "key": planned.cell.key,
                "state": planned.state,
                "method": planned.cell.training.model.method_call,
                "seed": planned.cell.training.setting.seed,
                "attack": planned.cell.attack.call,
                "norm": planned.cell.attack.norm,
                "eps": planned.cell.attack.written,
                "n": planned.cell.samples,
                **_numbers(planned.work),
                "reason": planned.reason,
            }
            for planned in plan.cells
        ],
        "assumptions": list(plan.assumptions),
    }


def duration(seconds: float) -> str:
    """In the unit a reader would choose."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def quantity(count: float) -> str:
    """A count with three digits: ``1.23M``."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"


def memory(size: int) -> str:
    """Bytes in MiB or GiB."""
    if not size:
        return "unknown"
    return f"{size / 2**20:.0f} MiB" if size < 10 * 2**30 else f"{size / 2**30:.1f} GiB"


def _cost(planned: PlannedCell | PlannedTraining) -> str:
    if planned.work is None:
        return f"cost unknown ({planned.reason})"
    work = planned.work
    return f"{duration(work.seconds)}  {quantity(work.passes)} passes  {memory(work.memory)}"


def _numbers(work: Work | None) -> dict[str, Any]:
    if work is None:
        return dict.fromkeys(("seconds", "forwards", "backwards", "memory"))
    return {
        "seconds": round(work.seconds, 3),
        "forwards": round(work.forwards),
        "backwards": round(work.backwards),
        "memory": work.memory,
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
