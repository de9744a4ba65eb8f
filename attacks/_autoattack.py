"""pyautoattack's AutoAttack as a part that attacks may share: few classes, flags kept, nothing global left changed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from ensdef.attacks._pyautoattack import as_plain_model
from torch import Tensor

from ensdef.attack import WholeAttack
from ensdef.errors import UsageError
from ensdef.notation import at_least
from ensdef.rng import KeyedRandom
from ensdef.target import Target, Traits
from ensdef.threat import Threat

#: Wrong classes of the targeted parts, images a pass, steps and queries of the published attack.
TARGETS, BATCH, STEPS, QUERIES = 9, 250, 100, 5000
#: Classes that the losses of a part need.
FEWEST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}
#: Pixels that Square must have room for.
SMALLEST_SIDE = 5


@dataclass(frozen=True)
class AutoAttackParams:
    """Settings of ``autoattack``. Anything but the defaults of ``steps`` and ``queries`` is another attack.

    Args:
        version: ``standard``: APGD-CE, targeted APGD, targeted FAB, Square; ``plus``: more restarts, APGD-DLR and FAB;
            ``rand``: APGD-CE and APGD-DLR on mean gradients of 20 passes, for random defences.
        steps: of every gradient part.
        queries: of Square.
    """

    version: Literal["standard", "plus", "rand"] = "standard"
    steps: int = STEPS
    queries: int = QUERIES

    def __post_init__(self) -> None:
        at_least("", steps=(self.steps, 1), queries=(self.queries, 1))


class AutoAttack(WholeAttack):
    """The published attack through pyautoattack; ``warnings`` holds what it says of the model."""

    Params = AutoAttackParams
    #: It makes batches of its own, and judges the model by all images together.
    batch_size = 1_000_000

    def fits(self, traits: Traits) -> None:
        super().fits(traits)
        shape = traits.image_shape
        if self.params.version != "rand" and (len(shape) != 3 or not shape[1] == shape[2] >= SMALLEST_SIDE):
            raise UsageError(
                f"images are of shape {shape}; Square, a part of AutoAttack, needs (channels, height, width) with "
                f"height and width equal and at least {SMALLEST_SIDE}"
            )

    def perturb(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> Tensor:
        if threat.eps == 0:
            return x
        classes = target.traits(x[:1]).num_classes
        with _kept_warnings(self.warnings), _tracing_restored():
            attack = self._built(as_plain_model(target), classes, threat, x.device, rng.seed % 2**32)
            x_adv: Tensor = attack.run_standard_evaluation(x.contiguous(), y, batch_size=BATCH)[0]
        return x_adv

    def _built(self, model: Any, classes: int, threat: Threat, device: Any, seed: int) -> Any:
        import pyautoattack
        from pyautoattack import checks

        # counters of the whole process, which any code before may have moved
        checks.funcs.update(dict.fromkeys(checks.funcs, 0))
        attack = pyautoattack.AutoAttack(
            model,
            norm={"linf": "Linf", "l2": "L2"}[str(threat.norm)],
            eps=threat.eps,
            version=self.params.version,
            seed=seed,
            device=device,
        )
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(TARGETS, classes - 1)
        self._fit_classes(attack, classes)
        self._fit_budget(attack)
        return attack

    def _fit_classes(self, attack: Any, classes: int) -> None:
        """Leave out what the library would fail at: the DLR losses compare three and four scores."""
        planned = list(attack.attacks_to_run)
        # targeted APGD has an untargeted relative that does with three classes
        parts = dict.fromkeys("apgd-dlr" if part == "apgd-t" and classes == 3 else part for part in planned)
        attack.attacks_to_run = [part for part in parts if classes >= FEWEST_CLASSES.get(part, 2)]
        if attack.attacks_to_run != planned:
            self._warn(
                f"AutoAttack ran as {', '.join(attack.attacks_to_run)} in place of {', '.join(planned)}, "
                f"whose losses need more than {classes} classes"
            )

    def _fit_budget(self, attack: Any) -> None:
        steps = self.params.steps
        if (steps, self.params.queries) == (STEPS, QUERIES):
            return
        self._warn(
            f"steps is {steps} and queries is {self.params.queries}; AutoAttack as published has {STEPS} and {QUERIES}"
        )
        for part in (attack.apgd, attack.apgd_targeted):
            part.n_iter = part.n_iter_orig = steps
            # APGD looks at its progress at these shares of the steps (Croce and Hein, section 3)
            part.n_iter_2, part.n_iter_min, part.size_decr = (
                max(int(share * steps), 1) for share in (0.22, 0.06, 0.03)
            )
        attack.fab.n_iter = steps
        attack.square.n_queries = self.params.queries

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


class _Keeper(logging.Handler):
    """Keeps the texts of warnings, each once."""

    def __init__(self, kept: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.kept:
            self.kept.append(text)


@contextmanager
def _kept_warnings(kept: list[str]) -> Iterator[None]:
    """What the library logs as a warning, in the list instead of on the screen."""
    logger = logging.getLogger("auto-attack")
    handler = _Keeper(kept)
    before = logger.level, logger.propagate, logger.disabled
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = logger.disabled = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate, logger.disabled = before[1:]


@contextmanager
def _tracing_restored() -> Iterator[None]:
    """The library looks for dynamic defences through ``sys.settrace`` and switches tracing off behind itself."""
    before = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(before)
