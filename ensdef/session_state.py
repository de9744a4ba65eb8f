"""What a session is made of between two batches, so that another process can go on with it to the same record."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ensdef.journal import Snapshot
from ensdef.rows import Rows
from ensdef.search import UnderWay
from ensdef.session import Session

#: By image.
_OUTCOMES = ("x_adv", "fooled", "broken_by")
_COUNTERS = ("forwards", "backwards", "nonfinite")


def snapshot(session: Session) -> Snapshot:
    """The session's part of a cell's state."""
    tensors: dict[str, Tensor] = {name: getattr(session, name) for name in _OUTCOMES}
    values: dict[str, Any] = {name: getattr(session, name) for name in _COUNTERS}
    if session.observer is not None:
        seen, told = session.observer.state()
        tensors |= {f"observer.{name}": value for name, value in seen.items()}
        values["observer"] = told
    if session.under_way is not None:
        begun = session.under_way()
        values["under way"] = {
            "waiting": list(begun.waiting),
            "surprises": begun.surprises,
            "forwards": begun.forwards,
            "backwards": begun.backwards,
        }
        for place in ("active", "aside"):
            if rows := [part for part in getattr(begun, place) if len(part)]:
                tensors |= {f"{place}.{name}": value for name, value in _tensors_of(Rows.join(rows)).items()}
    return Snapshot(tensors, values)


def restore(session: Session, kept: Snapshot) -> UnderWay | None:
    """Bring a new session to where another process left it; returns what the attack had in hand, if one was at work.

    Raises:
        KeyError, ValueError, RuntimeError: the state is not one of this session.
    """
    device = session.x.device
    for name in _OUTCOMES:
        getattr(session, name).copy_(kept.tensors[name])
    for name in _COUNTERS:
        setattr(session, name, kept.values[name])
    if session.observer is not None:
        seen = {name: value.to(device) for name, value in kept.under("observer.").items()}
        session.observer.restore(seen, kept.values["observer"])
    told = kept.values.get("under way")
    if told is None:
        return None
    begun = UnderWay(
        [(index, run) for index, run in told["waiting"]],
        surprises=told["surprises"],
        forwards=told["forwards"],
        backwards=told["backwards"],
    )
    for place in ("active", "aside"):
        if tensors := kept.under(f"{place}."):
            getattr(begun, place).append(_rows_of(Snapshot(tensors), device))
    return begun


def _tensors_of(rows: Rows) -> dict[str, Tensor]:
    own = {item.name: getattr(rows, item.name) for item in dataclasses.fields(Rows) if item.name != "state"}
    return own | {f"state.{name}": value for name, value in rows.state.items()}


def _rows_of(tensors: Snapshot, device: torch.device) -> Rows:
    state = {name: value.to(device) for name, value in tensors.under("state.").items()}
    own = {name: value.to(device) for name, value in tensors.tensors.items() if not name.startswith("state.")}
    return Rows(**own, state=state)
