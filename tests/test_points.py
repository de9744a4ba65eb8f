"""Adversarial points in a file: rounded into ball and box where that may be, bit by bit where not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ensdef.points import DamagedPoints, StoredPoints, judged, outside, packed_points, rounded, stepped
from ensdef.threat import Threat

SHAPE = (3, 8, 8)
THREATS = [Threat("linf", 8 / 255), Threat("linf", 0.2), Threat("linf", 0.0), Threat("l2", 0.5), Threat("l2", 3.0)]


def images(count: int = 20, levels: int = 255) -> Tensor:
    x = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))
    return (x * levels).round() / levels


def attacked(x: Tensor, threat: Threat, size: float = 2.0) -> Tensor:
    """Points on the edge of ball and box, and inside."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * threat.eps * size
    return threat.project(x + noise, x)


def wrong(points: Tensor, x: Tensor, threat: Threat) -> list[str]:
    return [reason for reason, rows in outside(points.double(), x, threat).items() if bool(rows.any())]


def stored(**changes: Any) -> tuple[bytes, Tensor, Tensor, Tensor]:
    """A file with points of 20 images, every third of them exact, and what it was made of."""
    x, threat = images(), Threat("linf", 0.2)
    x_adv = attacked(x, threat)
    steps, exact = rounded(x, x_adv, threat), torch.arange(20) % 3 == 0
    return packed_points(torch.arange(100, 120), steps, x_adv, exact, "ab" * 32), x, x_adv, steps


@pytest.mark.parametrize("levels", [255, 16, 1000])
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_rounded_points_stay_in_ball_and_box(threat: Threat, levels: int) -> None:
    x = images(levels=levels)
    steps = rounded(x, attacked(x, threat), threat)
    assert wrong(stepped(x, steps), x, threat) == []
    assert wrong(x.double() + steps.double() / 255, x, threat) == []


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_no_rounded_point_is_far_from_its_own(threat: Threat) -> None:
    x = images()
    x_adv = attacked(x, threat)
    distance = (stepped(x, rounded(x, x_adv, threat)) - x_adv).abs().amax()
    # half a step from rounding; in l2 what shortening takes, too
    assert distance <= (0.5001 if threat.norm == "linf" else 2.5) / 255


def test_a_point_of_an_eight_bit_attack_loses_nothing_but_the_last_bit() -> None:
    x, threat = images(), Threat("linf", 8 / 255)
    x_adv = (attacked(x, threat) * 255).round() / 255
    assert (stepped(x, rounded(x, x_adv, threat)) - x_adv).abs().amax() < 2**-23


def test_a_step_that_would_leave_the_ball_is_rounded_towards_the_clean_image() -> None:
    x, threat = torch.full((1, *SHAPE), 0.5), Threat("linf", 8.6 / 255)
    assert rounded(x, x + 8.6 / 255, threat).unique().tolist() == [8]
    assert rounded(x, x - 8.6 / 255, threat).unique().tolist() == [-8]


def test_a_step_that_would_leave_the_box_is_rounded_towards_the_clean_image() -> None:
    x, threat = torch.full((1, *SHAPE), 1 - 8.6 / 255), Threat("linf", 0.2)
    assert rounded(x, torch.ones(1, *SHAPE), threat).unique().tolist() == [8]
    assert rounded(1 - x, torch.zeros(1, *SHAPE), threat).unique().tolist() == [-8]


def test_points_come_back_from_their_file_as_they_went() -> None:
    content, x, x_adv, steps = stored()
    points = StoredPoints.unpack(content, SHAPE)
    assert (points.key, sorted(points.ids), points.exact) == ("ab" * 32, list(range(100, 120)), 7)
    asked = [117, 100, 103, 104]
    rows = torch.tensor(asked) - 100
    found = judged(points.at(asked, x[rows]))
    assert torch.equal(found[1:3], x_adv[rows[1:3]])
    assert torch.equal(found[[0, 3]], stepped(x, steps)[rows[[0, 3]]])


def test_a_step_beyond_127_takes_two_bytes_and_others_one() -> None:
    x = torch.zeros(2, *SHAPE)
    x_adv = torch.stack([torch.full(SHAPE, 127 / 255), torch.ones(SHAPE)])
    steps = rounded(x, x_adv, Threat(None, 0.0))
    points = StoredPoints.unpack(packed_points(torch.arange(2), steps, x_adv, torch.zeros(2).bool(), ""), SHAPE)
    assert [len(points.tensors[name]) for name in ("delta_int8", "delta_int16", "point_float32")] == [1, 1, 0]
    assert torch.equal(judged(points.at([0, 1], x)), x_adv)


def test_rounded_points_take_a_byte_a_value() -> None:
    x, threat = images(200), Threat("linf", 0.2)
    steps = rounded(x, attacked(x, threat), threat)
    content = packed_points(torch.arange(200), steps, x, torch.zeros(200).bool(), "")
    assert len(content) < 200 * (math.prod(SHAPE) + 8) + 1000


def test_equal_points_give_equal_files() -> None:
    assert len({stored()[0] for _ in range(10)}) == 1


def test_a_file_may_hold_no_points() -> None:
    nothing = torch.zeros(0, *SHAPE)
    content = packed_points(torch.zeros(0).long(), nothing.short(), nothing, torch.zeros(0).bool(), "ab")
    assert StoredPoints.unpack(content, SHAPE).ids == []


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.nan, ["not finite"]),
        (math.inf, ["not finite"]),
        (1.0001, ["outside the box [0, 1]"]),
        (-0.0001, ["outside the box [0, 1]"]),
        (1.0, []),
    ],
)
def test_where_a_point_may_not_lie_has_a_name(value: float, reason: list[str]) -> None:
    x = torch.full((3, *SHAPE), 0.9 if value > 0 else 0.1)
    points = x.double()
    points[1, 0, 3, 3] = value
    found = outside(points, x, Threat("linf", 0.2))
    assert {name: rows.tolist() for name, rows in found.items() if rows.any()} == {
        name: [False, True, False] for name in reason
    }


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_ten_thousandth_beyond_the_ball_is_outside(norm: str) -> None:
    x, threat = torch.full((2, *SHAPE), 0.5), Threat(norm, 0.1)
    size = 0.1 + 1e-4
    step = size if norm == "linf" else size / math.prod(SHAPE) ** 0.5
    assert wrong(x.double() + step, x, threat) == ["outside the ball"]
    assert wrong(x.double() + step * 0.1 / size, x, threat) == []


@pytest.mark.parametrize("content", [b"", b"{}", bytes(100), b"\x80\x02pickle", stored()[0][:-1], stored()[0] + b"x"])
def test_what_is_no_file_of_points_is_refused(content: bytes) -> None:
    with pytest.raises(DamagedPoints, match="is truncated or no file of points"):
        StoredPoints.unpack(content, SHAPE)
