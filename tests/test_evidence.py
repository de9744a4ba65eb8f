"""What a cell keeps of its attack, so that others can count again: by default, up to a thousand images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import ensdef.evidence
from ensdef.attack_spec import AttackSpec
from ensdef.cli import cli, run  # noqa: F401 - run adds its commands
from ensdef.evidence import EvidenceFolder, evidence_path
from ensdef.harness import attack_model
from ensdef.jobs import CellJob, Run
from ensdef.loading import attacked_subset, find_data
from ensdef.ray_executor import perform_in_scratch
from ensdef.records import Record
from ensdef.runner import ensure_trained, run_cells
from ensdef.specs import Cell, Setting, TrainSpec
from ensdef.testing import LinearClassifier
from ensdef.verification import Verifier


def cell(attack: str = "pgd", norm: str = "linf", eps: str = "0.05", combiner: str = "native", **params: Any) -> Cell:
    """A cell on a defence that is right on most of 40 digits, some of which fall."""
    data, spec = find_data("digits", limit=300)
    setting = Setting(
        spec, "small_resnet[width=4]", 2, "linf", "0.2", recipe={"epochs": 12, "batch_size": 32, "lr": 0.2}
    )
    test, _ = attacked_subset(data, 40)
    return Cell(
        TrainSpec.create("nat", {}, setting),
        AttackSpec.create(attack, params, norm, eps, dimensions=64, combiner=combiner),
        len(test),
        test.checksum(),
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with the defence trained."""
    folder = tmp_path_factory.mktemp("results")
    ensure_trained(cell().training, Run(folder))
    return folder


def attacked(results: Path, one: Cell, **how: Any) -> Record:
    (record,) = run_cells([one], Run(results, health="off", **how))
    assert record.error is None, record.error
    return record


