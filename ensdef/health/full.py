"""The full report: further small attacks on a few images, each asked one question about the first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ensdef.defense import EnsembleDefense
from ensdef.errors import UsageError
from ensdef.health.ascent import NEVER, Loss, climb, draw, search
from ensdef.health.case import Case
from ensdef.health.catalogue import FLAGS, Finding, finding, graded
from ensdef.health.observer import spread
from ensdef.health.statistics import better, exceeds, judged
from ensdef.losses import cross_entropy, dlr, margin
from ensdef.registry import ATTACKS
from ensdef.rng import BatchRandom, derived_generator
from ensdef.target import Target
from ensdef.testing import LinearClassifier
from ensdef.threat import Threat

#: Images that the attacks below run on, and those of the finite differences.
SAMPLE, DIFFERENCED = 200, 32
#: Steps of the attack that the others are compared with, and its step in units of the radius.
STEPS, STEP = 20, 0.2
RESTARTS = 10
STEP_SIZES = (1.0, 0.5, 0.25, 0.1, 0.05)
RADII = (0.25, 0.5, 1.0, 2.0)
TARGETS = 3
DRAWS, QUERIES = 200, 300
#: Steps of the attack of practically unbounded size, and its radius in linf.
UNBOUNDED_STEPS, GREY = 100, 0.5
#: Images of the linear model with the known answer.
CONTROLS = 32
#: Random directions of the finite differences, their lengths per pixel, and what one image may disagree in.
DIRECTIONS, LENGTHS, SIGNS = 20, (1e-3, 1 / 255), 0.25


@dataclass
class Trial:
    """The sample, and what has been found on it so far.

    Args:
        rows: positions in the case, (n,).
        x, y, start: images, labels, and the random starts shared by all attacks.
        own: fooled by the attack under examination, (n,) bool.
        union: fooled by it or by any gradient attack on ``predict`` below.
        base: fooled by the reference: cross-entropy, 20 steps of eps/5.
    """

    case: Case
    target: Target
    threat: Threat
    rows: Tensor
    x: Tensor
    y: Tensor
    start: Tensor
    own: Tensor
    union: Tensor = field(init=False)
    base: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.union, self.base = self.own.clone(), torch.zeros_like(self.own)

    @property
    def n(self) -> int:
        return len(self.y)

    def steps_to_fall(
        self,
        loss: Loss = cross_entropy,
        *,
        steps: int = STEPS,
        step: float = STEP,
        scale: float = 1.0,
        start: Tensor | None = None,
        view: str = "predict",
        goal: Tensor | None = None,
    ) -> Tensor:
        """Run one attack; ``step`` and ``scale`` in units of the radius."""
        threat = Threat(self.threat.norm, self.threat.eps * scale)
        return climb(
            self.target,
            self.x,
            self.y,
            threat,
            loss,
            steps=steps,
            step_size=step * threat.eps,
            start=threat.project(self.start if start is None else start, self.x),
            view=view,
            goal=goal,
            batch_size=self.case.batch_size,
        )

    def fooled(self, loss: Loss = cross_entropy, **settings: object) -> Tensor:
        """The same as a verdict, (n,) bool, added to the union where the radius is the attack's own."""
        fallen: Tensor = self.steps_to_fall(loss, **settings) < NEVER  # type: ignore[arg-type]
        if settings.get("scale", 1.0) == 1.0 and settings.get("view", "predict") == "predict":
            self.union |= fallen
        return fallen

    def adds(self, name: str, fallen: Tensor, what: str) -> list[Finding]:
        """A finding if an attack fools images that no gradient attack on ``predict`` fooled."""
        new = int((fallen & ~self.union).sum())
        if new / self.n < FLAGS[name].threshold or not better(new, 0):
            return []
        return [finding(name, new / self.n, f"{what} adds {new} of {self.n} images")]

    def beats(self, name: str, fallen: Tensor, other: Tensor, what: str) -> list[Finding]:
        """A finding if one attack fools significantly more images than another."""
        wins, losses = int((fallen & ~other).sum()), int((other & ~fallen).sum())
        gap = (wins - losses) / self.n
        if gap <= FLAGS[name].threshold or not better(wins, losses):
            return []
        severity = graded(gap) if FLAGS[name].severity == "either" else None
        return [finding(name, gap, f"{what}: {100 * gap:.1f} points on {self.n} images", severity=severity)]


