"""From a protocol to its cells: names, parameters, radii and data checked, and every defence built once."""

from __future__ import annotations

import dataclasses

from ensdef.attack_spec import AttackSpec
from ensdef.data import Data
from ensdef.errors import UsageError
from ensdef.keys import content_key
from ensdef.notation import parse_call
from ensdef.protocol import AttackColumn, Protocol
from ensdef.registry import ATTACKS, DATASETS, METHODS
from ensdef.rehearsal import rehearse
from ensdef.scores import check_scores
from ensdef.specs import Cell, ModelSpec
from ensdef.target import Target
from ensdef.trainings import Trainings


def plan(protocol: Protocol) -> tuple[list[Cell], Data]:
    """Every cell of a protocol, checked: names, parameters, radii, data, and that each defence can be built.

    Raises:
        UsageError: before anything is trained, naming what was expected.
    """
    cells, data = expand(protocol)
    rehearse_all(cells, data)
    return cells, data


def expand(protocol: Protocol) -> tuple[list[Cell], Data]:
    """Every cell of a protocol, each defence by each attack by each radius by each seed, and the data.

    Raises:
        UsageError: a name, a parameter, a radius or the data cannot be; defences are not built yet.
    """

    methods = [parse_call(row.call)[0] for row in protocol.rows]
    columns = [(parse_call(column.call), column) for column in protocol.attacks]
    if not methods or not columns or not protocol.seeds:
        raise UsageError(f"protocol {protocol.name} has no {'methods' if not methods else 'attacks or seeds'}")
    used = [*methods, *protocol.method_recipes]
    for registry, names in ((METHODS, used), (ATTACKS, [call[0] for call, _ in columns])):
        for name in names:
            registry.get(name)
    source = DATASETS.get(protocol.dataset)

    def radii(column: AttackColumn) -> tuple[str, ...]:
        return column.eps or protocol.eps or (source.eps[column.norm or protocol.norm],)

    # once without the data, so that a misspelt parameter is refused before a data set is read
    for (name, params), column in columns:
        for eps in radii(column):
            AttackSpec.create(
                name,
                params,
                column.norm or protocol.norm,
                eps,
                search=protocol.search,
                combiner=protocol.combiner,
                seed=protocol.attack_seed,
            )
    trainings = Trainings(protocol)
    cells: dict[str, Cell] = {}
    for row in protocol.rows:
        for seed in protocol.seeds:
            for (attack, params), column in columns:
                norm = column.norm or protocol.norm
                for eps in radii(column):
                    spec = AttackSpec.create(
                        attack,
                        params,
                        norm,
                        eps,
                        dimensions=trainings.data_spec.dimensions,
                        search=protocol.search,
                        combiner=protocol.combiner,
                        seed=protocol.attack_seed,
                    )
                    training = trainings.of(row, seed, norm, eps)
                    cell = Cell(training, spec, trainings.samples, trainings.subset_checksum)
                    cells[cell.key] = cell
    return list(cells.values()), trainings.data


def rehearse_all(cells: list[Cell], data: Data) -> None:
    """Build every defence once and look at its scores, so that a broken one is refused before any training."""

    x = data.test.x(slice(0, 4))
    models: dict[str, ModelSpec] = {}
    attacks: dict[str, dict[str, AttackSpec]] = {}
    for cell in cells:
        for spec in (cell.training, *cell.training.prerequisites.values()):
            key = content_key(dataclasses.asdict(spec.model))  # seeds and recipes change nothing here
            models[key] = spec.model
            if spec is cell.training:
                attacks.setdefault(key, {})[f"{cell.attack.call} on {cell.attack.combiner}"] = cell.attack
    for key, model in models.items():
        defense, scores = rehearse(model, x)
        check_scores(scores, len(x), f"{model.method}.predict", model.num_classes)
        met = list(attacks.get(key, {}).values())
        traits = {one: Target(defense, combiner=one).traits(x[:1]) for one in {attack.combiner for attack in met}}
        for attack in met:
            ATTACKS.get(attack.name)(attack.params_object).fits(traits[attack.combiner])
