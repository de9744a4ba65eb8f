"""Results on disk: records, the tables made of them, and the protocols that say which belong together."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensdef.cells import plan
from ensdef.cli.run import _overlay
from ensdef.errors import UsageError
from ensdef.health.catalogue import finding
from ensdef.keys import checksum_of
from ensdef.manifests import Manifests
from ensdef.metrics import binomial_stderr, fraction_of, wilson
from ensdef.papers.parsing import is_paper_table
from ensdef.protocol import (
    AttackColumn,
    MethodRow,
    Protocol,
    load_protocol,
    parse_protocol,
    protocol_names,
    with_attacks,
    with_methods,
)
from ensdef.protocol_file import read_protocol_file
from ensdef.records import CHECKSUM, FORMAT, Record, Store, with_outcomes, write_bytes, write_text
from ensdef.specs import Cell
from ensdef.tables import (
    COLUMNS,
    build_table,
    csv,
    latex,
    markdown,
    percent,
    row,
    stale_tables,
    worst_cases,
    write_table,
)

quick = settings(deadline=None, max_examples=60, derandomize=True)

FLAG = {
    "flag": "recount",
    "severity": "masking",
    "value": 0.25,
    "threshold": 0.0,
    "meaning": "successes were not confirmed",
    "action": "make predict deterministic",
}


GRIDS = [name for name in protocol_names() if not is_paper_table(read_protocol_file(name))]


def record(clean: tuple[int, ...] = (1, 1, 1, 0), robust: tuple[int, ...] = (1, 0, 1, 0), **changes: Any) -> Record:
    """A finished record over as many images as there are outcomes."""
    fields: dict[str, Any] = {
        "key": "ab" * 32,
        "method": "nat",
        "hyper": {"reduction": "sum"},
        "label": "nat",
        "dataset": "digits",
        "architecture": "small_resnet",
        "members": 3,
        "train_seed": 0,
        "training": {"eps": "0.2", "norm": "linf"},
        "attack": "pgd",
        "attack_params": {"steps": 50},
        "attack_label": "pgd",
        "success": "any",
        "norm": "linf",
        "eps": "8/255",
        "eps_value": 8 / 255,
        "combiner": "native",
        "n": len(clean),
        "seconds": 1.25,
        "forwards": 30.5,
        "backwards": 29.0,
        "checkpoint": "results/checkpoints/nat-abab",
        "provenance": {"protocol": "default-v1", "search": "fp32"},
    }
    return with_outcomes(Record(**{**fields, **changes}), list(range(len(clean))), list(clean), list(robust))


def failed(message: str = "loss term 'ce' is nan", **changes: Any) -> Record:
    return dataclasses.replace(
        record(**changes), clean_accuracy=None, robust_accuracy=None, stderr=None, outcomes={}, error=message
    )


TEXTS = st.text(max_size=12)
NUMBERS = st.floats(0, 1e6, allow_nan=False)


@st.composite
def records(draw: st.DrawFn) -> Record:
    clean = draw(st.lists(st.integers(0, 1), min_size=1, max_size=12))
    robust = [draw(st.integers(0, flag)) for flag in clean]
    return record(
        tuple(clean),
        tuple(robust),
        key=draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
        label=draw(TEXTS),
        hyper=draw(st.dictionaries(TEXTS, st.one_of(TEXTS, NUMBERS, st.booleans(), st.none()), max_size=3)),
        train_seed=draw(st.one_of(st.none(), st.integers(0, 10**6))),
        eps=draw(st.one_of(st.none(), TEXTS)),
        seconds=draw(NUMBERS),
        forwards=draw(NUMBERS),
        flags=draw(st.lists(st.just(FLAG), max_size=2)),
        provenance=draw(st.dictionaries(TEXTS, TEXTS, max_size=2)),
    )


# --- records --------------------------------------------------------------------------------------


@quick
@given(records())
def test_a_record_comes_back_from_json_as_it_went(one: Record) -> None:
    assert Record.from_json(one.to_json()) == one


@quick
@given(records())
def test_the_json_of_a_record_does_not_depend_on_where_it_lies(one: Record) -> None:
    assert dataclasses.replace(one, path="/somewhere/else.json").to_json() == one.to_json()


def test_a_failed_record_comes_back_from_json_as_it_went() -> None:
    assert Record.from_json(failed().to_json()) == failed()


def test_a_record_read_from_a_file_knows_its_path(tmp_path: Path) -> None:
    assert Record.from_json(record().to_json(), tmp_path / "a.json").path == str(tmp_path / "a.json")


def test_the_json_of_a_record_is_plain_sorted_json_with_outcomes_on_one_line() -> None:
    text = record().to_json()
    assert list(json.loads(text))[:-1] == sorted(json.loads(text))[: sorted(json.loads(text)).index("outcomes")] + [
        name for name in sorted(json.loads(text)) if name > "outcomes"
    ]
    assert '"outcomes": {"ids":[0,1,2,3],"clean":[1,1,1,0],"robust":[1,0,1,0]}' in text
    assert text.endswith("}\n")


def test_the_summary_of_a_record_has_all_fields_but_the_outcomes() -> None:
    names = {field.name for field in dataclasses.fields(Record)}
    assert set(record().summary()) == names - {"outcomes"}


def test_accuracies_and_standard_error_are_counted_from_the_outcomes() -> None:
    one = record((1, 1, 1, 0), (1, 0, 0, 0))
    assert (one.n, one.clean_accuracy, one.robust_accuracy) == (4, 0.75, 0.25)
    assert one.stderr == pytest.approx((0.25 * 0.75 / 4) ** 0.5)


def test_an_accuracy_over_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        fraction_of([])


@pytest.mark.parametrize(("accuracy", "n", "expected"), [(0.5, 100, 0.05), (0.0, 10, 0.0), (1.0, 10, 0.0)])
def test_the_standard_error_is_that_of_the_binomial(accuracy: float, n: int, expected: float) -> None:
    assert binomial_stderr(accuracy, n) == pytest.approx(expected)


def edited(**changes: Any) -> str:
    return json.dumps({**json.loads(record().to_json()), **changes})


def edited_and_sealed(**changes: Any) -> str:
    """With a checksum of what it says now."""
    body = json.loads(edited(**changes))
    return json.dumps({**body, CHECKSUM: checksum_of(body, CHECKSUM)})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"clean_accuracy": 1.0}, "clean_accuracy 1.0"),
        ({"robust_accuracy": 0.75}, "robust_accuracy 0.75"),
        ({"robust_accuracy": None}, "robust_accuracy None"),
        ({"n": 5}, "n=5"),
        ({"outcomes": {}}, "outcomes"),
        ({"outcomes": {"ids": [], "clean": [], "robust": []}, "n": 0}, "outcomes"),
        ({"outcomes": {"ids": [0, 1, 2, 3], "clean": [1, 1, 1, 1], "robust": [1, 0, 1, 0]}}, "clean_accuracy 0.75"),
        ({"outcomes": {"ids": [0, 1, 2, 3], "clean": [1, 1, 1, 0]}}, "robust_accuracy 0.5"),
    ],
)
def test_numbers_that_contradict_the_outcomes_are_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        Record.from_json(edited(**changes), tmp_path / "mine.json")
    assert told in str(error.value)
    assert str(tmp_path / "mine.json") in str(error.value)
    assert "delete the file" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stderr": 0.5}, "stderr 0.5"),
        ({"outcomes": {"ids": [0, 1, 2], "clean": [1, 1, 1, 0], "robust": [1, 0, 1, 0]}}, "ids"),
        ({"outcomes": {"ids": [0, 1, 2, 3], "clean": [1, 1, 1, 0], "robust": [1, 0, 0, 1]}}, "robust"),
        ({"outcomes": {"ids": [0, 1, 2, 3], "clean": [3, 0, 0, 0], "robust": [2, 0, 0, 0]}}, "outcomes"),
    ],
    ids=["standard error", "fewer ids", "robust where clean is wrong", "no flags"],
)
def test_evidence_that_cannot_be_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Record.from_json(edited(**changes))


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "3", '"text"', "{}", json.dumps({"format": FORMAT}), edited(format=FORMAT + 1)],
)
def test_what_is_no_record_is_refused_by_the_name_of_its_file(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        Record.from_json(text, tmp_path / "mine.json")
    assert str(tmp_path / "mine.json") in str(error.value)
    assert "delete the file" in str(error.value)


@pytest.mark.parametrize("missing", ["method", "n", "attack_label", "combiner"])
def test_a_record_without_a_field_is_refused_by_the_name_of_that_field(missing: str) -> None:
    body = json.loads(record().to_json())
    del body[missing]
    with pytest.raises(UsageError, match=missing):
        Record.from_json(json.dumps(body))


def test_a_field_of_a_later_version_is_passed_over() -> None:
    assert Record.from_json(edited_and_sealed(colour="blue")) == record()


@pytest.mark.parametrize(
    "changes",
    [
        {"label": "better"},
        {"seconds": 0.1},
        {"flags": [FLAG]},
        {"members": 9},
        {"colour": "blue"},
        {CHECKSUM: "ab" * 32},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_record_that_was_edited_where_the_outcomes_cannot_tell_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"edited since it was written .its checksum does not fit.; delete the file"):
        Record.from_json(edited(**changes))


def test_a_record_without_a_checksum_is_refused() -> None:
    body = json.loads(record().to_json())
    del body[CHECKSUM]
    with pytest.raises(UsageError, match="has no sha256, as older records; delete the file"):
        Record.from_json(json.dumps(body))


def test_a_record_written_before_there_was_evidence_can_be_read() -> None:
    body = json.loads(record().to_json())
    del body["evidence"]
    text = json.dumps({**body, CHECKSUM: checksum_of(body, CHECKSUM)})
    assert Record.from_json(text) == record()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", "4"),
        ("n", True),
        ("method", 3),
        ("hyper", []),
        ("flags", [1]),
        ("outcomes", [0, 1]),
        ("outcomes", {"ids": [0, 1, 2, "3"]}),
        ("clean_accuracy", "0.75"),
        ("broken_by", {"part": 0.5}),
        ("evidence", None),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{field} is .*; expected .*; delete the file"):
        Record.from_json(edited_and_sealed(**{field: value}))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_record_with_a_number_that_is_none_is_refused(number: str) -> None:
    with pytest.raises(UsageError, match=r"no record: .*number"):
        Record.from_json(edited(seconds=1.5).replace("1.5", number))


def test_an_image_that_is_counted_twice_is_refused() -> None:
    body = json.loads(record().to_json())["outcomes"]
    with pytest.raises(UsageError, match="or one twice"):
        Record.from_json(edited_and_sealed(outcomes={**body, "ids": [*body["ids"], 0]}))


# --- the store ------------------------------------------------------------------------------------


def test_a_record_lies_under_data_set_and_method_with_attack_and_key_in_its_name(tmp_path: Path) -> None:
    written = Store(tmp_path).write(record())
    assert written.path == str(tmp_path / "records/digits/nat/pgd-abababababababab.json")
    assert Path(written.path).is_file()


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    written = store.write(record())
    assert store.read(Path(str(written.path))) == written
    assert list(store.all()) == [written]


def test_a_record_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert Store(tmp_path).read(tmp_path / "records/digits/nat/pgd-0.json") is None
    assert list(Store(tmp_path).all()) == []


def test_a_failed_record_counts_as_not_there_but_is_among_all(tmp_path: Path) -> None:
    store = Store(tmp_path)
    written = store.write(failed())
    assert store.read(Path(str(written.path))) is None
    assert list(store.all()) == [written]


def test_a_record_that_is_damaged_is_refused_when_it_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = Path(str(store.write(record()).path))
    path.write_text(path.read_text(encoding="utf-8")[:-40], encoding="utf-8")
    with pytest.raises(UsageError, match="no JSON"):
        store.read(path)


def test_a_later_record_of_the_same_cell_takes_the_place_of_the_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(failed())
    second = store.write(record())
    assert list(store.all()) == [second]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a/b.txt"
    write_text(path, "first")
    monkeypatch.setattr("os.replace", _raise)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"second")
    assert path.read_text(encoding="utf-8") == "first"
    assert [item.name for item in path.parent.iterdir()] == ["b.txt"]


def _raise(*args: Any) -> None:
    raise OSError("disk full")


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracy", "n", "text"),
    [
        (0.672, 500, "67.2 ± 2.1"),
        (0.0, 20, "0.0 ± 0.0"),
        (1.0, 20, "100.0 ± 0.0"),
        (0.5, 100, "50.0 ± 5.0"),
        (None, 20, "-"),
    ],
)
def test_accuracies_are_printed_in_percent_with_their_standard_error(accuracy: float | None, n: int, text: str) -> None:
    assert percent(accuracy, n) == text


@quick
@given(st.lists(records(), min_size=1, max_size=4))
def test_the_csv_gives_the_same_numbers_back(several: list[Record]) -> None:
    frame = pd.read_csv(io.StringIO(csv(several, Path("results"))), keep_default_na=False, na_values={"n": [""]})
    assert list(frame.columns) == list(COLUMNS)
    assert len(frame) == len(several)
    for (_, found), one in zip(frame.iterrows(), several, strict=True):
        assert found["n"] == one.n
        assert float(found["clean_accuracy"]) == one.clean_accuracy
        assert float(found["robust_accuracy"]) == one.robust_accuracy
        assert float(found["robust_stderr"]) == one.stderr
        assert (float(found["robust_low"]), float(found["robust_high"])) == wilson(sum(one.outcomes["robust"]), one.n)
        assert float(found["clean_stderr"]) == binomial_stderr(float(one.clean_accuracy or 0), one.n)
        assert float(found["forwards"]) == one.forwards


def test_runs_that_differ_in_time_alone_give_the_same_tables() -> None:
    quick, slow = record(seconds=1.0), record(seconds=900.0)
    for table in (csv, markdown):
        assert table([quick], Path("results")) == table([slow], Path("results"))
    assert latex([quick], Path("results"), "x") == latex([slow], Path("results"), "x")


def test_texts_with_commas_quotes_and_lines_survive_the_csv() -> None:
    odd = 'adp[a="x",b=1]\nsecond'
    frame = pd.read_csv(io.StringIO(csv([record(label=odd)], Path("results"))))
    assert frame["method"][0] == odd


def test_a_failed_record_has_empty_numbers_and_its_error_in_the_csv() -> None:
    frame = pd.read_csv(io.StringIO(csv([failed("it, broke")], Path("results"))))
    numbers = ["clean_accuracy", "clean_stderr", "robust_accuracy", "robust_stderr", "robust_low", "robust_high"]
    assert frame[numbers].isna().all(axis=None)
    assert frame["error"][0] == "it, broke"


def test_the_csv_names_the_record_relative_to_the_results_folder(tmp_path: Path) -> None:
    written = Store(tmp_path).write(record())
    assert row(written, tmp_path)["record"] == "records/digits/nat/pgd-abababababababab.json"


def test_the_markdown_has_one_row_a_record_in_their_order() -> None:
    text = markdown([record(label="second"), record(label="first")], Path("results"), "A title")
    assert text.startswith("# A title\n\n| method ")
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert [line.split("|")[1].strip() for line in rows] == ["second", "first"]
    assert "| 75.0 ± 21.7 | 50.0 ± 25.0 | 15.0-85.0 " in " ".join(rows[0].split())


def test_no_text_of_a_record_ends_a_cell_or_a_row_or_starts_a_tag_or_a_link() -> None:
    hostile = "a|b\n\\|<script>[x](javascript:alert(1))"
    text = markdown([record(label=hostile, attack_label=hostile), failed(hostile)], Path("results"), hostile)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    bars = [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines]
    assert len(set(bars)) == 1
    assert not re.search(r"(?<!\\)<script", text)
    assert "](" not in text


def test_the_markdown_shows_a_dash_and_a_footnote_for_a_failure() -> None:
    text = markdown([failed("no more memory"), record()], Path("results"))
    first, second = [line for line in text.splitlines() if line.startswith("| nat")]
    assert "| - " in first
    assert "| - [1] " in first
    assert "[1]" not in second
    assert text.count("\n[1] failed: no more memory") == 1


def test_the_markdown_shows_a_footnote_for_a_flag_with_its_meaning() -> None:
    text = markdown([record(flags=[FLAG])], Path("results"))
    assert "50.0 ± 25.0 [1] " in text
    assert "\n[1] recount (masking, 0.2500): successes were not confirmed" in text


def test_equal_footnotes_are_shared_and_others_counted_on() -> None:
    text = markdown([record(flags=[FLAG]), failed("a"), record(flags=[FLAG]), failed("b")], Path("results"))
    rows = [line for line in text.splitlines() if line.startswith("| nat")]
    assert [line[line.index("[") : line.index("]") + 1] for line in rows] == ["[1]", "[2]", "[1]", "[3]"]
    assert [line[:3] for line in text.splitlines() if line.startswith("[")] == ["[1]", "[2]", "[3]"]


def test_a_combiner_other_than_the_defences_own_is_told_in_the_table() -> None:
    assert "pgd on vote" in markdown([record(combiner="vote")], Path("results"))
    assert " on native" not in markdown([record()], Path("results"))


def test_an_attack_without_a_budget_has_dashes_for_norm_and_radius() -> None:
    text = markdown([record(norm=None, eps=None, eps_value=None)], Path("results"))
    assert "| pgd      | -      | -     |" in text


def filled(results: Path, labels: list[str]) -> list[Record]:
    """One stored record for each label, in the order of labels."""
    keys = {label: f"{sum(map(ord, label)):064x}"[::-1] for label in labels}
    return [Store(results).write(record(label=label, key=keys[label])) for label in labels]


def test_tables_are_a_function_of_manifest_and_records_and_not_of_the_order_of_writing(tmp_path: Path) -> None:
    for folder, order in (("one", ["a", "b", "c"]), ("two", ["c", "a", "b"])):
        stored = sorted(filled(tmp_path / folder, order), key=lambda one: one.label)
        Manifests(tmp_path / folder).write("mine", "Mine", stored, extend=False)
        for path in write_table("mine", tmp_path / folder, tmp_path / folder / "tables"):
            assert path.is_file()
    for name in ("mine.csv", "mine.md", "mine.tex"):
        assert (tmp_path / "one/tables" / name).read_bytes() == (tmp_path / "two/tables" / name).read_bytes()


def test_a_table_has_only_the_records_of_its_manifest_in_the_order_of_the_manifest(tmp_path: Path) -> None:
    a, b, c = filled(tmp_path, ["a", "b", "c"])
    Manifests(tmp_path).write("mine", "Mine", [c, a], extend=False)
    title, stored = Manifests(tmp_path).read("mine")
    assert title == "Mine"
    assert stored == [c, a]
    assert b.label not in pd.read_csv(io.StringIO(build_table("mine", tmp_path)["mine.csv"]))["method"].tolist()


def test_a_manifest_may_be_extended_and_names_no_record_twice(tmp_path: Path) -> None:
    a, b, c = filled(tmp_path, ["a", "b", "c"])
    manifests = Manifests(tmp_path)
    manifests.write("mine", "Mine", [a, b], extend=True)
    manifests.write("mine", "Mine", [b, c], extend=True)
    assert manifests.read("mine")[1] == [a, b, c]
    manifests.write("mine", "Mine", [c], extend=False)
    assert manifests.read("mine")[1] == [c]
    assert manifests.names() == ["mine"]


def test_a_manifest_with_a_failed_record_still_gives_a_table(tmp_path: Path) -> None:
    Manifests(tmp_path).write("mine", "Mine", [Store(tmp_path).write(failed())], extend=False)
    assert "failed: " in build_table("mine", tmp_path)["mine.md"]


@pytest.mark.parametrize("relative", ["../outside.json", "records/../../outside.json", "{absolute}"])
def test_a_manifest_that_names_a_file_outside_the_results_folder_is_refused(tmp_path: Path, relative: str) -> None:
    results = tmp_path / "results"
    (results / "manifests").mkdir(parents=True)
    (results / "records").mkdir()
    outside = tmp_path / "outside.json"
    outside.write_text(record().to_json(), encoding="utf-8")
    content = {"title": "Mine", "records": [relative.format(absolute=outside)]}
    (results / "manifests/mine.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UsageError, match=r"outside\.json"):
        build_table("mine", results)


def test_a_link_out_of_the_results_folder_is_refused(tmp_path: Path) -> None:
    results = tmp_path / "results"
    (results / "manifests").mkdir(parents=True)
    (tmp_path / "outside.json").write_text(record().to_json(), encoding="utf-8")
    (results / "link.json").symlink_to(tmp_path / "outside.json")
    (results / "manifests/mine.json").write_text('{"title": "Mine", "records": ["link.json"]}', encoding="utf-8")
    with pytest.raises(UsageError, match=r"link\.json"):
        build_table("mine", results)


def test_a_manifest_whose_record_is_gone_is_refused_by_its_name(tmp_path: Path) -> None:
    stored = Store(tmp_path).write(record())
    Manifests(tmp_path).write("mine", "Mine", [stored], extend=False)
    Path(str(stored.path)).unlink()
    with pytest.raises(UsageError, match=r"pgd-abababababababab\.json is missing"):
        build_table("mine", tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"title": "x"}', '{"title": "x", "records": 3}', "null"])
def test_what_is_no_manifest_is_refused_by_the_name_of_its_file(tmp_path: Path, text: str) -> None:
    write_text(tmp_path / "manifests/mine.json", text)
    with pytest.raises(UsageError, match=r"mine\.json"):
        build_table("mine", tmp_path)


def test_an_unknown_table_is_refused_with_the_nearest(tmp_path: Path) -> None:
    Manifests(tmp_path).write("default", "x", filled(tmp_path, ["a"]), extend=False)
    with pytest.raises(UsageError, match="'defaults'; did you mean 'default'"):
        build_table("defaults", tmp_path)


def test_stale_tables_are_those_that_differ_from_the_published_records(tmp_path: Path) -> None:
    published = tmp_path / "published"
    Manifests(published).write("mine", "Mine", filled(published, ["a", "b"]), extend=False)
    assert stale_tables(tmp_path) == ["mine.csv", "mine.md", "mine.tex"]
    write_table("mine", published, published / "tables")
    assert stale_tables(tmp_path) == []
    path = published / "tables/mine.md"
    path.write_text(path.read_text(encoding="utf-8").replace("50.0", "51.0"), encoding="utf-8")
    assert stale_tables(tmp_path) == ["mine.md"]


# --- protocols ------------------------------------------------------------------------------------


def protocol(**changes: Any) -> Protocol:
    """Two methods under one attack, small."""
    return parse_protocol(
        {"methods": ["nat", "adv"], "attacks": ["fgsm"], "limit": 60, "samples": 10, "members": 2, **changes}, "mine"
    )


def cells(one: Protocol) -> list[Cell]:
    return plan(one)[0]


def trainings(planned: list[Cell], method: str) -> list[str]:
    """Training radii of the distinct trainings of a method."""
    return list(
        {
            cell.training.key: cell.training.setting.train_eps for cell in planned if cell.training.method == method
        }.values()
    )


@pytest.mark.parametrize("key", ["colour", "name", "method", "train-eps"])
def test_a_key_that_protocols_do_not_have_is_refused_with_those_they_have(key: str) -> None:
    with pytest.raises(UsageError, match=f"protocol mine has no key {key!r}; it has: .*attacks.*methods.*train_eps"):
        protocol(**{key: 1})


def test_the_id_of_a_protocol_is_its_name_and_version() -> None:
    assert protocol(version=4).id == "mine-v4"
    assert protocol().id == "mine-v1"


def test_attacks_may_be_texts_or_tables() -> None:
    one = protocol(attacks=["fgsm", {"call": "bim[steps=2]", "eps": 0.1, "norm": "l2"}])
    assert one.attacks == (AttackColumn("fgsm"), AttackColumn("bim[steps=2]", ("0.1",), "l2"))


@pytest.mark.parametrize("column", [{}, {"eps": "0.1"}, {"call": "fgsm", "steps": 3}])
def test_an_attack_table_without_a_call_or_with_other_keys_is_refused(column: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="call, eps and norm"):
        protocol(attacks=[column])


def test_a_protocol_plans_every_method_under_every_attack_at_every_radius_with_every_seed() -> None:
    planned = cells(protocol(attacks=["fgsm", "bim[steps=2]"], eps=["0.1", "0.2"], seeds=[0, 1]))
    found = [
        (cell.training.method, cell.training.setting.seed, cell.attack.name, cell.attack.written) for cell in planned
    ]
    assert found == [
        (method, seed, attack, eps)
        for method in ("nat", "adv")
        for seed in (0, 1)
        for attack in ("fgsm", "bim")
        for eps in ("0.1", "0.2")
    ]
    assert {cell.samples for cell in planned} == {10}


def test_without_radii_the_data_set_says_them_for_each_norm() -> None:
    planned = cells(protocol(attacks=["fgsm", {"call": "fgsm", "norm": "l2"}]))
    assert [(cell.attack.norm, cell.attack.written) for cell in planned[:2]] == [("linf", "0.2"), ("l2", "1.0")]


def test_radius_and_norm_of_a_column_prevail_over_those_of_the_protocol() -> None:
    columns = ["fgsm", {"call": "bim", "eps": ["0.3", "0.4"]}, {"call": "mim", "norm": "l2", "eps": "2"}]
    planned = cells(protocol(methods=["nat"], attacks=columns, eps="0.1"))
    found = [(cell.attack.name, cell.attack.norm, cell.attack.written) for cell in planned]
    assert found == [
        ("fgsm", "linf", "0.1"),
        ("bim", "linf", "0.3"),
        ("bim", "linf", "0.4"),
        ("mim", "l2", "2"),
    ]


def test_one_training_serves_all_attack_radii() -> None:
    planned = cells(protocol(eps=["0.05", "0.1", "0.3"]))
    assert trainings(planned, "adv") == ["0.2"]
    assert trainings(planned, "nat") == ["0.2"]


def test_train_eps_eps_gives_one_training_for_each_attack_radius() -> None:
    planned = cells(protocol(eps=["0.05", "0.1"], train_eps="eps"))
    assert trainings(planned, "adv") == ["0.05", "0.1"]
    assert all(
        cell.training.setting.train_eps == cell.attack.written for cell in planned if cell.training.method == "adv"
    )


def test_train_eps_eps_trains_once_what_never_sees_an_attack() -> None:
    planned = cells(protocol(eps=["0.05", "0.1"], train_eps="eps"))
    assert len(trainings(planned, "nat")) == 1


def test_a_training_radius_may_be_drawn_from_an_interval() -> None:
    planned = cells(protocol(train_eps="uniform(0.05,0.1)"))
    assert trainings(planned, "adv") == ["uniform(0.05,0.1)"]


def test_the_training_norm_is_that_of_the_protocol_and_not_of_a_column() -> None:
    planned = cells(protocol(attacks=[{"call": "fgsm", "norm": "l2"}]))
    assert {cell.training.setting.norm for cell in planned} == {"linf"}


def test_the_recipe_of_a_data_set_prevails_over_that_of_the_protocol_and_epochs_over_both() -> None:
    recipes = {
        "recipe": {"lr": 0.5, "epochs": 7, "batch_size": 32},
        "recipes": {"digits": {"lr": 0.25}, "mnist": {"lr": 9}},
    }
    (cell,) = cells(protocol(methods=["nat"], **recipes))
    assert (cell.training.recipe.lr, cell.training.recipe.epochs, cell.training.recipe.batch_size) == (0.25, 7, 32)
    (cell,) = cells(protocol(methods=["nat"], epochs=3, **recipes))
    assert cell.training.recipe.epochs == 3


def test_the_recipe_of_a_method_prevails_for_it_alone_also_where_it_trains_for_another() -> None:
    recipes = {"recipe": {"lr": 0.5}, "method_recipes": {"nat": {"lr": 0.25, "epochs": 9}}}
    nat, dverge = cells(protocol(methods=["nat", "dverge"], **recipes))
    assert (nat.training.recipe.lr, nat.training.recipe.epochs) == (0.25, 9)
    assert dverge.training.recipe.lr == 0.5
    assert dverge.training.prerequisites["start"].key == nat.training.key
    (cell,) = cells(protocol(methods=["nat"], epochs=3, **recipes))
    assert (cell.training.recipe.lr, cell.training.recipe.epochs) == (0.25, 3), "what the user types wins"


def test_a_recipe_for_a_method_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="natt"):
        plan(protocol(method_recipes={"natt": {"lr": 0.1}}))


def test_the_same_cell_named_twice_is_planned_once() -> None:
    assert len(cells(protocol(methods=["nat", "nat[reduction=sum]"], eps=["0.2", "51/255"], seeds=[0, 0]))) == 1


@pytest.mark.parametrize("changes", [{"methods": []}, {"attacks": []}, {"seeds": []}])
def test_a_protocol_with_nothing_to_do_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="has no "):
        plan(protocol(**changes))


def test_methods_and_attacks_of_a_protocol_may_be_replaced_by_lists() -> None:
    one = with_attacks(with_methods(protocol(), "adp[entropy_weight=1,logdet_weight=0],nat"), "pgd[steps=2,restarts=2]")
    assert one.methods == ("adp[entropy_weight=1,logdet_weight=0]", "nat")
    assert one.attacks == (AttackColumn("pgd[steps=2,restarts=2]"),)


def test_a_method_may_have_an_architecture_and_a_number_of_members_of_its_own() -> None:
    wide = {"call": "adv", "arch": "small_resnet[width=8]", "members": 1}
    one = protocol(methods=["nat", "adv", wide, {"call": "adv_en", "members": 4}])
    assert one.methods == ("nat", "adv", MethodRow("adv", "small_resnet[width=8]", 1), MethodRow("adv_en", None, 4))
    models = [cell.training.model for cell in cells(one)]
    assert [(model.method_call, model.architecture_call, model.members) for model in models] == [
        ("nat", "small_resnet", 2),
        ("adv", "small_resnet", 1),
        ("adv", "small_resnet[width=8]", 1),
        ("adv_en", "small_resnet", 4),
    ]


def test_the_architecture_of_a_method_prevails_over_that_of_the_protocol() -> None:
    wide = {"call": "nat", "arch": "small_resnet[width=8]"}
    found = cells(protocol(methods=["adv", wide], arch="small_resnet[width=4]"))
    assert [cell.training.model.architecture_params["width"] for cell in found] == [4, 8]


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"arch": "small_resnet"}, "protocol mine: a method is a text, or a table such as .* got {'arch'"),
        (3, "a method is a text, or a table such as .* got 3"),
        (
            {"call": "adv", "width": 3},
            "protocol mine: method adv has no parameter 'width'; it has: call, arch, members",
        ),
        ({"call": "adv", "members": "many"}, r"method adv\[members\] is 'many'; expected a number"),
        ({"call": "adv", "members": 1.5}, r"method adv\[members\] is 1.5; expected a whole number"),
    ],
)
def test_a_method_that_is_no_row_is_refused_by_what_it_is(entry: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        protocol(methods=[entry])


def test_a_row_whose_architecture_does_not_exist_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(UsageError, match="unknown architecture 'tiny_resnet'"):
        plan(protocol(methods=[{"call": "adv", "arch": "tiny_resnet"}]))


def test_a_protocol_is_a_grid_or_a_leaderboard() -> None:
    assert (protocol().kind, protocol(kind="leaderboard").kind) == ("grid", "leaderboard")
    with pytest.raises(UsageError, match="kind is 'podium'; expected one of grid, leaderboard"):
        protocol(kind="podium")


def test_what_is_not_given_leaves_a_protocol_as_it_was() -> None:
    assert _overlay(protocol(), {"samples": None, "device": None}, None) == protocol()
    assert _overlay(protocol(), {"samples": 7}, "1,2") == protocol(samples=7, seeds=[1, 2])


@pytest.mark.parametrize("name", GRIDS)
def test_every_shipped_protocol_loads_and_has_a_title(name: str) -> None:
    loaded = load_protocol(name)
    assert loaded.name == name
    assert loaded.title
    assert loaded.version >= 1


@pytest.mark.parametrize("name", [name for name in GRIDS if not load_protocol(name).measures])
def test_every_shipped_protocol_on_data_at_hand_plans_cells_with_distinct_keys(name: str) -> None:
    loaded = load_protocol(name)
    if loaded.dataset != "digits":
        loaded = dataclasses.replace(loaded, dataset="digits", data_dir=None, image_size=None, arch=None, eps=None)
    planned = cells(loaded)
    assert planned
    assert len({cell.key for cell in planned}) == len(planned)
    assert {cell.training.method for cell in planned} == {row.call.split("[")[0] for row in loaded.rows}
    assert {cell.attack.name for cell in planned} == {column.call.split("[")[0] for column in loaded.attacks}


def test_the_default_protocol_is_among_the_shipped_ones() -> None:
    assert "default" in protocol_names()


@pytest.mark.parametrize("write", [lambda path: None, lambda path: path.mkdir()], ids=["missing", "a folder"])
def test_a_protocol_file_that_is_not_there_is_refused_by_name(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "mine.toml")
    with pytest.raises(UsageError, match=r"no protocol file .*mine\.toml"):
        load_protocol(str(tmp_path / "mine.toml"))


def test_a_protocol_file_that_is_no_toml_is_refused_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("version = 1\nmethods = [1 2]\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"mine\.toml.*line 2"):
        load_protocol(str(tmp_path / "mine.toml"))


# -- worst cases ------------------------------------------------------------------------------------------------


def attacked(attack: str, robust: tuple[int, ...], key: str = "model", **changes: Any) -> Record:
    clean = (1, 1, 1, 0)
    return record(clean, robust, attack=attack, attack_label=attack, training={"key": key, "eps": "0.2"}, **changes)


def test_the_worst_case_counts_images_that_stay_right_under_every_attack() -> None:
    (worst,) = worst_cases(
        [attacked("pgd", (1, 1, 0, 0)), attacked("pgd", (0, 1, 1, 0), norm="l2", eps="1", eps_value=1.0)]
    )
    assert worst.outcomes["robust"] == [0, 1, 0, 0]
    assert (worst.clean_accuracy, worst.robust_accuracy) == (0.75, 0.25)
    assert worst.attack_label == "worst of pgd linf + pgd l2"
    assert worst.seconds == 2.5, "costs add up"


def test_weather_has_no_norm_and_joins_all_the_same() -> None:
    weather = {"norm": None, "eps": None, "eps_value": None}
    (worst,) = worst_cases([attacked("fog", (1, 0, 1, 0), **weather), attacked("snow", (1, 1, 0, 0), **weather)])
    assert worst.robust_accuracy == 0.25


@pytest.mark.parametrize(
    ("others", "why"),
    [
        ([], "one attack"),
        ([attacked("pgd", (1, 0, 0, 0), eps="0.3", eps_value=0.3)], "another radius of the same norm"),
        ([attacked("mim", (1, 0, 0, 0), key="another")], "another model"),
        ([attacked("mim", (1, 0, 0, 0), combiner="max")], "another inference rule"),
        ([failed(training={"key": "model"})], "a failed cell"),
    ],
)
def test_no_worst_case_of(others: list[Record], why: str) -> None:
    assert worst_cases([attacked("pgd", (1, 1, 0, 0)), *others]) == [], why


def test_attacks_at_several_radii_are_joined_radius_by_radius() -> None:
    worst = worst_cases(
        [
            attacked(name, robust, eps=eps, eps_value=float(eps))
            for name, robust, eps in (
                ("pgd", (1, 1, 0, 0), "0.1"),
                ("mim", (0, 1, 1, 0), "0.1"),
                ("pgd", (1, 0, 0, 0), "0.3"),
                ("mim", (1, 0, 1, 0), "0.3"),
            )
        ]
    )
    assert [(case.norm, case.eps, case.outcomes["robust"]) for case in worst] == [
        ("linf", "0.1", [0, 1, 0, 0]),
        ("linf", "0.3", [1, 0, 0, 0]),
    ]


def test_the_worst_case_is_a_column_of_the_table_and_has_a_file_of_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path)
    written = [
        store.write(attacked(name, (1, index, 0, 0), key="ab" * 32)) for index, name in enumerate(("pgd", "mim"))
    ]
    assert len({one.path for one in written}) == 2
    Manifests(tmp_path).write("x", "Title", written, extend=False)
    files = build_table("x", tmp_path)
    assert set(files) == {"x.csv", "x.md", "x.tex", "x.worst.csv"}
    assert len(pd.read_csv(io.StringIO(files["x.csv"]))) == 2, "one row a record"
    assert pd.read_csv(io.StringIO(files["x.worst.csv"]))["robust_accuracy"].tolist() == [0.25]
    header, _, *rows = [line for line in files["x.md"].splitlines() if line.startswith("|")]
    column = [name.strip() for name in header.split("|")].index("worst %")
    assert [row.split("|")[column].strip()[:4] for row in rows] == ["25.0", "25.0"]


def test_the_latex_has_the_cells_of_the_markdown_but_for_times_and_paths() -> None:
    text = latex([record(label="adv_en", flags=[FLAG]), failed("no more memory")], Path("results"), "mine", "Mine")
    body = text[text.index("\\midrule") : text.index("\\bottomrule")].splitlines()
    rows = [[cell.strip() for cell in line.rstrip("\\ ").split(" & ")] for line in body if " & " in line]
    assert rows[0] == [
        *("adv\\_en", "digits", "3 x small\\_resnet", "0", "pgd", "linf", "8/255"),
        *("75.0 $\\pm$ 21.7", "50.0 $\\pm$ 25.0 [1]", "15.0-85.0", "4"),
    ]
    assert rows[1][-3:] == ["- [2]", "-", "4"]
    assert "[2] failed: no more memory" in text


def test_a_table_of_one_attack_has_no_worst_case(tmp_path: Path) -> None:
    assert "worst" not in markdown([attacked("pgd", (1, 1, 0, 0))], tmp_path)


def uncertain(value: float) -> dict[str, Any]:
    return finding("uncertain", value, f"{value:.3f} wide")


def test_flags_that_differ_in_their_details_share_a_footnote_with_the_range_of_values() -> None:
    text = markdown([record(flags=[uncertain(0.3)]), record(), record(flags=[uncertain(0.2)])], Path("results"))
    assert text.count("[1]") == 3
    assert "\n[1] uncertain (info, 0.2000 to 0.3000): " in text
    assert "wide; details in the records" in text


def test_one_flag_alone_tells_its_details() -> None:
    assert "0.300 wide" in markdown([record(flags=[uncertain(0.3)]), record()], Path("results"))


def test_a_value_beyond_all_bounds_stays_readable_in_its_footnote() -> None:
    text = markdown([record(flags=[finding("member_domination", 1e30)])], Path("results"))
    assert "member_domination (info, 1.0e+30): " in text
