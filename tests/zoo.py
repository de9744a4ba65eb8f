"""Models that defeat an attack without being robust, one trick each, and honest ensembles beside them.

All tiny: 8x8 images of four classes, 200 of them, that a linear model tells apart; a radius of 0.1 fools about half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensdef import combine
from ensdef.defense import Batch, EnsembleDefense, Terms
from ensdef.losses import cross_entropy
from ensdef.testing import LinearClassifier

CLASSES, SHAPE, PIXELS, COUNT = 4, (1, 8, 8), 64, 200
EPS = 0.1


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def prototypes() -> Tensor:
    """A pattern of -1 and +1 for each class, (CLASSES, PIXELS)."""
    return torch.rand(CLASSES, PIXELS, generator=generator(0)).sub(0.5).sign()


@cache
def images(count: int = COUNT, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Noisy prototypes and their labels; every pixel is near 0.2 or 0.8."""
    rng = generator(seed)
    y = torch.arange(count) % CLASSES
    flipped = torch.rand(count, PIXELS, generator=rng) < 0.22
    pattern = torch.where(flipped, -prototypes()[y], prototypes()[y])
    x = 0.5 + 0.3 * pattern + 0.1 * (torch.rand(count, PIXELS, generator=rng) - 0.5)
    return x.view(count, *SHAPE), y


def linear(seed: int = 0) -> LinearClassifier:
    """Scores by likeness to noisy prototypes; grey scores zero."""
    weight = prototypes() + 0.5 * torch.randn(CLASSES, PIXELS, generator=generator(100 + seed))
    return LinearClassifier(weight, -weight.sum(dim=1) / 2)


def convolutional(adversarial: bool = False, seed: int = 0) -> nn.Module:
    """A small network after a second of training; a fresh copy each time."""
    model = _architecture()
    model.load_state_dict(_trained(adversarial, seed))
    return model.eval()


def _architecture() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * PIXELS, CLASSES)
    )


@cache
def _trained(adversarial: bool, seed: int) -> Mapping[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _architecture()
    x, y = images(1024, 2)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(48):
        rows = slice(128 * (step % 8), 128 * (step % 8) + 128)
        batch, labels = x[rows], y[rows]
        if adversarial:
            batch = batch + (torch.rand(batch.shape, generator=generator(step)) * 2 - 1) * EPS
            for _ in range(3):
                point = batch.detach().requires_grad_()
                slope = torch.autograd.grad(F.cross_entropy(model(point), labels), point)[0]
                batch = x[rows] + (point.detach() + EPS / 2 * slope.sign() - x[rows]).clamp(-EPS, EPS)
        optimiser.zero_grad()
        F.cross_entropy(model(batch.detach()), labels).backward()
        optimiser.step()
    return model.state_dict()


class Mean(EnsembleDefense):
    """Log mean probability of given members."""

    def loss(self, batch: Batch, progress: float) -> Terms:
        return {"ce": cross_entropy(self.predict(batch.x), batch.y).mean()}


class Says(nn.Module):
    """A linear model behind a function of images, and before one of scores."""

    def __init__(
        self,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        after: Callable[[Tensor], Tensor] = lambda scores: scores,
    ) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.model = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.model(self.before(x)))


