"""What machines do: disks that fill up, clocks that jump, data that change under a cached result."""

from __future__ import annotations

import ast
import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from test_executors import SMALL, cell

import ensdef
from ensdef.attack_spec import AttackSpec
from ensdef.cli import cli, run  # noqa: F401 - run adds its commands
from ensdef.errors import DataError, StorageError
from ensdef.finished import find_record, record_path
from ensdef.loading import attacked_subset, find_data
from ensdef.records import write_bytes
from ensdef.runner import Run, run_cells
from ensdef.specs import Cell, Setting, TrainSpec

# --- the disk -------------------------------------------------------------------------------------


def full_for(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """No room for files under whose path ``what`` stands."""
    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if what in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)


def test_a_file_that_cannot_be_written_is_named_with_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_for(monkeypatch, "file")
    with pytest.raises(StorageError, match="No space left") as caught:
        write_bytes(tmp_path / "file", b"content")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "file"))
    assert list(tmp_path.iterdir()) == []


def test_the_cause_comes_back_from_another_process_as_it_was() -> None:
    error = pickle.loads(pickle.dumps(StorageError(errno.ENOSPC, "No space left on device", "results/file")))
    assert (type(error), error.strerror, error.filename) == (StorageError, "No space left on device", "results/file")


@pytest.mark.parametrize("what", ["/checkpoints/", "/records/", "/tables/", "/manifests/"])
def test_a_full_disk_ends_the_command_with_one_line_and_what_is_done_is_kept(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["bench", "--method", "nat", "--attack", "fgsm", *SMALL, "--results", str(tmp_path / "r")]
    with monkeypatch.context() as patch:
        full_for(patch, what)
        result = CliRunner().invoke(cli, words)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), "no traceback"
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert f"{tmp_path / 'r'}{what}" in line
    assert "No space left on device" in line
    left = [path for path in (tmp_path / "r").rglob("*") if path.is_file() and ".claims" not in path.parts]
    assert not [path for path in left if what in str(path) or path.name.startswith(".")]
    order = ["/checkpoints/", "/records/", "/manifests/", "/tables/"]
    for finished in order[: order.index(what)]:
        assert [path for path in left if finished in str(path)], f"{finished} was done before"

    again = CliRunner().invoke(cli, words)
    assert again.exit_code == 0, again.output


@pytest.mark.slow
def test_a_real_limit_on_what_may_be_written_is_met_in_the_same_way(tmp_path: Path) -> None:
    """The system itself refuses files of more than 20,000 bytes: the weights."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "from ensdef.cli import main; main()"
    )
    words = ["bench", "--method", "nat", "--attack", "fgsm", *SMALL, "--results", str(tmp_path / "r")]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert "weights.safetensors could not be written: File too large" in line
    assert not list((tmp_path / "r").rglob("*.safetensors*"))


def test_a_folder_that_becomes_read_only_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a network file system is mounted anew."""
    make = os.mkdir

    def refuse(path: Any, *args: Any, **kwargs: Any) -> None:
        if ".claims" in str(path):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        make(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", refuse)
    words = ["bench", "--method", "nat", "--attack", "fgsm", *SMALL, "--results", str(tmp_path / "r")]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 1
    assert f"Error: {tmp_path / 'r' / '.claims'}: Read-only file system" in result.stderr


# --- clocks ---------------------------------------------------------------------------------------

#: Names that read a clock which can be set, and where one may: what is told is a date.
WALL_CLOCKS = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("date", "today")}
DATED = {"provenance.py"}


def test_no_clock_that_can_be_set_decides_anything() -> None:
    package = Path(ensdef.__file__).parent
    found = set()
    for path in [
        *package.rglob("*.py"),
        *(package.parent / "methods").glob("*.py"),
        *(package.parent / "attacks").glob("*.py"),
    ]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = (node.value.id, node.attr)
            elif isinstance(node, ast.ImportFrom) and node.module == "time":
                called = ("time", next((name.name for name in node.names if name.name.startswith("time")), ""))
            else:
                continue
            if called in WALL_CLOCKS:
                found.add(path.name)
    assert found == DATED


# --- data that change -----------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 8)):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "photos"


def planned(photos: Path, samples: int | None = None) -> Cell:
    """The cell that a command would plan which begins now."""
    find_data.cache_clear()
    data, spec = find_data("imagefolder", str(photos))
    setting = Setting(spec, "small_resnet[width=4]", 2, "linf", "8/255", recipe={"epochs": 1, "batch_size": 8})
    test, _ = attacked_subset(data, samples)
    attack = AttackSpec.create("fgsm", {}, "linf", "8/255")
    return Cell(TrainSpec.create("nat", {}, setting), attack, len(test), test.checksum())


def brighten(path: Path) -> None:
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)


def rename(path: Path) -> None:
    """The images of the class in another order."""
    path.rename(path.with_name("x.png"))


def relabel(path: Path) -> None:
    other = path.parent.parent / ("dog" if path.parent.name == "cat" else "cat")
    path.rename(other / "moved.png")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("change", [brighten, rename, relabel])
def test_data_that_were_changed_after_a_run_make_other_cells(
    change: Any, split: str, photos: Path, tmp_path: Path
) -> None:
    before = planned(photos)
    (record,) = run_cells([before], Run(tmp_path / "r"))
    assert record.error is None
    content = record_path(before, tmp_path / "r").read_bytes()
    change(photos / split / "cat" / "3.png")
    after = planned(photos)
    assert after.key != before.key
    assert (after.training.key != before.training.key) is (split == "train"), "the same weights meet other test images"
    assert find_record(after, tmp_path / "r") is None
    (other,) = run_cells([after], Run(tmp_path / "r"))
    assert other.key == after.key
    assert record_path(before, tmp_path / "r").read_bytes() == content


def test_a_number_stands_while_its_own_images_do(photos: Path, tmp_path: Path) -> None:
    before = planned(photos, 10)
    _, ids = attacked_subset(find_data("imagefolder", str(photos))[0], 10)
    index = min(set(range(16)) - set(ids.tolist()))
    brighten(photos / "test" / ("cat", "dog")[index // 8] / f"{index % 8}.png")
    assert planned(photos, 10).key == before.key
    assert planned(photos).key != before.key


@pytest.mark.parametrize("split", ["train", "test"])
def test_data_that_change_within_a_run_are_refused_with_both_checksums(
    split: str, photos: Path, tmp_path: Path
) -> None:
    asked = planned(photos)
    brighten(photos / split / "dog" / "0.png")
    find_data.cache_clear()  # as a process has it that begins now, on this machine or another
    _, found = find_data("imagefolder", str(photos))
    with pytest.raises(DataError) as caught:
        run_cells([asked], Run(tmp_path / "r"))
    expected = asked.training.setting.data
    for checksum in (found.train_checksum, found.test_checksum, expected.train_checksum, expected.test_checksum):
        assert checksum in str(caught.value)
    assert not list((tmp_path / "r").glob("records/*/*/*.json"))


def test_a_failed_cell_is_never_taken_for_a_finished_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ensdef.jobs.evaluate_cell", lambda *args, **kwargs: 1 / 0)
        (failed,) = run_cells([cell()], Run(tmp_path))
    assert failed.error == "ZeroDivisionError: division by zero"
    assert json.loads(record_path(cell(), tmp_path).read_text())["error"] == failed.error
    assert find_record(cell(), tmp_path) is None
    (again,) = run_cells([cell()], Run(tmp_path))
    assert again.error is None
