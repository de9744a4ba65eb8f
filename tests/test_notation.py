"""The little language of names, budgets and brackets."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensdef.errors import UsageError
from ensdef.notation import (
    at_least,
    convert,
    fill,
    format_call,
    fraction,
    parse_call,
    parse_eps,
    relative,
    split_list,
)

quick = settings(deadline=None, max_examples=60, derandomize=True)

KEYS = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,10}", fullmatch=True)
PLAIN_VALUES = st.from_regex(r"[A-Za-z0-9_./*+-]{1,8}", fullmatch=True)


def calls(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(format_call, NAMES, st.dictionaries(KEYS, values, max_size=3))


#: Values that may be calls with brackets of their own, several levels deep.
VALUES = st.recursive(PLAIN_VALUES, calls, max_leaves=6)


# --- lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("soe", ["soe"]),
        ("soe,adp", ["soe", "adp"]),
        (" soe , adp ", ["soe", "adp"]),
        ("a[x=1,y=2],b", ["a[x=1,y=2]", "b"]),
        (
            "cce[mode=dm],igat[base=adp[entropy_weight=1,log_det_weight=2],rank=true],nat",
            ["cce[mode=dm]", "igat[base=adp[entropy_weight=1,log_det_weight=2],rank=true]", "nat"],
        ),
    ],
)
def test_a_list_is_split_at_commas_outside_brackets_only(text: str, items: list[str]) -> None:
    assert split_list(text) == items


@quick
@given(st.lists(calls(VALUES), min_size=1, max_size=4))
def test_calls_joined_by_commas_are_split_into_the_same_calls(items: list[str]) -> None:
    assert split_list(",".join(items)) == items


@pytest.mark.parametrize("text", ["", " ", "a,", ",a", "a,,b", "a, ,b"])
def test_an_empty_item_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="empty item"):
        split_list(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a[x=1", "never closed"),
        ("a[x=b[y=1]", "never closed"),
        ("a]", "never opened"),
        ("a[x=1]],b[", "never opened"),
    ],
)
def test_unbalanced_brackets_are_refused_with_the_side_that_is_missing(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        split_list(text)


# --- calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("pgd", ("pgd", {})),
        ("pgd[]", ("pgd", {})),
        (" pgd [ steps = 50 , step_size = eps/5 ] ", ("pgd", {"steps": "50", "step_size": "eps/5"})),
        ("torchattacks.CW[c=1]", ("torchattacks.CW", {"c": "1"})),
        ("igat[base=adp[entropy_weight=1]]", ("igat", {"base": "adp[entropy_weight=1]"})),
        ("transfer[source=x=y]", ("transfer", {"source": "x=y"})),
    ],
)
def test_a_call_is_read_as_its_name_and_its_parameters(text: str, call: tuple[str, dict[str, str]]) -> None:
    assert parse_call(text) == call


@quick
@given(NAMES, st.dictionaries(KEYS, VALUES, max_size=4))
def test_a_printed_call_is_read_back_unchanged(name: str, params: dict[str, str]) -> None:
    assert parse_call(format_call(name, params)) == (name, params)


def test_a_call_without_parameters_is_printed_without_brackets() -> None:
    assert format_call("pgd", {}) == "pgd"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[steps=1]",
        "8pgd",
        "p gd",
        "pgd;",
        "pgd[steps=1",
        "pgd[steps=1]x",
        "pgd[steps=1][restarts=2]",
        "pgd[a=1]]",
    ],
)
def test_a_malformed_call_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_call(text)


@pytest.mark.parametrize("inside", ["steps", "steps=", "=5", "st eps=5", "1=5", "steps=1,,x=2", "steps=1,"])
def test_a_malformed_parameter_is_refused(inside: str) -> None:
    with pytest.raises(UsageError):
        parse_call(f"pgd[{inside}]")


def test_a_parameter_given_twice_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="'steps' is given twice"):
        parse_call("pgd[steps=1,steps=2]")


@quick
@given(st.text(alphabet="ab1_.=,[] /*", max_size=20))
def test_any_text_is_either_a_call_or_refused_politely(text: str) -> None:
    try:
        name, params = parse_call(text)
    except UsageError:
        return
    assert parse_call(format_call(name, params)) == (name, params)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "exact"),
    [
        ("8/255", Fraction(8, 255)),
        (" 0.031 ", Fraction(31, 1000)),
        (0.1, Fraction(1, 10)),
        (3, Fraction(3)),
        ("1e-3", Fraction(1, 1000)),
        (Fraction(2, 3), Fraction(2, 3)),
    ],
)
def test_a_number_is_read_as_it_is_written_not_as_the_nearest_float(value: Any, exact: Fraction) -> None:
    assert fraction(value, "eps") == exact


@quick
@given(st.fractions(max_denominator=1000))
def test_a_fraction_survives_being_written_out(value: Fraction) -> None:
    assert fraction(str(value), "eps") == value


@pytest.mark.parametrize("value", ["", "eight", "1/2/3", "nan", "inf", math.nan, math.inf, True, "0x8"])
def test_what_is_no_number_is_refused_naming_the_quantity(value: Any) -> None:
    with pytest.raises(UsageError, match="step_size"):
        fraction(value, "step_size")


def test_a_division_by_zero_is_refused_as_such() -> None:
    with pytest.raises(UsageError, match="divides by zero"):
        fraction("8/0", "eps")


# --- radii ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "norm", "eps"),
    [
        ("8/255", "linf", Fraction(8, 255)),
        (0.1, "linf", Fraction(1, 10)),
        ("16/510", "linf", Fraction(8, 255)),
        (0, "linf", Fraction(0)),
        (1, "linf", Fraction(1)),
        ("128/255", "l2", Fraction(128, 255)),
        (3, "l2", Fraction(3)),
    ],
)
def test_a_radius_is_read_exactly(text: Any, norm: str, eps: Fraction) -> None:
    assert parse_eps(text, norm) == eps


def test_a_radius_in_pixel_units_gets_the_suggestion_to_divide_by_255() -> None:
    with pytest.raises(UsageError, match="did you mean '8/255'"):
        parse_eps(8, "linf")


@pytest.mark.parametrize("text", [2, "16", 255, "2.5", "300/255"])
def test_the_suggested_radius_is_itself_accepted(text: Any) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_eps(text, "linf")
    suggested = re.search(r"did you mean '([^']*)'", str(refusal.value))
    assert suggested is None or parse_eps(suggested[1], "linf") <= 1


def test_a_radius_beyond_255_gets_no_suggestion() -> None:
    with pytest.raises(UsageError) as refusal:
        parse_eps(256, "linf")
    assert "did you mean" not in str(refusal.value)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("text", ["8/0", "-8/255", -0.1, math.nan, "nan", math.inf, "eps/5", ""])
def test_an_impossible_radius_is_refused_in_every_norm(text: Any, norm: str) -> None:
    with pytest.raises(UsageError, match="eps is"):
        parse_eps(text, norm)


def test_an_l2_radius_may_reach_the_diagonal_of_the_box() -> None:
    assert parse_eps(8, "l2", dimensions=64) == 8


def test_an_l2_radius_beyond_the_diagonal_of_the_box_is_refused() -> None:
    with pytest.raises(UsageError, match=re.escape("8.00 in l2")):
        parse_eps("8.01", "l2", dimensions=64)


def test_an_l2_radius_without_known_dimensions_has_no_upper_bound() -> None:
    assert parse_eps(1000, "l2") == 1000


def test_an_unknown_norm_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="linf, l2"):
        parse_eps("8/255", "l1")


# --- sizes relative to the radius -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("eps", 0.5),
        (" eps ", 0.5),
        ("eps/5", 0.1),
        ("eps / 5", 0.1),
        ("2.5*eps", 1.25),
        ("2.5 * eps/10", 0.125),
        ("1/4*eps", 0.125),
        ("2/255", 2 / 255),
        ("0.01", 0.01),
        (0.01, 0.01),
        (1, 1.0),
    ],
)
def test_a_size_may_be_a_number_or_a_multiple_of_the_radius(text: Any, expected: float) -> None:
    assert relative(text, 0.5, "step_size") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("text", ["eps/0", "eps/0.0", "1/0", "1/0*eps"])
def test_a_size_that_divides_by_zero_is_refused_as_such(text: str) -> None:
    with pytest.raises(UsageError, match=r"step_size is .* divides by zero"):
        relative(text, 0.5, "step_size")


@pytest.mark.parametrize(
    "text", ["epsilon", "eps+1", "eps**2", "eps/", "*eps", "eps/eps", "1..2*eps", "", "five", "nan"]
)
def test_a_size_that_makes_no_sense_is_refused_naming_it(text: str) -> None:
    with pytest.raises(UsageError, match="step_size"):
        relative(text, 0.5, "step_size")


@pytest.mark.parametrize("text", ["1e400", "1e400*eps"])
def test_a_size_beyond_floating_point_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="step_size"):
        relative(text, 0.5, "step_size")


# --- parameters -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Params:
    steps: int = 10
    rate: float = 0.5
    random: bool = True
    loss: Literal["ce", "margin"] = "ce"
    name: str = "x"
    limit: int | None = 3
    milestones: tuple[float, ...] = (0.5, 0.75)

    def __post_init__(self) -> None:
        at_least("toy", steps=(self.steps, 0))


@dataclass(frozen=True)
class Calls:
    calls: tuple[str, ...] = ()


@dataclass(frozen=True)
class NoParams:
    pass


@dataclass(frozen=True)
class Required:
    width: int


def test_nothing_given_leaves_every_default() -> None:
    assert fill(Params, {}, "toy") == Params()


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steps", "50", 50),
        ("steps", "5.0", 5),
        ("rate", "2/8", 0.25),
        ("rate", "1e-3", 0.001),
        ("rate", "1", 1.0),
        ("random", "true", True),
        ("random", "False", False),
        ("random", "false", False),
        ("loss", "margin", "margin"),
        ("name", "adp[entropy_weight=1]", "adp[entropy_weight=1]"),
        ("limit", "7", 7),
        ("limit", "none", None),
        ("limit", "None", None),
        ("milestones", "0.6+0.9", (0.6, 0.9)),
        ("milestones", "0.6", (0.6,)),
        ("milestones", "", ()),
    ],
)
def test_a_text_is_read_as_the_type_of_its_field(key: str, text: str, value: Any) -> None:
    filled = getattr(fill(Params, {key: text}, "toy"), key)
    assert (filled, type(filled)) == (value, type(value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 50),
        ("rate", 0.25),
        ("random", False),
        ("loss", "margin"),
        ("limit", None),
        ("milestones", (0.1, 0.2)),
    ],
)
def test_a_value_of_the_right_type_is_kept(key: str, value: Any) -> None:
    assert getattr(fill(Params, {key: value}, "toy"), key) == value


def test_lists_inside_the_brackets_of_a_list_of_calls_are_theirs() -> None:
    text = "pgd[steps=2] + transfer[members=3+5,losses=ce+margin]"
    assert fill(Calls, {"calls": text}, "toy").calls == ("pgd[steps=2]", "transfer[members=3+5,losses=ce+margin]")


@pytest.mark.parametrize("text", ["pgd[steps=2+mim", "pgd]+mim"])
def test_a_list_of_calls_with_brackets_that_do_not_match_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="bracket"):
        fill(Calls, {"calls": text}, "toy")


def test_a_list_is_taken_for_a_tuple() -> None:
    assert fill(Params, {"milestones": [0.1, "0.2"]}, "toy").milestones == (0.1, 0.2)


def test_a_whole_number_among_the_choices_is_read_from_text() -> None:
    assert convert("2", Literal[1, 2], "toy[order]") == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", "2.5"),
        ("steps", "many"),
        ("steps", None),
        ("steps", True),
        ("rate", "fast"),
        ("rate", "nan"),
        ("rate", "1e400"),
        ("random", "maybe"),
        ("random", "1"),
        ("loss", "dlr"),
        ("limit", "some"),
        ("milestones", "0.5+late"),
        ("name", None),
    ],
)
def test_a_value_of_another_type_is_refused_naming_owner_and_field(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=re.escape(f"toy[{key}]")):
        fill(Params, {key: value}, "toy")


def test_a_wrong_choice_is_refused_with_the_choices() -> None:
    with pytest.raises(UsageError, match="'dlr'; expected one of ce, margin"):
        fill(Params, {"loss": "dlr"}, "toy")


def test_an_unknown_parameter_is_refused_with_the_list_of_those_there_are() -> None:
    names = ", ".join(field.name for field in dataclasses.fields(Params))
    with pytest.raises(UsageError, match=f"toy has no parameter 'step'; it has: {names}"):
        fill(Params, {"step": "5"}, "toy")


def test_an_unknown_parameter_of_something_without_parameters_says_so() -> None:
    with pytest.raises(UsageError, match="it has: none"):
        fill(NoParams, {"step": "5"}, "toy")


def test_a_missing_required_parameter_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"toy: .*width"):
        fill(Required, {}, "toy")


def test_the_checks_of_the_class_itself_are_heard() -> None:
    with pytest.raises(UsageError, match="toy: steps is -1; expected at least 0"):
        fill(Params, {"steps": "-1"}, "toy")


def test_a_field_type_that_has_no_text_form_is_an_error_of_the_author_not_of_the_user() -> None:
    with pytest.raises(TypeError):
        convert("x", dict, "toy[table]")


@quick
@given(
    st.builds(
        Params,
        steps=st.integers(0, 10**6),
        rate=st.floats(-1e6, 1e6),
        random=st.booleans(),
        loss=st.sampled_from(["ce", "margin"]),
        name=PLAIN_VALUES,
        limit=st.none() | st.integers(-5, 5),
        milestones=st.just((0.5, 0.75)),
    )
)
def test_parameters_printed_in_brackets_are_read_back_equal(params: Params) -> None:
    given_ = {key: value for key, value in dataclasses.asdict(params).items() if key != "milestones"}
    assert fill(Params, parse_call(format_call("toy", given_))[1], "toy") == params


def test_a_tuple_printed_in_brackets_is_read_back_equal() -> None:
    params = parse_call(format_call("toy", {"milestones": (0.25, 0.5)}))[1]
    assert fill(Params, params, "toy").milestones == (0.25, 0.5)


# --- bounds ---------------------------------------------------------------------------------------


def test_a_value_on_its_bound_is_allowed() -> None:
    assert at_least("pgd", steps=(0, 0), restarts=(1, 1)) is None


@pytest.mark.parametrize("value", [0, -1, 0.999, math.nan])
def test_a_value_below_its_bound_is_refused_with_owner_name_and_bound(value: float) -> None:
    with pytest.raises(UsageError, match=f"pgd: restarts is {value}; expected at least 1"):
        at_least("pgd", steps=(5, 0), restarts=(value, 1))
