"""The ball around an image: projection, steepest ascent, random starts."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from ensdef.errors import UsageError
from ensdef.rng import BatchRandom, KeyedRandom
from ensdef.threat import Threat

quick = settings(deadline=None, max_examples=60, derandomize=True)

NORMS = st.sampled_from(["linf", "l2"])
EPS = st.sampled_from([0.0, 1e-6, 1 / 255, 8 / 255, 0.1, 0.5, 1.0]) | st.floats(0, 1)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))
SEEDS = st.integers(0, 2**31)
#: How far outside the ball the point to project lies.
SPREADS = st.sampled_from([1e-3, 0.1, 1.0, 1e3])

#: What float rounding may add to a radius.
ROUNDING = 1e-6


def images(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random images; about a tenth of the pixels is black or white, where the box is felt."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) * 1.2 - 0.1).clamp(0, 1)


def noise(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))


def keyed(batch: int, seed: int = 0) -> KeyedRandom:
    return KeyedRandom(seed, torch.arange(batch))


def in_ball_and_box(threat: Threat, x_adv: Tensor, x: Tensor) -> bool:
    inside = threat.distance(x_adv, x) <= threat.eps + ROUNDING
    return bool(inside.all() and (x_adv >= 0).all() and (x_adv <= 1).all())


# --- projection -----------------------------------------------------------------------------------


@quick
@given(NORMS, EPS, SHAPES, SEEDS, SPREADS)
def test_a_projected_point_is_in_the_ball_and_in_the_box(
    norm: str, eps: float, shape: tuple[int, ...], seed: int, spread: float
) -> None:
    threat, x = Threat(norm, eps), images(shape, seed)
    assert in_ball_and_box(threat, threat.project(x + spread * noise(shape, seed), x), x)


@quick
@given(NORMS, EPS, SHAPES, SEEDS, SPREADS)
def test_projecting_twice_is_projecting_once(
    norm: str, eps: float, shape: tuple[int, ...], seed: int, spread: float
) -> None:
    threat, x = Threat(norm, eps), images(shape, seed)
    once = threat.project(x + spread * noise(shape, seed), x)
    torch.testing.assert_close(threat.project(once, x), once, rtol=0, atol=2e-7)


@quick
@given(NORMS, EPS, SHAPES, SEEDS)
def test_a_point_inside_stays_where_it_is(norm: str, eps: float, shape: tuple[int, ...], seed: int) -> None:
    threat, x = Threat(norm, eps), images(shape, seed)
    direction = threat.ascent(noise(shape, seed)) * 0.99 * eps
    inside = (x + direction).clamp(0, 1)
    torch.testing.assert_close(threat.project(inside, x), inside, rtol=0, atol=2e-7)


@quick
@given(EPS, SHAPES, SEEDS, SPREADS)
def test_the_linf_projection_clips_each_pixel_to_what_ball_and_box_allow(
    eps: float, shape: tuple[int, ...], seed: int, spread: float
) -> None:
    x = images(shape, seed)
    x_adv = x + spread * noise(shape, seed)
    nearest = torch.clamp(x_adv.double(), (x.double() - eps).clamp_min(0), (x.double() + eps).clamp_max(1))
    torch.testing.assert_close(Threat("linf", eps).project(x_adv, x).double(), nearest, rtol=0, atol=ROUNDING)


@quick
@given(st.floats(0, 0.4), SHAPES, SEEDS, SPREADS)
def test_the_l2_projection_goes_no_further_than_the_surface_while_the_box_is_far(
    eps: float, shape: tuple[int, ...], seed: int, spread: float
) -> None:
    x = torch.full(shape, 0.5)
    threat, x_adv = Threat("l2", eps), x + spread * noise(shape, seed)
    moved = threat.distance(threat.project(x_adv, x), x_adv)
    shortest = (threat.distance(x_adv, x) - eps).clamp_min(0)
    torch.testing.assert_close(moved, shortest, rtol=1e-5, atol=1e-5)


@quick
@given(NORMS, SHAPES, SEEDS)
def test_a_radius_of_zero_gives_the_image_back_bit_for_bit(norm: str, shape: tuple[int, ...], seed: int) -> None:
    x = images(shape, seed)
    assert torch.equal(Threat(norm, 0.0).project(x + noise(shape, seed), x), x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_image_itself_is_projected_onto_itself(norm: str) -> None:
    x = images((4, 3, 5, 5))
    assert torch.equal(Threat(norm, 0.1).project(x, x), x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_each_image_is_projected_by_itself(norm: str) -> None:
    threat, x = Threat(norm, 0.1), images((6, 3, 5, 5))
    x_adv = x + noise(x.shape)
    alone = [threat.project(x_adv[i : i + 1], x[i : i + 1]) for i in range(len(x))]
    torch.testing.assert_close(threat.project(x_adv, x), torch.cat(alone), rtol=0, atol=1e-7)


def test_without_a_norm_only_the_box_holds() -> None:
    x = images((2, 3, 4, 4))
    x_adv = x + noise(x.shape)
    assert torch.equal(Threat(None, 0.0).project(x_adv, x), x_adv.clamp(0, 1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_changes_neither_of_its_arguments(norm: str) -> None:
    x, x_adv = images((2, 3, 4, 4)), noise((2, 3, 4, 4))
    copies = x.clone(), x_adv.clone()
    Threat(norm, 0.1).project(x_adv, x)
    assert torch.equal(x, copies[0])
    assert torch.equal(x_adv, copies[1])


# --- distance -------------------------------------------------------------------------------------


def test_distances_of_a_hand_made_perturbation() -> None:
    x = torch.full((2, 1, 1, 2), 0.5)
    x_adv = x + torch.tensor([[[[0.3, -0.4]]], [[[0.0, 0.0]]]])
    torch.testing.assert_close(
        Threat("linf", 1.0).distance(x_adv, x), torch.tensor([0.4, 0.0]).double(), atol=1e-7, rtol=0
    )
    torch.testing.assert_close(
        Threat("l2", 1.0).distance(x_adv, x), torch.tensor([0.5, 0.0]).double(), atol=1e-7, rtol=0
    )
    assert Threat(None, 0.0).distance(x_adv, x).tolist() == [0.0, 0.0]


def test_distances_are_measured_in_double_precision() -> None:
    assert Threat("linf", 1.0).distance(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).dtype == torch.float64


# --- ascent ---------------------------------------------------------------------------------------


@quick
@given(SHAPES, SEEDS)
def test_the_linf_direction_gains_the_l1_norm_of_the_gradient(shape: tuple[int, ...], seed: int) -> None:
    g = noise(shape, seed)
    direction = Threat("linf", 0.1).ascent(g)
    assert direction.abs().max() <= 1
    torch.testing.assert_close((g * direction).flatten(1).sum(1), g.abs().flatten(1).sum(1))


@quick
@given(SHAPES, SEEDS)
def test_the_l2_direction_gains_the_l2_norm_of_the_gradient(shape: tuple[int, ...], seed: int) -> None:
    g = noise(shape, seed)
    direction = Threat("l2", 0.1).ascent(g)
    torch.testing.assert_close(direction.flatten(1).norm(dim=1), torch.ones(shape[0]))
    torch.testing.assert_close((g * direction).flatten(1).sum(1), g.flatten(1).norm(dim=1))


@quick
@given(NORMS, SHAPES, SEEDS)
def test_no_other_direction_of_unit_size_gains_more(norm: str, shape: tuple[int, ...], seed: int) -> None:
    threat, g = Threat(norm, 1.0), noise(shape, seed)
    rival = noise(shape, seed + 7)
    size = rival.flatten(1).norm(p=math.inf if norm == "linf" else 2, dim=1).view(-1, 1, 1, 1)
    gain, rival_gain = ((g * d).flatten(1).sum(1) for d in (threat.ascent(g), rival / size))
    assert (gain >= rival_gain - 1e-5).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_zero_gradient_gives_a_zero_step(norm: str) -> None:
    g = noise((3, 2, 4, 4))
    g[1] = 0
    direction = Threat(norm, 0.1).ascent(g)
    assert torch.equal(direction[1], torch.zeros(2, 4, 4))
    assert torch.isfinite(direction).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e-6, 1.0, 1e6, 1e18])
def test_the_step_does_not_depend_on_the_scale_of_the_gradient(norm: str, scale: float) -> None:
    threat, g = Threat(norm, 0.1), noise((3, 2, 4, 4))
    torch.testing.assert_close(threat.ascent(g * scale), threat.ascent(g), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_direction_of_an_image_does_not_depend_on_its_neighbours(norm: str) -> None:
    threat, g = Threat(norm, 0.1), noise((5, 2, 4, 4))
    alone = [threat.ascent(g[i : i + 1]) for i in range(len(g))]
    torch.testing.assert_close(threat.ascent(g), torch.cat(alone), rtol=0, atol=1e-7)


# --- random starts --------------------------------------------------------------------------------


@quick
@given(NORMS, EPS, SHAPES, SEEDS)
def test_a_random_start_is_in_the_ball_and_in_the_box(norm: str, eps: float, shape: tuple[int, ...], seed: int) -> None:
    threat, x = Threat(norm, eps), images(shape, seed)
    start = threat.random_start(x, keyed(shape[0], seed))
    assert start.shape == x.shape
    assert in_ball_and_box(threat, start, x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_random_start_of_radius_zero_is_the_image_bit_for_bit(norm: str) -> None:
    x = images((4, 3, 5, 5))
    assert torch.equal(Threat(norm, 0.0).random_start(x, keyed(4)), x)


def test_linf_starts_are_uniform_over_the_ball() -> None:
    x = torch.full((200, 1, 8, 8), 0.5)
    start = Threat("linf", 0.1).random_start(x, keyed(200))
    assert stats.kstest((start - x).flatten().numpy(), "uniform", args=(-0.1, 0.2)).pvalue > 1e-3


def test_l2_starts_have_a_uniform_length_up_to_the_radius() -> None:
    x = torch.full((2000, 1, 4, 4), 0.5)
    threat = Threat("l2", 0.3)
    length = threat.distance(threat.random_start(x, keyed(2000)), x)
    assert stats.kstest(length.numpy(), "uniform", args=(0, 0.3)).pvalue > 1e-3


def test_l2_starts_prefer_no_direction() -> None:
    x = torch.full((2000, 1, 1, 2), 0.5)
    delta = (Threat("l2", 0.3).random_start(x, keyed(2000)) - x).flatten(1)
    angle = torch.atan2(delta[:, 0], delta[:, 1])
    assert stats.kstest(angle.numpy(), "uniform", args=(-math.pi, 2 * math.pi)).pvalue > 1e-3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_start_of_an_image_does_not_depend_on_its_neighbours(norm: str) -> None:
    threat, x = Threat(norm, 0.1), images((6, 3, 5, 5))
    rows = torch.tensor([4, 1])
    whole = threat.random_start(x, KeyedRandom(0, torch.arange(6)))
    part = threat.random_start(x[rows], KeyedRandom(0, rows))
    torch.testing.assert_close(whole[rows], part, rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_training_batch_starts_in_the_ball_too(norm: str) -> None:
    threat, x = Threat(norm, 0.1), images((8, 3, 5, 5))
    start = threat.random_start(x, BatchRandom(torch.Generator().manual_seed(0), 8))
    assert in_ball_and_box(threat, start, x)
    assert (threat.distance(start, x) > 0).all()


# --- from text ------------------------------------------------------------------------------------


def test_a_threat_is_read_from_text() -> None:
    assert Threat.parse("linf", "8/255") == Threat("linf", float(Fraction(8, 255)))


def test_a_threat_beyond_the_box_is_refused() -> None:
    with pytest.raises(UsageError, match="8/255"):
        Threat.parse("linf", 8)
