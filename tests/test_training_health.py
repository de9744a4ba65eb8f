"""Findings about a training: what raises them, what does not, and where they are told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import toys_defense
from click.testing import CliRunner
from torch import Tensor, nn
from toys_defense import CLASSES, SHAPE, Plain, generator, registered, same_weights, toy_spec

import ensdef.cli.run  # noqa: F401 - adds its commands
from ensdef import training_health
from ensdef.attack_spec import AttackSpec
from ensdef.checkpoints import checkpoint_folder, training_report
from ensdef.cli import cli
from ensdef.data import Data, Split
from ensdef.defense import Batch, Terms
from ensdef.loading import attacked_subset, find_data
from ensdef.losses import member_cross_entropy
from ensdef.progress import Progress
from ensdef.registry import METHODS
from ensdef.runner import Run, run_cells
from ensdef.specs import Cell, Setting, TrainSpec
from ensdef.training import train
from ensdef.training_health import catastrophic_overfitting, dead_members, expert_collapse, exploding_terms


def rows(n: int, *accuracies: float) -> Tensor:
    """(K, n) bool with these shares of True."""
    return torch.stack([torch.arange(n) < round(n * accuracy) for accuracy in accuracies])


def names(findings: Iterable[dict[str, Any]]) -> list[str]:
    return [finding["flag"] for finding in findings]


def test_a_finding_has_the_form_of_a_records_flag() -> None:
    (finding,) = dead_members(rows(400, 0.2), 5)
    assert {name: type(value) for name, value in finding.items()} == {
        "flag": str, "severity": str, "value": float, "threshold": float, "meaning": str, "action": str,
    }  # fmt: skip
    assert (finding["flag"], finding["severity"]) == ("dead_member", "info")
    assert json.loads(json.dumps(finding)) == finding


# -- dead members -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accuracy", "dead"), [(0.0, True), (0.2, True), (0.2575, True), (0.2625, False), (1, False)])
def test_a_member_is_dead_up_to_three_standard_errors_above_chance(accuracy: float, dead: bool) -> None:
    """Five classes, 400 images: chance 0.2, standard error 0.02."""
    findings = dead_members(rows(400, 0.9, accuracy), 5)
    assert names(findings) == ["dead_member"] * dead
    for finding in findings:
        assert finding["threshold"] == pytest.approx(0.26)
        assert finding["value"] == pytest.approx(accuracy)


def test_dead_members_are_told_by_number_and_accuracy() -> None:
    (finding,) = dead_members(rows(400, 0.1, 0.9, 0.2), 5)
    assert finding["value"] == pytest.approx(0.2)
    assert finding["meaning"].endswith("no better than chance: 0 (10.0 %), 2 (20.0 %)")


def test_a_single_network_at_chance_is_dead_as_well() -> None:
    assert names(dead_members(rows(400, 0.2), 5)) == ["dead_member"]


@pytest.mark.parametrize(("share", "dead"), [(0.0, True), (0.0175, True), (0.02, False), (0.5, False)])
def test_a_member_at_chance_that_is_selected_is_specialised_and_not_dead(share: float, dead: bool) -> None:
    chosen = rows(400, share)[0].long()  # member 1 on that share, member 0 elsewhere
    assert names(dead_members(rows(400, 0.9, 0.2), 5, chosen)) == ["dead_member"] * dead


def test_a_member_that_is_hardly_ever_selected_but_right_is_not_dead() -> None:
    assert dead_members(rows(400, 0.9, 0.5), 5, torch.zeros(400, dtype=torch.int64)) == []


def test_members_that_training_did_not_move_are_not_judged() -> None:
    assert dead_members(rows(400, 0.9, 0.2), 5, trained=[True, False]) == []
    assert names(dead_members(rows(400, 0.9, 0.2), 5, trained=[False, True])) == ["dead_member"]


# -- expert collapse --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "collapsed"), [(1.0, True), (0.985, True), (0.98, False), (0.5, False)])
def test_experts_have_collapsed_when_one_is_selected_on_more_than_98_percent(share: float, collapsed: bool) -> None:
    findings = expert_collapse(rows(200, share)[0].long(), 3)
    assert names(findings) == ["expert_collapse"] * collapsed
    for finding in findings:
        assert (finding["value"], finding["threshold"]) == pytest.approx((share, 0.98))
        assert "member 1 of 3" in finding["meaning"]


def test_no_choice_no_collapse() -> None:
    assert expert_collapse(None, 3) == []
    assert expert_collapse(torch.zeros(200, dtype=torch.int64), 1) == []


# -- catastrophic overfitting -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inner", "strong", "n", "found"),
    [
        (0.9, 0.1, 100, True),
        (0.75, 0.5, 200, True),
        (0.7, 0.5, 200, False),
        (0.1, 0.9, 100, False),
        (1, 0.6, 10, False),
    ],
    ids=["far apart", "25 points", "20 points", "the other way round", "four of ten images"],
)
def test_only_a_gap_above_20_points_that_is_significant_counts(
    inner: float, strong: float, n: int, found: bool
) -> None:
    findings = catastrophic_overfitting(*rows(n, inner, strong))
    assert names(findings) == ["catastrophic_overfitting"] * found
    for finding in findings:
        assert (finding["value"], finding["threshold"]) == pytest.approx((inner - strong, 0.2))
        assert (
            f"{100 * inner:.0f} % withstand the training's own attack, but {100 * strong:.0f} %" in finding["meaning"]
        )


def test_images_on_which_the_attacks_disagree_both_ways_weaken_the_gap() -> None:
    """18 of 80 images either way: 18 against none, or 30 against 12."""
    image = torch.arange(80)
    one_way = catastrophic_overfitting(image < 18, image < 0)
    both_ways = catastrophic_overfitting(image < 30, image >= 68)
    assert (names(one_way), both_ways) == (["catastrophic_overfitting"], [])


# -- exploding terms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([1.0, 99.0, 2.0], False),
        ([1.0, 101.0, 2.0], True),
        ([-1.0, -101.0], True),
        ([300.0, 9_999.0], False),
        ([300.0, 10_001.0], True),
        ([20_000.0], True),
        ([0.0, 9.9], False),
        ([0.0, 10.1], True),
        ([101.0, 1.0], False),
    ],
)
def test_a_term_explodes_at_a_hundred_times_its_beginning_or_at_ten_thousand(values: list[float], found: bool) -> None:
    history = [{"ce": 1.0, "penalty": value} for value in values]
    assert names(exploding_terms(history)) == ["exploding_term"] * found


def test_an_exploding_term_is_told_by_name_with_its_worst_epoch_alone() -> None:
    (finding,) = exploding_terms([{"a": 1.0, "b": 1.0}, {"a": -200.0, "b": 1.0}, {"a": 150.0, "b": 1.0}])
    assert (finding["value"], finding["threshold"]) == (200.0, 100.0)
    assert finding["meaning"] == "loss term 'a' reached a mean size of 200 in epoch 1 (1 in its first)"


def test_a_term_that_comes_later_is_compared_with_its_own_beginning() -> None:
    assert exploding_terms([{"a": 0.1}, {"a": 0.1, "b": 50.0}, {"a": 0.1, "b": 60.0}]) == []


# -- planted in trainings ---------------------------------------------------------------------------------------


def learnable(count: int = 100) -> Data:
    """Two bright columns tell the class; a network learns it in a few epochs."""

    def split(rows: int, rng: torch.Generator) -> Split:
        labels = torch.arange(rows) % CLASSES
        pixels = torch.randint(60, (rows, *SHAPE), generator=rng)
        for image, label in zip(pixels, labels.tolist(), strict=True):
            image[..., label : label + 2] += 150
        return Split(pixels.to(torch.uint8), labels)

    return Data("digits", split(count, generator(0)), split(10, generator(1)), tuple("abcde"))


class Unlearning(Plain):
    """Its second member learns to give every class the same score."""

    def loss(self, batch: Batch, progress: float) -> Terms:
        logits = self.member_logits(batch.x)
        return {"ce": member_cross_entropy(logits[:1], batch.y).mean(), "flat": logits[1].square().mean()}


@dataclass(frozen=True)
class ChoosingHyper:
    """How many members are chosen among, in turn by the image's brightness."""

    among: int = 1


