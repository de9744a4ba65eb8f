"""One network against a union of perturbations: the l1 ball, the steepest of several moves, and what is trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ensdef.methods.baseline import Adversarial, AdversarialHyper
from ensdef.methods.union import (
    SPARSITY,
    AvgHyper,
    MaxHyper,
    MeanOfUnion,
    MultiSteepestDescent,
    UnionHyper,
    UnionTraining,
    WorstOfUnion,
    direction,
    steepest_descent,
    worst,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys_defense import CLASSES, SHAPE, generator, number, spread, toy_data, toy_setting

from ensdef.adversary import Adversary
from ensdef.build import create_defense
from ensdef.defense import Batch, EnsembleDefense
from ensdef.errors import UsageError
from ensdef.losses import cross_entropy
from ensdef.recipe import InnerAttack
from ensdef.rng import KeyedRandom
from ensdef.specs import TrainSpec
from ensdef.testing import LinearClassifier, lend_adversary
from ensdef.threat import Threat
from ensdef.training import train
from ensdef.weather import fog, snow

quick = settings(deadline=None, max_examples=60, derandomize=True)
EPS = 0.1
SEEDS = st.integers(0, 10**6)
HYPERS: dict[str, Any] = {"max": MaxHyper, "avg": AvgHyper, "msd": UnionHyper}
METHODS: dict[str, type[UnionTraining]] = {"max": WorstOfUnion, "avg": MeanOfUnion, "msd": MultiSteepestDescent}
FROM_THE_IMAGE = InnerAttack(steps=4, step_size="eps/2", start="zero")


def linear(seed: int = 0, classes: int = 2, size: int = 6) -> LinearClassifier:
    return LinearClassifier(torch.randn(classes, size, generator=generator(seed)))


def inside(count: int = 8, size: int = 6, seed: int = 1) -> Tensor:
    """Images so far from the edges of the box that no small ball reaches them."""
    return 0.4 + 0.2 * torch.rand(count, size, generator=generator(seed))


def batch(x: Tensor, classes: int = 2, seed: int = 0) -> Batch:
    return Batch(x, torch.arange(len(x)) % classes, torch.arange(len(x)), (), generator(seed))


def union(name: str, model: Any, attack: InnerAttack = FROM_THE_IMAGE, eps: float = EPS, **hyper: Any) -> Any:
    defense = METHODS[name]([model], HYPERS[name](**hyper))
    lend_adversary(defense, eps, attack=attack)
    return defense


def network(name: str, **hyper: Any) -> Any:
    defense = create_defense(
        name, architecture="small_resnet[width=4]", members=1, num_classes=CLASSES, image_shape=SHAPE, **hyper
    )
    spread(defense)
    return defense


def total(defense: EnsembleDefense, given_batch: Batch) -> Tensor:
    terms: Any = defense.loss(given_batch, 0.0)
    return torch.stack(list(terms.values())).sum()


# --- the l1 ball ----------------------------------------------------------------------------------


def bisected(delta: np.ndarray, eps: float) -> np.ndarray:
    """Projection of one perturbation onto the l1 ball: the shrinking threshold by bisection."""
    if np.abs(delta).sum() <= eps:
        return delta
    low, high = 0.0, float(np.abs(delta).max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(np.abs(delta) - middle, 0).sum() > eps else (low, middle)
    projected: np.ndarray = np.sign(delta) * np.maximum(np.abs(delta) - high, 0)
    return projected


@quick
@given(st.integers(1, 4), st.integers(1, 40), st.floats(1e-3, 20), st.floats(1e-3, 5), SEEDS)
def test_the_l1_projection_is_that_of_a_plain_rewrite(
    count: int, size: int, eps: float, scale: float, seed: int
) -> None:
    delta = scale * torch.randn(count, size, generator=generator(seed), dtype=torch.float64)
    x = torch.full_like(delta, 0.5)
    wide = Threat("l1", eps).project(x + delta, x)
    expected = np.stack([bisected(row, eps) for row in delta.numpy()]) + 0.5
    np.testing.assert_allclose(wide.numpy(), expected.clip(0, 1), atol=1e-9)


@quick
@given(st.floats(0, 10), SEEDS)
def test_a_point_projected_in_l1_is_in_ball_and_box_and_stays_when_projected_again(eps: float, seed: int) -> None:
    threat = Threat("l1", eps)
    x = torch.rand(3, 2, 4, 4, generator=generator(seed)).round(decimals=1)
    once = threat.project(x + torch.randn(x.shape, generator=generator(seed + 1)), x)
    assert float(threat.distance(once, x).max()) <= eps + 1e-5
    assert 0 <= float(once.min()) <= float(once.max()) <= 1
    torch.testing.assert_close(threat.project(once, x), once, atol=2e-6, rtol=0)


def test_an_l1_ball_of_no_radius_holds_the_image_alone() -> None:
    x = inside()
    torch.testing.assert_close(Threat("l1", 0.0).project(x + 0.1, x), x)


def test_the_l1_projection_shrinks_all_coordinates_alike() -> None:
    x = torch.full((1, 3), 0.5)
    moved = Threat("l1", 0.3).project(x + torch.tensor([[0.3, -0.2, 0.05]]), x)
    torch.testing.assert_close(moved - x, torch.tensor([[0.2, -0.1, 0.0]]))


@pytest.mark.parametrize("sparsity", [1, 2, 3, 6])
def test_an_l1_step_has_unit_length_and_moves_the_largest_coordinates(sparsity: int) -> None:
    gradient = torch.tensor([[0.1, -3.0, 0.2, 2.0, -0.5, 1.0]])
    step = Threat("l1", 1.0).ascent(gradient, sparsity)
    largest = [1, 3, 5, 4, 2, 0][:sparsity]
    expected = torch.zeros(1, 6).index_put((torch.tensor(0), torch.tensor(largest)), gradient[0, largest].sign())
    torch.testing.assert_close(step, expected / sparsity)


def test_the_steepest_l1_step_gains_the_largest_entry_of_the_gradient() -> None:
    gradient = torch.randn(5, 2, 3, 3, generator=generator())
    gain = (gradient * Threat("l1", 1.0).ascent(gradient)).flatten(1).sum(dim=1)
    torch.testing.assert_close(gain, gradient.flatten(1).abs().amax(dim=1))
    assert torch.equal(Threat("l1", 1.0).ascent(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_a_random_start_in_l1_has_any_length_up_to_the_radius() -> None:
    threat, x = Threat("l1", 0.5), torch.full((400, 1, 4, 4), 0.5)
    lengths = threat.distance(threat.random_start(x, KeyedRandom(0, torch.arange(400))), x) / 0.5
    assert float(lengths.max()) <= 1 + 1e-6
    assert float(lengths.mean()) == pytest.approx(0.5, abs=4 / math.sqrt(12 * 400))
    assert float(lengths.std()) == pytest.approx(1 / math.sqrt(12), abs=0.03)


# --- one move of several --------------------------------------------------------------------------


def test_the_worst_candidate_is_chosen_for_every_image_by_itself() -> None:
    candidates = [torch.full((3, 2), float(value)) for value in (1, 2, 3)]
    losses = [torch.tensor([5.0, 1.0, 2.0]), torch.tensor([4.0, 7.0, 2.0]), torch.tensor([3.0, 7.0, 1.0])]
    chosen, largest = worst(candidates, losses)
    assert chosen[:, 0].tolist() == [1, 2, 1], "the first of equals"
    assert largest.tolist() == [5, 7, 2]


def test_an_l1_direction_spares_coordinates_that_the_box_holds_back() -> None:
    gradient = torch.tensor([[5.0, -4.0, 3.0, -2.0, 1.0, 0.5] + [0.0] * 20])
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.5, 0.5] + [0.5] * 20])
    step = direction(Threat("l1", 1.0), gradient, x, generator())
    assert step[0, :2].tolist() == [0, 0]
    assert step.sign()[0, 2:6].tolist() == [1, -1, 1, 1]


def test_between_5_and_20_coordinates_share_an_l1_step() -> None:
    gradient, x, rng = torch.randn(1, 100, generator=generator()), torch.full((1, 100), 0.5), generator()
    steps = [direction(Threat("l1", 1.0), gradient, x, rng) for _ in range(300)]
    assert {int((step != 0).sum()) for step in steps} == set(range(5, 21))
    assert SPARSITY == (5, 20)
    for step in steps[:20]:
        assert float(step.abs().sum()) == pytest.approx(1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_in_other_norms_the_direction_is_the_ball_s_own(norm: str) -> None:
    gradient, x = torch.randn(3, 7, generator=generator()), torch.zeros(3, 7)
    threat = Threat(norm, 1.0)
    assert torch.equal(direction(threat, gradient, x, generator()), threat.ascent(gradient))


# --- steepest descent -----------------------------------------------------------------------------


def descended(
    model: Any, given_batch: Batch, threats: list[Threat], steps: int = 8, sizes: list[float] | None = None
) -> Tensor:
    return steepest_descent(
        lambda x: cross_entropy(model(x), given_batch.y),
        given_batch.x,
        threats,
        sizes or [threat.eps / 2 for threat in threats],
        steps,
        generator(),
    )


def margins(model: LinearClassifier, given_batch: Batch) -> tuple[Tensor, Tensor]:
    """True minus wrong score of a model with two classes, (B,), and the normal that lowers it, (B, D)."""
    direction = model.weight.detach()[given_batch.y] - model.weight.detach()[1 - given_batch.y]
    return (given_batch.x * direction).sum(dim=1), direction


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_on_a_linear_model_one_ball_is_followed_to_the_closed_form(norm: str, dual: int) -> None:
    model, given_batch = linear(), batch(inside())
    x_adv = descended(model, given_batch, [Threat(norm, EPS)])
    margin, normal = margins(model, given_batch)
    reached = (x_adv * normal).sum(dim=1)
    torch.testing.assert_close(reached, margin - EPS * torch.linalg.vector_norm(normal, ord=dual, dim=1))


def test_on_a_linear_model_the_l1_ball_spends_its_radius_on_the_largest_coordinates() -> None:
    model, given_batch = linear(size=30), batch(inside(size=30))
    threat = Threat("l1", 0.3)
    x_adv = descended(model, given_batch, [threat], steps=60, sizes=[0.15])
    margin, normal = margins(model, given_batch)
    gain = (margin - (x_adv * normal).sum(dim=1)) / 0.3
    ordered = normal.abs().sort(dim=1, descending=True).values
    # at best all on the largest; a step is shared by 5 at least
    assert bool((gain <= ordered[:, 0] + 1e-5).all())
    assert bool((gain >= ordered[:, :5].mean(dim=1) - 1e-3).all())
    torch.testing.assert_close(threat.distance(x_adv, given_batch.x), torch.full((8,), 0.3, dtype=torch.float64))


def test_the_union_of_two_balls_is_as_bad_as_the_worse_of_them() -> None:
    model, given_batch = linear(), batch(inside(12))
    balls = [Threat("linf", 0.05), Threat("l2", 0.1)]
    margin, normal = margins(model, given_batch)
    losses = [0.05 * normal.abs().sum(dim=1), 0.1 * normal.norm(dim=1)]
    reached = margin - (descended(model, given_batch, balls, steps=20) * normal).sum(dim=1)
    torch.testing.assert_close(reached, torch.stack(losses).amax(dim=0), rtol=1e-3, atol=1e-5)


class Curved(torch.nn.Module):
    """A model whose best ball differs from image to image."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.inner, self.outer = linear(3, 5, size), linear(4, 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(4 * torch.sin(3 * self.inner(x)))


