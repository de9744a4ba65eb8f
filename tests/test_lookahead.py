"""Asking ahead: what a random search asks next if refused goes along in the same batch, and changes no result."""

from __future__ import annotations

import pytest
import torch
from ensdef.attacks.square import SquareSearch
from torch import Tensor, nn
from toys_queries import attacked, decisions, images, linear, trained_network

from ensdef.attack import IterativeAttack, State
from ensdef.attack_spec import AttackSpec
from ensdef.errors import AttackError
from ensdef.harness import Outcome, attack_model
from ensdef.lookahead import Lookahead
from ensdef.registry import ATTACKS
from ensdef.rng import KeyedRandom
from ensdef.rows import SMALLEST_BATCH, Rows
from ensdef.target import Target
from ensdef.threat import Threat

both_norms = pytest.mark.parametrize("norm", ["linf", "l2"])
EPS = {"linf": 0.02, "l2": 0.1}


def one_by_one(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: Tensor, y: Tensor, spec: AttackSpec) -> Outcome:
    with monkeypatch.context() as patch:
        patch.setattr(Lookahead, "depth", lambda self, rows: 1)
        return attack_model(model, x, y, spec)


def same(one: Outcome, other: Outcome) -> None:
    assert torch.equal(one.robust, other.robust)
    assert torch.equal(one.x_adv, other.x_adv)
    assert (one.forwards, one.backwards) == (other.forwards, other.backwards)


@both_norms
@pytest.mark.parametrize("count", [1, 5, 17, 60])
def test_asking_ahead_changes_neither_points_nor_passes(norm: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = linear(10), images(count)
    y = decisions(model, x)
    spec = AttackSpec.create("square", {"queries": 60, "restarts": 2}, norm, EPS[norm])
    ahead = attack_model(model, x, y, spec)
    same(ahead, one_by_one(monkeypatch, model, x, y, spec))
    if count == 60:
        assert 0 < int(ahead.robust.sum()) < count


@pytest.mark.parametrize("search", ["fp32", "bf16", "bf16+fp32"])
def test_nor_does_it_on_a_network_whose_kernels_round_by_batch_size(
    search: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = trained_network()
    spec = AttackSpec.create("square", {"queries": 80}, "linf", 0.1, search=search)
    few = slice(0, 24)
    ahead = attack_model(model, x[few], y[few], spec)
    same(ahead, one_by_one(monkeypatch, model, x[few], y[few], spec))
    assert 0 < int(ahead.robust.sum()) < 24


class Counting(nn.Module):
    """Counts its calls, copies of it included."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("calls", torch.zeros(1))

    def __deepcopy__(self, memo: dict[int, object]) -> Counting:
        copy = Counting(self.model)
        copy.calls = self.calls
        return copy

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        assert len(x) <= 128
        scores: Tensor = self.model(x)
        return scores


@pytest.mark.parametrize("count", [1, 6])
def test_few_images_fill_their_batches_with_their_own_questions(count: int) -> None:
    x = images(count)
    model = Counting(linear(10))
    y = decisions(model.model, x)
    assert bool(attacked(model, x, y, "square", 1e-4, queries=400).robust.all())
    # a refusal is all but certain at this radius from the moment the best corner is found
    assert float(model.calls) < 400 / 2
    assert float(model.calls) > 400 * count / 128


@both_norms
def test_square_foresees_what_it_would_ask_if_all_were_refused(norm: str) -> None:
    x = images(20)
    y = torch.zeros(len(x), dtype=torch.int64)
    threat, target = Threat(norm, EPS[norm]), Target(linear())
    search = SquareSearch(ATTACKS.get("square").Params())
    rng = KeyedRandom(3, torch.arange(len(x)))
    state = search.start(target, x, y, threat, rng)
    x_adv = state.pop("x_adv")
    state["best_loss"] = torch.full((len(x),), torch.inf)  # nothing is better
    foreseen = [search.foresee(x_adv, state, threat, rng.at(step=step)) for step in (1, 2, 3)]
    for step, guess in enumerate(foreseen, start=1):
        x_adv, state = search.step(target, x_adv, y, state, threat, rng.at(step=step))
        assert torch.equal(x_adv, guess)
        target.forget()


def broken(what: Tensor | float | None) -> type[SquareSearch]:
    class Misled(SquareSearch):
        def foresee(self, x_adv: Tensor, state: State, threat: Threat, rng: KeyedRandom) -> Tensor:
            if what is None:
                return x_adv[:1]
            return torch.full_like(x_adv, float(what))

    return Misled


def test_a_wrong_guess_costs_time_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = linear(10), images(9)
    y = decisions(model, x)
    spec = AttackSpec.create("square", {"queries": 60}, "linf", 0.02)
    right = attack_model(model, x, y, spec)
    # a guess that would fool if anybody counted it
    monkeypatch.setattr("ensdef.attacks.square.SquareSearch", broken(1.0))
    same(attack_model(model, x, y, spec), right)
    assert bool(right.robust.any())


def test_under_last_nothing_is_asked_ahead() -> None:
    """The health report looks at every point on the way there."""
    x = images(1)
    model = Counting(linear(10))
    attacked(model, x, decisions(model.model, x), "square", 1e-4, queries=50, success="last")
    assert float(model.calls) >= 50


@pytest.mark.parametrize(("what", "message"), [(None, "returned"), (torch.nan, "NaN")])
def test_a_guess_that_is_no_point_is_an_error(
    what: float | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images(9)
    monkeypatch.setattr("ensdef.attacks.square.SquareSearch", broken(what))
    with pytest.raises(AttackError, match=message):
        attacked(linear(10), x, decisions(linear(10), x), "square", 0.02, queries=20)


def ahead(possible: bool, room: int = 128) -> Lookahead:
    attack = SquareSearch(ATTACKS.get("square").Params()) if possible else ATTACKS.get("pgd")()
    assert isinstance(attack, IterativeAttack)
    return Lookahead(attack, Threat("linf", 0.1), lambda points, x: points, 0, torch.arange(4), room)


def test_an_attack_that_foresees_nothing_asks_nothing_ahead() -> None:
    assert [ahead(False).depth(rows(count)) for count in (1, 16, 128)] == [1, 1, 1]


def rows(count: int, step: int = 0) -> Rows:
    """Runs of which some are at a later step than others."""
    index = torch.arange(count)
    steps = torch.full_like(index, step).where(index % 2 == 0, torch.zeros_like(index))
    x = torch.zeros(count, 1)
    return Rows(index, index, steps, index < 0, x, index, x, x)


def test_a_small_batch_is_filled_whatever_the_odds_and_a_full_one_never() -> None:
    assert ahead(True).depth(rows(1)) == SMALLEST_BATCH
    assert ahead(True).depth(rows(5)) == 4
    assert ahead(True).depth(rows(128)) == 1


@pytest.mark.parametrize("count", range(1, 20))
def test_a_batch_never_has_more_rows_than_there_is_room_for(count: int) -> None:
    assert count * ahead(True, room=16).depth(rows(count)) <= max(16, count)


def test_nothing_is_asked_beyond_the_last_step() -> None:
    queries = ATTACKS.get("square").Params().queries
    assert ahead(True).depth(rows(2, step=queries - 3)) == 3
    assert ahead(True).depth(rows(2, step=queries - 1)) == 1


def test_it_looks_further_ahead_when_answers_become_predictable() -> None:
    look = ahead(True)
    assert look.depth(rows(20)) == 2
    look.surprises = 0.01
    assert look.depth(rows(20)) == 6
    look.surprises = 0.1
    assert look.depth(rows(20)) == 2
