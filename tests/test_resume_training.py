"""A training that was killed goes on from its last kept epoch, and ends with the weights that it would have had."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from toys_defense import Plain, TwoStreams, registered, same_weights, toy_data, toy_spec
from toys_journal import Killed, KilledAfter, Told, always

from ensdef import training
from ensdef.build import build_defense
from ensdef.defense import Batch, Terms
from ensdef.errors import DataError, TrainingDiverged
from ensdef.jobs import Run, TrainJob
from ensdef.journal import Journal, Snapshot
from ensdef.progress import Progress
from ensdef.registry import METHODS
from ensdef.specs import TrainSpec
from ensdef.training import Trained, train

DATA = toy_data()
#: Batches of an epoch on the toy data.
BATCHES = 3
BUILT_IN = METHODS.names()


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with registered():
        yield


def trained(spec: TrainSpec, journal: Journal | None = None, progress: Progress | None = None) -> Trained:
    needed = {role: build_defense(one.model, seed=7) for role, one in spec.prerequisites.items()}
    return train(spec, DATA, needed, device="cpu", journal=journal, progress=progress)


def killed(spec: TrainSpec, journal: Journal, batches: int) -> None:
    with pytest.raises(Killed):
        trained(spec, journal, KilledAfter(batches))


def told(report: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name not in ("seconds", "peak_memory_mb")}


def goes_on(spec: TrainSpec, folder: Path, batches: int = BATCHES + 1) -> None:
    """Killed after so many batches and taken up again, a training ends as one that was left alone."""
    alone = trained(spec)
    killed(spec, always(folder), batches)
    progress = Told()
    again = trained(spec, always(folder), progress)
    done = batches // BATCHES
    assert any(line.endswith(f"goes on after {done} of {spec.recipe.epochs} epochs") for line in progress.lines)
    # the bar is told of the epochs that are done at once, then of every batch of the others
    assert progress.steps == [done * BATCHES, *[1] * ((spec.recipe.epochs - done) * BATCHES)]
    assert same_weights(again.defense, alone.defense)
    assert told(again.report) == told(alone.report)


@pytest.mark.parametrize(("optimizer", "keep"), [("sgd", "last"), ("adam", "best")])
@pytest.mark.parametrize("method", BUILT_IN)
def test_every_method_resumes_to_the_same_weights(method: str, optimizer: str, keep: str, tmp_path: Path) -> None:
    batch_size = 8 if keep == "last" else 7  # a tenth is held out: 22 images are left
    goes_on(toy_spec(method, DATA, epochs=3, optimizer=optimizer, keep=keep, batch_size=batch_size), tmp_path)


def test_numbers_that_a_defence_counts_for_itself_go_on(tmp_path: Path) -> None:
    # the setting of a batch is the turn's, which is no weight; five settings over three batches an epoch
    goes_on(toy_spec("more", DATA, {"settings": "turns"}, epochs=3, optimizer="adam"), tmp_path)


@dataclass(frozen=True)
class NoisyHyper:
    rate: float = 0.5


class Noisy(Plain):
    """Draws from torch's global state, as dropout does."""

    Hyper = NoisyHyper

    def loss(self, batch: Batch, progress: float) -> Terms:
        kept = torch.rand(len(batch.y)) > self.hyper.rate
        terms = super().loss(batch, progress)
        assert isinstance(terms, dict)
        return {"ce": terms["ce"] * kept.float().mean()}


def test_the_global_random_state_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS._registered, "toy_noisy", Noisy)
    goes_on(toy_spec("toy_noisy", DATA, epochs=3), tmp_path)


def test_a_batch_of_a_finished_epoch_is_never_seen_again(tmp_path: Path) -> None:
    spec = toy_spec("toy_probe", DATA, epochs=4)
    killed(spec, always(tmp_path), 2 * BATCHES + 1)
    again = trained(spec, always(tmp_path)).defense
    assert isinstance(again, Plain)
    progress = [float(progress) for _, progress, _ in again.seen]  # type: ignore[attr-defined]
    assert progress == pytest.approx([step / 12 for step in range(6, 12)])


