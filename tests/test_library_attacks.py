"""Attacks of other libraries behind the same contract: AutoAttack, Brendel and Bethge, any class by its name."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable
from typing import Any

import foolbox
import numpy as np
import pyautoattack
import pytest
import torch
import torchattacks
from click.testing import CliRunner
from ensdef.attacks._autoattack import AutoAttack, AutoAttackParams
from torch import Tensor, nn
from toys_queries import attacked, decisions, difference, images, linear, margins, trained_network

import ensdef
import ensdef.cli.inspect
from ensdef.attack import register_attack
from ensdef.attack_spec import AttackSpec
from ensdef.cli import cli
from ensdef.codehash import code_hash
from ensdef.errors import PluginError, UsageError
from ensdef.notation import parse_call
from ensdef.registry import ATTACKS
from ensdef.rng import KeyedRandom
from ensdef.target import Target
from ensdef.threat import Threat

SHAPE = (1, 8, 8)
#: AutoAttack in a second.
QUICK = {"steps": 10, "queries": 50}


def digits(count: int = 60) -> tuple[nn.Module, Tensor, Tensor]:
    """A trained network and images that it gets right."""
    model, x, y = trained_network()
    right = (decisions(model, x) == y).nonzero().flatten()[:count]
    return model, x[right], y[right]


def run_alone(
    params: dict[str, Any], model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: str = "linf", seed: int = 0
) -> tuple[Tensor, list[str]]:
    """AutoAttack without the harness: its points and its warnings."""
    attack = AutoAttack(AutoAttackParams(**params))
    target = Target(model)
    target.memory.on = False
    with torch.random.fork_rng():
        points = attack.perturb(target, x, y, Threat(norm, eps), KeyedRandom(seed, torch.arange(len(x))))
    return points, attack.warnings


# --- AutoAttack -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.8)])
@pytest.mark.parametrize("version", ["standard", "plus"])
def test_autoattack_leaves_what_the_official_package_leaves_on_the_bare_model(
    norm: str, eps: float, version: Any
) -> None:
    model, x, y = digits()
    official = pyautoattack.AutoAttack(
        model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=3, version=version, device="cpu"
    )
    AutoAttack(AutoAttackParams(version, **QUICK))._fit_budget(official)
    with torch.random.fork_rng():
        theirs, _ = official.run_standard_evaluation(x, y, batch_size=250)
    expected = decisions(model, theirs) == y
    outcome = attacked(model, x, y, "autoattack", eps, norm, seed=3, version=version, **QUICK)
    assert 5 < int(expected.sum()) < len(x) - 5
    assert int((outcome.robust != expected).sum()) <= 2


def test_autoattack_for_random_defences_leaves_what_the_official_package_leaves() -> None:
    model, x, y = digits()
    official = pyautoattack.AutoAttack(model, norm="Linf", eps=0.1, seed=0, version="rand", device="cpu")
    AutoAttack(AutoAttackParams("rand", steps=3))._fit_budget(official)
    with torch.random.fork_rng():
        theirs, _ = official.run_standard_evaluation(x, y, batch_size=250)
    outcome = attacked(model, x, y, "autoattack", 0.1, version="rand", steps=3)
    assert int((outcome.robust != (decisions(model, theirs) == y)).sum()) <= 2


def test_with_its_own_budget_autoattack_is_built_as_the_official_package_builds_it() -> None:
    ours = AutoAttack()._built(nn.Identity(), 10, Threat("linf", 0.1), "cpu", 7)
    official = pyautoattack.AutoAttack(nn.Identity(), norm="Linf", eps=0.1, seed=7, version="standard", device="cpu")
    for part in ("apgd", "apgd_targeted", "fab", "square"):
        mine, theirs = (
            {key: value for key, value in vars(getattr(attack, part)).items() if key not in ("model", "predict")}
            for attack in (ours, official)
        )
        assert mine == theirs, part
    assert ours.attacks_to_run == official.attacks_to_run


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 10])
@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_autoattack_runs_with_few_classes_and_finds_the_exact_robust_set_of_a_linear_model(
    classes: int, version: str
) -> None:
    model = linear(classes, shape=SHAPE)
    x = images(40, shape=SHAPE)
    y = decisions(model, x)
    eps = float(model.worst_margins(x, y, 0).amin(dim=1).median() / 40)
    exact = model.exactly_robust(x, y, eps)
    assert 0 < int(exact.sum()) < len(x)
    robust = attacked(model, x, y, "autoattack", eps, version=version, steps=20, queries=20).robust
    assert not bool((exact & ~robust).any())
    # the untargeted losses of `rand` need not find all
    assert int((robust & ~exact).sum()) <= (3 if version == "rand" else 0)


@pytest.mark.parametrize(
    ("classes", "version", "ran"),
    [
        (2, "standard", "apgd-ce, fab-t, square"),
        (3, "standard", "apgd-ce, apgd-dlr, fab-t, square"),
        (2, "plus", "apgd-ce, fab, square, fab-t"),
        (3, "plus", "apgd-ce, apgd-dlr, fab, square, fab-t"),
        (2, "rand", "apgd-ce"),
    ],
)
def test_parts_that_few_classes_leave_out_are_named_in_a_warning(classes: int, version: Any, ran: str) -> None:
    model, x = linear(classes, shape=SHAPE), images(6, shape=SHAPE)
    _, warnings = run_alone({"version": version, **QUICK}, model, x, decisions(model, x), 0.001)
    assert any(f"AutoAttack ran as {ran} in place of" in text for text in warnings)


@pytest.mark.parametrize("classes", [4, 10])
def test_from_four_classes_on_nothing_is_left_out_and_nothing_is_warned_of(classes: int) -> None:
    model, x = linear(classes, shape=SHAPE), images(6, shape=SHAPE)
    attack = AutoAttack()
    built = attack._built(model, classes, Threat("linf", 0.001), "cpu", 0)
    assert built.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert built.apgd_targeted.n_target_classes == built.fab.n_target_classes == min(9, classes - 1)
    _, warnings = run_alone(QUICK, model, x, decisions(model, x), 0.001)
    assert [text for text in warnings if "published" not in text] == []


def test_a_budget_that_is_not_autoattack_s_own_is_said() -> None:
    model, x = linear(4, shape=SHAPE), images(4, shape=SHAPE)
    _, warnings = run_alone({"steps": 10, "queries": 50}, model, x, decisions(model, x), 0.001)
    assert warnings == ["steps is 10 and queries is 50; AutoAttack as published has 100 and 5000"]


class Noisy(nn.Module):
    """A linear model whose scores differ from pass to pass."""

    def __init__(self) -> None:
        super().__init__()
        self.model = linear(4, shape=SHAPE)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.model(x)
        return scores + 0.01 * torch.randn_like(scores)


def test_what_autoattack_says_of_a_model_is_kept_and_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    x = images(6, shape=SHAPE)
    logger = logging.getLogger("auto-attack")
    before = logger.level, logger.propagate, list(logger.handlers)
    _, warnings = run_alone(QUICK, Noisy(), x, decisions(linear(4, shape=SHAPE), x), 0.001)
    assert sum("randomized defense" in text for text in warnings) == 1
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
    assert capfd.readouterr().err == ""


def test_autoattack_leaves_random_state_gradients_and_tracing_as_they_were() -> None:
    model, x, y = digits(20)
    model.zero_grad()

    def tracer(frame: Any, event: str, argument: Any) -> None:
        return None

    state, before = torch.random.get_rng_state(), sys.gettrace()
    sys.settrace(tracer)
    try:
        attacked(model, x, y, "autoattack", 0.1, **QUICK)
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after is tracer
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_call_named_grad_before_autoattack_does_not_make_the_model_a_dynamic_defence() -> None:
    from pyautoattack import checks

    checks.funcs["grad"] = 5
    model, x = linear(4, shape=SHAPE), images(4, shape=SHAPE)
    _, warnings = run_alone(QUICK, model, x, decisions(model, x), 0.001)
    assert not any("dynamic" in text for text in warnings)


def test_the_same_attack_seed_gives_the_same_points_and_another_gives_others() -> None:
    model, x, y = digits(30)
    points = [run_alone(QUICK, model, x, y, 0.1, seed=seed)[0] for seed in (1, 1, 2)]
    assert torch.equal(points[0], points[1])
    assert not torch.equal(points[0], points[2])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_tiny_radius_gives_the_clean_accuracy(norm: str) -> None:
    model, x, y = trained_network()
    outcome = attacked(model, x, y, "autoattack", 1e-6, norm, **QUICK)
    assert torch.equal(outcome.robust, outcome.clean)


@pytest.mark.parametrize("shape", [(1, 8, 6), (1, 4, 4), (64,)])
def test_images_that_square_cannot_cover_are_refused(shape: tuple[int, ...]) -> None:
    model, x = linear(4, shape=shape), images(4, shape=shape)
    with pytest.raises(UsageError, match="Square, a part of AutoAttack, needs"):
        attacked(model, x, decisions(model, x), "autoattack", 0.1)


# --- Brendel and Bethge ---------------------------------------------------------------------------


@pytest.mark.slow  # numba compiles the solver
@pytest.mark.parametrize(("norm", "dual", "eps"), [("linf", 1, 1), ("l2", 2, 8)])
def test_brendel_bethge_ends_at_the_boundary_of_a_linear_model(norm: str, dual: int, eps: float) -> None:
    model, x = linear(2, shape=SHAPE), images(20, shape=SHAPE)
    y = decisions(model, x)
    assert 0 < int(y.sum()) < len(y)
    outcome = attacked(model, x, y, "bb", eps, norm, repeats=1)
    assert not bool(outcome.robust.any())
    shortest = -margins(model, x, y) / difference(model, y, SHAPE).double().flatten(1).norm(dim=1, p=dual)
    found = Threat(norm, eps).distance(outcome.x_adv, x)
    assert bool((found >= shortest * (1 - 1e-4)).all())
    assert float((found / shortest).median()) < 1.1


@pytest.mark.slow
def test_brendel_bethge_does_with_a_batch_what_it_does_with_one_image() -> None:
    model, x = linear(2, shape=SHAPE), images(12, shape=SHAPE)
    y = decisions(model, x)
    attack = ATTACKS.get("bb")(ATTACKS.get("bb").Params(steps=20))
    starts = x[[int((y != label).nonzero()[0]) for label in y]]
    library = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    threat = Threat("linf", 1)
    whole = attack._walk(foolbox.attacks, library, x, y, starts, threat)
    alone = torch.cat(
        [attack._walk(foolbox.attacks, library, x[[i]], y[[i]], starts[[i]], threat) for i in range(len(x))]
    )
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-4)


def test_walks_begin_at_the_nearest_image_with_another_decision_and_in_noise_where_there_is_none() -> None:
    model, x = linear(2, shape=SHAPE), images(12, shape=SHAPE)
    y = decisions(model, x)
    attack = ATTACKS.get("bb")()
    rng = KeyedRandom(0, torch.arange(len(x)))
    pool, order = attack._starts(Target(model), x, y, Threat("l2", 1), rng)
    for image, label, first in zip(x, y, order[:, 0], strict=True):
        others = (y != label).nonzero().flatten()
        nearest = others[(x[others] - image).flatten(1).norm(dim=1).argmin()]
        assert int(first) == int(nearest)
    same = y == y[0]
    pool, order = attack._starts(Target(model), x[same], y[same], Threat("l2", 1), KeyedRandom(0, same.nonzero()[:, 0]))
    found = order[:, 0] >= 0
    assert bool((order[found, 0] >= int(same.sum())).all())
    assert bool((decisions(model, pool[order[found, 0]]) != y[0]).all())


@pytest.mark.parametrize("package", ["foolbox", "numba"])
def test_without_its_extra_brendel_bethge_is_refused_before_anything_is_trained(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    model, x = linear(2, shape=SHAPE), images(4, shape=SHAPE)
    with pytest.raises(UsageError, match=rf"bb needs {package}.*pip install 'ensdef\[foolbox\]'"):
        ATTACKS.get("bb")().fits(Target(model).traits(x))


# --- families -------------------------------------------------------------------------------------


def test_families_are_listed_beside_the_attacks_and_are_none_themselves() -> None:
    shown = CliRunner().invoke(cli, ["list", "attacks"]).stdout
    for family, source in (("torchattacks.*", "Torchattacks"), ("foolbox.*", "Foolbox")):
        (line,) = [line for line in shown.splitlines() if line.startswith(family)]
        assert "by its class" in line
        assert source in shown
        assert family not in ensdef.list_attacks()
        with pytest.raises(UsageError, match="put a name in place of the star"):
            ATTACKS.get(family)


def test_a_member_of_a_family_is_made_once_and_has_the_hash_of_its_adapter() -> None:
    first = ATTACKS.get("torchattacks.PGD")
    assert ATTACKS.get("torchattacks.PGD") is first
    assert code_hash(first) == code_hash(ATTACKS.get("torchattacks.FGSM"))
    assert code_hash(first) != code_hash(ATTACKS.get("foolbox.LinfPGD"))


def test_what_a_user_writes_comes_back_from_the_specification() -> None:
    for text in ("torchattacks.CW[c=2,lr=0.05]", "foolbox.LinfPGD[steps=7,random_start=false]"):
        name, params = parse_call(text)
        norm = "l2" if "CW" in name else "linf"
        assert AttackSpec.create(name, params, norm, 0.1).call == text


def test_a_third_party_may_register_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    fgsm = ATTACKS.get("fgsm")
    monkeypatch.setattr(ATTACKS, "_registered", dict(ATTACKS._registered))
    monkeypatch.setattr(ATTACKS, "_made", {})

    @register_attack("my_library.*")
    def mine(name: str) -> Any:
        """Anything of mine."""
        return type(name, (fgsm,), {})

    assert mine is not None
    assert ATTACKS.get("my_library.Foo").__name__ == "Foo"
    assert ("my_library.*", "Anything of mine.") in [(item.name, item.summary) for item in ATTACKS.listings()]
    with pytest.raises(UsageError, match=r"did you mean 'my_library\.\*'"):
        ATTACKS.get("my_librar")
    with pytest.raises(PluginError, match="expects a function from the name after the dot"):
        register_attack("other.*")(fgsm)


@pytest.mark.parametrize("library", ["torchattacks", "foolbox"])
def test_a_library_that_is_missing_is_named_with_the_command_that_installs_it(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ATTACKS, "_made", {})
    monkeypatch.setitem(sys.modules, library, None)
    name = {"torchattacks": "torchattacks.PGD", "foolbox": "foolbox.LinfPGD"}[library]
    with pytest.raises(UsageError, match=rf"{name} needs {library}.*pip install 'ensdef\[{library}\]'"):
        AttackSpec.create(name, {}, "linf", 0.1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchattacks.PDG", r"unknown class of torchattacks 'PDG'; did you mean.*'PGD'"),
        ("foolbox.LinfDeepFool", r"unknown class of foolbox.attacks.*did you mean.*'LinfDeepFoolAttack'"),
        ("foolbox.Attack", r"unknown class of foolbox.attacks 'Attack'"),
        ("torchattacks.AutoAttack", r"is not AutoAttack.*10 steps.*use autoattack"),
        ("torchattacks.OnePixel", r"measures perturbations in L0; attacks are run in linf or l2"),
        ("torchattacks.EADL1", r"measures perturbations in L1"),
        ("torchattacks.GN", r"has no norm"),
        ("torchattacks.MultiAttack", r"no default for attacks"),
        ("foolbox.L1PGD", r"measures perturbations in L1"),
        ("foolbox.L0FMNAttack", r"measures perturbations in L0"),
        ("foolbox.DatasetAttack", r"fed with images by hand"),
        ("foolbox.PointwiseAttack", r"measures perturbations in no norm of their own"),
        ("foolbox.VirtualAdversarialAttack", r"no default for steps"),
    ],
)
def test_a_class_that_cannot_be_run_is_refused_with_the_reason(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ATTACKS.get(name)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("torchattacks.PGD", "l2"),
        ("torchattacks.PGDL2", "linf"),
        ("torchattacks.CW", "linf"),
        ("foolbox.LinfPGD", "l2"),
        ("foolbox.L2DeepFoolAttack", "linf"),
    ],
)
def test_a_class_in_the_wrong_norm_is_refused(name: str, norm: str) -> None:
    with pytest.raises(UsageError, match=rf"{name} cannot be run in {norm}"):
        AttackSpec.create(name, {}, norm, 0.1)


@pytest.mark.parametrize("name", ["torchattacks.Square", "torchattacks.APGD", "foolbox.HopSkipJumpAttack"])
def test_a_class_for_several_norms_takes_both(name: str) -> None:
    assert ATTACKS.get(name).norms == ("linf", "l2")


@pytest.mark.parametrize("params", [{"eps": 0.1}, {"model": 1}, {"seed": 3}, {"norm": "Linf"}, {"stepz": 3}])
def test_what_the_harness_sets_is_no_parameter(params: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"torchattacks.APGD has no parameter"):
        AttackSpec.create("torchattacks.APGD", params, "linf", 0.1)


def test_every_class_of_both_libraries_is_either_an_attack_or_refused() -> None:
    made = []
    for library, names in (("torchattacks", torchattacks.__all__), ("foolbox", dir(foolbox.attacks))):
        for part in names:
            try:
                attack = ATTACKS.get(f"{library}.{part}")
            except UsageError:
                continue
            made.append(f"{library}.{part}")
            assert attack.norms
            assert AttackSpec.create(made[-1], {}, attack.norms[0], 0.1).params_object == attack.Params()
    assert {"torchattacks.PGD", "torchattacks.CW", "torchattacks.VMIFGSM", "foolbox.LinfPGD"} <= set(made)
    assert len(made) > 60


# --- torchattacks ---------------------------------------------------------------------------------


def by_hand(make: Callable[[nn.Module], Any], x: Tensor, y: Tensor, seed: int = 0) -> Tensor:
    model, _, _ = trained_network()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        points: Tensor = make(model)(x, y)
    return points


def same(outcome: ensdef.harness.Outcome, points: Tensor) -> None:  # type: ignore[name-defined]
    """The verdicts are those of the library's own points, and so are the points themselves but for a few pixels."""
    model, x, y = digits()
    assert 0 < int(outcome.robust.sum()) < len(x)
    assert torch.equal(outcome.robust, decisions(model, points) == y)
    assert float(((outcome.x_adv - points).abs() > 1e-4).float().mean()) < 0.005


