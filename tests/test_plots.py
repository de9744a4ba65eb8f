"""Figures: the lines drawn are the numbers on file, files are what they claim, and bad input is told what to run."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from matplotlib.figure import Figure
from matplotlib.text import Text

from ensdef.cli import cli, plot  # noqa: F401 - adds its command
from ensdef.errors import UsageError
from ensdef.jobs import Run
from ensdef.manifests import Manifests
from ensdef.measurement import Measurement, Measurements
from ensdef.measuring import MeasureSpec, measure_all
from ensdef.metrics import binomial_stderr
from ensdef.plots import KINDS, Choice, draw, save
from ensdef.plots.examples import attacked_again
from ensdef.plots.robustness import Line, lines
from ensdef.plots.style import new_figure, styled
from ensdef.records import Record, Store, with_outcomes


def record(
    method: str = "soe", eps: str = "0.1", right: int = 50, clean: int = 80, seed: int = 0, **changes: Any
) -> Record:
    """A record of 100 images, ``right`` of them robust."""
    training = {"key": f"{method}{seed}", "eps": "0.2", "precision": "fp32", "recipe": {"epochs": 10}, "limit": None}
    given = {
        "key": "0" * 64,
        "hyper": {},
        "label": method,
        "dataset": "digits",
        "architecture": "small_resnet",
        "members": 3,
        "attack": "pgd",
        "attack_params": {},
        "attack_label": "pgd",
        "success": "any",
        "norm": "linf",
        "eps_value": None,
        "combiner": "native",
        "provenance": {"protocol": None, "search": "fp32", "attack_seed": 0},
        **changes,
        "training": {**training, **changes.get("training", {})},
    }
    blank = Record(method=method, eps=eps, train_seed=seed, n=100, **given)
    return with_outcomes(blank, list(range(100)), [1] * clean + [0] * (100 - clean), [1] * right + [0] * (100 - right))


def filled(folder: Path, *records: Record) -> Path:
    """A results folder with these records."""
    for index, one in enumerate(records):
        Store(folder).write(dataclasses.replace(one, key=f"{index:064d}"[::-1]))
    return folder


def measurement(name: str, folder: Path, **changes: Any) -> Measurement:
    """A stored measurement, its series as given."""
    given: dict[str, Any] = {
        "key": f"{len(list(folder.rglob('*.json'))):064d}"[::-1],
        "params": {"attack": "pgd", "steps": 20, "step_size": "eps/4", "view": "predict"},
        "call": name,
        "method": "cce",
        "hyper": {},
        "label": "cce[mode=dm]",
        "dataset": "digits",
        "architecture": "small_resnet",
        "members": 2,
        "train_seed": 0,
        "training": {"key": "1" * 64, "recipe": {"epochs": 10}},
        "norm": "linf",
        "eps": "0.2",
        "eps_value": 0.2,
        "combiner": "native",
        "seed": 0,
        "n": 500,
    }
    return Measurements(folder).write(Measurement(name=name, **{**given, **changes}))


def detected(folder: Path, auc: float = 0.75, **changes: Any) -> Measurement:
    series = {
        "false_positive_rate": [0.0, 0.0, 1.0],
        "true_positive_rate": [0.0, 0.5, 1.0],
        "edges": [0.0, 1.0, 2.0],
        "clean": [0.9, 0.1],
        "attacked": [0.25, 0.75],
    }
    return measurement("detection", folder, values={"auc": auc}, stderr={"auc": 0.012}, series=series, **changes)


def texts(figure: Figure) -> str:
    """Everything that is written in a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(match=Text))


def ens(*words: object) -> Result:
    return CliRunner().invoke(cli, ["plot", *map(str, words)], prog_name="ensdef")


def the_line(found: list[Line], label: str) -> Line:
    (line,) = [line for line in found if line.label == label]
    return line


# --- robustness curves ----------------------------------------------------------------------------


def test_a_line_goes_through_the_accuracies_on_file_from_the_clean_one_on(tmp_path: Path) -> None:
    filled(tmp_path, record(eps="0.2", right=20), record(eps="0.1", right=50), record("adv_en", right=60))
    axis = draw("robustness", tmp_path).axes[0]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
    assert drawn["soe"] == [[0.0, 80.0], [0.1, 50.0], [0.2, 20.0]]
    assert drawn["adv_en"] == [[0.0, 80.0], [0.1, 60.0]]


