"""Estimates: exact where they can be, proportional where they must be, and silent where nothing is to do."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import ensdef
import ensdef.cli.run
from ensdef.attack_spec import AttackSpec
from ensdef.cells import plan
from ensdef.cli import cli
from ensdef.cost import Passes
from ensdef.defense import EnsembleDefense
from ensdef.harness import attack_model
from ensdef.planner import Plan, estimate, missing_trainings
from ensdef.planner.attack import AttackedModel, cell_work
from ensdef.planner.stopwatch import Stopwatch
from ensdef.planner.survivors import STEPS, Survivors, assumed, measured
from ensdef.planner.text import duration, memory, quantity
from ensdef.planner.training import TrainingRates
from ensdef.planner.whole import WholeRates, extrapolated, shortened
from ensdef.planner.work import Work
from ensdef.protocol import load_protocol, with_attacks, with_methods
from ensdef.registry import ATTACKS
from ensdef.specs import Cell
from ensdef.target import Target
from ensdef.testing import LinearClassifier

SMALL = ("--samples", "20", "--limit", "100", "--epochs", "1", "--members", "2", "--device", "cpu")
NEVER_FOOLED = Survivors(clean=1.0, robust=1.0, hard=1.0)


class Ticking(Stopwatch):
    """A second passes between two looks at the clock: what is timed once takes one second."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 0.0

    def now(self) -> float:
        self.time += 1.0
        return self.time

    def peak(self) -> int:
        return 1 << 20


class Refusing(Stopwatch):
    """Must not be looked at."""

    def now(self) -> float:
        raise AssertionError("something was probed")


def cells_of(method: str, attack: str, **changes: Any) -> list[Cell]:
    """Cells of a small bench."""
    protocol = with_attacks(with_methods(load_protocol("default"), method), attack)
    small: dict[str, Any] = {"samples": 20, "limit": 100, "epochs": 1, "members": 2}
    return plan(dataclasses.replace(protocol, **{**small, **changes}))[0]


def planned(tmp_path: Path, method: str, attack: str, **changes: Any) -> Plan:
    """By a clock of which every look takes a second."""
    return estimate(cells_of(method, attack, **changes), tmp_path, watch=Ticking())


def ens(*words: Any) -> Result:
    result = CliRunner().invoke(cli, [str(word) for word in words], prog_name="ensdef")
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def never_fooled(members: int) -> EnsembleDefense:
    """An ensemble whose every member always answers class 0, by a wide margin."""
    defense = ensdef.create_defense("nat", architecture="small_resnet[width=4]", members=members, image_shape=(1, 8, 8))
    for member in defense.members:
        with torch.no_grad():
            member.classifier.weight.mul_(1e-3)
            member.classifier.bias.zero_()
            member.classifier.bias[0] = 20.0
    return defense


def counted(call: str, members: int = 2, n: int = 20, **spec_changes: Any) -> tuple[Any, Any]:
    """What the planner expects of an attack on a model that is never fooled, and what then happened."""
    defense = never_fooled(members)
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(n, dtype=torch.int64)
    cell = cells_of("nat", call, samples=n, **spec_changes)[0]
    model = AttackedModel(defense, "native", x, y, torch.arange(n), 128, Stopwatch())
    attack = ATTACKS.get(cell.attack.name)(cell.attack.params_object)
    work = cell_work(
        model,
        attack,
        cell,
        NEVER_FOOLED,
        "off",
        lambda index, parts, part, mode, rows: model.rates(part, cell, mode, rows, False),
    )
    return work, attack_model(defense, x, y, cell.attack, health="off")


# passes


@pytest.mark.parametrize(
    "call",
    [
        "pgd[steps=12,restarts=3]",
        "fgsm",
        "pgd[steps=9,loss=targeted_margin,targets=2]",
        "mul_pgd[steps=3]",
        "mim[steps=10,success=last]",
        "square[queries=30]",
        "spsa[steps=9,samples=8]",
        "sgm[steps=9]",
        "adaptive[steps=9]",
        "fog",
    ],
)
def test_the_passes_of_an_image_that_is_never_fooled_are_exact(call: str) -> None:
    work, outcome = counted(call)
    assert (work.forwards, work.backwards) == (outcome.forwards, outcome.backwards)


