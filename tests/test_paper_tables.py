"""The papers' tables: published numbers beside ours, from files and from the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ensdef.cli import cli, inspect, run  # noqa: F401 - they add their commands
from ensdef.errors import UsageError
from ensdef.papers.comparison import Comparison, Entry, compare
from ensdef.papers.layout import column_of
from ensdef.papers.orderings import Orderings, orderings
from ensdef.papers.parsing import is_paper_table, parse_paper_table
from ensdef.papers.published import published_table
from ensdef.papers.text import csv, latex, markdown
from ensdef.protocol import protocol_names
from ensdef.protocol_file import Refusal, read_protocol_file
from ensdef.records import Record, Store, with_outcomes

PAPER_TABLES = [name for name in protocol_names() if is_paper_table(read_protocol_file(name))]


# -- published beside ours --------------------------------------------------------------------------------------

CELLS = published_table("soe-appendix/table4")


def record(correct: int, n: int = 10, **changes: Any) -> Record:
    """A record that is right on this many images, attacked or not."""
    blank = Record(
        key=f"{correct:02d}" * 32, method="soe", hyper={}, label="soe", dataset="digits", architecture="resnet8",
        members=3, train_seed=0, training={"key": "k"}, attack="none", attack_params={}, attack_label="none",
        success="any", norm=None, eps=None, eps_value=None, combiner="native", n=n,
    )  # fmt: skip
    right = [1] * correct + [0] * (n - correct)
    return dataclasses.replace(with_outcomes(blank, list(range(n)), right, right), **changes)


def answered(tmp_path: Path, **changes: Any) -> Comparison:
    """SoE's Table 4 (12 cells: single networks, ensembles, gains by depth) answered by 6, 9 and their difference."""
    store = Store(tmp_path)
    single = store.write(record(6))
    ensemble = store.write(record(9))
    paths = [str(Path(str(one.path)).relative_to(tmp_path)) for one in (single, ensemble)]
    answers: list[dict[str, Any]] = []
    for index, cell in enumerate(CELLS):
        answer: dict[str, Any] = {"cell": index, "value": "robust_accuracy"}
        if cell.metric == "accuracy_gain":
            answer |= {"files": paths[1:], "derive": "difference", "against": paths[:1]}
        else:
            answer["files"] = paths[:1] if cell.method == "single" else paths[1:]
        answers.append(answer)
    manifest = {
        "kind": "paper", "title": "SoE, Table 4", "protocol": "mine", "version": 1, "scale": "smoke",
        "scale_title": "tiny", "published": "soe-appendix/table4", "deviations": ["Digits."], "notes": [],
        "answers": answers, "records": paths, **changes,
    }  # fmt: skip
    (tmp_path / "manifests").mkdir(exist_ok=True)
    (tmp_path / "manifests" / "mine-smoke.json").write_text(json.dumps(manifest), encoding="utf-8")
    return compare("mine-smoke", tmp_path)


def test_ours_stands_beside_the_published_number_in_its_unit(tmp_path: Path) -> None:
    first = answered(tmp_path).entries[0]
    assert first.cell.value == "65.0"
    assert first.ours == pytest.approx(60.0)
    assert first.difference == pytest.approx(-5.0)
    assert first.stderr == pytest.approx(100 * (0.6 * 0.4 / 10) ** 0.5)
    assert first.n == 10


def test_a_gain_is_the_difference_of_two_rows_in_points(tmp_path: Path) -> None:
    gains = [entry for entry in answered(tmp_path).entries if entry.cell.metric == "accuracy_gain"]
    assert len(gains) == 4
    assert all(entry.ours == pytest.approx(30.0) for entry in gains)
    assert all(entry.stderr is None for entry in gains)


def test_an_improvement_is_in_percent_of_the_other(tmp_path: Path) -> None:
    comparison = answered(tmp_path)
    path = tmp_path / "manifests" / "mine-smoke.json"
    content = json.loads(path.read_text())
    for answer in content["answers"]:
        if "derive" in answer:
            answer["derive"] = "relative"
    path.write_text(json.dumps(content))
    gains = [entry for entry in compare(comparison.name, tmp_path).entries if entry.cell.metric == "accuracy_gain"]
    assert all(entry.ours == pytest.approx(50.0) for entry in gains)


