"""The contract of an attack, clause by clause, on a linear model: what ``ensdef check NAME`` runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ensdef.architecture import ImageSpec
from ensdef.architectures._residual import ResidualNetwork
from ensdef.attack_spec import AttackSpec
from ensdef.defense import EnsembleDefense
from ensdef.errors import UsageError
from ensdef.harness import BALL_SLACK, Outcome, attack_model
from ensdef.journal import Journal
from ensdef.notation import fill, format_call, parse_call
from ensdef.registry import ATTACKS, METHODS
from ensdef.specs import DataSpec, Setting, TrainSpec
from ensdef.target import Target
from ensdef.testing import LinearClassifier, expect, is_frozen, stopped_and_resumed

CLASSES, SHAPE = 4, (1, 8, 8)
#: Batches after which an attack is stopped, to go on in another process.
MOMENTS = 3
#: What clauses are checked with, where the attack's own budget is larger.
BUDGETS = {"steps": 20, "queries": 150, "samples": 32}


def toy(name: str, count: int = 24, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear model, images inside the box, and labels of which five in six are its own decisions.

    An attack that refuses the linear model, or crafts on other models, is given a small residual network.
    """
    generator = torch.Generator().manual_seed(seed)
    model: nn.Module = LinearClassifier(torch.randn(CLASSES, 64, generator=generator))
    x = 0.3 + 0.4 * torch.rand(count, *SHAPE, generator=generator)
    try:
        ATTACKS.get(name)().fits(Target(model).traits(x[:1]))
    except UsageError:
        model = _residual(x)
    if ATTACKS.get(name).access == "transfer":
        model = _residual(x)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    return model, x, torch.where(torch.arange(count) % 6 == 5, (y + 1) % CLASSES, y)


def _residual(x: Tensor) -> nn.Module:
    """A residual network that finds every class about as often in the images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResidualNetwork(ImageSpec(SHAPE, CLASSES), 8, [(8, 1)], "relu").eval()
    assert isinstance(model.classifier, nn.Linear)
    with torch.no_grad():
        model.classifier.bias.sub_(model(x).mean(dim=0))
    return model


def run(
    name: str,
    eps: float,
    *,
    batch_size: int = 128,
    order: Tensor | None = None,
    seed: int = 0,
    journal: Journal | None = None,
) -> Outcome:
    """The attack on the toy; ``order`` permutes the images, ids included."""
    model, x, y = toy(name)
    order = torch.arange(len(x)) if order is None else order
    norm = (*ATTACKS.get(name).norms, "linf")[0]
    spec = AttackSpec.create(name, _shortened(name), norm, eps, seed=seed)
    surrogates = {role: cast(EnsembleDefense, model) for role in _surrogates(name, spec.params_object)}
    return attack_model(
        model,
        x[order],
        y[order],
        spec,
        ids=order,
        batch_size=batch_size,
        prerequisites=surrogates,
        health="off",
        journal=journal,
    )


def _shortened(name: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Smaller budgets than the attack's own: clauses hold at any."""
    attack = ATTACKS.get(name)
    params = fill(attack.Params, given or {}, name)
    short: dict[str, Any] = {field: most for field, most in BUDGETS.items() if getattr(params, field, 0) > most}
    if calls := [parse_call(call) for call in attack.made_of(params)]:
        short["attacks"] = tuple(format_call(other, _shortened(other, own)) for other, own in calls)
    return {**(given or {}), **short}


def _surrogates(name: str, params: Any) -> Iterable[str]:
    """Roles of the trained defences that the attack asks for; here the toy itself plays them."""
    data = DataSpec("digits", None, None, None, "", "", SHAPE, CLASSES, (0.5,), (0.25,))
    training = TrainSpec.create(METHODS.names()[0], {}, Setting(data, "small_resnet", 2, "linf", "0.1"))
    roles: Iterable[str] = ATTACKS.get(name).prerequisites(params, training)
    return roles


