"""SPSA, SignHunter and Bandits against closed forms; what all query attacks cost, refuse and see through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchattacks
from ensdef.attacks._queries import blocks
from torch import Tensor, nn
from toys_queries import (
    PIXELS,
    SHAPE,
    Masked,
    attacked,
    build,
    decisions,
    difference,
    images,
    linear,
    margins,
    trained_network,
)

from ensdef.errors import UsageError
from ensdef.registry import ATTACKS
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.threat import Threat

ROUNDING = {"rtol": 0.0, "atol": 3e-7}


class Listens(nn.Module):
    """A model that writes down what it is asked."""

    heard: list[Tensor] = []  # noqa: RUF012 - of the class, so that deep copies share it

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.heard.clear()

    def forward(self, x: Tensor) -> Tensor:
        self.heard.append(x.detach().clone())
        scores: Tensor = self.model(x)
        return scores


# --- spsa -----------------------------------------------------------------------------------------


def test_a_pair_of_spsa_is_exact_along_its_direction_on_a_linear_model() -> None:
    model, x = linear(), images(20)
    y = decisions(model, x)
    ascent = -difference(model, y)
    estimate = build("spsa", samples=2).gradient(Target(model), x, y, KeyedRandom(0, torch.arange(20)))
    size = estimate.abs().flatten(1)
    torch.testing.assert_close(size, size[:, :1].expand(-1, PIXELS))  # a multiple of a vector of signs
    along = (estimate.sign() * ascent).flatten(1).sum(dim=1)
    torch.testing.assert_close(along, size[:, 0], rtol=1e-3, atol=1e-3)


def test_the_error_of_spsa_is_the_root_of_dimensions_over_pairs() -> None:
    model, x = linear(), images(100)
    y = decisions(model, x)
    ascent = -difference(model, y)
    for pairs in (12, 200):
        estimate = build("spsa", samples=2 * pairs).gradient(Target(model), x, y, KeyedRandom(0, torch.arange(100)))
        error = (estimate - ascent).flatten(1).norm(dim=1) / ascent.flatten(1).norm(dim=1)
        assert float(error.mean()) == pytest.approx((PIXELS / pairs) ** 0.5, rel=0.1)
        assert float((estimate - ascent).mean(dim=0).abs().mean()) < 0.2 * float((estimate - ascent).abs().mean())


def test_spsa_moves_as_adam_on_its_own_estimates() -> None:
    model, x = linear(), images(10)
    y = decisions(model, x)
    attack, target, rng = build("spsa", samples=8), Target(model), KeyedRandom(3, torch.arange(10))
    state = {"mean": torch.zeros_like(x), "square": torch.zeros_like(x)}
    point, ours = x.clone(), x
    adam = torch.optim.Adam([point], lr=0.01)
    for step in range(1, 6):
        point.grad = -attack.gradient(target, point, y, rng.at(step=step))
        adam.step()
        ours, state = attack.step(target, ours, y, state, Threat("linf", 1.0), rng.at(step=step))
    torch.testing.assert_close(ours, point, rtol=0, atol=1e-4)


def test_spsa_draws_the_same_directions_however_many_images_share_a_pass() -> None:
    model, x = linear(), images(300)
    y = decisions(model, x)
    attack, ids = build("spsa", samples=6), torch.arange(300)
    whole = attack.gradient(Target(model), x, y, KeyedRandom(0, ids))
    few = attack.gradient(Target(model), x[:20], y[:20], KeyedRandom(0, ids[:20]))
    torch.testing.assert_close(whole[:20], few, rtol=1e-3, atol=1e-3)
    assert bool((whole[:20].sign() == few.sign()).float().mean() > 0.99)


def test_spsa_breaks_as_many_images_as_torchattacks_does_on_the_same_budget() -> None:
    model, x, y = trained_network()
    clean = decisions(model, x) == y
    ours = attacked(model, x, y, "spsa", 0.15, steps=15, samples=32, random_start=False, success="last").robust
    theirs = torchattacks.SPSA(model, eps=0.15, nb_iter=15, nb_sample=16)(x, y)
    robust = clean & (decisions(model, theirs) == y)
    assert 20 < int(robust.sum()) < int(clean.sum()) - 20
    assert abs(int(ours.sum()) - int(robust.sum())) <= 8


# --- signhunter -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["hwc", "chw"])
def test_after_a_full_pass_the_signs_are_those_against_the_weights(order: str) -> None:
    model, x = linear(), images(30)
    y = decisions(model, x)
    queries = 1 + len(blocks(PIXELS, x.device))  # the start, and every block
    outcome = attacked(model, x, y, "signhunter", 0.1, queries=queries, order=order, success="last")
    torch.testing.assert_close(outcome.x_adv, x - 0.1 * difference(model, y).sign(), **ROUNDING)


def test_with_two_classes_signhunter_finds_the_exact_robust_set() -> None:
    model, x = linear(), images(100, -0.2, 1.2).clamp(0, 1)
    y = decisions(model, x)
    for eps in (0.02, 0.05):
        exact = model.exactly_robust(x, y, eps)
        assert 0 < int(exact.sum()) < len(x)
        assert torch.equal(attacked(model, x, y, "signhunter", eps, queries=110).robust, exact)


def test_a_full_pass_over_a_power_of_two_has_one_flip_less_than_twice_the_coordinates() -> None:
    bounds = blocks(64, torch.device("cpu"))
    assert len(bounds) == 127
    assert bounds[:4].tolist() == [[0, 64], [0, 32], [32, 64], [0, 16]]
    assert bounds[-64:].tolist() == [[pixel, pixel + 1] for pixel in range(64)]


def test_blocks_of_an_uneven_image_cover_every_level_without_gaps() -> None:
    bounds = blocks(3072, torch.device("cpu")).tolist()
    assert [end - first for first, end in bounds[255:500]] == [12] * 245, "500 queries end among blocks of twelve"
    level: list[list[int]] = []
    for first, end in bounds:
        assert first == (level[-1][1] if level else 0)
        level = [*level, [first, end]] if end < 3072 else []
    assert level == []
    assert all(first < end for first, end in bounds)


@pytest.mark.parametrize("order", ["hwc", "chw"])
def test_the_order_says_which_half_is_flipped_first(order: str) -> None:
    model = Listens(linear())
    x = torch.full((16, *SHAPE), 0.5)
    attacked(model, x, decisions(model, x), "signhunter", 0.1, queries=4, order=order, success="last")
    asked = [point for point in Listens.heard if not bool((point == 0.5).all())]
    signs = [((point - 0.5) / 0.1).round() for point in asked[:3]]
    assert bool((signs[0] == 1).all())
    assert torch.equal(signs[1], -signs[0])
    upper = torch.zeros(SHAPE, dtype=torch.bool)
    if order == "hwc":
        upper[:, :2] = True  # the upper rows of every channel
    else:
        upper[0] = upper[1, :2] = True  # the first channel and half of the second
    assert bool((signs[2][0][upper] == -signs[2][0][~upper][0]).all())
    assert bool((signs[2][0][~upper] == signs[2][0][~upper][0]).all())


def test_in_l2_signhunter_moves_every_coordinate_by_the_same_length() -> None:
    model, x = linear(), images(20)
    y = decisions(model, x)
    x_adv = attacked(model, x, y, "signhunter", 0.5, "l2", queries=104, success="last").x_adv
    torch.testing.assert_close(x_adv, x - 0.5 / PIXELS**0.5 * difference(model, y).sign(), **ROUNDING)


# --- bandits --------------------------------------------------------------------------------------


def test_the_prior_of_bandits_is_a_grid_over_the_image() -> None:
    model, x = linear(), images(30)
    x_adv = attacked(model, x, decisions(model, x), "bandits", 0.1, queries=10, grid=2, success="last").x_adv
    cells = (x_adv - x).view(30, 3, 2, 2, 2, 2)
    torch.testing.assert_close(cells, cells[:, :, :, :1, :, :1].expand_as(cells), rtol=0, atol=1e-6)
    assert bool((cells[:, :, 0, 0, 0, 0] != cells[:, :, 1, 0, 1, 0]).any())


def test_the_linf_prior_takes_exponentiated_gradient_steps() -> None:
    model, x = linear(), images(10)
    y = decisions(model, x)
    attack, rng = build("bandits", exploration=0.5), KeyedRandom(0, torch.arange(10))
    kept = torch.randn(10, *SHAPE) / 2
    prior = torch.tanh(kept)
    learnt = attack.learnt(Target(model), x, y, kept, Threat("linf", 0.1), rng.at(step=1))
    noise = rng.at(step=1).normal(*SHAPE) / PIXELS**0.5
    losses = []
    for probe in (prior + 0.5 * noise, prior - 0.5 * noise):
        scores = model(x + 0.01 * probe / probe.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).detach()
        losses.append(nn.functional.cross_entropy(scores, y, reduction="none"))
    delta = ((losses[0] - losses[1]) / (0.01 * 0.5)).view(-1, 1, 1, 1) * noise
    up, down = (1 + prior) / 2 * torch.exp(0.1 * delta), (1 - prior) / 2 * torch.exp(-0.1 * delta)
    torch.testing.assert_close(torch.tanh(learnt), 2 * up / (up + down) - 1, rtol=0, atol=1e-4)
    assert float((torch.tanh(learnt) - prior).abs().max()) > 1e-3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_bandits_learn_a_direction_that_raises_the_loss(norm: str) -> None:
    model, x = linear(), images(100)
    y = decisions(model, x)
    ascent = -difference(model, y)
    eps = 0.05 if norm == "linf" else 0.3
    moved = attacked(model, x, y, "bandits", eps, norm, queries=1000, success="last").x_adv - x
    best = eps * (ascent.abs().flatten(1).sum(dim=1) if norm == "linf" else ascent.flatten(1).norm(dim=1))
    assert float(((moved * ascent).flatten(1).sum(dim=1) / best).mean()) > 0.75


@pytest.mark.parametrize("name", ["spsa", "simba", "bandits"])
def test_a_random_attack_breaks_most_of_what_can_be_broken_and_nothing_else(name: str) -> None:
    model, x = linear(), images(100, -0.2, 1.2).clamp(0, 1)
    y = decisions(model, x)
    exact = model.exactly_robust(x, y, 0.05)
    budget = {"steps": 20, "samples": 32} if name == "spsa" else {"queries": 1000}
    robust = attacked(model, x, y, name, 0.05, **budget).robust
    assert bool(robust[exact].all())
    assert int((robust & ~exact).sum()) <= 0.15 * int((~exact).sum())


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("spsa", {"steps": 50, "samples": 128}, 50 * (128 + 1) + 1),  # 6,400 questions, 50 looks, the last judgement
        ("signhunter", {}, 500 + 1),
        ("simba", {"queries": 45}, 45 + 1),
        ("bandits", {"queries": 60}, 30 * (2 + 1) + 1),
    ],
)
def test_an_image_that_is_never_fooled_costs_the_passes_that_are_documented(
    name: str, params: dict[str, Any], expected: int
) -> None:
    model, x = linear(10), images(8)
    outcome = attacked(model, x, decisions(model, x), name, 1e-6, **params)
    assert bool(outcome.robust.all())
    assert outcome.forwards == 8 * expected
    assert outcome.backwards == 0


QUICK: dict[str, dict[str, Any]] = {
    "square": {"queries": 100},
    "spsa": {"steps": 8, "samples": 32},
    "signhunter": {"queries": 130},
    "simba": {"queries": 130},
    "bandits": {"queries": 300},
    "rays": {"queries": 300},
}


@pytest.mark.parametrize("name", QUICK)
def test_a_query_attack_breaks_a_model_whose_gradient_is_masked_and_pgd_does_not(name: str) -> None:
    model, x, y = trained_network()
    masked = Masked(model)
    blind = attacked(masked, x, y, "pgd", 0.15, random_start=False, steps=10)
    assert torch.equal(blind.robust, blind.clean)
    broken = attacked(masked, x, y, name, 0.15, **QUICK[name])
    assert int(broken.robust.sum()) <= int(broken.clean.sum()) - 20
    assert bool((margins(model, broken.x_adv, y)[broken.clean & ~broken.robust] > 0).all())
    assert broken.backwards == 0


@pytest.mark.parametrize("name", QUICK)
def test_a_point_where_the_target_gives_nan_counts_as_fooled_and_crashes_nothing(name: str) -> None:
    class Fragile(nn.Module):
        """Finite on clean images of even brightness alone."""

        def forward(self, x: Tensor) -> Tensor:
            scores = torch.stack([x.flatten(1).mean(dim=1) * 0 + 2, x.flatten(1).mean(dim=1) * 0], dim=1)
            odd = (x - 0.5).flatten(1).abs().amax(dim=1) > 1e-3
            return torch.where(odd[:, None], torch.nan, scores)

    x = torch.full((20, *SHAPE), 0.5)
    outcome = attacked(Fragile(), x, torch.zeros(20, dtype=torch.int64), name, 1.0, **QUICK[name])
    if name == "bandits":  # both its probes are NaN, so it learns no direction and stays at the image
        assert torch.equal(outcome.x_adv, x)
    else:
        assert not bool(outcome.robust.any())
        assert outcome.nonfinite > 0


@pytest.mark.parametrize("name", ["square", "signhunter", "simba", "bandits", "rays"])
@pytest.mark.parametrize("queries", [0, -1])
def test_a_budget_of_nothing_is_refused_by_name(name: str, queries: int) -> None:
    with pytest.raises(UsageError, match=f"{name}: queries is {queries}; expected at least"):
        attacked(linear(), images(1), torch.zeros(1, dtype=torch.int64), name, 0.1, queries=queries)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("spsa", {"samples": 7}, "samples is 7; expected an even number"),
        ("spsa", {"samples": 0}, "samples is 0; expected at least 2"),
        ("spsa", {"steps": -1}, "steps is -1"),
        ("spsa", {"delta": 0}, "delta is 0.0; expected a number above 0"),
        ("spsa", {"lr": -0.1}, "lr is -0.1; expected a number above 0"),
        ("signhunter", {"order": "whc"}, r"signhunter\[order\] is 'whc'; expected one of hwc, chw"),
        ("simba", {"basis": "wavelet"}, r"simba\[basis\] is 'wavelet'; expected one of pixel, dct"),
        ("simba", {"step_size": "-0.1"}, "step_size is -0.1"),
        ("bandits", {"grid": 0}, "grid is 0; expected at least 1"),
        ("bandits", {"exploration": 0}, "exploration is 0.0; expected a number above 0"),
        ("bandits", {"queries": 1}, "queries is 1; expected at least 2"),
        ("spsa", {"queries": 5}, "spsa has no parameter 'queries'; it has: steps, samples"),
    ],
)
def test_impossible_parameters_are_refused_by_name(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        attacked(linear(), images(1), torch.zeros(1, dtype=torch.int64), name, 0.1, **params)


def test_spsa_has_no_l2() -> None:
    with pytest.raises(UsageError, match="spsa cannot be run in l2"):
        attacked(linear(), images(1), torch.zeros(1, dtype=torch.int64), "spsa", 0.1, "l2")


@pytest.mark.parametrize(("name", "params"), [("bandits", {}), ("simba", {"basis": "dct"})])
def test_attacks_that_need_rows_and_columns_refuse_other_images(name: str, params: dict[str, Any]) -> None:
    x = images(2, shape=(48,))
    with pytest.raises(UsageError, match="channels, height, width"):
        attacked(linear(shape=(48,)), x, decisions(linear(shape=(48,)), x), name, 0.1, **params)


@pytest.mark.parametrize("name", ["spsa", "signhunter", "simba", "rays"])
def test_the_others_take_images_of_any_shape(name: str) -> None:
    model, x = linear(shape=(48,)), images(30, shape=(48,))
    outcome = attacked(model, x, decisions(model, x), name, 0.05, **QUICK[name])
    assert 0 < int(outcome.robust.sum()) < 30


def test_every_query_attack_says_that_it_needs_no_gradient() -> None:
    access = {name: ATTACKS.get(name).access for name in QUICK}
    assert access == {**dict.fromkeys(QUICK, "score"), "rays": "decision"}
