"""The health report of one evaluation, whatever the model does while it is examined."""

from __future__ import annotations

import torch

from ensdef.health import basic
from ensdef.health.case import Case
from ensdef.health.catalogue import Finding, Tier, finding


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
            try:
                found.extend(look(case))
            except Exception as error:  # a strange model must not lose its result
                found.append(finding("unexamined", 0.0, f"{type(error).__name__}: {error}"))
    case.judge.forget()
    return found
