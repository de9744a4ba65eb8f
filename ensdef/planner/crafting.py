"""What an attack does before it meets its target: images crafted on surrogates, once for all targets."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ensdef.adversarial_sets import AdversarialSets
from ensdef.attack import Attack
from ensdef.attack_spec import AttackSpec
from ensdef.keys import content_key
from ensdef.planner.stopwatch import Stopwatch
from ensdef.planner.whole import KEPT, extrapolated, shortened
from ensdef.planner.work import Work
from ensdef.progress import Progress

#: Images that the probe crafts on at most, its two lengths in short forms, and seconds it may take, roughly.
IMAGES, TIMES, SECONDS = 128, (1, 4), 8.0
#: A step of crafting in forward passes.
STEP = 3


class _Asked(AdversarialSets):
    """Notes which sets are asked for, and hands out the clean images."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x
        self.names: list[str] = []

    def get(self, made_from: Mapping[str, Any], weights: str, make: Callable[[], Tensor]) -> Tensor:
        self.names.append(content_key(made_from)[:16])
        return self.x


def crafting_work(
    attack: Attack,
    spec: AttackSpec,
    images: tuple[Tensor, Tensor, Tensor],
    sets: AdversarialSets,
    planned: set[str],
    watch: Stopwatch,
    forward: float,
) -> Work:
    """Crafting of the sets that are neither stored nor planned yet; the attack is ready for its parts afterwards.

    Args:
        images: all that will be attacked, (N, ...), labels and ids, (N,).
        sets: those that are stored.
        planned: names of sets whose cost was counted before; added to.
        forward: seconds of one forward pass of an ensemble, an image.
    """
    x, y, ids = images
    asked = _Asked(x)
    attack.prepare(x, y, ids, spec, asked, Progress())
    missing = [
        name
        for name in dict.fromkeys(asked.names)
        if name not in planned and not (sets.folder is not None and (sets.folder / f"{name}.json").is_file())
    ]
    if not missing:
        return Work()
    planned.update(missing)
    affordable = SECONDS / (2 * STEP * sum(TIMES) * KEPT * len(asked.names) * max(forward, 1e-9))
    few = slice(max(1, min(IMAGES, len(x), int(affordable))))
    taken: dict[float, float] = {}
    for times in (TIMES[0], *TIMES):  # the first warms up
        short, part = shortened(attack, times)
        brief = dataclasses.replace(spec, params=dataclasses.asdict(short.params))
        began = watch.now()
        copy.copy(short).prepare(x[few], y[few], ids[few], brief, AdversarialSets(), Progress())
        taken[part] = watch.now() - began
    parts = min(taken), max(taken)
    seconds = extrapolated(taken[parts[0]], taken[parts[1]], parts) / len(asked.names)
    return Work(seconds * len(missing) * len(x) / len(x[few]))
