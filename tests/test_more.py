"""Mixture of robust experts: who the experts are, how the gate mixes them, and what gate training moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from ensdef.methods.more import WEATHER, MixtureOfRobustExperts, mixture_of_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys_defense import CLASSES, SHAPE, generator, number, spread, toy_data, toy_setting

from ensdef.build import build_defense, create_defense
from ensdef.defense import Batch, EnsembleDefense
from ensdef.errors import UsageError
from ensdef.losses import cross_entropy
from ensdef.recipe import InnerAttack
from ensdef.specs import TrainSpec
from ensdef.testing import lend_adversary
from ensdef.threat import Threat
from ensdef.training import train
from ensdef.weather import fog, snow

quick = settings(deadline=None, max_examples=60, derandomize=True)
LP = ["clean", "l2 0.5", "l2 1", "linf 0.75*eps", "linf eps"]
STEPS = 4
SMALL: dict[str, Any] = {"linf": "eps", "l2": ()}


def defense_of(**hyper: Any) -> MixtureOfRobustExperts:
    defense = create_defense(
        "more", architecture="small_resnet[width=4]", num_classes=CLASSES, image_shape=SHAPE, **hyper
    )
    assert isinstance(defense, MixtureOfRobustExperts)
    spread(defense)
    with torch.no_grad():  # a gate whose mind changes from image to image
        scores = defense.gate(images(64, seed=7))
        defense.gate.classifier.weight.mul_(2 / scores.std(dim=0)[:, None])
        defense.gate.classifier.bias.sub_(defense.gate(images(64, seed=7)).mean(dim=0))
    return defense


def images(count: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=generator(seed))


def batch(count: int = 12) -> Batch:
    return Batch(images(count), torch.arange(count) % CLASSES, torch.arange(count), (), generator())


class Stub:
    """Stands in for the trainer's adversary: mirrors the images and remembers its calls."""

    threat = Threat("linf", 0.2)
    attack = InnerAttack(steps=STEPS)

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Tensor, Tensor, Threat, float | None]] = []

    def __call__(self, objective: Any, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        self.calls.append((objective, x, y, options.pop("threat"), options.pop("step_size")))
        assert not any(options.values()), "all else is the training's"
        return 1 - x


def stubbed(**hyper: Any) -> tuple[MixtureOfRobustExperts, Stub]:
    defense, stub = defense_of(**hyper), Stub()
    defense._adversary = stub
    return defense.eval(), stub


def names(steps: Iterator[dict[str, Tensor]]) -> list[str]:
    return [name for terms in steps for name in terms]


# --- the experts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hyper", "roles"),
    [
        ({}, LP),
        ({"experts": "all"}, [*LP, *WEATHER]),
        ({"linf": ("eps",), "l2": ()}, ["clean", "linf eps"]),
        ({"linf": "2/255", "l2": "0.25+0.5"}, ["clean", "l2 0.25", "l2 0.5", "linf 2/255"]),
    ],
)
def test_one_expert_is_clean_and_one_is_there_for_every_radius_and_weather(hyper: Any, roles: list[str]) -> None:
    defense = defense_of(**hyper)
    assert defense.hyper.roles == roles
    assert len(defense.members) == len(roles)
    assert defense.gate(images()).shape == (12, len(roles))


def test_the_paper_has_five_experts_or_nine() -> None:
    assert [len(defense_of(experts=experts).members) for experts in ("lp", "all")] == [5, 9]


