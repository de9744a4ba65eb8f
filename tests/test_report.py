"""The report, but for what a browser does with it: its numbers, and that nothing a record says becomes markup."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from toys_report import HOSTILE, INFO, MASKING, failed, models, record, write_table

import ensdef.cli.report
from ensdef.cli import cli
from ensdef.errors import UsageError
from ensdef.metrics import binomial_stderr
from ensdef.papers.comparison import Comparison, Entry
from ensdef.papers.published import PublishedCell
from ensdef.report import library, page
from ensdef.report.board import build_board
from ensdef.report.breakdown import ALREADY_WRONG, STANDING, breakdowns, part_kind
from ensdef.report.curves import curves
from ensdef.report.drawers import command, drawer
from ensdef.report.gathering import Gathered, gather
from ensdef.report.replication import papers, rank_correlation
from ensdef.report.standings import estimate, model_names, standings
from ensdef.report.tradeoffs import tradeoffs
from ensdef.report.transfer import between_members, transfers


@pytest.fixture(autouse=True)
def a_library_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundling the real one takes a second; the tests in a browser have it."""
    monkeypatch.setattr(page, "chart_library", lambda: "window.vegaEmbed = null;\n")


class Markup(HTMLParser):
    """What a parser makes of the page: elements with attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.raw: list[tuple[str, dict[str, str], str]] = []
        self.text = ""
        self._open: tuple[str, dict[str, str]] | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        self.elements.append((tag, told))
        self._open = (tag, told) if tag in ("script", "style") else None
        if self._open:
            self.raw.append((tag, told, ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        if self._open:
            tag, told, before = self.raw[-1]
            self.raw[-1] = (tag, told, before + data)
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [told for name, told in self.elements if name == tag]

    @property
    def data(self) -> Any:
        return json.loads(next(text for tag, told, text in self.raw if told.get("id") == "data"))


def rendered(results: Path) -> Markup:
    return Markup(page.render(results))


# the numbers


def test_one_seed_has_the_binomial_error_and_no_spread() -> None:
    found = estimate([[1, 1, 0, 0, 0]])
    assert (found.mean, found.stderr, found.seed_std, found.n) == (0.4, binomial_stderr(0.4, 5), None, 5)


def test_seeds_that_agree_on_every_image_are_no_more_certain_than_one() -> None:
    once, thrice = estimate([[1, 0, 1, 1]]), estimate([[1, 0, 1, 1]] * 3)
    assert thrice.stderr == pytest.approx(once.stderr)
    assert (thrice.seed_std, thrice.seeds) == (0.0, 3)


def test_the_error_over_seeds_is_that_of_the_images_means() -> None:
    found = estimate([[1, 1, 0, 0], [1, 0, 0, 0]])
    # images' means are 1, 1/2, 0, 0
    assert found.mean == 0.375
    assert found.stderr == pytest.approx(math.sqrt(((0.625) ** 2 + 0.125**2 + 2 * 0.375**2) / 4 / 4))
    assert found.seed_std == pytest.approx(math.sqrt(2 * 0.125**2))


def test_the_worst_case_is_taken_image_by_image_and_orders_the_models() -> None:
    rows = standings(
        [
            record("weak", (1, 1, 0, 0)),
            record("weak", (0, 0, 1, 0), attack="square"),
            record("strong", (1, 1, 0, 0)),
            record("strong", (1, 0, 0, 0), attack="square"),
        ]
    )
    assert [(row.label, row.worst.mean) for row in rows if row.worst] == [("strong", 0.25), ("weak", 0.0)]


def test_a_model_that_missed_an_attack_has_no_worst_case_and_comes_last() -> None:
    rows = standings([record("a", (1, 1, 1, 0)), failed("a", "no memory", attack="square"), *pair("b", 0)])
    assert [row.label for row in rows] == ["b", "a"]
    assert rows[1].worst is None
    assert rows[1].robust["square linf eps 0.2"] is None
    assert rows[1].robust["pgd linf eps 0.2"] is not None


def pair(label: str, right: int) -> list[Any]:
    return [record(label, (right, 0, 0, 0)), record(label, (right, 0, 0, 0), attack="square")]


def test_one_label_trained_in_two_ways_is_two_models_with_two_names() -> None:
    other = {"key": "", "eps": "0.1", "recipe": {"epochs": 10}, "deviations": []}
    rows = standings([record("adv"), record("adv", training=other)])
    assert sorted(model_names(rows)) == [
        "adv (3 × small_resnet, 10 epochs at eps 0.1)",
        "adv (3 × small_resnet, 10 epochs at eps 0.2)",
    ]


def test_training_seeds_are_one_row_with_their_spread() -> None:
    (row,) = standings([record("adv", (1, 1, 1, 0), train_seed=0), record("adv", (1, 0, 0, 0), train_seed=1)])
    assert row.seeds == (0, 1)
    found = row.robust["pgd linf eps 0.2"]
    assert found is not None
    assert (found.mean, found.seeds) == (0.5, 2)


def test_a_board_has_a_cell_for_every_attack_that_names_its_records() -> None:
    made = [*pair("a", 1), failed("b", "diverged"), record("b", attack="square", flags=[MASKING, INFO])]
    positions = {one.key: number for number, one in enumerate(made)}
    board = build_board(standings(made), positions)
    assert [heading.text for heading in board.headings] == [
        "worst case",
        "clean",
        "pgd linf eps 0.2",
        "square linf eps 0.2",
    ]
    first, second = board.rows
    assert [(cell.text, cell.records) for cell in first.cells] == [
        ("25.0", (0, 1)),
        ("75.0", ()),
        ("25.0", (0,)),
        ("25.0", (1,)),
    ]
    assert (second.cells[2].text, second.cells[2].mark, second.cells[2].records) == ("–", "failed", (2,))
    assert (second.severity, [(badge.name, badge.cells) for badge in second.badges]) == (
        "masking",
        [("zero_gradient", 1), ("uncertain", 1)],
    )


def test_costs_and_ranks_are_columns_only_where_something_tells_them() -> None:
    told = {"protocol": "toy-v1", "training": {"parameters": 1234, "seconds": 5.0}}
    plain, costly = standings([record("a")]), standings([record("a", provenance=told)])
    assert [heading.text for heading in build_board(plain, positions_of(plain)).headings][2:] == []
    headings = [heading.text for heading in build_board(costly, positions_of(costly)).headings]
    assert headings[2:] == ["parameters", "training s"]
    ranked = [dataclasses.replace(costly[0], ranks=(1, 3), best=True)]
    board = build_board(ranked, positions_of(ranked))
    assert [cell.text for cell in board.rows[0].cells] == ["1–3", "75.0", "50.0", "1,234", "5"]


def positions_of(rows: Any) -> dict[str, int]:
    return {one.key: number for row in rows for number, one in enumerate(row.records)}


# what is drawn


def test_a_curve_starts_at_the_clean_accuracy_and_needs_two_radii() -> None:
    (figure,) = curves("t", standings(models()))
    points = [(row["model"], row["eps"], row["accuracy"]) for row in figure.spec["data"]["values"]]
    assert points[:4] == [("adv_en", 0.0, 75.0), ("adv_en", 0.1, 75.0), ("adv_en", 0.2, 75.0), ("adv_en", 0.3, 75.0)]
    assert len(points) == len(figure.rows) == 16
    assert curves("t", standings([record("a"), record("b")])) == []


def test_a_breakdown_accounts_for_every_image() -> None:
    (figure,) = breakdowns("t", standings(models()))
    totals: dict[str, float] = {}
    for bar in figure.spec["data"]["values"]:
        totals[bar["model"]] = totals.get(bar["model"], 0) + bar["share"]
    assert totals == {"adv_en": 100, "soe[sigma=1]": 100, "adp": 100, "nat": 100}
    assert ("adp", "predict, margin", "50.0 %") in figure.rows
    assert ("adp", STANDING, "25.0 %") in figure.rows
    assert ("adp", ALREADY_WRONG, "25.0 %") in figure.rows


def test_a_breakdown_beyond_its_colours_draws_the_rest_as_one() -> None:
    parts = {f"part {letter}": 1 for letter in "abcdefghijkl"}
    made = record("a", (0,) * 12, (1,) * 12, broken_by=parts)
    (figure,) = breakdowns("t", standings([made]))
    assert [row[1] for row in figure.rows] == [*(f"part {letter}" for letter in "abcdefg"), "other parts"]
    assert figure.rows[-1][2] == "41.7 %"


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("fool member2, have it chosen (1)", "fool one member, have it chosen"),
        ("pgd[steps=50,restarts=5]", "pgd[steps=50,restarts=5]"),
        ("soft choice at 10", "soft choice at 10"),
    ],
)
def test_members_are_not_told_apart_in_a_breakdown(part: str, kind: str) -> None:
    assert part_kind(part) == kind


def test_transfer_is_drawn_for_attacks_that_name_their_surrogates() -> None:
    params = {"surrogates": ["nat", "adv_en"], "members": [3]}
    made = [record("a", attack="transfer", attack_params=params), record("b", attack="transfer", attack_params=params)]
    (figure,) = transfers("t", standings([*made, record("a")]))
    assert figure.rows == (
        ("a", "nat + adv_en, 3 members", "50.0 ± 25.0 %"),
        ("b", "nat + adv_en, 3 members", "50.0 ± 25.0 %"),
    )


def test_transferability_between_members_is_averaged_over_seeds() -> None:
    shared: dict[str, Any] = {"label": "cce", "dataset": "digits", "architecture": "small_resnet"}
    shared |= {"call": "transferability", "norm": "linf", "eps": "0.2"}
    found = [SimpleNamespace(values={"T": 0.2, "nT": None}, **shared), SimpleNamespace(values={"T": 0.4}, **shared)]
    (figure,) = between_members(found)  # type: ignore[arg-type]
    assert figure.rows == (("cce", "T", "30.0 %"),)
    found.append(SimpleNamespace(values={"T": 0.6}, **{**shared, "eps": "0.3"}))
    (figure,) = between_members(found)  # type: ignore[arg-type]
    assert [row[0] for row in figure.rows] == ["cce, 0.2", "cce, 0.3"]


def test_the_models_numbered_in_a_tradeoff_are_those_that_none_beats_in_both() -> None:
    made = [
        record("careful", (1, 1, 0, 0), (1, 1, 0, 0)),
        record("equal", (1, 1, 0, 0), (1, 1, 0, 0)),
        record("beaten", (1, 0, 0, 0), (1, 1, 0, 0)),
        record("open", (0, 0, 0, 0), (1, 1, 1, 1)),
    ]
    (figure,) = tradeoffs(
        "t", [dataclasses.replace(row, worst=row.robust["pgd linf eps 0.2"]) for row in standings(made)]
    )
    numbered = {point["model"]: point["number"] for point in figure.spec["data"]["values"]}
    assert numbered == {"careful": "1", "equal": "1", "beaten": "", "open": "2"}
    assert "than: 1 careful, equal; 2 open." in figure.note


# published against replicated


def published(method: str, value: str, **changes: str) -> PublishedCell:
    fields = dict.fromkeys((field.name for field in dataclasses.fields(PublishedCell)), "")
    fields |= {"paper": "cda2", "table": "table1", "method": method, "attack": "pgd", "metric": "robust_accuracy"}
    return PublishedCell(**(fields | {"value": value, "unit": "percent", **changes}))


def entry(
    method: str, value: str, ours: float | None, note: str = "", records: tuple[Any, ...] = (), **changes: str
) -> Entry:
    return Entry(published(method, value, **changes), ours, None if ours is None else 2.0, 4, note, records)


def comparison(*entries: Entry) -> Comparison:
    return Comparison(
        name="cda2_table1-smoke",
        title="Table 1: robust accuracy",
        published="cda2/table1",
        protocol="cda2_table1",
        version=1,
        scale="smoke",
        scale_title="digits, minutes",
        deviations=("Digits stand for CIFAR-10.",),
        notes=(),
        entries=entries,
    )


def test_a_replicated_table_has_every_published_number_and_what_ours_is_less_it() -> None:
    made = record("soe")
    told = comparison(
        entry("soe", "40.1", 50.0, records=(made,)),
        entry("adp", "30.0", None, "needs more memory"),
        entry("nat", "", 1.0),
    )
    (paper,) = papers([told], {made.key: 7})
    (table,) = paper.tables
    assert table.headings == ("defence", "published", "ours", "difference", "note")
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["soe", "40.1 %", "50.0 %", "+9.9", ""],
        ["adp", "30.0 %", "–", "–", "needs more memory"],
        ["nat", "–", "1.0 %", "–", ""],
    ]
    assert table.rows[0][2].records == (7,)
    assert "2 of 3 numbers replicated" in table.told
    assert "attack pgd" in table.told


def test_the_rank_correlation_is_one_for_one_order_and_minus_one_for_the_other() -> None:
    same = [entry("a", "1", 10.0), entry("b", "2", 11.0), entry("c", "3", 50.0)]
    other = [entry("a", "1", 50.0), entry("b", "2", 11.0), entry("c", "3", 10.0)]
    assert rank_correlation(same) == pytest.approx(1)
    assert rank_correlation(other) == pytest.approx(-1)
    assert rank_correlation(same[:2]) is None
    assert rank_correlation([entry("a", "1", 5.0), entry("b", "2", 5.0), entry("c", "3", 5.0)]) is None


def test_a_scatter_shows_the_percentages_that_both_sides_have() -> None:
    told = comparison(
        entry("a", "10", 20.0), entry("b", "20", 30.0), entry("c", "5", None), entry("d", "9", 3.0, unit="seconds")
    )
    (paper,) = papers([told], {})
    (figure,) = paper.figures
    assert [row[0] for row in figure.rows] == ["a", "b"]


def test_the_page_shows_papers_with_their_departures() -> None:
    told = comparison(entry("soe", "40.1", 50.0), entry("adp", "30.0", 31.0))
    text = page.compose(Gathered((), (told,)), Path("results"))
    found = Markup(text)
    assert "Digits stand for CIFAR-10." in found.text
    assert "+9.9" in found.text
    assert set(found.data["figures"]) == {"paper-1-scatter"}


# the page


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    write_table(tmp_path, "toy", models())
    assert page.render(tmp_path) == page.render(tmp_path)


def test_every_record_has_a_drawer_and_every_cell_names_those_behind_it(tmp_path: Path) -> None:
    found = rendered(write_table(tmp_path, "toy", models()))
    assert len(found.data["records"]) == 16
    named = {int(number) for told in found.all("button") for number in told.get("data-records", "").split()}
    assert named == set(range(16))


def test_a_record_that_two_tables_share_is_in_the_page_once(tmp_path: Path) -> None:
    write_table(tmp_path, "one", models())
    found = rendered(write_table(tmp_path, "two", models()))
    assert len(found.data["records"]) == 16
    assert len([told for told in found.all("section") if told.get("class") == "panel"]) == 2


def test_leaderboards_come_first(tmp_path: Path) -> None:
    write_table(tmp_path, "a", models())
    write_table(tmp_path, "z", models(), kind="leaderboard")
    assert [table.name for table in gather(tmp_path).tables] == ["z", "a"]


def test_a_drawer_tells_flags_failure_file_and_command(tmp_path: Path) -> None:
    made = record("adp", flags=[MASKING], path=str(tmp_path / "records/digits/adp/pgd-1.json"))
    told = drawer(made, tmp_path)
    assert (told["path"], told["command"]) == ("records/digits/adp/pgd-1.json", "ensdef run toy")
    assert told["flags"][0]["action"] == "attack with scores alone"
    assert drawer(failed("adp", "loss is nan"), tmp_path)["error"] == "loss is nan"


def test_a_cell_of_no_protocol_is_made_again_by_a_bench_that_a_shell_can_read() -> None:
    told = command(record("cce[mode=dm]", attack="pgd[steps=20]", provenance={}))
    assert told == (
        "ensdef bench --method 'cce[mode=dm]' --attack 'pgd[steps=20]' --dataset digits --arch small_resnet "
        "--members 3 --norm linf --eps 0.2 --train-eps 0.2 --epochs 10 --seed 0 --samples 4"
    )


def hostile_folder(results: Path) -> Path:
    made = []
    for text in HOSTILE:
        flag = {**MASKING, "flag": text, "meaning": text, "action": text}
        made += [
            record(
                text,
                attack=attack,
                method="nat",
                architecture=text,
                hyper={text: text},
                attack_params={text: text},
                attack_label=f"{attack} {text}",
                broken_by={text: 1},
                flags=[flag],
                provenance={"protocol": f"{text}-v1", "date": text, "versions": {"ensdef": text}, text: text},
                norm=text,
                eps=text,
            )
            for attack in ("one", "two")
        ]
        made.append(failed("nat", text, attack="square"))
    return write_table(results, "toy", made, title=HOSTILE[2])


def test_nothing_that_a_record_says_becomes_markup(tmp_path: Path) -> None:
    plain = rendered(write_table(tmp_path / "plain", "toy", models()))
    found = rendered(hostile_folder(tmp_path / "hostile"))
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in plain.elements}
    assert len(found.all("script")) == 3
    assert not [name for _, told in found.elements for name in told if name.startswith("on")]
    for text in HOSTILE:
        assert text in found.text.replace("\n", ""), text
        assert text in json.dumps(found.data, ensure_ascii=False).replace('\\"', '"')


def test_the_policy_lets_our_own_style_and_scripts_run_and_nothing_else(tmp_path: Path) -> None:
    found = rendered(write_table(tmp_path, "toy", models()))
    policy = next(told["content"] for told in found.all("meta") if "http-equiv" in told)
    directives = {part.split()[0]: part.split()[1:] for part in policy.split("; ")}
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for tag, told, text in found.raw:
        if told.get("type") != "application/json":
            hashes[tag].append(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
    assert directives["default-src"] == ["'none'"]
    assert directives["script-src"] == hashes["script"]
    assert directives["style-src"] == hashes["style"]


def test_the_page_names_no_other_file_and_no_other_place(tmp_path: Path) -> None:
    found = rendered(write_table(tmp_path, "toy", models()))
    for _, told in found.elements:
        assert "src" not in told
        assert told.get("href", "#").startswith("#") or told["href"] == "data:,"
        assert "style" not in told


def test_every_table_and_chart_has_a_name_and_every_chart_its_numbers(tmp_path: Path) -> None:
    found = rendered(write_table(tmp_path, "toy", models()))
    assert len(found.all("table")) == len(found.all("caption"))
    plots = [told["data-figure"] for told in found.all("div") if "data-figure" in told]
    assert sorted(plots) == sorted(found.data["figures"])
    assert len(found.all("figure")) == len(plots) >= 3
    assert all(figure["description"] for figure in found.data["figures"].values())
    assert found.all("html") == [{"lang": "en"}]


# what is refused


def run(*words: str) -> Any:
    assert ensdef.cli.report  # adds the command
    return CliRunner().invoke(cli, ["report", *words])


def test_an_empty_folder_says_what_to_run(tmp_path: Path) -> None:
    result = run("--results", str(tmp_path))
    assert result.exit_code == 2
    assert "`ensdef run digits_all` or `ensdef bench`" in result.output


def test_a_checkout_without_results_of_its_own_names_the_published_ones(tmp_path: Path) -> None:
    write_table(tmp_path / "published", "toy", models())
    assert f"--results {tmp_path / 'published'}" in run("--results", str(tmp_path)).output


def test_a_record_edited_by_hand_is_refused_by_name(tmp_path: Path) -> None:
    write_table(tmp_path, "toy", models())
    path = next((tmp_path / "records").glob("*/adp/*.json"))
    path.write_text(path.read_text().replace('"robust_accuracy": 0.', '"robust_accuracy": 0.9'))
    with pytest.raises(UsageError, match=path.name):
        page.render(tmp_path)


def test_a_record_of_another_form_is_refused_by_name(tmp_path: Path) -> None:
    write_table(tmp_path, "toy", models())
    path = next((tmp_path / "records").glob("*/adp/*.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "flags": ["zero_gradient"], "training": None}))
    with pytest.raises(UsageError, match=rf"{path.name}: flags is"):
        page.render(tmp_path)


def test_two_versions_of_one_protocol_are_not_merged(tmp_path: Path) -> None:
    made = [record("a", provenance={"protocol": "toy-v1"}), record("b", provenance={"protocol": "toy-v2"})]
    with pytest.raises(UsageError, match=r"toy-v1 and of toy-v2.*ensdef run toy"):
        page.render(write_table(tmp_path, "toy", made))


def test_records_of_two_protocols_may_share_a_table(tmp_path: Path) -> None:
    made = [
        record("a", provenance={"protocol": "toy-v1", "also_in": ["other-v2"]}),
        record("b", provenance={"protocol": "other-v2"}),
    ]
    write_table(tmp_path, "toy", made)
    assert len(gather(tmp_path).tables[0].records) == 2


def test_a_page_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path, "toy", models())
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "page.html"):
        result = run("--results", str(tmp_path), "--out", str(out))
        assert result.exit_code == 2, result.output
        assert str(out) in result.output


def test_the_command_writes_the_page_where_it_is_asked_to(tmp_path: Path) -> None:
    write_table(tmp_path, "toy", models())
    for words, path in (((), "report.html"), (("--out", str(tmp_path / "a" / "b.html")), "a/b.html")):
        result = run("--results", str(tmp_path), *words)
        assert result.exit_code == 0, result.output
        assert (tmp_path / path).read_text(encoding="utf-8") == page.render(tmp_path)


def test_a_page_is_made_without_torch(tmp_path: Path) -> None:
    write_table(tmp_path, "toy", models())
    script = f"""
import sys
from ensdef.cli import main
sys.argv = ["ensdef", "report", "--results", {str(tmp_path)!r}]
try:
    main()
finally:
    assert "torch" not in sys.modules, "torch was imported"
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert (tmp_path / "report.html").is_file()


def test_a_missing_library_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    library.chart_library.cache_clear()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(UsageError, match=r"pip install 'ensdef\[report\]'"):
        library.chart_library()