def findings(case: Case) -> Iterator[Finding]:
    """All findings of the full report that can be had for this attack and this model."""
    if not judged(case.n):
        return
    yield from selector_oracle(case)
    yield from control(case)
    rows = spread(case.clean.nonzero().squeeze(1), SAMPLE)
    if case.spec.norm is None or not case.spec.eps_value or len(rows) < SAMPLE // 4:
        return
    threat = Threat(case.spec.norm, case.spec.eps_value)
    x, y = case.x[rows], case.y[rows]
    rng = derived_generator(x.device, case.spec.seed, len(rows))
    start = threat.random_start(x, BatchRandom(rng, len(x)))
    target = Target(case.model, combiner=case.spec.combiner, fold=False, device=x.device)
    trial = Trial(case, target, threat, rows, x, y, start, ~case.robust[rows])
    if "predict" in case.traits.differentiable:
        yield from convergence(trial, rng)
        for look in (one_step, losses, radii, unbounded, member_transfer, precision):
            yield from look(trial)
        yield from finite_differences(trial, rng)
    yield from blind_search(trial, rng)


def blind_search(trial: Trial, rng: torch.Generator) -> Iterator[Finding]:
    """Random points, and a search on scores, against all gradient attacks so far."""
    images, size = (trial.target, trial.x, trial.y, trial.threat, rng), trial.case.batch_size
    lucky = draw(*images, draws=DRAWS, batch_size=size) & ~trial.union
    survivors, count = int((~trial.union).sum()), int(lucky.sum())
    if exceeds(count, survivors, FLAGS["random_search"].threshold):
        told = f"{count} of the {survivors} images that withstood all gradient attacks"
        yield finding("random_search", count / survivors, told)
    queried = search(*images, queries=QUERIES, batch_size=size)
    yield from trial.adds("black_box_beats_gradient", queried, f"random search of {QUERIES} queries")


def convergence(trial: Trial, rng: torch.Generator) -> list[Finding]:
    """Steps, restarts and step sizes; sets the reference."""
    found: list[Finding] = []
    falls = trial.steps_to_fall(steps=4 * STEPS)
    trial.base = falls <= STEPS
    twice, fourfold = falls <= 2 * STEPS, falls <= 4 * STEPS
    trial.union |= fourfold
    steps: list[list[Finding]] = [
        trial.beats("step_convergence", more, fewer, f"{count} steps instead of {count // 2}")
        for count, more, fewer in ((2 * STEPS, twice, trial.base), (4 * STEPS, fourfold, twice))
    ]
    found += sorted(steps, key=_value)[-1]
    reached = [trial.base]
    for _ in range(RESTARTS - 1):
        start = trial.threat.random_start(trial.x, BatchRandom(rng, trial.n))
        reached.append(reached[-1] | trial.fooled(start=start))
    half = RESTARTS // 2
    told = f"{RESTARTS} restarts instead of {half}"
    found += trial.beats("restart_convergence", reached[-1], reached[half - 1], told)
    sizes = {step: trial.fooled(step=step) for step in STEP_SIZES}
    best = max(sizes, key=lambda step: int(sizes[step].sum()))
    return found + trial.beats("step_size", sizes[best], trial.base, f"steps of {best:g} eps instead of {STEP:g} eps")


def one_step(trial: Trial) -> list[Finding]:
    """One step of the whole radius against many."""
    once = trial.fooled(steps=1, step=1.0, start=trial.x)
    return trial.beats("one_step_beats_iterative", once, trial.base, f"one step against {STEPS}")