def test_pgd_costs_a_forward_a_step_and_one_a_run() -> None:
    work, _ = counted("pgd[steps=50,restarts=5]", members=3, n=20)
    assert work.forwards == 20 * 3 * 5 * (50 + 1)
    assert work.backwards == 20 * 3 * 5 * 50


def test_passes_are_exact_in_every_search_mode() -> None:
    work, outcome = counted("pgd[steps=9]", search="bf16+fp32")
    assert (work.forwards, work.backwards) == (outcome.forwards, outcome.backwards)


def test_the_passes_of_autoattack_are_exact_from_two_short_forms() -> None:
    work, outcome = counted("autoattack[steps=16,queries=80]", members=1, n=16)
    assert (work.forwards, work.backwards) == (outcome.forwards, outcome.backwards)


def test_autoattack_as_published_makes_the_passes_that_its_parts_add_up_to() -> None:
    """7,864 forward and 1,910 backward passes for an image that is never fooled."""
    rates = autoattack_rates(never_fooled(1), "autoattack")
    assert (rates.forwards, rates.backwards) == (pytest.approx(7864), pytest.approx(1910))
    assert rates.fooled == 1


def test_an_image_that_autoattack_fools_costs_little_more_than_its_first_part() -> None:
    defense = ensdef.create_defense("nat", architecture="small_resnet[width=4]", members=1, image_shape=(1, 8, 8))
    rates = autoattack_rates(defense, "autoattack[steps=20,queries=1000]")
    first_part = 12 + 22 + 21
    assert rates.fooled * (rates.forwards + rates.backwards) == pytest.approx(first_part, rel=0.25)


def autoattack_rates(defense: EnsembleDefense, call: str) -> WholeRates:
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = AttackedModel(defense, "native", x, torch.zeros(4).long(), torch.arange(4), 128, Stopwatch())
    (cell,) = cells_of("nat", call)
    rates = model.rates(ATTACKS.get("autoattack")(cell.attack.params_object), cell, "fp32", 4, False)
    assert isinstance(rates, WholeRates)
    return rates


def test_images_that_fall_cost_less() -> None:
    defense = never_fooled(2)
    x = torch.rand(20, 1, 8, 8)
    (cell,) = cells_of("nat", "pgd")
    model = AttackedModel(defense, "native", x, torch.zeros(20).long(), torch.arange(20), 128, Ticking())

    def work(clean: float, robust: float) -> float:
        shares = Survivors(clean, robust, robust)
        attack = ATTACKS.get("pgd")()
        rates = lambda index, parts, part, mode, rows: model.rates(part, cell, mode, rows, False)  # noqa: E731
        return cell_work(model, attack, cell, shares, "off", rates).forwards

    assert work(0, 0) == 0
    assert 0 < work(1, 0) < work(1, 0.5) < work(1, 1)
    assert work(1, 0.5) == pytest.approx((work(1, 0) + work(1, 1)) / 2)
    assert work(0.5, 0.5) == work(1, 1) / 2


def test_an_attack_that_ends_by_itself_is_not_charged_all_its_steps() -> None:
    torch.manual_seed(0)
    model = AttackedModel(
        ensdef.create_defense("nat", architecture="small_resnet[width=4]", members=1, image_shape=(1, 8, 8)),
        "native",
        *(torch.rand(32, 1, 8, 8), torch.zeros(32).long(), torch.arange(32), 128, Stopwatch()),
    )
    (cell,) = cells_of("nat", "deepfool")
    rates = model.rates(ATTACKS.get("deepfool")(), cell, "fp32", 32, False)
    assert rates.steps < 20 < 50


# trainings


