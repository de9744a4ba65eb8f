"""The model as an attack sees it: the same function, its own weights, and every pass counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ensdef
from ensdef import combine
from ensdef.defense import Batch, EnsembleDefense, Terms
from ensdef.target import Target
from ensdef.testing import LinearClassifier

SHAPE, CLASSES = (1, 8, 8), 5


class Mean(EnsembleDefense):
    """Log mean probability of given members."""

    def loss(self, batch: Batch, progress: float) -> Terms:
        raise NotImplementedError


class MaxOfLogits(Mean):
    def predict(self, x: Tensor) -> Tensor:
        return self.member_logits(x).amax(dim=0)


def settle(model: nn.Module) -> nn.Module:
    """Batch-norm statistics and affine parameters as after some training."""
    generator = torch.Generator().manual_seed(7)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_(0, 0.2, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
            with torch.no_grad():
                part.weight.uniform_(0.5, 1.5, generator=generator)
                part.bias.normal_(0, 0.2, generator=generator)
    return model


def conv(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(384, CLASSES),
        )
    return settle(network)


def defence(method: str) -> EnsembleDefense:
    model = ensdef.create_defense(
        method, architecture="small_resnet", members=3, num_classes=CLASSES, image_shape=SHAPE
    )
    settle(model)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: LinearClassifier(torch.randn(CLASSES, 64, generator=torch.Generator().manual_seed(0))),
    "conv": conv,
    "ensemble": lambda: MaxOfLogits([conv(0), conv(1)]),
    "nat": lambda: defence("nat"),
    "soe": lambda: defence("soe"),
}


def images(count: int = 6) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def expected(model: nn.Module, x: Tensor) -> Tensor:
    flags = [part.training for part in model.modules()]
    with torch.no_grad():
        scores: Tensor = model.eval()(x)
    for part, flag in zip(model.modules(), flags, strict=True):
        part.training = flag
    return scores


# --- the same function ----------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "as it is"])
@pytest.mark.parametrize("name", MODELS)
def test_a_target_computes_what_the_model_computes_in_eval_mode(name: str, fold: bool) -> None:
    model = MODELS[name]().train()
    torch.testing.assert_close(Target(model, fold=fold)(images()), expected(model, images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_folding_changes_no_score_and_no_gradient_by_more_than_rounding(name: str) -> None:
    model = MODELS[name]()
    results = []
    for fold in (True, False):
        x = images().requires_grad_()
        scores = Target(model, fold=fold)(x)
        results.append((scores.detach(), torch.autograd.grad(scores[:, 0].sum(), x)[0]))
    for folded, plain in zip(*results, strict=True):
        torch.testing.assert_close(folded, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_scores_have_a_gradient_to_the_images_and_none_to_the_weights(name: str) -> None:
    model = MODELS[name]()
    target = Target(model)
    x = images().requires_grad_()
    target(x).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in target.module.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_in_bf16_the_scores_are_float32_and_near(name: str) -> None:
    model = MODELS[name]()
    scores = Target(model, precision="bf16")(images())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected(model, images()), rtol=0.05, atol=0.15)
    assert not torch.equal(scores, Target(model)(images()))


def test_the_model_keeps_its_precision_when_a_target_searches_in_bf16() -> None:
    model = conv()
    Target(model, precision="bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", MODELS)
def test_a_target_has_weights_of_its_own(name: str) -> None:
    model = MODELS[name]()
    target = Target(model)
    before = {name: view(images()).detach() for name, view in target.views.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert before.keys() == target.views.keys()
    for view, scores in before.items():
        assert torch.equal(target.views[view](images()), scores), view


@pytest.mark.parametrize("name", MODELS)
def test_views_reach_only_the_weights_of_the_copy(name: str) -> None:
    target = Target(MODELS[name]())
    before = {name: view(images()).detach() for name, view in target.views.items()}
    with torch.no_grad():
        for parameter in target.module.parameters():
            parameter.mul_(-2)
    for view, scores in before.items():
        assert not torch.equal(target.views[view](images()), scores), view


# --- views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_a_plain_module_has_one_view_and_neither_members_nor_a_choice(name: str) -> None:
    target = Target(MODELS[name]())
    assert list(target.views) == ["predict"]
    assert torch.equal(target.views["predict"](images()), target(images()))
    assert target.member_logits(images()) is None
    assert target.selection(images()) is None


def test_an_ensemble_has_a_view_of_each_member_of_their_means_and_of_its_decision() -> None:
    model = MaxOfLogits([conv(0), conv(1)])
    target = Target(model)
    assert set(target.views) == {"mean_probability", "mean_logit", "member0", "member1", "predict"}
    logits = torch.stack([expected(member, images()) for member in model.members])
    meant = {
        "mean_probability": logits.softmax(dim=2).mean(dim=0).log(),
        "mean_logit": logits.mean(dim=0),
        "member0": logits[0].log_softmax(dim=1),
        "member1": logits[1].log_softmax(dim=1),
        "predict": logits.amax(dim=0),
    }
    for view, scores in meant.items():
        torch.testing.assert_close(target.views[view](images()), scores, rtol=1e-5, atol=1e-5)
    given = target.member_logits(images())
    assert given is not None
    torch.testing.assert_close(given, logits, rtol=1e-5, atol=1e-5)
    assert target.selection(images()) is None


def test_every_view_of_an_ensemble_has_a_gradient_to_the_images() -> None:
    for view, function in Target(defence("soe")).views.items():
        x = images().requires_grad_()
        gradient = torch.autograd.grad(function(x)[:, 0].sum(), x)[0]
        assert float(gradient.abs().sum()) > 0, view


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_defence_that_chooses_among_its_members_shows_the_choice_in_every_precision(precision: str) -> None:
    model = defence("soe")
    target = Target(model, precision=precision)
    x = images().requires_grad_()
    chosen = target.selection(x)
    assert chosen is not None
    assert chosen.shape == (6, 3)
    assert chosen.dtype == torch.float32
    meant = model.selection(images())
    assert meant is not None
    tolerance = 1e-5 if precision == "fp32" else 0.05
    torch.testing.assert_close(chosen, meant, rtol=tolerance, atol=tolerance)
    assert torch.autograd.grad(chosen.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_views_and_member_logits_are_float32_in_every_precision(precision: str) -> None:
    target = Target(defence("soe"), precision=precision)
    logits = target.member_logits(images())
    assert logits is not None
    assert logits.dtype == torch.float32
    assert logits.shape == (3, 6, CLASSES)
    assert {view(images()).dtype for view in target.views.values()} == {torch.float32}


@pytest.mark.parametrize("combiner", combine.COMBINERS)
def test_a_combiner_replaces_the_decision_and_leaves_the_other_views(combiner: str) -> None:
    model = MaxOfLogits([conv(0), conv(1)])
    native, target = Target(model), Target(model, combiner=combiner)
    logits = native.member_logits(images())
    assert logits is not None
    torch.testing.assert_close(target(images()), combine.COMBINERS[combiner](logits))
    assert torch.equal(target.views["predict"](images()), target(images()))
    assert torch.equal(target.views["mean_logit"](images()), native.views["mean_logit"](images()))


# --- counting -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "members"), [("linear", 1), ("conv", 1), ("ensemble", 2), ("nat", 3), ("soe", 3)])
def test_a_pass_counts_once_an_image_and_member(name: str, members: int) -> None:
    target = Target(MODELS[name]())
    with torch.no_grad():
        target(images(7))
    assert (target.passes.forwards, target.passes.backwards) == (7 * members, 0)
    x = images(5).requires_grad_()
    scores = target(x)
    assert (target.passes.forwards, target.passes.backwards) == (12 * members, 0)
    torch.autograd.grad(scores.sum(), x)
    assert target.passes.forwards == 12 * members
    # a defence that chooses sends the gradient through chosen members only
    assert target.passes.backwards == 5 * members


def test_a_view_of_one_member_counts_one_member() -> None:
    target = Target(defence("nat"))
    x = images(4).requires_grad_()
    torch.autograd.grad(target.views["member1"](x).sum(), x)
    assert (target.passes.forwards, target.passes.backwards) == (4, 4)


class Pair(nn.Module):
    """A member with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = conv()

    def forward(self, x: Tensor, both: bool = False) -> Any:
        logits = self.network(x)
        return (logits, logits.mean(dim=1)) if both else logits


