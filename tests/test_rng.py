"""Random numbers that belong to an image: what they depend on, and whether they look random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from ensdef.rng import BatchRandom, KeyedRandom, derived_generator

quick = settings(deadline=None, max_examples=50, derandomize=True)

IDS = st.lists(st.integers(0, 2**40), min_size=1, max_size=12, unique=True)
SEEDS = st.integers(0, 2**31)
STEPS = st.integers(0, 1000)

#: Smallest p-value that is not taken as a defect; the draws are fixed, so the tests never flicker.
P = 1e-3


def draw_all(rng: KeyedRandom) -> list[Tensor]:
    """One draw of each law, in a row."""
    return [rng.uniform(2, 3), rng.normal(4), rng.integers(10, 3), rng.signs(5), rng.bits(2)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- what a draw depends on -----------------------------------------------------------------------


@quick
@given(SEEDS, IDS, STEPS, STEPS)
def test_equal_keys_give_equal_draws(seed: int, ids: list[int], run: int, step: int) -> None:
    one, other = (KeyedRandom(seed, torch.tensor(ids), run, step) for _ in range(2))
    assert same(draw_all(one), draw_all(other))


@quick
@given(SEEDS, IDS, STEPS, STEPS, st.data())
def test_a_subset_in_any_order_draws_what_the_whole_draws(
    seed: int, ids: list[int], run: int, step: int, data: st.DataObject
) -> None:
    rows = data.draw(st.permutations(range(len(ids))))[: data.draw(st.integers(1, len(ids)))]
    whole = draw_all(KeyedRandom(seed, torch.tensor(ids), run, step))
    part = draw_all(KeyedRandom(seed, torch.tensor(ids)[rows], run, step))
    assert same([drawn[rows] for drawn in whole], part)


@quick
@given(SEEDS, IDS, st.integers(1, 12))
def test_batches_of_any_size_draw_what_the_whole_draws(seed: int, ids: list[int], size: int) -> None:
    whole = draw_all(KeyedRandom(seed, torch.tensor(ids)))
    batches = [draw_all(KeyedRandom(seed, batch)) for batch in torch.tensor(ids).split(size)]
    assert same(whole, [torch.cat(parts) for parts in zip(*batches, strict=True)])


@quick
@given(SEEDS, st.lists(st.tuples(st.integers(0, 99), STEPS, STEPS), min_size=1, max_size=8))
def test_images_at_different_runs_and_steps_may_share_a_batch(seed: int, keys: list[tuple[int, int, int]]) -> None:
    ids, runs, steps = torch.tensor(keys).unbind(1)
    together = KeyedRandom(seed, ids, runs, steps).uniform(4)
    alone = [KeyedRandom(seed, torch.tensor([i]), run, step).uniform(4) for i, run, step in keys]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(
    "other",
    [(1, 7, 2, 3), (0, 8, 2, 3), (0, 7, 3, 3), (0, 7, 2, 4), (0, 7, 3, 2), (7, 0, 2, 3), (0, 2, 7, 3)],
    ids=["seed", "id", "run", "step", "run and step swapped", "seed and id swapped", "id and run swapped"],
)
def test_every_part_of_the_key_matters(other: tuple[int, int, int, int]) -> None:
    first = KeyedRandom(0, torch.tensor([7]), 2, 3).uniform(8)
    seed, image, run, step = other
    assert not torch.isclose(first, KeyedRandom(seed, torch.tensor([image]), run, step).uniform(8)).any()


@pytest.mark.parametrize("law", ["uniform", "normal", "bits"])
def test_two_draws_in_a_row_differ(law: str) -> None:
    draw = getattr(KeyedRandom(0, torch.arange(4)), law)
    assert not (draw(16) == draw(16)).any()


def test_at_restarts_the_draws_of_its_run_and_step() -> None:
    rng = KeyedRandom(0, torch.arange(4), run=1, step=1)
    rng.uniform(3)
    fresh = KeyedRandom(0, torch.arange(4), run=1, step=5)
    assert same(draw_all(rng.at(step=5)), draw_all(fresh))


def test_at_without_arguments_starts_over() -> None:
    rng = KeyedRandom(0, torch.arange(4), run=1, step=1)
    first = rng.uniform(3)
    assert torch.equal(rng.at().uniform(3), first)


def test_at_leaves_the_stream_it_was_called_on_where_it_was() -> None:
    one, other = (KeyedRandom(0, torch.arange(4)) for _ in range(2))
    one.at(run=3).uniform(5)
    assert torch.equal(one.uniform(3), other.uniform(3))


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw_all(KeyedRandom(0, torch.arange(4)))
    unmoved = torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert unmoved
    assert same(first, draw_all(KeyedRandom(0, torch.arange(4))))


def test_draws_stay_what_they_are_from_release_to_release() -> None:
    """SplitMix64 in plain integers; a stored record names its seed and must stay repeatable."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    key = mix(11)
    for part in (5, 2, 3, 0):
        key = mix(key ^ part)
    expected = [mix((key + j * 0x9E3779B97F4A7C15) & mask) >> 1 for j in range(6)]
    drawn = KeyedRandom(11, torch.tensor([5]), run=2, step=3).bits(2, 3)
    assert drawn.flatten().tolist() == expected


