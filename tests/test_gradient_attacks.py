"""Gradient attacks beyond PGD: the losses of AutoAttack, many targets, CW, SGM, diverse inputs, DeepFool."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import foolbox
import pytest
import torch
from ensdef.attacks.cw import MinimumNorm
from ensdef.attacks.deepfool import MARGIN
from ensdef.attacks.m_fgsm import shrunk_and_padded
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor, nn
from torch.nn import functional as F
from toys_queries import attacked, decisions, difference, images, linear, margins, trained_network

from ensdef import losses
from ensdef.architecture import ImageSpec, ResidualBlock
from ensdef.architectures._residual import ResidualNetwork
from ensdef.attack_spec import AttackSpec
from ensdef.combine import mean_of_logits
from ensdef.defense import Batch, EnsembleDefense, Terms
from ensdef.errors import UsageError
from ensdef.harness import attack_model
from ensdef.registry import ATTACKS
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.testing import LinearClassifier
from ensdef.threat import Threat

SHAPE = (3, 4, 4)
ROUNDING = {"rtol": 0.0, "atol": 3e-7}


def at_the_faces(count: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Images of which a quarter of the pixels is black or white: the box is felt."""
    return images(count, -0.2, 1.2, shape=shape).clamp(0, 1)


class LogProbabilities(nn.Module):
    """A model whose scores are all negative."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(self.model(x), dim=1)


# --- losses ---------------------------------------------------------------------------------------


def scored(classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    return 3 * torch.randn(40, classes, generator=generator), torch.randint(classes, (40,), generator=generator)


@pytest.mark.parametrize("classes", [3, 4, 10])
def test_dlr_is_that_of_the_official_autoattack(classes: int) -> None:
    scores, y = scored(classes)
    torch.testing.assert_close(losses.dlr(scores, y), APGDAttack.dlr_loss(None, scores, y))


@pytest.mark.parametrize("classes", [4, 10])
def test_targeted_dlr_is_that_of_the_official_autoattack(classes: int) -> None:
    scores, y = scored(classes)
    target = (y + 2) % classes
    official = APGDAttack_targeted.dlr_loss_targeted(SimpleNamespace(y_target=target), scores, y)
    torch.testing.assert_close(losses.targeted_dlr(scores, y, target), official)


def test_shift_and_scale_of_the_scores_leave_dlr_unchanged() -> None:
    scores, y = scored(5)
    torch.testing.assert_close(losses.dlr(7 * scores - 3, y), losses.dlr(scores, y))
    target = (y + 1) % 5
    torch.testing.assert_close(losses.targeted_dlr(7 * scores - 3, y, target), losses.targeted_dlr(scores, y, target))


def test_where_all_scores_are_equal_dlr_and_its_gradient_are_finite() -> None:
    scores = torch.zeros(3, 5, requires_grad=True)
    y = torch.tensor([0, 1, 2])
    value = losses.dlr(scores, y) + losses.targeted_dlr(scores, y, (y + 1) % 5)
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(torch.autograd.grad(value.sum(), scores)[0]).all())


@pytest.mark.parametrize(("loss", "classes"), [("dlr", 2), ("targeted_dlr", 2), ("targeted_dlr", 3)])
def test_dlr_of_too_few_classes_is_refused_with_the_losses_that_work(loss: str, classes: int) -> None:
    x = images(4)
    with pytest.raises(UsageError, match=rf"loss is {loss}.*the model has {classes}; use ce, margin") as raised:
        attacked(linear(classes), x, decisions(linear(classes), x), "pgd", 0.1, loss=loss)
    assert ("margin, dlr, targeted" in str(raised.value)) == (classes == 3)


@pytest.mark.parametrize("eps", [0.01, 0.02, 0.04])
@pytest.mark.parametrize("loss", ["targeted_dlr", "targeted_margin"])
def test_targeted_score_losses_find_the_exact_robust_set(loss: str, eps: float) -> None:
    model, x = linear(10), at_the_faces(80)
    y = decisions(model, x)
    exact = model.exactly_robust(x, y, eps)
    assert 0 < int(exact.sum()) < len(x)
    robust = attacked(model, x, y, "pgd", eps, loss=loss, steps=20).robust
    assert not bool((exact & ~robust).any())
    # the denominator of DLR pulls aside, so it may miss what lies at the very edge
    assert int((robust & ~exact).sum()) <= (2 if loss == "targeted_dlr" else 0)


# --- number of targets ----------------------------------------------------------------------------


def test_with_one_target_the_attack_goes_to_the_wrong_class_that_scores_highest_on_the_clean_image() -> None:
    model, x = linear(10), images(20)
    y = decisions(model, x)
    outcome = attacked(model, x, y, "fgsm", 1e-4, loss="targeted_margin", targets=1, success="last")
    with torch.no_grad():
        second = model(x).topk(2, dim=1).indices[:, 1]
        direction = (model.weight[second] - model.weight[y]).view(-1, *SHAPE)
    torch.testing.assert_close(outcome.x_adv, x + 1e-4 * direction.sign(), **ROUNDING)


def uneven() -> LinearClassifier:
    """Three classes; the second follows the first at a distance that nothing changes."""
    model = linear(3)
    with torch.no_grad():
        model.weight[1], model.bias[1] = model.weight[0], model.bias[0] - 0.01
    return model


def test_more_targets_never_leave_more_images_robust_and_all_targets_are_the_default() -> None:
    model, x = uneven(), at_the_faces(80)
    y = decisions(model, x)
    robust = {
        targets: attacked(
            model, x, y, "bim", 0.02, loss="targeted_margin", targets=targets, random_start=False, steps=10
        ).robust
        for targets in (0, 1, 2, 50)
    }
    assert not bool((robust[2] & ~robust[1]).any())
    assert int(robust[2].sum()) < int(robust[1].sum())
    assert torch.equal(robust[2], robust[0])
    assert torch.equal(robust[50], robust[0])


def test_ranking_the_targets_takes_one_forward_pass_a_run() -> None:
    model, x = linear(10), images(20)
    y = decisions(model, x)
    outcome = attacked(model, x, y, "bim", 1e-7, loss="targeted", targets=3, steps=5)
    assert bool(outcome.robust.all())
    assert outcome.forwards == 20 * 3 * (1 + 5 + 1)
    assert outcome.backwards == 20 * 3 * 5


def test_a_number_of_targets_for_a_loss_without_targets_is_refused() -> None:
    with pytest.raises(UsageError, match=r"targets is 3, but the loss ce aims at no class; use targeted,"):
        AttackSpec.create("pgd", {"targets": 3}, "linf", 0.1)


# --- every wrong class in turn --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mul_pgd", "mul_bim", "mul_mim"])
@pytest.mark.parametrize("eps", [0.01, 0.02, 0.04])
def test_with_a_margin_loss_a_multi_targeted_attack_finds_the_exact_robust_set(name: str, eps: float) -> None:
    model, x = linear(10), at_the_faces(80)
    y = decisions(model, x)
    exact = model.exactly_robust(x, y, eps)
    assert 0 < int(exact.sum()) < len(x)
    assert torch.equal(attacked(model, x, y, name, eps, loss="targeted_margin").robust, exact)


@pytest.mark.parametrize("name", ["mul_pgd", "mul_bim", "mul_mim"])
def test_an_image_that_is_never_fooled_costs_189_forward_and_180_backward_passes_for_ten_classes(name: str) -> None:
    model, x = linear(10), images(20)
    outcome = attacked(model, x, decisions(model, x), name, 1e-7)
    assert bool(outcome.robust.all())
    assert outcome.forwards == 189 * len(x)
    assert outcome.backwards == 180 * len(x)


def test_whatever_one_target_breaks_all_targets_break() -> None:
    model, x = uneven(), at_the_faces(80)
    y = decisions(model, x)
    robust = {targets: attacked(model, x, y, "mul_bim", 0.02, targets=targets).robust for targets in (1, 0)}
    assert not bool((robust[0] & ~robust[1]).any())
    assert 0 < int(robust[0].sum()) < int(robust[1].sum())


# --- cw -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_cw_is_pgd_on_the_margin(norm: str) -> None:
    model, x, y = trained_network()
    eps = {"linf": 0.1, "l2": 0.8}[norm]
    ours, pgd = (
        attacked(model, x[:60], y[:60], name, eps, norm, seed=3, steps=8, **given)
        for name, given in (("cw", {}), ("pgd", {"loss": "margin"}))
    )
    assert 0 < int(ours.robust.sum()) < int(ours.clean.sum())
    assert torch.equal(ours.x_adv, pgd.x_adv)
    assert (ours.forwards, ours.backwards) == (pgd.forwards, pgd.backwards)


@pytest.mark.parametrize("variant", [{"steps": 8}, {"variant": "min_norm", "iterations": 10}], ids=["pgd", "min_norm"])
def test_cw_does_on_log_probabilities_what_it_does_on_logits(variant: dict[str, Any]) -> None:
    logits, x = linear(10), at_the_faces(60)
    y = decisions(logits, x)
    runs = [attacked(model, x, y, "cw", 0.02, **variant).robust for model in (logits, LogProbabilities(logits))]
    assert 0 < int(runs[0].sum()) < len(x)
    assert torch.equal(runs[0], runs[1])


def walked(model: nn.Module, x: Tensor, y: Tensor, iterations: int = 100) -> tuple[dict[str, Tensor], int]:
    """The minimum-norm attack by itself, until every image ended: its state, and the steps that took."""
    attack = MinimumNorm(ATTACKS.get("cw").Params(variant="min_norm", iterations=iterations))
    target, threat, rng = Target(model, fold=False), Threat("linf", 1.0), KeyedRandom(0, torch.arange(len(x)))
    state = attack.start(target, x, y, threat, rng)
    ended, kept = torch.zeros(len(x), dtype=torch.bool), state["closest"]
    for count in range(1, attack.steps + 1):
        _, state = attack.step(target, x, y, state, threat, rng)
        kept = torch.where((state["done"] & ~ended).view(-1, *[1] * (x.dim() - 1)), state["closest"], kept)
        ended |= state.pop("done")
        target.forget()
        if bool(ended.all()):
            return {**state, "closest": kept}, count
    raise AssertionError("some image never ended")


def test_the_minimum_norm_attack_comes_near_the_boundary_of_a_linear_model() -> None:
    model, x = linear(2), images(30)
    y = decisions(model, x)
    state, _ = walked(model, x, y)
    shortest = -margins(model, x, y) / difference(model, y).double().flatten(1).abs().sum(dim=1)
    found = Threat("linf", 1.0).distance(state["closest"], x)
    assert bool((margins(model, state["closest"], y) > 0).all())
    assert bool((found >= shortest * (1 - 1e-4)).all())
    assert bool((found <= shortest / 0.9 + 2 / 256).all()), "a level of tau, and the smallest tau, above the shortest"


def test_an_image_that_nothing_fools_ends_after_five_constants() -> None:
    model = linear(2)
    with torch.no_grad():
        model.bias += torch.tensor([1000.0, 0.0])
    x = images(5)
    state, steps = walked(model, x, torch.zeros(5, dtype=torch.int64), iterations=7)
    assert steps == 5 * 7
    assert torch.equal(state["closest"], x)


@pytest.mark.parametrize("eps", [0.02, 0.05])
def test_every_iterate_of_the_minimum_norm_attack_is_clipped_to_the_ball_and_tested(eps: float) -> None:
    model, x = linear(2), images(24)
    y = decisions(model, x)
    exact = model.exactly_robust(x, y, eps)
    assert 0 < int(exact.sum()) < len(x)
    outcome = attacked(model, x, y, "cw", eps, variant="min_norm", iterations=30)
    assert torch.equal(outcome.robust, exact)
    assert float((outcome.x_adv - x).abs().max()) <= eps + 1e-6


def test_the_minimum_norm_attack_has_one_norm_and_two_parameters() -> None:
    with pytest.raises(UsageError, match=r"cw\[variant=min_norm\] cannot be run in l2; it has: linf"):
        AttackSpec.create("cw", {"variant": "min_norm"}, "l2", 0.5)
    with pytest.raises(UsageError, match=r"takes iterations and view alone; drop steps, restarts"):
        AttackSpec.create("cw", {"variant": "min_norm", "steps": 3, "restarts": 2}, "linf", 0.1)


# --- sgm ------------------------------------------------------------------------------------------


def residual(seed: int = 0) -> ResidualNetwork:
    """A residual network of two blocks that finds every class about as often."""
    torch.manual_seed(seed)
    network = ResidualNetwork(ImageSpec((1, 8, 8), 4), 8, [(8, 1), (12, 1)], "relu").eval()
    assert isinstance(network.classifier, nn.Linear)
    with torch.no_grad():
        network.classifier.weight.mul_(8)
        network.classifier.bias -= network(images(256, 0, 1, (1, 8, 8), seed=9)).mean(dim=0)
    return network


class Mean(EnsembleDefense):
    """A plain ensemble of given members."""

    def loss(self, batch: Batch, progress: float) -> Terms:
        raise NotImplementedError

    def predict(self, x: Tensor) -> Tensor:
        return mean_of_logits(self.member_logits(x))


class Scalar(ResidualBlock):
    """x + slope * x for positive x."""

    def __init__(self, slope: float) -> None:
        super().__init__(1, 1, 1, "relu")
        conv = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(conv.weight, slope)
        self.first, self.second = nn.Sequential(nn.Identity()), nn.Sequential(conv)


class TwoScalarBlocks(nn.Module):
    """Scores (h, -h) of h = (1 + 3)(1 + 5) x."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Scalar(3.0), Scalar(5.0)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            _, x = block(x)
        return torch.cat([x.flatten(1), -x.flatten(1)], dim=1)


