"""The adversary that training lends a defence: a projected gradient loop, and what it leaves untouched."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from ensdef.methods.baseline import AdversarialEnsemble, AdversarialHyper
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys_defense import CLASSES, SHAPE, generator, spread

from ensdef.adversary import Adversary
from ensdef.build import create_defense
from ensdef.defense import EnsembleDefense
from ensdef.losses import cross_entropy
from ensdef.recipe import InnerAttack
from ensdef.testing import LinearClassifier, lend_adversary
from ensdef.threat import Threat

quick = settings(deadline=None, max_examples=30, derandomize=True)
EPS = 0.1
NORMS = ("linf", "l2")


def network(members: int = 2) -> EnsembleDefense:
    defense = create_defense(
        "nat", architecture="small_resnet[width=4]", members=members, num_classes=CLASSES, image_shape=SHAPE
    )
    spread(defense)
    return defense


def images(count: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.rand(count, *SHAPE, generator=generator(seed)), torch.arange(count) % CLASSES


def linear(seed: int = 0, classes: int = 3, size: int = 6) -> tuple[LinearClassifier, Tensor, Tensor]:
    """A classifier and points well inside the box."""
    rng = generator(seed)
    classifier = LinearClassifier(torch.randn(classes, size, generator=rng))
    return classifier, 0.3 + 0.4 * torch.rand(8, size, generator=rng), torch.arange(8) % classes


def lent(module: nn.Module, attack: InnerAttack, norm: str = "linf", eps: float = EPS, seed: int = 0) -> Adversary:
    defense = module if isinstance(module, EnsembleDefense) else AdversarialEnsemble([module], AdversarialHyper())
    return lend_adversary(defense, eps, norm, seed, attack)


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


def numpy_attack(
    weight: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    eps: float,
    size: float,
    steps: int,
    norm: str,
    momentum: float = 0.0,
    descend: bool = False,
) -> np.ndarray:
    """Projected gradient steps on a linear softmax classifier's cross-entropy, one image at a time."""
    rows = []
    for point, label in zip(x, y, strict=True):
        moved, velocity = point.copy(), np.zeros_like(point)
        for _ in range(steps):
            scores = np.exp(weight @ moved)
            gradient = (scores / scores.sum() - np.eye(len(weight))[label]) @ weight
            if momentum:
                velocity = momentum * velocity + gradient / np.abs(gradient).sum()
                gradient = velocity
            direction = np.sign(gradient) if norm == "linf" else gradient / np.linalg.norm(gradient)
            moved = moved + (-size if descend else size) * direction
            delta = moved - point
            if norm == "linf":
                delta = np.clip(delta, -eps, eps)
            else:
                delta = delta * min(1.0, eps / np.linalg.norm(delta))
            moved = np.clip(point + delta, 0, 1)
        rows.append(moved)
    return np.array(rows)


# --- the steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("descend", [False, True], ids=["ascend", "descend"])
def test_the_loop_is_that_of_a_plain_rewrite(norm: str, momentum: float, descend: bool) -> None:
    classifier, x, y = linear()
    adversary = lent(classifier, InnerAttack(steps=7, step_size="eps/3", start="zero"), norm)
    ours = adversary(classifier, x, y, momentum=momentum, descend=descend)
    expected = numpy_attack(
        classifier.weight.detach().numpy().astype(np.float64),
        x.numpy().astype(np.float64),
        y.numpy(),
        EPS,
        EPS / 3,
        7,
        norm,
        momentum,
        descend,
    )
    np.testing.assert_allclose(ours.numpy(), expected, atol=2e-6)


def test_momentum_can_carry_a_step_against_the_present_gradient() -> None:
    def hill(x: Tensor) -> Tensor:  # its top is at 0.5
        return -(x - 0.5).abs().flatten(1).sum(dim=1)

    _, x, _ = linear()
    x = torch.full_like(x, 0.45)
    adversary = lent(linear()[0], InnerAttack(steps=2, step_size="0.06", start="zero"), eps=0.2)
    torch.testing.assert_close(adversary(hill, x), torch.full_like(x, 0.45))
    torch.testing.assert_close(adversary(hill, x, momentum=2.0), torch.full_like(x, 0.57))


@pytest.mark.parametrize("norm", NORMS)
def test_ascending_raises_and_descending_lowers_the_loss(norm: str) -> None:
    classifier, x, y = linear()
    adversary = lent(classifier, InnerAttack(steps=3, start="zero"), norm)
    clean, up, down = (
        cross_entropy(classifier(points), y)
        for points in (x, adversary(classifier, x, y), adversary(classifier, x, y, descend=True))
    )
    assert bool((up > clean).all())
    assert bool((down < clean).all())