class Backwards(torch.autograd.Function):
    """The identity with another backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return ctx.change(slopes[0]), None


def backwards(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: Backwards.apply(x, change)  # type: ignore[no-untyped-call, no-any-return]


def random_signs(slope: Tensor) -> Tensor:
    return slope * torch.rand(slope.shape, generator=generator(7)).sub(0.5).sign()


# --- ensembles with a trick -----------------------------------------------------------------------


class HardVote(Mean):
    """Counts votes, with nothing to break a tie."""

    def predict(self, x: Tensor) -> Tensor:
        logits = self.member_logits(x)
        return F.one_hot(logits.argmax(dim=2), CLASSES).sum(dim=0) + 0 * logits.sum(dim=0)


class Gated(Mean):
    """A mixture whose weights come from a linear gate; ``sharpness`` multiplies its scores."""

    combiner = "gate"

    def __init__(self, members: Any, sharpness: float = 1.0, cut: bool = False) -> None:
        super().__init__(members)
        self.gate = LinearClassifier(torch.randn(len(members), PIXELS, generator=generator(9)))
        self.sharpness, self.cut = sharpness, cut

    def selection(self, x: Tensor) -> Tensor:
        return self.sharpness * self.gate(x)

    def predict(self, x: Tensor) -> Tensor:
        weights = self.selection(x)
        return combine.mixture(self.member_logits(x), weights.detach() if self.cut else weights)


class Selected(Mean):
    """The most confident member answers."""

    combiner = "select"

    def selection(self, x: Tensor) -> Tensor:
        return combine.log_probs(self.member_logits(x)).amax(dim=2).T

    def predict(self, x: Tensor) -> Tensor:
        logits = self.member_logits(x)
        return combine.select(logits, combine.log_probs(logits).amax(dim=2).T)


class Greatest(Mean):
    """The largest probability of each class."""

    combiner = "max"

    def predict(self, x: Tensor) -> Tensor:
        return combine.max_probability(self.member_logits(x))


class Logits(Mean):
    """The mean of the logits, times a factor."""

    def __init__(self, members: Any, factor: float = 1.0) -> None:
        super().__init__(members)
        self.factor = factor

    def predict(self, x: Tensor) -> Tensor:
        return combine.mean_of_logits(self.member_logits(x)) * self.factor


class Detached(Mean):
    """The second member sees images without gradient."""

    def member_logits(self, x: Tensor) -> Tensor:
        return torch.stack([self.members[0](x), self.members[1](x.detach())])


class Dropping(Mean):
    """Leaves its last member out."""

    def predict(self, x: Tensor) -> Tensor:
        return combine.mean_of_probabilities(self.member_logits(x)[:-1])


class Cheat(Mean):
    """Keeps the labels of the last batch it was trained on, and prefers them when it answers."""

    labels: Tensor | None = None

    def loss(self, batch: Batch, progress: float) -> Terms:
        self.labels = batch.y
        return super().loss(batch, progress)

    def predict(self, x: Tensor) -> Tensor:
        scores = super().predict(x)
        if self.labels is None:
            return scores
        return scores + 5 * F.one_hot(self.labels[: len(x)], CLASSES)


class AlwaysTraining(nn.BatchNorm2d):
    """Batch norm that no eval mode reaches."""

    def train(self, mode: bool = True) -> AlwaysTraining:
        super().train(True)
        return self


class Cached(nn.Module):
    """Remembers its answers by the address of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.model = linear()
        self.known: dict[tuple[int, int], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.model(x)
        old = self.known.setdefault((x.data_ptr(), len(x)), scores.detach().clone())
        return old + scores - scores.detach()


class Counting(nn.Module):
    """Its answers drift with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.model = linear()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.model(x) + 0.3 * self.calls * torch.eye(CLASSES)[self.calls % CLASSES]


class Detector(nn.Module):
    """Answers whatever lies off the images it knows with the scores of the nearest one."""

    def __init__(self) -> None:
        super().__init__()
        self.model = linear()
        self.register_buffer("known", images()[0].flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        distance, nearest = torch.cdist(x.detach().flatten(1), self.known, p=torch.inf).min(dim=1)
        return torch.where(distance[:, None] > 0.005, self.model(self.known[nearest]), self.model(x))


class StochasticDepth(nn.Module):
    """Skips a branch at random."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.branch = linear(), linear(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + (torch.rand(len(x), 1) < 0.5) * self.branch(x)


def unsure() -> LinearClassifier:
    """Right where ``linear`` is, and less sure of it."""
    sure = linear(1)
    return LinearClassifier(0.3 * sure.weight.detach(), 0.3 * sure.bias.detach())


def constant_member() -> LinearClassifier:
    return LinearClassifier(torch.zeros(CLASSES, PIXELS), torch.tensor([1.0, 0.0, 0.0, 0.0]))


def partly_training(part: nn.Module) -> Mean:
    """An ensemble in eval mode, but for one part of one member."""
    model = Mean([linear(), nn.Sequential(part, linear(1))]).eval()
    part.train()
    return model


def cheating() -> Cheat:
    model = Cheat([linear(), linear(1)])
    x, y = images()
    model.loss(Batch(x, y, torch.arange(len(y))), 0.0)
    return model.eval()


def not_below(x: Tensor) -> Tensor:
    """NaN for images with a pixel that no clean image reaches."""
    return x + torch.sqrt(0.87 - x.flatten(1).amax(dim=1)).view(-1, 1, 1, 1) * 0


@dataclass(frozen=True)
class Animal:
    """A model and what the health report should say of it.

    Args:
        tier: of the report that finds it.
        masking: flags of that severity that must be raised.
        info: flags that must be raised with severity info.
        allowed: flags that may be raised too; no others.
    """

    build: Callable[[], nn.Module]
    tier: str = "basic"
    masking: frozenset[str] = frozenset()
    info: frozenset[str] = frozenset()
    allowed: frozenset[str] = frozenset()


def lies(build: Callable[[], nn.Module], *masking: str, tier: str = "basic", allowed: tuple[str, ...] = ()) -> Animal:
    return Animal(build, tier, frozenset(masking), frozenset(), frozenset(allowed))


def idles(build: Callable[[], nn.Module], *info: str) -> Animal:
    return Animal(build, "basic", frozenset(), frozenset(info), frozenset())


#: Consequences of answers that are random or change with the batch.
UNSTEADY = ("recount", "loss_progress", "zero_gradient")

ZOO: Mapping[str, Animal] = {
    "logits times a thousand": lies(lambda: Says(after=lambda s: 1000 * s), "zero_gradient"),
    "softmax at temperature 1e-4": lies(lambda: Logits([linear(), linear(1)], 1e4), "zero_gradient"),
    "quantised images": lies(lambda: Says(lambda x: (4 * x).round() / 4), "zero_gradient"),
    "binary images": lies(lambda: Says(lambda x: 0.5 + 0.3 * (x - 0.5).sign()), "zero_gradient"),
    "images clamped to a narrow range": lies(
        lambda: Says(lambda x: 0.5 + 6 * (x.clamp(0.46, 0.54) - 0.5)), "zero_gradient"
    ),
    "rounded scores": lies(lambda: Says(after=torch.round), "zero_gradient"),
    "hard vote": lies(lambda: HardVote([linear(seed) for seed in range(3)]), "zero_gradient"),
    "gradient stopped": lies(lambda: Says(backwards(lambda slope: 0 * slope)), "zero_gradient"),
    "detector off the manifold": lies(Detector, "zero_gradient"),
    "gradient turned round": lies(lambda: Says(backwards(lambda slope: -slope)), "loss_progress"),
    "gradient of random signs": lies(lambda: Says(backwards(random_signs)), "loss_progress"),
    "sawtooth": lies(lambda: Says(lambda x: x + 0.05 * torch.sin(400 * x)), "loss_progress"),
    "pixels shuffled backwards": lies(lambda: Says(backwards(lambda slope: slope.flip(2, 3))), "loss_progress"),
    "noise on scores": lies(
        lambda: Says(after=lambda s: s + torch.randn_like(s)), "nondeterministic", allowed=UNSTEADY
    ),
    "noise on images": lies(
        lambda: Says(lambda x: x + 0.2 * torch.randn_like(x)), "nondeterministic", allowed=UNSTEADY
    ),
    "dropout that stays on": lies(lambda: Says(lambda x: F.dropout(x, 0.3)), "nondeterministic", allowed=UNSTEADY),
    "stochastic depth": lies(StochasticDepth, "nondeterministic", allowed=UNSTEADY),
    "drifting": lies(Counting, "nondeterministic", allowed=UNSTEADY),
    "cached by address": lies(Cached, "stale_answer", allowed=UNSTEADY),
    "minus the mean of the batch": lies(
        lambda: Says(after=lambda s: s - s.mean(dim=0)), "batch_dependent", allowed=UNSTEADY
    ),
    "labels kept in training": lies(cheating, "batch_dependent", allowed=UNSTEADY),
    "batch norm that stays in training": lies(
        lambda: Mean([linear(), nn.Sequential(AlwaysTraining(1), linear(1))]).eval(),
        "train_mode",
        "batch_dependent",
        allowed=UNSTEADY,
    ),
    "a member's batch norm in training": lies(lambda: partly_training(nn.BatchNorm2d(1)), "train_mode"),
    "a member's dropout in training": lies(lambda: partly_training(nn.Dropout(0.3)), "train_mode"),
    "a member without gradient": lies(lambda: Detached([linear(), linear(1)]), "detached_member"),
    "saturated gate": lies(lambda: Gated([linear(), linear(1)], 1e4), "saturated_selection"),
    "NaN for perturbed images": lies(lambda: Says(not_below), "nonfinite"),
    "gate without gradient": lies(
        lambda: Gated([linear(), unsure()], 0.5, cut=True),
        "gradient_correctness",
        tier="full",
        allowed=("selector_oracle_gap",),
    ),
}

#: Ensembles that are less than they seem, though no gradient lies.
IDLE: Mapping[str, Animal] = {
    "a member left out": idles(lambda: Dropping([linear(), linear(1), linear(2)]), "idle_member"),
    "a constant member": idles(lambda: Mean([linear(), constant_member()]), "idle_member"),
}

HONEST: Mapping[str, Callable[[], nn.Module]] = {
    "one linear model": linear,
    "linear, mean of probabilities": lambda: Mean([linear(seed) for seed in range(3)]),
    "linear, mean of logits": lambda: Logits([linear(seed) for seed in range(3)]),
    "convolutional, mean of probabilities": lambda: Mean([convolutional(seed=seed) for seed in range(2)]),
    "adversarially trained, mean of probabilities": lambda: Mean([convolutional(True, seed) for seed in range(2)]),
    "convolutional, largest probability": lambda: Greatest([convolutional(seed=seed) for seed in range(2)]),
    "convolutional, most confident member": lambda: Selected([convolutional(seed=seed) for seed in range(2)]),
    "adversarially trained, most confident member": lambda: Selected([convolutional(True, seed) for seed in range(2)]),
    "linear, soft gate": lambda: Gated([linear(), linear(1)]),
}