def losses(trial: Trial) -> list[Finding]:
    """Margin, difference of logits ratio and targeted margins against cross-entropy."""
    classes = trial.case.traits.num_classes
    others = {"margin loss": trial.fooled(margin)}
    if classes > 2:
        others["difference of logits ratio"] = trial.fooled(dlr)
    if classes > 3:
        scores = trial.case.scores[trial.rows].scatter(1, trial.y[:, None], -torch.inf)
        for rank, goal in enumerate(scores.topk(min(TARGETS, classes - 1), dim=1).indices.unbind(1)):
            others[f"targeted margin, class {rank + 1}"] = trial.fooled(goal=goal)
    best = max(others, key=lambda name: int(others[name].sum()))
    return trial.beats("loss_choice", others[best], trial.base, f"{best} instead of cross-entropy")


def radii(trial: Trial) -> list[Finding]:
    """The same attack at growing radii: a larger ball contains the smaller one."""
    worst: list[Finding] = []
    fallen = {scale: trial.fooled(scale=scale) for scale in RADII}
    for small, large in pairwise(RADII):
        back, more = int((fallen[small] & ~fallen[large]).sum()), int((fallen[large] & ~fallen[small]).sum())
        rises = (back - more) / trial.n > FLAGS["distortion_helps"].threshold and better(back, more)
        if rises or exceeds(back, trial.n, 0.05):
            told = f"{back} of {trial.n} images fall at {small:g} eps and not at {large:g} eps"
            worst = max(worst, [finding("distortion_helps", back / trial.n, told)], key=_value)
    return worst


def _value(flags: list[Finding]) -> float:
    return float(flags[0]["value"]) if flags else 0.0


def unbounded(trial: Trial) -> list[Finding]:
    """A radius at which every pixel can become grey: nothing of the image is left."""
    size = GREY * (math.sqrt(trial.x[0].numel()) if trial.threat.norm == "l2" else 1.0)
    scale = size / trial.threat.eps
    left = ~trial.fooled(margin, steps=UNBOUNDED_STEPS, step=0.05, scale=scale)
    if bool(left.any()):
        left &= ~trial.fooled(steps=UNBOUNDED_STEPS, step=0.05, scale=scale)
    count = int(left.sum())
    if not exceeds(count, trial.n, FLAGS["unbounded_survivors"].threshold):
        return []
    return [finding("unbounded_survivors", count / trial.n, f"{count} of {trial.n} at radius {size:g}")]


def member_transfer(trial: Trial) -> list[Finding]:
    """Examples made on every member by itself."""
    names = [name for name in trial.case.traits.differentiable if name.startswith("member")]
    if not isinstance(trial.target.module, EnsembleDefense) or trial.case.spec.combiner != "native" or not names:
        return []
    fallen = torch.zeros_like(trial.own)
    for name in names:
        fallen |= trial.fooled(view=name)
    return trial.adds("member_transfer", fallen, f"attacking each of {len(names)} members")


def selector_oracle(case: Case) -> list[Finding]:
    """How often some member is right where the selected one is not, on the points the attack left."""
    module = case.judge.module
    if not case.traits.selects or not isinstance(module, EnsembleDefense):
        return []
    rows = spread(case.clean.nonzero().squeeze(1), SAMPLE)
    right_member, right = [], []
    for part in rows.split(case.batch_size):
        with torch.no_grad():
            logits = case.judge.member_logits(case.x_adv[part])
        case.judge.forget()
        assert logits is not None
        right_member.append((logits.argmax(dim=2) == case.y[part]).any(dim=0))
        right.append(case.answer(case.x_adv[part]).argmax(dim=1) == case.y[part])
    missed = int((torch.cat(right_member) & ~torch.cat(right)).sum())
    gap = missed / max(len(rows), 1)
    if gap <= FLAGS["selector_oracle_gap"].threshold or not better(missed, 0):
        return []
    return [finding("selector_oracle_gap", gap, f"{missed} of {len(rows)} images")]