def test_the_band_is_one_standard_error_to_each_side(tmp_path: Path) -> None:
    filled(tmp_path, record(right=50))
    (band,) = draw("robustness", tmp_path).axes[0].collections
    heights = band.get_paths()[0].vertices
    at = {round(float(y), 6) for x, y in heights if math.isclose(x, 0.1)}
    assert at == {round(100 * (0.5 + sign * binomial_stderr(0.5, 100)), 6) for sign in (-1, 1)}


def test_training_seeds_are_averaged_and_their_spread_widens_the_band() -> None:
    (line,) = lines([record(right=40), record(right=60, seed=1)])
    point = line.points[-1]
    assert (point.accuracy, point.seeds) == (0.5, 2)
    assert point.stderr == pytest.approx(math.hypot(binomial_stderr(0.5, 100), 0.1))


def test_lines_are_named_by_the_method_and_whatever_else_differs() -> None:
    found = lines([record(), record(attack_label="mim"), record(attack_label="mim", members=5)])
    assert [line.label for line in found] == ["soe, pgd, 3 members", "soe, mim, 3 members", "soe, mim, 5 members"]
    assert [line.label for line in lines([record(), record("adv", members=1)])] == ["soe", "adv"]


def test_a_method_looks_the_same_in_every_panel_and_stands_once_in_the_legend(tmp_path: Path) -> None:
    filled(tmp_path, record(), record("adp"), record("adp", norm="l2", eps="1"), record(norm="l2", eps="1"))
    figure = draw("robustness", tmp_path)
    looks = [
        {line.get_label(): (line.get_color(), line.get_marker(), line.get_linestyle()) for line in axis.get_lines()}
        for axis in figure.axes
    ]
    assert looks[0] == looks[1]
    (legend,) = figure.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == ["adp", "soe"]


def test_a_defence_trained_at_each_radius_is_one_line_without_a_clean_accuracy() -> None:
    at = [record(eps=eps, training={"eps": eps, "key": eps}) for eps in ("0.1", "0.2")]
    (line,) = lines(at)
    assert line.label == "soe, trained at each radius"
    assert [point.eps for point in line.points] == [0.1, 0.2]


def test_a_defence_trained_at_two_radii_is_two_lines() -> None:
    both = [
        record(eps=eps, training={"eps": trained, "key": trained})
        for eps in ("0.1", "0.2")
        for trained in ("0.1", "1/5")
    ]
    found = lines(both)
    assert {line.label for line in found} == {"soe, trained at 0.1", "soe, trained at 1/5"}
    assert all(len(line.points) == 3 for line in found)


def test_records_of_two_versions_of_a_protocol_are_not_merged() -> None:
    of = [record(eps=eps, provenance={"protocol": f"t-v{version}"}) for eps, version in (("0.1", 1), ("0.2", 2))]
    assert {line.label for line in lines(of)} == {"soe, t-v1", "soe, t-v2"}
    other = [record(eps=eps, provenance={"protocol": name}) for eps, name in (("0.1", "t-v1"), ("0.2", None))]
    assert len(lines(other)) == 1, "a bench and a protocol ask for the same cells"


def test_two_records_of_one_point_are_refused_by_name(tmp_path: Path) -> None:
    filled(tmp_path, record(right=50), record(right=51, training={"key": "another"}))
    with pytest.raises(UsageError, match="choose the records of one table with --table, or delete one"):
        draw("robustness", tmp_path)


def test_norms_and_data_sets_have_panels_of_their_own(tmp_path: Path) -> None:
    filled(tmp_path, record(), record(norm="l2", eps="1"), record(dataset="mnist"))
    figure = draw("robustness", tmp_path)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["digits, linf", "digits, l2", "mnist, linf"]
    assert "l2" in figure.axes[1].get_xlabel()


def test_attacks_without_a_radius_and_failed_cells_are_left_out(tmp_path: Path) -> None:
    failed = dataclasses.replace(record("adp"), error="the loss is NaN")
    filled(tmp_path, record(), record(attack="fog", attack_label="fog", eps=None, norm=None), failed)  # type: ignore[arg-type]
    (line,) = draw("robustness", tmp_path).axes[0].get_lines()
    assert line.get_label() == "soe"


