"""What every registered attack must keep, whatever it does: one list of attacks, one table of exemptions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ensdef
from ensdef.attack import IterativeAttack
from ensdef.attack_spec import AttackSpec
from ensdef.defense import Batch, EnsembleDefense, Terms
from ensdef.harness import Outcome, attack_model
from ensdef.notation import NORMS
from ensdef.registry import ATTACKS
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.testing import LinearClassifier
from ensdef.threat import Threat

#: (attack, test) -> why that attack need not pass it. Everything else follows from the class's own traits.
EXEMPT: dict[tuple[str, str], str] = {
    ("m_fgsm", "different_seeds"): "it draws in its steps, not at the start",
    ("deepfool", "more_steps"): "one step suffices on a linear model",
    ("bb", "breaks_some_images_of_the_toy"): "four steps along the boundary do not lead near the image",
}
#: Attacks that these toys cannot be attacked with, and which file tests them.
ELSEWHERE = {
    "sgm": "needs residual branches: test_gradient_attacks.py",
    "none": "breaks nothing: test_none.py",
    "suite": "runs others of this list: test_suite.py",
    **dict.fromkeys(("transfer", "transfer3", "transfer30"), "crafts on other models: test_transfer.py"),
}
#: Budgets in the place of the attack's own.
BUDGETS = {"steps": 4, "queries": 150, "samples": 32}
#: Names of the tests that go through the list of attacks.
TESTS: set[str] = set()

CLASSES, SHAPE, COUNT = 4, (1, 8, 8), 40
#: Radii at which the toys lose some images and keep others.
EPS = {"linf": 0.06, "l2": 0.4}
CONV_EPS = {"linf": 0.03, "l2": 0.15}
ROUNDING = 1e-6


def has(name: str, parameter: str) -> bool:
    return parameter in {field.name for field in dataclasses.fields(ATTACKS.get(name).Params)}


def iterative(name: str) -> bool:
    return issubclass(ATTACKS.get(name), IterativeAttack)


def cases(test: str, *needs: str) -> Any:
    """Every (attack, norm) that a test concerns.

    Args:
        needs: ``"eps"``: it has a ball; ``"random"``, ``"per_image"``: the traits; ``"iterative"``: not a wrapped
            library; anything else: a parameter of that name.
    """
    rules = {
        "eps": lambda name: ATTACKS.get(name).budget == "eps",
        "ball": lambda name: ATTACKS.get(name).budget != "none",
        "random": lambda name: ATTACKS.get(name).random,
        "per_image": lambda name: ATTACKS.get(name).per_image,
        "iterative": iterative,
    }
    TESTS.add(test)
    concerned = [
        (name, norm)
        for name in ensdef.list_attacks()
        if name not in ELSEWHERE
        and (name, test) not in EXEMPT
        and all(rules[need](name) if need in rules else has(name, need) for need in needs)
        for norm in (ATTACKS.get(name).norms if ATTACKS.get(name).budget != "none" else ("linf",))
    ]
    return pytest.mark.parametrize(("name", "norm"), concerned)


class Mean(EnsembleDefense):
    """A plain ensemble of given members."""

    def loss(self, batch: Batch, progress: float) -> Terms:
        raise NotImplementedError


def linear() -> LinearClassifier:
    return LinearClassifier(torch.randn(CLASSES, 64, generator=torch.Generator().manual_seed(1)) / 2)


def conv_ensemble() -> Mean:
    """Two members with batch norms whose statistics are those of a trained network."""
    members = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for _ in range(2):
            member = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Conv2d(8, 12, 3, stride=2, padding=1),
                nn.BatchNorm2d(12),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(12 * 16, CLASSES),
            )
            for part in member:
                if isinstance(part, nn.BatchNorm2d):
                    assert part.running_mean is not None
                    assert part.running_var is not None
                    part.running_mean.normal_(0, 0.2)
                    part.running_var.uniform_(0.3, 1.5)
            with torch.no_grad():  # decisive, and of every class about as often
                member[-1].weight.mul_(8)
                member[-1].bias.sub_(member.eval()(images(256, seed=9)).mean(dim=0))
            members.append(member)
    return Mean(members).eval()


def images(count: int = COUNT, seed: int = 0) -> Tensor:
    """Random images; about a tenth of the pixels lies on a face of the box."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, *SHAPE, generator=generator) * 1.1 - 0.05).clamp(0, 1)


def labels(model: nn.Module, x: Tensor) -> Tensor:
    """The model's own decisions, every sixth one made wrong."""
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    return torch.where(torch.arange(len(x)) % 6 == 5, (y + 1) % CLASSES, y)


