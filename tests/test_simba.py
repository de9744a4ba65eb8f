"""SimBA: what it tries, in which order, and where it ends on a linear model."""

from __future__ import annotations

import pytest
import torch
from ensdef.attacks._queries import log_odds
from ensdef.attacks.simba import cosines
from scipy.fft import dct
from toys_queries import PIXELS, attacked, build, decisions, difference, images, linear

from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.testing import LinearClassifier
from ensdef.threat import Threat


def test_every_pixel_that_simba_tried_lies_against_its_weight() -> None:
    model, x = linear(), images(30)
    y = decisions(model, x)
    against = -0.1 * difference(model, y).sign()
    for queries in (20, 2 * PIXELS + 1):
        moved = attacked(model, x, y, "simba", 0.1, queries=queries, success="last").x_adv - x
        touched = moved.abs() > 1e-3
        torch.testing.assert_close(moved[touched], against[touched], rtol=0, atol=1e-6)
        assert bool((moved[~touched].abs() < 1e-6).all())
        count = touched.flatten(1).sum(dim=1)
        # one question for the image, one or two for a pixel
        assert bool((count >= (queries - 1) // 2).all())
        assert bool((count <= min(queries - 1, PIXELS)).all())
    assert bool(touched.all())


def test_simba_tries_each_direction_once_and_every_image_in_an_order_of_its_own() -> None:
    x = images(30)
    y = torch.zeros(30, dtype=torch.int64)
    rng = KeyedRandom(0, torch.arange(30))
    order = build("simba").start(Target(linear()), x, y, Threat("linf", 0.1), rng)["order"]
    assert torch.equal(order.sort(dim=1).values, torch.arange(PIXELS).expand(30, -1))
    assert len(order.unique(dim=0)) == 30


def test_simba_ends_when_every_direction_was_tried() -> None:
    model, x = linear(10), images(20)
    outcome = attacked(model, x, decisions(model, x), "simba", 1e-6)
    assert outcome.forwards <= 20 * (2 * PIXELS + 2)
    assert outcome.forwards >= 20 * (PIXELS + 2)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_the_cosines_are_those_of_scipy(size: int) -> None:
    expected = torch.tensor(dct(torch.eye(size).numpy(), axis=0, norm="ortho"))
    torch.testing.assert_close(cosines(size, torch.device("cpu")), expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_cosine_directions_are_waves_of_one_channel(norm: str) -> None:
    attack = build("simba", basis="dct")
    x = images(1, shape=(2, 4, 6)).repeat(48, 1, 1, 1)
    waves = attack.direction(torch.arange(48)[:, None], x, norm)
    size = waves.flatten(1).abs().amax(dim=1) if norm == "linf" else waves.flatten(1).norm(dim=1)
    torch.testing.assert_close(size, torch.ones(48))
    flat = waves.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.diag(flat.square().sum(dim=1)), rtol=0, atol=1e-5)
    assert bool(((waves.abs() > 1e-6).flatten(2).any(dim=2).sum(dim=1) == 1).all())


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_in_l2_accepted_steps_are_orthogonal_until_the_ball_is_full(basis: str) -> None:
    model, x = linear(), images(30)
    y = decisions(model, x)
    x_adv = attacked(model, x, y, "simba", 0.5, "l2", queries=19, basis=basis, success="last").x_adv
    parts = ((x_adv - x).flatten(1).norm(dim=1) / 0.05).square()
    torch.testing.assert_close(parts, parts.round(), rtol=0, atol=1e-3)
    assert bool((parts.round() >= 9).all())
    assert bool((parts.round() <= 18).all())


def test_simba_works_where_the_true_probability_is_rounded_to_one() -> None:
    weak, x = linear(), images(60)
    y = decisions(weak, x)
    sure = LinearClassifier(weak.weight.detach() * 1000, weak.bias.detach() * 1000)
    assert bool((sure(x).softmax(dim=1).gather(1, y[:, None]) == 1).float().mean() > 0.9)
    ends = [attacked(model, x, y, "simba", 0.03, success="last").robust for model in (weak, sure)]
    assert 0 < int(ends[0].sum()) < 60
    assert torch.equal(ends[0], ends[1])


def test_log_odds_rise_as_the_true_probability_falls() -> None:
    scores, y = torch.randn(50, 5, dtype=torch.float64), torch.randint(0, 5, (50,))
    true = scores.softmax(dim=1).gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(log_odds(scores, y), torch.log((1 - true) / true))
