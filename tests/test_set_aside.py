"""Damaged files of a results folder: found by their checksums, set aside with a word, and made again."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_executors import SMALL, Recording, cell, told

import ensdef
import ensdef.cli.inspect
import ensdef.cli.plot
import ensdef.cli.report
import ensdef.cli.run
from ensdef.checkpoints import SPEC, WEIGHTS, checkpoint_folder, is_complete, save_last_good
from ensdef.claims import Claims
from ensdef.cli import cli
from ensdef.errors import CheckpointError, UsageError
from ensdef.finished import find_record, is_whole, record_path, whole_record
from ensdef.jobs import CellJob, Job, Result, TrainJob, attempt
from ensdef.measure_spec import MeasureSpec
from ensdef.measuring import measure_all
from ensdef.progress import Progress
from ensdef.runner import Run, run_cells
from ensdef.set_aside import set_aside
from ensdef.specs import Cell


class Listening(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A results folder with one training and one record; tests work on copies."""
    results = tmp_path_factory.mktemp("finished") / "results"
    (record,) = run_cells([cell()], Run(results))
    return results, told(record)


@pytest.fixture
def results(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "results"))


def again(results: Path, asked: Cell | None = None, room: int = 1) -> tuple[Any, list[str], list[str]]:
    """The record, which jobs were done for it, and what was told of files set aside."""
    executor, progress = Recording(results, room), Listening()
    (record,) = run_cells([asked or cell()], Run(results), progress, executor)
    return (
        record,
        [label.partition(" ")[0] for label in executor.given],
        [line for line in progress.lines if "set aside" in line],
    )


# --- by itself ------------------------------------------------------------------------------------


def test_what_is_set_aside_lies_beside_under_a_new_number_each_time(tmp_path: Path) -> None:
    lines: list[str] = []
    for number in (1, 2, 3):
        (tmp_path / "file").write_text(str(number))
        target = set_aside(tmp_path / "file", "it is torn", lines.append)
        assert target == tmp_path / f"file.damaged-{number}"
        assert target.read_text() == str(number)
    assert not (tmp_path / "file").exists()
    assert len(lines) == 3
    assert all(part in lines[0] for part in ("it is torn", str(tmp_path / "file"), "file.damaged-1", "made again"))


def test_the_line_leaves_out_what_the_user_would_have_had_to_do(tmp_path: Path) -> None:
    lines: list[str] = []
    (tmp_path / "file").touch()
    set_aside(
        tmp_path / "file", f"{tmp_path / 'file'}: no JSON; delete the file to have it computed again", lines.append
    )
    assert "delete" not in lines[0]
    assert lines[0].count(str(tmp_path)) == 1


# --- records --------------------------------------------------------------------------------------