def test_each_training_is_counted_once_and_prerequisites_come_first(tmp_path: Path) -> None:
    cells = cells_of("nat,dverge,igat[base=dverge],adv", "fgsm,pgd,transfer")
    missing = missing_trainings(cells, tmp_path)
    assert [(spec.method, spec.setting.seed) for spec in missing] == [
        ("nat", 0),
        ("nat", 10_000),
        ("dverge", 0),
        ("igat", 0),
        ("adv", 0),
    ]
    assert len({spec.key for spec in missing}) == len(missing)


def work_of(**changes: Any) -> Callable[..., float]:
    """Seconds of a training of adv_en, from given rates."""

    def seconds(epochs: int, images: int) -> float:
        (cell,) = cells_of("adv_en", "fgsm")
        recipe = dataclasses.replace(cell.training.recipe, epochs=epochs, batch_size=50, **changes)
        spec = dataclasses.replace(cell.training, recipe=recipe)
        rates = TrainingRates(2.0, 0.5, 0.25, 1e-3, 0, Passes(forward=1, input_gradient=7, training=3))
        return rates.work(spec, images).seconds

    return seconds


def test_a_training_takes_epochs_times_batches_times_the_time_of_a_batch() -> None:
    seconds = work_of()
    for epochs in (1, 2, 10):
        assert seconds(epochs + 1, 1000) - seconds(epochs, 1000) == pytest.approx(20 * 0.5 + 0.25)
    assert seconds(2, 2000) - seconds(2, 1000) == pytest.approx(2 * 20 * 0.5, rel=0.05)


def test_keeping_the_best_epoch_adds_an_attack_on_the_images_held_out() -> None:
    plain, best = work_of(), work_of(keep="best")
    (cell,) = cells_of("adv_en", "fgsm")
    held, steps = 100, cell.training.recipe.attack.steps
    per_epoch = held * (steps + 1 / 3) * 1e-3 - 2 * 0.5  # and two batches of fifty fewer
    assert best(5, 1000) - best(4, 1000) - (plain(5, 1000) - plain(4, 1000)) == pytest.approx(per_epoch)


def test_the_passes_of_a_training_are_those_of_its_batches() -> None:
    (cell,) = cells_of("adv_en", "fgsm", epochs=3)
    rates = TrainingRates(0, 0, 0, 0, 0, Passes(forward=1, input_gradient=7, training=3, double_backward=2))
    work = rates.work(cell.training, 100)
    assert work.forwards == 300 * (1 + 7 + 3 + 2)
    assert work.backwards == 300 * (7 + 3 + 2 * 2)


def test_estimates_grow_linearly_with_epochs(tmp_path: Path) -> None:
    plans = [planned(tmp_path, "adv", "fgsm", epochs=epochs) for epochs in (1, 2, 3)]
    one, two, three = (made.trainings[0].work or Work() for made in plans)
    assert three.seconds - two.seconds == pytest.approx(two.seconds - one.seconds)
    assert two.seconds > one.seconds > 0
    assert two.passes == 2 * one.passes


def test_estimates_grow_linearly_with_steps_and_samples(tmp_path: Path) -> None:
    def passes(attack: str, samples: int = 20) -> float:
        work = planned(tmp_path, "nat", attack, samples=samples).cells[0].work
        assert work is not None
        return work.passes

    few, more, most = (passes(f"square[queries={queries}]") for queries in (1000, 2000, 3000))
    assert most - more == pytest.approx(more - few)
    assert few < more
    assert passes("pgd", 40) == pytest.approx(2 * passes("pgd", 20))


def test_what_is_alike_is_probed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ensdef.planner.probing

    probed: list[str] = []
    real = ensdef.planner.probing.probe_training

    def noted(spec: Any, *rest: Any) -> Any:
        probed.append(spec.method)
        return real(spec, *rest)

    monkeypatch.setattr(ensdef.planner.probing, "probe_training", noted)
    made = planned(tmp_path, "nat,adv", "fgsm", seeds=(0, 1, 2))
    assert len(made.trainings) == 6
    assert probed == ["nat", "adv"]