def plain_msd(model: Any, x: Tensor, y: Tensor, balls: list[Threat], sizes: list[float], steps: int) -> Tensor:
    """Image by image, as the authors write it, with linf and l2 in numpy."""
    points = []
    for image, label in zip(x, y, strict=True):

        def loss(point: Tensor, label: Tensor = label) -> Tensor:
            return -model(point[None]).log_softmax(dim=1)[0, label]

        delta, best, highest = torch.zeros_like(image), torch.zeros_like(image), float(loss(image).detach())
        for _ in range(steps):
            at = (image + delta).requires_grad_()
            gradient = torch.autograd.grad(loss(at), at)[0]
            candidates = []
            for ball, size in zip(balls, sizes, strict=True):
                if ball.norm == "linf":
                    moved = (delta + size * gradient.sign()).clamp(-ball.eps, ball.eps)
                else:
                    moved = delta + size * gradient / gradient.norm()
                    moved = moved * min(1.0, ball.eps / float(moved.norm()))
                moved = (image + moved).clamp(0, 1) - image
                candidates.append((float(loss(image + moved).detach()), moved))
            value, delta = max(candidates, key=lambda pair: pair[0])
            if value > highest:
                best, highest = delta, value
        points.append(image + best)
    return torch.stack(points).detach()


