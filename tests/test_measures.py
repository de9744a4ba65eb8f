"""The built-in measurements where their numbers are known; the formulas themselves have tests of their own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from toys_defense import generator
from toys_diagnostics import Written, images_of

from ensdef.combine import COMBINERS
from ensdef.diagnostics import detection_auc, detection_stderr, xor_experiment
from ensdef.diagnostics.crafting import view_of
from ensdef.errors import UsageError
from ensdef.losses import cross_entropy
from ensdef.measure import Measured, Subject
from ensdef.measures.allocation import BINS
from ensdef.metrics import binomial_stderr
from ensdef.notation import fill
from ensdef.recombined import recombined
from ensdef.registry import MEASUREMENTS

#: Members 1 and 2 on six images of class 0, three classes.
FIRST, SECOND = [0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 2]


def subject_of(predictions: Any, *, eps: str = "0", height: float = 1.0, **changes: Any) -> Subject:
    """Images that the members answer as written; at radius 0 an attack leaves them as they are."""
    x = images_of(predictions, 3, height)
    given = {"norm": "linf", "seed": 0, "ids": torch.arange(len(x)), "y": torch.zeros(len(x), dtype=torch.int64)}
    return Subject(Written(len(predictions), 3).eval(), x, **{**given, **changes}, eps=eps)


def measured(name: str, subject: Subject, **params: Any) -> Measured:
    measure = MEASUREMENTS.get(name)
    found: Measured = measure(fill(measure.Params, params, name)).measure(subject)
    return found


# --- members --------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["none", "pgd"])
def test_members_are_counted_one_by_one_beside_the_ensemble(attack: str) -> None:
    found = measured("member_accuracy", subject_of([FIRST, SECOND]), attack=attack, steps=1)
    # the average of two sure members is right where both are, and on the two ties that argmax gives to class 0
    assert found.values == {"ensemble": 4 / 6, "member1": 3 / 6, "member2": 3 / 6}
    assert found.stderr["member1"] == binomial_stderr(0.5, 6)


def test_an_attack_moves_the_images_that_members_are_asked_about() -> None:
    # a radius of 0.6 turns logits (1, 0, 0) around
    found = measured("member_accuracy", subject_of([[0], [0]], eps="0.6"), attack="bim", steps=4)
    assert set(found.values.values()) == {0.0}


def test_transferability_has_the_names_of_the_table() -> None:
    found = measured("transferability", subject_of([FIRST, SECOND]), steps=1)
    shares = {"a_1_1": 3, "a_2_2": 3, "a_1_2": 3, "a_2_1": 3, "a_en_en": 4, "s11": 2, "s10": 1, "s01": 1, "s00": 2}
    for name, count in shares.items():
        assert found.values[name] == pytest.approx(count / 6), name
        assert found.stderr[name] == pytest.approx(binomial_stderr(count / 6, 6)), name
    # nothing is perturbed, so nothing is lost between members
    assert found.values["T"] == pytest.approx(0.0)
    assert found.values["nT"] == pytest.approx(1 - 4 / 6 - 2 / 6)
    assert found.values["a_single"] == pytest.approx(4 / 6 - 2 / 6)


def test_s10_is_the_first_member_right_alone() -> None:
    found = measured("transferability", subject_of([[0, 0, 0, 1], [0, 1, 1, 1]]), steps=1)
    assert [found.values[name] for name in ("s11", "s10", "s01", "s00")] == [0.25, 0.5, 0.0, 0.25]


def test_transferability_of_three_members_is_the_mean_over_pairs() -> None:
    found = measured("transferability", subject_of([[0, 0], [0, 1], [1, 1]]), steps=1)
    assert found.values["s11"] == pytest.approx((1 + 0 + 0) / 3 / 2)
    assert found.values["s10"] == pytest.approx(found.values["s01"])
    assert "s11" not in found.stderr


def test_the_combiner_decides_what_the_ensemble_answers() -> None:
    predictions = [[1], [1], [0]]
    subject = subject_of(predictions)
    # two members a little sure of class 1, one very sure of class 0
    x = torch.tensor([[[0.0, 0.4, 0.0], [0.0, 0.4, 0.0], [1.0, 0.0, 0.0]]])
    answers = {}
    for rule in ("native", "max", "vote"):
        defense = recombined(subject.defense, rule)
        answers[rule] = measured("member_accuracy", Subject(defense, x, subject.y, subject.ids, "linf", "0", 0)).values[
            "ensemble"
        ]
    assert answers == {"native": 1.0, "max": 1.0, "vote": 0.0}


def test_attacks_follow_the_rule_that_replaces_the_answer() -> None:
    subject = subject_of([FIRST, SECOND])
    for rule in ("avg", "max", "vote"):
        defense = recombined(subject.defense, rule)
        expected = COMBINERS[rule](subject.defense.member_logits(subject.x))
        assert torch.equal(view_of(defense, "predict")(subject.x), expected)
        assert torch.equal(view_of(defense, "member1")(subject.x), view_of(subject.defense, "member1")(subject.x))


def test_a_recombined_defence_is_not_for_training() -> None:
    with pytest.raises(UsageError, match="train the one inside it"):
        recombined(subject_of([[0]]).defense, "max").loss(None, 0.0)  # type: ignore[arg-type]


# --- allocation, detection, curvature -------------------------------------------------------------


def test_allocation_has_a_share_for_every_interval_of_the_table() -> None:
    assert BINS == ("<0.5", "0.5-0.6", "0.6-0.7", "0.7-0.8", "0.8-0.9", "0.9-1.0")
    found = measured("allocation", subject_of([FIRST, SECOND]), steps=1)
    sure = math.e / (math.e + 2)  # 0.576, of a logit of 1 beside two of 0
    assert found.values["member_accuracy"] == 0.5
    assert [found.values[name] for name in BINS] == [0, 1, 0, 0, 0, 0]
    assert found.values["largest_wrong"] == pytest.approx((sure + (1 - sure) / 2) / 2)
    assert found.values["recoverable"] == 1.0
    assert found.values["best_true"] == pytest.approx((1 - sure) / 2)


def test_what_allocation_cannot_average_over_is_undefined() -> None:
    found = measured("allocation", subject_of([[0], [0]]), steps=1)
    assert math.isnan(found.values["best_true"])
    assert math.isnan(found.values["recoverable"])


def test_unmoved_images_cannot_be_detected() -> None:
    found = measured("detection", subject_of([FIRST, SECOND]), steps=1)
    assert found.values["auc"] == 0.5
    assert found.stderr["auc"] == pytest.approx(0.0)
    assert found.series["false_positive_rate"] == found.series["true_positive_rate"] == [0.0, 1.0]


def test_images_that_the_attack_makes_members_disagree_on_are_all_detected() -> None:
    # agreeing members; bim at 0.5 levels the logits, so that nothing is sure any longer
    found = measured("detection", subject_of([[0] * 5, [0] * 5], eps="0.5"), attack="bim", steps=4)
    assert found.values["auc"] == 1.0
    assert found.series["false_positive_rate"] == [0.0, 0.0, 1.0]
    assert found.series["true_positive_rate"] == [0.0, 1.0, 1.0]
    assert found.values["attacked_entropy"] > found.values["clean_entropy"]


def test_histograms_of_entropy_share_out_all_images_between_0_and_ln_c() -> None:
    found = measured("detection", subject_of([FIRST, SECOND]), steps=1)
    assert found.series["edges"][0] == 0
    assert found.series["edges"][-1] == pytest.approx(math.log(3))
    for side in ("clean", "attacked"):
        assert len(found.series[side]) == len(found.series["edges"]) - 1
        assert sum(found.series[side]) == pytest.approx(1.0)
        bins = [index for index, share in enumerate(found.series[side]) if share]
        assert found.series["edges"][bins[0]] <= found.values[f"{side}_entropy"] <= found.series["edges"][bins[-1] + 1]


def test_the_standard_error_of_the_area_is_its_spread_over_draws_of_paired_images() -> None:
    areas, errors = [], []
    for seed in range(200):
        rng = generator(seed)
        clean = torch.randn(60, generator=rng)
        attacked = clean + 0.5 + 0.7 * torch.randn(60, generator=rng)
        areas.append(detection_auc(clean, attacked))
        errors.append(detection_stderr(clean, attacked))
    assert sum(errors) / len(errors) == pytest.approx(float(torch.tensor(areas).std()), rel=0.15)


def test_the_standard_error_of_the_area_counts_ties_as_half() -> None:
    clean, attacked = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 0.0])
    pairs = (attacked[None] > clean[:, None]).double() + 0.5 * (attacked[None] == clean[:, None]).double()
    shares = pairs.mean(dim=1) + pairs.mean(dim=0)
    assert detection_stderr(clean, attacked) == pytest.approx(float(shares.std()) / 3**0.5)


def test_curvature_counts_the_images_that_moved() -> None:
    still = measured("curvature", subject_of([FIRST, SECOND]), steps=1)
    assert (still.values["moved"], still.n) == (0.0, 0)
    assert math.isnan(still.values["curvature"])
    moved = measured("curvature", subject_of([FIRST, SECOND], eps="0.3"), steps=1)
    assert (moved.values["moved"], moved.n) == (1.0, 6)
    assert moved.values["curvature"] > 0


# --- cost -----------------------------------------------------------------------------------------


def test_the_cost_of_training_is_what_the_trainer_told() -> None:
    report = {"seconds": 30.0, "history": [{}] * 4, "images_seen": 2000}
    subject = subject_of([[0]], report=report, earlier=[{"seconds": 5.0}, {"seconds": 7.0}])
    subject.defense.extra = torch.nn.Linear(100, 2)
    found = measured("training_cost", subject)
    assert found.values == {
        "seconds": 30.0,
        "seconds_with_prerequisites": 42.0,
        "seconds_per_epoch": 7.5,
        "seconds_per_1000_images": 15.0,
        "epochs": 4,
        "parameters": 202,
        "model_size_mb": pytest.approx(808e-6),
    }


def test_the_cost_of_lost_prerequisites_is_unknown() -> None:
    report = {"seconds": 30.0, "history": [{}], "images_seen": 2000}
    found = measured("training_cost", subject_of([[0]], report=report, earlier=None))
    assert math.isnan(found.values["seconds_with_prerequisites"])
    assert found.values["seconds"] == 30.0


# --- loss surfaces --------------------------------------------------------------------------------


def surface(norm: str = "linf", **params: Any) -> tuple[Subject, Measured]:
    """Around clean images that are far enough from 0 and 1 for nothing to be clipped."""
    x = 0.4 + 0.2 * torch.rand(3, 2, 10, generator=generator())
    y = x.mean(dim=1).argmax(dim=1)
    subject = Subject(Written(2, 10).eval(), x, y, torch.tensor([7, 8, 9]), norm, "0.1", 0)
    return subject, measured("loss_surface", subject, around="clean", images=3, grid=5, **params)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_grid_runs_along_the_steepest_ascent_and_perpendicular_to_it(norm: str) -> None:
    subject, found = surface(norm)
    for index in range(3):
        x, y = subject.x[index : index + 1].clone().requires_grad_(), subject.y[index : index + 1]
        loss = cross_entropy(subject.defense(x), y)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        u = 0.1 * (gradient.sign() if norm == "linf" else gradient / gradient.norm())
        along = [float(cross_entropy(subject.defense(x.detach() + step * u), y)) for step in (-1, -0.5, 0, 0.5, 1)]
        drawn = torch.tensor(found.series["loss"][index])
        assert drawn[0, :, 2].tolist() == pytest.approx(along, abs=1e-5)
        # across, the ensemble's loss is flat to first order: in l2 exactly perpendicular to the gradient
        if norm == "l2":
            slope = float(drawn[0, 2, 3] - drawn[0, 2, 1]) / 2
            assert abs(slope) < 0.05 * abs(along[3] - along[1])


def test_the_direction_across_is_perpendicular_and_as_long() -> None:
    subject, _ = surface()
    measure = MEASUREMENTS.get("loss_surface")()
    u, v = (part.flatten(1) for part in measure._directions(subject, subject.x, subject.y))
    assert (u * v).sum(dim=1).tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    assert v.norm(dim=1).tolist() == pytest.approx(u.norm(dim=1).tolist())


def test_the_ensemble_comes_first_and_then_its_members() -> None:
    subject, found = surface()
    centres = torch.tensor(found.series["loss"])[:, :, 2, 2]
    logits = subject.defense.member_logits(subject.x)
    assert centres[:, 0].tolist() == pytest.approx(cross_entropy(subject.defense(subject.x), subject.y).tolist())
    for member in range(2):
        assert centres[:, 1 + member].tolist() == pytest.approx(cross_entropy(logits[member], subject.y).tolist())


def test_shares_of_right_points_are_those_of_the_map() -> None:
    subject, found = surface()
    classes = torch.tensor(found.series["predicted"])
    for row, name in enumerate(("ensemble", "member1", "member2")):
        hits = classes[:, row] == subject.y.view(-1, 1, 1)
        assert found.values[f"{name}_right"] == pytest.approx(float(hits.double().mean()))
        losses = torch.tensor(found.series["loss"])[:, row]
        assert found.values[f"{name}_loss"] == pytest.approx(float(losses.mean()), rel=1e-6)


def test_surfaces_show_images_that_the_ensemble_gets_right() -> None:
    found = measured("loss_surface", subject_of([[1, 0, 1, 0], [1, 0, 1, 0]], eps="0.1"), grid=3, steps=1)
    assert found.series["ids"] == [1, 3]
    with pytest.raises(UsageError, match="gets none of the 1 images right"):
        measured("loss_surface", subject_of([[1], [1]], eps="0.1"), grid=3, steps=1)


def test_the_picture_is_the_centre_in_256_levels() -> None:
    subject, found = surface()
    assert found.series["centre"] == found.series["clean"] == (subject.x * 255).round().long().tolist()


# --- without a defence ----------------------------------------------------------------------------


def nothing(seed: int = 0) -> Subject:
    none: Any = None
    return Subject(none, torch.empty(0), torch.empty(0), torch.empty(0), "", "", seed)


def test_xor_has_the_numbers_of_the_experiment() -> None:
    found = measured("xor", nothing(1), variance=0.2, count=200, steps=50)
    result = xor_experiment(1, variance=0.2, count=200, steps=50)
    assert {name: found.values[name] for name in vars(result)} == vars(result)
    assert found.n == 200


def test_the_map_of_two_experts_has_four_quadrants_and_that_of_their_average_two_halves() -> None:
    found = measured("xor", nothing(), variance=0.05, count=500, steps=800)
    axis, experts, average = (torch.tensor(found.series[name]) for name in ("axis", "experts", "average"))
    near = [int((axis - corner).abs().argmin()) for corner in (-1.0, 1.0)]
    corners = [int(experts[row, column]) for row in near for column in near]
    assert corners == [1, -1, -1, 1]
    # a line through the plane: opposite corners answer alike or oppositely, never like XOR
    assert [int(average[row, column]) for row in near for column in near] != [1, -1, -1, 1]
    assert set(torch.tensor(found.series["chosen"]).unique().tolist()) == {0, 1}


def test_rows_of_the_map_are_the_second_input() -> None:
    """The gate of two opposite experts follows one input; the map must put it on the right axis."""
    found = measured("xor", nothing(), variance=0.05, count=500, steps=800)
    points = torch.tensor(found.series["points"])
    axis, experts = torch.tensor(found.series["axis"]), torch.tensor(found.series["experts"])
    columns, rows = ((points[:, part, None] - axis).abs().argmin(dim=1) for part in (0, 1))
    agree = experts[rows, columns] == torch.tensor(found.series["labels"])
    assert float(agree.double().mean()) > 0.95


def test_the_two_point_example_has_its_risks_and_bounds() -> None:
    found = measured("igat_toy", nothing())
    assert {name: found.values[name] for name in ("single", "max", "avg")} == {"single": 0.5, "max": 0.0, "avg": 0.0}
    assert found.series["bound_single"][-1] == 0.5
    assert found.series["bound_pair"][-1] == 0.25
    above = [
        p
        for p, single, pair in zip(
            found.series["probability"], found.series["bound_single"], found.series["bound_pair"], strict=True
        )
        if pair < single
    ]
    assert min(above) == pytest.approx(found.values["crossing"], abs=0.01)