@quick
@given(st.sampled_from(NORMS), st.floats(0, 0.5), st.integers(0, 4), st.integers(0, 10**6))
def test_no_point_leaves_the_ball_or_the_box(norm: str, eps: float, steps: int, seed: int) -> None:
    classifier, _, y = linear(seed)
    x = torch.rand(8, 6, generator=generator(seed)).round(decimals=1)
    x_adv = lent(classifier, InnerAttack(steps=steps, step_size="eps"), norm, eps, seed)(classifier, x, y)
    assert bool((Threat(norm, eps).distance(x_adv, x) <= eps + 1e-6).all())
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    assert not x_adv.requires_grad


def test_an_image_s_steps_do_not_depend_on_the_size_of_its_batch() -> None:
    classifier, x, y = linear()
    adversary = lent(classifier, InnerAttack(steps=4, start="zero"), "l2")
    alone = torch.cat([adversary(classifier, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(adversary(classifier, x, y), alone)


def test_a_callable_objective_needs_no_labels() -> None:
    _, x, _ = linear()
    adversary = lent(linear()[0], InnerAttack(steps=4, start="zero"))
    torch.testing.assert_close(adversary(lambda x: x.sum(dim=1), x), x + EPS)
    torch.testing.assert_close(adversary(lambda x: x.sum(dim=1), x, descend=True), x - EPS)


def test_a_module_objective_without_labels_is_attacked_at_its_prediction() -> None:
    classifier, x, _ = linear()
    adversary = lent(classifier, InnerAttack(steps=2, start="zero"))
    predicted = classifier(x).argmax(dim=1)
    assert torch.equal(adversary(classifier, x), adversary(classifier, x, predicted))


def test_the_label_predicted_overrides_the_given_labels() -> None:
    classifier, x, y = linear()
    predicted = classifier(x).argmax(dim=1)
    assert bool((predicted != y).any())
    by_label = {
        label: lent(classifier, InnerAttack(steps=2, start="zero", label=label))(classifier, x, y)
        for label in ("true", "predicted")
    }
    adversary = lent(classifier, InnerAttack(steps=2, start="zero"))
    assert torch.equal(by_label["true"], adversary(classifier, x, y))
    assert torch.equal(by_label["predicted"], adversary(classifier, x, predicted))
    assert not torch.equal(by_label["true"], by_label["predicted"])


# --- what a call may override ---------------------------------------------------------------------


def test_no_steps_and_no_start_return_the_images() -> None:
    classifier, x, y = linear()
    assert torch.equal(lent(classifier, InnerAttack(steps=0, start="zero"))(classifier, x, y), x)
    assert torch.equal(lent(classifier, InnerAttack(steps=3, start="zero"), eps=0.0)(classifier, x, y), x)


def test_no_steps_return_the_random_start() -> None:
    classifier, x, y = linear()
    started = lent(classifier, InnerAttack(steps=0), seed=5)(classifier, x, y)
    delta = started - x
    assert float(delta.abs().max()) <= EPS + 1e-6
    assert float(delta.abs().mean()) == pytest.approx(EPS / 2, rel=0.25)
    assert torch.equal(lent(classifier, InnerAttack(steps=0), seed=5)(classifier, x, y), started)
    assert not torch.equal(lent(classifier, InnerAttack(steps=0), seed=6)(classifier, x, y), started)


def test_two_attacks_on_one_batch_start_at_different_points() -> None:
    classifier, x, y = linear()
    adversary = lent(classifier, InnerAttack(steps=0))
    assert not torch.equal(adversary(classifier, x, y), adversary(classifier, x, y))


def test_a_call_s_own_start_overrides_the_recipe_s() -> None:
    classifier, x, y = linear()
    assert torch.equal(lent(classifier, InnerAttack(steps=0))(classifier, x, y, start="zero"), x)
    started = lent(classifier, InnerAttack(steps=0, start="zero"))(classifier, x, y, start="uniform")
    assert not torch.equal(started, x)


def test_a_call_s_own_steps_and_step_size_override_the_recipe_s() -> None:
    _, x, _ = linear()
    adversary = lent(linear()[0], InnerAttack(steps=9, step_size="eps", start="zero"))
    moved = adversary(lambda x: x.sum(dim=1), x, steps=3, step_size=0.02)
    torch.testing.assert_close(moved, x + 0.06)
    assert torch.equal(adversary(lambda x: x.sum(dim=1), x, steps=0), x)


def test_a_call_s_own_threat_overrides_norm_and_radius_and_relative_steps_follow_it() -> None:
    _, x, _ = linear()
    adversary = lent(linear()[0], InnerAttack(steps=1, step_size="eps/2", start="zero"))
    moved = adversary(lambda x: x.sum(dim=1), x, threat=Threat("l2", 0.2))
    torch.testing.assert_close(moved, x + 0.1 / 6**0.5)
    assert adversary.threat == Threat("linf", EPS)


def test_the_defence_passes_every_option_on() -> None:
    classifier, x, y = linear()
    defense = AdversarialEnsemble([classifier], AdversarialHyper())
    options = {
        "threat": Threat("l2", 0.3),
        "steps": 2,
        "step_size": 0.05,
        "momentum": 0.5,
        "start": "zero",
        "descend": True,
    }
    adversary = lend_adversary(defense, EPS)
    assert torch.equal(defense.adversary(defense, x, y, **options), adversary(defense, x, y, **options))  # type: ignore[arg-type]


# --- batch norm, modes and gradients --------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("what", ["ensemble", "member"])
def test_attacking_a_module_equals_attacking_it_in_eval_mode_without_folding(norm: str, what: str) -> None:
    defense = network().double().train()
    objective = defense if what == "ensemble" else defense.members[1]
    x, y = images()
    x = x.double()
    attack = InnerAttack(steps=4)
    folded = lent(defense, attack, norm, seed=2)(objective, x, y)
    unfolded = lent(defense, attack, norm, seed=2)(lambda x: cross_entropy(objective(x).float(), y), x)
    torch.testing.assert_close(folded, unfolded, rtol=0, atol=1e-6)
    clean = cross_entropy(copy.deepcopy(defense).eval()(x), y).mean()
    assert cross_entropy(copy.deepcopy(defense).eval()(folded), y).mean() > clean


def test_batch_norm_in_train_mode_uses_batch_statistics() -> None:
    defense = network().train()
    x, y = images()
    by_mode = [
        lent(defense, InnerAttack(steps=2, start="zero", batch_norm=mode))(defense, x, y) for mode in ("eval", "train")
    ]
    assert not torch.allclose(*by_mode)


@pytest.mark.parametrize("objective", ["module", "callable"])
def test_batch_norm_in_eval_mode_leaves_running_statistics_alone(objective: str) -> None:
    defense = network().train()
    x, y = images()
    before = buffers(defense)
    attacked: Any = defense if objective == "module" else lambda x: cross_entropy(defense(x), y)
    lent(defense, InnerAttack(steps=3))(attacked, x, y)
    assert unchanged(defense, before)


@pytest.mark.parametrize("objective", ["module", "callable"])
def test_batch_norm_in_train_mode_moves_running_statistics_once_a_step(objective: str) -> None:
    defense = network().train()
    x, y = images()
    before = buffers(defense)
    attacked: Any = defense if objective == "module" else lambda x: cross_entropy(defense(x), y)
    lent(defense, InnerAttack(steps=3, batch_norm="train"))(attacked, x, y)
    counts = [name for name in before if name.endswith("num_batches_tracked")]
    assert counts
    assert all(int(dict(defense.named_buffers())[name] - before[name]) == 3 for name in counts)
    means = [name for name in before if name.endswith("running_mean")]
    assert not any(torch.equal(dict(defense.named_buffers())[name], before[name]) for name in means)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("objective", ["module", "callable"])
def test_every_module_keeps_its_mode(mode: str, objective: str) -> None:
    defense = network().train()
    defense.members[0].eval()
    flags = [module.training for module in defense.modules()]
    seen: list[list[bool]] = []
    x, y = images()

    def loss(x: Tensor) -> Tensor:
        seen.append([module.training for module in defense.modules()])
        return cross_entropy(defense(x), y)

    lent(defense, InnerAttack(steps=2, batch_norm=mode))(defense if objective == "module" else loss, x, y)
    assert [module.training for module in defense.modules()] == flags
    if objective == "callable":
        assert seen == [flags if mode == "train" else [False] * len(flags)] * 2


def test_an_objective_that_raises_leaves_every_module_in_its_mode() -> None:
    defense = network().train()
    defense.members[1].eval()
    flags = [module.training for module in defense.modules()]

    def broken(x: Tensor) -> Tensor:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        lent(defense, InnerAttack())(broken, images()[0])
    assert [module.training for module in defense.modules()] == flags


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_no_parameter_collects_a_gradient(mode: str) -> None:
    defense = network().train()
    x, y = images()
    adversary = lent(defense, InnerAttack(steps=2, batch_norm=mode))
    adversary(defense, x, y)
    adversary(lambda x: cross_entropy(defense(x), y), x)
    assert all(parameter.grad is None for parameter in defense.parameters())
    assert all(parameter.requires_grad for parameter in defense.parameters())
    assert not x.requires_grad
    assert x.grad is None


def test_images_that_carry_a_gradient_are_attacked_from_their_values() -> None:
    classifier, x, y = linear()
    given_x = x.clone().requires_grad_()
    x_adv = lent(classifier, InnerAttack(steps=2, start="zero"))(classifier, given_x, y)
    assert not x_adv.requires_grad
    assert torch.equal(x_adv, lent(classifier, InnerAttack(steps=2, start="zero"))(classifier, x, y))


def test_an_attack_works_where_gradients_are_switched_off() -> None:
    classifier, x, y = linear()
    with torch.no_grad():
        x_adv = lent(classifier, InnerAttack(steps=2, start="zero"))(classifier, x, y)
    assert not torch.equal(x_adv, x)


def test_an_attack_follows_the_weights_as_they_change() -> None:
    """The prepared copy of a module is refreshed before every attack."""
    defense = network()
    x, y = images()
    adversary = lent(defense, InnerAttack(steps=1, start="zero"))
    before = adversary(defense, x, y)
    spread(defense, seed=9, scale=1.0)
    fresh = lent(copy.deepcopy(defense), InnerAttack(steps=1, start="zero"))
    assert not torch.equal(adversary(defense, x, y), before)
    assert torch.equal(adversary(defense, x, y), fresh(fresh.defense, x, y))


class Switching(AdversarialEnsemble):
    """Answers with the member that ``active`` names."""

    active = 0

    def predict(self, x: Tensor) -> Tensor:
        return self.members[self.active](x)  # type: ignore[no-any-return]


def test_an_attack_follows_plain_attributes_as_they_change() -> None:
    """A defence may set a number in ``begin_epoch`` that its prediction depends on."""
    one, x, y = linear(0)
    other, _, _ = linear(1)
    defense = Switching([one, other], AdversarialHyper())
    adversary = lent(defense, InnerAttack(steps=1, start="zero"))
    assert torch.equal(adversary(defense, x, y), adversary(one, x, y))
    defense.active = 1
    assert torch.equal(adversary(defense, x, y), adversary(other, x, y))


def test_a_copy_of_a_defence_shares_its_adversary() -> None:
    defense = network()
    adversary = lend_adversary(defense)
    assert copy.deepcopy(defense)._adversary is adversary
    assert adversary.defense is defense


# --- the radius -----------------------------------------------------------------------------------


def radii(seed: int, eps: tuple[float, float], batches: int = 200) -> list[float]:
    adversary = Adversary(AdversarialEnsemble([linear()[0]], AdversarialHyper()), InnerAttack(), "linf", eps)
    rng = generator(seed)
    drawn = []
    for _ in range(batches):
        adversary.begin_batch(rng)
        drawn.append(adversary.threat.eps)
    return drawn


def test_a_radius_is_drawn_uniformly_for_every_batch() -> None:
    drawn = np.array(radii(0, (0.01, 0.05)))
    assert drawn.min() >= 0.01
    assert drawn.max() <= 0.05
    quarters = np.histogram(drawn, bins=4, range=(0.01, 0.05))[0]
    assert quarters.min() > 30  # 50 expected
    assert len(set(drawn)) == len(drawn)


def test_the_drawn_radii_follow_the_generator() -> None:
    assert radii(0, (0.01, 0.05)) == radii(0, (0.01, 0.05))
    assert radii(0, (0.01, 0.05)) != radii(1, (0.01, 0.05))


def test_a_fixed_radius_draws_nothing() -> None:
    adversary = Adversary(AdversarialEnsemble([linear()[0]], AdversarialHyper()), InnerAttack(), "l2", (0.1, 0.1))
    rng = generator(3)
    adversary.begin_batch(rng)
    assert adversary.threat == Threat("l2", 0.1)
    assert torch.equal(rng.get_state(), generator(3).get_state())


def test_the_drawn_radius_is_the_one_attacked_with() -> None:
    classifier, x, _ = linear()
    adversary = Adversary(
        AdversarialEnsemble([classifier], AdversarialHyper()), InnerAttack(steps=4, start="zero"), "linf", (0.01, 0.05)
    )
    for seed in range(3):
        adversary.begin_batch(generator(seed))
        moved = adversary(lambda x: x.sum(dim=1), x)
        torch.testing.assert_close(moved - x, torch.full_like(x, adversary.threat.eps), rtol=0, atol=1e-6)


# --- outside training -----------------------------------------------------------------------------


def test_outside_training_the_error_says_where_an_adversary_comes_from() -> None:
    defense = network()
    x, y = images()
    with pytest.raises(RuntimeError, match=r"Natural\.adversary is lent by the trainer.*lend_adversary"):
        defense.adversary(defense, x, y)
