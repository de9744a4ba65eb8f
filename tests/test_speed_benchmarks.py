"""`make speed` at toy sizes: its tables have every column, its counts are right, ours is never the weaker attack."""

import argparse
import math
import sys
from pathlib import Path

import pytest
import torch

import ensdef
from ensdef.testing import LinearClassifier

SPEED = Path(__file__).parent.parent / "benchmarks" / "speed"
sys.path.insert(0, str(SPEED))

import comparison  # noqa: E402
import library_attacks  # noqa: E402
import limits  # noqa: E402
import machine  # noqa: E402
import pgd_restarts  # noqa: E402
import scaling  # noqa: E402
import subject as subjects  # noqa: E402
import suite  # noqa: E402
import training  # noqa: E402

sys.path.remove(str(SPEED))

COLUMNS = ["what", "engine", "robust", "passes", "seconds", "times faster", "than", "aim", "agrees", "unconfirmed"]
TINY = "small_resnet[width=4]"


@pytest.fixture(autouse=True)
def every_engine_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "TURNS", 1)


def subject(eps: str = "0.1", count: int = 12) -> subjects.Subject:
    """An untrained ensemble that is right on all images but one, and half of them fall at 0.1."""
    torch.manual_seed(2)
    model = ensdef.create_defense("nat", architecture=TINY, members=2, num_classes=4, image_shape=(3, 8, 8)).eval()
    x = torch.rand(count, 3, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    y[0] = (y[0] + 1) % 4
    return subjects.Subject("toy", model, x, y, torch.arange(count), {"linf": eps, "l2": "0.5"})


def cells(table: str) -> list[dict[str, str]]:
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [dict(zip(header, line, strict=True)) for line in lines]


@pytest.mark.parametrize("name", ["bim", "mim", "cw", "mul_pgd", "deepfool"])
def test_gradient_attacks_are_never_weaker_than_the_libraries_in_fp32(name: str) -> None:
    found = library_attacks.attack(subject(), name, ("fp32",))
    ours = [row for row in found.rows if row.engine == "ensdef, fp32"]
    assert ours
    assert {row.agrees for row in ours} <= {"equal", "lower"}
    assert 0 < found.answers["ensdef, fp32"].accuracy < 11 / 12, "some images should fall and some should not"


def test_pgd_is_set_beside_multiattack_and_the_plain_loop_and_is_not_weaker() -> None:
    found = pgd_restarts.pgd(subject(), steps=20, restarts=2, modes=("fp32",))
    against = {row.against: row for row in found.rows if row.engine == "ensdef, fp32"}
    assert set(against) == {"MultiAttack", "plain loop"}
    assert all(row.agrees in ("equal", "lower") and row.unconfirmed == 0 for row in against.values())
    assert (against["MultiAttack"].aim, against["plain loop"].aim) == (2.3, 4.2)
    # the loop makes every step of every restart, on the wrong image too
    assert found.answers["plain loop"].forwards == 12 * 20 * 2


@pytest.mark.parametrize("name", ["bim", "mul_pgd"])
def test_at_the_floor_every_image_survives_every_engine(name: str) -> None:
    found = library_attacks.attack(subject(), name, ("fp32",), floor=True)
    assert [answer.accuracy for answer in found.answers.values()] == [1.0, 1.0]
    assert all(len(answer.robust) == 11 for answer in found.answers.values()), "the wrong image should be left out"


def test_a_point_outside_the_ball_is_no_success_of_a_library() -> None:
    toy = subject()
    far = comparison.library(toy, lambda model, x, y, eps: [1 - x], "linf")
    broken = comparison.library(toy, lambda model, x, y, eps: [x * torch.nan], "linf")
    assert int(far().robust.sum()) == int(broken().robust.sum()) == 11


def test_passes_of_a_library_are_counted_in_images() -> None:
    def three_looks(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, eps: float) -> list[torch.Tensor]:
        for _ in range(3):
            model(x)
        return [x]

    assert comparison.library(subject(), three_looks, "linf")().forwards == 3 * 11


def test_agreement_is_strict_about_equal_and_lower_and_knows_one_standard_error() -> None:
    def robust(count: int) -> torch.Tensor:
        return torch.arange(100) < count

    assert comparison.agreement(robust(50), robust(50)) == "equal"
    assert comparison.agreement(robust(49), robust(50)) == "lower"
    # sqrt(0.5 * 0.5 / 100) is 5 images
    assert comparison.agreement(robust(55), robust(50)) == "within 1 s.e."
    assert comparison.agreement(robust(56), robust(50)) == "no"


def test_bf16_is_measured_only_where_the_processor_multiplies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "model name : Some CPU\nflags : fpu avx512f {}\nmodel name : another core\n"
    assert machine.processor(told.format("avx512_bf16")) == ("Some CPU", True)
    assert machine.processor(told.format("amx_tile amx_bf16")) == ("Some CPU", True)
    assert machine.processor(told.format("avx512_vnni")) == ("Some CPU", False)
    assert machine.processor("") == ("unnamed CPU", False)

    monkeypatch.setattr(comparison, "multiplies_bf16", lambda: False)
    rows = library_attacks.attack(subject(), "bim", ("fp32", "bf16")).rows
    assert [(row.engine, row.cells()["seconds"] == "n/a") for row in rows] == [
        ("torchattacks", False),
        ("ensdef, fp32", False),
        ("ensdef, bf16", True),
    ]


def test_where_nothing_falls_pgd_makes_exactly_the_passes_that_it_needs() -> None:
    toy = subject().floor()
    found = pgd_restarts.pgd(toy, steps=3, restarts=2, modes=("fp32",), loop=False)
    (row, *_) = limits.passes(toy, found.answers, 3, 2)
    assert row == {"engine": "ensdef, fp32", "passes": "176", "least": "176", "ratio": "1.000"}
    assert 176 == 11 * (2 + 2 * (3 + 3 + 1))


def test_operations_of_a_linear_model_are_those_of_its_matrix_product() -> None:
    model = LinearClassifier(torch.rand(4, 12))
    x, y = torch.rand(5, 3, 2, 2), torch.zeros(5, dtype=torch.int64)
    assert limits.flops_of_a_pass(model, x, y, "fp32") == (2 * 4 * 12, 2 * 4 * 12)


def test_slope_of_a_power_law_is_its_exponent() -> None:
    assert scaling.slope([1, 3, 10], [2, 6, 20]) == pytest.approx(1.0)
    assert scaling.slope([1, 4, 16], [3, 6, 12]) == pytest.approx(0.5)


def test_scaling_attacks_networks_of_every_size_on_images_that_they_have_right() -> None:
    model, x, y = scaling.untrained(TINY, scaling.Load(samples=5, members=4))
    assert len(model.members) == 4
    assert torch.equal(model(x).argmax(dim=1), y)
    assert len(x) == 5


def test_peak_memory_is_measured_in_a_process_of_its_own() -> None:
    assert 0 < scaling.memory_of_a_process(TINY, samples=4) < 2000


def test_peak_memory_is_told_beside_the_images_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "memory_of_a_process", lambda arch, samples: 100 + samples * 12 / 1024)
    rows = scaling.memory_growth(TINY, samples=10240)
    assert [row["samples"] for row in rows] == ["1024", "10240"]
    assert [row["data set MB"] for row in rows] == ["12", "120"]
    assert [row["the rest MB"] for row in rows] == ["100", "100"]


