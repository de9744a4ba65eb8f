"""What the author of a measurement implements: a quantity beside accuracy, of a trained defence or of none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor

from ensdef.defense import EnsembleDefense
from ensdef.errors import PluginError
from ensdef.registry import MEASUREMENTS

#: What may change a measurement, beside its code and its parameters.
Dependency = Literal["defense", "combiner", "images", "radius", "seed"]
ON_ATTACKED_IMAGES: frozenset[Dependency] = frozenset({"defense", "combiner", "images", "radius", "seed"})


@dataclass(frozen=True)
class NoParams:
    """A measurement without parameters."""


@dataclass(frozen=True)
class Subject:
    """What is measured; of these, a measurement may use those that it says it depends on.

    Args:
        defense: trained, in eval mode, answering by the combiner asked for; left untouched.
        x, y, ids: test images in [0, 1], (N, ...), labels and positions in the test set, (N,), on its device.
        norm, eps: of the attacker, ``"linf"`` or ``"l2"`` and a fraction in text.
        seed: of everything random.
        report: what the trainer told: seconds, history, ...; ``earlier``: the reports of the trainings that this one
            started from, each once, or None where their checkpoints are gone.
    """

    defense: EnsembleDefense
    x: Tensor
    y: Tensor
    ids: Tensor
    norm: str
    eps: str
    seed: int
    report: Mapping[str, Any] = field(default_factory=dict)
    earlier: Sequence[Mapping[str, Any]] | None = ()


@dataclass(frozen=True)
class Measured:
    """What a measurement found.

    Args:
        values: fractions in [0, 1], seconds, megabytes or counts; NaN where undefined.
        series: nested lists of numbers, for figures.
        stderr: standard errors of those values that have one.
        n: what was averaged over; None: all images of the subject.
    """

    values: Mapping[str, float]
    series: Mapping[str, Any] = field(default_factory=dict)
    stderr: Mapping[str, float] = field(default_factory=dict)
    n: int | None = None


class Measure(ABC):
    """Base of all measurements; ``self.params`` is an instance of ``Params``."""

    #: Frozen dataclass of parameters, readable from text (``detection[attack=mim]``).
    Params: ClassVar[type] = NoParams

    def __init__(self, params: Any = None) -> None:
        self.params = self.Params() if params is None else params

    @classmethod
    def depends_on(cls, params: Any) -> frozenset[Dependency]:
        """What else decides the result: only that enters its key, and only that is handed over."""
        return ON_ATTACKED_IMAGES

    def fits(self, defense: EnsembleDefense) -> None:  # noqa: B027 - a hook
        """Refuse a defence before it is trained.

        Raises:
            UsageError: the measurement needs something that the defence does not have.
        """

    @abstractmethod
    def measure(self, subject: Subject) -> Measured:
        """Measure; every random number comes from ``subject.seed``."""


M = TypeVar("M", bound=type[Measure])


def register_measure(name: str) -> Callable[[M], M]:
    """Class decorator: makes ``name`` find this class.

    Raises:
        PluginError: the name is taken, or the class is no measurement.
    """

    def check(plugin: Any) -> None:
        if not (isinstance(plugin, type) and issubclass(plugin, Measure)):
            raise PluginError(
                f"@register_measure({name!r}) expects a subclass of ensdef.measure.Measure, got {plugin!r}"
            )

    return MEASUREMENTS.register(name, check)
