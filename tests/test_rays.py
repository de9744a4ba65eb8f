"""RayS: the distance it ends at, what it looks at, and what it costs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from toys_queries import PIXELS, attacked, build, decisions, difference, images, linear, trained_network

from ensdef.attack import State
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.threat import Threat

#: The end of a search for the radius, per coordinate.
TOLERANCE = 1e-3 / PIXELS**0.5


def driven(model: nn.Module, x: Tensor, y: Tensor, queries: int) -> tuple[State, list[Tensor]]:
    """All questions without a stop at a radius: the last state, and the questions."""
    attack = build("rays", queries=queries)
    target, threat = Target(model), Threat("linf", 0.0)
    rng = KeyedRandom(0, torch.arange(len(x)))
    state = attack.start(target, x, y, threat, rng)
    point, questions = state.pop("x_adv"), []
    for step in range(1, queries + 1):
        questions.append(point)
        point, state = attack.step(target, point, y, state, threat, rng.at(step=step))
        target.forget()
    return state, questions


def exact_distance(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """|m| / ||D||_1, where the box is far."""
    scores = model(x).detach()
    margin = (scores.gather(1, y[:, None]) - scores.gather(1, 1 - y[:, None])).squeeze(1)
    return margin / difference(model, y).flatten(1).abs().sum(dim=1)


def test_after_a_pass_over_single_coordinates_the_radius_is_the_distance_to_the_boundary() -> None:
    model, x = linear(), images(30)
    y = decisions(model, x)
    state, _ = driven(model, x, y, 1100)
    assert bool((state["block"] > 103).all())
    exact = exact_distance(model, x, y)
    assert float(exact.max()) < 0.3
    # a coordinate that gains less than the tolerance is not flipped
    assert bool((state["radius"] >= exact - 1e-6).all())
    assert bool((state["radius"] <= exact * 1.02 + 2 * TOLERANCE).all())


def test_the_radius_never_grows_and_its_ray_is_adversarial() -> None:
    model, x, y = trained_network()
    rows = decisions(model, x) == y
    x, y = x[rows][:40], y[rows][:40]
    before = torch.full((40,), 2.0)
    for queries in (5, 30, 120):
        state, _ = driven(model, x, y, queries)
        radius = state["radius"]
        assert bool((radius <= before).all())
        found = radius < 2
        ends = (x + radius.view(-1, 1, 1, 1) * state["signs"]).clamp(0, 1)
        assert bool((decisions(model, ends)[found] != y[found]).all())
        before = radius
    assert bool(found.all())
    assert float(radius.mean()) < 0.5


def test_questions_are_asked_in_the_box_and_not_in_the_ball() -> None:
    model, x = linear(), images(10)
    _, questions = driven(model, x, decisions(model, x), 40)
    points = torch.stack(questions)
    assert float(points.min()) == 0
    assert float(points.max()) == 1
    assert torch.equal(questions[0], torch.zeros_like(x)), "the first: every pixel as far down as it goes"


def test_with_two_classes_the_robust_set_is_exact_up_to_the_tolerance() -> None:
    model, x = linear(), images(50)
    y = decisions(model, x)
    exact = exact_distance(model, x, y)
    eps = 0.03
    clear = (exact - eps).abs() > 0.02 * eps + 2 * TOLERANCE
    robust = attacked(model, x, y, "rays", eps, queries=1100).robust
    assert 0 < int((exact < eps).sum()) < 50
    assert int(clear.sum()) > 40
    assert torch.equal(robust[clear], (exact > eps)[clear])


def test_in_l2_success_is_judged_by_the_l2_distance() -> None:
    model, x = linear(), images(50)
    y = decisions(model, x)
    # the rays go along vectors of signs, whose l2 length is sqrt(d) times their linf length
    length = exact_distance(model, x, y) * PIXELS**0.5
    eps = 0.2
    clear = (length - eps).abs() > 0.02 * eps + 2e-3
    outcome = attacked(model, x, y, "rays", eps, "l2", queries=1100)
    assert 0 < int((length < eps).sum()) < 50
    assert torch.equal(outcome.robust[clear], (length > eps)[clear])
    distance = Threat("l2", eps).distance(outcome.x_adv, x)
    assert bool((distance[~outcome.robust] <= eps + 1e-6).all())


def test_only_the_decision_is_looked_at() -> None:
    class Decision(nn.Module):
        """Nothing but the chosen class."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            scores = self.model(x)
            return 5 * nn.functional.one_hot(scores.argmax(dim=1), scores.shape[1]).float() - 1

    model, x, y = trained_network()
    full, hard = (attacked(shown, x, y, "rays", 0.15, queries=200) for shown in (model, Decision(model)))
    assert torch.equal(full.x_adv, hard.x_adv)
    assert torch.equal(full.robust, hard.robust)
    assert 0 < int(full.robust.sum()) < int(full.clean.sum())


def test_a_run_ends_within_its_queries_and_stops_at_the_radius() -> None:
    model, x = linear(10), images(20)
    y = decisions(model, x)
    whole = attacked(model, x, y, "rays", 1e-6, queries=80, success="last")
    assert whole.forwards == 20 * (80 + 1)
    early = attacked(model, x, y, "rays", 0.3, queries=80)
    assert not bool(early.robust.any())
    assert early.forwards < 0.5 * whole.forwards


def test_the_last_point_is_the_shortest_one_projected_onto_the_ball() -> None:
    model, x = linear(), images(40)
    y = decisions(model, x)
    exact = exact_distance(model, x, y)
    eps = 0.05
    state, _ = driven(model, x, y, 150)
    # rays that are adversarial at eps though the search for their radius has not come down to it
    fooled = decisions(model, Threat("linf", eps).project(x + eps * state["signs"], x)) != y
    robust = attacked(model, x, y, "rays", eps, queries=150, success="last").robust
    assert torch.equal(robust, ~fooled)
    assert bool((exact[fooled] <= eps).all())
    assert 0 < int(fooled.sum()) < 40