def turn(text: str) -> str:
    body = json.loads(text)
    body["outcomes"]["robust"][0] = 1 - body["outcomes"]["robust"][0]
    return json.dumps(body)


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[: len(text) // 2], lambda text: "", lambda text: "\x00" * len(text), lambda text: "{}", turn],
    ids=["half", "empty", "zeros", "no record", "edited"],
)
def test_a_damaged_record_is_set_aside_and_its_cell_attacked_again(
    damage: Callable[[str], str], results: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    path = record_path(cell(), results)
    path.write_text(damage(path.read_text()))
    content = path.read_bytes()
    record, done, lines = again(results)
    assert told(record) == finished[1]
    assert done == ["nat"], "the training is whole"
    assert len(lines) == 1
    assert path.with_name(path.name + ".damaged-1").read_bytes() == content
    assert find_record(cell(), results) is not None


def test_a_record_that_is_no_text_is_set_aside_too(results: Path) -> None:
    record_path(cell(), results).write_bytes(b"\xff\xfe\x00")
    record, _, lines = again(results)
    assert record.error is None
    assert len(lines) == 1


def test_the_record_of_another_cell_under_the_name_of_this_one_is_set_aside(results: Path) -> None:
    (other,) = run_cells([cell(attack="pgd")], Run(results))
    shutil.copy(str(other.path), record_path(cell(), results))
    with pytest.raises(UsageError, match=f"record of another cell .{other.key[:16]}"):
        find_record(cell(), results)
    record, _, lines = again(results)
    assert (record.key, record.attack) == (cell().key, "fgsm")
    assert len(lines) == 1


def test_a_damaged_record_that_another_command_is_at_stays_where_it_is(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = record_path(cell(), results)
    whole = path.read_text()
    path.write_text(whole[:100])
    other = Claims(results)
    assert other.take(cell().key)

    class Waiting(Listening):
        def message(self, text: str) -> None:
            super().message(text)
            assert path.read_text() == whole[:100]
            path.write_text(whole)
            other.release_all()

    monkeypatch.setattr("ensdef.runner.POLL", 0.01)
    progress = Waiting()
    (record,) = run_cells([cell()], Run(results), progress)
    assert record.error is None
    assert len(progress.lines) == 1
    assert "waiting" in progress.lines[0]
    assert not list(path.parent.glob("*.damaged*"))


def test_reading_alone_refuses_a_damaged_record_and_moves_nothing(results: Path) -> None:
    path = record_path(cell(), results)
    path.write_text("{")
    with pytest.raises(UsageError, match="delete the file"):
        find_record(cell(), results)
    assert whole_record(cell(), results) is None
    assert path.read_text() == "{"


# --- checkpoints ----------------------------------------------------------------------------------


def edit_weights(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, folder / WEIGHTS)


def edit_description(folder: Path) -> None:
    text = (folder / SPEC).read_text()
    assert '"images_seen": 64' in text
    (folder / SPEC).write_text(text.replace('"images_seen": 64', '"images_seen": 65'))


def cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


class Trap:
    """Unpickling this leaves a folder behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def other_architecture(folder: Path) -> None:
    """Whole, with checksums that fit, but of another network."""
    from ensdef.build import build_defense
    from ensdef.checkpoints import save_checkpoint
    from ensdef.specs import TrainSpec

    spec: TrainSpec = cell().training
    wide = TrainSpec.create("nat", {}, dataclasses.replace(spec.setting, architecture="small_resnet[width=6]"))
    save_checkpoint(folder, build_defense(wide.model), spec, {})


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "half the weights": cut,
    "no weights in the file": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "other weights": edit_weights,
    "an edited description": edit_description,
    "half a description": lambda folder: (folder / SPEC).write_text((folder / SPEC).read_text()[:200]),
}
#: Whole files that somebody put there.
FOREIGN: dict[str, Callable[[Path], Any]] = {
    "a pickle": lambda folder: (folder / WEIGHTS).write_bytes(pickle.dumps(Trap(folder / "sprung"))),
    "another architecture": other_architecture,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_trained_again(damage: Callable[[Path], Any], results: Path) -> None:
    folder = checkpoint_folder(results, cell().training)
    before = (folder / WEIGHTS).read_bytes()
    damage(folder)
    record, done, lines = again(results, cell(attack="pgd"))
    assert record.error is None
    assert done == ["train", "nat"]
    assert len(lines) == 1
    assert str(folder) in lines[0]
    assert (folder / WEIGHTS).read_bytes() == before, "the same training gives the same weights"
    aside = folder.with_name(folder.name + ".damaged-1")
    assert aside.is_dir()
    assert not list(results.rglob("sprung"))


@pytest.mark.parametrize("put", FOREIGN.values(), ids=FOREIGN)
def test_weights_that_somebody_put_there_are_refused_and_stay(put: Callable[[Path], Any], results: Path) -> None:
    folder = checkpoint_folder(results, cell().training)
    put(folder)
    content = (folder / WEIGHTS).read_bytes()
    with pytest.raises(CheckpointError, match=r"belongs to another architecture|is a pickle"):
        again(results, cell(attack="pgd"))
    assert (folder / WEIGHTS).read_bytes() == content
    assert not list(results.rglob("sprung"))


@pytest.mark.parametrize("damage", [*DAMAGES.values(), *FOREIGN.values()], ids=[*DAMAGES, *FOREIGN])
def test_a_damaged_checkpoint_is_never_loaded(damage: Callable[[Path], Any], results: Path) -> None:
    folder = checkpoint_folder(results, cell().training)
    damage(folder)
    with pytest.raises(CheckpointError, match=re.escape(str(folder))):
        ensdef.load_checkpoint(folder)
    assert folder.is_dir(), "reading alone moves nothing"


def test_a_checkpoint_older_than_its_checksums_is_read_as_it_is(results: Path) -> None:
    folder = checkpoint_folder(results, cell().training)
    description = json.loads((folder / SPEC).read_text())
    for name in ("sha256", "weights_sha256"):
        del description[name]
    (folder / SPEC).write_text(json.dumps(description))
    ensdef.load_checkpoint(folder)
    assert is_whole(cell().training, results)
    assert again(results, cell(attack="pgd"))[1:] == (["nat"], [])


def test_a_training_that_was_never_finished_is_no_damage(results: Path) -> None:
    folder = checkpoint_folder(results, cell().training)
    (folder / SPEC).unlink()
    (folder / "of its own").touch()
    _, done, lines = again(results, cell(attack="pgd"))
    assert done == ["train", "nat"]
    assert lines == []
    assert (folder / "of its own").exists()


def test_new_weights_beside_what_was_told_of_a_broken_training_are_not_taken_for_finished(results: Path) -> None:
    """As a crash leaves them between the two files, after a training that broke the first time."""
    folder = checkpoint_folder(results, cell().training)
    weights = (folder / WEIGHTS).read_bytes()
    save_last_good(folder, weights, cell().training, "the loss became NaN")
    assert not is_complete(folder, cell().training)
    record, done, _ = again(results, cell(attack="pgd"))
    assert record.error is None
    assert done == ["train", "nat"]
    assert is_complete(folder, cell().training)


def test_a_checkpoint_set_aside_by_another_command_under_a_running_attack_costs_one_more_try(results: Path) -> None:
    folder = checkpoint_folder(results, cell().training)

    class Pulled(Recording):
        """Another command sets the checkpoint aside before the first attack reads it."""

        def next(self) -> tuple[Job, Result]:
            if isinstance(self.waiting[0], CellJob) and not folder.with_name("away").exists():
                folder.rename(folder.with_name("away"))
            return super().next()

    executor = Pulled(results, 1)
    (record,) = run_cells([cell(attack="pgd")], Run(results), executor=executor)
    assert record.error is None
    assert [label.partition(" ")[0] for label in executor.given] == ["nat", "train", "nat"]


def test_a_checkpoint_that_goes_away_again_and_again_ends_the_run_and_frees_its_claims(results: Path) -> None:
    class Vanishing(Recording):
        def next(self) -> tuple[Job, Result]:
            if isinstance(self.waiting[0], CellJob):
                shutil.rmtree(checkpoint_folder(self.results, cell().training))
            return super().next()

    with pytest.raises(CheckpointError, match="no checkpoint"):
        run_cells([cell(attack="pgd")], Run(results), executor=Vanishing(results, 1))
    assert Claims(results).take(cell(attack="pgd").key)


def test_weights_that_are_not_finite_fail_their_cell_with_the_reason_and_no_other(results: Path) -> None:
    folder = checkpoint_folder(results, cell().training)
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name, tensor in sorted(tensors.items()) if tensor.is_floating_point())
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, folder / WEIGHTS)
    description = json.loads((folder / SPEC).read_text())
    for item in ("sha256", "weights_sha256"):  # with them it would be set aside
        del description[item]
    (folder / SPEC).write_text(json.dumps(description))
    broken, fine = run_cells([cell(attack="pgd"), cell(seed=1)], Run(results))
    assert broken.error is not None
    assert f"weights {name!r}" in broken.error
    assert "not finite" in broken.error
    assert fine.error is None


# --- tables ---------------------------------------------------------------------------------------


def bench(results: Path, attack: str) -> Any:
    return CliRunner().invoke(cli, ["bench", "--method", "nat", "--attack", attack, *SMALL, "--results", str(results)])


def test_a_bench_leaves_out_of_its_table_what_earlier_ones_left_damaged(tmp_path: Path) -> None:
    assert bench(tmp_path, "fgsm").exit_code == 0
    (earlier,) = tmp_path.glob("records/*/*/*.json")
    earlier.write_text("{")
    result = bench(tmp_path, "bim")
    assert result.exit_code == 0, result.output
    assert f"left out of the table bench: {earlier}" in result.stderr
    assert earlier.read_text() == "{", "not this command's work, so not its to move"
    assert "fgsm" not in (tmp_path / "tables/bench.csv").read_text()
    assert "bim" in (tmp_path / "tables/bench.csv").read_text()

    (tmp_path / "manifests/bench.json").write_text("{")
    result = bench(tmp_path, "fgsm,bim")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("set aside") == 2, "the manifest and the record"
    assert "fgsm" in (tmp_path / "tables/bench.csv").read_text()


@pytest.mark.parametrize("command", [["table", "bench"], ["table", "--all"], ["report"], ["plot", "robustness"]])
def test_commands_that_only_read_refuse_a_damaged_record_and_move_nothing(command: list[str], tmp_path: Path) -> None:
    assert bench(tmp_path, "fgsm").exit_code == 0
    (record,) = tmp_path.glob("records/*/*/*.json")
    record.write_text(turn(record.read_text()))
    out = ["--out", str(tmp_path / "out.svg")] if command[0] == "plot" else []
    result = CliRunner().invoke(cli, [*command, "--results", str(tmp_path), *out])
    assert result.exit_code == 2, result.output
    assert str(record) in result.stderr
    assert "delete the file" in result.stderr
    assert record.exists()
    assert not list(tmp_path.rglob("*.damaged*"))


# --- a process that stood still -------------------------------------------------------------------


def test_the_result_of_a_process_that_was_overtaken_is_dropped_for_the_other_one_s(tmp_path: Path) -> None:
    class Overtaken(Recording):
        """Stands still for so long at every job that another command takes it over and does it."""

        def next(self) -> tuple[Job, Result]:
            job, result = super().next()
            (folder,) = (tmp_path / ".claims").glob(f"{job.key[:16]}.leases")
            (folder / "99").write_text("{}")
            if isinstance(job, CellJob):
                stored = attempt(job, self.results, Progress()).record
                assert stored is not None
                from ensdef.records import Store

                Store(self.results).write(dataclasses.replace(stored, seconds=99.0))
            return job, result

    progress = Listening()
    (record,) = run_cells([cell()], Run(tmp_path), progress, Overtaken(tmp_path, 1))
    assert record.seconds == 99.0
    assert sum("dropped" in line for line in progress.lines) == 2, "of the training, and of the attack"


def test_a_training_that_another_process_finished_meanwhile_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = TrainJob(cell().training, Run(tmp_path))
    job.perform(tmp_path, Progress())
    files = [checkpoint_folder(tmp_path, job.spec) / name for name in (SPEC, WEIGHTS)]
    before = [path.stat().st_ino for path in files]
    job.perform(tmp_path, Progress())
    assert [path.stat().st_ino for path in files] == before


# --- measurements ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [lambda text: text[:50], lambda text: text.replace("0.995", "0.994", 1)])
def test_a_damaged_measurement_is_set_aside_and_made_again(damage: Callable[[str], str], tmp_path: Path) -> None:
    spec = MeasureSpec.create("igat_toy", {})
    (made,) = measure_all([spec], Run(tmp_path))
    path = Path(str(made.path))
    path.write_text(damage(path.read_text()))
    progress = Listening()
    (again,) = measure_all([spec], Run(tmp_path), progress)
    assert again.values == made.values
    assert sum("set aside" in line for line in progress.lines) == 1
    assert path.with_name(path.name + ".damaged-1").is_file()