class Straight(Threat):
    """Follows the gradient itself, so that a step of size 1 shows it."""

    def ascent(self, gradient: Tensor, sparsity: int = 1) -> Tensor:
        return gradient


def followed(model: nn.Module, x: Tensor, gamma: float) -> Tensor:
    """The gradient of the margin of class 0 that a step of SGM follows."""
    attack = ATTACKS.get("sgm")(ATTACKS.get("sgm").Params(steps=1, step_size="1", gamma=gamma, loss="margin"))
    y = torch.zeros(len(x), dtype=torch.int64)
    moved, _ = attack.step(Target(model), x, y, {}, Straight("linf", 1.0), KeyedRandom(0, torch.arange(len(x))))
    return moved - x


@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.5, 1.0])
def test_sgm_multiplies_the_gradient_of_every_residual_branch_by_gamma(gamma: float) -> None:
    x = torch.tensor([0.25, 0.5]).view(2, 1, 1, 1)
    expected = torch.full_like(x, -2 * (1 + 3 * gamma) * (1 + 5 * gamma))
    torch.testing.assert_close(followed(TwoScalarBlocks(), x, gamma), expected)


def test_sgm_with_gamma_one_is_its_base_attack_bit_for_bit() -> None:
    model, x = Mean([residual(seed) for seed in range(2)]).eval(), images(40, 0, 1, (1, 8, 8))
    y = decisions(model, x)
    outcomes = [
        attacked(model, x, y, name, 0.05, steps=5, **given)
        for name, given in (("sgm", {"gamma": 1}), ("bim", {}), ("sgm", {}))
    ]
    assert torch.equal(outcomes[0].x_adv, outcomes[1].x_adv)
    assert not torch.equal(outcomes[2].x_adv, outcomes[1].x_adv)


