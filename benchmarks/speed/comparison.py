"""One attack, several engines, in turns: what each left of the model, how long it took, and how they compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch
from machine import multiplies_bf16
from subject import Subject, right
from tabulate import tabulate
from torch import Tensor, nn

from ensdef.attack_spec import AttackSpec
from ensdef.harness import attack_model
from ensdef.health.catalogue import Tier
from ensdef.metrics import binomial_stderr
from ensdef.notation import fraction

#: Engines that together take less than this (seconds) are run in turns three times; the median counts.
SHORT, TURNS = 8.0, 3
#: Points farther away than this beyond the radius are no successes.
SLACK = 1e-5


@dataclass(frozen=True)
class Answer:
    """What an engine left of a model.

    Args:
        robust: recounted by a fresh pass of the untouched model in fp32, (N,) bool.
        seconds: theirs: the attack alone; ours: clean pass, copies, attack and recount.
        forwards, backwards: passes of the whole ensemble in those seconds, summed over images; backwards None: not
            counted.
        unconfirmed: images taken for fooled that the recount did not confirm.
    """

    robust: Tensor
    seconds: float
    forwards: float
    backwards: float | None = None
    unconfirmed: int = 0

    @property
    def accuracy(self) -> float:
        return float(self.robust.float().mean())


Engine = Callable[[], Answer]
#: Offers adversarial points for images and labels at a radius: one tensor for each run of the attack.
Library = Callable[[nn.Module, Tensor, Tensor, float], Sequence[Tensor]]


@dataclass(frozen=True)
class Row:
    """One line of the table of claims; what does not apply is None."""

    what: str
    engine: str
    robust: float | None = None
    forwards: float | None = None
    seconds: float | None = None
    against: str = ""
    faster: float | None = None
    aim: float | None = None
    agrees: str = ""
    unconfirmed: int | None = None

    def cells(self) -> dict[str, str]:
        """By column."""
        return {
            "what": self.what,
            "engine": self.engine,
            "robust": "" if self.robust is None else f"{self.robust:.1%}",
            "passes": "" if self.forwards is None else f"{self.forwards:,.0f}",
            "seconds": "n/a" if self.seconds is None else f"{self.seconds:.2f}",
            "times faster": "" if self.faster is None else f"{self.faster:.2f}",
            "than": self.against,
            "aim": "" if self.aim is None else f"{self.aim:g}",
            "agrees": self.agrees,
            "unconfirmed": "" if self.unconfirmed is None else str(self.unconfirmed),
        }


@dataclass(frozen=True)
class Comparison:
    """The rows of one attack, and the answers behind them by engine."""

    rows: list[Row]
    answers: Mapping[str, Answer] = field(default_factory=dict)


def table(rows: Sequence[Row]) -> str:
    """The table of claims, as Markdown."""
    return table_of([row.cells() for row in rows])


def table_of(cells: Sequence[Mapping[str, str]]) -> str:
    """Rows by column, as Markdown."""
    return tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True)


def compare(
    what: str,
    libraries: Mapping[str, Engine],
    ours: Mapping[str, Engine | None],
    aims: Mapping[str, Mapping[str, float]],
) -> Comparison:
    """Run all engines in turns; ours stand beside every library.

    Args:
        libraries: engines to compare with, by name.
        ours: by search mode; None: cannot be measured on this machine.
        aims: how many times faster we aim to be, by library and search mode.
    """
    engines = {**libraries, **{f"ensdef, {mode}": engine for mode, engine in ours.items() if engine is not None}}
    taken = {name: [engine()] for name, engine in engines.items()}
    if sum(answers[0].seconds for answers in taken.values()) < SHORT:
        for _ in range(TURNS - 1):
            for name, engine in engines.items():
                taken[name].append(engine())
    seconds = {name: median(answer.seconds for answer in answers) for name, answers in taken.items()}
    first = {name: answers[0] for name, answers in taken.items()}
    rows = []
    for library in libraries:
        rows.append(_row(what, library, first[library], seconds[library]))
    for library in libraries:
        for mode in ours:
            name, aim = f"ensdef, {mode}", aims.get(library, {}).get(mode)
            if name not in first:
                rows.append(Row(what, name, against=library, aim=aim))
                continue
            verdict = agreement(first[name].robust, first[library].robust)
            rows.append(_row(what, name, first[name], seconds[name], against=library, aim=aim, agrees=verdict,
                             faster=seconds[library] / seconds[name], unconfirmed=first[name].unconfirmed))  # fmt: skip
    return Comparison(rows, first)


def _row(what: str, engine: str, answer: Answer, seconds: float, **more: object) -> Row:
    return Row(what, engine, answer.accuracy, answer.forwards / len(answer.robust), seconds, **more)  # type: ignore[arg-type]


def agreement(ours: Tensor, theirs: Tensor) -> str:
    """``equal`` or ``lower`` robust accuracy, higher ``within 1 s.e.`` of theirs, or ``no``."""
    difference = (int(ours.sum()) - int(theirs.sum())) / len(theirs)
    if difference <= 0:
        return "equal" if difference == 0 else "lower"
    return "within 1 s.e." if difference <= binomial_stderr(float(theirs.float().mean()), len(theirs)) else "no"


def library(subject: Subject, attack: Library, norm: str, *, right_only: bool = True, batch_size: int = 128) -> Engine:
    """An engine of somebody else's, on the bare module; ``right_only``: it is given the images that are right."""

    def run() -> Answer:
        model, clean = subject.model, subject.clean
        given = clean.nonzero().squeeze(1) if right_only else torch.arange(len(subject))
        x, y, eps = subject.x[given], subject.y[given], float(fraction(subject.eps[norm], "eps"))
        torch.manual_seed(0)
        with _counted(model) as passes:
            began = time.perf_counter()
            parts = [attack(model, a, b, eps) for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True)]
            seconds = time.perf_counter() - began
        robust = clean.clone()
        for points in zip(*parts, strict=True):
            offered = torch.cat(points)
            inside = torch.where(within(offered, x, norm, eps), offered, x)
            robust[given] &= right(model, inside, y)
        return Answer(robust, seconds, passes[0])

    return run