def test_when_probing_lasts_long_networks_alike_stand_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ensdef.planner.probing

    networks: list[int] = []
    real = AttackedModel.rates

    def noted(model: AttackedModel, *rest: Any) -> Any:
        networks.append(len(model.defense.members))
        return real(model, *rest)

    monkeypatch.setattr(AttackedModel, "rates", noted)
    each = planned(tmp_path, "nat,adv_en,adv", "fgsm")
    assert networks == [2, 2, 1]
    assert not any("probing being over" in told for told in each.assumptions)
    networks.clear()
    monkeypatch.setattr(ensdef.planner.probing, "LONG", 0.0)
    likened = planned(tmp_path, "nat,adv_en,adv", "fgsm")
    assert networks == [2, 1]  # adv has one member: no other network is like it
    assert any("attacks on 1 further networks" in told for told in likened.assumptions)
    assert [cell.work for cell in likened.cells] == [cell.work for cell in each.cells]  # by the ticking clock


# survivors


def test_a_trained_defence_is_measured(tmp_path: Path) -> None:
    """Half of the images lie so near to the boundary that the attack reaches it."""
    weight = torch.zeros(2, 64)
    weight[0, :], weight[1, :] = 1.0, -1.0
    model = LinearClassifier(weight, torch.tensor([-32.0, 32.0]))
    x = torch.cat([torch.full((20, 1, 8, 8), 0.52), torch.full((20, 1, 8, 8), 0.9)])
    y = torch.zeros(40, dtype=torch.int64)
    y[-10:] = 1  # wrong before the attack
    spec = AttackSpec.create("pgd", {}, "linf", "0.1")
    assert STEPS
    found = measured(Target(model, fold=False), x, y, spec, False, 128)
    assert found == Survivors(0.75, 0.25, 0.25, measured=True)


def test_what_is_assumed_falls_with_the_radius_and_depends_on_how_it_is_trained() -> None:
    def share(method: str, attack: str = "pgd", eps: str = "0.2", **changes: Any) -> float:
        (cell,) = cells_of(method, attack, eps=(eps,), limit=None, epochs=changes.pop("epochs", 10), **changes)
        return assumed(cell.training, cell.attack, 1297).robust

    assert share("adv", eps="0.1") > share("adv", eps="0.2") > share("adv", eps="0.4")
    assert share("adv", eps="0") == Survivors(0.95, 0.95, 0.95).clean
    assert share("adv", epochs=1) < share("adv", epochs=10)
    assert share("nat") < share("nat", "square") < share("adv")


def test_a_wrapped_attack_is_shortened_in_proportion() -> None:
    attack = ATTACKS.get("autoattack")()
    for times in (1, 2):
        short, part = shortened(attack, times)
        assert (short.params.steps, short.params.queries) == (4 * times, 200 * times)
        assert part == times / 25
    assert attack.params.steps == 100
    fog = ATTACKS.get("fog")()
    assert shortened(fog) == (fog, 1.0)


def test_what_does_not_grow_with_the_length_counts_once() -> None:
    assert extrapolated(10 + 4, 10 + 8, (0.04, 0.08)) == pytest.approx(10 + 100)
    assert extrapolated(5.0, 4.0, (0.5, 1.0)) == 4.0
    assert extrapolated(7.0, 6.0, (1.0, 1.0)) == 6.0


# the command


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("planned") / "results"
    ens("bench", "--method", "nat", "--attack", "pgd[steps=3]", *SMALL, "--results", results)
    return results


def test_where_all_is_done_nothing_is_probed(benched: Path) -> None:
    made = estimate(cells_of("nat", "pgd[steps=3]"), benched, watch=Refusing(), startup=5.0)
    assert [planned.state for planned in made.cells] == ["done"]
    assert made.total.seconds == made.total.passes == 0
    assert made.trainings == () == made.assumptions
    said = ens("bench", "--method", "nat", "--attack", "pgd[steps=3]", *SMALL, "--results", benched, "--dry-run")
    assert said.stdout.splitlines()[-1] == "nothing to do"


