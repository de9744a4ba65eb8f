"""From records to standings and their files: worst cases, ties, costs, failures, and what must not be mixed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from toys_records import failed, measured

from ensdef.errors import UsageError
from ensdef.health.catalogue import finding
from ensdef.leaderboard import Standing, standings
from ensdef.leaderboard_table import leaderboard_files
from ensdef.manifests import Manifests
from ensdef.records import Record, Store
from ensdef.tables import build_table, stale_tables, write_table

N = 40


def first(right: int, n: int = N) -> list[int]:
    return [1] * right + [0] * (n - right)


def last(right: int, n: int = N) -> list[int]:
    return first(right, n)[::-1]


def board(**rights: int) -> list[Record]:
    """One seed, one attack, by number of robust images."""
    return [measured(name, "pgd", first(right)) for name, right in rights.items()]


def by_label(rows: list[Standing]) -> dict[str, Standing]:
    return {row.label: row for row in rows}


def files(records: list[Record]) -> dict[str, str]:
    return leaderboard_files("board", "A board", records)


def cells(markdown: str) -> list[dict[str, str]]:
    """Rows of the table by head."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


# --- rows and columns -----------------------------------------------------------------------------


def test_a_row_is_a_defence_with_its_architecture_members_and_inference_rule() -> None:
    records = [
        *board(adv=10, soe=20),
        measured("adv", "pgd", first(12), architecture="small_resnet[width=28]"),
        measured("adv", "pgd", first(14), members=1),
        measured("soe", "pgd", first(16), combiner="vote"),
    ]
    rows = standings(records)
    assert [(row.label, row.architecture, row.members, row.combiner) for row in rows] == [
        ("soe", "small_resnet", 3, "native"),
        ("soe", "small_resnet", 3, "vote"),
        ("adv", "small_resnet", 1, "native"),
        ("adv", "small_resnet[width=28]", 3, "native"),
        ("adv", "small_resnet", 3, "native"),
    ]


def test_columns_are_the_attacks_with_norm_and_radius_where_one_comes_in_several() -> None:
    l2 = {"norm": "l2", "eps": "128/255", "eps_value": 128 / 255}
    (row,) = standings([measured("nat", "pgd", first(4)), measured("nat", "pgd", first(6), **l2)])
    assert {name: estimate.mean for name, estimate in row.robust.items() if estimate} == {
        "pgd linf 0.2": 0.1,
        "pgd l2 0.501961": 0.15,
    }
    (row,) = standings([measured("nat", "pgd", first(4)), measured("nat", "square", first(6), **l2)])
    assert list(row.robust) == ["pgd", "square"]


def test_one_radius_written_in_two_ways_is_one_column() -> None:
    rows = standings([measured("nat", "pgd", first(4)), measured("adv", "pgd", first(6), eps="1/5")])
    assert [list(row.robust) for row in rows] == [["pgd"], ["pgd"]]


def test_the_worst_case_is_right_under_every_attack_image_by_image_and_averaged_over_seeds() -> None:
    records = [
        measured("soe", "pgd", first(30), 0),
        measured("soe", "square", last(30), 0),
        measured("soe", "pgd", first(20), 1),
        measured("soe", "square", first(10), 1),
    ]
    (row,) = standings(records)
    assert row.worst is not None
    assert row.worst.mean == pytest.approx((20 + 10) / 2 / N)
    assert (row.worst.n, row.worst.seeds, row.seeds) == (N, 2, (0, 1))
    assert row.worst.seed_std == pytest.approx(10 / N / 2**0.5)
    pgd = row.robust["pgd"]
    assert pgd is not None
    assert pgd.mean == pytest.approx(25 / N)


def test_clean_accuracy_is_that_of_each_seeds_network_once() -> None:
    records = [
        measured("nat", attack, first(0), seed, clean=first(36 + seed)) for seed in (0, 2) for attack in ("pgd", "cw")
    ]
    (row,) = standings(records)
    assert row.clean is not None
    assert (row.clean.mean, row.clean.seeds) == (pytest.approx(37 / N), 2)


