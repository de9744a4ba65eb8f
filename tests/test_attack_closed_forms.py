"""Linear models: where every attack must end is known in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensdef import combine
from ensdef.attack_spec import AttackSpec
from ensdef.defense import Batch, EnsembleDefense, Terms
from ensdef.harness import Outcome, attack_model
from ensdef.losses import cross_entropy
from ensdef.testing import LinearClassifier
from ensdef.threat import Threat

PIXELS = 48
SHAPE = (3, 4, 4)
#: x + delta is rounded once, and once more by the projection.
ROUNDING = {"rtol": 0.0, "atol": 3e-7}
#: Attacks that reach the corner of the ball, with the parameters they need for it.
CORNER = {"fgsm": {}, "bim": {}, "pgd": {"steps": 20}, "mim": {}}
RADII = (0.02, 0.04, 0.08)


class LinearEnsemble(EnsembleDefense):
    """The mean of linear members' logits: linear itself."""

    def loss(self, batch: Batch, progress: float) -> Terms:
        raise NotImplementedError

    def predict(self, x: Tensor) -> Tensor:
        return combine.mean_of_logits(self.member_logits(x))

    @property
    def collapsed(self) -> LinearClassifier:
        """The one linear model that this ensemble is."""
        weight = torch.stack([member.weight.detach() for member in self.members]).mean(dim=0)
        return LinearClassifier(weight, torch.stack([member.bias.detach() for member in self.members]).mean(dim=0))


def linear(classes: int, seed: int = 0) -> LinearClassifier:
    generator = torch.Generator().manual_seed(seed)
    return LinearClassifier(
        torch.randn(classes, PIXELS, generator=generator) / 2, torch.randn(classes, generator=generator) / 4
    )


def built(kind: str, classes: int) -> tuple[nn.Module, LinearClassifier]:
    """A model under attack, and the linear model that tells the answers."""
    if kind == "single":
        model = linear(classes)
        return model, model
    ensemble = LinearEnsemble([linear(classes, seed) for seed in range(3)])
    return ensemble, ensemble.collapsed


def images(count: int, low: float, high: float, seed: int = 0) -> Tensor:
    return low + (high - low) * torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def at_the_faces(count: int) -> Tensor:
    """Images of which a quarter of the pixels is black or white: the box is felt."""
    return images(count, -0.2, 1.2).clamp(0, 1)


def attacked(
    model: nn.Module, x: Tensor, y: Tensor, name: str, eps: float, norm: str = "linf", **params: Any
) -> Outcome:
    return attack_model(model, x, y, AttackSpec.create(name, params, norm, eps), batch_size=64)


