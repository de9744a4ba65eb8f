"""The command line: what a user types, what comes out, and what is refused before any work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.numpy import load_file

import ensdef
import ensdef.cli.inspect
import ensdef.cli.plugins
import ensdef.cli.run
from ensdef.cli import cli
from ensdef.registry import ATTACKS, METHODS

#: A training of a second: a wiring test, not an experiment.
SMALL = ("--samples", "20", "--limit", "100", "--epochs", "1", "--members", "2", "--device", "cpu")
#: Enough to get most digits right, so that an attack has something to do.
LEARNED = ("--samples", "20", "--limit", "300", "--epochs", "6", "--members", "2", "--device", "cpu")

PROMISED = {
    *("method", "hyper", "dataset", "architecture", "members", "train_seed", "attack", "attack_params", "success"),
    *("norm", "eps", "eps_value", "combiner", "n", "clean_accuracy", "robust_accuracy", "stderr", "seconds"),
    *("forwards", "backwards", "flags", "checkpoint", "path", "provenance"),
}

PLUGIN = '''
"""Throw-away defence (A. Author; nowhere, 2020)."""

import os
import ensdef
from ensdef.losses import member_cross_entropy


@ensdef.register_defense("{name}")
class Throwaway(ensdef.EnsembleDefense):
    """Plain cross-entropy."""

    def loss(self, batch, progress):
        return {{"ce": member_cross_entropy(self.member_logits(batch.x), batch.y).mean(dim=1).sum()}}
'''


@pytest.fixture(autouse=True)
def _registries_as_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    for registry in (METHODS, ATTACKS):
        for name in registry.names():
            registry.get(name)
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that tries to download fails at once."""
    import socket

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "create_connection", refuse)


def ens(*words: str | os.PathLike[str]) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli, [os.fspath(word) for word in words], prog_name="ensdef")


def done(*words: str | os.PathLike[str]) -> Result:
    """Run a command that must succeed."""
    result = ens(*words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def environment(*folders: Path) -> dict[str, str]:
    """Of a new interpreter that finds this ensdef, and the packages in ``folders``."""
    root = Path(ensdef.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (root, *folders)))}


def python(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120
    )