def attacked(
    name: str,
    norm: str,
    *,
    model: nn.Module | None = None,
    x: Tensor | None = None,
    y: Tensor | None = None,
    eps: float | None = None,
    seed: int = 0,
    success: str = "any",
    batch_size: int = 64,
    ids: Tensor | None = None,
    **params: Any,
) -> Outcome:
    """The attack with few steps, so that the whole table stays quick."""
    model = linear() if model is None else model
    x = images() if x is None else x
    y = labels(model, x) if y is None else y
    chosen = {"success": success, **{key: value for key, value in BUDGETS.items() if has(name, key)}, **params}
    spec = AttackSpec.create(name, chosen, norm, EPS[norm] if eps is None else eps, seed=seed)
    return attack_model(model, x, y, spec, ids=ids, batch_size=batch_size)


# --- the table itself -----------------------------------------------------------------------------


def test_every_exemption_names_an_attack_that_exists_and_a_test_that_exists() -> None:
    for name, test in EXEMPT:
        assert name in ensdef.list_attacks()
        assert test in TESTS


def test_every_registered_attack_states_traits_the_harness_knows() -> None:
    for name in ensdef.list_attacks():
        attack = ATTACKS.get(name)
        assert attack.budget in ("eps", "min_norm", "none"), name
        assert set(attack.norms) <= set(NORMS), name
        assert attack.norms or attack.budget == "none", name
        assert attack.access in ("gradient", "score", "decision", "transfer"), name


@cases("breaks_some_images_of_the_toy", "ball")
def test_an_attack_breaks_some_images_of_the_toy_and_not_all(name: str, norm: str) -> None:
    outcome = attacked(name, norm)
    assert 0 < int(outcome.robust.sum()) < int(outcome.clean.sum()) < COUNT


# --- ball and box ---------------------------------------------------------------------------------


@pytest.mark.parametrize("success", ["any", "last"])
@cases("stays_in_the_ball_and_in_the_box", "eps")
def test_an_attack_stays_in_the_ball_and_in_the_box(name: str, norm: str, success: str) -> None:
    x = images()
    x_adv = attacked(name, norm, success=success).x_adv
    assert bool(torch.isfinite(x_adv).all())
    assert float(Threat(norm, EPS[norm]).distance(x_adv, x).max()) <= EPS[norm] + ROUNDING
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    assert not torch.equal(x_adv, x)


@cases("gives_back_shape_and_type_of_the_images")
def test_an_attack_gives_back_shape_and_type_of_the_images(name: str, norm: str) -> None:
    outcome = attacked(name, norm)
    assert outcome.x_adv.shape == (COUNT, *SHAPE)
    assert outcome.x_adv.dtype == torch.float32
    assert outcome.clean.dtype == outcome.robust.dtype == torch.bool
    assert outcome.clean.shape == outcome.robust.shape == (COUNT,)
    assert not outcome.x_adv.requires_grad


@cases("a_radius_of_zero", "ball")
def test_at_a_radius_of_zero_an_attack_returns_the_images_bit_for_bit(name: str, norm: str) -> None:
    outcome = attacked(name, norm, eps=0)
    assert torch.equal(outcome.x_adv, images())
    assert torch.equal(outcome.robust, outcome.clean)


@cases("no_steps", "eps", "iterative", "steps")
def test_an_attack_of_no_steps_returns_where_it_starts(name: str, norm: str) -> None:
    model, x = linear(), images()
    y = model(x).argmax(dim=1)
    threat = Threat(norm, EPS[norm])
    attack = ATTACKS.get(name)(ATTACKS.get(name).Params(steps=0))
    state = attack.start(Target(model), x, y, threat, KeyedRandom(5, torch.arange(len(x))))
    expected = threat.project(state.get("x_adv", x), x)
    outcome = attacked(name, norm, model=model, x=x, y=y, seed=5, steps=0)
    assert torch.equal(outcome.x_adv, expected)
    assert outcome.backwards == 0


@cases("no_steps_without_noise", "eps", "random_start", "steps")
def test_an_attack_of_no_steps_and_no_noise_returns_the_images(name: str, norm: str) -> None:
    assert torch.equal(attacked(name, norm, steps=0, random_start=False).x_adv, images())


# --- side effects ---------------------------------------------------------------------------------


