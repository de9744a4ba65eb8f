"""Schedules, budgets and training radii."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensdef.errors import UsageError
from ensdef.notation import fill
from ensdef.recipe import ADAM_200, SGD_200, InnerAttack, Recipe, parse_train_eps

quick = settings(deadline=None, max_examples=60, derandomize=True)
PROGRESS = st.floats(0, 1, exclude_max=True)


# --- learning rates -------------------------------------------------------------------------------


def lr_of_epochs(recipe: Recipe) -> list[float]:
    return [recipe.lr_at(epoch / recipe.epochs) for epoch in range(recipe.epochs)]


def test_the_long_sgd_recipe_drops_tenfold_at_epochs_100_and_150() -> None:
    assert lr_of_epochs(SGD_200) == pytest.approx([0.1] * 100 + [0.01] * 50 + [0.001] * 50)


@pytest.mark.parametrize("epochs", [4, 8, 20, 30, 100])
def test_milestones_keep_their_place_when_the_run_is_shortened(epochs: int) -> None:
    rates = lr_of_epochs(replace(SGD_200, epochs=epochs))
    assert [rates.count(rate) / epochs for rate in sorted(set(rates), reverse=True)] == pytest.approx(
        [0.5, 0.25, 0.25], abs=1 / epochs
    )


@quick
@given(st.integers(1, 300), st.integers(1, 300))
def test_a_milestone_that_falls_on_an_epoch_takes_effect_at_that_epoch(epochs: int, drop: int) -> None:
    drop = min(drop, epochs)
    rates = lr_of_epochs(Recipe(epochs=epochs, milestones=(drop / epochs,)))
    assert rates == pytest.approx([0.1] * drop + [0.01] * (epochs - drop))


def test_the_step_schedule_multiplies_by_gamma_at_every_milestone() -> None:
    recipe = Recipe(lr=1.0, gamma=0.5, milestones=(0.2, 0.4, 0.6))
    assert [recipe.lr_at(progress) for progress in (0.0, 0.2, 0.4, 0.6, 0.9)] == [
        1.0,
        0.5,
        0.25,
        0.125,
        0.125,
    ]


def test_the_step_schedule_without_milestones_is_constant() -> None:
    assert Recipe(milestones=()).lr_at(0.99) == 0.1


@pytest.mark.parametrize(("progress", "share"), [(0.0, 1.0), (1 / 3, 0.75), (0.5, 0.5), (2 / 3, 0.25), (1.0, 0.0)])
def test_the_cosine_schedule_falls_along_half_a_wave(progress: float, share: float) -> None:
    assert Recipe(schedule="cosine", lr=0.2).lr_at(progress) == pytest.approx(0.2 * share, abs=1e-12)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.15, 0.5), (0.3, 1.0), (0.65, 0.5), (1.0, 0.0)])
def test_the_onecycle_schedule_rises_for_three_tenths_and_falls_to_zero(progress: float, share: float) -> None:
    assert Recipe(schedule="onecycle", lr=0.2).lr_at(progress) == pytest.approx(0.2 * share, abs=1e-12)


@quick
@given(PROGRESS)
def test_the_constant_schedule_is_constant(progress: float) -> None:
    assert Recipe(schedule="constant", lr=0.3).lr_at(progress) == 0.3


@quick
@given(st.sampled_from(["step", "cosine", "onecycle", "constant"]), PROGRESS)
def test_no_schedule_leaves_the_range_from_zero_to_the_stated_rate(schedule: Any, progress: float) -> None:
    assert 0 <= Recipe(schedule=schedule, lr=0.1).lr_at(progress) <= 0.1 * (1 + 1e-12)


@quick
@given(st.sampled_from(["step", "cosine"]), PROGRESS, PROGRESS)
def test_falling_schedules_never_rise(schedule: Any, one: float, other: float) -> None:
    recipe = Recipe(schedule=schedule)
    assert recipe.lr_at(min(one, other)) >= recipe.lr_at(max(one, other))


# --- values ---------------------------------------------------------------------------------------


def test_the_two_named_recipes_differ_in_optimiser_and_rate_alone() -> None:
    assert (ADAM_200.optimizer, ADAM_200.lr) == ("adam", 1e-3)
    assert replace(ADAM_200, optimizer="sgd", lr=0.1) == SGD_200


def test_a_recipe_cannot_be_changed_in_place() -> None:
    with pytest.raises(FrozenInstanceError):
        SGD_200.lr = 0.2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0),
        ("epochs", -1),
        ("batch_size", 0),
        ("lr", -0.1),
        ("lr", math.nan),
        ("weight_decay", -1e-4),
    ],
)
def test_an_impossible_value_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=key):
        Recipe(**{key: value})


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("optimizer", "lion"),
        ("schedule", "linear"),
        ("keep", "first"),
        ("epochs", "2.5"),
        ("lr", "fast"),
        ("milestones", "0.5+late"),
        ("warmup", "5"),
    ],
)
def test_a_text_that_fits_no_field_of_a_recipe_is_refused_by_name(key: str, text: str) -> None:
    with pytest.raises(UsageError, match=key):
        fill(Recipe, {key: text}, "training")


def test_a_recipe_is_read_from_text() -> None:
    texts = {"optimizer": "adam", "lr": "1e-3", "epochs": "30", "milestones": "0.6+0.9", "schedule": "cosine"}
    assert fill(Recipe, texts, "training") == Recipe(
        optimizer="adam", lr=1e-3, epochs=30, milestones=(0.6, 0.9), schedule="cosine"
    )


def test_no_augmentation_is_told_apart_from_the_data_set_s_own() -> None:
    assert fill(Recipe, {"augment": "none"}, "training").augment == "none"


# --- the inner adversary --------------------------------------------------------------------------


def test_an_inner_attack_is_read_from_text() -> None:
    texts = {"steps": "7", "step_size": "2/255", "start": "zero", "batch_norm": "train", "label": "predicted"}
    assert fill(InnerAttack, texts, "attack") == InnerAttack(7, "2/255", "zero", "train", "predicted")


@pytest.mark.parametrize("steps", [0, 1])
def test_an_inner_attack_may_take_no_step_or_one(steps: int) -> None:
    assert InnerAttack(steps=steps).steps == steps


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", -1),
        ("step_size", "eps/0"),
        ("step_size", "small"),
        ("step_size", "nan"),
        ("step_size", "-0.1"),
    ],
)
def test_an_impossible_inner_attack_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"{key} is"):
        InnerAttack(**{key: value})


@pytest.mark.parametrize(("key", "text"), [("start", "corner"), ("batch_norm", "both"), ("label", "random")])
def test_an_unknown_choice_of_the_inner_attack_is_refused_by_name(key: str, text: str) -> None:
    with pytest.raises(UsageError, match=key):
        fill(InnerAttack, {key: text}, "attack")


# --- training radii -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "norm", "interval"),
    [
        ("8/255", "linf", (Fraction(8, 255), Fraction(8, 255))),
        (0.1, "linf", (Fraction(1, 10), Fraction(1, 10))),
        ("0", "linf", (Fraction(0), Fraction(0))),
        ("1.5", "l2", (Fraction(3, 2), Fraction(3, 2))),
        ("uniform(0.01,0.05)", "linf", (Fraction(1, 100), Fraction(1, 20))),
        (" uniform( 4/255 , 8/255 ) ", "linf", (Fraction(4, 255), Fraction(8, 255))),
        ("uniform(0.02,0.02)", "linf", (Fraction(1, 50), Fraction(1, 50))),
    ],
)
def test_a_training_radius_is_an_interval(text: Any, norm: str, interval: tuple[Fraction, Fraction]) -> None:
    assert parse_train_eps(text, norm) == interval


@quick
@given(st.fractions(0, 1, max_denominator=255), st.fractions(0, 1, max_denominator=255))
def test_two_radii_in_order_are_an_interval_and_out_of_order_are_refused(one: Fraction, other: Fraction) -> None:
    low, high = sorted((one, other))
    assert parse_train_eps(f"uniform({low},{high})", "linf") == (low, high)
    if low < high:
        with pytest.raises(UsageError, match="smaller radius first"):
            parse_train_eps(f"uniform({high},{low})", "linf")


@pytest.mark.parametrize(
    "text",
    [
        "uniform(0.1)",
        "uniform(0.1,0.2,0.3)",
        "uniform(0.1,0.2",
        "uniform()",
        "uniform(a,b)",
        "uniform(-0.1,0.1)",
        "uniform(0.1,8)",
        "normal(0.1,0.2)",
        "-0.1",
        "nan",
        "8",
        "",
    ],
)
def test_an_impossible_training_radius_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_train_eps(text, "linf")


def test_a_training_radius_in_pixel_units_gets_the_suggestion_to_divide_by_255() -> None:
    with pytest.raises(UsageError, match="8/255"):
        parse_train_eps("uniform(4/255,8)", "linf")


def test_an_l2_training_radius_beyond_the_diagonal_of_the_box_is_refused() -> None:
    with pytest.raises(UsageError, match="l2"):
        parse_train_eps("uniform(1,9)", "l2", dimensions=64)