def test_several_trainings_give_their_mean_and_its_error(tmp_path: Path) -> None:
    answered(tmp_path)
    path = tmp_path / "manifests" / "mine-smoke.json"
    content = json.loads(path.read_text())
    content["answers"][0]["files"] = content["records"]
    path.write_text(json.dumps(content))
    first = compare("mine-smoke", tmp_path).entries[0]
    assert first.ours == pytest.approx(75.0)
    # the image is the unit: six are right in both trainings, three in one, one in none
    shares = [1.0] * 6 + [0.5] * 3 + [0.0]
    variance = sum((share - 0.75) ** 2 for share in shares) / 10
    assert first.stderr == pytest.approx(100 * (variance / 10) ** 0.5)
    assert first.n == 10


def test_a_failed_cell_is_a_dash_with_its_reason(tmp_path: Path) -> None:
    answered(tmp_path)
    store = Store(tmp_path)
    blank = record(6)
    failed = dataclasses.replace(
        blank, clean_accuracy=None, robust_accuracy=None, stderr=None, outcomes={}, error="loss became NaN"
    )
    store.write(failed)
    comparison = compare("mine-smoke", tmp_path)
    assert comparison.entries[0].ours is None
    text = markdown(comparison)
    assert "- (65.0) [1]" in text
    assert "[1] loss became NaN" in text


def test_a_number_of_a_record_that_was_edited_is_refused(tmp_path: Path) -> None:
    comparison = answered(tmp_path)
    path = Path(str(comparison.entries[0].records[0].path))
    path.write_text(path.read_text().replace('"robust_accuracy": 0.6', '"robust_accuracy": 0.9'))
    with pytest.raises(UsageError, match="contradicts the outcomes"):
        compare("mine-smoke", tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"answers": []}, r"answers other cells than soe-appendix/table4 has \(12\)"),
        ({"published": "soe/table9"}, "unknown published table"),
        ({"protocol": "cda2_table1", "version": 99}, "is of version 99 of protocol cda2_table1, which is at 1; run"),
        ({"version": None}, "is no manifest of a paper's table"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=told):
        answered(tmp_path, **changes)


def test_a_manifest_cannot_reach_out_of_the_results_folder(tmp_path: Path) -> None:
    outside = tmp_path / "secret.json"
    outside.write_text("{}")
    answers = [{"cell": index, "value": "robust_accuracy", "files": ["../secret.json"]} for index in range(12)]
    with pytest.raises(UsageError, match=r"'\.\./secret\.json' leads out of"):
        answered(tmp_path / "results", answers=answers)


@pytest.fixture(autouse=True)
def results_folder(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()


def test_the_table_has_the_papers_layout_with_ours_in_front(tmp_path: Path) -> None:
    text = markdown(answered(tmp_path))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert next(part.strip() for part in lines[0].strip("|").split("|")) == "method"
    assert sum("60.0 ± 15.5 (65.0)" in line for line in lines) == 1
    assert "What differs from the paper:\n\n- Digits." in text
    assert "12 of 12 cells answered" in text


def test_the_csv_has_every_published_cell_once_as_printed(tmp_path: Path) -> None:
    import io

    import pandas as pd

    frame = pd.read_csv(io.StringIO(csv(answered(tmp_path))), dtype=str, keep_default_na=False)
    assert list(frame["published"]) == [cell.value for cell in CELLS]
    assert list(frame["eps"]) == [cell.eps for cell in CELLS]
    assert set(frame["protocol"]) == {"mine-v1"}
    assert [float(number) for number in frame["ours"]] == [
        {"single": 60.0}.get(cell.method, 30.0 if cell.metric == "accuracy_gain" else 90.0) for cell in CELLS
    ]


def test_the_latex_table_has_numbers_images_and_deviations(tmp_path: Path) -> None:
    text = latex(answered(tmp_path))
    assert r"\caption{SoE, Table 4}" in text
    assert r"\toprule" in text
    assert r"60.0 $\pm$ 15.5 (65.0)" in text
    assert "Digits." in text
    assert "n = 10 images" in text


def two_rows(tmp_path: Path, ours: tuple[list[int], list[int]]) -> tuple[Entry, ...]:
    """Two cells of one column, the paper's 88.3 and 89.5 at depth 8, answered with these outcomes."""
    entries = [entry for entry in answered(tmp_path).entries if entry.cell.architecture == "resnet8"][:2]
    assert [entry.cell.value for entry in entries] == ["88.3", "89.5"]
    filled = []
    for entry, right in zip(entries, ours, strict=True):
        made = with_outcomes(record(1, len(right)), list(range(len(right))), right, right)
        assert made.robust_accuracy is not None
        filled.append(dataclasses.replace(entry, ours=100 * made.robust_accuracy, records=(made,), n=len(right)))
    return tuple(filled)


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (([0] * 6 + [1] * 4, [1] * 10), Orderings(1, 0, 0)),  # 6 images to none: p = 1/32
        (([1] * 10, [0] * 6 + [1] * 4), Orderings(0, 1, 0)),
        (([0] * 5 + [1] * 5, [1] * 10), Orderings(0, 0, 1)),  # 5 to none: p = 1/16
        (([1] * 10, [1] * 10), Orderings(0, 0, 1)),
    ],
)
def test_an_order_of_rows_counts_as_ours_only_if_a_paired_test_tells_them_apart(
    ours: tuple[list[int], list[int]], expected: Orderings, tmp_path: Path
) -> None:
    assert orderings(two_rows(tmp_path, ours)) == expected