def decisions(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(dim=1)


def difference(oracle: LinearClassifier, y: Tensor) -> Tensor:
    """D = w_y - w_other of a two-class model, (N, *SHAPE)."""
    weight = oracle.weight.detach()
    return (weight[y] - weight[1 - y]).view(-1, *SHAPE)


def binary_margin(oracle: LinearClassifier, x: Tensor, y: Tensor) -> Tensor:
    """Score of the true class minus the other's, in float64, (N,)."""
    weight, bias = oracle.weight.detach().double(), oracle.bias.detach().double()
    scores = x.flatten(1).double() @ weight.T + bias
    return scores.gather(1, y[:, None]).squeeze(1) - scores.gather(1, 1 - y[:, None]).squeeze(1)


both = pytest.mark.parametrize("kind", ["single", "ensemble"])
corner = pytest.mark.parametrize("name", CORNER)


# --- two classes, linf ----------------------------------------------------------------------------


@both
@corner
@pytest.mark.parametrize("box", ["far", "active"])
def test_with_two_classes_an_attack_ends_in_the_corner_against_the_weights(kind: str, name: str, box: str) -> None:
    model, oracle = built(kind, classes=2)
    x = images(40, 0.3, 0.7) if box == "far" else at_the_faces(40)
    y = decisions(model, x)
    outcome = attacked(model, x, y, name, 0.1, success="last", **CORNER[name])
    expected = (x - 0.1 * difference(oracle, y).sign()).clamp(0, 1)
    torch.testing.assert_close(outcome.x_adv, expected, **ROUNDING)
    if box == "active":
        assert bool((expected == 0).any())
        assert bool((expected == 1).any())


@both
@corner
@pytest.mark.parametrize("box", ["far", "active"])
def test_the_margin_left_is_what_ball_and_box_allow(kind: str, name: str, box: str) -> None:
    model, oracle = built(kind, classes=2)
    x = images(40, 0.3, 0.7) if box == "far" else at_the_faces(40)
    y = decisions(model, x)
    outcome = attacked(model, x, y, name, 0.1, success="last", **CORNER[name])
    left = binary_margin(oracle, outcome.x_adv, y)
    torch.testing.assert_close(left, oracle.worst_margins(x, y, 0.1).amin(dim=1), rtol=0, atol=1e-5)


@both
@corner
@pytest.mark.parametrize("loss", ["ce", "margin", "targeted", "targeted_margin"])
@pytest.mark.parametrize("eps", RADII)
def test_with_two_classes_every_loss_finds_the_exact_robust_set(kind: str, name: str, loss: str, eps: float) -> None:
    model, oracle = built(kind, classes=2)
    x = at_the_faces(100)
    y = decisions(model, x)
    exact = oracle.exactly_robust(x, y, eps)
    assert 0 < int(exact.sum()) < len(x)
    assert torch.equal(attacked(model, x, y, name, eps, loss=loss, **CORNER[name]).robust, exact)


def test_the_oracle_counts_an_active_box_and_an_attack_that_ignores_it_would_be_seen() -> None:
    model, oracle = built("single", classes=2)
    x = at_the_faces(100)
    y = decisions(model, x)
    free = binary_margin(oracle, x, y) - 0.1 * difference(oracle, y).abs().double().flatten(1).sum(dim=1)
    assert bool((oracle.worst_margins(x, y, 0.1).amin(dim=1) > free + 1e-3).all())


# --- two classes, l2 ------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("name", "params"),
    [("pgd", {"steps": 60}), ("pgd", {"steps": 10, "random_start": False}), ("fgsm", {}), ("bim", {}), ("mim", {})],
    ids=["pgd", "pgd from the image", "fgsm", "bim", "mim"],
)
def test_in_l2_the_margin_drops_by_the_radius_times_the_length_of_the_weights(
    kind: str, name: str, params: dict[str, Any]
) -> None:
    model, oracle = built(kind, classes=2)
    x = images(40, 0.4, 0.6)
    y = decisions(model, x)
    outcome = attacked(model, x, y, name, 0.3, "l2", success="last", **params)
    drop = binary_margin(oracle, x, y) - binary_margin(oracle, outcome.x_adv, y)
    expected = 0.3 * difference(oracle, y).double().flatten(1).norm(dim=1)
    torch.testing.assert_close(drop, expected, rtol=1e-5, atol=1e-6)
    distance = Threat("l2", 0.3).distance(outcome.x_adv, x)
    torch.testing.assert_close(distance, torch.full_like(distance, 0.3), rtol=0, atol=1e-6)


# --- many classes ---------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("eps", RADII)
@pytest.mark.parametrize("random_start", [False, True])
def test_the_targeted_margin_loss_finds_the_exact_robust_set(kind: str, eps: float, random_start: bool) -> None:
    model, oracle = built(kind, classes=10)
    x = at_the_faces(80)
    y = decisions(model, x)
    exact = oracle.exactly_robust(x, y, eps / 2)
    assert 0 < int(exact.sum()) < len(x)
    outcome = attacked(model, x, y, "pgd", eps / 2, loss="targeted_margin", steps=12, random_start=random_start)
    assert torch.equal(outcome.robust, exact)


@both
@pytest.mark.parametrize("loss", ["ce", "margin", "targeted"])
@pytest.mark.parametrize("eps", RADII)
def test_no_loss_finds_more_than_the_exact_set_allows(kind: str, loss: str, eps: float) -> None:
    model, oracle = built(kind, classes=10)
    x = at_the_faces(80)
    y = decisions(model, x)
    exact = oracle.exactly_robust(x, y, eps / 2)
    robust = attacked(model, x, y, "pgd", eps / 2, loss=loss, steps=12).robust
    assert not bool((exact & ~robust).any())
    assert int(exact.sum()) <= int(robust.sum())


def test_cross_entropy_alone_overestimates_robustness_even_of_a_linear_model() -> None:
    model, oracle = built("single", classes=10)
    x = at_the_faces(400)
    y = decisions(model, x)
    exact = sum(int(oracle.exactly_robust(x, y, eps / 2).sum()) for eps in RADII)
    found = sum(int(attacked(model, x, y, "pgd", eps / 2, steps=20).robust.sum()) for eps in RADII)
    assert exact < found


def test_a_point_that_fooled_fools_and_its_class_is_one_the_oracle_says_can_be_reached() -> None:
    model, oracle = built("single", classes=10)
    x = at_the_faces(80)
    y = decisions(model, x)
    outcome = attacked(model, x, y, "pgd", 0.03, loss="targeted_margin", steps=12)
    fooled = ~outcome.robust
    reached = decisions(model, outcome.x_adv)
    assert bool((reached[fooled] != y[fooled]).all())
    assert bool((reached[outcome.robust] == y[outcome.robust]).all())
    margins = oracle.worst_margins(x, y, 0.03).gather(1, reached[:, None]).squeeze(1)
    assert bool((margins[fooled] <= 1e-5).all())


# --- losses as steps ------------------------------------------------------------------------------


