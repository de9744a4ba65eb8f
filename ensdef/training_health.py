"""Whether a training went wrong in a known way: findings that records carry and tables footnote.

The judgements are pure functions of what was seen; :func:`examine` looks. Nothing here changes the defence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ensdef.adversary import Adversary
from ensdef.defense import EnsembleDefense
from ensdef.losses import cross_entropy
from ensdef.metrics import binomial_stderr
from ensdef.recipe import InnerAttack

#: A finding, in the form of a record's flags.
Finding = dict[str, Any]

#: Training images looked at clean, and under attack.
CLEAN_SAMPLE, ATTACKED_SAMPLE = 512, 256
#: What the training's own attack is compared with.
STRONG = InnerAttack(steps=20, step_size="eps/8")
#: Standard errors that separate a member from chance, and one attack from another.
SIGNIFICANT = 3.0
#: Share of the images below which a member is as good as never selected, and above which the others are.
UNUSED = 0.02
#: Robust accuracy that the training's own attack may show beyond the stronger one's.
OVERFITTED = 0.2
#: Growth of a loss term since its first epoch (counted from 0.1 at least: terms may start at 0), and its size.
GROWTH, START, HUGE = 100.0, 0.1, 1e4


def dead_members(
    right: Tensor, classes: int, chosen: Tensor | None = None, trained: Sequence[bool] | None = None
) -> list[Finding]:
    """Members that answer no better than chance; where members are selected, only those that hardly ever are.

    Args:
        right: whether each member is right on each clean image, (K, n) bool.
        classes: C; chance is 1/C.
        chosen: the member selected on each image, (n,), for defences that choose among members: a specialised member
            may well be wrong on all other images.
        trained: whether training moved the member, for all K; others are not judged.
    """
    members, n = right.shape
    limit = 1 / classes + SIGNIFICANT * binomial_stderr(1 / classes, n)
    dead = {
        index: accuracy
        for index, accuracy in enumerate(map(_share, right))
        if accuracy <= limit
        and (chosen is None or _share(chosen == index) < UNUSED)
        and (trained is None or trained[index])
    }
    if not dead:
        return []
    told = ", ".join(f"{index} ({100 * accuracy:.1f} %)" for index, accuracy in dead.items())
    return [
        _finding(
            "dead_member",
            max(dead.values()),
            limit,
            f"of {members} members, numbered from 0, these answer {n} clean training images no better than chance: "
            + told,
            "train longer, or with a lower learning rate or training radius",
        )
    ]


def expert_collapse(chosen: Tensor | None, members: int) -> list[Finding]:
    """One member selected on nearly every image, ``chosen`` (n,); nothing without a selection or a choice."""
    if chosen is None or members < 2:
        return []
    share, index = max((_share(chosen == index), index) for index in range(members))
    if share <= 1 - UNUSED:
        return []
    return [
        _finding(
            "expert_collapse",
            share,
            1 - UNUSED,
            f"member {index} of {members}, numbered from 0, is selected on nearly every training image",
            "try another seed, or hyper-parameters under which members compete for longer",
        )
    ]


def catastrophic_overfitting(inner: Tensor, strong: Tensor) -> list[Finding]:
    """The training's own attack leaves many more images right than a stronger one on the same images, both (n,) bool.

    Images on which the two attacks disagree decide (McNemar's test), so that a small sample alone raises nothing.
    """
    lost, won = int((inner & ~strong).sum()), int((~inner & strong).sum())
    gap = (lost - won) / len(inner)
    if gap <= OVERFITTED or lost - won <= SIGNIFICANT * sqrt(lost + won):
        return []
    told = [f"{100 * _share(flags):.0f} %" for flags in (inner, strong)]
    return [
        _finding(
            "catastrophic_overfitting",
            gap,
            OVERFITTED,
            f"of {len(inner)} training images {told[0]} withstand the training's own attack, but {told[1]} PGD with "
            f"{STRONG.steps} steps: the defence learned to defeat its training attack",
            "give the inner attack more steps or a random start (training: attack.steps, attack.start)",
        )
    ]


def exploding_terms(history: Sequence[Mapping[str, float]]) -> list[Finding]:
    """Loss terms that became very large; ``history`` has their means by epoch, a finding is of the worst epoch."""
    findings = []
    for name in sorted({name for terms in history for name in terms}):
        sizes = [(abs(terms[name]), epoch) for epoch, terms in enumerate(history) if name in terms]
        limit = min(HUGE, GROWTH * max(START, sizes[0][0]))
        largest, epoch = max(sizes)
        if largest > limit:
            findings.append(
                _finding(
                    "exploding_term",
                    largest,
                    limit,
                    f"loss term {name!r} reached a mean size of {largest:.3g} in epoch {epoch} "
                    f"({sizes[0][0]:.3g} in its first)",
                    "lower the learning rate or the weight of that term",
                )
            )
    return findings


def unexamined(error: Exception) -> Finding:
    """That nothing can be said, and why."""
    told = f"training health could not be examined ({type(error).__name__}: {error})"
    return _finding("unexamined", 0.0, 0.0, told, "run `ensdef check` on the method")


def examine(
    defense: EnsembleDefense,
    x: Tensor,
    y: Tensor,
    history: Sequence[Mapping[str, float]],
    attack: InnerAttack | None,
    norm: str,
    eps: float,
    rng: torch.Generator,
    batch_size: int,
) -> list[Finding]:
    """Findings about a trained defence, which must be in eval mode and stays as it is.

    Args:
        x, y: training images without augmentation, and labels; only the first are attacked.
        history: mean of every loss term by epoch.
        attack: of the training; None: it was not attacked.
        norm, eps: of the training.
        rng: for the attacks' random starts.
        batch_size: images a pass.
    """
    right, chosen = [], []
    with torch.no_grad():
        for images, labels in _batches(x, y, batch_size):
            logits = defense.member_logits(images)
            right.append(logits.argmax(dim=2) == labels)
            selection = defense.selection(images)
            chosen += [] if selection is None else [selection.argmax(dim=1)]
    selected = torch.cat(chosen) if chosen else None
    moved = {id(parameter) for parameter in defense.trainable() if parameter.requires_grad}
    trained = [any(id(parameter) in moved for parameter in member.parameters()) for member in defense.members]
    findings = dead_members(torch.cat(right, dim=1), logits.shape[2], selected, trained)
    findings += expert_collapse(selected, len(trained))
    if attack is not None and attack.steps:
        attacked = list(_batches(x[:ATTACKED_SAMPLE], y[:ATTACKED_SAMPLE], batch_size))
        inner, strong = (_withstood(defense, attacked, one, norm, eps, rng) for one in (attack, STRONG))
        findings += catastrophic_overfitting(inner, strong)
    return findings + exploding_terms(history)


def _withstood(
    defense: EnsembleDefense,
    batches: Iterable[tuple[Tensor, Tensor]],
    attack: InnerAttack,
    norm: str,
    eps: float,
    rng: torch.Generator,
) -> Tensor:
    """Whether ``predict`` is right on each image after the attack, (n,) bool."""
    adversary = Adversary(defense, attack, norm, (eps, eps))
    adversary.begin_batch(rng)
    right = []
    for x, y in batches:
        x_adv = adversary(lambda z, y=y: cross_entropy(defense.predict(z), y), x)  # type: ignore[misc]
        with torch.no_grad():
            right.append(defense.predict(x_adv).argmax(dim=1) == y)
    return torch.cat(right)


def _batches(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.split(size), y.split(size), strict=True)


def _finding(flag: str, value: float, threshold: float, meaning: str, action: str) -> Finding:
    return {
        "flag": flag,
        "severity": "info",
        "value": value,
        "threshold": threshold,
        "meaning": meaning,
        "action": action,
    }


def _share(flags: Tensor) -> float:
    """Of True in a vector, exact."""
    return int(flags.sum()) / len(flags)