class Choosing(Plain):
    """Chooses by a rule that does not learn."""

    Hyper = ChoosingHyper

    def selection(self, x: Tensor) -> Tensor:
        values = (x.flatten(1).sum(dim=1) * 255).round().long() % self.hyper.among
        return nn.functional.one_hot(values, len(self.members)).float()

    @classmethod
    def trains_on_attacks(cls, hyper: Any) -> bool:
        return False


class Masked(Plain):
    """Has the wrong gradient exactly on stored images, where a step from the clean image takes it."""

    def predict(self, x: Tensor) -> Tensor:
        scores = super().predict(x)
        pixels = (x.detach() * 255).flatten(1)
        stored = ((pixels - pixels.round()).abs().amax(dim=1) < 1e-3)[:, None]
        return torch.where(stored, 2 * scores.detach() - scores, scores)


class Growing(Plain):
    """A term without gradient that is 40 times as large in every epoch."""

    epoch = 0

    def begin_epoch(self, epoch: int, rng: torch.Generator) -> None:
        self.epoch = epoch

    def loss(self, batch: Batch, progress: float) -> Terms:
        return {**super().loss(batch, progress), "growing": torch.tensor(40.0**self.epoch)}  # type: ignore[dict-item]


class Unpredictable(Plain):
    """Cannot answer."""

    def predict(self, x: Tensor) -> Tensor:
        raise ValueError("no answer")