def files(folder: Path) -> dict[str, bytes]:
    """Contents by relative path; claims tell who was here last."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".claims" not in path.parts
    }


def write_plugin(folder: Path, name: str, body: str = "") -> Path:
    path = folder / f"{name}.py"
    path.write_text(PLUGIN.format(name=name) + textwrap.indent(textwrap.dedent(body), "    "), encoding="utf-8")
    return path


def plan_of(*words: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The cells that ``--dry-run`` lists."""
    cells = []
    for line in done(*words, "--dry-run").stdout.partition("\n\n")[0].splitlines():
        state, rest = line[:17].strip(), line[17:].split("  ")
        method, _, seed, attack, *middle, samples, key = " ".join(rest[:4]).split()
        cells.append(
            {
                "state": state,
                "method": method,
                "seed": seed,
                "attack": attack,
                "norm": middle[0],
                "eps": middle[1],
                "samples": samples,
                "key": key,
            }
        )
    return cells


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A results folder after one bench, and what that bench said. Copy it before writing to it."""
    results = tmp_path_factory.mktemp("benched") / "results"
    return results, done(
        "bench", "--method", "nat", "--attack", "pgd[steps=3]", "--eps", "51/255", *LEARNED, "--results", results
    )


@pytest.fixture
def copied(benched: tuple[Path, Result], tmp_path: Path) -> Path:
    """A results folder with one finished cell, to do anything with."""
    return Path(shutil.copytree(benched[0], tmp_path / "results"))


SAME = ("--method", "nat", "--attack", "pgd[steps=3]", "--eps", "51/255", *LEARNED)


# --- bench ----------------------------------------------------------------------------------------


def test_bench_prints_a_table_with_a_row_for_the_cell(benched: tuple[Path, Result]) -> None:
    _, result = benched
    header, _, row = [line for line in result.stdout.splitlines() if line.startswith("|")]
    for title in ("method", "data", "arch", "seed", "attack", "eps", "clean %", "robust %", "n"):
        assert f"| {title} " in header
    for value in ("nat", "digits", "2 x small_resnet", "pgd[steps=3]", "linf", "51/255", "20"):
        assert f"| {value} " in row


def test_bench_writes_a_record_a_checkpoint_and_the_table_as_csv_and_markdown(benched: tuple[Path, Result]) -> None:
    results, _ = benched
    written = files(results)
    records = [name for name in written if name.startswith("records/digits/nat/pgd-") and name.endswith(".json")]
    assert len(records) == 1
    assert {"tables/bench.csv", "tables/bench.md"} <= set(written)
    assert sum(name.startswith("checkpoints/nat-") for name in written) == 2
    assert not [name for name in written if Path(name).name.startswith(".")]


def test_the_printed_table_is_the_written_one(benched: tuple[Path, Result]) -> None:
    results, result = benched
    printed = [line for line in result.stdout.splitlines() if line.startswith("|")]
    written = (results / "tables/bench.md").read_text(encoding="utf-8")
    assert printed == [line for line in written.splitlines() if line.startswith("|")]


def test_bench_tells_on_stderr_that_it_trained(benched: tuple[Path, Result]) -> None:
    _, result = benched
    assert "train nat" in result.stderr
    assert "train nat" not in result.stdout


def test_a_repeated_bench_neither_trains_nor_attacks_and_prints_the_same_table(
    benched: tuple[Path, Result], copied: Path
) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in copied.glob("[rc]*/**/*.*")}
    assert before
    again = done("bench", *SAME, "--results", copied)
    assert "train" not in again.stderr
    assert "attack" not in again.stderr
    for path, (content, moment) in before.items():
        assert (path.read_bytes(), path.stat().st_mtime_ns) == (content, moment), path
    table = [line for line in benched[1].stdout.splitlines() if line.startswith("|")]
    assert [line for line in again.stdout.splitlines() if line.startswith("|")] == table


def test_the_same_weights_serve_a_second_attack_without_training(copied: Path) -> None:
    result = done("bench", "--method", "nat", "--attack", "fgsm", *LEARNED, "--results", copied)
    assert "train" not in result.stderr
    assert len(list(copied.glob("checkpoints/*"))) == 1


def test_a_second_bench_adds_its_rows_to_the_table_on_file(copied: Path) -> None:
    done("bench", "--method", "nat", "--attack", "fgsm", *LEARNED, "--results", copied)
    rows = (copied / "tables/bench.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 3


def test_the_batch_size_changes_no_key_and_no_result(copied: Path) -> None:
    before = files(copied / "records")
    cells = plan_of("bench", *SAME, "--batch-size", "16", "--results", copied)
    assert [cell["state"] for cell in cells] == ["done"]
    assert files(copied / "records") == before


def test_json_prints_a_json_array_and_nothing_else_on_stdout(copied: Path) -> None:
    result = done("bench", *SAME, "--results", copied, "--json")
    records = json.loads(result.stdout)
    assert isinstance(records, list)
    assert len(records) == 1
    assert "| nat " in result.stderr


def test_a_json_record_has_every_promised_field_and_no_outcomes(copied: Path) -> None:
    (record,) = json.loads(done("bench", *SAME, "--results", copied, "--json").stdout)
    assert set(record) >= PROMISED
    assert "outcomes" not in record
    assert record["method"] == "nat"
    assert record["hyper"] == {"reduction": "sum"}
    assert record["attack"] == "pgd"
    assert record["attack_params"]["steps"] == 3
    assert record["success"] == "any"
    assert record["members"] == 2
    assert record["train_seed"] == 0
    assert record["n"] == 20
    assert record["norm"] == "linf"
    assert record["eps"] == "51/255"
    assert record["eps_value"] == pytest.approx(0.2)
    assert record["combiner"] == "native"
    assert record["forwards"] > 0
    assert record["backwards"] > 0
    assert record["seconds"] > 0
    assert isinstance(record["flags"], list)


def test_the_numbers_of_a_json_record_are_fractions_counted_from_the_outcomes_on_file(copied: Path) -> None:
    (record,) = json.loads(done("bench", *SAME, "--results", copied, "--json").stdout)
    stored = json.loads(Path(record["path"]).read_text(encoding="utf-8"))["outcomes"]
    assert len(set(stored["ids"])) == 20
    assert record["clean_accuracy"] == sum(stored["clean"]) / 20
    assert record["robust_accuracy"] == sum(stored["robust"]) / 20
    assert 0 <= record["robust_accuracy"] < record["clean_accuracy"] <= 1
    assert all(robust <= clean for robust, clean in zip(stored["robust"], stored["clean"], strict=True))
    p = record["robust_accuracy"]
    assert record["stderr"] == pytest.approx((p * (1 - p) / 20) ** 0.5)


def test_the_checkpoint_of_a_json_record_is_a_module_with_the_clean_accuracy_of_the_record(copied: Path) -> None:
    import torch

    from ensdef.data import subset
    from ensdef.loading import find_data

    (record,) = json.loads(done("bench", *SAME, "--results", copied, "--json").stdout)
    stored = json.loads(Path(record["path"]).read_text(encoding="utf-8"))["outcomes"]
    test = find_data("digits", None, None, 300)[0].test
    ids = subset(len(test), 20, "test")
    assert stored["ids"] == ids.tolist()
    with torch.no_grad():
        right = ensdef.load_checkpoint(record["checkpoint"])(test.x(ids)).argmax(dim=1) == test.labels[ids]
    assert right.int().tolist() == stored["clean"]


def test_the_provenance_of_a_record_tells_versions_device_seeds_and_protocol(copied: Path) -> None:
    (record,) = json.loads(done("bench", *SAME, "--results", copied, "--json").stdout)
    source = record["provenance"]
    assert source["versions"]["ensdef"] == ensdef.__version__
    assert {"python", "torch"} <= set(source["versions"])
    assert source["device"] == "cpu"
    assert {"git_commit", "train_seed", "attack_seed"} <= set(source)
    assert source["protocol"] is None, "a bench is nobody's protocol"


# --- what options mean ----------------------------------------------------------------------------


def test_options_may_be_spelled_with_hyphens_or_underscores(tmp_path: Path) -> None:
    options = ["--method", "adv", "--attack", "fgsm", *SMALL, "--results", tmp_path]
    values = {"data-dir": ".", "attack-seed": "7", "batch-size": "32", "train-eps": "0.1", "image-size": "8"}
    hyphens = [word for name, value in values.items() for word in (f"--{name}", value)]
    underscores = [word for name, value in values.items() for word in (f"--{name.replace('-', '_')}", value)]
    plain, same = plan_of("bench", *options, *hyphens), plan_of("bench", *options, *underscores)
    assert plain == same
    assert plain != plan_of("bench", *options)
    assert done("bench", *options, "--dry_run").stdout


def test_lists_are_split_outside_brackets_only(tmp_path: Path) -> None:
    cells = plan_of(
        "bench",
        *("--method", "adp[entropy_weight=1,logdet_weight=0.25],nat[reduction=mean]"),
        *("--attack", "pgd[steps=2,restarts=2],fgsm", *SMALL, "--results", tmp_path),
    )
    assert [(cell["method"], cell["attack"]) for cell in cells] == [
        ("adp[entropy_weight=1.0,logdet_weight=0.25]", "pgd[steps=2,restarts=2]"),
        ("adp[entropy_weight=1.0,logdet_weight=0.25]", "fgsm"),
        ("nat[reduction=mean]", "pgd[steps=2,restarts=2]"),
        ("nat[reduction=mean]", "fgsm"),
    ]


def test_a_parameter_that_names_a_defence_may_have_brackets_of_its_own(tmp_path: Path) -> None:
    body = """
    from dataclasses import dataclass as _dataclass

    @_dataclass(frozen=True)
    class Hyper:
        base: str = "nat"
    """
    plugin = write_plugin(tmp_path, "nested", body)
    cells = plan_of(
        *("bench", "--plugin", plugin, "--method", "nested[base=adp[entropy_weight=1,logdet_weight=0]],nat"),
        *("--attack", "fgsm", *SMALL, "--results", tmp_path / "results"),
    )
    assert [cell["method"] for cell in cells] == ["nested[base=adp[entropy_weight=1,logdet_weight=0]]", "nat"]


def test_several_methods_attacks_radii_and_seeds_multiply_into_cells(tmp_path: Path) -> None:
    cells = plan_of(
        *("bench", "--method", "nat,adv", "--attack", "pgd,fgsm", "--eps", "0.1,8/255", "--seed", "0,1", *SMALL),
        *("--results", tmp_path),
    )
    combinations = {(cell["method"], cell["attack"], cell["eps"], cell["seed"]) for cell in cells}
    assert combinations == {
        (method, attack, eps, seed)
        for method in ("nat", "adv")
        for attack in ("pgd", "fgsm")
        for eps in ("0.1", "8/255")
        for seed in ("0", "1")
    }
    assert len({cell["key"] for cell in cells}) == len(cells) == 16


def test_a_radius_written_in_two_ways_is_one_cell(tmp_path: Path) -> None:
    cells = plan_of(
        "bench", "--method", "nat", "--attack", "fgsm", "--eps", "0.2,51/255", *SMALL, "--results", tmp_path
    )
    assert len(cells) == 1


def test_the_training_radius_does_not_follow_the_attack_radius(tmp_path: Path) -> None:
    result = done(
        *("bench", "--method", "adv", "--attack", "fgsm", "--eps", "0.05,0.1", *SMALL, "--results", tmp_path, "--json")
    )
    records = json.loads(result.stdout)
    assert [record["eps"] for record in records] == ["0.05", "0.1"]
    assert {record["training"]["eps"] for record in records} == {"0.2"}
    assert len(list(tmp_path.glob("checkpoints/*"))) == 1


def test_train_eps_eps_asks_for_one_training_for_each_attack_radius(tmp_path: Path) -> None:
    result = done(
        *("bench", "--method", "adv", "--attack", "fgsm", "--eps", "0.05,0.1", "--train-eps", "eps", *SMALL),
        *("--results", tmp_path, "--json"),
    )
    assert [record["training"]["eps"] for record in json.loads(result.stdout)] == ["0.05", "0.1"]
    assert len(list(tmp_path.glob("checkpoints/*"))) == 2


def test_a_defence_that_fixes_its_members_keeps_them_and_the_record_tells(tmp_path: Path) -> None:
    options = ("--attack", "fgsm", *SMALL, "--results", tmp_path, "--json")
    records = json.loads(done("bench", "--method", "nat,adv", *options).stdout)
    assert [(record["method"], record["members"]) for record in records] == [("nat", 2), ("adv", 1)]


def test_a_combiner_is_another_cell_on_the_same_weights(copied: Path) -> None:
    (cell,) = plan_of("bench", *SAME, "--combiner", "vote", "--results", copied)
    assert cell["state"] == "attack"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seed", "1"),
        ("--epochs", "7"),
        ("--limit", "299"),
        ("--arch", "small_resnet[width=8]"),
        ("--members", "3"),
        ("--precision", "bf16"),
    ],
)
def test_what_changes_the_training_asks_for_another_training(copied: Path, option: str, value: str) -> None:
    (cell,) = plan_of("bench", *SAME, option, value, "--results", copied)
    assert cell["state"] == "train and attack"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--attack-seed", "1"),
        ("--samples", "21"),
        ("--eps", "0.1"),
        ("--search", "bf16"),
        ("--attack", "pgd[steps=3,success=last]"),
    ],
)
def test_what_changes_the_attack_asks_for_another_attack_on_the_same_weights(
    copied: Path, option: str, value: str
) -> None:
    (cell,) = plan_of("bench", *SAME, option, value, "--results", copied)
    assert cell["state"] == "attack"


def test_a_norm_of_the_attack_is_also_that_of_the_training(tmp_path: Path) -> None:
    options = ("--method", "adv", "--attack", "fgsm", *SMALL, "--results", tmp_path, "--json")
    (record,) = json.loads(done("bench", "--norm", "l2", *options).stdout)
    assert (record["norm"], record["eps"]) == ("l2", "1.0")
    assert (record["training"]["norm"], record["training"]["eps"]) == ("l2", "1.0")


def test_without_samples_all_test_images_up_to_a_thousand_are_attacked(tmp_path: Path) -> None:
    (cell,) = plan_of("bench", "--method", "nat", "--attack", "fgsm", "--results", tmp_path)
    assert cell["samples"] == "n=500"


# --- dry run --------------------------------------------------------------------------------------


def test_a_dry_run_trains_nothing_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensdef.jobs.train", forbidden)
    cells = plan_of("bench", "--method", "nat,adv", "--attack", "fgsm", *SMALL, "--results", tmp_path / "results")
    assert [cell["state"] for cell in cells] == ["train and attack"] * 2
    assert files(tmp_path) == {}


def test_a_dry_run_tells_done_cells_from_cells_to_attack_and_to_train(copied: Path) -> None:
    cells = plan_of(
        *("bench", "--method", "nat,adv", "--attack", "pgd[steps=3],fgsm", "--eps", "51/255", *LEARNED),
        *("--results", copied),
    )
    assert [(cell["method"], cell["attack"], cell["state"]) for cell in cells] == [
        ("nat", "pgd[steps=3]", "done"),
        ("nat", "fgsm", "attack"),
        ("adv", "pgd[steps=3]", "train and attack"),
        ("adv", "fgsm", "train and attack"),
    ]


def forbidden(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("something was trained")


# --- configuration files --------------------------------------------------------------------------


def config(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def test_values_of_a_config_file_are_used(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        """
        method = ["nat", "adp[entropy_weight=1,logdet_weight=0]"]
        attack = "fgsm,bim"
        eps = ["0.1", 0.2]
        samples = 10
        limit = 100
        members = 2
        """,
    )
    cells = plan_of("bench", "--config", path, "--results", tmp_path)
    assert len(cells) == 8
    assert {cell["method"] for cell in cells} == {"nat", "adp[entropy_weight=1.0,logdet_weight=0.0]"}
    assert {cell["attack"] for cell in cells} == {"fgsm", "bim"}
    assert {cell["eps"] for cell in cells} == {"0.1", "0.2"}
    assert {cell["samples"] for cell in cells} == {"n=10"}


def test_the_command_line_wins_over_a_config_file_wherever_it_stands(tmp_path: Path) -> None:
    path = config(tmp_path, 'method = "adp"\nattack = "bim"\nsamples = 10\nlimit = 100\nmembers = 2\nseed = [3]\n')
    first = plan_of("bench", "--config", path, "--method", "nat", "--samples", "12", "--results", tmp_path)
    last = plan_of("bench", "--method", "nat", "--samples", "12", "--results", tmp_path, "--config", path)
    assert first == last
    (cell,) = first
    assert (cell["method"], cell["attack"], cell["samples"], cell["seed"]) == ("nat", "bim", "n=12", "3")


def test_a_config_file_may_spell_options_with_hyphens_or_underscores(tmp_path: Path) -> None:
    options = ("--method", "nat", "--attack", "pgd", *SMALL, "--results", tmp_path)
    plain = plan_of("bench", *options, "--attack-seed", "5")
    assert plan_of("bench", *options, "--config", config(tmp_path, "attack-seed = 5")) == plain
    assert plan_of("bench", *options, "--config", config(tmp_path, "attack_seed = 5")) == plain


def test_the_train_table_of_a_config_file_overrides_what_a_protocol_has_for_one_method(tmp_path: Path) -> None:
    path = config(tmp_path, 'method = "igat"\nattack = "fgsm"\n\n[train]\nlr = 0.0123\n')
    options = (*SMALL, "--members", "2", "--results", tmp_path / "results", "--json")
    (record,) = json.loads(done("bench", "--config", path, *options).stdout)
    assert record["training"]["recipe"]["lr"] == 0.0123, "and not the rate for igat in the default protocol"


def test_the_train_table_of_a_config_file_overrides_the_recipe(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        """
        method = "adv"
        attack = "fgsm"

        [train]
        lr = 0.0123
        schedule = "constant"
        attack = { steps = 1, start = "zero" }
        """,
    )
    options = (*SMALL, "--results", tmp_path / "results", "--json")
    (record,) = json.loads(done("bench", "--config", path, *options).stdout)
    recipe = record["training"]["recipe"]
    assert (recipe["lr"], recipe["schedule"], recipe["epochs"]) == (0.0123, "constant", 1)
    assert (recipe["attack"]["steps"], recipe["attack"]["start"]) == (1, "zero")


def test_what_the_train_table_leaves_out_of_the_inner_attack_stays_as_the_data_set_has_it(tmp_path: Path) -> None:
    options = ("--method", "adv", "--attack", "fgsm", *SMALL, "--results", tmp_path / "results", "--json")
    path = config(tmp_path, "[train]\nattack = { steps = 1 }\n")
    plain = json.loads(done("bench", *options).stdout)[0]["training"]["recipe"]
    changed = json.loads(done("bench", "--config", path, *options).stdout)[0]["training"]["recipe"]
    assert changed == {**plain, "attack": {**plain["attack"], "steps": 1}}


def test_epochs_on_the_command_line_win_over_the_train_table(tmp_path: Path) -> None:
    path = config(tmp_path, "[train]\nepochs = 3\n")
    options = ("--method", "nat", "--attack", "fgsm", *SMALL, "--results", tmp_path / "results", "--json")
    (record,) = json.loads(done("bench", "--config", path, *options).stdout)
    assert record["training"]["recipe"]["epochs"] == 1


# --- cells that fail ------------------------------------------------------------------------------


FRAGILE = """
def begin_epoch(self, epoch, rng):
    broken = epoch == 1 and bool(os.environ.get("ENSDEF_TEST_BREAKS"))
    self.factor = float("nan") if broken else 1.0