def test_steepest_descent_is_that_of_a_plain_rewrite() -> None:
    model = Curved().double()
    given_batch = batch(torch.rand(10, 6, generator=generator(2)).double(), 3)
    balls, sizes = [Threat("linf", 0.2), Threat("l2", 0.4)], [0.05, 0.1]
    ours = descended(model, given_batch, balls, 8, sizes)
    theirs = plain_msd(model, given_batch.x, given_batch.y, balls, sizes, 8)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    in_linf = Threat("linf", 0.2).distance(ours, given_batch.x) <= 0.2 + 1e-9
    assert 0 < int(in_linf.sum()) < 10, "both balls are used"


@quick
@given(st.sampled_from([("linf",), ("l2",), ("l1",), ("linf", "l2"), ("l1", "l2", "linf")]), SEEDS, st.integers(0, 6))
def test_the_point_is_in_one_of_the_balls_in_the_box_and_no_better_than_the_image(
    norms: tuple[str, ...], seed: int, steps: int
) -> None:
    model = Curved(16)
    given_batch = batch(torch.rand(6, 16, generator=generator(seed)).round(decimals=1), 3)
    balls = [Threat(norm, {"linf": 0.1, "l2": 0.3, "l1": 0.8}[norm]) for norm in norms]
    x_adv = descended(model, given_batch, balls, steps)
    assert not x_adv.requires_grad
    within = torch.stack([ball.distance(x_adv, given_batch.x) <= ball.eps + 1e-6 for ball in balls])
    assert bool(within.any(dim=0).all())
    assert 0 <= float(x_adv.min()) <= float(x_adv.max()) <= 1
    before, after = (cross_entropy(model(x), given_batch.y) for x in (given_batch.x, x_adv))
    assert bool((after >= before - 1e-5).all())