def test_a_training_that_was_killed_many_times_is_the_same(tmp_path: Path) -> None:
    spec = toy_spec("toy_two_streams", DATA, epochs=4)
    for batches in (1, BATCHES, BATCHES + 2, BATCHES + 1):  # of what is left: at epoch 0, 0, 1, 2
        killed(spec, always(tmp_path), batches)
    again = trained(spec, always(tmp_path))
    assert isinstance(again.defense, TwoStreams)
    assert same_weights(again.defense, trained(spec).defense)


def test_seconds_of_all_processes_add_up(tmp_path: Path) -> None:
    spec = toy_spec("toy_plain", DATA, epochs=2)
    journal = always(tmp_path)
    killed(spec, journal, BATCHES + 1)
    kept = journal.read()
    assert kept is not None
    kept.values["seconds"] += 100.0
    journal.keep(lambda: kept)
    assert 100.0 < trained(spec, always(tmp_path)).report["seconds"] < 130.0


def test_the_largest_memory_of_all_processes_is_told(tmp_path: Path) -> None:
    spec = toy_spec("toy_plain", DATA, epochs=2)
    journal = always(tmp_path)
    killed(spec, journal, BATCHES + 1)
    kept = journal.read()
    assert kept is not None
    kept.values["peak"] = 2**50
    journal.keep(lambda: kept)
    assert trained(spec, always(tmp_path)).report["peak_memory_mb"] == 2**30


def test_a_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    spec = toy_spec("toy_plain", DATA, epochs=2)
    always(tmp_path).keep(lambda: Snapshot({"model.members": torch.zeros(3)}, {"epoch": 1}))
    with pytest.raises(DataError, match=r"work\.journal does not fit.*delete it"):
        trained(spec, always(tmp_path))


def test_several_devices_keep_nothing_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress, spec = Told(), toy_spec("nat", DATA)
    weights = build_defense(spec.model).state_dict()
    monkeypatch.setattr(training, "launch", lambda *arguments, **options: (weights, {"health": []}))
    train(spec, DATA, device="cpu", devices=2, journal=always(tmp_path), progress=progress)
    assert not list(tmp_path.iterdir())
    assert progress.lines[0].endswith("on 2 devices it is not kept; if it is stopped, it starts over")


def test_the_state_is_gone_when_the_checkpoint_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = toy_spec("toy_plain", DATA, epochs=2)
    path = Journal.path_of(tmp_path, spec.key)
    monkeypatch.setattr("ensdef.jobs.reload_data", lambda data: DATA)
    monkeypatch.setattr(Journal, "due", True)
    with pytest.raises(Killed):
        TrainJob(spec, Run(tmp_path)).perform(tmp_path, KilledAfter(BATCHES + 1))
    assert path.is_file()
    progress = Told()
    TrainJob(spec, Run(tmp_path)).perform(tmp_path, progress)
    assert "goes on after 1 of 2 epochs" in progress.lines[0]
    assert not path.exists()


def test_a_training_that_breaks_begins_anew_when_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = toy_spec("toy_diverging", DATA, epochs=3)
    monkeypatch.setattr("ensdef.jobs.reload_data", lambda data: DATA)
    monkeypatch.setattr(Journal, "due", True)
    with pytest.raises(TrainingDiverged):
        TrainJob(spec, Run(tmp_path)).perform(tmp_path, Progress())
    assert not Journal.path_of(tmp_path, spec.key).exists()


def test_in_a_folder_that_ends_with_the_job_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = toy_spec("toy_plain", DATA, epochs=2)
    monkeypatch.setattr("ensdef.jobs.reload_data", lambda data: DATA)
    monkeypatch.setattr(Journal, "due", True)
    with pytest.raises(Killed):
        TrainJob(spec, Run(tmp_path / "results")).perform(tmp_path / "scratch", KilledAfter(BATCHES + 1))
    assert not list(tmp_path.rglob("*.journal"))