def test_no_images_draw_nothing() -> None:
    assert KeyedRandom(0, torch.arange(0)).normal(3, 8, 8).shape == (0, 3, 8, 8)


def test_a_draw_without_shape_is_one_number_an_image() -> None:
    assert KeyedRandom(0, torch.arange(5)).uniform().shape == (5,)


# --- whether it looks random ----------------------------------------------------------------------


@pytest.fixture
def rng() -> KeyedRandom:
    return KeyedRandom(0, torch.arange(200))


def test_uniform_draws_pass_a_kolmogorov_smirnov_test(rng: KeyedRandom) -> None:
    assert stats.kstest(rng.uniform(100).flatten().numpy(), "uniform").pvalue > P


def test_normal_draws_pass_a_kolmogorov_smirnov_test(rng: KeyedRandom) -> None:
    assert stats.kstest(rng.normal(100).flatten().numpy(), "norm").pvalue > P


def test_normal_draws_have_the_moments_of_a_standard_normal(rng: KeyedRandom) -> None:
    z = rng.normal(100).flatten().double()
    moments = torch.stack([z.mean(), z.pow(2).mean(), z.pow(3).mean(), z.pow(4).mean()])
    # four standard errors with n = 20,000: the k-th moment has variance (E z^2k - (E z^k)^2) / n
    errors = torch.tensor([1.0, 2.0, 15.0, 96.0]).double().sqrt() * 4 / len(z) ** 0.5
    assert ((moments - torch.tensor([0.0, 1.0, 0.0, 3.0])).abs() < errors).all()


def test_integers_pass_a_chi_square_test(rng: KeyedRandom) -> None:
    counts = rng.integers(7, 100).flatten().bincount()
    assert len(counts) == 7
    assert stats.chisquare(counts.numpy()).pvalue > P


def test_signs_are_plus_and_minus_one_with_equal_odds(rng: KeyedRandom) -> None:
    signs = rng.signs(100).flatten()
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert stats.binomtest(int((signs > 0).sum()), len(signs)).pvalue > P


def test_every_bit_is_set_half_of_the_time(rng: KeyedRandom) -> None:
    bits = rng.bits(100).flatten()
    share = torch.stack([((bits >> k) & 1).double().mean() for k in range(63)])
    assert ((share - 0.5).abs() < 4.5 * 0.5 / len(bits) ** 0.5).all()


@pytest.mark.parametrize("axis", [0, 1], ids=["neighbouring ids", "neighbouring coordinates"])
@pytest.mark.parametrize("lag", [1, 2, 8])
def test_neighbours_are_not_correlated(rng: KeyedRandom, axis: int, lag: int) -> None:
    z = np.moveaxis(rng.normal(100).numpy(), axis, 0)
    assert stats.pearsonr(z[:-lag].ravel(), z[lag:].ravel()).pvalue > P