def test_more_steps_never_lower_the_loss() -> None:
    model, given_batch = Curved(), batch(torch.rand(20, 6, generator=generator(5)), 3)
    balls = [Threat("linf", 0.3), Threat("l2", 0.6)]
    losses = torch.stack(
        [
            cross_entropy(model(descended(model, given_batch, balls, steps, [0.2, 0.4])), given_batch.y)
            for steps in range(7)
        ]
    ).detach()
    assert bool((losses[1:] >= losses[:-1] - 1e-6).all())
    assert float((losses[-1] - losses[0]).min()) >= 0
    last = losses[-1] > losses[-2] + 1e-4
    assert not bool(last.all()), "where steps overshoot, an earlier point is kept"


def test_no_step_leaves_the_image() -> None:
    given_batch = batch(inside())
    assert torch.equal(descended(linear(), given_batch, [Threat("linf", EPS)], 0), given_batch.x)


# --- one ball: adversarial training ---------------------------------------------------------------


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize(("norm", "radius"), [("linf", "eps"), ("l2", "0.2")])
def test_with_one_ball_all_three_are_adversarial_training(name: str, norm: str, radius: str) -> None:
    """On a linear model, where the last step of an attack is its best; all begin at the image."""
    left_out = {other: "none" for other in ("linf", "l2") if other != norm}
    given_batch = batch(inside())
    ours = total(union(name, linear(), **{norm: radius, **left_out}), given_batch)
    plain = Adversarial([linear()], AdversarialHyper())
    lend_adversary(plain, EPS if radius == "eps" else float(radius), norm, attack=FROM_THE_IMAGE)
    torch.testing.assert_close(ours, total(plain, given_batch))


