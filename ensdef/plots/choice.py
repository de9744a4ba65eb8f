"""Which of the files in a results folder a figure is drawn from. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from ensdef.errors import UsageError
from ensdef.keys import canonical
from ensdef.manifests import Manifests
from ensdef.measurement import Measurement, Measurements
from ensdef.notation import fraction
from ensdef.records import Record, Store


@dataclass(frozen=True)
class Choice:
    """Filters, empty for all, and what else a figure may be told.

    Args:
        table: only the records of this table (``manifests/<table>.json``).
        method, attack: names (``cce``) or calls with their parameters (``cce[mode=dm]``).
        dataset, norm: names.
        eps: radii in any notation.
        seed: training seeds.
        record: of ``examples``: the file.
        image: of ``surface`` and ``examples``: which of the images comes first, from 0.
        images, which: of ``examples``: how many are shown, and of which: right on the clean image and ``fooled``,
            ``robust``, or ``all``.
        style: of ``surface``.
    """

    table: str | None = None
    method: tuple[str, ...] = ()
    attack: tuple[str, ...] = ()
    dataset: str | None = None
    norm: str | None = None
    eps: tuple[str, ...] = ()
    seed: tuple[int, ...] = ()
    record: Path | None = None
    image: int = 0
    images: int = 5
    which: Literal["fooled", "robust", "all"] = "fooled"
    style: Literal["contour", "3d"] = "contour"

    def records(self, results: Path, command: str) -> list[Record]:
        """Finished records that pass the filters, in the order of the table or of their paths.

        Args:
            command: what to run where there are none.
        Raises:
            UsageError: there are none, or a record is damaged.
        """
        found = list(Store(results).all()) if self.table is None else Manifests(results).read(self.table)[1]
        found = [record for record in found if record.error is None]
        if not found:
            raise UsageError(f"no records in {results}; run `{command}`, or name another folder with --results")
        kept = [record for record in found if self._keeps(record, record.attack, record.attack_label)]
        return self._some(kept, found, "records")

    def measurements(self, results: Path, name: str, command: str) -> list[Measurement]:
        """Stored measurements of one kind that pass the filters, in the order of their paths.

        Raises:
            UsageError: there are none, or one was edited.
        """
        found = list(Measurements(results).all(name))
        if not found:
            raise UsageError(
                f"no {name} measurements in {results}; run `{command}`, or name another folder with --results"
            )
        attacked = [(one, str(one.params.get("attack", ""))) for one in found]
        kept = self._some([one for one, attack in attacked if self._keeps(one, attack, attack)], found, name)
        seen: dict[str, Measurement] = {}
        for one in kept:
            if (other := seen.setdefault(_identity(one), one)) is not one:
                first, second = (f"{each.path} (of {each.provenance.get('date')})" for each in (other, one))
                raise UsageError(
                    f"{first} and {second} are the same measurement by different code; delete the older one"
                )
        return kept

    def _keeps(self, one: Record | Measurement, attack: str, attack_label: str) -> bool:
        radii = {fraction(text, "--eps") for text in self.eps}
        return (
            (not self.method or bool({one.method, one.label} & set(self.method)))
            and (not self.attack or bool({attack, attack_label} & set(self.attack)))
            and self.dataset in (None, one.dataset)
            and self.norm in (None, one.norm)
            and (not radii or radius(one) in radii)
            and (not self.seed or one.train_seed in self.seed)
        )

    def _some(self, kept: list[Any], found: Sequence[Any], what: str) -> list[Any]:
        if kept:
            return kept
        asked = [
            f"--{item.name} {value if isinstance(value, str) else ','.join(map(str, value))}"
            for item in dataclasses.fields(self)
            if item.name in ("method", "attack", "dataset", "norm", "eps", "seed")
            and (value := getattr(self, item.name)) not in (None, ())
        ]
        methods = sorted({str(one.label) for one in found if one.label})
        radii = sorted({f"{one.norm} {one.eps}" for one in found if one.eps})
        raise UsageError(
            f"none of the {len(found)} {what} fit {' '.join(asked)}; there are methods {', '.join(methods) or 'none'} "
            f"and radii {', '.join(radii) or 'none'}"
        )


def _identity(one: Measurement) -> str:
    """What was measured, whatever the code that did it."""
    trained = (one.label, one.dataset, one.architecture, one.members, one.training.get("key"))
    return canonical([one.name, one.params, trained, one.norm, str(radius(one)), one.combiner, one.seed, one.n])


def radius(one: Record | Measurement) -> Fraction | None:
    """The attacker's radius as an exact number."""
    return None if one.eps is None else fraction(one.eps, "eps")


def telling(traits: Sequence[Mapping[str, str]], first: str = "method") -> list[str]:
    """Names of the traits that it takes to tell things apart, after ``first`` in their order, as few as possible."""
    told = [first]
    for name in traits[0]:
        apart = len({tuple(trait[other] for other in told) for trait in traits})
        if len({(*(trait[other] for other in told), trait[name]) for trait in traits}) > apart:
            told.append(name)
    return told


def listed(values: Iterable[Any]) -> str:
    """Different values in order, separated by commas."""
    return ", ".join(dict.fromkeys(map(str, values)))