def test_sgm_with_momentum_and_gamma_one_is_mim() -> None:
    model, x = residual(), images(40, 0, 1, (1, 8, 8))
    y = decisions(model, x)
    sgm = attacked(model, x, y, "sgm", 0.05, steps=5, gamma=1, decay=1)
    assert torch.equal(sgm.x_adv, attacked(model, x, y, "mim", 0.05, steps=5).x_adv)


def test_sgm_judges_the_unchanged_scores_and_leaves_the_target_as_it_was() -> None:
    model, x = residual(), images(20, 0, 1, (1, 8, 8))
    target = Target(model)
    attack = ATTACKS.get("sgm")(ATTACKS.get("sgm").Params(gamma=0.2))
    before = target(x).detach()
    target.forget()
    y = before.argmax(dim=1)
    attack.step(target, x, y, {}, Threat("linf", 0.1), KeyedRandom(0, torch.arange(20)))
    assert torch.equal(target.scores_at(x), before)
    assert {block.branch_scale for block in target.residual_blocks} == {1.0}
    assert {block.branch_scale for block in model.residual_blocks()} == {1.0}


def test_sgm_puts_the_branches_back_also_when_a_step_fails() -> None:
    target = Target(residual())
    attack = ATTACKS.get("sgm")()
    with pytest.raises(RuntimeError):
        attack.step(
            target,
            torch.rand(2, 3, 8, 8),
            torch.zeros(2).long(),
            {},
            Threat("linf", 0.1),
            KeyedRandom(0, torch.arange(2)),
        )
    assert {block.branch_scale for block in target.residual_blocks} == {1.0}