def loss(self, batch, progress):
    ce = member_cross_entropy(self.member_logits(batch.x), batch.y).mean(dim=1).sum()
    return {"fine": ce, "odd": 0.0 * self.factor * ce}
"""


def fragile_words(folder: Path) -> list[str]:
    """Two cells that break if told to, two that never do."""
    options = ["--method", "fragile,nat", "--attack", "fgsm,bim", *SMALL, "--epochs", "2"]
    # in this process, where the test counts trainings
    mine = ["--plugin", str(folder / "fragile.py"), "--isolate", "never"]
    return ["bench", *mine, *options, "--results", str(folder / "results")]


@pytest.fixture(scope="module")
def diverged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, list[str]]:
    """A folder with plug-in and results, what the bench said, and which methods it began to train."""
    import ensdef.jobs

    folder = tmp_path_factory.mktemp("diverged")
    write_plugin(folder, "fragile", FRAGILE)
    trained = []
    real = ensdef.jobs.train

    def counting(spec: Any, *args: Any, **kwargs: Any) -> Any:
        trained.append(spec.method)
        return real(spec, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENSDEF_TEST_BREAKS", "1")
        patch.setattr("ensdef.jobs.train", counting)
        patch.setattr(METHODS, "_registered", dict(METHODS._registered))
        return folder, ens(*fragile_words(folder), "--json"), trained


def test_a_cell_that_fails_gives_exit_status_1_and_the_others_are_finished(
    diverged: tuple[Path, Result, list[str]],
) -> None:
    _, result, _ = diverged
    assert result.exit_code == 1
    assert [(record["method"], record["robust_accuracy"] is None) for record in json.loads(result.stdout)] == [
        ("fragile", True),
        ("fragile", True),
        ("nat", False),
        ("nat", False),
    ]


def test_the_record_of_a_diverged_training_names_the_loss_term_and_the_epoch(
    diverged: tuple[Path, Result, list[str]],
) -> None:
    _, result, _ = diverged
    failed = json.loads(result.stdout)[0]
    for told in ("'odd'", "nan", "epoch 1"):
        assert told in failed["error"]
    assert failed["clean_accuracy"] is None
    assert f"failed: fragile under fgsm: {failed['error']}" in result.stderr


def test_a_diverged_training_leaves_the_weights_of_its_last_good_epoch_and_nothing_else(
    diverged: tuple[Path, Result, list[str]],
) -> None:
    folder, result, _ = diverged
    (path,) = folder.glob("results/checkpoints/fragile-*/*.safetensors")
    assert path.name == "last_good.safetensors"
    assert str(path) in json.loads(result.stdout)[0]["error"]
    weights = load_file(path)
    assert weights
    assert all(np.isfinite(value).all() for value in weights.values())


def test_a_training_that_failed_is_not_started_again_for_the_next_attack_of_the_same_run(
    diverged: tuple[Path, Result, list[str]],
) -> None:
    _, _, trained = diverged
    assert trained == ["fragile", "nat"]


def test_a_failed_cell_shows_a_dash_and_a_footnote_in_the_table(diverged: tuple[Path, Result, list[str]]) -> None:
    folder, result, _ = diverged
    table = (folder / "results/tables/bench.md").read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if line.startswith("| fragile"))
    assert "| - [1] " in row
    assert f"\n[1] failed: {json.loads(result.stdout)[0]['error']}" in table


def test_a_failed_cell_is_tried_again_next_time(
    diverged: tuple[Path, Result, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(diverged[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.delenv("ENSDEF_TEST_BREAKS", raising=False)
    assert [cell["state"] for cell in plan_of(*fragile_words(tmp_path))] == ["train and attack"] * 2 + ["done"] * 2
    again = done(*fragile_words(tmp_path), "--json")
    assert [record["error"] for record in json.loads(again.stdout)] == [None] * 4
    assert "train fragile" in again.stderr
    assert "train nat" not in again.stderr
    assert len(list(tmp_path.glob("results/records/digits/fragile/*.json"))) == 2


def test_an_attack_that_breaks_its_contract_fails_its_cell_alone(tmp_path: Path) -> None:
    plugin = tmp_path / "vanishing.py"
    plugin.write_text(
        '''"""Throw-away attack (A. Author; nowhere, 2020)."""
import ensdef


@ensdef.register_attack("vanishing")
class Vanishing(ensdef.IterativeAttack):
    """Returns NaN."""

    steps = 1

    def step(self, target, x_adv, y, state, threat, rng):
        return x_adv * float("nan"), state
''',
        encoding="utf-8",
    )
    result = ens(
        *("bench", "--plugin", plugin, "--method", "nat", "--attack", "vanishing,fgsm", *LEARNED, "--json"),
        *("--results", tmp_path / "results"),
    )
    assert result.exit_code == 1
    broken, fine = json.loads(result.stdout)
    assert "vanishing returned NaN" in broken["error"]
    assert fine["error"] is None


# --- protocols ------------------------------------------------------------------------------------

PROTOCOL = """
version = 3
title = "Two by two"
methods = ["nat", "adv"]
attacks = ["fgsm", { call = "bim[steps=2]", eps = "0.1" }]
limit = 100
samples = 20
members = 2
epochs = 1
"""


@pytest.fixture
def protocol(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(PROTOCOL, encoding="utf-8")
    return path


def test_run_takes_a_protocol_file_and_names_the_table_after_it(protocol: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    out = done("run", protocol, "--results", results, "--device", "cpu", "--json").stdout
    records = json.loads(out)
    assert [(record["method"], record["attack"], record["eps"]) for record in records] == [
        ("nat", "fgsm", "0.2"),
        ("nat", "bim", "0.1"),
        ("adv", "fgsm", "0.2"),
        ("adv", "bim", "0.1"),
    ]
    assert {record["provenance"]["protocol"] for record in records} == {"mine-v3"}
    assert (results / "tables/mine.md").read_text(encoding="utf-8").startswith("# Two by two\n")
    assert len((results / "tables/mine.csv").read_text(encoding="utf-8").splitlines()) == 5


def test_a_repeated_run_has_nothing_to_do(protocol: Path, tmp_path: Path) -> None:
    options = (protocol, "--results", tmp_path / "results", "--device", "cpu")
    assert {cell["state"] for cell in plan_of("run", *options)} == {"train and attack"}
    done("run", *options)
    before = files(tmp_path)
    assert {cell["state"] for cell in plan_of("run", *options)} == {"done"}
    assert "train" not in done("run", *options).stderr
    assert files(tmp_path) == before


def test_run_overrides_samples_and_seeds_of_a_protocol(protocol: Path, tmp_path: Path) -> None:
    cells = plan_of("run", protocol, "--samples", "5", "--seed", "1,2", "--results", tmp_path / "results")
    assert len(cells) == 8
    assert {cell["samples"] for cell in cells} == {"n=5"}
    assert {cell["seed"] for cell in cells} == {"1", "2"}


def recipes_of_a_bench() -> str:
    default = resources.files("ensdef.benchmarks").joinpath("default.toml").read_text(encoding="utf-8")
    return default[default.index("[recipes.digits]") :]


def test_a_cell_of_a_bench_is_done_for_a_protocol_too(protocol: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    done("bench", "--method", "nat", "--attack", "fgsm", *SMALL, "--results", results)
    protocol.write_text(PROTOCOL + recipes_of_a_bench(), encoding="utf-8")
    cells = plan_of("run", protocol, "--results", results)
    assert [cell["state"] for cell in cells] == ["done", "attack", "train and attack", "train and attack"]


LEADERBOARD = PROTOCOL.replace("version = 3", 'version = 3\nkind = "leaderboard"').replace(', eps = "0.1"', "")


def test_a_leaderboard_takes_what_a_bench_made_is_printed_with_ranks_and_rebuilt_from_its_records(
    protocol: Path, tmp_path: Path
) -> None:
    protocol.write_text(LEADERBOARD + recipes_of_a_bench(), encoding="utf-8")
    results = tmp_path / "results"
    done("bench", "--method", "nat", "--attack", "fgsm", *SMALL, "--results", results)
    out = done("run", protocol, "--results", results, "--device", "cpu").stdout
    assert out.startswith("# Two by two\n\n| rank ")
    assert "parameters (k)" in out
    tables = files(results / "tables")
    assert {"mine.csv", "mine.md", "mine.tex"} <= set(tables)
    done("table", "mine", "--results", results)
    assert files(results / "tables") == tables


def test_a_leaderboard_changed_on_the_command_line_is_none_where_it_met_records_of_a_protocol(
    protocol: Path, tmp_path: Path
) -> None:
    protocol.write_text(LEADERBOARD, encoding="utf-8")
    options = (protocol, "--results", tmp_path / "results", "--device", "cpu")
    assert "| rank " in done("run", *options, "--samples", "10").stdout, "all records are of no protocol"
    done("run", *options)
    changed = done("run", *options, "--seed", "0,1")
    assert "| rank " not in changed.stdout
    assert "a grid in place of the leaderboard: mine was changed on the command line" in changed.stderr


# --- table ----------------------------------------------------------------------------------------


def test_table_rebuilds_a_table_from_records_alone_to_the_byte(copied: Path) -> None:
    tables = files(copied / "tables")
    shutil.rmtree(copied / "tables")
    shutil.rmtree(copied / "checkpoints")
    result = done("table", "bench", "--results", copied)
    assert files(copied / "tables") == tables
    assert tables["bench.md"].decode() in result.stdout


def test_table_all_rebuilds_every_table_to_the_byte(protocol: Path, copied: Path) -> None:
    done("run", protocol, "--results", copied, "--device", "cpu")
    tables = files(copied / "tables")
    assert set(tables) == {f"{name}.{kind}" for name in ("bench", "mine") for kind in ("csv", "md", "tex")}
    shutil.rmtree(copied / "tables")
    done("table", "--all", "--results", copied)
    assert files(copied / "tables") == tables


def test_a_results_folder_may_be_moved_and_still_gives_the_same_tables(
    benched: tuple[Path, Result], copied: Path
) -> None:
    moved = copied.rename(copied.parent / "elsewhere")
    done("table", "--all", "--results", moved)
    assert files(moved / "tables") == files(benched[0] / "tables")


def test_table_of_an_unknown_name_is_refused_with_the_nearest(copied: Path) -> None:
    result = ens("table", "bensh", "--results", copied)
    assert result.exit_code == 2
    assert "'bensh'" in result.stderr
    assert "'bench'" in result.stderr


@pytest.mark.parametrize("words", [[], ["bench", "--all"]])
def test_table_wants_either_a_name_or_all(copied: Path, words: list[str]) -> None:
    result = ens("table", *words, "--results", copied)
    assert result.exit_code == 2
    assert "--all" in result.stderr


def test_table_refuses_a_table_whose_record_is_missing(copied: Path) -> None:
    (record,) = copied.glob("records/*/*/*.json")
    record.unlink()
    result = ens("table", "bench", "--results", copied)
    assert result.exit_code == 2
    assert record.name in result.stderr


@pytest.fixture
def published(copied: Path, tmp_path: Path) -> Path:
    """A results folder with published records and the tables they give."""
    results = tmp_path / "shown"
    shutil.copytree(copied / "records", results / "published/records")
    shutil.copytree(copied / "manifests", results / "published/manifests")
    shutil.copytree(copied / "tables", results / "published/tables")
    return results


@pytest.mark.parametrize("which", ["--all", "bench"])
def test_table_check_passes_where_tables_agree_with_the_published_records(published: Path, which: str) -> None:
    before = files(published)
    done("table", which, "--check", "--results", published)
    assert files(published) == before


@pytest.mark.parametrize("which", ["--all", "bench"])
@pytest.mark.parametrize("file", ["bench.csv", "bench.md"])
def test_table_check_fails_and_names_the_table_that_differs(published: Path, which: str, file: str) -> None:
    path = published / "published/tables" / file
    path.write_text(path.read_text(encoding="utf-8").replace("pgd[steps=3]", "pgd[steps=300]"), encoding="utf-8")
    result = ens("table", which, "--check", "--results", published)
    assert result.exit_code == 1
    assert file in result.stderr
    assert {"bench.csv", "bench.md"} - {file} != {word.strip(",") for word in result.stderr.split()} & {
        "bench.csv",
        "bench.md",
    }


def test_table_check_fails_where_a_table_is_missing(published: Path) -> None:
    (published / "published/tables/bench.csv").unlink()
    result = ens("table", "--all", "--check", "--results", published)
    assert result.exit_code == 1
    assert "bench.csv" in result.stderr


def test_table_check_without_published_records_is_refused(tmp_path: Path) -> None:
    result = ens("table", "--all", "--check", "--results", tmp_path)
    assert result.exit_code == 2
    assert "published" in result.stderr


# --- list, help, version --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "names", "told"),
    [
        ("methods", ["nat", "adv", "adv_en", "adp", "soe"], "arXiv:1901.08846"),
        ("attacks", ["fgsm", "pgd", "bim", "mim"], "arXiv:1706.06083"),
        ("datasets", ["digits", "cifar10", "cifar100", "mnist", "fashion_mnist", "imagefolder"], "Krizhevsky"),
        ("architectures", ["small_resnet", "resnet20"], "He, Zhang, Ren, Sun"),
        ("protocols", ["default"], "PGD"),
    ],
)
def test_list_gives_names_a_line_on_each_and_where_they_come_from(kind: str, names: list[str], told: str) -> None:
    lines = done("list", kind).stdout.splitlines()
    listed = {line.split()[0]: line for line in lines if not line.startswith(" ")}
    assert set(names) <= set(listed)
    assert all(len(listed[name].split()) > 1 for name in names)
    assert told in "\n".join(lines)


def test_list_includes_a_plugin(tmp_path: Path) -> None:
    out = done("list", "methods", "--plugin", write_plugin(tmp_path, "mine_alone")).stdout
    assert "mine_alone" in out
    assert "Plain cross-entropy." in out
    assert "A. Author; nowhere, 2020" in out


def test_list_attacks_tells_what_each_sees_its_norms_and_its_source() -> None:
    lines = done("list", "attacks").stdout.splitlines()
    told = {line.split()[0]: (line, lines[index + 1]) for index, line in enumerate(lines) if line[0] != " "}
    assert set(ATTACKS.names()) <= set(told)
    for name in ATTACKS.names():
        attack = ATTACKS.get(name)
        assert f"[{attack.access}; {', '.join(attack.norms) or 'no budget'}]" in told[name][0]
        assert told[name][1].strip().startswith("[")
        assert len(told[name][1].strip()) > 40, "the paper"


def test_list_refuses_another_kind_and_tells_those_there_are() -> None:
    result = ens("list", "nothing")
    assert result.exit_code == 2
    assert "methods" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["bench", "--help"],
        ["list", "methods"],
        ["list", "protocols"],
        ["table", "--all"],
        ["table", "--all", "--check", "--results", "shown"],
        ["bench", "--method", "nat[reduction"],
    ],
    ids=" ".join,
)
def test_commands_that_only_read_files_never_load_torch(published: Path, words: list[str]) -> None:
    os.symlink(published / "published", published.parent / "results_of_others")
    words = [*words, "--results", "results_of_others"] if words == ["table", "--all"] else words
    script = f"""
