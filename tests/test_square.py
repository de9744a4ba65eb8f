"""Square: its proposals, its schedule, and the official implementation beside it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from ensdef.attacks import _pyramids, square
from ensdef.attacks._pyautoattack import as_plain_model
from ensdef.attacks._pyramids import stamp
from ensdef.attacks.square import SquareSearch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn
from toys_queries import (
    Masked,
    attacked,
    decisions,
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

Params = ATTACKS.get("square").Params
both_norms = pytest.mark.parametrize("norm", ["linf", "l2"])


def first_and_next(
    x: Tensor, threat: Threat, step: int = 1, seed: int = 0, **params: Any
) -> tuple[SquareSearch, Tensor, Tensor]:
    """The starting points, and the proposals that follow them at a step."""
    search = SquareSearch(Params(**params))
    rng = KeyedRandom(seed, torch.arange(len(x)))
    state = search.start(Target(linear()), x, torch.zeros(len(x), dtype=torch.int64), threat, rng)
    first = threat.project(state.pop("x_adv"), x)
    kept = {**state, "best": first}
    proposal, _ = search.propose(torch.ones(len(x), dtype=torch.bool), kept, threat, rng.at(step=step))
    return search, first, threat.project(proposal, x)


# --- linf -----------------------------------------------------------------------------------------


def test_it_starts_from_vertical_stripes_in_corners_of_the_ball() -> None:
    x = images(50)
    _, first, _ = first_and_next(x, Threat("linf", 0.1))
    colours = ((first - x) / 0.1).round()
    torch.testing.assert_close(first, x + 0.1 * colours, rtol=0, atol=1e-6)
    assert bool((colours.abs() == 1).all())
    assert bool((colours == colours[:, :, :1]).all()), "one colour a column"
    assert bool((colours != colours[:, :1]).any()), "each channel has its own"


def test_a_proposal_repaints_one_square_with_one_colour_a_channel() -> None:
    x = images(200, shape=(2, 9, 9))
    for step, side in ((1, 8), (60, 4), (9000, 1)):
        _, first, proposal = first_and_next(x, Threat("linf", 0.1), step)
        changed = ((proposal - first).abs() > 1e-3).any(dim=1)
        assert int(changed.any(dim=2).sum(dim=1).max()) <= side
        assert int(changed.any(dim=1).sum(dim=1).max()) <= side
        rows = changed.flatten(1).any(dim=1).nonzero().squeeze(1)
        assert len(rows) > 50
        colours = ((proposal - x) / 0.1).round()
        for row in rows[:50].tolist():
            for channel in range(2):
                repainted = (proposal - first)[row, channel].abs() > 1e-3
                assert len(colours[row, channel][repainted].unique()) <= 1


def test_squares_reach_the_last_row_and_column_which_the_official_ones_do_not() -> None:
    x = images(400, shape=(1, 6, 6))
    _, first, proposal = first_and_next(x, Threat("linf", 0.1), step=9000)
    often = ((proposal - first).abs() > 1e-3).float().mean(dim=(0, 1))
    assert bool((often > 0).all())
    assert float(often.max()) < 5 * float(often.min())


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("queries", [10_000, 5000, 1000])
def test_the_squares_shrink_as_the_official_ones_do(rescaled: bool, queries: int) -> None:
    params = Params(queries=queries, resc_schedule=rescaled)
    official = SquareAttack(None, n_queries=queries, p_init=params.p, resc_schedule=rescaled)
    proposals = torch.arange(0, queries, 5)
    halvings = params.halvings(proposals)
    expected = [round((official.p_selection(int(number)) * 32 * 32) ** 0.5) for number in proposals]
    assert [params.sides(32, 32, "linf")[count] for count in halvings] == expected


def test_it_never_leaves_the_corners_of_the_ball() -> None:
    model, x = linear(10), images(40)
    x_adv = attacked(model, x, decisions(model, x), "square", 0.02, queries=100).x_adv
    torch.testing.assert_close((x_adv - x).abs(), torch.full_like(x, 0.02), rtol=0, atol=1e-6)


def test_with_two_classes_it_finds_the_exact_robust_set() -> None:
    model, x = linear(), images(60)
    y = decisions(model, x)
    exact = model.exactly_robust(x, y, 0.03)
    assert 10 < int(exact.sum()) < 50
    # squares of a single pixel from the beginning
    assert torch.equal(attacked(model, x, y, "square", 0.03, queries=900, p=0.05).robust, exact)


# --- both norms -----------------------------------------------------------------------------------


@both_norms
def test_it_breaks_nothing_that_the_oracle_says_is_robust(norm: str) -> None:
    model, x = linear(10), images(100, -0.2, 1.2).clamp(0, 1)
    y = decisions(model, x)
    eps = 0.02 if norm == "linf" else 0.1
    robust = attacked(model, x, y, "square", eps, norm, queries=300).robust
    assert 0 < int((~robust).sum()) < 100
    if norm == "linf":
        exact = model.exactly_robust(x, y, eps)
    else:  # outside the box there would be more room, so that no image inside it is weaker
        apart = model.weight.detach()[y][:, None] - model.weight.detach()[None]
        scores = model(x).detach()
        room = scores.gather(1, y[:, None]) - scores - eps * apart.norm(dim=2)
        exact = (room.scatter(1, y[:, None], torch.inf) > 0).all(dim=1)
    assert int(exact.sum()) > 0
    assert bool(robust[exact].all())


@both_norms
def test_the_loss_never_falls_as_queries_are_added(norm: str) -> None:
    model, x = linear(10), images(40)
    y = decisions(model, x)
    eps = 0.005 if norm == "linf" else 0.03
    reached = [
        margins(model, attacked(model, x, y, "square", eps, norm, queries=n, success="last").x_adv, y)
        for n in (1, 4, 30, 200)
    ]
    for before, after in pairwise(reached):
        assert bool((after >= before - 1e-6).all())
        assert float((after - before).mean()) > 0


@both_norms
@pytest.mark.parametrize("shape", [(1, 7, 7), (2, 8, 5), (5, 3, 4)])
def test_images_of_any_channels_and_sides_are_attacked_up_to_the_radius(norm: str, shape: tuple[int, ...]) -> None:
    model, x = linear(4, shape=shape), images(20, shape=shape)
    eps = 0.01 if norm == "linf" else 0.05
    x_adv = attacked(model, x, decisions(model, x), "square", eps, norm, queries=40, success="last").x_adv
    distance = Threat(norm, eps).distance(x_adv, x)
    torch.testing.assert_close(distance, torch.full_like(distance, eps), rtol=0, atol=1e-6)


@both_norms
def test_every_image_has_squares_of_its_own(norm: str) -> None:
    x = images(1, shape=(1, 8, 8)).repeat(30, 1, 1, 1)
    _, first, proposal = first_and_next(x, Threat(norm, 0.1), step=60)
    assert len(first.flatten(1).unique(dim=0)) > 20
    assert len((proposal - first).flatten(1).unique(dim=0)) > 20


@pytest.mark.parametrize("side", range(1, 12))
def test_the_pyramids_of_l2_are_the_official_ones(side: int) -> None:
    official = SquareAttack(None, norm="L2", device=torch.device("cpu")).eta(side)
    ours = stamp(side)
    assert float(ours.norm()) == pytest.approx(1, abs=1e-6)
    assert any(torch.allclose(ours, other, atol=1e-6) for other in (official, official.T))


def official_place(side: Tensor, height: int, width: int, rng: KeyedRandom) -> tuple[Tensor, Tensor]:
    """The last row and column are reached by squares as large as the image alone."""
    return rng.bits() % (height - side).clamp_min(1), rng.bits() % (width - side).clamp_min(1)


@both_norms
def test_own_and_official_squares_break_as_many_images_when_placed_by_the_same_law(
    monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    model, x, y = trained_network()
    eps = 0.15 if norm == "linf" else 0.9
    official = attacked(model, x, y, "square", eps, norm, queries=200, implementation="official").robust
    everywhere = attacked(model, x, y, "square", eps, norm, queries=200).robust
    for module in (_pyramids, square):
        monkeypatch.setattr(module, "place", official_place)
    same = attacked(model, x, y, "square", eps, norm, queries=200).robust
    assert 30 < int(official.sum()) < 110
    assert abs(int(same.sum()) - int(official.sum())) <= 8
    # on images this small the edge that the official squares miss is a quarter of the pixels
    assert int(everywhere.sum()) < int(official.sum())


@pytest.mark.parametrize("implementation", ["own", "official"])
def test_it_breaks_a_model_whose_gradient_is_masked_and_pgd_does_not(implementation: str) -> None:
    model, x, y = trained_network()
    masked = Masked(model)
    assert torch.equal(attacked(masked, x, y, "pgd", 0.15, random_start=False).robust, decisions(model, x) == y)
    broken = attacked(masked, x, y, "square", 0.15, queries=100, implementation=implementation)
    assert int(broken.robust.sum()) <= int(broken.clean.sum()) - 20


# --- passes ---------------------------------------------------------------------------------------


def test_an_image_that_is_never_fooled_costs_its_queries_and_one_judgement() -> None:
    model, x = linear(10), images(20)
    outcome = attacked(model, x, decisions(model, x), "square", 1e-6, queries=50)
    assert outcome.forwards == 20 * 51
    assert outcome.backwards == 0


def test_the_official_one_costs_three_passes_more() -> None:
    # the clean image, the start and the final look, which are no queries there; and the judgement of the harness
    model, x = linear(10, shape=(3, 5, 5)), images(20, shape=(3, 5, 5))
    outcome = attacked(
        model, x, decisions(model, x), "square", 1e-6, queries=50, implementation="official", resc_schedule=True
    )
    assert outcome.forwards == 20 * 54


# --- the official implementation as a guest -------------------------------------------------------


class Remembers(nn.Module):
    """Hands out the one tensor it computed for an image of zeros, as a model with a static buffer does."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        return self.answer[: len(x)]