def check_params_are_frozen(name: str) -> None:
    params = ATTACKS.get(name).Params
    expect(
        is_frozen(params),
        f"{name}.Params must be immutable to be part of a key; decorate it with @dataclass(frozen=True)",
    )
    params()


def check_tells_its_source(name: str) -> None:
    cls = ATTACKS.get(name)
    module = sys.modules[cls.__module__]
    expect(bool((cls.__doc__ or "").strip()), f"the class of {name} has no docstring; say in one line what it does")
    expect(
        bool((module.__doc__ or "").strip()), f"the file of {name} has no docstring; name title, authors, venue, year"
    )


def check_stays_in_ball_and_box(name: str) -> None:
    _, x, _ = toy(name)
    x_adv = run(name, 0.1).x_adv
    expect(
        bool(torch.isfinite(x_adv).all()) and float(x_adv.min()) >= 0 and float(x_adv.max()) <= 1,
        f"{name} left the box [0, 1]",
    )
    if ATTACKS.get(name).budget == "eps" and "linf" in ATTACKS.get(name).norms:
        expect(float((x_adv.double() - x.double()).abs().max()) <= 0.1 + BALL_SLACK, f"{name} left the ball")


def check_does_nothing_without_budget(name: str) -> None:
    if ATTACKS.get(name).budget == "none":
        return
    _, x, _ = toy(name)
    expect(torch.equal(run(name, 0).x_adv, x), f"{name} at eps 0 must return the image itself")


def check_breaks_a_defenceless_model(name: str) -> None:
    if ATTACKS.get(name).budget == "none":
        return
    outcome = run(name, 0.5)
    expect(
        int(outcome.robust.sum()) < int(outcome.clean.sum()),
        f"{name} at eps 0.5 fools a linear model on no image: is the loss raised, not lowered?",
    )


def check_wrong_images_are_never_robust(name: str) -> None:
    outcome = run(name, 0.1)
    expect(not bool((outcome.robust & ~outcome.clean).any()), f"{name} made a wrong image count as robust")


def check_repeats_itself(name: str) -> None:
    first, second = run(name, 0.1), run(name, 0.1)
    expect(
        torch.equal(first.x_adv, second.x_adv),
        f"{name} gives other points on a second run; draw from the rng it is given, never from torch's global one",
    )


def check_leaves_no_trace(name: str) -> None:
    state = torch.random.get_rng_state()
    run(name, 0.1)
    expect(torch.equal(state, torch.random.get_rng_state()), f"{name} moved torch's global random state; use rng")


def check_batches_do_not_matter(name: str) -> None:
    if not ATTACKS.get(name).per_image:
        return
    whole = run(name, 0.1)
    order = torch.randperm(len(whole.robust), generator=torch.Generator().manual_seed(3))
    parts = run(name, 0.1, batch_size=16, order=order)
    expect(
        torch.equal(whole.robust[order], parts.robust) and torch.allclose(whole.x_adv[order], parts.x_adv, atol=1e-4),
        f"{name} gives other points or verdicts in other batches; keep every state per image and draw from rng alone",
    )


def check_goes_on_where_it_was_stopped(name: str) -> None:
    alone = run(name, 0.1, batch_size=16)
    again = stopped_and_resumed(lambda journal: run(name, 0.1, batch_size=16, journal=journal), moments=MOMENTS)
    expect(
        torch.equal(alone.x_adv, again.x_adv)
        and (alone.forwards, alone.backwards) == (again.forwards, again.backwards),
        f"{name} gives other points, or takes other passes, when it is stopped and another process goes on; keep what "
        "steps remember in the state that they return, not on self",
    )


ATTACK_CHECKS = [
    check_params_are_frozen,
    check_tells_its_source,
    check_stays_in_ball_and_box,
    check_does_nothing_without_budget,
    check_breaks_a_defenceless_model,
    check_wrong_images_are_never_robust,
    check_repeats_itself,
    check_leaves_no_trace,
    check_batches_do_not_matter,
    check_goes_on_where_it_was_stopped,
]