def test_the_branches_of_all_members_are_found() -> None:
    x = images(2, 0, 1, (1, 8, 8))
    assert Target(Mean([residual(seed) for seed in range(3)]).eval()).traits(x).residual_branches == 3 * 2
    assert Target(nn.Sequential(residual())).traits(x).residual_branches == 2


@pytest.mark.parametrize("model", [linear(4, shape=(1, 8, 8)), nn.Sequential(nn.Flatten(), nn.Linear(64, 4))])
def test_sgm_refuses_a_model_without_residual_branches(model: nn.Module) -> None:
    x = images(4, shape=(1, 8, 8))
    with pytest.raises(UsageError, match=r"residual branches.*has none.*resnet20"):
        attacked(model, x, decisions(model, x), "sgm", 0.1)


@pytest.mark.parametrize("gamma", [-0.1, 1.5, float("nan")])
def test_a_gamma_outside_zero_to_one_is_refused(gamma: float) -> None:
    with pytest.raises(UsageError, match="expected a factor from 0 to 1"):
        ATTACKS.get("sgm").Params(gamma=gamma)


def test_batch_size_and_order_change_nothing_that_sgm_finds() -> None:
    model, x = Mean([residual(seed) for seed in range(2)]).eval(), images(40, 0, 1, (1, 8, 8))
    y, rows = decisions(model, x), torch.randperm(40, generator=torch.Generator().manual_seed(3))
    spec = AttackSpec.create("sgm", {"steps": 5}, "linf", 0.05)
    whole = attack_model(model, x, y, spec)
    assert 0 < int(whole.robust.sum()) < 40
    for batch_size in (64, 16):
        other = attack_model(model, x[rows], y[rows], spec, ids=rows, batch_size=batch_size)
        assert torch.equal(other.robust, whole.robust[rows])
        assert torch.equal(other.x_adv, whole.x_adv[rows])
    assert float((whole.x_adv - x).abs().max()) <= 0.05 + 1e-6


