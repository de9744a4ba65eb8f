"""Measurements as files: their keys, what is stored and refused, and the flow that makes what is missing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from ensdef import codehash
from ensdef.checkpoints import checkpoint_folder
from ensdef.claims import Claims
from ensdef.cli import cli, inspect, measure  # noqa: F401 - they add their commands
from ensdef.errors import DataError, UsageError
from ensdef.jobs import Run, TrainJob
from ensdef.loading import find_data
from ensdef.measure import Dependency, Measure, Measured, Subject, register_measure
from ensdef.measurement import Measurement, Measurements, read_measurement
from ensdef.measuring import MeasureSpec, find_measurement, measure_all
from ensdef.progress import Progress
from ensdef.registry import MEASUREMENTS
from ensdef.specs import Setting, TrainSpec


def training(method: str = "nat", seed: int = 0, members: int = 2, **hyper: Any) -> TrainSpec:
    """A training of less than a second."""
    _, spec = find_data("digits", limit=64)
    setting = Setting(
        spec, "small_resnet[width=4]", members, "linf", "0.2", recipe={"epochs": 1, "batch_size": 32}, seed=seed
    )
    return TrainSpec.create(method, hyper, setting)


def spec(call: str = "member_accuracy", **changes: Any) -> MeasureSpec:
    """A measurement on 20 images; parameters of it are given as ``params``."""
    given = {"training": training(), "samples": 20, "params": {}, **changes}
    return MeasureSpec.create(call, given.pop("params"), **given)


ATTACKED = {"attack": "pgd", "steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Measurement]:
    """A results folder with one measurement; not to be written to."""
    results = tmp_path_factory.mktemp("measured")
    (made,) = measure_all([spec(params=ATTACKED, eps="51/255")], Run(results))
    return results, made


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[Subject], Measured]], None]:
    """Registers a function as a measurement that depends on the defence alone, while the test runs."""
    for name in MEASUREMENTS.names():  # what is imported meanwhile would be forgotten too
        MEASUREMENTS.get(name)
    monkeypatch.setattr(MEASUREMENTS, "_registered", dict(MEASUREMENTS._registered))

    def register(name: str, function: Callable[[Subject], Measured]) -> None:
        class Made(Measure):
            """Made up."""

            @classmethod
            def depends_on(cls, params: Any) -> frozenset[Dependency]:
                return frozenset({"defense"})

            def measure(self, subject: Subject) -> Measured:
                return function(subject)

        register_measure(name)(Made)

    return register


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"eps": "0.2"}, {"eps": "1/5"}),
        ({"eps": "0.2"}, {}),
        ({"params": ATTACKED}, {"params": {**ATTACKED, "step_size": "eps/4"}}),
        ({"params": ATTACKED}, {"params": {"attack": "pgd", "steps": "2"}}),
    ],
    ids=["notation", "default radius", "default parameter", "text"],
)
def test_one_measurement_written_in_two_ways_has_one_key(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert spec(**{"params": ATTACKED, **one}).key == spec(**{"params": ATTACKED, **other}).key


@pytest.mark.parametrize(
    "change",
    [
        {"training": training(seed=1)},
        {"training": training("adp")},
        {"training": training(members=3)},
        {"params": {**ATTACKED, "steps": 3}},
        {"params": {**ATTACKED, "attack": "mim"}},
        {"eps": "0.1"},
        {"norm": "l2", "eps": "0.2"},
        {"samples": 21},
        {"seed": 1},
        {"combiner": "max"},
        {"call": "detection"},
    ],
    ids=str,
)
def test_what_may_change_the_numbers_changes_the_key(change: dict[str, Any]) -> None:
    assert spec(**{"params": ATTACKED, "eps": "0.2", **change}).key != spec(params=ATTACKED, eps="0.2").key


@pytest.mark.parametrize(
    ("call", "change"),
    [
        ("member_accuracy", {"eps": "0.1"}),
        ("member_accuracy", {"seed": 1}),
        ("training_cost", {"eps": "0.1", "seed": 1, "samples": 30, "combiner": "max"}),
        ("allocation", {"combiner": "max"}),
        ("xor", {"training": training("adp"), "eps": "0.1", "samples": 30}),
        ("igat_toy", {"training": None, "seed": 1}),
    ],
)
def test_what_cannot_change_the_numbers_does_not_change_the_key(call: str, change: dict[str, Any]) -> None:
    assert spec(call, **change).key == spec(call).key


def test_another_formula_in_the_diagnostics_gives_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: spec(name).key for name in ("allocation", "detection")}
    source = codehash._source

    def edited(module: Any) -> str:
        text = source(module)
        return text.replace("EDGES = (0.5", "EDGES = (0.4") if module.__name__.endswith("s.allocation") else text

    monkeypatch.setattr(codehash, "_source", edited)
    assert spec("allocation").key != before["allocation"]
    assert spec("detection").key == before["detection"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"call": "transferabilty"}, "did you mean 'transferability'"),
        ({"call": "detection", "params": {"step": 3}}, "detection has no parameter 'step'; it has: attack, steps"),
        ({"call": "detection", "params": {"steps": 0}}, "steps is 0; expected at least 1"),
        ({"call": "detection", "params": {"step_size": "eps/x"}}, "step_size"),
        ({"call": "detection", "training": None}, "give its training"),
        ({"call": "detection", "eps": "8"}, "did you mean '8/255'"),
        ({"call": "detection", "combiner": "median"}, "expected native, avg, max, vote"),
        ({"call": "loss_surface", "params": {"grid": 10}}, "expected an odd number"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as refusal:
        spec(**words)
    assert told in str(refusal.value)


# --- the file -------------------------------------------------------------------------------------


def test_a_measurement_survives_its_file(folder: tuple[Path, Measurement]) -> None:
    results, made = folder
    read = read_measurement(str(made.path))
    assert read.to_json() == made.to_json() == Path(str(made.path)).read_text(encoding="utf-8")
    assert Path(str(made.path)) == results / "measurements" / "digits" / "nat" / f"member_accuracy-{made.key[:16]}.json"


def test_a_measurement_describes_itself_and_its_training(folder: tuple[Path, Measurement]) -> None:
    _, made = folder
    assert (made.label, made.dataset, made.train_seed, made.n) == ("nat", "digits", 0, 20)
    assert (made.norm, made.eps, made.eps_value) == ("linf", "51/255", 0.2)
    assert made.call == "member_accuracy[attack=pgd,steps=2]"
    assert made.training["key"] == training().key
    assert made.training["recipe"]["epochs"] == 1
    assert {"versions", "device", "git_commit", "protocol", "subset_checksum"} <= set(made.provenance)
    assert made.seconds > 0
    assert Path(str(made.checkpoint)).is_dir()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"ensemble": 0', '"ensemble": 1'),
        ('"n": 20', '"n": 200'),
        ('"eps": "51/255"', '"eps": "8/255"'),
        ('"member1"', '"member7"'),
        ('"steps": 2', '"steps": 100'),
    ],
)
def test_a_file_edited_by_hand_is_refused(folder: tuple[Path, Measurement], tmp_path: Path, old: str, new: str) -> None:
    text = Path(str(folder[1].path)).read_text(encoding="utf-8")
    text = text.replace('"ensemble": 1', '"ensemble": 0.999') if old.startswith('"ensemble') else text
    assert old in text
    path = tmp_path / "edited.json"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UsageError, match="edited since it was measured"):
        read_measurement(path)


def test_an_edited_point_of_a_series_is_refused(tmp_path: Path) -> None:
    (made,) = measure_all([MeasureSpec.create("igat_toy", {})], Run(tmp_path))
    path = Path(str(made.path))
    path.write_text(path.read_text(encoding="utf-8").replace("0.995", "0.994", 1), encoding="utf-8")
    with pytest.raises(UsageError, match="delete the file to have it measured again"):
        read_measurement(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 2}', '{"format": 1, "checksum": "x"}'])
def test_a_file_that_is_no_measurement_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="delete the file"):
        read_measurement(path)


def test_a_file_under_the_name_of_another_is_refused(tmp_path: Path) -> None:
    one, other = MeasureSpec.create("xor", {"steps": 1}), MeasureSpec.create("xor", {"steps": 2})
    (made,) = measure_all([one], Run(tmp_path))
    Path(str(made.path)).rename(Measurements(tmp_path).path(None, None, "xor", other.key))
    with pytest.raises(UsageError, match="not the one it is named after"):
        find_measurement(other, Run(tmp_path))
    assert measure_all([other], Run(tmp_path))[0].key == other.key, "set aside, and made"


def test_undefined_quantities_are_stored_as_null(tmp_path: Path, registered: Any) -> None:
    registered("made_up", lambda subject: Measured({"none": math.nan, "some": 0.5}, {"s": [[math.inf, 1.0], [2]]}))
    (made,) = measure_all([spec("made_up")], Run(tmp_path))
    body = json.loads(Path(str(made.path)).read_text(encoding="utf-8"))
    assert body["values"] == {"none": None, "some": 0.5}
    assert body["series"] == {"s": [[None, 1.0], [2]]}
    assert read_measurement(str(made.path)).values == {"none": None, "some": 0.5}


def test_reading_measurements_does_not_load_torch(folder: tuple[Path, Measurement]) -> None:
    script = (
        "import sys; from pathlib import Path; from ensdef.measurement import Measurements\n"
        f"print(len(list(Measurements(Path({str(folder[0])!r})).all())))\n"
        "assert 'torch' not in sys.modules"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stdout.strip()) == (0, "1"), finished.stderr


# --- the flow -------------------------------------------------------------------------------------


def test_measured_again_is_the_same_to_the_digit(folder: tuple[Path, Measurement], tmp_path: Path) -> None:
    (again,) = measure_all([spec(params=ATTACKED, eps="51/255")], Run(tmp_path))
    assert (again.values, again.stderr, again.series) == (folder[1].values, folder[1].stderr, folder[1].series)


def test_a_stored_measurement_is_neither_trained_nor_measured_again(
    folder: tuple[Path, Measurement], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("worked")

    monkeypatch.setattr(TrainJob, "perform", never)
    monkeypatch.setattr(MEASUREMENTS.get("member_accuracy"), "measure", never)
    (found,) = measure_all([spec(params=ATTACKED, eps="0.2")], Run(folder[0]))
    assert found.values == folder[1].values
    assert found.eps == "0.2", "as asked for now"


def test_results_come_in_the_order_asked_for_and_each_is_made_once(tmp_path: Path, registered: Any) -> None:
    made: list[Any] = []
    registered("counted", lambda subject: made.append(subject) or Measured({"parameters": 1}))
    asked = [spec("counted"), spec("training_cost"), spec("counted", eps="0.1")]
    found = measure_all(asked, Run(tmp_path))
    assert [one.name for one in found] == ["counted", "training_cost", "counted"]
    assert found[0] == found[2]
    assert len(made) == 1


def test_a_measurement_is_handed_only_what_it_says_it_depends_on(tmp_path: Path, registered: Any) -> None:
    seen: list[Subject] = []
    registered("curious", lambda subject: seen.append(subject) or Measured({}))
    measure_all([spec("curious", eps="0.1", seed=3)], Run(tmp_path))
    (subject,) = seen
    assert (len(subject.x), subject.eps, subject.norm, subject.seed) == (0, "", "", 0)
    assert not subject.defense.training


def test_a_failed_training_fails_its_measurements_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    perform, tried = TrainJob.perform, []

    def break_one(job: TrainJob, where: Path, progress: Progress) -> None:
        tried.append(job.spec.method)
        if job.spec.method == "adp":
            raise RuntimeError("the loss is NaN")
        perform(job, where, progress)

    monkeypatch.setattr(TrainJob, "perform", break_one)
    broken = training("adp")
    found = measure_all(
        [spec("training_cost", training=broken), spec(training=broken), spec("training_cost")], Run(tmp_path)
    )
    assert [one.error for one in found] == ["the loss is NaN", "the loss is NaN", None]
    assert tried == ["adp", "nat"], "not begun again for the second measurement"
    assert [one.name for one in Measurements(tmp_path).all()] == ["training_cost"]


def test_a_measurement_that_fails_says_why_and_is_not_stored(tmp_path: Path, registered: Any) -> None:
    registered("broken", lambda subject: 1 / 0)
    broken, fine = measure_all([spec("broken"), spec("training_cost")], Run(tmp_path))
    assert broken.error == "ZeroDivisionError: division by zero"
    assert broken.values == {}
    assert fine.error is None
    assert [one.name for one in Measurements(tmp_path).all()] == ["training_cost"]


def test_a_damaged_checkpoint_is_set_aside_and_trained_again_for_a_measurement(
    folder: tuple[Path, Measurement], tmp_path: Path
) -> None:
    measure_all([spec("training_cost")], Run(tmp_path))
    place = checkpoint_folder(tmp_path, training())
    before = (place / "weights.safetensors").read_bytes()
    (place / "weights.safetensors").write_bytes(b"short")
    (made,) = measure_all([spec()], Run(tmp_path))
    assert made.error is None
    assert (place / "weights.safetensors").read_bytes() == before
    assert place.with_name(place.name + ".damaged-1").is_dir()


def test_other_test_images_than_those_of_the_key_are_refused(tmp_path: Path) -> None:
    altered = dataclasses.replace(spec(), subset_checksum="0123456789abcdef")
    with pytest.raises(DataError, match="0123456789abcdef was expected"):
        measure_all([altered], Run(tmp_path))


def test_what_another_process_is_at_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensdef.measuring.POLL", 0.01)
    asked, other = MeasureSpec.create("igat_toy", {}), Claims(tmp_path)
    assert other.take(asked.key)
    told: list[str] = []

    class Listening(Progress):
        def message(self, text: str) -> None:
            told.append(text)
            other.release(asked.key)

    (found,) = measure_all([asked], Run(tmp_path), Listening())
    assert found.values["single"] == 0.5
    assert len(told) == 1
    assert "1 measurements" in told[0]


def test_the_combiner_replaces_the_answer_and_not_the_members(tmp_path: Path) -> None:
    native, voted = measure_all([spec(), spec(combiner="vote")], Run(tmp_path))
    for name in ("member1", "member2"):
        assert native.values[name] == voted.values[name]
    assert voted.combiner == "vote"


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def measured() -> Callable[..., Any]:
    def command(*words: str) -> Any:
        return CliRunner().invoke(cli, ["measure", *words], prog_name="ensdef")

    return command


PLUGIN = '''
"""A measurement of one's own (A. Author; nowhere, 2020)."""