import sys
from ensdef.cli import cli
import ensdef.cli.run, ensdef.cli.inspect, ensdef.cli.plugins
try:
    cli({words!r}, standalone_mode=False)
except Exception as error:
    print(type(error).__name__, file=sys.stderr)
assert "torch" not in sys.modules, "torch was imported"
"""
    finished = python("-c", script, cwd=published.parent)
    assert finished.returncode == 0, finished.stderr
    expected = "Refusal" if words[0] == "bench" and "--help" not in words else ""
    assert finished.stderr.strip() == expected


def test_help_lists_every_command() -> None:
    out = done("--help").stdout
    for command in ("bench", "run", "table", "list", "check", "new"):
        assert f"\n  {command} " in out


def test_bench_help_lists_every_promised_option() -> None:
    out = done("bench", "--help").stdout
    for option in (
        *("method", "attack", "dataset", "data-dir", "image-size", "arch", "members", "eps", "norm", "combiner"),
        *("samples", "limit", "epochs", "train-eps", "seed", "attack-seed", "plugin", "device", "precision", "search"),
        *("results", "json", "dry-run", "config"),
    ):
        assert f"--{option}" in out, option


def test_version_is_that_of_the_package() -> None:
    assert done("--version").stdout.split()[-1] == ensdef.__version__


# --- the real executable --------------------------------------------------------------------------


def test_the_installed_command_benches_a_plugin_and_prints_json_for_a_pipe(tmp_path: Path) -> None:
    plugin = write_plugin(tmp_path, "piped")
    words = ("--plugin", plugin.name, "--method", "piped", "--attack", "fgsm", *SMALL, "--json")
    finished = python("-m", "ensdef", "bench", *words, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    (record,) = json.loads(finished.stdout)
    assert record["method"] == "piped"
    assert (tmp_path / record["path"]).is_relative_to(tmp_path / "results")
    assert (tmp_path / record["path"]).is_file()
    assert "Warning" not in finished.stderr


def test_the_installed_command_refuses_bad_input_in_one_line_without_a_traceback(tmp_path: Path) -> None:
    finished = python("-m", "ensdef", "bench", "--eps", "8", cwd=tmp_path)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert "Traceback" not in finished.stderr
    (line,) = finished.stderr.strip().splitlines()
    assert "8/255" in line


# --- bad input ------------------------------------------------------------------------------------


@pytest.fixture
def nothing_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensdef.jobs.train", forbidden)


def refused(result: Result, results: Path, *told: str) -> str:
    """Exit status 2, one message with everything in ``told``, nothing on stdout, nothing written."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Error: " in result.stderr
    assert "Traceback" not in result.stderr
    missing = [part for part in told if part not in result.stderr]
    assert not missing, f"{missing} not in: {result.stderr}"
    if results.is_dir():
        assert list(results.iterdir()) == []
    return result.stderr