def test_training_steps_name_the_plain_loop_and_every_way_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "multiplies_bf16", lambda: False)
    (times,) = training.measure(["cce"], TINY, batch_size=2, rounds=1, warm_up=0)
    plain, train_mode, folded, bf16 = times.rows()
    assert plain.engine == train_mode.against == folded.against == "plain loop, train mode"
    assert (train_mode.aim, folded.aim) == (1.6, 2.2)
    assert folded.faster == times.plain / folded.seconds
    assert bf16.cells()["seconds"] == times.cells()["bf16 x"] == "n/a"


def test_the_stored_ensemble_is_kept_in_the_cache_and_attacked_at_the_radius_of_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subjects, "CACHE", tmp_path)
    tiny = ("--arch", TINY, "--epochs", "1", "--limit", "64", "--samples", "8")
    monkeypatch.setitem(subjects.RECIPES, "digits", tiny)
    parser = argparse.ArgumentParser()
    subjects.add_arguments(parser)
    found = subjects.chosen(parser.parse_args([]), samples=10_000)
    assert [folder.name[:7] for folder in (tmp_path / "checkpoints").iterdir()] == ["adv_en-"]
    assert (len(found), found.members, found.eps) == (500, 3, {"linf": "0.2", "l2": "1.0"})
    assert len(found.first(7)) == len(found.first(7).ids) == 7


def test_the_report_has_every_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "memory_growth", lambda *_: [{"samples": "1"}])
    monkeypatch.setattr(suite, "time_growth", lambda *_: [{"grows": "samples"}])
    monkeypatch.setattr(suite, "STEPS_CLAIMED", ())
    monkeypatch.setattr(machine, "SIDE", 8)
    # a radius where AutoAttack's first part leaves nothing for its long last one
    toy = subject(eps="0.5", count=6)
    sizes = suite.Sizes(6, 4, 4, 5, 1, ("fp32",), 2, 1, 1, steps=2, restarts=2, architecture=TINY, warm_up=0)
    first, *tables = suite.report(toy, sizes)
    assert "threads" in first
    assert "eps 0.5" in first
    claims = [row for table in tables for row in cells(table) if "what" in row]
    assert all(list(row) == COLUMNS for row in claims)
    assert [row["what"] for row in claims if row["engine"] == "ensdef, fp32"] == [
        *["pgd 2 x 2"] * 2,
        "autoattack",
        *suite.GRADIENT_ATTACKS,
        *(f"{name}, none falls" for name in suite.GRADIENT_ATTACKS),
        "square",
        "spsa",
        *["deepfool"] * 2,
    ]
    assert all(math.isfinite(float(row["times faster"])) for row in claims if row["than"] and row["seconds"] != "n/a")
    *_, arithmetic, passes = map(cells, tables)
    assert arithmetic[0]["precision"] == "fp32"
    assert passes[0]["engine"] == "ensdef, fp32"
