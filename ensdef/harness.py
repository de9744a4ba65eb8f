"""The attack harness: a model and an attack in, the verdict on every image out.

Clean predictions first, then one or two searches over the images that are right (see ``session``), then a recount of
all points in a fresh pass at another batch size. Verdicts come from the untouched model in fp32.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ensdef.adversarial_sets import AdversarialSets
from ensdef.attack import Attack
from ensdef.attack_spec import AttackSpec
from ensdef.defense import EnsembleDefense
from ensdef.errors import UsageError
from ensdef.health.case import Case
from ensdef.health.catalogue import Finding, Tier
from ensdef.health.observer import WATCHED, Observer, spread
from ensdef.health.report import report
from ensdef.journal import Journal
from ensdef.judging import is_right, scores_of
from ensdef.progress import Progress
from ensdef.registry import ATTACKS
from ensdef.rows import SMALLEST_BATCH
from ensdef.session import BALL_SLACK, Session
from ensdef.stages import Stages
from ensdef.target import Target

__all__ = ["BALL_SLACK", "Outcome", "attack_model", "exact_arithmetic"]


@dataclass
class Outcome:
    """What an attack left of a model, by image.

    Args:
        clean: right on the clean image, (N,) bool.
        robust: right on the clean image and on every point offered, (N,) bool.
        x_adv: the point that fooled, or the last point of the last run, or the clean image where that was wrong
            already, (N, ...).
        forwards, backwards: member passes of the attack, summed over images.
        unconfirmed: images the attack took for fooled that a fresh pass at another batch size did not confirm.
        nonfinite: images for which the model returned NaN or infinity under attack (they count as fooled).
        broken_by: for a composite attack, how many images each part fooled that no part before it had.
        findings: of the health report.
        health_forwards: member passes that the report made beside the attack's, summed over images.
    """

    clean: Tensor
    robust: Tensor
    x_adv: Tensor
    forwards: int
    backwards: int
    seconds: float
    unconfirmed: int
    nonfinite: int
    broken_by: dict[str, int]
    findings: list[Finding] = field(default_factory=list)
    health_forwards: int = 0


def attack_model(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    spec: AttackSpec,
    *,
    ids: Tensor | None = None,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
    prerequisites: Mapping[str, EnsembleDefense] | None = None,
    sets: AdversarialSets | None = None,
    health: Tier = "basic",
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Attack a model and judge the result on its own ``predict``.

    Args:
        model: images in [0, 1] -> (B, C) log-scores; left untouched, a copy is attacked.
        x, y: images (N, ...), float32 in [0, 1], and labels (N,), int64.
        spec: the attack with its parameters.
        ids: image ids that key the random numbers, (N,); default 0 ... N-1.
        batch_size: rows a pass; cannot change a verdict.
        device: where to run.
        prerequisites: trained defences the attack asked for, by role.
        sets: where adversarial images crafted on them are kept; None: they are not.
        health: ``"basic"`` looks on and adds at most a tenth of the attack's passes, ``"full"`` runs further small
            attacks, ``"off"`` does neither.
        journal: keeps the state of the search, and may have that of an earlier process, which is taken up.
    Raises:
        PluginError: the model's scores have the wrong shape, are NaN, or are probabilities.
        AttackError: the attack returned NaN or the wrong shape.
    """
    device = torch.device(device)
    x, y = x.detach().to(device), y.to(device)
    attack: Attack = ATTACKS.get(spec.name)(spec.params_object)
    if prerequisites:
        attack.warm_start({role: defense.to(device) for role, defense in prerequisites.items()})
    ids = (torch.arange(len(x)) if ids is None else ids).to(device)
    with exact_arithmetic(device):
        attack.prepare(x, y, ids, spec, sets or AdversarialSets(), progress or Progress())
        return _attack_model(model, attack, x, y, spec, ids, batch_size, health, journal, progress or Progress())


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """TF32 off on CUDA: its ten-bit products would decide verdicts."""
    if device.type != "cuda":
        yield
        return
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags


def _attack_model(
    model: nn.Module,
    attack: Attack,
    x: Tensor,
    y: Tensor,
    spec: AttackSpec,
    ids: Tensor,
    batch_size: int,
    health: Tier,
    journal: Journal | None,
    progress: Progress,
) -> Outcome:
    began = time.monotonic()
    kept = None if journal is None else journal.read()
    judge = Target(model, combiner=spec.combiner, fold=False, device=x.device)
    # kept scores: which images are attacked must not depend on the batch size of the process that goes on
    scores = scores_of(judge, x, batch_size) if kept is None else kept.tensors["scores"].to(x.device)
    classes = scores.shape[1]
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= classes):
        raise UsageError(
            f"labels go from {int(y.min())} to {int(y.max())}, but the model has {classes} classes, 0 to {classes - 1}"
        )
    clean = is_right(scores, y)
    traits = judge.traits(x[:1])
    attack.fits(traits)
    session = Session(spec, judge, x, y, ids, batch_size, classes)
    if health != "off":
        session.observer = Observer(y, spread(clean.nonzero().squeeze(1), WATCHED))

    def target_of(precision: str) -> Target:
        return Target(model, combiner=spec.combiner, precision=precision, device=x.device)

    stages = Stages(attack, traits, session, scores, target_of, began)
    if journal is not None:
        if kept is not None:
            with journal.taking_up():
                stages.restore(kept)
            progress.message(f"attack {spec.call} eps {spec.written or '-'}: goes on where it was stopped")
        session.moment = lambda: journal.keep(stages.snapshot)
    stages.run(clean, progress)
    forwards = stages.forwards
    recount = batch_size // 2 + 3 if batch_size > 2 * SMALLEST_BATCH else SMALLEST_BATCH + 3
    right = is_right(scores_of(judge, session.x_adv, recount, check=False), y)
    seconds = stages.seconds
    findings: list[Finding] = []
    beside = 0
    if session.observer is not None:
        before = judge.passes.forwards
        case = Case(
            model,
            judge,
            traits,
            x,
            y,
            scores,
            clean,
            clean & right,
            session.x_adv,
            spec,
            min(batch_size, session.batch_size),
            forwards,
            session.observer,
            stages.warnings,
        )
        findings = report(case, health)
        beside = session.observer.spent + judge.passes.forwards - before
    return Outcome(
        clean.cpu(),
        (clean & right).cpu(),
        session.x_adv.cpu(),
        forwards,
        session.backwards,
        seconds,
        int((session.fooled & right).sum()),
        session.nonfinite,
        stages.broken_by,
        findings,
        beside,
    )