@pytest.mark.parametrize(
    ("call", "make"),
    [
        ("torchattacks.PGD[steps=5,alpha=0.04]", lambda m: torchattacks.PGD(m, eps=0.1, alpha=0.04, steps=5)),
        ("torchattacks.MIFGSM[alpha=0.03]", lambda m: torchattacks.MIFGSM(m, eps=0.1, alpha=0.03)),
        ("torchattacks.APGD", lambda m: torchattacks.APGD(m, eps=0.1, seed=0)),
        ("torchattacks.APGDT[steps=4]", lambda m: torchattacks.APGDT(m, eps=0.1, steps=4, seed=0, n_classes=10)),
        ("torchattacks.Square[n_queries=40]", lambda m: torchattacks.Square(m, eps=0.1, n_queries=40, seed=0)),
    ],
)
def test_a_class_of_torchattacks_does_what_it_does_by_hand(call: str, make: Callable[[nn.Module], Any]) -> None:
    model, x, y = digits()
    name, params = parse_call(call)
    same(attacked(model, x, y, name, 0.1, **params), by_hand(make, x, y))


def test_a_radius_by_another_name_is_the_radius() -> None:
    model, x = linear(4, shape=(3, 8, 8)), images(20, shape=(3, 8, 8))
    y = decisions(model, x)
    outcome = attacked(model, x, y, "torchattacks.PIFGSM", 0.05)
    assert float((outcome.x_adv - x).abs().max()) == pytest.approx(0.05, abs=1e-6)
    assert not hasattr(ATTACKS.get("torchattacks.PIFGSM").Params(), "max_epsilon")