@pytest.mark.parametrize("name", ["max", "avg"])
def test_so_they_are_on_any_network_with_a_random_start(name: str) -> None:
    given_batch, losses = batch(torch.rand(10, *SHAPE, generator=generator()), CLASSES), []
    for method, hyper in ((name, {"l2": "none"}), ("adv", {})):
        defense = network(method, **hyper).train()
        lend_adversary(defense, EPS, attack=InnerAttack(steps=3))
        losses.append(total(defense, given_batch))
    torch.testing.assert_close(*losses)


# --- what each trains on --------------------------------------------------------------------------


def closed_form(model: LinearClassifier, given_batch: Batch, linf: float, l2: float) -> tuple[Tensor, Tensor]:
    """Worst cross-entropy in either ball of a model with two classes, (B,) each."""
    margin, normal = margins(model, given_batch)
    radii = linf * normal.abs().sum(dim=1), l2 * normal.norm(dim=1)
    return tuple(torch.log1p(torch.exp(radius - margin)) for radius in radii)  # type: ignore[return-value]


def test_max_trains_on_the_worse_of_the_balls_image_by_image() -> None:
    model, given_batch = LinearClassifier(torch.tensor([[3.0, 0.2], [0.0, 0.1]])), batch(inside(9, 2))
    # the linf and the l2 optimum are as bad for the first normal; a second one would need a third class
    linf, l2 = closed_form(model, given_batch, EPS, 0.12)
    loss = total(union("max", model, l2="0.12"), given_batch)
    assert number(loss) == pytest.approx(number(torch.maximum(linf, l2).mean()), rel=1e-5)
    assert number(loss) >= max(number(linf.mean()), number(l2.mean())) - 1e-6


def test_max_takes_different_balls_for_different_images() -> None:
    model, given_batch = Curved(), batch(torch.rand(24, 6, generator=generator(7)), 3)
    defense = union("max", model, l2="0.2")
    crafted = dict(defense.perturbed(given_batch))
    losses = torch.stack([cross_entropy(model(x), given_batch.y) for x in crafted.values()])
    assert {0, 1} == set(losses.argmax(dim=0).tolist())
    torch.testing.assert_close(total(defense, given_batch), losses.amax(dim=0).mean())
    assert bool((losses.amax(dim=0) >= losses).all())


def test_avg_trains_on_the_mean_of_the_balls() -> None:
    model, given_batch = linear(), batch(inside())
    terms: Any = union("avg", model, l2="0.2").loss(given_batch, 0.0)
    linf, l2 = closed_form(model, given_batch, EPS, 0.2)
    assert {name: number(value) for name, value in terms.items()} == pytest.approx(
        {"l2": number(l2.mean()) / 2, "linf": number(linf.mean()) / 2}, rel=1e-5
    )


def test_avg_in_sequence_steps_once_a_ball_on_the_network_as_it_then_is() -> None:
    model, given_batch = linear(), batch(inside())
    defense = union("avg", model, l2="0.2", sequential=True)
    steps: Any = defense.loss(given_batch, 0.0)
    assert isinstance(steps, Iterator)
    (first,) = [next(steps)]
    assert number(first["l2"]) == pytest.approx(number(closed_form(model, given_batch, EPS, 0.2)[1].mean()), rel=1e-5)
    with torch.no_grad():
        model.weight.copy_(linear(9).weight)  # as an optimiser step would, only further
    (second,) = list(steps)
    expected = closed_form(linear(9), given_batch, EPS, 0.2)[0].mean()
    assert number(second["linf"]) == pytest.approx(number(expected), rel=1e-5)