# --- ranks ----------------------------------------------------------------------------------------


def test_rows_come_best_worst_case_first_and_those_not_told_apart_share_ranks_and_being_best() -> None:
    rows = standings(board(nat=0, adp=30, soe=32, gal=2))
    assert [row.label for row in rows] == ["soe", "adp", "gal", "nat"]
    assert [row.ranks for row in rows] == [(1, 2), (1, 2), (3, 4), (3, 4)]
    assert [row.best for row in rows] == [True, True, False, False]


def test_no_two_rows_are_ordered_that_the_paired_test_cannot_tell_apart() -> None:
    """Both are right on half of the images: the same half, or the other one."""
    rows = standings([measured("a", "pgd", first(21)), measured("b", "pgd", last(20))])
    assert [row.ranks for row in rows] == [(1, 2), (1, 2)]


def test_being_best_is_told_for_every_column_by_itself() -> None:
    records = [
        measured("a", "pgd", first(40)),
        measured("a", "square", first(20)),
        measured("b", "pgd", first(20)),
        measured("b", "square", first(40)),
    ]
    rows = by_label(standings(records))
    assert rows["a"].best_under == {"pgd"}
    assert rows["b"].best_under == {"square"}
    assert rows["a"].best
    assert rows["b"].best


# --- costs, flags, failures -----------------------------------------------------------------------


def trained(**costs: Any) -> dict[str, Any]:
    return {"provenance": {"protocol": "board-v1", "subset_checksum": "ab", "training": costs}}


def test_costs_are_means_over_trainings_and_not_over_records() -> None:
    records = [
        measured("soe", "pgd", first(3), 0, **trained(parameters=100, seconds=10.0, passes=4.0)),
        measured("soe", "square", first(3), 0, **trained(parameters=100, seconds=10.0, passes=4.0)),
        measured("soe", "pgd", first(3), 1, **trained(parameters=100, seconds=20.0, passes=4.0)),
    ]
    (row,) = standings(records)
    assert (row.costs.parameters, row.costs.training_seconds, row.costs.training_passes) == (100, 15, 4)
    assert row.costs.peak_memory_mb is None, "what records do not tell is not made up"


def test_a_cost_that_one_of_the_trainings_does_not_tell_is_not_told() -> None:
    records = [measured("soe", "pgd", first(3), 0, **trained(seconds=10.0)), measured("soe", "pgd", first(3), 1)]
    (row,) = standings(records)
    assert row.costs.training_seconds is None


def test_a_failed_cell_leaves_the_seed_out_of_its_column_and_of_the_worst_case_and_says_why() -> None:
    records = [
        measured("soe", "pgd", first(10), 0),
        measured("soe", "square", first(8), 0),
        measured("soe", "pgd", first(20), 1),
        failed("soe", "square", "no more memory", 1),
    ]
    (row,) = standings(records)
    assert row.errors == ("seed 1 under square: no more memory",)
    seeds = {name: estimate.seeds for name, estimate in row.robust.items() if estimate}
    assert seeds == {"pgd": 2, "square": 1}
    assert row.worst is not None
    assert (row.worst.mean, row.worst.seeds) == (8 / N, 1)


def test_a_row_that_met_no_attack_whole_has_no_rank_and_comes_last() -> None:
    records = [failed("gal", "pgd", "loss is nan"), *board(nat=1, adv=30)]
    rows = standings(records)
    assert [(row.label, row.ranks) for row in rows] == [("adv", (1, 1)), ("nat", (2, 2)), ("gal", None)]
    assert (rows[-1].worst, rows[-1].clean, rows[-1].robust, rows[-1].best) == (None, None, {"pgd": None}, False)


