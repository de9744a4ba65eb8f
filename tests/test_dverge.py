"""DVERGE: features distilled out of one member, learned by the others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ensdef.methods.dverge import DiversifyingVulnerabilities, DvergeHyper, feature_distance
from torch import Tensor, nn
from toys_defense import CLASSES, SHAPE, generator, number, same_weights, spread, toy_data, toy_spec

from ensdef.build import create_defense
from ensdef.defense import Batch
from ensdef.errors import UsageError
from ensdef.recipe import InnerAttack
from ensdef.testing import lend_adversary
from ensdef.training import train

LAYERS = range(1, 7)  # of small_resnet: stem, two blocks of two, logits
BATCH_NORM = ("eval", "train")


def defense_of(members: int = 3, method: str = "dverge", **hyper: Any) -> Any:
    defense = create_defense(
        method,
        architecture="small_resnet[width=4]",
        members=members,
        num_classes=CLASSES,
        image_shape=SHAPE,
        **hyper,
    )
    spread(defense)
    return defense


def images(count: int = 10, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=generator(seed))


def batch(count: int = 10) -> Batch:
    y = torch.arange(count) % CLASSES
    return Batch(images(count), y, torch.arange(count), ((images(count, 1), (y + 1) % CLASSES),), generator())


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def ce(logits: Tensor, y: Tensor) -> Tensor:
    return -logits.log_softmax(dim=1)[torch.arange(len(y)), y].mean()


def released_distillation(net: Any, source: Tensor, target: Tensor, layer: int, eps: float, steps: int) -> Tensor:
    """As the authors write it: one loss for the batch, and the target's features anew at every step."""
    x, accumulated = source.clone(), torch.zeros_like(source)
    for _ in range(steps):
        x.requires_grad_()
        out = net.features(x, layer)
        loss = F.mse_loss(out, net.features(target, layer).detach())
        gradient = torch.autograd.grad(loss, x)[0]
        accumulated = accumulated + gradient / gradient.abs().flatten(1).sum(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
        x = x.detach() - eps / 10 * accumulated.sign()
        x = torch.max(torch.min(x, source + eps), source - eps).clamp(0, 1)
    return x


# --- distillation ---------------------------------------------------------------------------------


def test_the_feature_distance_is_the_mean_square_of_every_image() -> None:
    features, target = torch.randn(4, 3, 2, 2, generator=generator()), torch.randn(4, 3, 2, 2, generator=generator(1))
    expected = [float(((one - other) ** 2).sum()) / 12 for one, other in zip(features, target, strict=True)]
    assert feature_distance(features, target).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_norm", BATCH_NORM)
@pytest.mark.parametrize("layer", LAYERS)
def test_distilled_images_are_those_of_a_plain_rewrite(layer: int, batch_norm: Any) -> None:
    """In float64: folding rounds, and a sign step makes much of the last digit."""
    defense = defense_of(2, distill_eps=0.07).double().train()
    defense.layer = layer
    source, target = images().double(), images(seed=1).double()
    other = copy.deepcopy(defense.members[0]).train(batch_norm == "train")
    lend_adversary(defense, attack=InnerAttack(batch_norm=batch_norm))
    distilled = defense.distill(defense.members[0], source, target)
    expected = released_distillation(other, source, target, layer, 0.07, 10)
    torch.testing.assert_close(distilled, expected, rtol=0, atol=1e-9)
    for ours, theirs in zip(defense.members[0].buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layer", LAYERS)
def test_distillation_brings_the_features_of_the_source_nearer_to_the_target_s(layer: int) -> None:
    defense = defense_of(distill_eps=0.2).eval()
    defense.layer = layer
    lend_adversary(defense)
    source, target = images(), images(seed=1)
    for member in defense.members:
        distilled = defense.distill(member, source, target)
        before, after = (
            feature_distance(member.features(x, layer), member.features(target, layer)) for x in (source, distilled)
        )
        assert bool((after <= before).all())
        assert number(after.mean()) < 0.95 * number(before.mean())


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.3, 1.0])
def test_distilled_images_stay_in_ball_and_box(eps: float) -> None:
    defense = defense_of(distill_eps=eps)
    lend_adversary(defense, eps=0.5)
    source = images()
    distilled = defense.distill(defense.members[0], source, images(seed=1))
    assert number((distilled - source).abs().max()) <= eps + 1e-6
    assert number(distilled.min()) >= 0
    assert number(distilled.max()) <= 1
    assert torch.equal(distilled, source) == (eps == 0)
    assert not distilled.requires_grad


