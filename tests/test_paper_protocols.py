"""The printed numbers of the papers' tables, and the protocols that ask for ours."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from click.testing import CliRunner

import ensdef
from ensdef.attack_spec import AttackSpec
from ensdef.cli import cli, inspect, run  # noqa: F401 - they add their commands
from ensdef.cost import multiplications
from ensdef.errors import UsageError
from ensdef.notation import fill, parse_call
from ensdef.papers.paper_table import PaperTable
from ensdef.papers.parsing import is_paper_table, paper_table_of
from ensdef.papers.published import PublishedCell, paper_titles, published, published_table
from ensdef.protocol import load_protocol, protocol_names
from ensdef.protocol_file import ProtocolFile, read_protocol_file
from ensdef.registry import MEASUREMENTS, METHODS
from ensdef.scale import StandIn, load_scale, merged, scale_names

PAPER_TABLES = [name for name in protocol_names() if is_paper_table(read_protocol_file(name))]
SCALES = ("smoke", "mini", "paper")

#: Rows, empty cells, and the SHA-256 of the sorted rows of every table as transcribed from the papers.
TRANSCRIBED = {
    "cce/intext": (1, 0, "53223dcf1a2acdcd"),
    "cce/table10a": (54, 0, "d5f79f3cf0591687"),
    "cce/table10b": (54, 0, "c17b27c56976dc4e"),
    "cce/table11a": (36, 0, "6797db45c33fd59c"),
    "cce/table11b": (36, 0, "6a9678d982b6e81e"),
    "cce/table12a": (16, 0, "7d1ae4b6aead1116"),
    "cce/table12b": (16, 0, "6e99ef0a61cddd6d"),
    "cce/table13a": (16, 0, "f263ef2ed864b7e6"),
    "cce/table13b": (16, 0, "81cf35db4f5f86f1"),
    "cce/table3": (56, 0, "9b4c87870cdeee87"),
    "cce/table4": (63, 0, "cbe6ab843d9f8359"),
    "cce/table5": (63, 0, "fd21d2797e48d627"),
    "cce/table6": (40, 0, "c3dbcc48ce6f8c3d"),
    "cce/table7": (16, 0, "d7f8475c8988d2bc"),
    "cce/table9": (8, 0, "21e67b3e6837833f"),
    "cda2/table1": (32, 0, "1dfedc9556fcb174"),
    "cda2/table2": (28, 0, "4cafd1dbad78b7e3"),
    "cda2/table3": (4, 0, "4c577c42af3142a6"),
    "cda2/table4": (4, 0, "e4020c4f346ba3b1"),
    "cda2/table5": (28, 0, "a064e2d0a8b1d15a"),
    "cda2/table6": (12, 0, "8683bf885c289061"),
    "cda2/table7": (4, 0, "536af30dad139111"),
    "igat-supp/intext": (5, 0, "6c5d542767a65ea9"),
    "igat-supp/table1": (16, 0, "3c09a28a311bc0b4"),
    "igat-supp/table2": (60, 0, "12424d2d57a5de1a"),
    "igat-supp/table3": (6, 0, "78ded295f27fa27c"),
    "igat-supp/table4": (6, 0, "b03872ccc4b02ea1"),
    "igat-supp/table5": (18, 8, "4f81bcf55050b933"),
    "igat-supp/table6": (6, 0, "ddefef17e30c94a2"),
    "igat-supp/table7": (6, 0, "d3f3ece2c4352549"),
    "igat-supp/table8": (6, 0, "c3951555a36e3eba"),
    "igat/table1": (200, 0, "235bb9cafccc7fff"),
    "igat/table2": (80, 0, "c815a71ee610845c"),
    "igat/table3": (10, 0, "f3fde8ed4b6cc444"),
    "more/table1": (108, 8, "4a00f0f131587a4c"),
    "soe-appendix/table1": (5, 0, "969c491f9ffbb6f1"),
    "soe-appendix/table2": (4, 0, "07b266a06475ac4a"),
    "soe-appendix/table3": (35, 0, "c56c308f0e5c94cf"),
    "soe-appendix/table4": (12, 0, "74b1792b483008b8"),
}


# -- the printed numbers ----------------------------------------------------------------------------------------


def test_the_39_published_tables_are_all_there() -> None:
    assert set(published()) == set(TRANSCRIBED)
    assert sum(len(cells) for cells in published().values()) == 1186


@pytest.mark.parametrize("name", sorted(TRANSCRIBED))
def test_no_published_cell_was_lost_or_altered(name: str) -> None:
    cells = published_table(name)
    rows = sorted(",".join(dataclasses.astuple(cell)) for cell in cells)
    digest = hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]
    assert (len(cells), sum(not cell.value for cell in cells), digest) == TRANSCRIBED[name]


def test_every_paper_has_a_title() -> None:
    assert set(paper_titles()) == {name.partition("/")[0] for name in TRANSCRIBED}


def test_no_two_cells_of_a_table_are_the_same_question() -> None:
    for name, cells in published().items():
        keys = Counter(dataclasses.replace(cell, value="", std="", bold="") for cell in cells)
        assert max(keys.values()) == 1, name


def test_what_igat_prints_as_improvement_follows_from_its_first_table() -> None:
    def place(cell: PublishedCell) -> tuple[str, ...]:
        return (cell.dataset, cell.combiner, cell.attack)

    first = {(cell.label, *place(cell)): cell.number for cell in published_table("igat/table1")}
    for cell in published_table("igat/table2"):
        ours, base = first[(cell.label, *place(cell))], first[(cell.variant, *place(cell))]
        assert ours is not None
        assert base is not None
        assert cell.number == pytest.approx(100 * (ours - base) / base, abs=0.006)


# -- protocols --------------------------------------------------------------------------------------------------


def table(name: str, scale: str) -> PaperTable:
    return paper_table_of(read_protocol_file(name), scale)


def test_every_published_table_has_one_protocol() -> None:
    assert Counter(table(name, "smoke").published for name in PAPER_TABLES) == Counter(list(TRANSCRIBED))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", PAPER_TABLES)
def test_a_protocol_asks_something_for_every_published_cell(name: str, scale: str) -> None:
    asked = table(name, scale)
    questions = asked.questions()
    assert [question.cell for question in questions] == list(published_table(asked.published))
    assert str(asked.id).endswith(scale)
    for question in questions:
        if question.cell.metric in ("accuracy", "robust_accuracy") and question.asked.measure is None:
            assert question.value == "robust_accuracy"
            assert (question.asked.attack == "none") == (question.cell.attack == "none")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", PAPER_TABLES)
def test_every_method_attack_and_measurement_that_a_protocol_names_exists(name: str, scale: str) -> None:
    for question in table(name, scale).questions():
        asked = question.asked
        for call in (asked.method, *([question.against.method] if question.against else [])):
            method, hyper = parse_call(call)
            fill(METHODS.get(method).Hyper, hyper, method)
        attack, params = parse_call(asked.attack)
        AttackSpec.create(attack, params, asked.norm, asked.eps or "0.1")
        if asked.measure is not None:
            measure, params = parse_call(asked.measure)
            fill(MEASUREMENTS.get(measure).Params, params, measure)


def test_at_paper_scale_nothing_stands_for_the_papers_data_radii_and_networks() -> None:
    for name in PAPER_TABLES:
        for question in table(name, "paper").questions():
            cell, asked = question.cell, question.asked
            assert asked.dataset == cell.dataset
            if cell.eps:
                assert asked.eps == cell.eps
            if cell.members and asked.measure != "member_accuracy":
                assert asked.members == int(cell.members)
            if cell.architecture.startswith("resnet"):
                assert asked.arch == cell.architecture


def test_radii_follow_the_stand_in_and_the_norm() -> None:
    digits = StandIn("digits", linf=Fraction(51, 8), l2=Fraction(2))
    assert digits.radius("8/255", "linf") == "0.2"
    assert digits.radius("2/255", "linf") == "0.05"
    assert digits.radius("1.0", "l2") == "2"
    assert StandIn("digits", linf=Fraction(20, 3)).radius("0.01", "linf") == "1/15"
    assert StandIn("cifar10").radius("8/255", "linf") == "8/255"


def test_one_model_for_every_radius_trains_at_the_radius_it_is_attacked_at() -> None:
    asked = [question.asked for question in table("cda2_table1", "smoke").questions()]
    assert {item.train_eps for item in asked if item.attack != "none"} == {"eps"}
    assert {item.train_eps for item in asked if item.attack == "none"} == {"0.2"}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["cda2_table6", "soe_table4", "igat_table2"])
def test_a_gain_is_counted_from_the_model_of_another_row(name: str, scale: str) -> None:
    asked = table(name, scale)
    by_row = {(q.cell.label, q.cell.architecture): q.asked for q in asked.questions() if q.derive is None}
    for question in asked.questions():
        if question.derive is None:
            continue
        assert question.against is not None
        base = asked.rows[str(asked.row_of(question.cell).against)]  # type: ignore[union-attr]
        assert question.against.method == base.method
        if name != "igat_table2":  # whose originals have no row there
            assert question.against == by_row["single", question.cell.architecture]
            assert question.against.members == 1
        else:
            assert dataclasses.replace(question.asked, method=base.method) == question.against


def test_cces_resnets_meet_drawn_radii_in_training_as_published_and_its_cnns_do_not() -> None:
    asked = {(q.cell.architecture, q.asked.train_eps) for q in table("cce_table7", "paper").questions()}
    assert asked == {("resnet20", "uniform(0.01,0.05)"), ("cnn", None)}
    for name in ("cce_table3", "cce_table9"):
        assert {q.asked.train_eps for q in table(name, "paper").questions()} == {"uniform(0.01,0.05)"}
    for name in ("cce_table5", "cce_table10b", "cce_table13a", "cce_table13b"):
        for scale in ("mini", "paper"):
            assert {q.asked.train_eps for q in table(name, scale).questions()} == {"0.01"}


def test_what_a_scale_says_of_a_grid_prevails_over_the_grid() -> None:
    assert load_protocol("soe_phases", "mini").eps == ("0.03",)
    boards = {scale: load_protocol("leaderboard", scale) for scale in SCALES}
    surrogates = [column.call for board in boards.values() for column in board.attacks if "transfer" in column.call]
    assert surrogates == [f"transfer30[architecture={arch}]" for arch in ("small_resnet", "resnet8", "resnet20")]


def test_a_drawn_radius_is_scaled_at_both_ends() -> None:
    assert StandIn("digits", linf=Fraction(4)).radius("uniform(0.01, 0.05)", "linf") == "uniform(0.04,0.2)"
    assert StandIn("digits", linf=Fraction(4)).radius("eps", "linf") == "eps"


def test_a_scale_changes_single_keys_and_adds_deviations() -> None:
    changed = load_scale("smoke", {"samples": 7, "members": {"8": 5}, "deviations": ["Fewer images."]})
    usual = load_scale("smoke", {})
    assert changed.settings["samples"] == 7
    assert changed.members == {**usual.members, "8": 5}
    assert changed.deviations == (*usual.deviations, "Fewer images.")
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


def test_scales_go_from_small_to_large() -> None:
    assert scale_names() == list(SCALES)


# -- bad input --------------------------------------------------------------------------------------------------

MINIMAL = """version = 1
title = "SoE, Table 2"
published = "soe-appendix/table2"

