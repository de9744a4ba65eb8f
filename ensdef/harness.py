"""The attack harness: a model and an attack in, the verdict on every image out.

Clean predictions first, then one or two searches over the images that are right (see ``session``), then a recount of
all points in a fresh pass at another batch size. Verdicts come from the untouched model in fp32.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ensdef.attack import Attack
from ensdef.attack_spec import AttackSpec
from ensdef.defense import EnsembleDefense
from ensdef.errors import UsageError
from ensdef.progress import Progress
from ensdef.registry import ATTACKS
from ensdef.rows import SMALLEST_BATCH
from ensdef.scores import check_scores
from ensdef.session import BALL_SLACK, Session
from ensdef.target import Target

__all__ = ["BALL_SLACK", "Outcome", "attack_model"]


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
    """

    clean: Tensor
    robust: Tensor
    x_adv: Tensor
    forwards: int
    backwards: int
    seconds: float
    unconfirmed: int
    nonfinite: int


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
    Raises:
        PluginError: the model's scores have the wrong shape, are NaN, or are probabilities.
        AttackError: the attack returned NaN or the wrong shape.
    """
    device = torch.device(device)
    x, y = x.detach().to(device), y.to(device)
    attack: Attack = ATTACKS.get(spec.name)(spec.params_object)
    if prerequisites:
        attack.warm_start({role: defense.to(device) for role, defense in prerequisites.items()})
    with _exact_arithmetic(device):
        return _attack_model(model, attack, x, y, spec, ids, batch_size, progress)


@contextmanager
def _exact_arithmetic(device: torch.device) -> Iterator[None]:
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
    ids: Tensor | None,
    batch_size: int,
    progress: Progress | None,
) -> Outcome:
    began = time.monotonic()
    ids = torch.arange(len(x)) if ids is None else ids
    judge = Target(model, combiner=spec.combiner, fold=False, device=x.device)
    scores = _scores(judge, x, batch_size)
    classes = scores.shape[1]
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= classes):
        raise UsageError(
            f"labels go from {int(y.min())} to {int(y.max())}, but the model has {classes} classes, 0 to {classes - 1}"
        )
    clean = _right(scores, y)
    before = judge.passes.forwards
    progress = progress or Progress()
    session = Session(attack, spec, judge, x, y, ids.to(x.device), batch_size, scores.shape[1])
    modes = ["bf16", "fp32"] if spec.search == "bf16+fp32" else [spec.search]
    for mode in modes:
        alive = (clean & ~session.fooled).nonzero().squeeze(1)
        if len(alive):
            target = Target(model, combiner=spec.combiner, precision=mode, device=x.device)
            session.run(target, alive, progress, "" if len(modes) == 1 else f" ({mode})")
    forwards = session.forwards + judge.passes.forwards - before
    recount = batch_size // 2 + 3 if batch_size > 2 * SMALLEST_BATCH else SMALLEST_BATCH + 3
    right = _right(_scores(judge, session.x_adv, recount, check=False), y)
    return Outcome(
        clean.cpu(),
        (clean & right).cpu(),
        session.x_adv.cpu(),
        forwards,
        session.backwards,
        time.monotonic() - began,
        int((session.fooled & right).sum()),
        session.nonfinite,
    )


def _scores(judge: Target, x: Tensor, batch_size: int, check: bool = True) -> Tensor:
    """Scores of the true model, (N, C)."""
    scores = []
    judge.passes.share = 1.0
    for part in x.split(batch_size):
        rows = torch.arange(max(len(part), SMALLEST_BATCH), device=x.device).clamp(max=len(part) - 1)
        with torch.no_grad():
            answer = judge(part[rows].contiguous())
        judge.forget()
        if check:
            check_scores(answer, len(rows))
        scores.append(answer[: len(part)])
    return torch.cat(scores)


def _right(scores: Tensor, y: Tensor) -> Tensor:
    """Whether finite scores choose the label, (N,) bool."""
    return torch.isfinite(scores).all(dim=1).logical_and(scores.argmax(dim=1) == y)
