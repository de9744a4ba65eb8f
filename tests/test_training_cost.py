"""What a training took: told by its checkpoint, added up over what it started from, and carried into records."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toys_defense import toy_data, toy_spec

from ensdef.attack_spec import AttackSpec
from ensdef.checkpoints import checkpoint_folder, training_report
from ensdef.cost import count_passes, multiplications
from ensdef.loading import attacked_subset, find_data
from ensdef.records import Record, Store
from ensdef.runner import Run, run_cells
from ensdef.specs import Cell, Setting, TrainSpec
from ensdef.training import train
from ensdef.training_cost import costs_of, whole_cost

RECIPE = {"epochs": 1, "batch_size": 30, "attack": {"steps": 2}}


def cell(method: str = "adv", attack: str = "fgsm", **hyper: Any) -> Cell:
    data, spec = find_data("digits", limit=60)
    setting = Setting(spec, "small_resnet[width=4]", 2, "linf", "0.2", RECIPE)
    test, _ = attacked_subset(data, 10)
    return Cell(
        TrainSpec.create(method, hyper, setting), AttackSpec.create(attack, {}, "linf", "0.2"), 10, test.checksum()
    )


def costs(record: Record) -> Mapping[str, Any]:
    told: Mapping[str, Any] = record.provenance["training"]
    return told


def test_a_record_tells_what_its_training_took(tmp_path: Path) -> None:
    (record,) = run_cells([cell()], Run(tmp_path))
    report = training_report(checkpoint_folder(tmp_path, cell().training))
    images = 60
    passes = count_passes("adv", steps=2).total * images
    assert costs(record)["passes"] == pytest.approx(passes)
    assert costs(record)["seconds"] == pytest.approx(report["seconds"], abs=1e-3)
    assert costs(record)["peak_memory_mb"] > 50, "a process that imported torch"
    defense = train(toy_spec("adv", toy_data()), toy_data()).defense
    expected = sum(one.numel() for one in defense.parameters())
    # five classes there, ten here
    assert costs(record)["parameters"] == expected + 5 * (8 + 1)
    one = multiplications(defense.members[0], (1, 8, 8)) + 5 * 8
    assert costs(record)["multiplications"] == pytest.approx(3 * passes * one)


def test_the_costs_of_what_a_training_started_from_are_added(tmp_path: Path) -> None:
    spec = cell("dverge").training
    (record,) = run_cells([cell("dverge")], Run(tmp_path))
    (start,) = spec.prerequisites.values()
    seconds = [training_report(checkpoint_folder(tmp_path, one))["seconds"] for one in (spec, start)]
    assert costs(record)["seconds"] == pytest.approx(sum(seconds), abs=2e-3)
    batches = [count_passes(one.method, 2, 2).total for one in (spec, start)]
    assert costs(record)["passes"] == pytest.approx(60 * sum(batches))


def test_a_training_that_several_start_from_is_counted_once() -> None:
    shared = {"seconds": 4.0, "passes": 1.0, "multiplications": 9.0, "peak_memory_mb": 300.0, "parameters": 5}
    own = {"seconds": 2.0, "passes": 2.0, "multiplications": 1.0, "peak_memory_mb": 200.0, "parameters": 7}
    assert whole_cost({"costs": {"me": own, "expert": own, "start": shared}}, "me") == {
        "parameters": 7,
        "seconds": 8.0,
        "passes": 5.0,
        "multiplications": 11.0,
        "peak_memory_mb": 300.0,
    }


def test_a_checkpoint_made_before_costs_were_counted_tells_none() -> None:
    expected = dict.fromkeys(("parameters", "seconds", "passes", "multiplications", "peak_memory_mb"))
    assert whole_cost({"seconds": 3.0}, "me") == expected


def test_a_sum_over_a_training_that_does_not_tell_is_not_told() -> None:
    data = toy_data()
    spec = toy_spec("adv", data)
    trained = train(spec, data)
    whole = whole_cost({"costs": costs_of(spec, trained, [("old", {"seconds": 3.0})])}, spec.key)
    assert whole["parameters"] is not None
    assert (whole["seconds"], whole["passes"], whole["peak_memory_mb"]) == (None, None, None)


def test_a_defence_that_cannot_be_counted_is_trained_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise RuntimeError("no networks in here")

    monkeypatch.setattr("ensdef.training_cost.count_passes", refuse)
    data = toy_data()
    spec = toy_spec("adv", data)
    (own,) = costs_of(spec, train(spec, data), []).values()
    assert (own["passes"], own["multiplications"]) == (None, None)
    assert own["parameters"] > 0


def test_costs_change_no_key(tmp_path: Path) -> None:
    first = copy.deepcopy(cell().key)
    run_cells([cell()], Run(tmp_path))
    assert cell().key == first


def test_a_record_that_another_protocol_finds_is_from_then_on_one_of_its_own_too(tmp_path: Path) -> None:
    (made,) = run_cells([cell()], Run(tmp_path, protocol="first-v1"))
    for _ in range(2):
        (found,) = run_cells([cell()], Run(tmp_path, protocol="second-v1"))
        assert found.provenance["also_in"] == ["second-v1"]
    (stored,) = Store(tmp_path).all()
    expected = replace(made, provenance={**made.provenance, "also_in": ["second-v1"]})
    assert stored.to_json() == expected.to_json()
    (found,) = run_cells([cell()], Run(tmp_path))
    assert json.loads(Path(str(found.path)).read_text())["provenance"]["protocol"] == "first-v1"
