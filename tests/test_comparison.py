"""`ensdef compare`: what two rows' records tell, what they refuse, and what the command prints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from scipy.stats import binomtest, ttest_ind
from toys_records import failed, measured

from ensdef.cli import cli
from ensdef.cli import compare as commands  # noqa: F401 - adds the commands
from ensdef.comparison import compare
from ensdef.errors import UsageError
from ensdef.records import Record, Store
from ensdef.statistics import components, paired_interval

ALWAYS, NEVER = [1] * 40, [0] * 40


def right_on(*images: int, n: int = 40) -> list[int]:
    right = set(images)
    return [int(image in right) for image in range(n)]


def attack_seeded(record: Record, attack_seed: int) -> Record:
    return dataclasses.replace(record, provenance={**record.provenance, "attack_seed": attack_seed})


def test_one_record_a_side_is_mcnemars_exact_test() -> None:
    one = compare([measured("soe", "pgd", right_on(*range(20)))], [measured("adv", "pgd", right_on(*range(15, 28)))])
    assert (one.wins, one.losses) == (15, 8)
    assert one.p == pytest.approx(binomtest(15, 23).pvalue)
    assert one.difference == pytest.approx(7 / 40)
    assert one.better is None


def test_a_row_that_is_right_where_the_other_is_not_is_better() -> None:
    first, second = [measured("soe", "pgd", right_on(*range(20)))], [measured("adv", "pgd", right_on(*range(5)))]
    assert compare(first, second).better == "first"
    assert compare(second, first).better == "second"


def test_the_bootstrap_interval_holds_the_difference_and_is_the_same_for_the_same_seed() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.random(400) < 0.6).astype(int).tolist(), (rng.random(400) < 0.4).astype(int).tolist()
    low, high = paired_interval([a], [b], seed=3)
    assert low < np.mean(a) - np.mean(b) < high
    assert (low, high) == paired_interval([a], [b], seed=3)
    # close to the normal interval at this size
    stderr = np.std(np.subtract(a, b)) / 20
    assert (high - low) / 2 == pytest.approx(1.96 * stderr, rel=0.05)


def test_where_no_image_differs_the_interval_is_what_so_few_images_leave_possible() -> None:
    low, high = paired_interval([ALWAYS], [ALWAYS])
    assert high == pytest.approx(1 - 0.025 ** (1 / 40))
    assert low == -high


def test_an_image_under_several_seeds_is_one_image() -> None:
    once = compare([measured("soe", "pgd", ALWAYS[:6])], [measured("adv", "pgd", NEVER[:6])])
    seeds = range(3)
    thrice = compare(
        [measured("soe", "pgd", ALWAYS[:6], seed) for seed in seeds],
        [measured("adv", "pgd", NEVER[:6], seed) for seed in seeds],
    )
    assert thrice.p == once.p


def test_spreads_of_training_seeds_and_of_attack_seeds_are_kept_apart() -> None:
    n = 100
    same_network = {(0, seed): right_on(*range(50 + seed), n=n) for seed in (0, 2)}
    spread = components(same_network)
    assert spread.training_seeds is None
    assert spread.attack_seeds == pytest.approx(np.std([0.50, 0.52], ddof=1))
    same_attack = {(seed, 0): right_on(*range(50 + 10 * seed), n=n) for seed in (0, 1)}
    spread = components(same_attack)
    assert spread.attack_seeds is None
    assert spread.training_seeds == pytest.approx(np.std([0.5, 0.6], ddof=1))


def test_what_attack_seeds_spread_is_not_counted_again_between_trainings() -> None:
    # two trainings whose means differ by no more than their attack seeds make them
    counts = {(0, 0): 40, (0, 1): 60, (1, 0): 42, (1, 1): 62}
    spread = components({seeds: right_on(*range(count), n=100) for seeds, count in counts.items()})
    assert spread.attack_seeds == pytest.approx(np.std([0.4, 0.6], ddof=1))
    assert spread.training_seeds == 0.0


def test_components_are_recovered_from_a_simulation() -> None:
    rng = np.random.default_rng(1)
    found = []
    for _ in range(40):
        outcomes = {}
        for training in range(6):
            level = 0.5 + 0.04 * rng.standard_normal()
            for attack in range(4):
                right = round(1000 * (level + 0.02 * rng.standard_normal()))
                outcomes[training, attack] = [1] * right + [0] * (1000 - right)
        spread = components(outcomes)
        assert spread.training_seeds is not None
        assert spread.attack_seeds is not None
        found.append((spread.training_seeds**2, spread.attack_seeds**2))
    assert np.sqrt(np.mean(found, axis=0)) == pytest.approx([0.04, 0.02], rel=0.15)


def test_methods_are_compared_with_the_training_as_the_unit() -> None:
    first = [measured("soe", "pgd", right_on(*range(count)), seed) for seed, count in enumerate((20, 24, 21))]
    second = [measured("adv", "pgd", right_on(*range(count)), seed) for seed, count in enumerate((15, 19, 17))]
    one = compare(first, second).trainings
    assert one is not None
    expected = ttest_ind([20 / 40, 24 / 40, 21 / 40], [15 / 40, 19 / 40, 17 / 40])
    assert one.p == pytest.approx(expected.pvalue)
    assert one.low < one.difference < one.high


def test_attack_seeds_of_one_training_are_one_training() -> None:
    first = [attack_seeded(measured("soe", "pgd", right_on(*range(20 + seed))), seed) for seed in range(3)]
    second = [attack_seeded(measured("adv", "pgd", right_on(*range(10 + seed))), seed) for seed in range(3)]
    assert compare(first, second).trainings is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"norm": "l2"}, "norm"),
        ({"eps": "0.1", "eps_value": 0.1}, "eps"),
        ({"success": "last"}, "success"),
        ({"attack_params": {"steps": 3}}, "attack_params"),
        ({"dataset": "cifar10"}, "dataset"),
        ({"provenance": {"subset_checksum": "other"}}, "subset"),
        ({"provenance": {"subset_checksum": "ab", "search": "bf16"}}, "search"),
    ],
)
def test_rows_that_met_something_else_are_refused_by_field(changes: dict[str, object], field: str) -> None:
    with pytest.raises(UsageError, match=f"differ in {field}"):
        compare([measured("soe", "pgd", ALWAYS)], [measured("adv", "pgd", NEVER, **changes)])


def test_another_attack_or_another_number_of_images_is_refused_by_field() -> None:
    first = [measured("soe", "pgd", ALWAYS)]
    with pytest.raises(UsageError, match="differ in attack: 'pgd' and 'mim'"):
        compare(first, [measured("adv", "mim", NEVER)])
    with pytest.raises(UsageError, match="differ in n: 40 and 39"):
        compare(first, [measured("adv", "pgd", NEVER[1:])])


def test_the_same_radius_written_in_another_way_is_the_same() -> None:
    assert compare([measured("soe", "pgd", ALWAYS)], [measured("adv", "pgd", NEVER, eps="1/5")]).better == "first"


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"architecture": "resnet20"}, "architecture"), ({"training": {"eps": "0.1"}}, "training eps")],
)
def test_seeds_of_one_row_must_share_everything_else(changes: dict[str, object], field: str) -> None:
    row = [measured("soe", "pgd", ALWAYS), measured("soe", "pgd", ALWAYS, seed=1, **changes)]
    with pytest.raises(UsageError, match=f"differ in {field}"):
        compare(row, [measured("adv", "pgd", NEVER)])


def test_a_seed_given_twice_and_a_failed_record_are_refused() -> None:
    once = measured("soe", "pgd", ALWAYS)
    with pytest.raises(UsageError, match="twice with training seed 0 and attack seed 0"):
        compare([once, once], [measured("adv", "pgd", NEVER)])
    with pytest.raises(UsageError, match=r"failed \(no more memory\)"):
        compare([once], [failed("adv", "pgd", "no more memory")])


# the command


def asked(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["compare", *arguments])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    store = Store(tmp_path)
    for seed in range(2):
        store.write(measured("soe", "pgd", right_on(*range(30 + seed)), seed))
        store.write(measured("adv", "pgd", right_on(*range(10 + seed)), seed))
    store.write(measured("soe", "mim", ALWAYS))
    return tmp_path


def test_two_methods_are_compared_over_all_seeds_on_what_both_met(results: Path) -> None:
    found = asked("soe", "adv", "--results", str(results))
    assert found.exit_code == 0, found.output
    assert "soe against adv under pgd linf 0.2, 40 images of digits" in found.output
    assert "difference +50.0 points" in found.output
    assert "soe is better, as the networks that were trained" in found.output
    assert "between training seeds, one of the attack seeds" in found.output
    assert "as methods, a training being the unit: +50.0 points" in found.output
    assert "mim" not in found.output


def test_two_record_files_are_compared(results: Path) -> None:
    files = sorted((results / "records/digits").glob("*/pgd-*.json"))
    found = asked(str(files[0]), str(files[-1]), "--json")
    assert found.exit_code == 0, found.output
    (one,) = json.loads(found.output)
    assert one["names"] == ["adv", "soe"]
    assert one["better"] == "second"


def test_rows_that_cannot_be_told_apart_are_a_tie(results: Path) -> None:
    files = sorted((results / "records/digits/soe").glob("pgd-*.json"))
    found = asked(*map(str, files))
    assert "tie: not told apart at 5 %" in found.output
    assert "soe seed" in found.output


def test_an_unknown_row_suggests_and_other_conditions_are_refused_by_field(results: Path) -> None:
    found = asked("so", "adv", "--results", str(results))
    assert found.exit_code == 2
    assert "did you mean 'soe'" in found.output
    found = asked("soe", "adv", "--attack", "square", "--results", str(results))
    assert found.exit_code == 2
    assert "it met: mim, pgd" in found.output
    mim = next((results / "records/digits/soe").glob("mim-*.json"))
    found = asked(str(mim), str(next((results / "records/digits/adv").glob("pgd-*.json"))))
    assert found.exit_code == 2
    assert "differ in attack: 'mim' and 'pgd'" in found.output