def test_a_cell_that_was_never_run_is_told() -> None:
    records = [measured("a", "pgd", first(3)), measured("a", "square", first(3)), measured("b", "pgd", first(3))]
    rows = by_label(standings(records))
    assert rows["b"].worst is None
    assert rows["b"].errors == ("seed 0 under square: no record; run the protocol again",)


def test_flags_of_all_records_are_those_of_the_row() -> None:
    flags = [finding("uncertain", 0.2), finding("attack_warning", 1.0)]
    records = [measured("a", "pgd", first(3), flags=flags[:1]), measured("a", "square", first(3), flags=flags)]
    assert standings(records)[0].flags == ("uncertain", "attack_warning")


# --- what must not be mixed -----------------------------------------------------------------------


def of_protocol(name: str | None, *also: str) -> dict[str, Any]:
    return {"provenance": {"protocol": name, "also_in": list(also), "subset_checksum": "ab"}}


def test_records_of_two_versions_of_a_protocol_are_not_merged() -> None:
    records = [
        measured("a", "pgd", first(3), **of_protocol("board-v1")),
        measured("b", "pgd", first(3), **of_protocol("board-v1")),
        measured("c", "pgd", first(3), **of_protocol("board-v2")),
    ]
    with pytest.raises(UsageError, match=r"board-v1 \(2\), board-v2 \(1\); .* run it again"):
        standings(records)


def test_records_of_a_protocol_and_of_none_are_not_merged() -> None:
    with pytest.raises(UsageError, match=r"board-v1 \(1\), no protocol \(1\)"):
        standings([measured("a", "pgd", first(3)), measured("b", "pgd", first(3), **of_protocol(None))])


def test_a_record_that_another_protocol_made_and_this_one_found_belongs_to_both() -> None:
    records = [measured("a", "pgd", first(3)), measured("b", "pgd", first(3), **of_protocol("other-v1", "board-v1"))]
    assert len(standings(records)) == 2


