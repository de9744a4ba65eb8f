"""Several attacks in a row: the worst case of them all, who broke what, and what cannot be put together."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ensdef
from ensdef.attack_spec import AttackSpec
from ensdef.defense import Batch, EnsembleDefense, Terms
from ensdef.errors import UsageError
from ensdef.harness import Outcome, attack_model
from ensdef.notation import parse_call
from ensdef.registry import ATTACKS, METHODS
from ensdef.specs import DataSpec, Setting, TrainSpec
from ensdef.testing import LinearClassifier

CLASSES, SHAPE = 4, (1, 8, 8)


class Mean(EnsembleDefense):
    """A plain ensemble of given members."""

    def loss(self, batch: Batch, progress: float) -> Terms:
        raise NotImplementedError


class Detached(nn.Module):
    """Scores of which no gradient comes back."""

    def forward(self, x: Tensor) -> Tensor:
        return (20 * x.flatten(1)[:, :CLASSES] - 10).detach()


def ensemble(seed: int = 0) -> Mean:
    """Two members that bend, so that attacks differ in what they find."""
    rng = torch.Generator().manual_seed(seed)
    members = []
    for _ in range(2):
        first, second = nn.Linear(64, 24), nn.Linear(24, CLASSES)
        with torch.no_grad():
            for layer in (first, second):
                layer.weight.normal_(0, 1, generator=rng)
                layer.bias.normal_(0, 1, generator=rng)
        members.append(nn.Sequential(nn.Flatten(), first, nn.Tanh(), second))
    return Mean(members).eval()


def images(count: int = 120) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def attacked(
    call: str,
    eps: float = 0.03,
    norm: str = "linf",
    model: nn.Module | None = None,
    surrogates: Mapping[str, EnsembleDefense] | None = None,
    health: Any = "off",
) -> Outcome:
    model, x = model or ensemble(), images()
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    name, params = parse_call(call)
    spec = AttackSpec.create(name, params, norm, eps)
    return attack_model(model, x, y, spec, prerequisites=surrogates, health=health)


def suite(*calls: str) -> str:
    return f"suite[attacks={'+'.join(calls)}]"


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_image_is_robust_only_if_it_withstands_every_attack_by_itself(norm: str) -> None:
    """Attacks that draw nothing give every image what they would give it alone."""
    calls = ("fgsm", "bim[steps=3]", "mim[steps=4,loss=margin]", "deepfool[steps=5]")
    eps = 0.03 if norm == "linf" else 0.25
    alone = [attacked(call, eps, norm).robust for call in calls]
    together = attacked(suite(*calls), eps, norm).robust
    assert torch.equal(together, torch.stack(alone).all(dim=0))
    assert 0 < int(together.sum()) < min(int(robust.sum()) for robust in alone), "each finds what others miss"


def test_broken_by_tells_how_many_images_each_attack_broke_that_none_before_it_had() -> None:
    calls = ("fgsm", "bim[steps=3]", "mim[steps=4,loss=margin]")
    fgsm, bim, mim = (~attacked(call).robust for call in calls)
    outcome = attacked(suite(*calls))
    assert outcome.broken_by == dict(
        zip(calls, map(int, (fgsm.sum(), (bim & ~fgsm).sum(), (mim & ~fgsm & ~bim).sum())), strict=True)
    )


def test_the_first_attack_finds_what_it_finds_alone_random_or_not() -> None:
    call = "pgd[steps=4,restarts=2]"
    assert attacked(suite(call, "fgsm")).broken_by[call] == int((~attacked(call).robust).sum())


def test_attacks_made_of_parts_are_told_part_by_part() -> None:
    outcome = attacked(suite("fgsm", "adaptive[steps=4]"))
    names = list(outcome.broken_by)
    assert names[:2] == ["fgsm", "adaptive[steps=4]: predict, cross-entropy"]
    assert "adaptive[steps=4]: member1, margin" in names
    assert sum(outcome.broken_by.values()) == int(outcome.clean.sum() - outcome.robust.sum())


def test_what_fell_is_not_attacked_again() -> None:
    alone = [attacked(call) for call in ("bim[steps=6]", "mim[steps=8]")]
    together = attacked(suite("bim[steps=6]", "mim[steps=8]"))
    # every attack spends its passes on images that are left to it alone
    assert together.backwards < sum(outcome.backwards for outcome in alone)
    left = int(alone[0].robust.sum())
    assert together.backwards - alone[0].backwards <= left * 8 * 2


def test_images_crafted_on_surrogates_are_offered_under_the_call_that_asked_for_them() -> None:
    call = "transfer[steps=4]"
    alone = attacked(call, 0.1, surrogates={"nat x 3": ensemble(5)})
    together = attacked(suite("fgsm", call), 0.1, surrogates={f"{call}: nat x 3": ensemble(5)})
    assert torch.equal(together.robust, alone.robust & attacked("fgsm", 0.1).robust)
    assert f"{call}: nat x 3, mim[random_start=true], ce" in together.broken_by


def test_a_missing_surrogate_is_told_with_the_attack_that_needs_it() -> None:
    with pytest.raises(UsageError, match=r"suite: transfer: no surrogate nat x 3"):
        attacked(suite("fgsm", "transfer"))


def test_warnings_of_the_attacks_are_those_of_the_suite() -> None:
    outcome = attacked(suite("fgsm", "autoattack[steps=2,queries=5]"), health="basic")
    (warning,) = (one for one in outcome.findings if one["flag"] == "attack_warning")
    assert "AutoAttack as published has" in warning["meaning"]


# --- what a record says of it ---------------------------------------------------------------------


def test_the_default_is_pgd_with_restarts_then_autoattack_then_what_is_made_for_ensembles() -> None:
    assert ATTACKS.get("suite").Params().attacks == ("pgd[steps=50,restarts=5]", "autoattack", "adaptive")
    assert AttackSpec.create("suite", {}, "linf", "0.1").call == "suite"


def test_a_call_is_read_and_written_with_brackets_and_lists_inside_brackets() -> None:
    call = suite("pgd[steps=2,restarts=3]", "transfer[surrogates=nat+adv,steps=4]")
    name, params = parse_call(call)
    spec = AttackSpec.create(name, params, "linf", "0.1")
    assert spec.params["attacks"] == ("pgd[steps=2,restarts=3]", "transfer[surrogates=nat+adv,steps=4]")
    assert spec.call == call


def test_the_code_of_every_attack_that_runs_is_part_of_the_key() -> None:
    spec = AttackSpec.create("suite", {"attacks": ("pgd", "transfer[attacks=sgm+mim]")}, "linf", "0.1")
    assert set(spec.identity()["uses"]) == {"pgd", "transfer", "sgm", "mim"}


def test_trainings_that_the_attacks_need_are_those_they_would_need_alone() -> None:
    data = DataSpec("digits", None, None, None, "", "", SHAPE, CLASSES, (0.5,), (0.25,))
    training = TrainSpec.create(METHODS.names()[0], {}, Setting(data, "small_resnet", 2, "linf", "0.1"))
    found = {}
    for name, params in (("transfer", {}), ("suite", {"attacks": ("fgsm", "transfer")})):
        spec = AttackSpec.create(name, params, "linf", "0.1")
        found[name] = ATTACKS.get(name).prerequisites(spec.params_object, training)
    assert set(found["suite"]) == {"transfer: nat x 3"}
    assert found["suite"]["transfer: nat x 3"].key == found["transfer"]["nat x 3"].key


def test_surrogates_of_one_architecture_are_the_same_whatever_is_attacked() -> None:
    data = DataSpec("digits", None, None, None, "", "", SHAPE, CLASSES, (0.5,), (0.25,))
    attack = ATTACKS.get("transfer")

    def keys(params: Any) -> set[str]:
        setting = (Setting(data, arch, 2, "linf", "0.1") for arch in ("small_resnet", "small_resnet[width=28]"))
        trainings = [TrainSpec.create("adv", {}, one) for one in setting]
        return {one.key for training in trainings for one in attack.prerequisites(params, training).values()}

    assert len(keys(attack.Params(architecture="small_resnet"))) == 1
    assert len(keys(attack.Params())) == 2


def test_a_suite_sees_what_its_most_seeing_attack_sees_and_draws_if_any_does() -> None:
    made = ATTACKS.get("suite")
    blind, seeing = made(made.Params(("rays", "square"))), made(made.Params(("square", "bim")))
    assert (blind.access, seeing.access) == ("score", "gradient")
    assert (made(made.Params(("fgsm",))).random, seeing.random) == (False, True)


def test_a_copy_prepares_for_itself() -> None:
    made = ATTACKS.get("suite")
    one = made(made.Params(("fgsm", "transfer")))
    other = copy.copy(one)
    other.warm_start({"transfer: nat x 3": ensemble()})
    assert not hasattr(one.attacks["transfer"], "surrogates")
    assert hasattr(other.attacks["transfer"], "surrogates")


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calls", "told"),
    [
        ((), "attacks is empty"),
        (("pgd", "suite"), "suite is a suite itself"),
        (("pgd", "fog"), "fog has no radius, .* column of its own"),
        (("pgd[success=last]",), "success is a setting of the whole suite, not of pgd"),
        (("pgd", "pgd[steps=50]"), r"pgd\[steps=50\] is there twice"),
        (("pgdd",), "unknown attack 'pgdd'; did you mean 'pgd'"),
        (("pgd[stepz=3]",), "pgd has no parameter 'stepz'"),
        (("pgd[steps=3",), "never closed"),
    ],
)
def test_attacks_that_make_no_suite_are_refused_by_name(calls: tuple[str, ...], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        AttackSpec.create("suite", {"attacks": calls}, "linf", "0.1")


def test_a_norm_that_one_attack_does_not_have_is_refused_with_its_name() -> None:
    with pytest.raises(UsageError, match=r"suite: spsa cannot be run in l2; it has: linf"):
        AttackSpec.create("suite", {"attacks": ("pgd", "spsa")}, "l2", "0.5")


def test_a_model_that_one_attack_cannot_be_run_on_is_refused_with_its_name() -> None:
    with pytest.raises(UsageError, match=r"suite: bim: predict has no gradient"):
        ensdef.evaluate(
            Detached(), images(20), torch.zeros(20, dtype=torch.long), attack=suite("square", "bim"), eps=0.1
        )
    record = ensdef.evaluate(
        Detached(), images(20), torch.zeros(20, dtype=torch.long), attack=suite("square[queries=5]", "rays"), eps=0.1
    )
    assert record.error is None


def test_the_same_model_is_attacked_in_the_same_way_twice() -> None:
    call = suite("pgd[steps=3,restarts=2]", "square[queries=20]", "adaptive[steps=2]")
    first, second = attacked(call), attacked(call)
    assert torch.equal(first.x_adv, second.x_adv)
    assert first.broken_by == second.broken_by


def test_the_linear_model_loses_exactly_the_images_that_can_be_lost() -> None:
    rng = torch.Generator().manual_seed(3)
    model, x = LinearClassifier(torch.randn(CLASSES, 64, generator=rng) / 2), images()
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    expected = model.exactly_robust(x, y, 0.06)
    assert 0 < int(expected.sum()) < len(x)
    call = suite("fgsm", "adaptive[steps=20]")
    assert torch.equal(attacked(call, 0.06, model=model).robust, expected)
