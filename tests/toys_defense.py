"""Small data, and one toy defence for every notion of the contract; registered only while a test asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ensdef.data import Data, Split
from ensdef.defense import Batch, EnsembleDefense, Terms, register_defense
from ensdef.losses import member_cross_entropy
from ensdef.registry import METHODS
from ensdef.specs import DataSpec, Setting, TrainSpec

SHAPE, CLASSES = (1, 8, 8), 5
ARCHITECTURE = "small_resnet[width=4]"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def number(value: Tensor) -> float:
    """A scalar tensor, with gradient or without, as a number."""
    return float(value.detach())


def toy_data(count: int = 24, seed: int = 0) -> Data:
    """Random images, labels in turn."""

    def split(rows: int, rng: torch.Generator) -> Split:
        pixels = torch.randint(256, (rows, *SHAPE), generator=rng).to(torch.uint8)
        return Split(pixels, torch.arange(rows) % CLASSES)

    rng = generator(seed)
    return Data("digits", split(count, rng), split(10, rng), tuple("abcde"))


def toy_setting(data: Data, **changes: Any) -> Setting:
    """One epoch of batches of 8, no augmentation; ``changes`` are fields of the setting, or of the recipe."""
    spec = DataSpec(
        "digits", None, None, None, data.train.checksum(), data.test.checksum(), SHAPE, CLASSES, (0.5,), (0.25,)
    )
    fields = {"data": spec, "architecture": ARCHITECTURE, "members": 2, "norm": "linf", "train_eps": "0.1"}
    fields |= {name: changes.pop(name) for name in list(changes) if name in Setting.__dataclass_fields__}
    recipe = {"epochs": 1, "batch_size": 8, "augment": "none", "lr": 0.05, "schedule": "constant"}
    return Setting(**fields, recipe={**recipe, "attack": {"steps": 1}, **changes})


def toy_spec(method: str, data: Data, hyper: Mapping[str, Any] | None = None, **changes: Any) -> TrainSpec:
    return TrainSpec.create(method, hyper or {}, toy_setting(data, **changes))


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters and buffers are bit-identical."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def spread(module: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Weights and running statistics as after some training, so that comparisons mean something."""
    rng = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=rng))
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.3, generator=rng)
                part.running_var.uniform_(0.5, 2.0, generator=rng)
    return module


class Plain(EnsembleDefense):
    """Members trained on clean images: what most toys add one notion to."""

    def loss(self, batch: Batch, progress: float) -> Terms | Iterator[Terms]:
        return {"ce": member_cross_entropy(self.member_logits(batch.x), batch.y).mean(dim=1).sum()}


class WithNumber(Plain):
    """A defence with one more parameter, ``number``, that starts at 1."""

    def __init__(self, members: Any, hyper: Any = None) -> None:
        super().__init__(members, hyper)
        self.number = nn.Parameter(torch.ones(()))


class Probe(Plain):
    """Remembers what the trainer gave it."""

    def __init__(self, members: Any, hyper: Any = None) -> None:
        super().__init__(members, hyper)
        self.seen: list[tuple[Batch, float, float]] = []

    def loss(self, batch: Batch, progress: float) -> Terms | Iterator[Terms]:
        self.seen.append((batch, progress, self._adversary.threat.eps))  # type: ignore[union-attr]
        return super().loss(batch, progress)


class TwoStreams(Probe):
    """Asks for two batches a step."""

    streams = 2


class TwoSteps(WithNumber):
    """One optimiser step on the number itself, then one on its square."""

    def loss(self, batch: Batch, progress: float) -> Iterator[Terms]:
        yield {"first": 1.0 * self.number}
        yield {"second": self.number**2}


class OneStep(WithNumber):
    """The same terms in one step."""

    def loss(self, batch: Batch, progress: float) -> Terms:
        return {"first": 1.0 * self.number, "second": self.number**2}


class Slope(WithNumber):
    """A loss of gradient 1: every step moves the number by the learning rate."""

    def __init__(self, members: Any, hyper: Any = None) -> None:
        super().__init__(members, hyper)
        self.path: list[float] = []

    def loss(self, batch: Batch, progress: float) -> Terms:
        self.path.append(float(self.number.detach()))
        return {"slope": 1.0 * self.number}


class Extra(Plain):
    """A further module, trained and saved, that ``predict`` does not use."""

    def __init__(self, members: Any, hyper: Any = None) -> None:
        super().__init__(members, hyper)
        self.extra = nn.Linear(1, 1)

    def loss(self, batch: Batch, progress: float) -> Terms:
        logits = self.member_logits(batch.x)
        return {
            "ce": member_cross_entropy(logits, batch.y).mean(),
            "extra": self.extra(logits.detach().mean(dim=2, keepdim=True)).square().mean(),
        }


class FirstOnly(Plain):
    """Trains its first member; the others stay as they are."""

    def trainable(self) -> Iterable[nn.Parameter]:
        return self.members[0].parameters()