@cases("leaves_the_model_untouched")
def test_an_attack_leaves_the_model_untouched(name: str, norm: str) -> None:
    model = conv_ensemble()
    x = images()
    y = labels(model, x)
    model.members[0].train()
    model.members[1][1].train()
    model.members[1][3].weight.requires_grad_(False)
    flags = [part.training for part in model.modules()]
    asks = [parameter.requires_grad for parameter in model.parameters()]
    values = {key: value.clone() for key, value in model.state_dict().items()}
    attacked(name, norm, model=model, x=x, y=y, eps=CONV_EPS[norm])
    assert [part.training for part in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == asks
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@cases("leaves_the_images_untouched")
def test_an_attack_leaves_images_and_labels_untouched(name: str, norm: str) -> None:
    x = images()
    y = labels(linear(), x)
    kept = x.clone(), y.clone()
    outcome = attacked(name, norm, x=x, y=y)
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])
    assert x.grad is None
    assert not x.requires_grad
    assert outcome.x_adv.data_ptr() != x.data_ptr()


@cases("leaves_the_global_random_state")
def test_an_attack_leaves_the_global_random_state_where_it_was(name: str, norm: str) -> None:
    before = torch.random.get_rng_state()
    attacked(name, norm)
    assert torch.equal(torch.random.get_rng_state(), before)


# --- small and empty sets -------------------------------------------------------------------------


@cases("a_single_image")
def test_a_single_image_is_attacked_as_it_is_among_others(name: str, norm: str) -> None:
    x = images(1)
    y = linear()(x).argmax(dim=1)
    outcome = attacked(name, norm, x=x, y=y)
    assert outcome.x_adv.shape == x.shape
    assert bool(outcome.clean)
    if ATTACKS.get(name).per_image:
        among = attacked(name, norm, y=linear()(images()).argmax(dim=1))
        assert torch.equal(outcome.robust, among.robust[:1])


@cases("nothing_to_attack")
def test_where_every_image_is_wrong_already_nothing_is_attacked(name: str, norm: str) -> None:
    x = images()
    y = (linear()(x).argmax(dim=1) + 1) % CLASSES
    outcome = attacked(name, norm, x=x, y=y)
    assert not bool(outcome.clean.any())
    assert not bool(outcome.robust.any())
    assert torch.equal(outcome.x_adv, x)
    assert outcome.forwards == outcome.backwards == 0


@cases("a_wrong_image_is_never_robust")
def test_an_image_that_was_wrong_is_never_robust(name: str, norm: str) -> None:
    # at this radius an attack could well push a wrong image onto its label
    outcome = attacked(name, norm, eps=EPS[norm] * 5)
    assert not bool(outcome.clean.all())
    assert not bool((outcome.robust & ~outcome.clean).any())
    assert torch.equal(outcome.x_adv[~outcome.clean], images()[~outcome.clean])


# --- repeatability --------------------------------------------------------------------------------


@cases("the_same_seed")
def test_the_same_seed_gives_the_same_points_whatever_the_global_seed(name: str, norm: str) -> None:
    torch.manual_seed(1)
    first = attacked(name, norm, seed=7)
    torch.manual_seed(2)
    second = attacked(name, norm, seed=7)
    assert torch.equal(first.x_adv, second.x_adv)
    assert torch.equal(first.robust, second.robust)
    assert (first.forwards, first.backwards) == (second.forwards, second.backwards)


@cases("different_seeds", "random", "eps", "iterative", "steps")
def test_different_seeds_give_different_starts_for_every_image(name: str, norm: str) -> None:
    model, x = linear(), images()
    y = model(x).argmax(dim=1)
    first, second = (attacked(name, norm, x=x, y=y, steps=0, seed=seed).x_adv for seed in (0, 1))
    assert bool((first != second).flatten(1).any(dim=1).all())


def test_an_attack_that_says_it_is_not_random_does_not_depend_on_the_seed() -> None:
    for name in ensdef.list_attacks():
        attack = ATTACKS.get(name)
        if not attack.random and name not in ELSEWHERE:
            norm = (*attack.norms, "linf")[0]
            first, second = (attacked(name, norm, seed=seed).x_adv for seed in (0, 1))
            assert torch.equal(first, second), name


# --- batches --------------------------------------------------------------------------------------


def restarted(name: str) -> dict[str, Any]:
    """Two restarts where there are any, so that rows are dropped and refilled."""
    return {"restarts": 2} if has(name, "restarts") else {}


@pytest.mark.parametrize("kind", ["linear", "conv ensemble"])
@cases("batches_do_not_matter", "per_image")
def test_batch_size_and_order_change_no_verdict_and_from_sixteen_on_no_pixel(name: str, norm: str, kind: str) -> None:
    model: nn.Module = linear() if kind == "linear" else conv_ensemble()
    eps = EPS[norm] if kind == "linear" else CONV_EPS[norm]
    x = images()
    y = labels(model, x)
    reference = attacked(name, norm, model=model, x=x, y=y, eps=eps, batch_size=64, **restarted(name))
    assert 0 < int(reference.robust.sum()) < int(reference.clean.sum())
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    for batch_size in (64, 16, 7):
        for rows in (torch.arange(len(x)), order):
            other = attacked(
                name,
                norm,
                model=model,
                x=x[rows],
                y=y[rows],
                eps=eps,
                ids=rows,
                batch_size=batch_size,
                **restarted(name),
            )
            assert torch.equal(other.clean, reference.clean[rows])
            assert torch.equal(other.robust, reference.robust[rows])
            if batch_size >= 16:
                assert torch.equal(other.x_adv, reference.x_adv[rows])