TOYS = {
    "toy_unlearning": Unlearning, "toy_choosing": Choosing, "toy_masked": Masked, "toy_growing": Growing,
    "toy_unpredictable": Unpredictable,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(toys_defense, "TOYS", {**toys_defense.TOYS, **TOYS})
    with registered():
        yield


def found(method: str, hyper: dict[str, Any] | None = None, **changes: Any) -> list[dict[str, Any]]:
    """What the report of a short training says of its health."""
    data = learnable()
    changes = {"epochs": 8, "batch_size": 20, "attack": {"steps": 0}, **changes}
    return list(train(toy_spec(method, data, hyper, **changes), data, device="cpu").report["health"])


@pytest.mark.parametrize("method", ["nat", "adv_en"])
def test_a_healthy_training_raises_nothing(method: str) -> None:
    assert found(method, attack={"steps": 2, "step_size": "eps/2"}, train_eps="0.05") == []


def test_a_member_that_learned_nothing_is_found() -> None:
    (finding,) = found("toy_unlearning")
    assert finding["flag"] == "dead_member"
    assert "of 2 members, numbered from 0, these" in finding["meaning"]
    assert ": 1 (" in finding["meaning"]


def test_a_member_that_is_frozen_is_not_expected_to_learn() -> None:
    assert found("toy_first_only") == []


def test_a_selector_that_always_chooses_the_same_member_is_found() -> None:
    (finding,) = found("toy_choosing")
    assert (finding["flag"], finding["value"]) == ("expert_collapse", 1.0)
    assert found("toy_choosing", {"among": 2}) == []


FGSM = {"steps": 1, "step_size": "eps", "start": "zero"}


def test_a_defence_that_only_withstands_the_attack_it_was_trained_with_is_found() -> None:
    (finding,) = found("toy_masked", members=1, attack=FGSM, train_eps="0.3")
    assert finding["flag"] == "catastrophic_overfitting"
    assert finding["value"] > 0.5
    assert found("toy_masked", members=1, attack={**FGSM, "steps": 10, "step_size": "eps/4"}, train_eps="0.3") == []


def test_a_training_without_attacks_cannot_overfit_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Masked, "trains_on_attacks", classmethod(lambda cls, hyper: False))
    assert found("toy_masked", members=1, attack=FGSM, train_eps="0.3") == []


def test_a_term_that_explodes_is_found() -> None:
    (finding,) = found("toy_growing", epochs=3)
    assert (finding["flag"], finding["value"], finding["threshold"]) == ("exploding_term", 1600.0, 100.0)


def test_a_look_that_fails_says_so_and_does_not_cost_the_training() -> None:
    (finding,) = found("toy_unpredictable", attack={"steps": 1})
    assert finding["flag"] == "unexamined"
    assert "ValueError: no answer" in finding["meaning"]


def test_what_is_found_is_told_while_training() -> None:
    class Told(Progress):
        lines: list[str] = []  # noqa: RUF012

        def message(self, text: str) -> None:
            self.lines.append(text)

    data = learnable()
    train(toy_spec("toy_choosing", data), data, device="cpu", progress=Told())
    assert any(line.startswith("toy_choosing seed 0: expert_collapse (info, 1.0000): member 0") for line in Told.lines)