def first_step(model: LinearClassifier, x: Tensor, y: Tensor, loss: str) -> Tensor:
    return attacked(model, x, y, "fgsm", 0.01, success="last", loss=loss).x_adv


def test_the_cross_entropy_step_follows_the_gradient_of_the_cross_entropy() -> None:
    model, x = linear(10), images(20, 0.3, 0.7)
    y = decisions(model, x)
    inside = x.clone().requires_grad_()
    gradient = torch.autograd.grad(cross_entropy(model(inside), y).sum(), inside)[0]
    torch.testing.assert_close(first_step(model, x, y, "ce"), x + 0.01 * gradient.sign(), **ROUNDING)


def test_the_margin_step_goes_from_the_true_class_to_the_best_wrong_one() -> None:
    model, x = linear(10), images(20, 0.3, 0.7)
    y = decisions(model, x)
    with torch.no_grad():
        second = model(x).topk(2, dim=1).indices[:, 1]
        direction = (model.weight[second] - model.weight[y]).view(-1, *SHAPE)
    torch.testing.assert_close(first_step(model, x, y, "margin"), x + 0.01 * direction.sign(), **ROUNDING)


@pytest.mark.parametrize("loss", ["targeted", "targeted_margin"])
def test_a_targeted_attack_that_failed_ends_at_its_last_target(loss: str) -> None:
    model, x = linear(4), images(20, 0.3, 0.7)
    y = decisions(model, x)
    target = (y + 3) % 4  # the runs aim at y + 1, y + 2, y + 3
    with torch.no_grad():
        probabilities = model(x).softmax(dim=1)
        if loss == "targeted_margin":
            direction = model.weight[target] - model.weight[y]
        else:
            direction = model.weight[target] - probabilities @ model.weight
    x_adv = attacked(model, x, y, "fgsm", 1e-4, success="last", loss=loss).x_adv
    torch.testing.assert_close(x_adv, x + 1e-4 * direction.view(-1, *SHAPE).sign(), **ROUNDING)


class LogProbabilities(nn.Module):
    """A model whose scores are all negative."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(self.model(x), dim=1)


@pytest.mark.parametrize("loss", ["margin", "targeted_margin"])
def test_margin_losses_do_on_log_probabilities_what_they_do_on_logits(loss: str) -> None:
    logits, x = linear(10), at_the_faces(60)
    y = decisions(logits, x)
    runs = [
        attacked(model, x, y, "pgd", 0.02, loss=loss, steps=8, random_start=False)
        for model in (logits, LogProbabilities(logits))
    ]
    assert 0 < int(runs[0].robust.sum()) < len(x)
    assert torch.equal(runs[0].robust, runs[1].robust)


# --- zero gradients -------------------------------------------------------------------------------


class Sleepy(nn.Module):
    """A linear model whose first passes have a gradient of exactly zero."""

    def __init__(self, model: LinearClassifier, asleep: int) -> None:
        super().__init__()
        self.model = model
        self.asleep = asleep
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        scores = self.model(x)
        return scores.detach() + 0 * scores if self.calls <= self.asleep else scores


@pytest.mark.parametrize("name", ["mim", "bim"])
@pytest.mark.parametrize("asleep", [1, 3])
def test_a_step_with_a_zero_gradient_does_not_stop_an_attack_for_good(name: str, asleep: int) -> None:
    model = linear(2)
    x = images(20, 0.3, 0.7)
    y = decisions(model, x)
    outcome = attacked(Sleepy(model, asleep), x, y, name, 0.1, success="last", steps=10)
    expected = x - 0.1 * difference(model, y).sign()
    torch.testing.assert_close(outcome.x_adv, expected, **ROUNDING)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", CORNER)
def test_a_gradient_that_is_always_zero_leaves_the_image_where_it_starts(name: str, norm: str) -> None:
    x = images(20, 0.3, 0.7)
    y = decisions(linear(2), x)
    outcome = attacked(
        Sleepy(linear(2), 10**6), x, y, name, 0.1, norm, success="last", **{**CORNER[name], "random_start": False}
    )
    assert torch.equal(outcome.x_adv, x)


def test_momentum_carries_an_attack_through_a_step_without_gradient() -> None:
    class Dozing(Sleepy):
        """Awake in its first pass only."""

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            scores = self.model(x)
            return scores if self.calls == 1 else scores.detach() + 0 * scores

    model = linear(2)
    x = images(20, 0.3, 0.7)
    y = decisions(model, x)
    ends = {
        name: attacked(Dozing(model, 0), x, y, name, 0.1, success="last", steps=3, step_size=0.02).x_adv
        for name in ("mim", "bim")
    }
    against = difference(model, y).sign()
    torch.testing.assert_close(ends["bim"], x - 0.02 * against, **ROUNDING)
    torch.testing.assert_close(ends["mim"], x - 0.06 * against, **ROUNDING)
