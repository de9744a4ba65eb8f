"""The basic report: what the run itself showed, and at most a tenth of its passes more."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from ensdef.defense import EnsembleDefense
from ensdef.health.case import Case
from ensdef.health.catalogue import FLAGS, Finding, finding
from ensdef.health.observer import WATCHED, spread
from ensdef.health.statistics import better, exceeds, judged
from ensdef.losses import cross_entropy
from ensdef.metrics import binomial_stderr, wilson

#: Part of the attack's passes that the report may add.
ALLOWED = 0.1
#: Passes over the same few images: three for determinism, one each for the members' gradients and the selection, one
#: for each suspected member.
PASSES, SUSPECTS = 7, 2
#: Fewer images than these are not worth a pass.
FEWEST = 4
#: Scores that differ by more than this part of the largest one are other scores.
SAME = FLAGS["nondeterministic"].threshold
#: Natural logarithm of the smallest weight that float32 tells from zero.
VANISHED = -103.0

_MODAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


def findings(case: Case) -> Iterator[Finding]:
    """All findings of the basic report, those that need no pass first."""
    for look in (gradients, silent_success, churn, train_mode, attack_warnings, clean_accuracy, uncertainty):
        yield from look(case)
    if (few := sample(case)) is not None:
        for look_at in (determinism, members, saturation):
            yield from look_at(case, few)


def sample(case: Case) -> Tensor | None:
    """Positions of the images that further passes look at: as many as a tenth of the attack's passes pays for."""
    affordable = int(ALLOWED * case.forwards - case.observer.spent) // (case.traits.members * PASSES)
    count = min(WATCHED, case.batch_size, case.n // 2, affordable)
    return spread(torch.arange(case.n, device=case.x.device), count) if count >= FEWEST else None


def gradients(case: Case) -> list[Finding]:
    """What the hooks saw: zero gradients, promises that were not kept, losses that lead away from the decision."""
    if not judged(case.n):
        return []
    seen = case.observer
    found = []
    looked = seen.seen > 0
    for count, n, name, detail in (
        (
            int((seen.zero > 0).sum()),
            int(looked.sum()),
            "zero_gradient",
            f"on {{}} of {{}} watched images ({int((seen.tiny > 0).sum())} below 1e-12)",
        ),
        (
            int((seen.broken > seen.kept).sum()),
            int((seen.broken + seen.kept > 0).sum()),
            "loss_progress",
            "on {} of {} watched images",
        ),
        (
            int((seen.against > seen.alike).sum()),
            int((seen.against + seen.alike > 0).sum()),
            "loss_consistency",
            "on {} of {} watched images",
        ),
    ):
        if exceeds(count, n, FLAGS[name].threshold):
            found.append(finding(name, count / n, detail.format(count, n)))
    return found


def silent_success(case: Case) -> list[Finding]:
    """Robust images that were fooled on the way; only where the end of a run alone was judged."""
    if case.spec.success != "last" or not judged(case.n):
        return []
    silent = int((case.robust & case.observer.ever_wrong).sum())
    if silent / case.n <= FLAGS["silent_success"].threshold or not better(silent, 0):
        return []
    stronger = (int(case.robust.sum()) - silent) / case.n
    detail = f"{silent} images; judged at every point robust accuracy is {100 * stronger:.1f} %"
    return [finding("silent_success", silent / case.n, detail)]


def churn(case: Case) -> list[Finding]:
    """Defences whose selected member changes while they are attacked."""
    seen = case.observer
    looked = seen.selections > 0
    if not bool(looked.any()):
        return []
    share = seen.changes[looked] / seen.selections[looked]
    often = int((share > FLAGS["selector_churn"].threshold).sum())
    if not better(often, len(share) - often):
        return []
    return [finding("selector_churn", float(share.mean()), f"on {often} of {len(share)} watched images")]


def determinism(case: Case, few: Tensor) -> list[Finding]:
    """The same images twice, among other images, and in memory that held others before."""
    known, images = case.scores[few], case.x[few].contiguous()
    buffer = images.clone()
    first, again = case.answer(buffer), case.answer(buffer)
    buffer.copy_(images.flip(0))
    turned = case.answer(buffer)
    if (gap := difference(first, again)) > SAME:
        return [finding("nondeterministic", gap)]
    if (gap := difference(first, known)) > SAME:
        return [finding("batch_dependent", gap)]
    if (gap := difference(turned, known.flip(0))) > SAME:
        return [finding("stale_answer" if difference(turned, first) <= SAME else "batch_dependent", gap)]
    return []


def difference(scores: Tensor, others: Tensor) -> float:
    """Largest difference in units of the largest finite score (at least 1); a large number where one is no number."""
    if not bool(torch.isfinite(scores - others).all()):
        return 1.0
    scale = max(1.0, float(others.abs().max()))
    return float((scores - others).abs().max()) / scale


def members(case: Case, few: Tensor) -> list[Finding]:
    """How the gradient of the loss is shared among members, at the clean images."""
    model = case.judge.module
    if not isinstance(model, EnsembleDefense) or len(model.members) < 2:
        return []
    outputs: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            logits = output[0] if isinstance(output, tuple) else output
            if isinstance(logits, Tensor) and logits.dim() == 2:
                outputs[index] = logits

        return hook

    point = case.x[few].clone().requires_grad_()
    with ExitStack() as hooks, torch.enable_grad():
        for index, member in enumerate(model.members):
            hooks.callback(member.register_forward_hook(keep(index)).remove)
        case.judge.forget()
        scores = case.judge(point)
        loss = cross_entropy(scores, case.y[few]).sum()
        live = [index for index, output in outputs.items() if output.requires_grad]
        slopes = torch.autograd.grad(loss, [outputs[index] for index in live], allow_unused=True) if live else ()
        case.judge.forget()
    if len(outputs) < len(model.members):
        return []  # members are not called as a whole: nothing can be said
    known = dict(zip(live, slopes, strict=True))
    by_member = [known.get(index) for index in range(len(model.members))]
    nothing = torch.zeros(len(few), device=point.device)
    sizes = torch.stack([nothing if slope is None else slope.flatten(1).norm(dim=1) for slope in by_member])
    cut_off = [index for index, slope in enumerate(by_member) if slope is None]
    return _suspects(case, few, scores.detach(), outputs, sizes, cut_off) + _domination(case, sizes)


def _suspects(
    case: Case, few: Tensor, scores: Tensor, outputs: dict[int, Tensor], sizes: Tensor, cut_off: Sequence[int]
) -> list[Finding]:
    """Members without gradient or with one answer: does predict change when their answers change places?

    Args:
        sizes: of the gradient at each member's answer, (K, M); a choice among members may well leave zeros there.
        cut_off: members that no gradient reaches, whatever the image.
    """
    silent = [int(index) for index in (sizes.amax(dim=1) == 0).nonzero().squeeze(1)]
    constant = [index for index, output in outputs.items() if float((output - output[:1]).detach().abs().max()) == 0]
    detached, idle = [], list(constant)
    for index in [index for index in silent if index not in constant][:SUSPECTS]:
        member: nn.Module = cast(EnsembleDefense, case.judge.module).members[index]
        handle = member.register_forward_hook(_moved_on)
        try:
            changed = difference(case.answer(case.x[few].clone()), scores) > SAME
        finally:
            handle.remove()
        if not changed:
            idle.append(index)
        elif index in cut_off:
            detached.append(index)
    told = "of {} members, numbered from 0: {}"
    return [
        finding(name, len(which), told.format(len(outputs), ", ".join(map(str, sorted(which)))))
        for name, which in (("detached_member", detached), ("idle_member", idle))
        if which
    ]


def _moved_on(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Gives each image the answer to the one before it."""
    if isinstance(output, tuple):
        return tuple(part.roll(1, 0) if isinstance(part, Tensor) and part.dim() else part for part in output)
    return output.roll(1, 0)


def _domination(case: Case, sizes: Tensor) -> list[Finding]:
    if not judged(case.n):
        return []
    middle = sizes.quantile(0.5, dim=0)
    ratio = sizes.amax(dim=0) / middle.clamp_min(torch.finfo(sizes.dtype).tiny)
    limit = FLAGS["member_domination"].threshold
    above = int((ratio > limit).sum())
    if not better(above, len(ratio) - above):
        return []
    typical = min(float(ratio.quantile(0.5)), 1e30)
    return [finding("member_domination", typical, f"{typical:.3g} on the median image")]


def saturation(case: Case, few: Tensor) -> list[Finding]:
    """Defences that mix their members by weights which are all zero but one."""
    if not case.traits.selects or case.traits.combiner == "select" or not judged(case.n):
        return []
    case.judge.forget()
    with torch.no_grad():
        selection = case.judge.selection(case.x[few])
    case.judge.forget()
    if selection is None or selection.shape[1] < 2:
        return []
    second = selection.double().log_softmax(dim=1).topk(2, dim=1).values[:, 1]
    count = int((second < VANISHED).sum())
    if not exceeds(count, len(few), FLAGS["saturated_selection"].threshold):
        return []
    return [finding("saturated_selection", count / len(few), f"on {count} of {len(few)} images")]


def train_mode(case: Case) -> list[Finding]:
    """Parts in train mode: of the model as it came, and of the copy that was put into eval mode."""
    stubborn = [name or "the model" for name, part in case.judge.module.named_modules() if part.training]
    if stubborn:
        return [finding("train_mode", len(stubborn), "still so in eval mode: " + _some(stubborn), severity="masking")]
    modal = [name or "the model" for name, part in case.model.named_modules() if part.training and _modal(part)]
    if not modal:
        return []
    severity = "info" if case.model.training else "masking"
    return [finding("train_mode", len(modal), _some(modal), severity=severity)]  # type: ignore[arg-type]


def _modal(part: nn.Module) -> bool:
    if isinstance(part, nn.modules.dropout._DropoutNd):
        return part.p > 0
    return isinstance(part, _MODAL)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def attack_warnings(case: Case) -> list[Finding]:
    """What the attack itself warned of, word for word."""
    return [finding("attack_warning", len(case.warnings), "; ".join(case.warnings))] if case.warnings else []


def clean_accuracy(case: Case) -> list[Finding]:
    """A model that guesses."""
    chance = 1 / case.scores.shape[1]
    limit = chance + 3 * binomial_stderr(chance, case.n)
    accuracy = int(case.clean.sum()) / case.n
    if not judged(case.n) or accuracy > limit:
        return []
    return [finding("clean_accuracy", accuracy, f"{100 * accuracy:.1f} % of {case.n} images", threshold=limit)]


def uncertainty(case: Case) -> list[Finding]:
    """Numbers that stand on few images."""
    low, high = wilson(int(case.robust.sum()), case.n)
    if high - low <= FLAGS["uncertain"].threshold:
        return []
    # rounded outwards, so that the printed interval contains the exact one
    told = f"{math.floor(1000 * low) / 10:.1f} to {math.ceil(1000 * high) / 10:.1f} % for n={case.n}"
    return [finding("uncertain", high - low, told)]
