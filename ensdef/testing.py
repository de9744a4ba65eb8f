"""What plug-in authors test with: the contract checks behind ``ensdef check``, and toys with known answers."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ensdef.adversary import Adversary
from ensdef.defense import EnsembleDefense
from ensdef.errors import UsageError, suggest
from ensdef.journal import Journal, Snapshot
from ensdef.recipe import InnerAttack
from ensdef.registry import ATTACKS, METHODS

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """The verdict of one contract check; ``message`` says what to do when it failed."""

    check: str
    ok: bool
    message: str = ""


class Broken(AssertionError):
    """A contract clause does not hold; the message names the fix."""


def expect(condition: bool, message: str) -> None:
    """Raise :class:`Broken` unless the clause holds."""
    if not condition:
        raise Broken(message)


def check_plugin(name: str) -> list[Finding]:
    """Run the contract of a registered defence or attack.

    Raises:
        UsageError: no defence or attack has this name.
    """
    from ensdef.contract_attack import ATTACK_CHECKS
    from ensdef.contract_defense import DEFENSE_CHECKS

    if name in METHODS.names():
        return _run(name, DEFENSE_CHECKS)
    if name in ATTACKS.names():
        return _run(name, ATTACK_CHECKS)
    raise UsageError(suggest("method or attack", name, [*METHODS.names(), *ATTACKS.names()]))


def is_frozen(cls: Any) -> bool:
    """Whether a class is a frozen dataclass."""
    return dataclasses.is_dataclass(cls) and bool(getattr(cls, "__dataclass_params__").frozen)  # noqa: B009


def _run(name: str, checks: Sequence[Callable[[str], None]]) -> list[Finding]:
    findings = []
    for check in checks:
        title = check.__name__.removeprefix("check_").replace("_", " ")
        try:
            check(name)
            findings.append(Finding(title, True))
        except (Broken, UsageError) as error:
            findings.append(Finding(title, False, str(error)))
        except Exception as error:
            findings.append(Finding(title, False, f"{type(error).__name__}: {error}"))
        if not findings[-1].ok and check is checks[0]:
            break  # what cannot be built cannot be checked further
    return findings


class Stopped(Exception):
    """Stands for the end of a process in the middle of its work."""


class StoppingJournal(Journal):
    """A journal that writes at every moment, and stops the work after so many; None: never."""

    def __init__(self, path: Path, moments: int | None = None, work: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, {"key": "toy", **(work or {})}, wait=0.0, share=math.inf)
        self.moments = moments

    def keep(self, snapshot: Callable[[], Snapshot]) -> bool:
        written = super().keep(snapshot)
        if self.written == self.moments:
            raise Stopped
        return written


def stopped_and_resumed(work: Callable[[Journal], T], moments: int) -> T:
    """What comes of work that is stopped after so many moments of its journal, and goes on in what is a new process.

    Args:
        work: keeps its state in the journal that it is given.
    """
    with tempfile.TemporaryDirectory(prefix="ensdef-") as folder:
        path = Path(folder) / "work.journal"
        with contextlib.suppress(Stopped):
            return work(StoppingJournal(path, moments))
        return work(StoppingJournal(path))


def lend_adversary(
    defense: EnsembleDefense, eps: float = 0.1, norm: str = "linf", seed: int = 0, attack: InnerAttack | None = None
) -> Adversary:
    """Give a defence the inner adversary that the trainer would, for tests of its loss."""
    adversary = Adversary(defense, attack or InnerAttack(steps=3), norm, (eps, eps))
    adversary.begin_batch(torch.Generator().manual_seed(seed))
    defense.lend(adversary)
    return adversary


class LinearClassifier(nn.Module):
    """Scores W x + b of flattened images: every attack's optimum is known in closed form.

    Args:
        weight: (C, D).
        bias: (C,); default zeros.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight)) if bias is None else bias)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias

    def worst_margins(self, x: Tensor, y: Tensor, eps: float) -> Tensor:
        """Smallest reachable score difference true - wrong in an linf ball inside the box, (N, C), inf at y.

        For each wrong class t the best point moves every pixel against D = w_y - w_t by as much as ball and box allow.
        """
        flat = x.flatten(1).double()
        weight, bias = self.weight.detach().double(), self.bias.detach().double()
        direction = weight[y][:, None] - weight[None]
        down, up = flat.clamp(max=eps), (1 - flat).clamp(max=eps)
        room = torch.where(direction > 0, down[:, None], up[:, None])
        scores = flat @ weight.T + bias
        margins = scores.gather(1, y[:, None]) - scores - (direction.abs() * room).sum(dim=2)
        return margins.scatter(1, y[:, None], torch.inf)

    def exactly_robust(self, x: Tensor, y: Tensor, eps: float) -> Tensor:
        """Whether no point of the linf ball inside the box is misclassified, (N,) bool."""
        return (self.worst_margins(x, y, eps) > 0).all(dim=1)