class Pairs(Mean):
    def predict(self, x: Tensor) -> Tensor:
        parts = [member(x, both=True) for member in self.members]
        return torch.stack([logits + extra[:, None] for logits, extra in parts]).mean(dim=0)


def test_a_member_with_two_outputs_counts_one_pass_each_way() -> None:
    target = Target(Pairs([Pair(), Pair()]))
    x = images(4).requires_grad_()
    torch.autograd.grad(target(x).sum(), x)
    assert (target.passes.forwards, target.passes.backwards) == (8, 8)


@pytest.mark.parametrize("name", ["conv", "pairs"])
def test_every_backward_pass_through_one_forward_pass_counts(name: str) -> None:
    target = Target(conv() if name == "conv" else Pairs([Pair()]))
    x = images(4).requires_grad_()
    scores = target(x)
    for index in range(CLASSES):  # as DeepFool does: one graph, one gradient a class
        torch.autograd.grad(scores[:, index].sum(), x, retain_graph=True)
    assert (target.passes.forwards, target.passes.backwards) == (4, 4 * CLASSES)


def test_only_the_counted_share_of_the_rows_counts() -> None:
    target = Target(conv())
    target.passes.share = 3 / 16
    x = images(16).requires_grad_()
    torch.autograd.grad(target(x).sum(), x)
    assert (target.passes.forwards, target.passes.backwards) == (3, 3)