def test_records_of_no_protocol_at_all_may_be_ranked() -> None:
    assert len(standings([measured(name, "pgd", first(3), **of_protocol(None)) for name in "ab"])) == 2


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (measured("b", "pgd", first(3, 30)), "different test images"),
        (measured("b", "pgd", first(3), dataset="cifar10"), "several data sets"),
        (
            measured("b", "pgd", first(3), provenance={"protocol": "board-v1", "subset_checksum": "cd"}),
            "different test images",
        ),
        (measured("a", "pgd", first(5)), "a seed 0 under pgd is there twice"),
    ],
    ids=["other images", "other data", "other pixels", "the same cell"],
)
def test_records_that_cannot_be_compared_are_refused_by_name(other: Record, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        standings([measured("a", "pgd", first(3)), other])


def test_a_leaderboard_of_nothing_says_what_to_run() -> None:
    with pytest.raises(UsageError, match="ensdef run"):
        standings([])


# --- files ----------------------------------------------------------------------------------------


def test_the_markdown_prints_ranks_as_ranges_and_the_best_and_its_ties_in_bold() -> None:
    rows = cells(files(board(nat=0, adp=30, soe=32))["board.md"])
    assert [row["rank"] for row in rows] == ["1-2", "1-2", "3"]
    assert [row["method"] for row in rows] == ["soe", "adp", "nat"]
    assert [row["worst %"] for row in rows] == ["**80.0 ± 6.3**", "**75.0 ± 6.8**", "0.0 ± 0.0"]
    assert [row["pgd %"] for row in rows] == [row["worst %"] for row in rows]


def test_the_markdown_says_how_many_images_and_seeds_and_shows_the_spread_over_seeds() -> None:
    records = [measured("a", "pgd", first(10 + seed), seed) for seed in (0, 1)]
    text = files(records)["board.md"]
    assert "over 40 test images, mean over training seeds 0, 1" in text
    assert cells(text)[0]["seeds ±"] == "1.8"
    assert "seeds ±" not in cells(files(board(a=3))["board.md"])[0], "one seed has no spread"


def test_a_failure_is_a_dash_with_its_reason_below() -> None:
    text = files([failed("gal", "pgd", "loss is nan"), *board(nat=1)])["board.md"]
    row = cells(text)[-1]
    assert (row["rank"], row["clean %"], row["pgd %"], row["worst %"]) == ("-", "-", "- [1]", "-")
    assert "\n[1] failed: loss is nan" in text


def test_a_flag_is_a_footnote_of_its_cell_outside_the_bold_type() -> None:
    text = files([measured("a", "pgd", first(3), flags=[finding("uncertain", 0.2)])])["board.md"]
    assert cells(text)[0]["pgd %"] == "**7.5 ± 4.2** [1]"
    assert "[1] uncertain (info, 0.2000): " in text


def test_costs_are_columns_where_any_record_tells_them() -> None:
    records = [
        measured("a", "pgd", first(3), **trained(parameters=27_500, seconds=12.3, peak_memory_mb=801.4)),
        *board(b=2),
    ]
    a, b = cells(files(records)["board.md"])
    assert (a["parameters (k)"], a["training s"], a["memory MB"]) == ("27.5", "12.3", "801")
    assert (b["parameters (k)"], b["training s"], b["memory MB"]) == ("-", "-", "-")
    assert "training passes (M)" not in a


def test_the_csv_has_the_numbers_as_fractions() -> None:
    records = [measured("a", "pgd", first(10 + 10 * seed), seed, clean=first(30)) for seed in (0, 1)]
    frame = pd.read_csv(io.StringIO(files([*records, failed("b", "pgd", "broke, badly")])["board.csv"]))
    a, b = frame.to_dict("records")
    assert (a["rank_best"], a["rank_worst"], a["method"], a["members"]) == (1, 1, "a", 3)
    assert (a["clean mean"], a["pgd mean"], a["worst mean"], a["worst n"], a["worst seeds"]) == (
        0.75,
        0.375,
        0.375,
        40,
        2,
    )
    assert a["worst seed_std"] == pytest.approx(0.25 / 2**0.5)
    assert a["protocol"] == "board-v1"
    assert pd.isna(b["rank_best"])
    assert pd.isna(b["pgd mean"])
    assert b["errors"] == "seed 0 under pgd: broke, badly"


def test_the_latex_has_the_same_cells_in_bold() -> None:
    text = files(board(nat=0, adp=30, soe=32))["board.tex"]
    assert text.count("\\textbf{80.0 $\\pm$ 6.3}") == 2
    assert text.count("\\textbf{") == 4
    assert "\\toprule" in text


def test_a_manifest_of_the_kind_leaderboard_gives_its_files_and_they_are_checked(tmp_path: Path) -> None:
    published = tmp_path / "published"
    store = Store(published)
    stored = [store.write(record) for record in board(nat=0, soe=32)]
    Manifests(published).write("board", "A board", stored, extend=False, kind="leaderboard")
    built = build_table("board", published)
    assert set(built) == {"board.csv", "board.md", "board.tex"}
    assert built["board.md"] == files(stored)["board.md"]
    assert stale_tables(tmp_path) == ["board.csv", "board.md", "board.tex"]
    write_table("board", published, published / "tables")
    assert stale_tables(tmp_path) == []


def test_a_manifest_that_says_no_kind_is_a_grid_and_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    stored = [Store(tmp_path).write(record) for record in board(nat=0)]
    Manifests(tmp_path).write("board", "A board", stored, extend=False)
    path = tmp_path / "manifests/board.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["kind"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert "rank" not in build_table("board", tmp_path)["board.md"]
    path.write_text(json.dumps({**content, "kind": "podium"}), encoding="utf-8")
    with pytest.raises(UsageError, match=r"board\.json is of kind 'podium'; expected one of grid, leaderboard"):
        build_table("board", tmp_path)