def test_members_cannot_be_asked_for() -> None:
    with pytest.raises(UsageError, match="members is 1, but more always has 5"):
        create_defense("more", architecture="resnet8", members=1)


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"linf": (), "l2": ()}, r"^more: linf and l2 are empty, .*give a radius"),
        ({"linf": "eps+eps"}, r"^more: .*has a radius twice"),
        ({"l2": "half"}, r"^more: l2 is 'half'; expected a number"),
        ({"linf": "eps*0.75"}, r"^more: linf is 'eps\*0.75'; expected"),
        ({"experts": "weather"}, r"more\[experts\] is 'weather'; expected one of lp, all"),
    ],
)
def test_settings_that_make_no_mixture_are_refused(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_defense("more", architecture="resnet8", **hyper)


# --- what must be trained first -------------------------------------------------------------------

DATA = toy_data()


def spec_of(hyper: dict[str, Any] | None = None, **changes: Any) -> TrainSpec:
    return TrainSpec.create("more", hyper or {}, toy_setting(DATA, **{"train_eps": "0.2", **changes}))


def test_every_expert_is_a_single_network_trained_for_its_own_perturbation() -> None:
    needed = spec_of({"experts": "all"}, augment="flip").prerequisites
    told = {
        role: (spec.method, spec.model.members, spec.recipe.augment, *threat)
        for role, spec in needed.items()
        for threat in [(spec.setting.norm, str(Fraction(spec.setting.train_eps))) if spec.attacked else ()]
    }
    assert list(told) == [*LP, *WEATHER]
    assert told == {
        "clean": ("nat", 1, "flip"),
        "l2 0.5": ("adv", 1, "flip", "l2", "1/2"),
        "l2 1": ("adv", 1, "flip", "l2", "1"),
        "linf 0.75*eps": ("adv", 1, "flip", "linf", "3/20"),
        "linf eps": ("adv", 1, "flip", "linf", "1/5"),
        **{call: ("nat", 1, f"flip+{call}") for call in WEATHER},
    }


def test_the_weather_is_the_paper_s() -> None:
    assert WEATHER == (
        "fog[density=0.13,light=0.8]",
        "fog[density=0.15,light=0.6]",
        "snow[brightness=2.0]",
        "snow[brightness=2.5]",
    )


def test_weather_needs_no_augmentation_before_it() -> None:
    assert spec_of({"experts": "all"}).prerequisites[WEATHER[2]].recipe.augment == WEATHER[2]


def test_at_8_255_the_smaller_linf_expert_is_trained_at_6_255() -> None:
    needed = spec_of(train_eps="8/255").prerequisites
    assert Fraction(needed["linf 0.75*eps"].setting.train_eps) == Fraction(6, 255)


def test_an_expert_s_training_is_that_of_its_own_row() -> None:
    needed = spec_of().prerequisites
    rows = {
        "clean": TrainSpec.create("nat", {}, toy_setting(DATA, members=1)),
        "linf eps": TrainSpec.create("adv", {}, toy_setting(DATA, train_eps="0.2")),
        "l2 0.5": TrainSpec.create("adv", {}, toy_setting(DATA, norm="l2", train_eps="0.5")),
    }
    assert {role: needed[role].key for role in rows} == {role: row.key for role, row in rows.items()}


def test_a_drawn_radius_is_scaled_at_both_ends() -> None:
    needed = spec_of(train_eps="uniform(0.04,0.08)").prerequisites
    assert needed["linf 0.75*eps"].setting.train_eps == "uniform(3/100,3/50)"
    assert needed["l2 1"].setting.train_eps == "1"


@pytest.mark.parametrize(
    ("hyper", "changes", "message"),
    [
        ({}, {"norm": "l2", "train_eps": "1"}, r"more\[linf\] is '0.75\*eps', but .* is in l2; write it"),
        ({"l2": "eps"}, {}, r"more\[l2\] is 'eps', but the training radius is in linf"),
        ({"l2": "0.5+100"}, {}, r"more\[l2\] is '100': .* further apart than 8.00 in l2"),
        ({"linf": "8*eps"}, {}, r"more\[linf\] is '8\*eps': .*images are in \[0, 1\]"),
        ({"linf": "-0.1"}, {}, r"more\[linf\] is '-0.1': .*at least 0"),
    ],
)
def test_radii_that_do_not_fit_the_run_are_refused_before_training(
    hyper: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        spec_of(hyper, **changes)


def test_in_an_l2_run_the_l2_radii_may_be_relative() -> None:
    needed = spec_of({"l2": "eps/2+eps", "linf": "0.1"}, norm="l2", train_eps="0.5").prerequisites
    told = {role: (spec.setting.norm, spec.setting.train_eps) for role, spec in needed.items() if spec.attacked}
    assert told == {"l2 eps/2": ("l2", "1/4"), "l2 eps": ("l2", "1/2"), "linf 0.1": ("linf", "1/10")}


def prerequisites(spec: TrainSpec) -> dict[str, EnsembleDefense]:
    """Experts that differ, as after training."""
    return {
        role: spread(build_defense(needed.model), seed=seed)  # type: ignore[misc]
        for seed, (role, needed) in enumerate(spec.prerequisites.items())
    }


def test_members_begin_as_the_experts_in_their_order() -> None:
    spec = spec_of({"experts": "all"})
    experts, defense = prerequisites(spec), build_defense(spec.model)
    defense.warm_start(experts)
    for member, role in zip(defense.members, [*LP, *WEATHER], strict=True):
        assert torch.equal(member(images()), experts[role].members[0](images()))


# --- the mixture ----------------------------------------------------------------------------------


@quick
@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 7), st.integers(0, 10**6))
def test_the_mixture_is_that_of_a_plain_rewrite(experts: int, count: int, classes: int, seed: int) -> None:
    rng = generator(seed)
    logits, scores = 3 * torch.randn(experts, count, classes, generator=rng), torch.randn(count, experts, generator=rng)
    w = np.exp(scores.double().numpy())
    w /= w.sum(axis=1, keepdims=True)
    f = sum(w[:, i, None] * logits[i].double().numpy() for i in range(experts))
    expected = f - np.log(np.exp(f).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(mixture_of_logits(logits, scores).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("expert", range(3))
def test_a_saturated_gate_leaves_one_expert(expert: int) -> None:
    logits = torch.randn(3, 4, 5, generator=generator())
    scores = torch.zeros(4, 3).index_fill(1, torch.tensor([expert]), 1e3)
    torch.testing.assert_close(mixture_of_logits(logits, scores), logits[expert].log_softmax(dim=1))


def test_equal_experts_answer_whatever_the_gate_says() -> None:
    defense, x = defense_of(), images()
    for member in defense.members[1:]:
        member.load_state_dict(defense.members[0].state_dict())
    torch.testing.assert_close(defense(x), defense.members[0](x).log_softmax(dim=1))


def test_logits_are_mixed_and_not_probabilities() -> None:
    logits = torch.tensor([[[4.0, 0.0]], [[-2.0, 0.0]]])
    assert mixture_of_logits(logits, torch.zeros(1, 2)).tolist()[0] == pytest.approx(
        torch.tensor([1.0, 0.0]).log_softmax(dim=0).tolist()
    )


def test_prediction_and_selection_come_from_the_gate() -> None:
    defense, x = defense_of(), images()
    scores = defense.selection(x)
    torch.testing.assert_close(scores, defense.gate(x))
    torch.testing.assert_close(defense(x), mixture_of_logits(defense.member_logits(x), scores))
    assert len(scores.argmax(dim=1).unique()) > 1, "or the comparison would mean little"


def input_gradient(reading: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(reading(x)[:, 0].sum(), x)[0]


def test_the_input_gradient_goes_through_the_gate() -> None:
    defense, x = defense_of(), images()
    fixed = defense.views()["fixed_gate"]
    torch.testing.assert_close(fixed(x), defense(x))
    whole, without = input_gradient(defense, x), input_gradient(fixed, x)
    assert bool(((whole - without).flatten(1).norm(dim=1) > 1e-3 * whole.flatten(1).norm(dim=1)).all())


def test_the_top_expert_is_the_one_of_largest_weight() -> None:
    defense, x = defense_of(), images()
    chosen = defense.gate(x).argmax(dim=1)
    alone = torch.stack([defense.members[k](image[None])[0] for k, image in zip(chosen, x, strict=True)])
    torch.testing.assert_close(defense.views()["top_expert"](x), alone.log_softmax(dim=1), atol=1e-5, rtol=1e-4)


# --- gate training --------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "weather"), [("lp", ()), ("all", WEATHER)])
def test_every_batch_is_trained_on_once_a_setting_and_twice_as_it_is(experts: str, weather: tuple[str, ...]) -> None:
    defense, _ = stubbed(experts=experts)
    assert names(defense.loss(batch(), 0.0)) == ["clean", *LP, *weather]


def test_each_setting_s_loss_is_the_mixture_s_cross_entropy_on_its_images() -> None:
    defense, _ = stubbed(experts="all")
    given_batch = batch()
    x = given_batch.x
    draws = generator()
    seen = {
        "clean": x,
        **dict.fromkeys(LP[1:], 1 - x),
        WEATHER[0]: fog(x, 0.13, 0.8),
        WEATHER[1]: fog(x, 0.15, 0.6),
        WEATHER[2]: snow(x, torch.rand(12, generator=draws), 2.0),
        WEATHER[3]: snow(x, torch.rand(12, generator=draws), 2.5),
    }
    for terms in defense.loss(given_batch, 0.0):
        for name, value in terms.items():
            torch.testing.assert_close(value, cross_entropy(defense(seen[name]), given_batch.y).mean())


def test_attacks_are_on_the_mixture_itself_at_the_radii_of_the_experts() -> None:
    defense, stub = stubbed()
    given_batch = batch()
    list(defense.loss(given_batch, 0.0))
    assert all(objective is defense for objective, *_ in stub.calls)
    assert all(x is given_batch.x and y is given_batch.y for _, x, y, *_ in stub.calls)
    threats = [(threat.norm, threat.eps, step) for *_, threat, step in stub.calls]
    assert threats == [
        ("l2", 0.5, pytest.approx(2.5 * 0.5 / STEPS)),
        ("l2", 1.0, pytest.approx(2.5 * 1.0 / STEPS)),
        ("linf", pytest.approx(0.15), None),
        ("linf", pytest.approx(0.2), None),
    ]


def test_an_l2_attack_can_reach_its_sphere() -> None:
    defense = defense_of(l2="1", linf=())
    lend_adversary(defense, 0.2, attack=InnerAttack(steps=4, step_size="2/255", start="zero"))
    interior = dataclasses.replace(batch(), x=0.4 + 0.2 * images())
    reached = Threat("l2", 1.0).distance(defense.perturbed(interior, "l2 1"), interior.x)
    assert float(reached.max()) == pytest.approx(1.0, abs=1e-5)
    assert float(reached.min()) > 0.5


def test_the_attack_follows_the_gradient_through_the_gate() -> None:
    defense, given_batch = defense_of(linf="eps", l2=()), batch()
    lend_adversary(defense, 0.05, attack=InnerAttack(steps=2, step_size="eps/2", start="zero"))
    x_adv = defense.perturbed(given_batch, "linf eps")

    def stepwise(reading: Any) -> Tensor:
        x = given_batch.x
        for _ in range(2):
            x = x.clone().requires_grad_()
            gradient = torch.autograd.grad(cross_entropy(reading(x), given_batch.y).sum(), x)[0]
            x = (x.detach() + 0.025 * gradient.sign()).clamp(0, 1)
        return x

    def agreement(other: Tensor) -> float:
        return float(((x_adv - other).abs() < 1e-6).float().mean())

    assert agreement(stepwise(defense.views()["predict"])) > 0.99, "all but signs of tiny gradients"
    assert agreement(stepwise(defense.views()["fixed_gate"])) < 0.97


def test_settings_may_take_turns_batch_by_batch_and_go_on_in_the_next_epoch() -> None:
    defense, _ = stubbed(settings="turns")
    seen = []
    for epoch in range(3):
        defense.begin_epoch(epoch, generator())
        for _ in range(4):
            seen += names(defense.loss(batch(), 0.0))
    assert seen == 2 * ["clean", *LP]


def test_a_new_training_begins_with_the_first_setting() -> None:
    defense, _ = stubbed(settings="turns")
    list(defense.loss(batch(), 0.0))
    list(defense.loss(batch(), 0.0))
    list(defense.loss(batch(), 0.0))
    defense.begin_epoch(0, generator())
    assert names(defense.loss(batch(), 0.0)) == ["clean"]
    list(defense.loss(batch(), 0.0))
    assert names(defense.loss(batch(), 0.0)) == ["l2 0.5"]


def is_trained(name: str) -> bool:
    return name.startswith("gate.") or ".classifier." in name


def test_the_gate_and_the_last_layer_of_every_expert_are_trained() -> None:
    defense = defense_of()
    moved = {id(parameter) for parameter in defense.trainable()}
    assert {name for name, parameter in defense.named_parameters() if id(parameter) in moved} == {
        name for name, _ in defense.named_parameters() if is_trained(name)
    }
    assert len(moved) == len(list(defense.gate.parameters())) + 2 * len(defense.members)


@pytest.mark.parametrize("architecture", ["cce_cifar10", "resnet18[width=2]"])
def test_in_every_architecture_the_last_linear_layer_is_the_one(architecture: str) -> None:
    defense = create_defense("more", architecture=architecture, num_classes=CLASSES, image_shape=SHAPE)
    trained = {id(parameter) for parameter in defense.trainable()}
    for member in defense.members:
        last = [part for part in member.modules() if isinstance(part, nn.Linear)][-1]
        assert {id(p) for p in member.parameters()} & trained == {id(p) for p in last.parameters()}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_training_leaves_backbones_and_their_batch_norms_as_they_were(mode: str) -> None:
    spec = spec_of(SMALL, attack={"steps": 1, "batch_norm": mode}, epochs=2)
    experts = prerequisites(spec)
    before = build_defense(spec.model, spec.setting.seed)
    before.warm_start(experts)
    after = train(spec, DATA, experts, device="cpu").defense
    ours, theirs = after.state_dict(), before.state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    expected = {name for name in ours if is_trained(name) and not name.endswith(("normalize.mean", "normalize.std"))}
    assert changed == expected
    assert any("running_mean" in name for name in changed), "the gate's own"


def test_training_takes_an_optimiser_step_a_setting_or_one_a_batch() -> None:
    steps = {}
    for settings_ in ("all", "turns"):
        spec = spec_of({"settings": settings_, **SMALL})  # 3 batches
        defense: Any = train(spec, DATA, prerequisites(spec), device="cpu").defense
        steps[settings_] = int(defense.gate.stem[1].num_batches_tracked)
    assert steps == {"all": 3 * 3, "turns": 3}


def test_gate_and_last_layers_get_a_gradient_from_every_setting() -> None:
    defense = defense_of(experts="all").train()
    lend_adversary(defense, 0.1)
    for terms in defense.loss(batch(), 0.0):
        (value,) = terms.values()
        weights = [defense.gate.stem[0].weight, *(member.classifier.weight for member in defense.members)]
        assert all(bool((gradient != 0).any()) for gradient in torch.autograd.grad(value, weights))
        assert number(value) > 0