def test_counting_hooks_are_not_left_on_the_model() -> None:
    model = MaxOfLogits([conv(0), conv(1)])
    Target(model)
    assert not any(part._forward_hooks for part in model.modules())


# --- remembering ----------------------------------------------------------------------------------


def test_the_scores_of_a_pass_are_known_for_the_same_memory() -> None:
    target, x = Target(conv()), images()
    scores = target(x.detach().requires_grad_())
    known = target.scores_at(x)
    assert known is not None
    assert torch.equal(known, scores)
    assert not known.requires_grad


def test_the_scores_of_a_pass_are_not_known_for_a_copy() -> None:
    target, x = Target(conv()), images()
    target(x.clone())
    assert target.scores_at(x) is None
    target(x)
    assert target.scores_at(x.clone()) is None


def test_the_scores_of_a_pass_are_not_known_once_the_images_were_written() -> None:
    target, x = Target(conv()), images()
    target(x)
    x.add_(0.1)
    assert target.scores_at(x) is None
    target(x)
    assert target.scores_at(x) is not None


@pytest.mark.parametrize(
    "part",
    [lambda x: x[:3], lambda x: x[3:], lambda x: x.transpose(2, 3), lambda x: x.flatten(1).view(6, 8, 8, 1)],
    ids=["first rows", "last rows", "transposed", "another shape"],
)
def test_the_scores_of_a_pass_are_not_known_for_another_view_of_the_same_memory(
    part: Callable[[Tensor], Tensor],
) -> None:
    target, x = Target(MODELS["linear"]()), images()
    target(part(x))
    assert target.scores_at(x) is None


def test_a_pass_through_another_view_is_no_pass_of_the_decision() -> None:
    target, x = Target(MaxOfLogits([conv(0), conv(1)])), images()
    target.views["mean_logit"](x)
    assert target.scores_at(x) is None
    target.views["predict"](x)
    assert target.scores_at(x) is not None


def test_the_latest_pass_is_remembered_until_it_is_forgotten() -> None:
    target, x, other = Target(conv()), images(), images() / 2
    target(x)
    scores = target(other)
    known = target.scores_at(other)
    assert known is not None
    assert torch.equal(known, scores)
    target.forget()
    assert target.scores_at(x) is None
    assert target.scores_at(other) is None