def test_what_the_model_returned_is_not_written_to() -> None:
    answer = torch.tensor([[2.0, 1.0, 0.0]]).repeat(40, 1)
    attack = SquareAttack(as_plain_model(Remembers(answer)), n_queries=3, eps=0.1, device=torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        attack.perturb(images(40), torch.zeros(40, dtype=torch.int64))
    assert bool(torch.isfinite(answer).all())


def test_the_plain_model_has_no_parameters_and_contiguous_answers_and_gradients() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(
        memory_format=torch.channels_last
    )
    plain = as_plain_model(Target(model))
    x = images(4).to(memory_format=torch.channels_last).requires_grad_()
    scores = plain(x)
    gradient = torch.autograd.grad(scores[:, 0].sum(), x)[0]
    assert list(plain.parameters()) == []
    assert not plain.training
    assert scores.dtype == torch.float32
    assert scores.is_contiguous()
    assert gradient.is_contiguous()
    torch.testing.assert_close(scores, model(x))
    torch.testing.assert_close(gradient, torch.autograd.grad(model(x)[:, 0].sum(), x)[0])


def test_the_attack_seed_reaches_the_official_implementation() -> None:
    model, x = linear(10, shape=(3, 5, 5)), images(20, shape=(3, 5, 5))
    y = decisions(model, x)
    given = {"queries": 5, "implementation": "official", "success": "last"}
    ends = [attacked(model, x, y, "square", 0.1, seed=seed, **given).x_adv for seed in (0, 0, 1)]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"queries": 0}, "queries is 0; expected at least 1"),
        ({"queries": -5}, "queries is -5"),
        ({"p": 0.0}, "p is 0.0"),
        ({"p": 1.5}, "p is 1.5"),
        ({"restarts": 0}, "restarts is 0"),
    ],
)
def test_impossible_parameters_are_refused_by_name(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Params(**params)


def test_an_unknown_implementation_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"square\[implementation\] is 'fast'; expected one of own, official"):
        attacked(linear(), images(1), torch.zeros(1, dtype=torch.int64), "square", 0.1, implementation="fast")


@pytest.mark.parametrize("shape", [(48,), (6, 8)])
def test_images_without_rows_and_columns_of_channels_are_refused(shape: tuple[int, ...]) -> None:
    x = images(2, shape=shape)
    with pytest.raises(UsageError, match="channels, height, width"):
        attacked(linear(shape=shape), x, decisions(linear(shape=shape), x), "square", 0.1, queries=2)


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 8, 6)])
def test_the_official_implementation_is_refused_where_it_would_crash(shape: tuple[int, ...]) -> None:
    x = images(2, shape=shape)
    with pytest.raises(UsageError, match="implementation=own"):
        attacked(linear(shape=shape), x, decisions(linear(shape=shape), x), "square", 0.1, implementation="official")


def test_the_parts_are_named_and_blamed() -> None:
    model, x = linear(), images(20)
    y = decisions(model, x)
    broken = attacked(model, x, y, "square", 0.3, queries=50)
    assert broken.broken_by == {"square": int((~broken.robust).sum())}