def test_the_training_radius_norm_and_steps_leave_distillation_alone() -> None:
    crafted = []
    for eps, norm, attack in (
        (0.1, "linf", InnerAttack(steps=3)),
        (2.0, "l2", InnerAttack(steps=1, step_size="eps", label="predicted", start="zero")),
    ):
        defense = defense_of()
        lend_adversary(defense, eps, norm, attack=attack)
        crafted.append(defense.distill(defense.members[0], images(), images(seed=1)))
    assert torch.equal(*crafted)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_layer_decides_what_is_distilled(layer: int) -> None:
    defense = defense_of()
    lend_adversary(defense)
    crafted = []
    for defense.layer in (layer, layer % len(LAYERS) + 1):
        crafted.append(defense.distill(defense.members[0], images(), images(seed=1)))
    assert not torch.equal(*crafted)


def test_members_and_targets_give_images_of_their_own() -> None:
    defense = defense_of()
    lend_adversary(defense)
    first, other_member, other_target = (
        defense.distill(defense.members[index], images(), images(seed=seed)) for index, seed in ((0, 1), (1, 1), (0, 2))
    )
    assert not torch.equal(first, other_member)
    assert not torch.equal(first, other_target)


def statistics(module: nn.Module) -> list[Tensor]:
    return [
        buffer.clone() for part in module.modules() if isinstance(part, nn.BatchNorm2d) for buffer in part.buffers()
    ]


def test_distillation_in_eval_mode_leaves_running_statistics_alone() -> None:
    defense = defense_of().train()
    lend_adversary(defense, attack=InnerAttack(batch_norm="eval"))
    before = statistics(defense)
    defense.distill(defense.members[0], images(), images(seed=1))
    assert all(torch.equal(*pair) for pair in zip(before, statistics(defense), strict=True))
    assert all(part.training for part in defense.modules())


def test_distillation_in_train_mode_shows_the_live_member_source_and_target_at_every_step() -> None:
    defense = defense_of(distill_steps=7).train()
    lend_adversary(defense, attack=InnerAttack(batch_norm="train"))
    others = statistics(defense.members[1])
    defense.distill(defense.members[0], images(), images(seed=1))
    stem = defense.members[0].stem[1]
    assert int(stem.num_batches_tracked) == 2 * 7
    assert all(torch.equal(*pair) for pair in zip(others, statistics(defense.members[1]), strict=True))


def test_in_eval_mode_the_target_passes_once() -> None:
    defense, seen = defense_of(distill_steps=7).train(), []
    target = images(seed=1)
    defense.members[0].register_forward_pre_hook(lambda module, args: seen.append(torch.equal(args[0], target)))
    lend_adversary(defense)
    defense.distill(defense.members[0], images(), target)
    assert seen.count(True) == 1
    assert seen.count(False) == 7


# --- the layer of an epoch ------------------------------------------------------------------------


def test_the_layer_is_drawn_uniformly_from_the_first_convolution_to_the_logits() -> None:
    defense = defense_of()
    drawn = []
    for epoch in range(3000):
        defense.begin_epoch(epoch, generator(epoch))
        drawn.append(defense.layer)
    assert set(drawn) == set(LAYERS)
    counts = [drawn.count(layer) for layer in LAYERS]
    assert all(abs(count - 500) < 5 * (3000 * 1 / 6 * 5 / 6) ** 0.5 for count in counts)
    assert all(type(layer) is int for layer in drawn)