class Epochs(Plain):
    """Draws a number at the beginning of each epoch."""

    def __init__(self, members: Any, hyper: Any = None) -> None:
        super().__init__(members, hyper)
        self.calls: list[tuple[Any, ...]] = []

    def begin_epoch(self, epoch: int, rng: torch.Generator) -> None:
        self.calls.append(("epoch", epoch, rng.device.type, float(torch.rand((), generator=rng))))

    def loss(self, batch: Batch, progress: float) -> Terms | Iterator[Terms]:
        self.calls.append(("batch",))
        return super().loss(batch, progress)


@dataclass(frozen=True)
class FinetunedHyper:
    """Which seed the members come from; None: the training's own."""

    base_seed: int | None = None


class Finetuned(Plain):
    """Starts from the members of a plain ensemble."""

    Hyper = FinetunedHyper

    @classmethod
    def prerequisites(cls, spec: TrainSpec) -> Mapping[str, TrainSpec]:
        seed = spec.hyper.base_seed
        return {"base": spec.derive("nat", **({} if seed is None else {"seed": seed}))}

    def warm_start(self, prerequisites: Mapping[str, EnsembleDefense]) -> None:
        self.members.load_state_dict(prerequisites["base"].members.state_dict())


@dataclass(frozen=True)
class WrapperHyper:
    """Name of the defence inside."""

    base: str = "nat"


class Wrapper(EnsembleDefense):
    """Another defence with a weighted loss; the members are the other's."""

    Hyper = WrapperHyper

    def __init__(self, base: EnsembleDefense, hyper: WrapperHyper) -> None:
        super().__init__([], hyper)
        self.base = base

    @property
    def members(self) -> Any:  # type: ignore[override]
        return self.base.members

    @classmethod
    def build(
        cls, make_network: Callable[[], nn.Module], members: int, num_classes: int, hyper: Any
    ) -> EnsembleDefense:
        base = METHODS.get(hyper.base)
        return cls(base.build(make_network, members, num_classes, base.Hyper()), hyper)

    def loss(self, batch: Batch, progress: float) -> Terms:
        return {f"base_{name}": 0.5 * value for name, value in self.base.loss(batch, progress).items()}  # type: ignore[union-attr]

    def predict(self, x: Tensor) -> Tensor:
        return self.base.predict(x)


@dataclass(frozen=True)
class DivergingHyper:
    """When the loss breaks; ``steps`` optimiser steps a batch, of which the first breaks."""

    epoch: int = 1
    batch: int = 1
    steps: int = 1
    value: Literal["inf", "nan"] = "inf"


class Diverging(WithNumber):
    """A term becomes infinite, or no number, at one batch."""

    Hyper = DivergingHyper

    def __init__(self, members: Any, hyper: Any = None) -> None:
        super().__init__(members, hyper)
        self.other = nn.Parameter(torch.ones(()))
        self.at = [-1, -1]

    def begin_epoch(self, epoch: int, rng: torch.Generator) -> None:
        self.at = [epoch, -1]

    def loss(self, batch: Batch, progress: float) -> Iterator[Terms]:
        self.at[1] += 1
        factor = float(self.hyper.value) if self.at == [self.hyper.epoch, self.hyper.batch] else 1.0
        yield {"sound": self.number**2, "broken": factor * self.other**2}
        for _ in range(self.hyper.steps - 1):
            yield {"after": 1.0 * self.number}


class BestInTheMiddle(Plain):
    """Answers class 0 after its second epoch and class 1 after any other."""

    def __init__(self, members: Any, hyper: Any = None) -> None:
        super().__init__(members, hyper)
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    def begin_epoch(self, epoch: int, rng: torch.Generator) -> None:
        self.epoch.fill_(epoch)

    def predict(self, x: Tensor) -> Tensor:
        scores = torch.zeros(CLASSES)
        scores[0 if int(self.epoch) == 1 else 1] = 1e3
        return scores + self.members[0](x).clamp(-1, 1)


TOYS: Mapping[str, type[EnsembleDefense]] = {
    "toy_plain": Plain,
    "toy_probe": Probe,
    "toy_two_streams": TwoStreams,
    "toy_two_steps": TwoSteps,
    "toy_one_step": OneStep,
    "toy_slope": Slope,
    "toy_extra": Extra,
    "toy_first_only": FirstOnly,
    "toy_epochs": Epochs,
    "toy_finetuned": Finetuned,
    "toy_wrapper": Wrapper,
    "toy_diverging": Diverging,
    "toy_best_in_the_middle": BestInTheMiddle,
}


@contextmanager
def registered() -> Iterator[None]:
    """The toys can be found by name while the block runs, and leave no trace in the registry."""
    for name, toy in TOYS.items():
        register_defense(name)(toy)
    try:
        yield
    finally:
        for name in TOYS:
            METHODS._registered.pop(name, None)