def finite_differences(trial: Trial, rng: torch.Generator) -> list[Finding]:
    """Autograd against central differences of the cross-entropy in float64, along random directions of -1 and +1."""
    target = in_double(trial.case)
    few = spread(torch.arange(trial.n, device=trial.x.device), DIFFERENCED)
    y = trial.y[few]
    x = trial.x[few].double().clamp(max(LENGTHS), 1 - max(LENGTHS))

    def loss(point: Tensor) -> Tensor:
        value = cross_entropy(target(point), y)
        target.forget()
        return value

    point = x.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(point).sum(), point)[0].flatten(1)
    errors, turned = [], torch.zeros(len(few), device=x.device)
    for length in LENGTHS:
        opposite = torch.zeros(len(few), device=x.device)
        for _ in range(DIRECTIONS):
            sign = torch.rand(x.shape, generator=rng, device=x.device, dtype=x.dtype).sub(0.5).sign()
            with torch.no_grad():
                slope = (loss(x + length * sign) - loss(x - length * sign)) / (2 * length)
            told = (gradient * sign.flatten(1)).sum(dim=1)
            opposite += (slope * told < 0).float() / DIRECTIONS
            if length == LENGTHS[0]:
                larger = torch.maximum(slope.abs(), told.abs())
                errors.append(torch.where(larger > 0, (slope - told).abs() / larger.clamp_min(1e-300), 0.0))
        turned = torch.maximum(turned, opposite)
    error = torch.stack(errors).quantile(0.5, dim=0)
    bad = int(((error > FLAGS["gradient_correctness"].threshold) | (turned > SIGNS)).sum())
    typical = float(error.quantile(0.5))
    if not exceeds(bad, len(few), 0.1) or (typical <= 0.05 and float(turned.mean()) <= 0.1):
        return []
    told_so = f"{bad} of {len(few)} images; median error {100 * typical:.0f} %"
    return [finding("gradient_correctness", typical, f"{told_so}, sign differs in {100 * float(turned.mean()):.0f} %")]


def precision(trial: Trial) -> list[Finding]:
    """Decisions, and one attack, in float64."""
    target, case = in_double(trial.case), trial.case
    changed = looked = 0
    for images in (trial.x, case.x_adv[trial.rows]):
        for part in torch.arange(trial.n, device=images.device).split(case.batch_size):
            with torch.no_grad():
                exact = target(images[part].double()).argmax(dim=1)
            target.forget()
            changed += int((exact != case.answer(images[part]).argmax(dim=1)).sum())
            looked += len(part)
    if exceeds(changed, looked, 0.001):
        told = f"{changed} of {looked} decisions change"
        return [finding("precision", changed / looked, told, threshold=0.001)]
    eps = trial.threat.eps
    fallen = climb(
        target,
        trial.x.double(),
        trial.y,
        trial.threat,
        cross_entropy,
        steps=STEPS,
        step_size=STEP * eps,
        start=trial.start.double(),
        batch_size=case.batch_size,
    )
    exact = fallen < NEVER
    return trial.beats("precision", exact, trial.base, f"{STEPS} steps in float64") or trial.beats(
        "precision", trial.base, exact, f"{STEPS} steps in float32 against float64"
    )


def control(case: Case) -> list[Finding]:
    """The same attack on a linear model of two classes, whose robust accuracy in linf is known exactly."""
    from ensdef.harness import attack_model

    attack, spec = ATTACKS.get(case.spec.name), case.spec
    needs_model = spec.combiner != "native" or attack.access != "gradient" or attack.budget != "eps"
    if spec.norm != "linf" or not spec.eps_value or needs_model:
        return []
    rng = derived_generator(torch.device("cpu"), 0, 23)
    shape = case.x.shape[1:]
    weight = torch.randn(2, shape.numel(), generator=rng)
    linear = LinearClassifier(weight, -weight.sum(dim=1) / 2)
    x = 0.3 + 0.4 * torch.rand(CONTROLS, *shape, generator=rng)
    with torch.no_grad():
        y = linear(x).argmax(dim=1)
    try:
        reached = attack_model(linear, x, y, spec, health="off").robust
    except UsageError:
        return []  # made for ensembles, or in need of surrogates
    gap = (int(reached.sum()) - int(linear.exactly_robust(x, y, spec.eps_value).sum())) / CONTROLS
    if gap <= FLAGS["control_failed"].threshold:
        return []
    return [finding("control_failed", gap, f"{100 * gap:.0f} points above it on {CONTROLS} images")]


def in_double(case: Case) -> Target:
    """The true model in float64."""
    target = Target(case.model, combiner=case.spec.combiner, fold=False, device=case.x.device)
    target.module.double()
    return target