def test_the_caption_tells_data_attack_and_number_of_images(tmp_path: Path) -> None:
    filled(tmp_path, record(), record(seed=1))
    told = texts(draw("robustness", tmp_path))
    for part in ("digits", "pgd", "n = 100 test images", "2 training seeds", "standard error"):
        assert part in told


def test_radii_stand_at_the_axis_as_they_were_written(tmp_path: Path) -> None:
    filled(tmp_path, record(eps="8/255"), record(eps="16/255", right=20))
    axis = draw("robustness", tmp_path).axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "8/255", "16/255"]


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        (Choice(method=("adp",)), {"adp"}),
        (Choice(method=("adp", "soe[sigma=1]")), {"adp", "soe[sigma=1]"}),
        (Choice(method=("soe",)), {"soe", "soe[sigma=1]"}),
        (Choice(eps=("1/5",)), {"adp"}),
        (Choice(seed=(1,)), {"soe[sigma=1]"}),
    ],
)
def test_filters_choose_lines(tmp_path: Path, choice: Choice, kept: set[str]) -> None:
    filled(tmp_path, record(), record("adp", eps="0.2"), record(label="soe[sigma=1]", seed=1))
    labels = {str(line.get_label()) for line in draw("robustness", tmp_path, choice).axes[0].get_lines()}
    assert {label.partition(", ")[0] for label in labels} == kept


def test_the_records_of_one_table_are_chosen_by_its_name(tmp_path: Path) -> None:
    filled(tmp_path, record(), record("adp"))
    first = next(Store(tmp_path).all())
    Manifests(tmp_path).write("mine", "Mine", [first], extend=False)
    (line,) = draw("robustness", tmp_path, Choice(table="mine")).axes[0].get_lines()
    assert line.get_label() == first.label
    with pytest.raises(UsageError, match="did you mean 'mine'"):
        draw("robustness", tmp_path, Choice(table="mien"))


# --- detection ------------------------------------------------------------------------------------


def test_a_curve_is_the_stored_one_with_its_area_beside_it(tmp_path: Path) -> None:
    detected(tmp_path)
    axis = draw("roc", tmp_path).axes[0]
    curve = next(line for line in axis.get_lines() if "cce" in str(line.get_label()))
    assert curve.get_xydata().tolist() == [[0, 0], [0, 0.5], [1, 1]]
    assert curve.get_label() == "cce[mode=dm]: 0.750 ± 0.012"


def test_curves_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    detected(tmp_path)
    detected(tmp_path, eps="0.1")
    labels = {str(line.get_label()) for line in draw("roc", tmp_path).axes[0].get_lines()}
    assert {"cce[mode=dm], linf 0.1: 0.750 ± 0.012", "cce[mode=dm], linf 0.2: 0.750 ± 0.012"} <= labels


def test_entropies_have_a_panel_for_each_measurement(tmp_path: Path) -> None:
    detected(tmp_path)
    detected(tmp_path, eps="0.1")
    figure = draw("entropy", tmp_path)
    assert len([axis for axis in figure.axes if axis.get_visible()]) == 2
    heights = [patch.get_data().values.tolist() for patch in figure.axes[0].patches]
    assert [90.0, 10.0] in heights
    assert [25.0, 75.0] in heights
    assert "n = 500" in texts(figure)


# --- surfaces and XOR -----------------------------------------------------------------------------


def surface(folder: Path, **changes: Any) -> Measurement:
    rows = np.arange(9.0).reshape(3, 3)
    series = {
        "offsets": [-1.0, 0.0, 1.0],
        "loss": [[(rows + network).tolist() for network in range(3)] for _ in range(2)],
        "predicted": [[[[4, 4, 7], [4, 4, 7], [4, 4, 2]]] * 3] * 2,
        "ids": [11, 12],
        "labels": [4, 4],
        "clean": [[[[0, 255], [128, 0]]]] * 2,
        "centre": [[[[10, 245], [138, 0]]]] * 2,
    }
    params = {"attack": "pgd", "steps": 20, "step_size": "eps/4", "view": "predict", "around": "adversarial"}
    return measurement("loss_surface", folder, **{"series": series, "params": params, "n": 2, **changes})


@pytest.mark.parametrize("style", ["contour", "3d"])
def test_a_surface_has_a_row_for_the_ensemble_and_one_for_each_member(tmp_path: Path, style: Any) -> None:
    surface(tmp_path)
    figure = draw("surface", tmp_path, Choice(style=style))
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    for network in ("ensemble", "member 1", "member 2"):
        assert {f"{network}: loss", f"{network}: class"} <= set(titles)
    assert {"adversarial image", "clean"} <= set(titles)
    told = texts(figure)
    assert "4 (true)" in told
    assert "test image 11 of class 4" in told