def searches(
    subject: Subject, attack: str, norm: str, modes: Sequence[str], *, health: Tier = "off", **params: object
) -> dict[str, Engine | None]:
    """Our engine in each search mode; None where the machine has no instructions for it."""

    def engine(mode: str) -> Engine:
        spec = AttackSpec.create(attack, params, norm, subject.eps[norm], search=mode)

        def run() -> Answer:
            began = time.perf_counter()
            outcome = attack_model(subject.model, subject.x, subject.y, spec, ids=subject.ids, health=health)
            seconds = time.perf_counter() - began
            robust = outcome.robust & right(subject.model, outcome.x_adv, subject.y)
            # the outcome counts the attack alone, not the clean pass and the recount
            forwards = outcome.forwards / subject.members + 2 * len(subject)
            backwards = outcome.backwards / subject.members
            return Answer(robust, seconds, forwards, backwards, outcome.unconfirmed)

        return run

    return {mode: engine(mode) if mode == "fp32" or multiplies_bf16() else None for mode in modes}


def within(offered: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
    """Whether points lie in the ball, broadcastable over images; points with NaN do not."""
    order = torch.inf if norm == "linf" else 2
    distance = torch.linalg.vector_norm((offered - x).flatten(1), ord=order, dim=1)
    return (distance <= eps + SLACK).view(-1, *[1] * (x.dim() - 1))


@contextmanager
def _counted(model: nn.Module) -> Iterator[list[int]]:
    """Images that pass through the model, summed, in the first place of a list."""
    passes = [0]

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        passes[0] += len(inputs[0])

    handle = model.register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        handle.remove()