def bench_refused(tmp_path: Path, words: tuple[str, ...], *told: str) -> str:
    results = tmp_path / "results"
    start = ("--method", "nat", "--attack", "fgsm", *SMALL, "--results", results)
    return refused(ens("bench", *start, *words), results, *told)


@pytest.mark.usefixtures("nothing_trained")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--method", "natt"), ("'natt'", "did you mean 'nat'", "adp")),
        (("--method", "nat,adpp[entropy_weight=1]"), ("'adpp'", "did you mean 'adp'")),
        (("--attack", "pgdd"), ("'pgdd'", "did you mean 'pgd'", "fgsm")),
        (("--dataset", "digit"), ("'digit'", "did you mean 'digits'", "cifar10")),
        (("--arch", "small_resnett"), ("'small_resnett'", "did you mean 'small_resnet'")),
        (("--norm", "l3"), ("l3", "linf", "l2")),
        (("--combiner", "mean"), ("mean", "native", "avg", "max", "vote")),
        (("--precision", "fp16"), ("fp16", "fp32", "bf16")),
        (("--search", "fp16"), ("fp16", "fp32", "bf16+fp32")),
        (("--device", "tpu"), ("tpu", "cpu", "cuda")),
        (("--bogus", "1"), ("--bogus",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_an_unknown_name_is_refused_with_those_there_are(
    tmp_path: Path, words: tuple[str, ...], told: tuple[str, ...]
) -> None:
    bench_refused(tmp_path, words, *told)


@pytest.mark.usefixtures("nothing_trained")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--eps", "8"), ("eps is 8", "[0, 1]", "8/255")),
        (("--eps", "0.1,300"), ("eps is 300", "[0, 1]")),
        (("--eps", "8/0"), ("eps is '8/0'", "zero")),
        (("--eps", "-0.1"), ("eps is -0.1", "at least 0")),
        (("--eps", "nan"), ("eps is 'nan'", "number")),
        (("--eps", "inf"), ("eps is 'inf'", "number")),
        (("--eps", "small"), ("eps is 'small'", "number")),
        (("--eps", "0.1,,0.2"), ("'0.1,,0.2'", "empty")),
        (("--norm", "l2", "--eps", "9"), ("eps is 9", "64", "8.00")),
        (("--samples", "0"), ("0", "test images", "at least 1")),
        (("--samples", "-1"), ("-1", "test images", "at least 1")),
        (("--samples", "501"), ("501", "there are 500")),
        (("--samples", "nan"), ("--samples", "nan", "integer")),
        (("--samples", "2.5"), ("--samples", "2.5", "integer")),
        (("--members", "0"), ("members is 0", "at least 1")),
        (("--members", "-2"), ("members is -2", "at least 1")),
        (("--members", "nan"), ("--members", "nan", "integer")),
        (("--epochs", "0"), ("epochs is 0", "at least 1")),
        (("--epochs", "-1"), ("epochs is -1", "at least 1")),
        (("--limit", "-1"), ("-1", "training images", "at least 1")),
        (("--limit", "0"), ("0", "training images", "at least 1")),
        (("--limit", "1298"), ("1298", "there are 1297")),
        (("--seed", "-1"), ("seed is -1", "from 0")),
        (("--seed", "0,abc"), ("seed is 'abc'", "number")),
        (("--seed", "0.5"), ("seed is 0.5", "whole")),
        (("--seed", "nan"), ("seed is 'nan'", "number")),
        (("--attack-seed", "-1"), ("attack", "seed", "-1", "0")),
        (("--attack-seed", "abc"), ("--attack-seed", "abc", "integer")),
        (("--image-size", "0"), ("image", "size is 0", "at least 1")),
        (("--image-size", "-8"), ("image", "size is -8", "at least 1")),
        (("--image-size", "9"), ("8x8", "9")),
        (("--batch-size", "0"), ("--batch-size", "0")),
        (("--batch-size", "-1"), ("--batch-size", "-1")),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_number_that_cannot_be_is_refused_with_what_was_expected(
    tmp_path: Path, words: tuple[str, ...], told: tuple[str, ...]
) -> None:
    bench_refused(tmp_path, words, *told)


@pytest.mark.usefixtures("nothing_trained")
@pytest.mark.parametrize("value", ["9", "-0.1", "nan", "8/0", "abc", "uniform(0.2,0.1)", "uniform(0.1)"])
def test_a_bad_training_radius_is_refused_by_the_name_of_its_option(tmp_path: Path, value: str) -> None:
    message = bench_refused(tmp_path, ("--method", "adv", "--train-eps", value))
    assert "train-eps" in message or "train_eps" in message
    assert value.split("(")[0] in message


@pytest.mark.usefixtures("nothing_trained")
@pytest.mark.parametrize("method", ["nat", "adv"])
def test_a_bad_training_radius_is_refused_even_where_a_method_needs_none(tmp_path: Path, method: str) -> None:
    bench_refused(tmp_path, ("--method", method, "--train-eps", "9"), "9", "[0, 1]")


@pytest.mark.usefixtures("nothing_trained")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--attack", "pgd[steps=-1]"), ("steps is -1", "at least 0")),
        (("--attack", "pgd[steps=1.5]"), ("pgd[steps] is '1.5'", "whole")),
        (("--attack", "pgd[steps=many]"), ("pgd[steps] is 'many'", "number")),
        (("--attack", "pgd[restarts=0]"), ("restarts is 0", "at least 1")),
        (("--attack", "pgd[step_size=eps/0]"), ("eps/0", "zero")),
        (("--attack", "pgd[step_size=-0.1]"), ("step_size", "-0.1")),
        (("--attack", "pgd[step_size=nan]"), ("step_size is 'nan'", "number")),
        (("--attack", "pgd[random_start=maybe]"), ("pgd[random_start] is 'maybe'", "true or false")),
        (("--attack", "pgd[loss=mse]"), ("pgd[loss] is 'mse'", "margin")),
        (("--attack", "pgd[success=never]"), ("pgd[success] is 'never'", "any", "last")),
        (("--attack", "pgd[view=nose]"), ("'nose'", "predict")),
        (("--method", "soe[sigma=0]"), ("sigma is 0", "above 0")),
        (("--method", "soe[sigma=nan]"), ("soe[sigma] is 'nan'", "number")),
        (("--method", "adp", "--members", "10"), ("adp", "10", "at most 9")),
        (("--arch", "small_resnet[width=0]"), ("width is 0", "at least 1")),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_parameter_value_that_cannot_be_is_refused(
    tmp_path: Path, words: tuple[str, ...], told: tuple[str, ...]
) -> None:
    bench_refused(tmp_path, words, *told)


@pytest.mark.usefixtures("nothing_trained")
@pytest.mark.parametrize(
    ("words", "owner", "have"),
    [
        (("--attack", "pgd[stepz=3]"), "pgd", ("steps", "step_size", "restarts")),
        (("--method", "adp[alpha=3]"), "adp", ("entropy_weight", "logdet_weight")),
        (("--arch", "small_resnet[depth=3]"), "small_resnet", ("width",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_a_parameter_that_the_plugin_does_not_have_is_refused_with_those_it_has(
    tmp_path: Path, words: tuple[str, ...], owner: str, have: tuple[str, ...]
) -> None:
    bench_refused(tmp_path, words, f"{owner} has no parameter", *have)


@pytest.mark.usefixtures("nothing_trained")
@pytest.mark.parametrize("option", ["--method", "--attack"])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}[", "never closed"),
        ("{}]", "never opened"),
        ("{}[a=1]]", "never opened"),
        ("{}[a=1]b", "never closed"),
        ("{}[a]", "parameter=value"),
        ("{}[=1]", "parameter=value"),
        ("{}[a=]", "parameter=value"),
        ("{}[a=1,a=2]", "twice"),
        ("{},,{}", "empty item"),
        ("{},", "empty item"),
        (" ", "empty item"),
    ],
)
def test_malformed_lists_and_brackets_are_refused(tmp_path: Path, option: str, text: str, told: str) -> None:
    name = {"--method": "nat", "--attack": "pgd"}[option]
    bench_refused(tmp_path, (option, text.format(name, name)), told)


@pytest.mark.usefixtures("nothing_trained")
@pytest.mark.parametrize("option", ["--method", "--attack", "--eps", "--seed", "--arch", "--train-eps", "--dataset"])
def test_an_option_with_an_empty_text_is_refused_rather_than_passed_over(tmp_path: Path, option: str) -> None:
    bench_refused(tmp_path, (option, ""))


# --- bad files ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_trained")
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("colour = 1", ("'colour'", "samples", "method")),
        ("samples = ", ("config.toml",)),
        ("samples = 'many'", ("samples", "many")),
        ("samples = 0", ("test images", "at least 1")),
        ("train = 3", ("train", "table")),
        ("[train]\nlearning_rate = 0.1", ("learning_rate", "lr", "weight_decay")),
        ("[train]\nlr = 'fast'", ("lr is 'fast'", "number")),
        ("[train]\nlr = -1", ("lr is -1", "at least 0")),
        ("[train]\nbatch_size = 0", ("batch_size is 0", "at least 1")),
        ("[train]\noptimizer = 'lion'", ("optimizer", "'lion'", "sgd")),
        ("[train]\nattack = 3", ("attack", "3", "table")),
        ("[train]\nattack = { stepz = 3 }", ("'stepz'", "steps", "step_size")),
        ("[train]\nattack = { steps = -1 }", ("steps is -1", "at least 0")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_config_file_is_refused(tmp_path: Path, text: str, told: tuple[str, ...]) -> None:
    results = tmp_path / "results"
    words = [*SMALL] if "samples" not in text else [*SMALL][2:]
    result = ens(
        *("bench", "--config", config(tmp_path, text), "--method", "nat", "--attack", "fgsm", "--results", results),
        *words,
    )
    refused(result, results, *told)


@pytest.mark.usefixtures("nothing_trained")
def test_a_missing_config_file_is_refused_by_name(tmp_path: Path) -> None:
    bench_refused(tmp_path, ("--config", str(tmp_path / "nowhere.toml")), "nowhere.toml")


@pytest.mark.usefixtures("nothing_trained")
def test_an_unknown_protocol_is_refused_with_the_nearest(tmp_path: Path) -> None:
    results = tmp_path / "results"
    refused(ens("run", "defaults", "--results", results), results, "'defaults'", "did you mean 'default'")
    refused(ens("run", "nowhere.toml", "--results", results), results, "nowhere.toml")


@pytest.mark.usefixtures("nothing_trained")
@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("colour = 1", ("'colour'", "methods", "attacks")),
        ("samples = ", ("mine",)),
        ('attacks = ["pgdd"]', ("'pgdd'", "'pgd'")),
        ('attacks = [{ eps = "0.1" }]', ("call",)),
        ('attacks = [{ call = "pgd", epz = "0.1" }]', ("call", "eps", "norm", "epz")),
        ("attacks = [3]", ("3",)),
        ('attacks = "pgd"', ("attacks",)),
        ("attacks = []", ("attacks",)),
        ('methods = "nat"', ("methods",)),
        ("methods = []", ("methods",)),
        ('members = "two"', ("members", "two")),
        ("members = 0", ("members is 0", "at least 1")),
        ("samples = 2.5", ("samples", "2.5")),
        ('norm = "l3"', ("l3", "linf", "l2")),
        ('precision = "fp16"', ("fp16", "fp32")),
        ('combiner = "mean"', ("mean", "native")),
        ("seeds = 3", ("seeds", "3")),
        ('seeds = ["a"]', ("seed", "'a'")),
        ("seeds = [-1]", ("seed", "-1")),
        ("seeds = [0.5]", ("seed", "0.5")),
        ("eps = 8", ("eps is 8", "8/255")),
        ("epochs = 0", ("epochs is 0", "at least 1")),
        ("recipe = 3", ("recipe", "3")),
        ("recipes = { digits = 3 }", ("recipe", "3")),
        ("recipe = { lrr = 3 }", ("lrr", "lr")),
        ('dataset = "digitz"', ("'digitz'", "'digits'")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_protocol_with_a_bad_key_or_value_is_refused(tmp_path: Path, line: str, told: tuple[str, ...]) -> None:
    key = line.split(" = ")[0]
    usual = {"methods": '["nat"]', "attacks": '["fgsm"]', "samples": "20", "limit": "100"}
    lines = [line, *(f"{name} = {value}" for name, value in usual.items() if name != key)]
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    results = tmp_path / "results"
    refused(ens("run", path, "--results", results), results, *told)


@pytest.mark.usefixtures("nothing_trained")
def test_a_protocol_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    refused(ens("run", path, "--results", tmp_path / "results"), tmp_path / "results", "mine")


@pytest.mark.usefixtures("nothing_trained")
def test_a_results_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way", encoding="utf-8")
    for folder in (file, file / "below"):
        result = ens("bench", "--method", "nat", "--attack", "fgsm", *SMALL, "--results", folder)
        refused(result, folder, str(folder), "cannot be written", "--results")
    assert file.read_text(encoding="utf-8") == "in the way"


@pytest.mark.usefixtures("nothing_trained")
def test_a_results_folder_that_is_there_keeps_what_was_in_it_after_a_refusal(copied: Path) -> None:
    before = files(copied)
    assert ens("bench", *SAME, "--eps", "8", "--results", copied).exit_code == 2
    assert files(copied) == before


# --- bad data folders -----------------------------------------------------------------------------


def image_folder(root: Path, train: tuple[str, ...] = ("cat", "dog"), test: tuple[str, ...] = ("cat", "dog")) -> Path:
    rng = np.random.default_rng(0)
    for split, classes in (("train", train), ("test", test)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(3):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def folder_refused(tmp_path: Path, folder: Path | None, *told: str) -> str:
    results = tmp_path / "results"
    where = [] if folder is None else ["--data-dir", folder]
    words = ["--dataset", "imagefolder", *where, "--arch", "small_resnet", "--members", "2", "--results", results]
    return refused(ens("bench", "--method", "nat", "--attack", "fgsm", *words), results, *told)


@pytest.mark.usefixtures("nothing_trained")
def test_a_data_set_that_needs_a_folder_asks_for_it(tmp_path: Path) -> None:
    folder_refused(tmp_path, None, "--data-dir", "train/<class>")


@pytest.mark.usefixtures("nothing_trained")
def test_a_data_folder_that_is_missing_is_refused_by_name(tmp_path: Path) -> None:
    folder_refused(tmp_path, tmp_path / "nowhere", str(tmp_path / "nowhere"), "does not exist", "--data-dir")


@pytest.mark.usefixtures("nothing_trained")
def test_a_data_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder_refused(tmp_path, tmp_path / "file", str(tmp_path / "file"), "is a file")


@pytest.mark.usefixtures("nothing_trained")
def test_an_empty_data_folder_is_refused_with_the_layout_expected(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder_refused(tmp_path, tmp_path / "empty", str(tmp_path / "empty"), "train/<class>/<image>", "nothing")


@pytest.mark.usefixtures("nothing_trained")
def test_other_classes_in_test_than_in_train_are_refused_by_name(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", test=("cat", "cow"))
    folder_refused(tmp_path, folder, "only in train: dog", "only in test: cow")


@pytest.mark.usefixtures("nothing_trained")
def test_a_class_without_images_is_refused_by_name(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data")
    for path in (folder / "test/dog").iterdir():
        path.unlink()
    folder_refused(tmp_path, folder, str(folder / "test/dog"), "empty")


@pytest.mark.usefixtures("nothing_trained")
def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data")
    (folder / "test/dog/1.png").write_bytes(b"no image at all")
    folder_refused(tmp_path, folder, str(folder / "test/dog/1.png"), "cannot be read as an image")


@pytest.mark.usefixtures("nothing_trained")
def test_more_samples_than_a_folder_has_are_refused_with_their_number(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data")
    results = tmp_path / "results"
    words = ["--dataset", "imagefolder", "--data-dir", folder, "--arch", "small_resnet", "--results", results]
    result = ens("bench", "--method", "nat", "--attack", "fgsm", "--samples", "7", *words)
    refused(result, results, "7", "there are 6")


# --- bad plug-ins ---------------------------------------------------------------------------------


def plugin_refused(tmp_path: Path, plugin: Path, method: str, *told: str) -> str:
    return bench_refused(tmp_path, ("--plugin", str(plugin), "--method", method), *told)


@pytest.mark.usefixtures("nothing_trained")
@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def broken(:\n", ("SyntaxError",)),
        ("import no_such_module_anywhere\n", ("ModuleNotFoundError", "no_such_module_anywhere")),
        ("raise RuntimeError('on purpose')\n", ("RuntimeError", "on purpose")),
        ("from ensdef import no_such_name\n", ("ImportError", "no_such_name")),
    ],
)
def test_a_plugin_that_does_not_import_is_refused_with_the_reason(
    tmp_path: Path, source: str, told: tuple[str, ...]
) -> None:
    path = tmp_path / "bad.py"
    path.write_text(source, encoding="utf-8")
    plugin_refused(tmp_path, path, "nat", "bad.py", "does not import", *told)


@pytest.mark.usefixtures("nothing_trained")
def test_a_plugin_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    plugin_refused(tmp_path, tmp_path / "nowhere.py", "nat", str(tmp_path / "nowhere.py"), "no such file")
    plugin_refused(tmp_path, Path("no_such_module_anywhere"), "nat", "no_such_module_anywhere")


@pytest.mark.usefixtures("nothing_trained")
def test_a_plugin_that_registers_a_taken_name_is_refused_with_the_owner(tmp_path: Path) -> None:
    plugin_refused(tmp_path, write_plugin(tmp_path, "adp"), "nat", "'adp'", "already", "another name")


@pytest.mark.usefixtures("nothing_trained")
def test_two_plugins_with_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = write_plugin(tmp_path / "a", "twice"), write_plugin(tmp_path / "b", "twice")
    words = ("--plugin", str(first), "--plugin", str(second), "--method", "twice")
    bench_refused(tmp_path, words, "'twice'", "already", "another name")


@pytest.mark.usefixtures("nothing_trained")
def test_a_plugin_without_the_method_asked_for_is_refused_with_the_nearest(tmp_path: Path) -> None:
    plugin_refused(tmp_path, write_plugin(tmp_path, "novelty"), "noveltie", "'noveltie'", "did you mean 'novelty'")


@pytest.mark.usefixtures("nothing_trained")
@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("def predict(self, x):\n    return super().predict(x).exp()", ("probabilities", "log")),
        ("def predict(self, x):\n    return super().predict(x) * float('nan')", ("NaN",)),
        ("def predict(self, x):\n    return super().predict(x) - float('inf')", ("infinite",)),
        ("def predict(self, x):\n    return super().predict(x)[:, 0]", ("(4,)", "(4, ")),
        ("def predict(self, x):\n    return super().predict(x)[1:]", ("(3, 10)", "(4, ")),
        ("def predict(self, x):\n    return super().predict(x)[:, 1:]", ("9", "10")),
        ("def predict(self, x):\n    return None", ("NoneType", "log-scores")),
        ("def predict(self, x):\n    return self.no_such_thing(x)", ("no_such_thing",)),
    ],
    ids=["probabilities", "nan", "infinite", "no classes", "too few rows", "too few classes", "nothing", "raises"],
)
def test_a_defence_whose_scores_cannot_be_attacked_is_refused_before_training(
    tmp_path: Path, body: str, told: tuple[str, ...]
) -> None:
    plugin_refused(tmp_path, write_plugin(tmp_path, "odd", body), "odd", "odd", *told)


@pytest.mark.usefixtures("nothing_trained")
def test_a_data_set_that_cannot_be_downloaded_tells_where_to_put_its_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    words = ("--dataset", "cifar10", "--data-dir", str(tmp_path / "data"))
    bench_refused(tmp_path, words, str(tmp_path / "data"), "cifar-10-python.tar.gz", "--data-dir")