def test_classes_of_a_surface_are_those_on_file(tmp_path: Path) -> None:
    surface(tmp_path)
    figure = draw("surface", tmp_path)
    axis = next(axis for axis in figure.axes if axis.get_title(loc="left") == "ensemble: class")
    # the true class first, then the others in order: 4, 2, 7
    assert axis.collections[0].get_array().reshape(3, 3).tolist() == [[0, 0, 2], [0, 0, 2], [0, 0, 1]]


def test_all_losses_of_a_surface_share_one_scale(tmp_path: Path) -> None:
    surface(tmp_path)
    figure = draw("surface", tmp_path)
    drawn = [axis.collections[0] for axis in figure.axes if axis.get_title(loc="left").endswith(": loss")]
    assert {contours.get_clim() for contours in drawn} == {drawn[0].get_clim()}
    assert drawn[0].levels[0] <= 0 < 10 <= drawn[0].levels[-1]


def test_a_class_has_one_colour_in_all_panels(tmp_path: Path) -> None:
    rows = [[[4, 4, 4]] * 3, [[4, 7, 2]] * 3, [[4, 4, 7]] * 3]
    series = {**surface(tmp_path).series, "predicted": [rows, rows]}
    surface(tmp_path / "other", series=series)
    figure = draw("surface", tmp_path / "other")
    panels = [axis.collections[0] for axis in figure.axes if axis.get_title(loc="left").endswith(": class")]
    colours = [mesh.to_rgba(mesh.get_array()).reshape(3, 3, 4)[0].tolist() for mesh in panels]
    assert colours[1][1] == colours[2][2], "class 7"
    assert colours[0][0] == colours[1][0] == colours[2][0], "the true class"
    assert len({tuple(colour) for colour in colours[1]}) == 3


def test_one_surface_is_drawn_at_a_time(tmp_path: Path) -> None:
    surface(tmp_path)
    surface(tmp_path, eps="0.1")
    with pytest.raises(UsageError, match=r"there are 2 loss surfaces.*linf 0.2.*linf 0.1|linf 0.1.*linf 0.2"):
        draw("surface", tmp_path)
    with pytest.raises(UsageError, match="has 2 images, from 0"):
        draw("surface", tmp_path, Choice(eps=("0.1",), image=2))


def test_xor_shows_both_answers_with_their_accuracies(tmp_path: Path) -> None:
    specs = [MeasureSpec.create("xor", {"variance": variance, "count": 200, "steps": 200}) for variance in (0.2, 0.1)]
    _, found = measure_all(specs, Run(tmp_path))
    figure = draw("xor", tmp_path)
    assert len(figure.axes) == 4
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles[0] == f"two experts: {100 * float(found.values['accuracy'] or 0):.1f} % right", "variances in order"
    shown = figure.axes[0].collections[0].get_array().reshape(51, 51)
    assert shown.tolist() == found.series["experts"]
    assert "n = 200" in texts(figure)


# --- adversarial examples -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    """A results folder with one trained ensemble under one attack; not to be written to."""
    from ensdef.attack_spec import AttackSpec
    from ensdef.loading import attacked_subset, find_data
    from ensdef.runner import run_cells
    from ensdef.specs import Cell, Setting, TrainSpec

    results = tmp_path_factory.mktemp("benched")
    data, spec = find_data("digits", limit=300)
    recipe = {"epochs": 6, "batch_size": 32, "lr": 0.1, "optimizer": "sgd"}
    training = TrainSpec.create("nat", {}, Setting(spec, "small_resnet[width=4]", 2, "linf", "0.2", recipe=recipe))
    test, _ = attacked_subset(data, 30)
    attack = AttackSpec.create("pgd", {"steps": 3}, "linf", "0.15")
    (made,) = run_cells([Cell(training, attack, len(test), test.checksum())], Run(results))
    assert 0 < float(made.robust_accuracy or 0) < float(made.clean_accuracy or 0), "something to see"
    return results, made