def test_the_layer_depends_on_the_epoch_s_generator_alone() -> None:
    layers = []
    for _ in range(2):
        defense = defense_of()
        for epoch in range(20):
            defense.begin_epoch(epoch, generator(epoch))
            layers.append(defense.layer)
            torch.rand(1)
    assert layers[:20] == layers[20:]


def test_a_deeper_architecture_has_more_layers_to_draw_from() -> None:
    defense = create_defense("dverge", architecture="resnet20", members=2)
    seen = set()
    for epoch in range(400):
        defense.begin_epoch(epoch, generator(epoch))
        seen.add(defense.layer)
    assert seen == set(range(1, 21))


# --- the loss -------------------------------------------------------------------------------------


class Stub:
    """Stands in for the trainer's adversary: noise of its own for every call, and a memory."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Tensor, Any, dict[str, Any]]] = []

    def __call__(self, objective: Any, x: Tensor, y: Any = None, **options: Any) -> Tensor:
        self.calls.append((objective, x, y, options))
        return self.crafted(len(self.calls) - 1, x)

    @staticmethod
    def crafted(call: int, x: Tensor) -> Tensor:
        return (x + 0.3 * torch.randn(x.shape, generator=generator(100 + call))).clamp(0, 1)

    def as_attacked(self, module: nn.Module) -> nn.Module:
        return module


def released_losses(
    members: Any, y: Tensor, distilled: list[Tensor], attacked: list[Tensor], c: float = 1.0
) -> list[Tensor]:
    """Every member's loss as the authors write it."""
    losses = []
    for i, member in enumerate(members):
        loss: Any = 0
        for j, x in enumerate(distilled):
            if i != j:
                loss = loss + ce(member(x), y)
        if attacked:
            loss = c * loss + ce(member(attacked[i]), y)
        losses.append(loss)
    return losses


@pytest.mark.parametrize("members", [2, 3, 4])
@pytest.mark.parametrize("hyper", [{}, {"adversarial": True}, {"adversarial": True, "distill_weight": 0.3}])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_whole_loss_is_that_of_a_plain_rewrite(members: int, hyper: dict[str, Any], training: bool) -> None:
    """Also in train mode: a forward that joined sources would have other batch statistics."""
    defense, given_batch = defense_of(members, **hyper).train(training), batch()
    defense._adversary = Stub()
    terms = defense.loss(given_batch, 0.0)
    crafted = [Stub.crafted(call, given_batch.x) for call in range(2 * members)]
    attacked = crafted[members:] if hyper else []
    expected = released_losses(
        defense.members, given_batch.y, crafted[:members], attacked, hyper.get("distill_weight", 1.0)
    )
    torch.testing.assert_close(total(terms), torch.stack(expected).sum(), rtol=1e-5, atol=1e-6)
    assert terms.keys() == {"distilled_ce", "adv_ce"} if hyper else {"distilled_ce"}


def test_every_member_is_distilled_from_the_source_and_then_attacked() -> None:
    defense, given_batch, stub = defense_of(adversarial=True, distill_steps=7, distill_eps="8/255"), batch(), Stub()
    defense._adversary = stub
    defense.loss(given_batch, 0.0)
    distilling, attacking = stub.calls[:3], stub.calls[3:]
    for _, x, _, options in distilling:
        assert x is given_batch.x
        threat = options.pop("threat")
        assert (threat.norm, threat.eps) == ("linf", pytest.approx(8 / 255))
        assert options.pop("step_size") == pytest.approx(0.8 / 255)
        assert options == {"steps": 7, "momentum": 1.0, "start": "zero", "descend": True}
    assert [objective for objective, _, _, _ in attacking] == list(defense.members)
    for _, x, y, options in attacking:
        assert x is given_batch.x
        assert y is given_batch.y
        assert not any(options.values())


