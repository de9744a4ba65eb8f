"""``ensdef verify``: honest records are verified, forged ones found out, and for the right reason."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from ensdef.cli import cli, verify  # noqa: F401 - verify adds its command
from ensdef.judging import is_borderline
from ensdef.verification import Verifier

RELIABILITY = Path(__file__).parent.parent / "benchmarks" / "reliability"
sys.path.insert(0, str(RELIABILITY))

import tamper  # noqa: E402
from bundles import Honest, for_forgers  # noqa: E402
from forgery import Forgery  # noqa: E402
from mutations import MUTATIONS, Mutation  # noqa: E402

sys.path.remove(str(RELIABILITY))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Honest:
    """A results folder nobody may write to."""
    return for_forgers(tmp_path_factory.mktemp("honest"))


@pytest.fixture
def forged(honest: Honest, tmp_path: Path) -> Forgery:
    return Forgery(honest, tmp_path)


def ens(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, ["verify", *map(str, words)], prog_name="ensdef")


def checked(honest: Honest, *words: str | Path) -> Result:
    return ens(*words, "--data-dir", honest.data_dir or "")


# --- forgeries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", MUTATIONS, ids=lambda one: one.name)
def test_a_forgery_is_found_and_its_reason_named(one: Mutation, honest: Honest, tmp_path: Path) -> None:
    made = tamper.tampered(one, honest, tmp_path)
    assert made.status == one.status
    assert any(one.reason in str(failure) for failure in made.failures), made.failures


def test_there_are_far_more_than_thirty_forgeries_and_each_has_a_name() -> None:
    assert len({one.name for one in MUTATIONS}) == len(MUTATIONS) >= 90


def test_a_copy_in_which_nothing_was_changed_is_verified(forged: Forgery) -> None:
    forged.write()
    made = Verifier(forged.results, str(forged.data_dir)).verify(forged.path)
    assert (made.status, made.failures) == ("verified", ())


def test_a_point_of_a_fooled_image_may_be_any_that_fools(forged: Forgery) -> None:
    image, steps = forged.steps_of(forged.images(1, 0)[0])
    forged.add_point("point_float32", image, (forged.clean_image(image) + steps / 255).clamp(0, 1))
    forged.write()
    made = Verifier(forged.results, str(forged.data_dir)).verify(forged.path)
    assert made.status == "verified"
    assert made.counts is not None
    assert made.counts.exact >= 1


def steps_raised(forged: Forgery) -> None:
    forged.body |= {"attack_params": {**forged.body["attack_params"], "steps": 500}, "attack_label": "pgd[steps=500]"}
    forged.repair_key()


def flags_removed(forged: Forgery) -> None:
    forged.body["flags"] = []


def success_given_up(forged: Forgery) -> None:
    position = forged.images(1, 0)[0]
    image, steps = forged.steps_of(position)
    forged.add_point("delta_int8", image, torch.zeros_like(steps))
    forged.body["outcomes"]["robust"][position] = 1


@pytest.mark.parametrize("forge", [steps_raised, flags_removed, success_given_up])
def test_what_forward_passes_cannot_tell_is_verified_and_the_command_says_so(
    forge: Any, forged: Forgery, honest: Honest
) -> None:
    forge(forged)
    forged.write()
    result = checked(honest, forged.path)
    assert result.exit_code == 0, result.output
    told = " ".join(result.stdout.split())
    for limit in (
        "that no attack does better",
        "that the points are those of the attack named",
        "times, passes, flags and provenance",
    ):
        assert limit in told.partition("What it cannot prove")[2]


#: What hardly any field can be, and where it is tried.
STRANGE = [None, -1, 10**30, "../../x", "1/0", "a\0b", [[]], {"a": 1}]
RECORD = ("n", "attack", "attack_params", "checkpoint", "dataset", "eps", "key", "norm", "outcomes", "evidence.sha256")
FURTHER = ("provenance.attack_seed", "provenance.search", "provenance.subset_checksum", "evidence.file", "training.key")
DESCRIPTION = ("model.architecture", "model.image_shape", "model.mean", "model.method", "setting.data", "setting.norm")


def put(body: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for part in above:
        body = body[part]
    body[last] = value


@pytest.mark.parametrize("path", [*RECORD, *FURTHER])
def test_whatever_stands_in_a_record_is_no_traceback_and_not_verified(path: str, forged: Forgery) -> None:
    text = json.dumps(forged.body)
    forged.recounts, forged.tensors = False, {}
    for value in STRANGE:
        forged.body = json.loads(text)
        put(forged.body, path, value)
        forged.write()
        assert Verifier(forged.results, str(forged.data_dir)).verify(forged.path).status != "verified", value


@pytest.mark.parametrize("path", DESCRIPTION)
def test_whatever_stands_in_a_description_is_no_traceback_and_not_verified(path: str, forged: Forgery) -> None:
    text = (forged.checkpoint / "spec.json").read_text(encoding="utf-8")
    for value in STRANGE:
        content = json.loads(text)
        put(content, path, value)
        (forged.checkpoint / "spec.json").write_text(json.dumps(content), encoding="utf-8")
        assert Verifier(forged.results, str(forged.data_dir)).verify(forged.path).status != "verified", value


# --- the command ----------------------------------------------------------------------------------


def test_a_verified_record_is_counted_out_and_the_command_succeeds(honest: Honest) -> None:
    result = checked(honest, honest.record)
    assert result.exit_code == 0, result.output
    body = json.loads(honest.record.read_text(encoding="utf-8"))
    right, robust = (sum(body["outcomes"][name]) for name in ("clean", "robust"))
    line = result.stdout.splitlines()[0]
    assert line.startswith(f"verified: {honest.record}: 60 images, {right} right, {right - robust} of them fooled at")
    assert f"{robust} robust" in line
    assert "1 of 1 verified" in result.stdout
    assert "the true robust accuracy is at\nmost the one told" in result.stdout


@pytest.mark.parametrize("inside", [".", "records", "records/imagefolder/nat"])
def test_a_folder_stands_for_all_its_records(inside: str, honest: Honest) -> None:
    result = checked(honest, honest.results / inside)
    assert result.exit_code == 0, result.output
    assert "3 of 3 verified" in result.stdout


def test_one_forgery_among_honest_records_fails_the_command_and_stops_no_other(forged: Forgery, honest: Honest) -> None:
    forged.body["outcomes"]["robust"][forged.images(1, 0)[0]] = 1
    forged.write()
    result = checked(honest, forged.results)
    assert result.exit_code == 1
    assert "2 of 3 verified" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("not verified")]
    assert str(forged.path) in line
    assert f"the stored point fools: image {forged.id_of(forged.images(1, 1)[0])}" in line or "image" in line


def test_json_has_every_verdict_with_its_reasons_and_images(forged: Forgery, honest: Honest) -> None:
    position = forged.images(1, 0)[0]
    forged.body["outcomes"]["robust"][position] = 1
    forged.write()
    result = checked(honest, forged.path, forged.sibling, "--json")
    assert result.exit_code == 1
    bad, good = json.loads(result.stdout)
    assert (bad["status"], good["status"]) == ("not verified", "verified")
    reason = "robust in the record, but the stored point fools"
    assert bad["reasons"] == [{"reason": reason, "images": [forged.id_of(position)]}]
    assert bad["counts"] is None
    assert good["counts"]["n"] == 60


def test_without_evidence_a_record_is_not_verifiable(forged: Forgery, honest: Honest) -> None:
    forged.body["evidence"] = {"none": "not asked for (--evidence none)"}
    forged.write()
    result = checked(honest, forged.path)
    assert result.exit_code == 1
    assert f"not verifiable: {forged.path}: no evidence: not asked for (--evidence none)" in result.stdout


def test_a_failed_cell_is_not_verifiable(forged: Forgery, honest: Honest) -> None:
    forged.body |= {"error": "it broke", "clean_accuracy": None, "robust_accuracy": None, "stderr": None}
    forged.recounts = False
    forged.write()
    result = checked(honest, forged.path)
    assert result.exit_code == 1
    assert "not verifiable" in result.stdout
    assert "the cell failed: it broke" in result.stdout


def test_a_record_that_lies_elsewhere_is_verified_with_its_results_folder_named(honest: Honest, tmp_path: Path) -> None:
    copy = Path(shutil.copy(honest.record, tmp_path))
    assert checked(honest, copy).exit_code == 1
    assert checked(honest, copy, "--results", honest.results).exit_code == 0


def test_weights_that_lie_elsewhere_are_named(honest: Honest, forged: Forgery, tmp_path: Path) -> None:
    moved = forged.checkpoint.rename(tmp_path / "weights")
    result = checked(honest, forged.path)
    assert "name its folder with --checkpoint" in result.stdout
    assert checked(honest, forged.path, "--checkpoint", moved).exit_code == 0


@pytest.mark.parametrize("there", ["nothing.json", "folder"])
def test_places_without_records_are_bad_usage(there: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    result = ens(tmp_path / there)
    assert result.exit_code == 2
    assert "expected" in result.output


def test_a_record_must_be_named() -> None:
    assert ens().exit_code == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"format": 1}'])
def test_a_file_that_is_no_record_is_not_verified(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pgd-0123456789abcdef.json"
    path.write_bytes(content)
    result = ens(path)
    assert result.exit_code == 1, result.output
    assert f"not verified: {path}: " in result.stdout


def test_verifying_writes_nothing(honest: Honest) -> None:
    before = {path: path.stat().st_mtime_ns for path in honest.results.rglob("*")}
    checked(honest, honest.results)
    assert {path: path.stat().st_mtime_ns for path in honest.results.rglob("*")} == before


def test_help_comes_without_torch() -> None:
    code = "import sys; from ensdef.cli import verify; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- verdicts that rounding decides ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "borderline"),
    [
        ([2.0, 1.0, 0.0], False),
        ([2.0, 2.0 + 1e-5, 0.0], True),
        ([2.0, 2.0 - 1e-5, 0.0], True),
        ([2.0, 2.0 + 1e-3, 0.0], False),
        ([-1e-9, -2e-9, -20.0], False),
        ([2.0, 2.0, 0.0], False),
        ([2.0, 1.0, 1.0], False),
        ([float("nan"), 1.0, 1.0], False),
        ([float("inf"), 1.0, 1.0], False),
    ],
)
def test_a_verdict_is_borderline_where_the_label_and_its_rival_nearly_tie(
    scores: list[float], borderline: bool
) -> None:
    assert is_borderline(torch.tensor([scores]), torch.tensor([0])).tolist() == [borderline]
