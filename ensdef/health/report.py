"""The health report of one evaluation, whatever the model does while it is examined."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch

from ensdef.backend import free_memory, is_out_of_memory
from ensdef.health import basic
from ensdef.health.case import Case
from ensdef.health.catalogue import Finding, Tier, finding
from ensdef.rows import SMALLEST_BATCH


def report(case: Case, tier: Tier) -> list[Finding]:
    """All findings of a tier; where an examination fails, what it had found by then, and that it failed."""
    if tier == "off" or not case.n:
        return []
    looks = [basic.findings]
    if tier == "full":
        from ensdef.health import full

        looks.append(full.findings)
    found: list[Finding] = []
    # a model that draws shall not draw otherwise after its examination
    with torch.random.fork_rng():
        for look in looks:
            found += _found(look, case)
    case.judge.forget()
    return found


def _found(look: Callable[[Case], Iterable[Finding]], case: Case) -> list[Finding]:
    found: list[Finding] = []
    try:
        for one in look(case):
            found.append(one)
    except Exception as error:  # a strange model must not lose its result
        smaller = case.batch_size // 2
        if not is_out_of_memory(error) or smaller < SMALLEST_BATCH:
            return [*found, finding("unexamined", 0.0, f"{type(error).__name__}: {error}")]
    else:
        return found
    case.judge.forget()
    free_memory()
    return _found(look, dataclasses.replace(case, batch_size=smaller))