def test_the_attack_run_again_ends_as_in_the_record(benched: tuple[Path, Record]) -> None:
    results, made = benched
    shown = attacked_again(made, results, range(3, 15))
    assert shown.unlike == 0
    assert shown.ids == made.outcomes["ids"][3:15]
    robust = [
        int(after == label == before)
        for before, after, label in zip(shown.before, shown.after, shown.labels, strict=True)
    ]
    assert robust == made.outcomes["robust"][3:15]
    assert 0 < float(np.abs(shown.attacked - shown.clean).max()) <= 0.15 + 1e-6


def test_examples_show_clean_attacked_and_difference_of_each_image(benched: tuple[Path, Record]) -> None:
    results, made = benched
    figure = draw("examples", results, Choice(record=Path(str(made.path)), images=4, which="all"))
    assert len(figure.axes) == 12
    shown = attacked_again(made, results, range(4))
    clean, attacked, difference = (axis.images[0].get_array() for axis in figure.axes[:3])
    assert np.array_equal(clean, shown.clean[0, 0])
    assert np.array_equal(attacked, shown.attacked[0, 0])
    # grey where nothing changed
    unchanged = shown.clean[0, 0] == shown.attacked[0, 0]
    assert np.allclose(difference[unchanged], 0.5)
    assert "n = 4 of 30 test images" in texts(figure).replace("\n", " ")


def test_fooled_images_are_shown_unless_others_are_asked_for(benched: tuple[Path, Record]) -> None:
    results, _ = benched
    for which, answers in (("fooled", {"(is"}), ("robust", {"(right)"})):
        figure = draw("examples", results, Choice(images=3, which=which))  # type: ignore[arg-type]
        assert {axis.get_xlabel().split()[2] for axis in figure.axes[1::3]} == answers
        assert {axis.get_xlabel().split()[2] for axis in figure.axes[::3]} == {"(right)"}


def test_a_moved_results_folder_still_shows_its_examples(benched: tuple[Path, Record], tmp_path: Path) -> None:
    results, made = benched
    (tmp_path / "moved").symlink_to(results)
    elsewhere = dataclasses.replace(made, checkpoint=f"gone/{Path(str(made.checkpoint)).name}")
    assert attacked_again(elsewhere, tmp_path, [0]).unlike == 0, "it lies beside the record"
    alone = dataclasses.replace(elsewhere, path=str(tmp_path / "records" / "digits" / "nat" / "alone.json"))
    assert attacked_again(alone, tmp_path / "moved", [0]).unlike == 0
    with pytest.raises(UsageError, match=r"is not in .*checkpoints; run what made the record again"):
        attacked_again(alone, tmp_path, [0])


def test_a_record_cannot_name_a_checkpoint_anywhere_else(benched: tuple[Path, Record], tmp_path: Path) -> None:
    results, made = benched
    checkpoint = results / "checkpoints" / Path(str(made.checkpoint)).name
    alone = dataclasses.replace(made, checkpoint=str(checkpoint.resolve()), path=str(tmp_path / "alone.json"))
    with pytest.raises(UsageError, match="is not in "):
        attacked_again(alone, tmp_path, [0])


def test_a_label_with_dollar_signs_is_no_formula(tmp_path: Path) -> None:
    with styled():
        figure = new_figure()
        figure.text(0.5, 0.5, "$x^$ \\frac{ $")
        save(figure, tmp_path / "label.svg")
    assert "$x^$" in (tmp_path / "label.svg").read_text()


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        (Choice(image=30), "images that are fooled, from 0; choose others with --which"),
        (Choice(record=Path("no/such.json")), "--record no/such.json"),
        (Choice(record=Path(__file__).parent), "--record"),
        (Choice(method=("adp",)), "none of the 1 records fit --method adp"),
    ],
)
def test_examples_that_cannot_be_shown_are_refused(benched: tuple[Path, Record], choice: Choice, told: str) -> None:
    with pytest.raises(UsageError) as refusal:
        draw("examples", benched[0], choice)
    assert told in str(refusal.value)