# --- m_fgsm ---------------------------------------------------------------------------------------


def test_diverse_inputs_with_probability_zero_are_mim_bit_for_bit() -> None:
    model, x, y = trained_network()
    ours, mim = (
        attacked(model, x[:60], y[:60], name, 0.1, steps=6, **given)
        for name, given in (("m_fgsm", {"probability": 0}), ("mim", {}))
    )
    assert 0 < int(ours.robust.sum()) < int(ours.clean.sum())
    assert torch.equal(ours.x_adv, mim.x_adv)
    assert (ours.forwards, ours.backwards) == (mim.forwards, mim.backwards)


def rng_for(count: int, step: int = 1) -> KeyedRandom:
    return KeyedRandom(0, torch.arange(count), step=step)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (12, 20), (1, 1)])
def test_a_transformed_image_is_the_shrunk_one_at_a_random_place_on_black(height: int, width: int) -> None:
    x = 0.1 + torch.rand(64, 3, height, width)
    shown = shrunk_and_padded(x, torch.ones(64).bool(), rng_for(64), 0.9)
    assert shown.shape == x.shape
    for image, source in zip(shown, x, strict=True):
        there = image[0] > 0
        rows, columns = there.any(dim=1).nonzero().flatten(), there.any(dim=0).nonzero().flatten()
        top, left, new_height, new_width = int(rows[0]), int(columns[0]), len(rows), len(columns)
        assert min(int(0.9 * height), height - 1) <= new_height <= max(1, height - 1)
        assert new_width == max(1, new_height * width // height)
        small = F.interpolate(source[None], (new_height, new_width), mode="nearest")[0]
        edges = (left, width - left - new_width, top, height - top - new_height)
        torch.testing.assert_close(image, F.pad(small, edges), rtol=0, atol=0)


def test_sizes_and_places_spread_over_all_there_are() -> None:
    x = torch.ones(2000, 1, 32, 32)
    shown = shrunk_and_padded(x, torch.ones(2000).bool(), rng_for(2000), 0.9)[:, 0]
    sizes = shown.amax(dim=2).sum(dim=1)
    tops = shown.amax(dim=2).argmax(dim=1)
    assert torch.bincount(sizes.long()).nonzero().flatten().tolist() == [28, 29, 30, 31]
    assert int(torch.bincount(sizes.long())[28:].min()) > 400
    assert sorted(set(tops[sizes == 28].tolist())) == [0, 1, 2, 3, 4]


def test_images_that_were_not_chosen_are_shown_as_they_are_and_each_image_has_its_own_draw() -> None:
    x = torch.rand(64, 3, 8, 8)
    chosen = torch.arange(64) % 2 == 0
    shown = shrunk_and_padded(x, chosen, rng_for(64), 0.5)
    assert torch.equal(shown[~chosen], x[~chosen])
    assert not any(torch.equal(a, b) for a, b in zip(shown[chosen], x[chosen], strict=True))
    part = torch.tensor([40, 3, 8])
    alone = shrunk_and_padded(x[part], chosen[part], KeyedRandom(0, part, step=1), 0.5)
    assert torch.equal(alone, shown[part])


def test_every_pixel_that_is_shown_passes_its_gradient_back() -> None:
    x = torch.rand(8, 2, 10, 10, requires_grad=True)
    shown = shrunk_and_padded(x, torch.ones(8).bool(), rng_for(8), 0.5)
    (gradient,) = torch.autograd.grad(shown.sum(), x)
    torch.testing.assert_close(gradient.sum(dim=(1, 2, 3)), (shown.detach() > 0).float().sum(dim=(1, 2, 3)))


def test_an_image_is_transformed_with_its_probability_and_anew_at_every_step() -> None:
    attack = ATTACKS.get("m_fgsm")()
    x = torch.rand(1000, 1, 8, 8)
    first, second = ((attack.shown(x, rng_for(1000, step)) != x).flatten(1).any(dim=1).float() for step in (1, 2))
    assert 0.45 < float(first.mean()) < 0.55
    assert 0.4 < float((first == second).float().mean()) < 0.6


def test_diverse_inputs_need_images_with_height_and_width() -> None:
    model = LinearClassifier(torch.randn(3, 20))
    x = torch.rand(4, 20)
    with pytest.raises(UsageError, match=r"images are of shape \(20,\).*height, width"):
        attacked(model, x, decisions(model, x), "m_fgsm", 0.1)


# --- deepfool -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "dual", "eps"), [("linf", 1, 1), ("l2", 2, 6)])
def test_on_a_linear_model_deepfool_goes_to_the_boundary_and_two_percent_beyond(
    norm: str, dual: int, eps: float
) -> None:
    model, x = linear(2), images(40, 0.4, 0.6)
    y = decisions(model, x)
    outcome = attacked(model, x, y, "deepfool", eps, norm)
    assert not bool(outcome.robust.any())
    shortest = -margins(model, x, y) / difference(model, y).double().flatten(1).norm(dim=1, p=dual)
    found = Threat(norm, eps).distance(outcome.x_adv, x)
    torch.testing.assert_close(found, 1.02 * (shortest + MARGIN), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 1), ("l2", 8)])