def test_msd_trains_on_the_point_that_steepest_descent_finds() -> None:
    model, given_batch = Curved(), batch(torch.rand(10, 6, generator=generator(2)), 3)
    defense = union("msd", model, InnerAttack(steps=5, step_size="eps/4", start="zero"), l2="0.3")
    x_adv = descended(model, given_batch, [Threat("l2", 0.3), Threat("linf", EPS)], 5, [0.075, EPS / 4])
    terms: Any = defense.loss(given_batch, 0.0)
    torch.testing.assert_close(terms, {"adv_ce": cross_entropy(model(x_adv), given_batch.y).mean()})


@pytest.mark.parametrize("name", list(METHODS))
def test_the_image_itself_is_not_trained_on(name: str) -> None:
    """Were it, the gradient would not be that of the loss on the crafted images alone."""
    model, given_batch = linear(), batch(inside())
    gradient = torch.autograd.grad(total(union(name, model, l2="none"), given_batch), model.weight)[0]
    x_adv = descended(model, given_batch, [Threat("linf", EPS)])
    expected = torch.autograd.grad(cross_entropy(model(x_adv), given_batch.y).mean(), model.weight)[0]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", ["max", "avg"])
def test_weather_may_join_the_union(name: str) -> None:
    defense = network(name, weather=True)
    lend_adversary(defense, EPS)
    given_batch = batch(torch.rand(6, *SHAPE, generator=generator()), CLASSES)
    crafted = dict(defense.perturbed(given_batch))
    assert list(crafted) == ["l2", "linf", "fog", "snow"]
    assert torch.equal(crafted["fog"], fog(given_batch.x, 0.15, 0.6))
    assert torch.equal(crafted["snow"], snow(given_batch.x, torch.rand(6, generator=generator()), 2.5))


def test_avg_weighs_the_weather_like_a_ball() -> None:
    defense = network("avg", weather=True)
    lend_adversary(defense, EPS)
    given_batch = batch(torch.rand(6, *SHAPE, generator=generator()), CLASSES)
    terms: Any = defense.loss(given_batch, 0.0)
    assert list(terms) == ["l2", "linf", "fog", "snow"]
    foggy = cross_entropy(defense(fog(given_batch.x, 0.15, 0.6)), given_batch.y).mean()
    torch.testing.assert_close(terms["fog"], foggy / 4)


def test_all_three_norms_may_be_in_the_union() -> None:
    for name in METHODS:
        defense = network(name, l1="2").train()
        lend_adversary(defense, EPS)
        given_batch = batch(torch.rand(6, *SHAPE, generator=generator()), CLASSES)
        assert [threat.norm for threat in defense.threats()] == ["l1", "l2", "linf"]
        assert bool(torch.isfinite(total(defense, given_batch)))


def test_the_l1_attack_spends_its_radius() -> None:
    defense = network("max", l1="2")
    lend_adversary(defense, EPS, attack=InnerAttack(steps=8))
    given_batch = batch(torch.rand(6, *SHAPE, generator=generator()), CLASSES)
    lengths = Threat("l1", 2.0).distance(dict(defense.perturbed(given_batch))["l1"], given_batch.x)
    assert 1.9 < float(lengths.min()) <= float(lengths.max()) <= 2 + 1e-5


# --- radii and steps ------------------------------------------------------------------------------