@pytest.mark.parametrize("part", ["seed", "run", "step", "draw"])
def test_neighbouring_keys_are_not_correlated(part: str) -> None:
    ids = torch.arange(200)
    one = KeyedRandom(0, ids)
    first = one.normal(100)
    other = {
        "seed": KeyedRandom(1, ids),
        "run": KeyedRandom(0, ids, run=1),
        "step": KeyedRandom(0, ids, step=1),
        "draw": one,
    }[part]
    assert stats.pearsonr(first.flatten().numpy(), other.normal(100).flatten().numpy()).pvalue > P


def test_draws_of_distinct_keys_do_not_collide() -> None:
    runs, steps = (part.flatten() for part in torch.meshgrid(torch.arange(50), torch.arange(50), indexing="ij"))
    bits = torch.cat([KeyedRandom(0, torch.full_like(runs, image), runs, steps).bits(4) for image in range(5)])
    assert len(bits.unique()) == bits.numel()


@quick
@given(SEEDS, IDS, st.floats(-10, 10), st.floats(0.01, 10))
def test_uniform_draws_stay_between_their_bounds(seed: int, ids: list[int], low: float, width: float) -> None:
    drawn = KeyedRandom(seed, torch.tensor(ids)).uniform(50, low=low, high=low + width).double()
    # float32 has no number at most bounds: allow their rounding
    slack = 1e-6 * (abs(low) + width)
    assert ((low - slack <= drawn) & (drawn <= low + width + slack)).all()


class Extreme(KeyedRandom):
    """The largest draw there can be."""

    def bits(self, *shape: int) -> Tensor:
        return torch.full((len(self.ids), *shape), 2**63 - 1)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.5, 0.5), (-0.25, 0.25), (1.0, 2.0)])
def test_the_upper_bound_itself_is_never_drawn(low: float, high: float) -> None:
    assert (Extreme(0, torch.arange(1)).uniform(1, low=low, high=high) < high).all()


def test_the_most_extreme_normal_draw_is_finite() -> None:
    assert torch.isfinite(Extreme(0, torch.arange(1)).normal(1)).all()


def test_integers_stay_below_their_bound() -> None:
    drawn = KeyedRandom(0, torch.arange(50)).integers(3, 20)
    assert (drawn.min(), drawn.max(), drawn.dtype) == (0, 2, torch.int64)


# --- ordinary generators --------------------------------------------------------------------------


def seeded(*key: int) -> Tensor:
    return torch.rand(8, generator=derived_generator(torch.device("cpu"), *key))


def test_a_derived_generator_can_be_had_again() -> None:
    assert torch.equal(seeded(0, 3, 7), seeded(0, 3, 7))


@pytest.mark.parametrize("other", [(1, 3, 7), (0, 4, 7), (0, 3, 8), (0, 7, 3), (3, 0, 7), (0, 3), (0, 3, 7, 0)])
def test_a_derived_generator_depends_on_the_whole_key_and_its_order(other: tuple[int, ...]) -> None:
    assert not torch.equal(seeded(0, 3, 7), seeded(*other))


def test_generators_of_neighbouring_keys_are_not_correlated() -> None:
    draws = torch.stack([seeded(0, epoch, batch) for epoch in range(20) for batch in range(20)]).numpy()
    assert stats.pearsonr(draws[:-1].ravel(), draws[1:].ravel()).pvalue > P


def test_a_training_batch_draws_the_same_laws_from_a_generator() -> None:
    rng = BatchRandom(derived_generator(torch.device("cpu"), 0), 100)
    uniform, normal = rng.uniform(100, low=-2, high=3), rng.normal(100)
    assert uniform.shape == normal.shape == (100, 100)
    assert stats.kstest(uniform.flatten().numpy(), "uniform", args=(-2, 5)).pvalue > P
    assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > P