[rows]
soe = { method = "soe" }

[[columns]]
attack = "none"

[scales.smoke]
"""


def file(text: str) -> ProtocolFile:
    import tomllib

    return ProtocolFile("mine", "mine.toml", text, tomllib.loads(text))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("version = 1", "edition = 1", r"mine\.toml, line 1: protocol mine has no key 'edition'; it has: columns"),
        ("version = 1", 'version = "one"', r"mine\.toml, line 1: version is 'one'; expected a whole number"),
        ("soe-appendix/table2", "soe/table2", r"line 3: unknown published table 'soe/table2'; did you mean"),
        ('method = "soe"', 'metod = "soe"', r"line 6: row 'soe' is .*expected a method"),
        ('method = "soe"', 'method = "soe", member = 3', r"line 6: row 'soe' has no key 'member'; it has: against"),
        ('attack = "none"', 'attack = "pgd"', r"line 8: columns has nothing for attack 'none'"),
        (
            'attack = "none"',
            'attack = "none"\nderive = "ratio"',
            r"line 10: a column\[derive\] is 'ratio'",
        ),
        ('attack = "none"', 'call = "pgd"\nmeasure = "x"', r"line 10: a column has both call = 'pgd' and measure"),
        ('attack = "none"', 'derive = "difference"', r"line 5: row 'soe' has against = None, which derive"),
        ("soe = {", "cce = {", r"line 5: rows has nothing for 'soe'"),
        ("[scales.smoke]", "[scales.smoke]\nsamplse = 3", r"line 12: \[scales.smoke\] has no key 'samplse'"),
        ("[scales.smoke]", "[scales.smoke]\nsamples = true", r"line 12: protocol mine: samples"),
        ("[scales.smoke]", '[scales.smoke.datasets.cifar10]\nname = "digits"\nlinf = "x"', r"line 13: linf"),
        ("[scales.smoke]", '[scales.smoke.members]\n8 = "three"', r"line 11: members has 'three' for '8'"),
        (
            "[scales.smoke]",
            '[scales.smoke]\nmethods = ["nat"]',
            r"line 12: \[scales.smoke\] has no key 'methods'",
        ),
        ("[scales.smoke]", "[scales.smoke]\nrows = 3", r"line 12: rows is 3; expected a table"),
        ("[scales.smoke]", "[scales.smoke]\ncolumns = 3", r"line 12: columns is 3; expected a list"),
        ("[scales.smoke]", "[scales.smoke]\nrecipe = 3", r"line 12: .*recipe is 3; expected a table"),
        ('method = "soe"', 'method = "soe", recipe = 3', r"line 6: row 'soe': recipe is 3; expected a table"),
        ('method = "soe"', 'method = "soe", arch = 3', r"line 6: row 'soe': arch is 3; expected a text"),
        (
            'method = "soe"',
            'method = "soe", norm = "l7"',
            r"line 6: row 'soe'\[norm\] is 'l7'; expected one",
        ),
        ('method = "soe"', 'method = "soe", train_eps = "x"', r"line 6: .*'x'"),
        ('attack = "none"', 'attack = "none"\ncall = 3', r"line 10: a column: call is 3; expected a text"),
        ('attack = "none"', 'attack = "none"\nvalue = "x"', r"line 10: a column has value = 'x' and no measure"),
        ('attack = "none"', 'attack = "none"\n[[columns]]\nattack = "fog"', r"line 8: a column answers no cell of soe"),
        ("[rows]", '[rows]\nadp = { method = "adp" }', r"line 6: row 'adp' is none of soe-appendix/table2"),
        ("[rows]", '[combiners]\navg = "mean"\n[rows]', r"line 5: combiners has 'mean'; expected one of native"),
        ("[scales.smoke]", "", r"mine\.toml: protocol mine has no scales"),
    ],
)
def test_a_protocol_with_a_mistake_is_refused_with_file_line_and_key(old: str, new: str, told: str) -> None:
    assert old in MINIMAL
    with pytest.raises(UsageError, match=told):
        paper_table_of(file(MINIMAL.replace(old, new)))


def test_a_scale_that_a_protocol_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(UsageError, match="protocol mine has no scale 'mini'; it has: smoke"):
        paper_table_of(file(MINIMAL), "mini")
    result = CliRunner().invoke(cli, ["run", "digits_all", "--scale", "smoke"])
    assert result.exit_code == 2
    assert "protocol digits_all has no scale 'smoke'; it has one size only" in result.output


def test_a_radius_of_a_grid_that_is_no_fraction_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('version = 1\nmethods = ["nat"]\nattacks = ["pgd"]\neps = ["eight"]\n', encoding="utf-8")
    result = CliRunner().invoke(cli, ["run", str(path), "--results", str(tmp_path / "results")])
    assert result.exit_code == 2
    assert f"{path}, line 4: protocol mine: eps" in result.output
    assert not (tmp_path / "results").exists()


# -- protocols of measurements and of figures -------------------------------------------------------------------


def test_a_protocol_of_measurements_keeps_their_table_and_rebuilds_it_from_files(tmp_path: Path) -> None:
    results = tmp_path / "results"
    ran = CliRunner().invoke(cli, ["run", "igat_toy", "--results", str(results), "--device", "cpu"])
    assert ran.exit_code == 0, ran.output
    written = {file.name: file.read_text() for file in (results / "tables").iterdir()}
    assert set(written) == {f"igat_toy-smoke.{suffix}" for suffix in ("csv", "md", "tex")}
    again = CliRunner().invoke(cli, ["table", "igat_toy", "--results", str(results)])
    assert again.exit_code == 0, again.output
    assert {file.name: file.read_text() for file in (results / "tables").iterdir()} == written
    (stored,) = (results / "measurements").rglob("*.json")
    stored.write_text(stored.read_text().replace("0.5", "0.25", 1))
    refused = CliRunner().invoke(cli, ["table", "igat_toy", "--results", str(results)])
    assert refused.exit_code == 2
    assert "edited since it was measured" in refused.output


def test_a_protocol_has_attacks_or_measures(tmp_path: Path) -> None:
    path = tmp_path / "both.toml"
    path.write_text('methods = ["nat"]\nattacks = ["pgd"]\nmeasures = ["training_cost"]\n', encoding="utf-8")
    with pytest.raises(UsageError, match=r"both\.toml, line 3: protocol both has both attacks and measures"):
        load_protocol(str(path))


def test_a_grid_at_a_scale_is_on_the_scales_data_networks_and_radii() -> None:
    smoke, paper = load_protocol("soe_phases", "smoke"), load_protocol("soe_phases", "paper")
    assert (smoke.dataset, smoke.arch, smoke.scale) == ("digits", "small_resnet", "smoke")
    assert (paper.dataset, paper.arch, paper.scale) == ("cifar10", "resnet20", "paper")
    assert smoke.eps is not None
    assert smoke.eps[:3] == ("1/15", "2/15", "0.2")
    assert paper.eps == ("0.01", "0.02", "0.03", "0.04", "0.05", "0.06", "0.07")
    assert smoke.id == "soe_phases-v1-smoke"
    assert smoke.table == "soe_phases-smoke"
    assert load_protocol("soe_members", "smoke").train_eps == "0.2"


@pytest.mark.parametrize("scale", SCALES)
def test_the_leaderboards_large_network_costs_what_three_members_cost(scale: str) -> None:
    board = load_protocol("leaderboard", scale)
    (large,) = [row for row in board.rows if row.arch is not None]
    shape = (1, 8, 8) if scale == "smoke" else (3, 32, 32)

    def cost(architecture: str) -> int:
        defense = ensdef.create_defense("nat", architecture=architecture, members=1, num_classes=10, image_shape=shape)
        return multiplications(defense.members[0], shape)

    assert cost(str(large.arch)) / (3 * cost(str(board.arch))) == pytest.approx(1.0, abs=0.1)