def test_done_cells_and_trainings_cost_nothing_beside_others(benched: Path) -> None:
    made = estimate(cells_of("nat", "pgd[steps=3],fgsm"), benched, watch=Ticking())
    done, missing = made.cells
    assert (done.state, missing.state) == ("done", "attack")
    assert done.work is not None
    assert done.work.seconds == done.work.passes == 0
    assert made.trainings == ()
    assert missing.work is not None
    assert made.total == missing.work
    assert "short PGD" in " ".join(made.assumptions)


def test_the_dry_run_prints_costs_totals_and_what_they_rest_on(tmp_path: Path) -> None:
    said = ens("bench", "--method", "nat,adv", "--attack", "fgsm", *SMALL, "--results", tmp_path, "--dry-run").stdout
    listed, _, summary = said.partition("\n\n")
    for line in listed.splitlines():
        assert re.search(r"  [0-9a-f]{16}  [\d.]+ s  [\d.]+k? passes  \d+ MiB$", line), line
    assert "trainings, each once:" in summary
    assert re.search(r"to do: 2 trainings, 2 cells of 2; [\d.]+k? passes, [\d.]+ (s|min), memory \d+ MiB", summary)
    assert "measured just now" in summary
    assert "assumed that 95% of the images are right" in summary
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_but_for_times_two_dry_runs_print_the_same(tmp_path: Path) -> None:
    words = ("bench", "--method", "nat,adv", "--attack", "pgd,fgsm", *SMALL, "--results", tmp_path, "--dry-run")
    without = [re.sub(r"[\d.]+ (s|min|MiB)\b", "", ens(*words).stdout) for _ in range(2)]
    assert without[0] == without[1]


def test_with_json_the_plan_is_an_object_on_stdout_and_the_text_on_stderr(tmp_path: Path) -> None:
    said = ens("bench", "--method", "adv", "--attack", "fgsm", *SMALL, "--results", tmp_path, "--dry-run", "--json")
    told = json.loads(said.stdout)
    (training,), (cell,) = told["trainings"], told["cells"]
    assert (training["method"], training["seed"], cell["state"]) == ("adv", 0, "train and attack")
    assert told["forwards"] == training["forwards"] + cell["forwards"]
    assert told["seconds"] == pytest.approx(told["startup"] + training["seconds"] + cell["seconds"], abs=0.01)
    assert told["assumptions"]
    assert "to do: 1 training, 1 cell of 1" in said.stderr


def test_a_defence_whose_training_fails_is_reported_and_stops_no_other(tmp_path: Path) -> None:
    plugin = tmp_path / "breaks.py"
    plugin.write_text(
        '"""A defence that cannot be trained (A. Author; nowhere, 2020)."""\n\nimport ensdef\n\n\n'
        '@ensdef.register_defense("breaks")\nclass Breaks(ensdef.EnsembleDefense):\n    """Raises."""\n\n'
        '    def loss(self, batch, progress):\n        raise RuntimeError("no loss today")\n'
    )
    words = ("--plugin", plugin, "--method", "breaks,nat", "--attack", "fgsm", *SMALL, "--dry-run")
    said = ens("bench", *words, "--results", tmp_path / "results").stdout
    assert "cost unknown (RuntimeError: no loss today)" in said
    assert "not in these numbers: 1 item whose cost could not be told" in said
    assert re.search(r"to do: 2 trainings, 2 cells of 2; at least", said)
    ensdef.registry.METHODS._registered.pop("breaks")


def test_crafting_is_paid_once_for_all_targets(tmp_path: Path) -> None:
    made = planned(tmp_path, "nat,adv", "transfer[steps=8]")
    first, second = (planned.work or Work() for planned in made.cells)
    assert first.seconds > second.seconds


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.6, "60 s"), (150, "2.5 min"), (36_000, "10.0 h")]
)
def test_durations_are_told_in_a_readable_unit(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_counts_and_sizes_are_told_in_a_readable_unit() -> None:
    assert [quantity(count) for count in (7, 1234, 5_600_000, 3e9)] == ["7", "1.23k", "5.6M", "3G"]
    assert [memory(size) for size in (0, 300 << 20, 12 << 30)] == ["unknown", "300 MiB", "12.0 GiB"]