# -- looking changes nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("adv_en", {"attack": {"steps": 2, "batch_norm": "train"}}),
        ("adv_en", {"keep": "best"}),
        ("soe", {}),
        ("nat", {"architecture": "cce_mnist", "members": 1}),
        ("toy_first_only", {}),
    ],
)
def test_looking_leaves_weights_buffers_modes_and_randomness_as_they_are(
    method: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = learnable(40)
    looks: list[Any] = []
    examine = training_health.examine

    def trained(look: bool) -> tuple[nn.Module, Tensor]:
        def spy(*given: Any) -> list[Any]:
            if look:
                looks.append(examine(*given))
            return []

        torch.manual_seed(3)
        monkeypatch.setattr(training_health, "examine", spy)
        defense = train(toy_spec(method, data, **changes), data, device="cpu").defense
        return defense, torch.rand(4)

    (one, drawn), (other, drawn_after) = trained(look=False), trained(look=True)
    assert len(looks) == 1
    assert same_weights(one, other)
    assert torch.equal(drawn, drawn_after)
    assert not any(module.training for module in other.modules())
    modes = [[parameter.requires_grad for parameter in defense.parameters()] for defense in (one, other)]
    assert modes[0] == modes[1]


def test_the_same_training_is_judged_the_same() -> None:
    settings: dict[str, Any] = {"attack": FGSM, "train_eps": "0.3", "epochs": 2, "members": 1}
    assert found("toy_masked", **settings) == found("toy_masked", **settings)


def test_only_a_sample_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_health, "CLEAN_SAMPLE", 30)
    monkeypatch.setattr(training_health, "ATTACKED_SAMPLE", 20)
    seen: list[int] = []
    member_logits = Masked.member_logits

    def spy(self: Masked, x: Tensor) -> Tensor:
        seen.append(len(x))
        return member_logits(self, x)

    monkeypatch.setattr(Masked, "member_logits", spy)
    found("toy_masked", members=1, attack=FGSM, epochs=1)
    of_both_attacks = 1 + training_health.STRONG.steps + 2
    assert sum(seen) == 100 + 30 + 20 * of_both_attacks, "training, clean, attacked"


# -- records and the screen -------------------------------------------------------------------------------------


def cell(method: str, attack: str = "fgsm") -> Cell:
    data, spec = find_data("digits", limit=100)
    recipe = {"epochs": 2, "batch_size": 20, "lr": 0.05, "schedule": "constant", "augment": "none"}
    setting = Setting(spec, "small_resnet[width=4]", 2, "linf", "0.2", recipe)
    test, _ = attacked_subset(data, 20)
    spec_of_attack = AttackSpec.create(attack, {}, "linf", "0.2")
    return Cell(TrainSpec.create(method, {}, setting), spec_of_attack, len(test), test.checksum())


def test_records_carry_what_was_found_in_their_training_cached_or_not(tmp_path: Path) -> None:
    first, second = cell("toy_choosing"), cell("toy_choosing", "mim")
    (record,) = run_cells([first], Run(tmp_path, health="off"))
    assert "expert_collapse" in names(record.flags)
    assert record.flags == training_report(checkpoint_folder(tmp_path, first.training))["health"]
    again, other = run_cells([first, second], Run(tmp_path, health="off"))
    assert again.path == record.path
    assert again.flags == record.flags == other.flags


def test_flags_of_the_attack_come_after_those_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ensdef.evaluation

    flag = {"flag": "recount", "severity": "masking", "value": 1.0, "threshold": 0.0, "meaning": "m", "action": "a"}
    monkeypatch.setattr(ensdef.evaluation, "_flags", lambda outcome, n: [flag])
    (record,) = run_cells([cell("toy_choosing")], Run(tmp_path, health="off"))
    assert names(record.flags)[-1] == "recount"
    assert "expert_collapse" in names(record.flags)


def test_a_checkpoint_from_before_findings_were_kept_gives_none(tmp_path: Path) -> None:
    one = cell("toy_choosing")
    run_cells([one], Run(tmp_path, health="off"))
    description = checkpoint_folder(tmp_path, one.training) / "spec.json"
    content = json.loads(description.read_text())
    del content["report"]["health"], content["sha256"]
    description.write_text(json.dumps(content))
    (record,) = run_cells(
        [dataclasses.replace(one, attack=cell("toy_choosing", "mim").attack)], Run(tmp_path, health="off")
    )
    assert (record.error, record.flags) == (None, [])


def test_bench_tells_what_it_found_on_screen_and_below_the_table(tmp_path: Path) -> None:
    words = ["bench", "--method", "toy_choosing", "--attack", "fgsm", "--samples", "20", "--limit", "100"]
    words += ["--epochs", "1", "--device", "cpu", "--results", str(tmp_path)]
    for attempt in ("trained", "cached"):
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 0, result.output
        assert ("toy_choosing seed 0: expert_collapse" in result.stderr) == (attempt == "trained")
        assert "] expert_collapse (info, 1.0000): member 0 of 3, numbered from 0, is selected" in result.stdout
    result = CliRunner().invoke(cli, [*words, "--json"])
    assert "expert_collapse" in names(json.loads(result.stdout)[0]["flags"])
    assert METHODS.names().count("toy_choosing") == 1