from ensdef.measure import Measure, Measured, register_measure


@register_measure("longest_layer")
class LongestLayer(Measure):
    """Number of values in the largest tensor of weights."""

    @classmethod
    def depends_on(cls, params):
        return frozenset({"defense"})

    def measure(self, subject):
        return Measured({"values": max(weights.numel() for weights in subject.defense.parameters())})
'''
SMALL = ("--limit", "64", "--epochs", "1", "--members", "2", "--samples", "20", "--device", "cpu")


def test_the_command_prints_values_and_where_they_are(measured: Any, tmp_path: Path) -> None:
    result = measured("training_cost,member_accuracy", "--method", "nat", *SMALL, "--results", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "member_accuracy of nat on digits, seed 0, n = 20" in result.stdout
    assert "model_size_mb" in result.stdout
    for one in Measurements(tmp_path).all():
        assert str(one.path) in result.stdout


def test_json_prints_the_measurements_alone_and_without_series(measured: Any, tmp_path: Path) -> None:
    result = measured("xor[steps=5,count=50]", "--json", "--results", str(tmp_path))
    (one,) = json.loads(result.stdout)
    assert one["values"]["opposite_mse"] == pytest.approx(0.1 / 1.1)
    assert one["n"] == 50
    assert "series" not in one


def test_a_plugin_file_may_bring_a_measurement(measured: Any, tmp_path: Path, registered: Any) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN, encoding="utf-8")
    words = ("longest_layer", "--plugin", str(tmp_path / "mine.py"), "--method", "nat")
    result = measured(*words, *SMALL, "--results", str(tmp_path))
    assert result.exit_code == 0, result.output
    (one,) = Measurements(tmp_path).all("longest_layer")
    assert one.values["values"] == 32 * 32 * 9, "32 filters of 32 channels, three by three"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("detection",), "name some with --method"),
        (("detections", "--method", "nat"), "did you mean 'detection'"),
        (("detection[steps=x]", "--method", "nat"), "steps"),
        (("detection[view=member9]", "--method", "nat"), "no view 'member9'"),
        (("transferability", "--method", "adv"), "expected at least 2"),
        (("xor", "--seed", "-1"), "whole numbers from 0"),
    ],
)
def test_the_command_refuses_before_any_training(measured: Any, tmp_path: Path, words: Any, told: str) -> None:
    result = measured(*words, *SMALL, "--results", str(tmp_path))
    assert result.exit_code == 2
    assert told in result.stderr
    assert not (tmp_path / "checkpoints").exists()


def test_every_measurement_is_listed_with_its_source() -> None:
    lines = CliRunner().invoke(cli, ["list", "measurements"]).stdout.splitlines()
    listed = {line.split()[0]: following for line, following in itertools.pairwise(lines) if line[0] != " "}
    assert set(MEASUREMENTS.names()) == set(listed)
    assert {"training_cost", "transferability", "detection", "allocation", "curvature", "xor"} <= set(listed)
    assert all(len(source.strip()) > 40 for source in listed.values())


def test_every_measurement_of_a_defence_runs_on_a_trained_one(tmp_path: Path) -> None:
    names = [name for name in MEASUREMENTS.names() if name not in ("xor", "igat_toy")]
    quick = {"loss_surface": {"steps": 1, "grid": 3}, "training_cost": {}}
    found = measure_all(
        [spec(name, params=quick.get(name, {"steps": 1}), samples=100) for name in names], Run(tmp_path)
    )
    assert [one.error for one in found] == [None] * len(names)
    assert all(one.values for one in found)
    assert torch.is_grad_enabled()