class Recorder(Adversary):
    """An adversary that remembers threats and step sizes."""

    calls: list[tuple[str | None, float, Any]]

    def __call__(self, objective: Any, x: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
        self.calls.append((options["threat"].norm, options["threat"].eps, options["step_size"]))
        return x


@pytest.mark.parametrize(
    ("norm", "eps", "size", "steps", "expected"),
    [
        ("linf", 0.2, "eps/4", 10, [("l2", 1.0, 0.25), ("linf", 0.2, 0.05)]),
        ("linf", 0.2, "0.01", 10, [("l2", 1.0, 0.25), ("linf", 0.2, 0.01)]),
        ("linf", 0.2, "2/255", 50, [("l2", 1.0, 0.05), ("linf", 0.2, 2 / 255)]),
        ("l2", 1.0, "0.1", 10, [("l2", 1.0, 0.1), ("linf", 0.2, 0.05)]),
    ],
)
def test_a_step_is_in_units_of_its_own_ball(norm: str, eps: float, size: str, steps: int, expected: Any) -> None:
    defense = WorstOfUnion([linear()], MaxHyper(linf="0.2" if norm == "l2" else "eps"))
    recorder = Recorder(defense, InnerAttack(steps=steps, step_size=size), norm, (eps, eps))
    recorder.calls = []
    defense.lend(recorder)
    total(defense, batch(inside()))
    for call, (ball, radius, step) in zip(recorder.calls, expected, strict=True):
        assert call == (ball, pytest.approx(radius), pytest.approx(step))


def test_the_radius_of_the_batch_is_the_unit() -> None:
    defense = union("max", linear(), linf="0.5*eps", l2="none")
    defense._adversary.threat = Threat("linf", 0.04)
    assert [threat.eps for threat in defense.threats()] == [pytest.approx(0.02)]


DATA = toy_data()


@pytest.mark.parametrize("name", list(METHODS))
def test_there_is_one_network_and_nothing_to_train_first(name: str) -> None:
    spec = TrainSpec.create(name, {}, toy_setting(DATA, members=3))
    assert spec.model.members == 1
    assert spec.prerequisites == {}


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize(
    ("hyper", "changes", "message"),
    [
        ({}, {"norm": "l2", "train_eps": "1"}, r"\[linf\] is 'eps', but the training radius is in l2; write it"),
        ({"l1": "4*eps"}, {}, r"\[l1\] is '4\*eps', but the training radius is in linf"),
        ({"l2": "9"}, {}, r"\[l2\] is '9': .*further apart than 8.00 in l2"),
        ({"l1": "-1"}, {}, r"\[l1\] is '-1': .*at least 0"),
        ({"linf": "3*eps"}, {"train_eps": "uniform(0.1,0.4)"}, r"\[linf\] is '3\*eps': .*\[0, 1\]"),
        ({"linf": "none", "l2": "none"}, {}, r"linf, l2 and l1 are all none, .*give a radius"),
        ({"linf": "big"}, {}, r"linf is 'big'; expected a number"),
    ],
)
def test_radii_that_do_not_fit_are_refused_before_training(
    name: str, hyper: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=rf"^{name}.*{message}"):
        TrainSpec.create(name, hyper, toy_setting(DATA, **changes))


def test_weather_has_no_steps_so_msd_refuses_it() -> None:
    with pytest.raises(UsageError, match=r"msd has no parameter 'weather'; it has: linf, l2, l1"):
        create_defense("msd", architecture="resnet8", weather=True)


@pytest.mark.parametrize(("name", "hyper"), [("max", {"l1": "2"}), ("avg", {"sequential": True}), ("msd", {})])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_training_runs_in_both_modes_of_batch_norm(name: str, hyper: dict[str, Any], mode: str) -> None:
    spec = TrainSpec.create(name, hyper, toy_setting(DATA, attack={"steps": 1, "batch_norm": mode}))
    trained = train(spec, DATA, device="cpu")
    moved = trained.defense.members[0].stem[1].num_batches_tracked
    # 3 batches; in train mode the attacks' passes count too
    steps = 3 * (2 if hyper.get("sequential") else 1)
    assert int(moved) == steps if mode == "eval" else int(moved) > steps
