"""From cells to a plan: each training once, each probe once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ensdef.adversarial_sets import AdversarialSets
from ensdef.attack import Attack
from ensdef.build import build_defense
from ensdef.checkpoints import checkpoint_folder, is_complete, load_checkpoint
from ensdef.defense import EnsembleDefense
from ensdef.errors import CheckpointError, DataError
from ensdef.health.catalogue import Tier
from ensdef.keys import content_key
from ensdef.loading import attacked_subset, reload_data
from ensdef.planner.attack import AttackedModel, Rates, cell_work, parts_of
from ensdef.planner.crafting import crafting_work
from ensdef.planner.plan import Plan, PlannedCell, PlannedTraining, State
from ensdef.planner.stopwatch import Stopwatch
from ensdef.planner.survivors import (
    CLEAN,
    HALF_LEARNED,
    NATURAL,
    NATURAL_BLIND,
    OTHER_NORM,
    TRAINED,
    Survivors,
    assumed,
    measured,
)
from ensdef.planner.training import TrainingRates, probe_training
from ensdef.planner.work import Work
from ensdef.registry import ATTACKS
from ensdef.runner import find_record
from ensdef.specs import Cell, TrainSpec

T = TypeVar("T")
#: Seconds that the probes of one training and of one cell may take, and all of each kind together, about.
TRAINING, CELL, TOGETHER = 1.0, 0.8, 16.0
#: Seconds of probing attacks after which a network's alike stand for it.
LONG = 60.0


def estimate(
    cells: Iterable[Cell],
    results: Path,
    *,
    device: str = "cpu",
    batch_size: int = 128,
    health: Tier | None = None,
    startup: float = 0.0,
    watch: Stopwatch | None = None,
) -> Plan:
    """Probe what is missing; writes nothing, and probes nothing where all is done.

    Args:
        results: folder with the records and checkpoints that are there.
        device, batch_size, health: as the run will have them.
        startup: seconds that this command took before its work began.
    Raises:
        CheckpointError, DataError: what is there is damaged.
    """
    planner = _Planner(results, device, batch_size, health, watch or Stopwatch(device))
    cells = list(cells)
    states = [planner.state(cell) for cell in cells]
    missing = [cell for cell, state in zip(cells, states, strict=True) if state != "done"]
    specs = missing_trainings(missing, results)
    planner.training_seconds = min(TRAINING, TOGETHER / max(1, len(specs)))
    planner.cell_seconds = min(CELL, TOGETHER / max(1, len(missing)))
    trainings = [planner.training(spec) for spec in specs]
    planned = [planner.cell(cell, state) for cell, state in zip(cells, states, strict=True)]
    return Plan(tuple(trainings), tuple(planned), startup, planner.assumptions())


def missing_trainings(cells: Iterable[Cell], results: Path) -> list[TrainSpec]:
    """What has to be trained for these cells, in the order in which it will be, each key once."""
    found: dict[str, TrainSpec] = {}
    for cell in cells:
        for spec in (cell.training, *cell.prerequisites.values()):
            for needed in _missing(spec, results):
                found.setdefault(needed.key, needed)
    return list(found.values())


def _missing(spec: TrainSpec, results: Path) -> Iterator[TrainSpec]:
    if not is_complete(checkpoint_folder(results, spec), spec):
        for needed in spec.prerequisites.values():
            yield from _missing(needed, results)
        yield spec


@dataclass
class _Planner:
    """Probes, and remembers what it probed."""

    results: Path
    device: str
    batch_size: int
    health: Tier | None
    watch: Stopwatch
    known: dict[str, Any] = field(default_factory=dict)
    training_seconds: float = TRAINING
    cell_seconds: float = CELL
    crafted: set[str] = field(default_factory=set)
    measured: int = 0
    assumed: int = 0
    #: networks whose attacks were not timed
    likened: set[str] = field(default_factory=set)
    #: rates of an attack on an architecture with so many members, and that network's seconds of a forward pass
    timed: dict[str, tuple[Rates, float]] = field(default_factory=dict)
    spent: float = 0.0
    latest: tuple[tuple[str, ...], AttackedModel] | None = None

    def state(self, cell: Cell) -> State:
        if find_record(cell, self.results, self.health) is not None:
            return "done"
        return "attack" if self._trained(cell.training) else "train and attack"

    def training(self, spec: TrainSpec) -> PlannedTraining:
        try:
            data = reload_data(spec.setting.data)
            recipe = dataclasses.asdict(dataclasses.replace(spec.recipe, epochs=1, lr=0.0))
            setting = [spec.setting.norm, spec.setting.precision, len(data.train)]
            key = [_network(spec), recipe, setting, {role: _network(one) for role, one in spec.prerequisites.items()}]
            rates: TrainingRates = self._once(
                "training", key, lambda: probe_training(spec, data, self.device, self.watch, self.training_seconds)
            )
            return PlannedTraining(spec, rates.work(spec, len(data.train)))
        except (CheckpointError, DataError):
            raise
        except Exception as error:  # one plug-in that fails here must not cost the plan of the others
            return PlannedTraining(spec, None, f"{type(error).__name__}: {error}")

    def cell(self, cell: Cell, state: State) -> PlannedCell:
        if state == "done":
            return PlannedCell(cell, state, Work())
        try:
            return PlannedCell(cell, state, self._attacked(cell, state == "attack"))
        except (CheckpointError, DataError):
            raise
        except Exception as error:
            return PlannedCell(cell, state, None, f"{type(error).__name__}: {error}")

    def assumptions(self) -> tuple[str, ...]:
        told = []
        if self.measured:
            told.append("of trained defences, a short PGD on a few images told how many withstand")
        if self.assumed:
            told.append(
                f"of untrained ones it is assumed that {CLEAN:.0%} of the images are right, and that of these at the "
                f"training's radius {TRAINED:.0%} withstand if trained on attacks ({OTHER_NORM:.0%} in another norm; "
                f"half as many after a training that shows {HALF_LEARNED:,} images), "
                f"{NATURAL:.1%} if not ({NATURAL_BLIND:.0%} where the attack has no gradients)"
            )
        if self.likened:
            told.append(
                f"{LONG:.0f} seconds of probing being over, attacks on {len(self.likened)} further networks were taken "
                "to last as on one of the same architecture and number of members, in proportion to its forward pass"
            )
        return tuple(told)

    def _attacked(self, cell: Cell, trained: bool) -> Work:
        device = torch.device(self.device)
        test, ids = attacked_subset(reload_data(cell.training.setting.data), cell.samples)
        x, y, ids = test.x().to(device), test.labels.to(device), ids.to(device)
        self.watch.begin_peak()
        model = self._model(cell, x, y, ids)
        attack: Attack = ATTACKS.get(cell.attack.name)(cell.attack.params_object)
        surrogates = {role: self._defense(spec).to(device) for role, spec in cell.prerequisites.items()}
        crafting = Work()
        if surrogates:
            attack.warm_start(surrogates)
        if type(attack).prepare is not Attack.prepare:
            stored = AdversarialSets(self.results)
            crafting = crafting_work(attack, cell.attack, (x, y, ids), stored, self.crafted, self.watch, model.forward)
        attack.fits(model.traits)
        survivors = self._survivors(model, cell, trained, attack)
        tier: Tier = self.health or "basic"
        spec, network = cell.training.model, _network(cell.training)
        asked = [{**cell.attack.identity(), "eps": None, "seed": None}, tier == "off"]

        def rates(index: int, parts: int, part: Attack, mode: str, rows: int) -> Rates:
            alike = content_key([spec.architecture_call, spec.members, *asked, index, mode])
            if self.spent > LONG and alike in self.timed:
                known, forward = self.timed[alike]
                self.likened.add(content_key(network))
                return known.scaled(model.forward / forward)
            began = self.watch.now()
            found: Rates = self._once(
                "rates",
                [network, *asked, index, mode, rows],
                lambda: model.rates(part, cell, mode, rows, tier != "off", self.cell_seconds / parts / 2),
            )
            self.spent += self.watch.now() - began
            self.timed[alike] = found, model.forward
            return found

        work = cell_work(model, attack, cell, survivors, tier, rates)
        return work + crafting

    def _model(self, cell: Cell, x: Tensor, y: Tensor, ids: Tensor) -> AttackedModel:
        key = cell.training.key, cell.attack.combiner, cell.subset_checksum
        if self.latest is None or self.latest[0] != key:
            self.latest = None  # one at a time: their memory must not add up
            defense = self._defense(cell.training).to(x.device)
            self.latest = key, AttackedModel(defense, cell.attack.combiner, x, y, ids, self.batch_size, self.watch)
        return self.latest[1]

    def _survivors(self, model: AttackedModel, cell: Cell, trained: bool, attack: Attack) -> Survivors:
        if not trained or "predict" not in model.traits.differentiable:
            self.assumed += 1
            return assumed(cell.training, cell.attack, len(reload_data(cell.training.setting.data).train))
        self.measured += 1
        every = len(parts_of(attack, cell.attack.call, model.traits)) > 1
        key = [cell.training.key, cell.attack.norm, cell.attack.eps, cell.attack.combiner, cell.subset_checksum, every]
        return self._once(
            "survivors",
            key,
            lambda: measured(model.judge, model.x, model.y, cell.attack, every, self.batch_size),
        )

    def _defense(self, spec: TrainSpec) -> EnsembleDefense:
        if self._trained(spec):
            return load_checkpoint(checkpoint_folder(self.results, spec))
        return build_defense(spec.model, spec.setting.seed)

    def _trained(self, spec: TrainSpec) -> bool:
        return is_complete(checkpoint_folder(self.results, spec), spec)

    def _once(self, what: str, key: Any, make: Callable[[], T]) -> T:
        name = what + content_key(key)
        if name not in self.known:
            self.known[name] = make()
        found: T = self.known[name]
        return found


def _network(spec: TrainSpec) -> Mapping[str, Any]:
    """What decides how long a network takes, weights apart."""
    return dataclasses.asdict(spec.model)
