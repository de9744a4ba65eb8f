"""Each diagnostic of the health report on a planted case and on its honest twin, and what the report costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import (
    CLASSES,
    COUNT,
    EPS,
    PIXELS,
    Gated,
    Greatest,
    Mean,
    Says,
    Selected,
    backwards,
    convolutional,
    generator,
    images,
    linear,
)

import ensdef
from ensdef.attack import IterativeAttack, State
from ensdef.attack_spec import AttackSpec
from ensdef.cli.run import bench
from ensdef.errors import UsageError
from ensdef.harness import Outcome, attack_model
from ensdef.health.ascent import NEVER, climb, draw, search
from ensdef.losses import cross_entropy, margin
from ensdef.records import Record
from ensdef.registry import ATTACKS
from ensdef.rng import KeyedRandom
from ensdef.runner import Run, find_record, run_cells
from ensdef.target import Target
from ensdef.testing import LinearClassifier
from ensdef.threat import Threat


def attacked(
    model: nn.Module, name: str = "pgd", count: int = COUNT, eps: float = EPS, health: Any = "basic", **params: Any
) -> Outcome:
    x, y = images(count)
    if name == "pgd":
        params.setdefault("steps", 20)
    return attack_model(model, x, y, AttackSpec.create(name, params, "linf", eps), health=health)


def found(model: nn.Module, name: str = "pgd", **given: Any) -> dict[str, dict[str, Any]]:
    return {flag["flag"]: flag for flag in attacked(model, name, **given).findings}


# --- cost -----------------------------------------------------------------------------------------


class Counted(nn.Module):
    """A linear model that counts the images it sees, whoever asks."""

    seen = 0

    def __init__(self, weight: int = 0) -> None:
        super().__init__()
        self.model = linear(weight)

    def forward(self, x: Tensor) -> Tensor:
        Counted.seen += len(x)
        return self.model(x)


def cost(build: Any, health: str, name: str, eps: float, **params: Any) -> tuple[int, Outcome]:
    Counted.seen = 0
    outcome = attacked(build(), name, eps=eps, health=health, **params)
    return Counted.seen, outcome


@pytest.mark.parametrize(("name", "params"), [("pgd", {"steps": 50}), ("pgd", {"steps": 5}), ("fgsm", {})])
@pytest.mark.parametrize("eps", [EPS, 0.01])
def test_the_basic_report_adds_at_most_a_tenth_of_the_attack_s_passes(
    name: str, params: dict[str, Any], eps: float
) -> None:
    for build in (Counted, lambda: Mean([Counted(0), Counted(1)]), lambda: Selected([Counted(0), Counted(1)])):
        alone, plain = cost(build, "off", name, eps, **params)
        together, outcome = cost(build, "basic", name, eps, **params)
        assert outcome.forwards == plain.forwards
        assert outcome.backwards == plain.backwards
        assert outcome.health_forwards <= outcome.forwards / 10
        assert together - alone == outcome.health_forwards, "the counter tells what the model saw"
        assert plain.health_forwards == 0


def test_an_attack_of_many_passes_pays_for_an_examination() -> None:
    assert attacked(linear(), steps=50).health_forwards > 0


@pytest.mark.parametrize("success", ["any", "last"])
def test_looking_on_changes_no_point_and_no_verdict(success: str) -> None:
    model = Mean([linear(), linear(1)])
    plain, watched = (attacked(model, health=health, success=success, restarts=2) for health in ("off", "basic"))
    assert torch.equal(plain.x_adv, watched.x_adv)
    assert torch.equal(plain.robust, watched.robust)
    assert plain.findings == []


def test_an_examination_leaves_the_global_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    attacked(linear(), health="full", count=200)
    assert torch.equal(state, torch.random.get_rng_state())


# --- what the run itself shows --------------------------------------------------------------------


def test_a_zero_gradient_is_told_with_its_share() -> None:
    flag = found(Says(after=torch.round))["zero_gradient"]
    assert flag["value"] > 0.9, "all but those that the random start fools"
    assert flag["threshold"] == 0.001
    assert f"{round(64 * flag['value'])} of 64" in flag["meaning"]
    assert "zero_gradient" not in found(Says())


def test_below_two_hundred_images_counts_are_not_judged() -> None:
    assert "zero_gradient" in found(Says(after=torch.round), count=200)
    assert "zero_gradient" not in found(Says(after=torch.round), count=199)


def test_a_gradient_that_vanishes_once_an_image_is_fooled_is_none_of_the_model_s() -> None:
    x, y = images(2 * COUNT)
    x, y = x[y < 2], y[y < 2]
    two = LinearClassifier(8 * linear().weight.detach()[:2], 8 * linear().bias.detach()[:2])
    spec = AttackSpec.create("pgd", {"steps": 20, "loss": "targeted", "success": "last"}, "linf", 0.4)
    outcome = attack_model(two, x, y, spec)
    point = outcome.x_adv.requires_grad_()
    slope = torch.autograd.grad(-cross_entropy(two(point), 1 - y).sum(), point)[0]
    assert int((slope.flatten(1).abs().amax(dim=1) == 0).sum()) > 100
    assert "zero_gradient" not in [flag["flag"] for flag in outcome.findings]


def test_the_cross_entropy_of_sure_answers_underflows_and_the_margin_does_not() -> None:
    loud = Says(after=lambda scores: 40 * scores)
    assert "zero_gradient" in found(loud)
    assert "zero_gradient" not in found(loud, loss="margin")


@pytest.mark.parametrize("name", ["pgd", "fgsm", "mim"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_a_gradient_that_points_the_wrong_way_breaks_its_promise(name: str, loss: str) -> None:
    liar = Says(backwards(lambda slope: -slope))
    assert found(liar, name, loss=loss)["loss_progress"]["value"] == 1.0
    assert "loss_progress" not in found(Says(), name, loss=loss)
    assert "loss_progress" not in found(convolutional(), name, loss=loss)


class Contrary(Mean):
    """Has a view that likes whatever ``predict`` dislikes."""

    def views(self) -> Any:
        return {**super().views(), "contrary": lambda x: -self.predict(x)}


def test_a_view_that_leads_away_from_the_decision_is_told() -> None:
    model = Contrary([linear(), linear(1)])
    flag = found(model, view="contrary")["loss_consistency"]
    assert flag["severity"] == "info"
    assert "loss_consistency" not in found(model, view="mean_logit")
    assert "loss_consistency" not in found(model)


class ThereAndBack(IterativeAttack):
    """Goes where the image is fooled, and returns."""

    @dataclasses.dataclass(frozen=True)
    class Params:
        steps: int = 4

    def step(
        self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
    ) -> tuple[Tensor, State]:
        point = x_adv.detach().requires_grad_()
        slope = torch.autograd.grad(margin(target(point), y).sum(), point)[0]
        sign = torch.where(rng.step.view(-1, 1, 1, 1) <= 2, 1.0, -1.0)
        return x_adv + sign * threat.eps * slope.sign(), state


def test_images_fooled_on_the_way_alone_are_told_where_only_the_end_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTACKS._registered, "toy_back", ThereAndBack)
    flag = found(linear(), "toy_back", success="last")["silent_success"]
    stronger = attacked(linear(), "toy_back", success="any")
    weaker = attacked(linear(), "toy_back", success="last")
    assert flag["severity"] == "info"
    assert flag["value"] == (int(weaker.robust.sum()) - int(stronger.robust.sum())) / COUNT
    assert f"{100 * int(stronger.robust.sum()) / COUNT:.1f} %" in flag["meaning"]
    assert "silent_success" not in found(linear(), "toy_back", success="any")
    assert "silent_success" not in found(linear(), success="last")


class Fickle(Mean):
    """Selects by something that any step changes."""

    combiner = "select"

    def selection(self, x: Tensor) -> Tensor:
        wild = torch.sin(1e5 * x.flatten(1).square().sum(dim=1))
        return torch.stack([wild, -wild], dim=1)


def test_a_selector_that_changes_its_mind_in_every_other_step_is_told() -> None:
    flag = found(Fickle([linear(), linear(1)]), eps=0.02, step_size="eps/40")["selector_churn"]
    assert flag["severity"] == "info"
    assert flag["value"] > 0.2
    assert "selector_churn" not in found(Selected([linear(), linear(1)]), eps=0.01)


# --- what a few passes more show ------------------------------------------------------------------


def test_a_member_that_carries_the_gradient_is_told() -> None:
    quiet = LinearClassifier(1e-4 * torch.randn(CLASSES, PIXELS, generator=generator(3)))
    loud, x = Says(after=lambda scores: 6 * scores), images()[0]
    with torch.no_grad():
        assert float(quiet(x).abs().max()) < 0.1
    flag = found(Mean([quiet, loud, loud]))["member_domination"]
    assert flag["severity"] == "info"
    assert flag["value"] > 100
    assert "member_domination" not in found(Mean([linear(seed) for seed in range(3)]))


def test_a_member_that_is_never_selected_is_idle_and_not_detached() -> None:
    weak = LinearClassifier(torch.randn(CLASSES, PIXELS, generator=generator(3)) / 100)
    flags = found(Selected([linear(), weak]))
    assert flags["idle_member"]["severity"] == "info"
    assert "detached_member" not in flags
    assert not {"idle_member", "detached_member"} & set(found(Greatest([linear(), linear(1)])))


def test_a_gate_is_saturated_only_where_no_other_weight_is_left() -> None:
    assert found(Gated([linear(), linear(1)], 1e4))["saturated_selection"]["value"] == 1.0
    assert "saturated_selection" not in found(Gated([linear(), linear(1)], 3.0))


@pytest.mark.parametrize("whole", [True, False])
def test_parts_in_train_mode_are_told_and_a_forgotten_eval_alarms_nobody(whole: bool) -> None:
    model = Mean([linear(), nn.Sequential(nn.BatchNorm2d(1), linear(1))])
    model.eval()
    assert "train_mode" not in found(model)
    (model if whole else model.members[1]).train()
    flag = found(model)["train_mode"]
    assert flag["severity"] == ("info" if whole else "masking")
    assert "members.1.0" in flag["meaning"]


def test_a_model_without_parts_that_care_may_be_in_train_mode() -> None:
    assert "train_mode" not in found(linear().train())


# --- what is known without a pass -----------------------------------------------------------------


class Worried(IterativeAttack):
    """Warns, and stays where it is."""

    @dataclasses.dataclass(frozen=True)
    class Params:
        steps: int = 1

    def step(
        self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
    ) -> tuple[Tensor, State]:
        if not self.warnings:
            self.warnings.append("the moon is full")
        return x_adv, state


def test_warnings_of_the_attack_are_kept_word_for_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTACKS._registered, "toy_warning", Worried)
    flag = found(linear(), "toy_warning")["attack_warning"]
    assert (flag["severity"], flag["value"]) == ("info", 1.0)
    assert "the moon is full" in flag["meaning"]
    assert "attack_warning" not in found(linear())


def test_a_model_that_guesses_is_told() -> None:
    flag = found(LinearClassifier(torch.zeros(CLASSES, PIXELS), torch.tensor([2.0, 0.0, 0.0, 0.0])))["clean_accuracy"]
    assert flag["value"] == 0.25
    assert flag["threshold"] == pytest.approx(0.25 + 3 * (0.25 * 0.75 / COUNT) ** 0.5)
    assert "clean_accuracy" not in found(linear())


@pytest.mark.parametrize(("count", "wide"), [(40, True), (200, True), (800, False)])
def test_few_images_make_a_number_uncertain(count: int, wide: bool) -> None:
    flags = found(linear(), count=count)
    assert ("uncertain" in flags) == wide


def test_an_examination_that_fails_becomes_a_finding_and_loses_no_result() -> None:
    class Twice(nn.Module):
        """Refuses batches of an even number of images below 100."""

        def __init__(self) -> None:
            super().__init__()
            self.model = linear()

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 64:
                raise RuntimeError("sixty-four")
            return self.model(x)

    outcome = attacked(Twice(), steps=50, eps=0.001)
    assert torch.equal(outcome.robust, attacked(linear(), steps=50, eps=0.001).robust)
    (flag,) = [flag for flag in outcome.findings if flag["flag"] == "unexamined"]
    assert "RuntimeError: sixty-four" in flag["meaning"]


# --- the full report ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [16, 200])
def test_the_report_s_own_attack_finds_what_the_harness_finds_on_a_linear_model(batch_size: int) -> None:
    x, y = images()
    two = LinearClassifier(linear().weight.detach()[:2], linear().bias.detach()[:2])
    x, y = x[y < 2], y[y < 2]
    exact = two.exactly_robust(x, y, EPS)
    target, threat = Target(two), Threat("linf", EPS)
    fallen = climb(target, x, y, threat, margin, steps=20, step_size=EPS / 5, batch_size=batch_size) < NEVER
    assert torch.equal(~fallen, exact)
    once = climb(target, x, y, threat, cross_entropy, steps=1, step_size=EPS, batch_size=batch_size)
    assert torch.equal(once == NEVER, exact)
    assert set(once.tolist()) <= {0, 1, NEVER}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_search_fools_nobody_whom_no_point_of_the_ball_fools(norm: str) -> None:
    x, y = images()
    model, eps = linear(), 0.1 if norm == "linf" else 0.8
    threat = Threat(norm, eps)
    guided = search(Target(model), x, y, threat, generator(0), queries=300)
    blind = draw(Target(model), x, y, threat, generator(0), draws=20)
    if norm == "linf":
        assert not bool((guided & model.exactly_robust(x, y, eps)).any())
    fallen = climb(Target(model), x, y, threat, margin, steps=20, step_size=eps / 5) < NEVER
    assert int(blind.sum()) <= int(guided.sum()) <= int(fallen.sum())
    assert int(guided.sum()) > int(fallen.sum()) / 2, "a search on scores finds most of what gradients find"


def test_a_rounded_model_is_unmasked_by_an_attack_on_its_scores() -> None:
    flags = found(Says(after=lambda scores: (scores / 2).round()), health="full")
    assert flags["black_box_beats_gradient"]["severity"] == "masking"
    assert flags["unbounded_survivors"]["severity"] == "masking"


def test_one_step_beats_many_where_the_gradient_holds_at_clean_images_alone() -> None:
    known = images()[0]

    class OnlyClean(nn.Module):
        """Passes a gradient back at the images it knows, and none elsewhere."""

        def __init__(self) -> None:
            super().__init__()
            self.model = linear()

        def forward(self, x: Tensor) -> Tensor:
            near = torch.cdist(x.detach().flatten(1), known.flatten(1).to(x.dtype), p=torch.inf).amin(dim=1) < 1e-6
            return self.model(torch.where(near.view(-1, 1, 1, 1), x, x.detach() + 0 * x))

    flags = found(OnlyClean(), health="full")
    assert flags["one_step_beats_iterative"]["severity"] == "masking"


def test_saturated_scores_are_unmasked_by_another_loss_and_by_another_precision() -> None:
    flags = found(Says(after=lambda scores: 40 * scores), health="full")
    assert flags["loss_choice"]["severity"] == "masking"
    assert flags["precision"]["severity"] == "masking"


def test_members_that_the_gradient_of_the_ensemble_does_not_see_are_unmasked_one_by_one() -> None:
    class Blind(Mean):
        """The mean of the logits, rounded in the ensemble and not in its members."""

        def predict(self, x: Tensor) -> Tensor:
            return self.member_logits(x).mean(dim=0).round()

    assert found(Blind([linear(), linear(1)]), health="full")["member_transfer"]["severity"] == "masking"


def test_an_attack_too_weak_for_a_linear_model_is_told() -> None:
    flags = found(linear(), health="full", steps=1, step_size="eps/20", random_start=False, eps=0.05)
    assert flags["control_failed"]["severity"] == "info"
    assert "control_failed" not in found(linear(), health="full", eps=0.05)


def test_a_selector_that_overlooks_a_right_member_is_told() -> None:
    class Wrong(Selected):
        """Selects its first member, whatever the image."""

        def predict(self, x: Tensor) -> Tensor:
            logits = self.member_logits(x)
            return logits[0] + 0 * logits[1]

    assert found(Wrong([linear(), linear(1)]), health="full", eps=0.2)["selector_oracle_gap"]["severity"] == "info"


# --- records and the command line -----------------------------------------------------------------


def evaluated(model: nn.Module, **given: Any) -> Record:
    x, y = images()
    return ensdef.evaluate(model, x, y, attack="pgd", steps=10, eps=EPS, device="cpu", **given)


def test_a_record_carries_the_findings_and_the_tier_that_made_them() -> None:
    record = evaluated(Says(after=torch.round))
    assert "zero_gradient" in [flag["flag"] for flag in record.flags]
    assert record.provenance["health"] == "basic"
    assert Record.from_json(record.to_json()).flags == record.flags


def test_without_a_report_there_are_no_findings() -> None:
    record = evaluated(Says(after=torch.round), health="off")
    assert record.flags == []
    assert record.provenance["health"] == "off"


def test_the_tier_does_not_enter_the_key() -> None:
    assert evaluated(linear(), health="off").key == evaluated(linear()).key


def test_an_unknown_tier_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown health 'some'; expected one of off, basic, full"):
        evaluated(linear(), health="some")


def test_a_record_of_a_lower_tier_is_made_anew_only_when_a_higher_one_is_asked_for(tmp_path: Path) -> None:
    from test_training_health import cell

    one = cell("nat")
    (record,) = run_cells([one], Run(tmp_path, health="off"))
    assert record.error is None
    for asked, there in ((None, True), ("off", True), ("basic", False), ("full", False)):
        assert (find_record(one, tmp_path, asked) is not None) == there  # type: ignore[arg-type]
    (again,) = run_cells([one], Run(tmp_path))
    assert again.provenance == record.provenance
    (better,) = run_cells([one], Run(tmp_path, health="basic"))
    assert (better.path, better.provenance["health"]) == (record.path, "basic")
    assert find_record(one, tmp_path, "off") is not None


def test_both_commands_have_the_option() -> None:
    (option,) = [item for item in bench.params if item.name == "health"]
    assert list(option.type.choices) == ["basic", "full", "off"]  # type: ignore[attr-defined]