@pytest.mark.parametrize("candidates", [10, 3])
def test_deepfool_ends_where_foolbox_s_does(norm: str, eps: float, candidates: int) -> None:
    model, x, y = trained_network()
    with torch.no_grad():
        right = (model(x).argmax(dim=1) == y).nonzero().flatten()[:50]
    x, y = x[right], y[right]
    theirs = {"linf": foolbox.attacks.LinfDeepFoolAttack, "l2": foolbox.attacks.L2DeepFoolAttack}[norm](
        candidates=candidates
    )
    expected, _, fooled = theirs(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=None)
    outcome = attacked(model, x, y, "deepfool", eps, norm, candidates=candidates)
    assert bool(fooled.all())
    assert not bool(outcome.robust.any())
    torch.testing.assert_close(outcome.x_adv, expected, rtol=0, atol=1e-4)


def test_deepfool_makes_one_forward_and_a_backward_for_every_wrong_class_that_it_looks_at() -> None:
    model, x = linear(4), images(20, 0.4, 0.6)
    y = decisions(model, x)
    for candidates, backwards in ((10, 3), (3, 2), (2, 1)):
        outcome = attacked(model, x, y, "deepfool", 1, candidates=candidates)
        assert not bool(outcome.robust.any())
        # the clean image, the point beyond the boundary, and its judgement; gradients of the first two
        assert outcome.forwards == 3 * len(x)
        assert outcome.backwards == 2 * backwards * len(x)