def test_the_number_of_classes_is_the_model_s() -> None:
    model, x = linear(3, shape=SHAPE), images(20, shape=SHAPE)
    y = decisions(model, x)
    robust = attacked(model, x, y, "torchattacks.FAB", 0.02, multi_targeted="true").robust
    assert not bool((model.exactly_robust(x, y, 0.02) & ~robust).any())


def test_the_library_s_bim_is_ours() -> None:
    model, x, y = digits()
    theirs = attacked(model, x, y, "torchattacks.BIM", 0.1, steps=8, alpha=0.02)
    ours = attacked(model, x, y, "bim", 0.1, steps=8, step_size=0.02, success="last")
    assert torch.equal(theirs.robust, ours.robust)
    assert float(((theirs.x_adv - ours.x_adv).abs() > 1e-4).float().mean()) < 0.005


def test_an_attack_without_a_radius_is_compared_with_it() -> None:
    model, x, y = digits(30)
    assert ATTACKS.get("torchattacks.CW").budget == "min_norm"
    points = by_hand(lambda m: torchattacks.CW(m, c=1.5, steps=40, lr=0.05), x, y)
    length = Threat("l2", 1).distance(points, x)
    eps = float(length[decisions(model, points) != y].median())
    outcome = attacked(model, x, y, "torchattacks.CW", eps, "l2", c=1.5, steps=40, lr=0.05)
    fooled = (decisions(model, points) != y) & (length <= eps)
    assert 0 < int(fooled.sum()) < len(x)
    assert int((outcome.robust != ~fooled).sum()) <= 1