# --- files and the command ------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG\r\n\x1a\n"), (".svg", b"<?xml"), (".SVG", b"<?xml")])
def test_the_suffix_decides_the_format(tmp_path: Path, suffix: str, begins: bytes) -> None:
    filled(tmp_path, record())
    path = tmp_path / "new" / f"figure{suffix}"
    save(draw("robustness", tmp_path), path)
    content = path.read_bytes()
    assert content.startswith(begins)
    assert len(content) > 2000


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_numbers_give_the_same_file(tmp_path: Path, suffix: str) -> None:
    filled(tmp_path, record(), record("adp"))
    detected(tmp_path)
    for kind in ("robustness", "entropy"):
        paths = [tmp_path / f"{name}{suffix}" for name in ("one", "two")]
        for path in paths:
            save(draw(kind, tmp_path), path)
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_vector_figure_keeps_its_text_as_text(tmp_path: Path) -> None:
    filled(tmp_path, record())
    save(draw("robustness", tmp_path), tmp_path / "figure.svg")
    assert "accuracy in percent" in (tmp_path / "figure.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["figure.pdf", "figure", "figure.svg.txt"])
def test_other_formats_are_refused_before_anything_is_drawn(tmp_path: Path, name: str) -> None:
    result = ens("robustness", "--results", tmp_path, "--out", tmp_path / name)
    assert result.exit_code == 2
    assert "ends in .png or .svg" in result.stderr


@pytest.mark.parametrize(("option", "value"), [("--seed", "1.5"), ("--seed", "x"), ("--eps", "x"), ("--eps", "")])
def test_a_filter_that_is_no_number_is_refused_by_name(tmp_path: Path, option: str, value: str) -> None:
    filled(tmp_path, record())
    result = ens("robustness", "--results", tmp_path, option, value)
    assert result.exit_code == 2
    assert (option if value else "empty item") in result.stderr


def test_a_figure_lands_in_the_results_folder_unless_told_otherwise(tmp_path: Path) -> None:
    filled(tmp_path, record())
    assert ens("robustness", "--results", tmp_path).stdout.strip() == str(tmp_path / "figures" / "robustness.svg")
    assert (tmp_path / "figures" / "robustness.svg").is_file()
    out = tmp_path / "mine.png"
    assert ens("robustness", "--results", tmp_path, "--method", "soe", "--out", out).exit_code == 0
    assert out.is_file()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_empty_folder_is_told_what_to_run(tmp_path: Path, kind: str) -> None:
    result = ens(kind, "--results", tmp_path)
    assert result.exit_code == 2
    assert KINDS[kind].command in result.stderr


def test_filters_that_keep_nothing_are_told_what_there_is(tmp_path: Path) -> None:
    filled(tmp_path, record(), record("adp", eps="0.2"))
    result = ens("robustness", "--results", tmp_path, "--method", "trs", "--eps", "0.1,0.2")
    assert "none of the 2 records fit --method trs --eps 0.1,0.2" in result.stderr
    assert "methods adp, soe" in result.stderr
    assert "linf 0.1, linf 0.2" in result.stderr


def test_one_measurement_by_two_versions_of_the_code_is_not_drawn_twice(tmp_path: Path) -> None:
    detected(tmp_path)
    detected(tmp_path, auc=0.76)
    with pytest.raises(UsageError, match="the same measurement by different code; delete the older one"):
        draw("roc", tmp_path)


def test_an_unknown_kind_is_told_the_nearest() -> None:
    result = ens("robust")
    assert result.exit_code == 2
    assert "did you mean 'robustness'" in result.stderr


def test_without_a_kind_the_kinds_are_named() -> None:
    result = ens()
    assert result.exit_code == 2
    assert all(kind in result.stderr for kind in KINDS)


def test_the_list_tells_what_each_shows_and_what_to_run() -> None:
    out = ens("--list").stdout
    for kind, one in KINDS.items():
        assert kind in out
        assert one.summary in out
        assert one.command in out


def test_an_edited_measurement_is_refused(tmp_path: Path) -> None:
    path = Path(str(detected(tmp_path).path))
    path.write_text(path.read_text(encoding="utf-8").replace("0.75", "0.99"), encoding="utf-8")
    result = ens("roc", "--results", tmp_path)
    assert result.exit_code == 2
    assert "edited since it was measured" in result.stderr


def test_figures_are_drawn_without_torch(tmp_path: Path) -> None:
    filled(tmp_path, record())
    detected(tmp_path)
    surface(tmp_path)
    script = f"""
import sys
from ensdef.cli import cli, plot
for kind in ("robustness", "roc", "entropy", "surface"):
    cli(["plot", kind, "--results", {str(tmp_path)!r}], standalone_mode=False)
assert "torch" not in sys.modules, "torch was imported"
assert "matplotlib.pyplot" not in sys.modules, "pyplot wants a display"
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
