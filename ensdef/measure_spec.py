"""A measurement as it will be made: name, parameters, and those circumstances that it depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ensdef.codehash import NUMERICS, code_hash
from ensdef.combine import COMBINERS
from ensdef.errors import UsageError
from ensdef.keys import content_key, non_default
from ensdef.notation import at_least, fill, format_call, parse_call, parse_eps
from ensdef.registry import DATASETS, MEASUREMENTS
from ensdef.specs import TrainSpec

if TYPE_CHECKING:
    from ensdef.protocol import Protocol


@dataclass(frozen=True)
class MeasureSpec:
    """One measurement; ``key`` names its file. Make them with :meth:`create`.

    What the measurement does not depend on is None, ``native`` or 0, so that it is made once whatever is asked for.

    Args:
        training: of the defence.
        eps: reduced fraction; ``written`` is the radius as the user wrote it, which enters no key.
        samples: number of test images, the first of the fixed permutation.
        subset_checksum: of those images and labels.
        seed: of everything random in the measurement.
    """

    training: TrainSpec | None
    name: str
    params: Mapping[str, Any]
    norm: str | None = None
    eps: str | None = None
    samples: int | None = None
    subset_checksum: str | None = None
    seed: int = 0
    combiner: str = "native"
    written: str | None = None

    @classmethod
    def create(
        cls,
        name: str,
        params: Mapping[str, Any],
        *,
        training: TrainSpec | None = None,
        norm: str = "linf",
        eps: str | float | None = None,
        samples: int | None = None,
        subset_checksum: str | None = None,
        seed: int = 0,
        combiner: str = "native",
    ) -> MeasureSpec:
        """Check and fill in.

        Args:
            eps: None: the data set's default.
            samples: None: all test images, up to 1,000.
            subset_checksum: of those images, where the caller has them at hand; None: they are looked up.
        Raises:
            UsageError: unknown measurement or parameter, an impossible radius, or no training where one is needed.
        """
        measure = MEASUREMENTS.get(name)
        resolved = fill(measure.Params, params, name)
        needs = measure.depends_on(resolved)
        spec = cls(training if "defense" in needs else None, name, dataclasses.asdict(resolved))
        at_least(name, seed=(seed, 0))
        if "seed" in needs:
            spec = dataclasses.replace(spec, seed=seed)
        if "defense" not in needs:
            return spec
        if training is None:
            raise UsageError(f"{name} is measured on a trained defence; give its training (--method)")
        data = training.setting.data
        if combiner != "native" and combiner not in COMBINERS:
            raise UsageError(f"unknown combiner {combiner!r}; expected native, {', '.join(COMBINERS)}")
        if "combiner" in needs:
            spec = dataclasses.replace(spec, combiner=combiner)
        if "radius" in needs:
            written = DATASETS.get(data.name).eps[norm] if eps is None else str(eps).strip()
            radius = parse_eps(written, norm, data.dimensions)
            spec = dataclasses.replace(spec, norm=norm, eps=str(radius), written=written)
        if "images" in needs:
            if samples is None or subset_checksum is None:
                samples, subset_checksum = _subset(training, samples)
            spec = dataclasses.replace(spec, samples=samples, subset_checksum=subset_checksum)
        return spec

    @property
    def params_object(self) -> Any:
        """The parameters as the measurement's own dataclass."""
        return MEASUREMENTS.get(self.name).Params(**self.params)

    @property
    def eps_value(self) -> float | None:
        """The radius as a float."""
        return None if self.eps is None else float(parse_eps(self.eps, str(self.norm)))

    @property
    def call(self) -> str:
        """The measurement as a user writes it."""
        return format_call(self.name, non_default(MEASUREMENTS.get(self.name).Params, self.params))

    @property
    def label(self) -> str:
        """What is measured, for a line of progress."""
        if self.training is None:
            return self.call
        at = f" {self.norm} {self.written}" if self.eps is not None else ""
        return f"{self.call}{at} of {self.training.model.method_call} seed {self.training.setting.seed}"

    @cached_property
    def key(self) -> str:
        """64 hex digits; same key, same numbers (on one machine and torch build; measured times are those of once)."""
        return content_key(
            {
                "numerics": NUMERICS,
                "training": None if self.training is None else self.training.key,
                "measurement": self.name,
                "code": code_hash(MEASUREMENTS.get(self.name)),
                "params": self.params,
                "threat": [self.norm, self.eps],
                "subset": self.subset_checksum,
                "seed": self.seed,
                "combiner": self.combiner,
            }
        )


def _subset(training: TrainSpec, samples: int | None) -> tuple[int, str]:
    from ensdef.loading import attacked_subset, reload_data

    test, _ = attacked_subset(reload_data(training.setting.data), samples)
    return len(test), test.checksum()


def plan_measurements(protocol: Protocol, calls: Sequence[str], seed: int = 0) -> list[MeasureSpec]:
    """The measurements ``calls`` on every method, training seed and radius of a protocol, whose attacks do not matter.

    Raises:
        UsageError: before anything is trained, naming what was expected.
    """
    from ensdef.trainings import Trainings

    found: dict[str, MeasureSpec] = {}
    parsed = []
    for name, params in map(parse_call, calls):
        measure = MEASUREMENTS.get(name)
        # before the data, so that a misspelt parameter is refused before it is read
        if "defense" in measure.depends_on(fill(measure.Params, params, name)):
            parsed.append((name, params))
        else:
            spec = MeasureSpec.create(name, params, seed=seed)
            found[spec.key] = spec
    if not parsed:
        return list(found.values())
    if not protocol.methods:
        raise UsageError(f"{parsed[0][0]} is measured on trained defences; name some with --method")
    trainings = Trainings(protocol)
    for row in protocol.rows:
        for train_seed in protocol.seeds:
            for eps in protocol.eps or (trainings.source.eps[protocol.norm],):
                training = trainings.of(row, train_seed, protocol.norm, eps)
                for name, params in parsed:
                    spec = MeasureSpec.create(
                        name,
                        params,
                        training=training,
                        norm=protocol.norm,
                        eps=eps,
                        samples=trainings.samples,
                        subset_checksum=trainings.subset_checksum,
                        seed=seed,
                        combiner=protocol.combiner,
                    )
                    found[spec.key] = spec
    return list(found.values())