@pytest.mark.parametrize("name", ["torchattacks.PGD", "torchattacks.DIFGSM", "foolbox.LinfPGD"])
def test_a_wrapped_attack_leaves_flags_and_random_states_alone_and_repeats_itself(name: str) -> None:
    model, x, y = digits(20)
    model.train()
    model[2].eval()
    flags = [part.training for part in model.modules()]
    states = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    root = list(logging.getLogger().handlers)
    first, again, other = (attacked(model, x, y, name, 0.05, seed=seed) for seed in (1, 1, 2))
    assert [part.training for part in model.modules()] == flags
    model.eval()
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert logging.getLogger().handlers == root
    assert torch.equal(first.x_adv, again.x_adv)
    assert name == "torchattacks.DIFGSM" or not torch.equal(first.x_adv, other.x_adv)


def test_a_model_without_parameters_is_attacked_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[:, :, :4].sum(dim=(1, 2, 3)), x[:, :, 4:].sum(dim=(1, 2, 3))], dim=1)

    x = images(20, shape=SHAPE)
    outcome = attacked(Sums(), x, decisions(Sums(), x), "torchattacks.PGD", 0.3)
    assert not bool(outcome.robust.any())
    assert capsys.readouterr().out == ""


# --- foolbox --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "norm", "eps", "make"),
    [
        ("foolbox.LinfPGD[steps=5,rel_stepsize=0.3]", "linf", 0.1, lambda a: a.LinfPGD(steps=5, rel_stepsize=0.3)),
        ("foolbox.L2PGD[abs_stepsize=0.2]", "l2", 0.8, lambda a: a.L2PGD(abs_stepsize=0.2)),
        ("foolbox.LinfDeepFoolAttack[steps=20]", "linf", 0.1, lambda a: a.LinfDeepFoolAttack(steps=20)),
        ("foolbox.L2FMNAttack[steps=20]", "l2", 0.8, lambda a: a.L2FMNAttack(steps=20)),
        ("foolbox.InversionAttack", "linf", 0.9, lambda a: a.InversionAttack(distance=foolbox.distances.linf)),
    ],
)
def test_a_class_of_foolbox_does_what_it_does_by_hand(
    call: str, norm: str, eps: float, make: Callable[[Any], Any]
) -> None:
    model, x, y = digits()
    name, params = parse_call(call)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        library = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        _, _, fooled = make(foolbox.attacks)(library, x, y, epsilons=eps)
    outcome = attacked(model, x, y, name, eps, norm, **params)
    assert int((outcome.robust != ~fooled).sum()) <= 1
    assert int(fooled.sum()) > 0


def test_foolbox_s_deepfool_is_ours() -> None:
    model, x, y = digits()
    theirs = attacked(model, x, y, "foolbox.L2DeepFoolAttack", 8, "l2")
    ours = attacked(model, x, y, "deepfool", 8, "l2")
    torch.testing.assert_close(theirs.x_adv, ours.x_adv, rtol=0, atol=1e-4)