def test_a_models_own_examples_stand_in_the_column_of_their_source() -> None:
    cells = published_table("cce/table12a")
    columns = {column_of(cell, cells) for cell in cells}
    assert len(columns) == 4
    (own,) = [cell for cell in cells if cell.method == "adp" and "whitebox=1" in cell.attack_params]
    (from_nat,) = [cell for cell in cells if cell.method == "adp" and cell.conditions["source"] == "nat"]
    assert column_of(own, cells) in {column_of(cell, cells) for cell in cells if cell.conditions["source"] == "adp"}
    assert column_of(own, cells) != column_of(from_nat, cells)


def test_rows_are_compared_within_a_column_alone(tmp_path: Path) -> None:
    entries = answered(tmp_path).entries
    assert orderings(entries).pairs == 4  # single against ensemble at four depths; gains are not compared
    assert orderings([entry for entry in entries if entry.cell.method == "single"]).pairs == 0


# -- the command line -------------------------------------------------------------------------------------------

TINY = """version = 1
title = "SoE, Table 4, tiny"
published = "soe-appendix/table4"

[rows]
single = { method = "nat", members = 1 }
soe = { method = "nat", against = "single", members = 2 }

[[columns]]
metric = "accuracy"

[[columns]]
metric = "accuracy_gain"
derive = "difference"

[scales.smoke]
samples = 30
limit = 60
epochs = 1

[scales.smoke.architectures]
resnet2 = "small_resnet[width=2]"
resnet8 = "small_resnet[width=2]"
resnet14 = "small_resnet[width=2]"
resnet20 = "small_resnet[width=2]"
"""


def test_a_paper_table_runs_measures_and_is_rebuilt_from_files_alone(tmp_path: Path) -> None:
    path, results = tmp_path / "tiny.toml", tmp_path / "results"
    path.write_text(TINY, encoding="utf-8")
    ran = CliRunner().invoke(cli, ["run", str(path), "--results", str(results), "--device", "cpu"])
    assert ran.exit_code == 0, ran.output
    written = {file.name: file.read_text() for file in (results / "tables").iterdir()}
    assert set(written) == {"tiny-smoke.csv", "tiny-smoke.md", "tiny-smoke.tex"}
    assert len(list((results / "records").rglob("*.json"))) == 2  # four depths are one network here
    for file in (results / "tables").iterdir():
        file.unlink()
    again = CliRunner().invoke(cli, ["table", "tiny", "--results", str(results)])
    assert again.exit_code == 0, again.output
    assert {file.name: file.read_text() for file in (results / "tables").iterdir()} == written
    assert "Networks are small_resnet[width=2], for resnet20." in written["tiny-smoke.md"]


def test_a_dry_run_of_a_paper_table_counts_cells_and_trains_nothing(tmp_path: Path) -> None:
    path, results = tmp_path / "tiny.toml", tmp_path / "results"
    path.write_text(TINY, encoding="utf-8")
    ran = CliRunner().invoke(cli, ["run", str(path), "--results", str(results), "--dry-run", "--device", "cpu"])
    assert ran.exit_code == 0, ran.output
    assert "to do: 2 trainings, 2 cells of 2" in ran.output
    assert not (results / "checkpoints").exists()


def test_every_protocol_is_listed_with_its_scales() -> None:
    result = CliRunner().invoke(cli, ["list", "protocols"])
    assert result.exit_code == 0
    listed = {line.split()[0]: line for line in result.output.splitlines()}
    assert set(listed) == set(protocol_names())
    assert all(listed[name].endswith("[smoke, mini, paper]") for name in PAPER_TABLES)


def test_a_table_parsed_from_a_mapping_raises_the_key_it_is_about() -> None:
    with pytest.raises(Refusal) as caught:
        parse_paper_table({"title": "x", "published": "soe-appendix/table2", "rows": {}, "columns": []}, "mine")
    assert caught.value.key == "scales"