def test_the_target_is_the_second_stream_and_its_label_is_not_used() -> None:
    losses = []
    given_batch = batch()
    (target, labels), *_ = given_batch.streams
    assert DiversifyingVulnerabilities.streams == 2
    for stream in ((target, labels), (target, (labels + 1) % CLASSES), (1 - target, labels)):
        defense = defense_of().eval()
        lend_adversary(defense)
        changed = Batch(given_batch.x, given_batch.y, given_batch.ids, (stream,), given_batch.rng)
        losses.append(number(total(defense.loss(changed, 0.0))))
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("members", [2, 3])
def test_without_steps_the_others_learn_the_source_itself(members: int) -> None:
    defense, given_batch = defense_of(members, distill_steps=0).eval(), batch()
    lend_adversary(defense)
    assert torch.equal(defense.distill(defense.members[0], given_batch.x, images(seed=1)), given_batch.x)
    expected = (members - 1) * sum(ce(member(given_batch.x), given_batch.y) for member in defense.members)
    torch.testing.assert_close(total(defense.loss(given_batch, 0.0)), expected)


def test_a_member_s_gradient_does_not_depend_on_another_s_weights() -> None:
    gradients = []
    for scale in (0.0, 0.5):
        defense = defense_of(adversarial=True).train()
        spread(defense.members[1], seed=9, scale=scale)
        defense._adversary = Stub()
        gradients.append(torch.autograd.grad(total(defense.loss(batch(), 0.0)), list(defense.parameters())))
    of_first = len(list(defense.members[0].parameters()))
    assert all(torch.equal(*pair) for pair in zip(*(part[:of_first] for part in gradients), strict=True))
    of_second = [part[of_first : 2 * of_first] for part in gradients]
    assert not all(torch.equal(*pair) for pair in zip(*of_second, strict=True))