@cases("batches_do_not_change_the_bill", "per_image")
def test_batch_size_does_not_change_how_many_passes_are_counted(name: str, norm: str) -> None:
    bills = set()
    for batch_size in (64, 16, 7):
        outcome = attacked(name, norm, batch_size=batch_size, **restarted(name))
        bills.add((outcome.forwards, outcome.backwards))
    assert len(bills) == 1


@cases("a_part_of_the_images", "per_image")
def test_a_part_of_the_images_gets_the_verdicts_it_has_in_the_whole(name: str, norm: str) -> None:
    x, rows = images(), torch.tensor([31, 2, 17])
    y = labels(linear(), x)
    whole = attacked(name, norm, x=x, y=y)
    part = attacked(name, norm, x=x[rows], y=y[rows], ids=rows)
    assert torch.equal(part.robust, whole.robust[rows])


# --- restarts, success, labels --------------------------------------------------------------------


@cases("more_restarts", "restarts")
def test_more_restarts_never_leave_more_images_robust(name: str, norm: str) -> None:
    model = conv_ensemble()
    robust = [attacked(name, norm, model=model, eps=CONV_EPS[norm], restarts=restarts).robust for restarts in (1, 2, 4)]
    assert not bool((robust[1] & ~robust[0]).any())
    assert not bool((robust[2] & ~robust[1]).any())


@cases("more_steps", "steps", "iterative")
def test_more_steps_of_the_same_size_never_leave_more_images_robust(name: str, norm: str) -> None:
    given = {"step_size": EPS[norm] / 8} if has(name, "step_size") else {}
    few, many = (attacked(name, norm, steps=steps, **given).robust for steps in (2, 8))
    assert not bool((many & ~few).any())
    assert int(many.sum()) < int(few.sum())


@cases("any_is_never_weaker", "ball")
def test_success_at_any_iterate_is_never_weaker_than_at_the_last(name: str, norm: str) -> None:
    model = conv_ensemble()
    # long steps overshoot, so that iterates succeed which the last one forgets
    given = {"step_size": "eps"} if has(name, "step_size") else {}
    found = {
        success: attacked(name, norm, model=model, eps=CONV_EPS[norm], success=success, **given).robust
        for success in ("any", "last")
    }
    assert not bool((found["any"] & ~found["last"]).any())


@cases("class_names", "ball")
def test_renaming_the_classes_leaves_the_set_of_successes_unchanged(name: str, norm: str) -> None:
    model, x = linear(), images()
    y = labels(model, x)
    new_name = torch.tensor([2, 0, 3, 1])
    renamed = LinearClassifier(torch.empty_like(model.weight).data, torch.empty_like(model.bias).data)
    with torch.no_grad():
        renamed.weight[new_name] = model.weight
        renamed.bias[new_name] = model.bias
    before, after = attacked(name, norm, y=y), attacked(name, norm, model=renamed, y=new_name[y])
    assert torch.equal(before.clean, after.clean)
    assert torch.equal(before.robust, after.robust)


@pytest.mark.parametrize("norm", NORMS)
def test_restarts_leave_what_every_single_restart_leaves(monkeypatch: pytest.MonkeyPatch, norm: str) -> None:
    pgd = ATTACKS.get("pgd")

    @dataclasses.dataclass(frozen=True)
    class OnlyParams(pgd.Params):  # type: ignore[misc, name-defined]
        only: int = 0

    class Only(pgd):  # type: ignore[misc, valid-type]
        """The run number ``only`` of pgd, alone."""

        Params = OnlyParams

        def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> Any:
            return super().start(target, x, y, threat, rng.at(run=torch.full_like(rng.run, self.params.only)))

    monkeypatch.setitem(ATTACKS._registered, "only_one_run", Only)
    model = conv_ensemble()
    given = {"model": model, "eps": CONV_EPS[norm], "steps": 2}
    singles = [attacked("only_one_run", norm, only=run, **given).robust for run in range(3)]
    together = attacked("pgd", norm, restarts=3, **given).robust
    assert len({tuple(single.tolist()) for single in singles}) > 1
    assert torch.equal(together, singles[0] & singles[1] & singles[2])