def test_deepfool_does_not_depend_on_the_radius_with_which_its_length_is_compared() -> None:
    model, x, y = trained_network()
    far = attacked(model, x, y, "deepfool", 1)
    length = Threat("linf", 1).distance(far.x_adv, x)
    near = attacked(model, x, y, "deepfool", 0.1)
    assert torch.equal(near.robust, far.clean & (length > 0.1 + 1e-6))
    assert 0 < int(near.robust.sum()) < int(near.clean.sum())
    torch.testing.assert_close(near.x_adv[~near.robust], far.x_adv[~near.robust])


def test_an_image_whose_shortest_perturbation_is_too_long_ends_when_it_is_found() -> None:
    model, x = linear(4), images(20, 0.4, 0.6)
    outcome = attacked(model, x, decisions(model, x), "deepfool", 1e-5)
    assert bool(outcome.robust.all())
    assert outcome.forwards <= 4 * len(x)


def test_where_there_is_no_gradient_deepfool_gives_up_without_nan() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([2.0, 0.0, 0.0]) + 0 * x.flatten(1)[:, :3]

    x = images(5)
    outcome = attacked(Flat(), x, torch.zeros(5, dtype=torch.int64), "deepfool", 0.1, steps=5)
    assert bool(outcome.robust.all())


@pytest.mark.parametrize("params", [{"candidates": 1}, {"steps": -1}, {"overshoot": -0.1}])
def test_bad_settings_of_deepfool_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected at least"):
        AttackSpec.create("deepfool", params, "linf", 0.1)