def test_a_member_does_not_learn_from_the_images_distilled_out_of_it() -> None:
    """With two members each has the other's images alone: its loss is the other's to craft."""
    defense, given_batch = defense_of(2).eval(), batch()
    defense._adversary = Stub()
    loss = total(defense.loss(given_batch, 0.0))
    for i, member in enumerate(defense.members):
        weights = list(member.parameters())
        ours = torch.autograd.grad(loss, weights, retain_graph=True)
        own = ce(member(Stub.crafted(1 - i, given_batch.x)), given_batch.y)
        for one, other in zip(ours, torch.autograd.grad(own, weights), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adversarial", [False, True])
def test_one_optimiser_moves_the_members_as_the_released_code_s_one_a_member(adversarial: bool) -> None:
    defense = defense_of(adversarial=adversarial).train()
    released = copy.deepcopy(defense)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    joint = torch.optim.SGD(defense.parameters(), **options)
    own = [torch.optim.SGD(member.parameters(), **options) for member in released.members]
    given_batch = batch()
    defense._adversary = Stub()
    for step in range(2):
        joint.zero_grad()
        total(defense.loss(given_batch, 0.0)).backward()
        joint.step()
        first = step * (6 if adversarial else 3)
        crafted = [Stub.crafted(first + call, given_batch.x) for call in range(6)]
        for i, optimizer in enumerate(own):  # each member's loss after the earlier members have moved
            attacked = crafted[3:] if adversarial else []
            loss = released_losses(released.members, given_batch.y, crafted[:3], attacked)[i]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for ours, theirs in zip(defense.parameters(), released.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_norm", BATCH_NORM)
@pytest.mark.parametrize("hyper", [{}, {"adversarial": True}, {"distill_step_size": "eps/4"}])
def test_every_option_gives_finite_terms_and_every_member_a_gradient(hyper: dict[str, Any], batch_norm: Any) -> None:
    defense = defense_of(**hyper).train()
    lend_adversary(defense, attack=InnerAttack(steps=3, batch_norm=batch_norm))
    terms = defense.loss(batch(), 0.0)
    for name, value in terms.items():
        assert bool(torch.isfinite(value)), name
        weights = [member.classifier.weight for member in defense.members]
        gradients = torch.autograd.grad(value, weights, retain_graph=True)
        assert all(bool((gradient != 0).any()) for gradient in gradients), name


def test_the_members_probabilities_are_averaged() -> None:
    defense, x = defense_of(), images()
    mean = torch.stack([member(x).softmax(dim=1) for member in defense.members]).mean(dim=0)
    torch.testing.assert_close(defense(x).exp(), mean)


# --- where training starts, and what its key holds ------------------------------------------------


def test_training_starts_from_the_plain_ensemble_of_the_same_setting() -> None:
    data = toy_data()
    spec = toy_spec("dverge", data, members=3, seed=5)
    assert spec.prerequisites.keys() == {"start"}
    assert spec.prerequisites["start"].key == toy_spec("nat", data, members=3, seed=5).key
    assert toy_spec("dverge", data, {"warm_start": False}).prerequisites == {}


def test_the_members_take_over_the_plain_ensemble_s_weights_and_statistics() -> None:
    defense, nat = defense_of(), defense_of(method="nat")
    spread(nat, seed=7)
    assert not same_weights(defense.members, nat.members)
    defense.warm_start({"start": nat})
    assert same_weights(defense.members, nat.members)
    spread(defense, seed=8)
    assert not same_weights(defense.members, nat.members), "copied, not shared"


def test_without_a_warm_start_the_members_stay_as_they_are() -> None:
    defense = defense_of(warm_start=False)
    before = copy.deepcopy(defense)
    defense.warm_start({})
    assert same_weights(defense, before)


def test_a_short_training_begins_at_the_plain_ensemble() -> None:
    data = toy_data()
    nat = train(toy_spec("nat", data), data, device="cpu").defense
    spec = toy_spec("dverge", data, lr=0.0)
    trained = train(spec, data, {"start": nat}, device="cpu").defense
    pairs = list(zip(trained.parameters(), nat.parameters(), strict=True))
    assert all(torch.equal(*pair) for pair in pairs)
    moved = train(toy_spec("dverge", data), data, {"start": nat}, device="cpu").defense
    assert not any(torch.equal(*pair) for pair in zip(moved.parameters(), nat.parameters(), strict=True))


def test_trainings_whose_distillation_differs_in_batch_norm_mode_have_different_keys() -> None:
    data = toy_data()
    keys = {toy_spec("dverge", data, attack={"batch_norm": mode}).key for mode in BATCH_NORM}
    assert len(keys) == 2


# --- bad input ------------------------------------------------------------------------------------


def test_one_member_is_refused() -> None:
    with pytest.raises(UsageError, match=r"dverge with 1 member.*use 2 or more"):
        defense_of(1)


def test_members_without_hidden_features_are_refused() -> None:
    def make_network(outputs: int | None = None) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))

    with pytest.raises(UsageError, match=r"hidden features.*Sequential.*registered architecture"):
        DiversifyingVulnerabilities.build(make_network, 3, CLASSES, DvergeHyper())


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"distill_eps": -0.1}, "distill_eps is -0.1; expected a radius in"),
        ({"distill_eps": 8}, "distill_eps is 8.0; expected a radius in"),
        ({"distill_steps": -1}, "distill_steps is -1; expected at least 0"),
        ({"distill_step_size": "-1/255"}, "distill_step_size is -.*; expected at least 0"),
        ({"distill_step_size": "ten"}, "distill_step_size is 'ten'; expected a number"),
        ({"adversarial": True, "distill_weight": -1}, "distill_weight is -1.0; expected at least 0"),
        ({"distill_weight": 2}, "distill_weight means nothing without adversarial=true"),
    ],
)
def test_an_impossible_hyper_parameter_is_refused_by_name(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"dverge: {message}"):
        defense_of(**hyper)