def test_a_cell_keeps_its_points_beside_its_record_with_hashes_of_all_that_belongs_to_them(results: Path) -> None:
    record = attacked(results, cell(steps=5))
    checksum = record.evidence["sha256"]
    path = results / f"evidence/digits/nat/pgd-{record.key[:16]}-{checksum[:16]}.safetensors"
    assert record.evidence["file"] == str(evidence_path(record, checksum)) == str(path.relative_to(results))
    assert record.evidence["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(record.evidence) == {"file", "sha256", "inputs", "labels", "weights", "code", "version"}
    assert set(record.evidence["code"]) == {"method", "attack"}
    assert json.loads(Path(str(record.path)).read_text(encoding="utf-8"))["evidence"] == record.evidence


@pytest.mark.parametrize(
    "one",
    [
        cell(steps=5, eps="0.2"),
        cell(steps=5, norm="l2", eps="0.5"),
        cell("deepfool"),
        cell("deepfool", norm="l2", eps="0.5"),
        cell("cw", steps=10),
        cell("square", queries=30),
        cell("fog"),
        cell("snow"),
        cell(steps=5, combiner="vote"),
        cell(steps=5, combiner="max"),
        cell(steps=5, success="last"),
        cell(steps=5, eps="0"),
        cell("none"),
    ],
    ids=lambda one: f"{one.attack.call} {one.attack.norm} {one.attack.combiner}",
)
def test_what_an_attack_of_any_kind_leaves_can_be_verified(one: Cell, results: Path) -> None:
    made = Verifier().verify(Path(str(attacked(results, one).path)))
    assert (made.status, made.failures) == ("verified", ())
    assert made.counts is not None
    assert made.counts.right > 20


def test_most_points_of_an_attack_are_kept_in_steps(results: Path) -> None:
    made = Verifier().verify(Path(str(attacked(results, cell(steps=5)).path)))
    assert made.counts is not None
    assert made.counts.rounded > 3 * made.counts.exact
    assert 0 < made.counts.robust < made.counts.right


def test_the_same_cell_keeps_the_same_bytes(results: Path, tmp_path: Path) -> None:
    one = cell(steps=4)
    first = attacked(results, one)
    (results / first.evidence["file"]).rename(tmp_path / "first")
    Path(str(first.path)).unlink()
    again = attacked(results, one)
    assert (results / again.evidence["file"]).read_bytes() == (tmp_path / "first").read_bytes()
    assert again.evidence == first.evidence


def test_evidence_can_be_refused_and_is_no_part_of_the_key(results: Path) -> None:
    record = attacked(results, cell(steps=3), evidence="none")
    assert record.key == cell(steps=3).key
    assert record.evidence == {"none": "not asked for (--evidence none)"}
    assert not list((results / "evidence").rglob(f"*{record.key[:16]}*"))


def test_a_record_without_evidence_is_done_when_evidence_is_asked_for(results: Path) -> None:
    before = attacked(results, cell(steps=2), evidence="none")
    content = Path(str(before.path)).read_bytes()
    assert attacked(results, cell(steps=2)).evidence == before.evidence
    assert Path(str(before.path)).read_bytes() == content


def test_a_record_that_another_protocol_met_too_is_still_verified(results: Path) -> None:
    attacked(results, cell(steps=7), protocol="one-v1")
    record = attacked(results, cell(steps=7), protocol="other-v1")
    assert record.provenance["also_in"] == ["other-v1"]
    assert Verifier().verify(Path(str(record.path))).status == "verified"


@pytest.mark.parametrize("how", ["--evidence", "--config"])
def test_a_bench_refuses_evidence_on_the_command_line_or_in_a_file(how: str, tmp_path: Path) -> None:
    (tmp_path / "bench.toml").write_text('evidence = "none"\n', encoding="utf-8")
    value = "none" if how == "--evidence" else str(tmp_path / "bench.toml")
    small = "--method nat --attack fgsm --limit 64 --epochs 1 --samples 20 --members 1 --device cpu --health off"
    words = ["bench", *small.split(), "--results", str(tmp_path / "results"), how, value]
    assert CliRunner().invoke(cli, words).exit_code == 0
    (path,) = tmp_path.glob("results/records/*/*/*.json")
    assert Record.from_json(path.read_text(encoding="utf-8")).evidence == {"none": "not asked for (--evidence none)"}
    assert not (tmp_path / "results/evidence").exists()


def test_beyond_the_limit_the_record_says_why_there_is_none(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensdef.evidence, "LIMIT", 39)
    record = attacked(results, cell("fgsm"))
    assert record.evidence == {"none": "40 images; evidence is kept up to 39"}
    assert not list((results / "evidence").rglob(f"*{record.key[:16]}*"))


def test_the_limit_is_a_thousand_images() -> None:
    assert ensdef.evidence.LIMIT == 1000


def test_a_worker_in_a_folder_of_its_own_sends_the_points_back(results: Path, tmp_path: Path) -> None:
    one = cell(steps=6)
    job = CellJob(one, Run(results, health="off"))
    sent = {
        str(path.relative_to(results)): path.read_bytes()
        for path in results.glob("checkpoints/*/*")
        if path.suffix in (".json", ".safetensors")
    }
    packed = perform_in_scratch((), pickle.dumps(job), sent, str(tmp_path / "no token"), str(tmp_path), 1)
    result = pickle.loads(packed)
    assert result.error is None
    assert list(result.files) == [result.record.evidence["file"]]
    content = result.files[result.record.evidence["file"]]
    assert hashlib.sha256(content).hexdigest() == result.record.evidence["sha256"]


# points and verdicts, on a model in hand


class Moody(nn.Module):
    """Answers another way at every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = LinearClassifier(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        scores: Tensor = self.inner(x)
        return scores.roll(self.passes % 2, dims=1)


def kept(model: nn.Module, folder: Path, right: bool = True) -> tuple[dict[str, Any], Record]:
    """The evidence of an attack on random images, all of them right or all wrong from the start."""
    x = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = (model(x).argmax(dim=1) + (not right)) % 4
    spec = AttackSpec.create("fgsm", {}, "linf", "0.01")
    outcome = attack_model(LinearClassifier(model.weight) if right and hasattr(model, "weight") else model, x, y, spec)
    if isinstance(model, Moody):
        outcome = dataclasses.replace(outcome, clean=torch.ones(30).bool(), robust=torch.arange(30) % 2 == 0)
    outcomes = {name: getattr(outcome, name).int().tolist() for name in ("clean", "robust")}
    record = Record(
        key="ab" * 32,
        method="nat",
        dataset="digits",
        attack="fgsm",
        outcomes={"ids": list(range(30)), **outcomes},
        hyper={},
        training={},
        attack_params={},
        **dict.fromkeys(("label", "architecture", "attack_label", "success", "combiner"), ""),
        **dict.fromkeys(("train_seed", "norm", "eps", "eps_value")),
        members=1,
        n=30,
    )
    return EvidenceFolder(folder).keep(record, model, spec, x, y, outcome, batch_size=64, device="cpu"), record


def test_answers_that_are_drawn_at_random_have_no_evidence(tmp_path: Path) -> None:
    told, _ = kept(Moody(), tmp_path)
    assert "another verdict than the record" in told["none"]
    assert list(tmp_path.iterdir()) == []


def test_a_defence_that_is_never_right_has_evidence_without_points(tmp_path: Path) -> None:
    model = LinearClassifier(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)))
    told, record = kept(model, tmp_path, right=False)
    assert (tmp_path / told["file"]).stat().st_size < 1000
    assert sum(record.outcomes["clean"]) == 0
