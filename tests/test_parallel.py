"""Several devices share a training: what stays as with one, what differs and is told, and what is refused."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load
from torch import Tensor, nn
from toys_defense import generator, spread, toy_data, toy_spec

from ensdef import training
from ensdef.adversary import Adversary, Part
from ensdef.build import build_defense
from ensdef.cli import cli, run  # noqa: F401 - run adds its commands
from ensdef.data import Data
from ensdef.errors import PluginError, TrainingDiverged, UsageError
from ensdef.folding import FoldedCopy
from ensdef.parallel import Share, check_devices, check_training, share_batch_norm
from ensdef.progress import ConsoleProgress
from ensdef.recipe import InnerAttack
from ensdef.registry import METHODS, load_plugin, loaded_plugins
from ensdef.rng import BatchRandom
from ensdef.specs import TrainSpec
from ensdef.training import Trained, train

PLUGIN = Path(__file__).with_name("toys_parallel.py")
#: Neither batch norm nor dropout: everything that is random is the trainer's.
BARE = "cce_mnist[dropout=0]"


@pytest.fixture(scope="module", autouse=True)
def _plugin() -> Iterator[None]:
    """The toys, loaded as ``--plugin`` loads them, and forgotten afterwards."""
    modules = set(sys.modules)
    load_plugin(str(PLUGIN))
    yield
    loaded = {name for name in set(sys.modules) - modules if name.startswith("ensdef_plugin_")}
    for name, method in dict(METHODS._registered).items():
        if method.__module__ in loaded:
            METHODS._registered.pop(name)
    for name in loaded:
        del sys.modules[name]


def bare(method: str, data: Data, **changes: Any) -> TrainSpec:
    defaults = {"architecture": BARE, "batch_size": 16, "epochs": 2}
    return toy_spec(method, data, None, **{**defaults, **changes})


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# --- two processes and one ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both() -> list[Trained]:
    """The same adversarial training with one device and with two; the last of its batches has 13 images."""
    data = toy_data(50)
    spec = bare(
        "toy_everything",
        data,
        augment="crop+flip",
        train_eps="uniform(0.05,0.1)",
        keep="best",
        attack={"steps": 2, "start": "uniform"},
    )
    return [train(spec, data, device="cpu", devices=devices) for devices in (1, 2)]


def test_two_processes_give_the_weights_of_one(both: list[Trained]) -> None:
    one, two = (result.defense for result in both)
    start = build_defense(one.spec)
    assert largest_difference(start.state_dict(), one.state_dict()) > 0.01
    assert largest_difference(one.state_dict(), two.state_dict()) < 1e-5
    x = toy_data(8, seed=1).train.x()
    torch.testing.assert_close(two.predict(x), one.predict(x))


def test_a_parameter_without_gradient_anywhere_is_left_alone(both: list[Trained]) -> None:
    """One image of 45 moves it, once an epoch: momentum on gradients of zero would have moved it in every batch."""
    one, two = (float(result.defense.seldom.detach()) for result in both)
    assert one == pytest.approx(two, abs=1e-6)
    assert 0.98 < two < 1


def test_two_processes_report_the_terms_of_one(both: list[Trained]) -> None:
    one, two = (result.report["history"] for result in both)
    assert [sorted(terms) for terms in two] == [["adv_ce", "holdout_robust_accuracy", "other_ce"]] * 2
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_the_report_tells_the_number_of_devices(both: list[Trained]) -> None:
    one, two = (result.report for result in both)
    assert (one["devices"], two["devices"]) == (1, 2)
    assert not {"batch_norm"} & {*one, *two}  # the network has none
    alike = ("kept", "images_seen", "device", "health")
    assert {name: one[name] for name in alike} == {name: two[name] for name in alike}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("total", [1, 3, 7, 8, 13, 128])
def test_shares_of_a_batch_add_up_to_the_batch(total: int, count: int) -> None:
    shares = [Share(rank, count) for rank in range(count)]
    parts = [list(range(total)[share.rows(total)]) for share in shares]
    if total < 2 * count and count > 1:  # batch norm cannot train on one image
        assert parts == [list(range(total))] * count
    else:
        assert [row for part in parts for row in part] == list(range(total))
    # the weighted sum of means over parts is the mean over the batch
    values = torch.arange(total).double() ** 2
    means = [values[part].mean() * share.weight(total) for part, share in zip(parts, shares, strict=True)]
    torch.testing.assert_close(torch.stack(means).sum(), values.mean())


def test_a_part_of_a_batch_gets_its_part_of_the_draws() -> None:
    for draw in ("uniform", "normal"):
        whole = getattr(BatchRandom(generator(3), 7), draw)(2, 3)
        parts = [getattr(BatchRandom(generator(3), 7, rows), draw)(2, 3) for rows in (slice(0, 3), slice(3, 7))]
        assert torch.equal(torch.cat(parts), whole)


def test_attacks_on_a_whole_part_start_where_one_process_starts_them_and_others_do_not() -> None:
    defense = build_defense(bare("adv_en", toy_data()).model)
    adversary = Adversary(defense, InnerAttack(steps=0), "linf", (0.1, 0.1))
    x, y = torch.full((6, 1, 8, 8), 0.5), torch.arange(6) % 5
    adversary.begin_batch(generator(1))
    whole = adversary(defense, x, y)
    starts = []
    for rank, rows in enumerate((slice(0, 3), slice(3, 6))):
        adversary.begin_batch(generator(1), Part(rows, 6, generator(10 + rank)))
        starts.append(adversary(defense, x[rows], y[rows]))
        alone = adversary(defense, x[:2], y[:2])
        assert not any(torch.equal(image, other) for image in alone for other in whole)
    assert torch.equal(torch.cat(starts), whole)


# --- batch norm -----------------------------------------------------------------------------------


def test_batch_norm_is_per_process_on_the_cpu_and_synchronised_on_cuda() -> None:
    def told(architecture: str, device: str, count: int = 2) -> str | None:
        defense = build_defense(toy_spec("nat", toy_data(), None, architecture=architecture).model)
        return share_batch_norm(defense, Share(0, count), torch.device(device))

    assert told("small_resnet[width=4]", "cpu") == "per process"
    assert told("small_resnet[width=4]", "cuda") == "synchronised"
    assert told("small_resnet[width=4]", "cuda", count=1) is None
    assert told(BARE, "cuda") is None


def test_synchronised_batch_norm_is_the_same_network_and_its_weights_fit_the_plain_one() -> None:
    model = toy_spec("nat", toy_data(), None, members=2).model
    plain, shared = (spread(build_defense(model)) for _ in range(2))
    count = sum(isinstance(part, nn.BatchNorm2d) for part in plain.modules())
    parameters = {id(parameter) for parameter in shared.parameters()}
    share_batch_norm(shared, Share(0, 2), torch.device("cuda"))
    assert sum(isinstance(part, nn.SyncBatchNorm) for part in shared.modules()) == count > 0
    assert not any(isinstance(part, nn.BatchNorm2d) for part in shared.modules())
    assert {id(parameter) for parameter in shared.parameters()} == parameters
    x = toy_data(8).train.x()
    with torch.no_grad():
        assert torch.equal(shared.eval()(x), plain.eval()(x))
    back = build_defense(model)
    back.load_state_dict(shared.state_dict())
    assert largest_difference(back.state_dict(), plain.state_dict()) == 0


def test_synchronised_batch_norm_is_folded_as_the_plain_one_is() -> None:
    model = toy_spec("nat", toy_data(), None).model
    plain, shared = (spread(build_defense(model)) for _ in range(2))
    share_batch_norm(shared, Share(0, 2), torch.device("cuda"))
    ours, theirs = FoldedCopy(shared).module, FoldedCopy(plain).module
    assert not any(isinstance(part, nn.SyncBatchNorm) for part in ours.modules())
    x = toy_data(8).train.x()
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_loss_that_breaks_in_one_process_ends_the_training_with_the_last_good_weights() -> None:
    """The last batch of each epoch has 3 images, fewer than two for each process: both compute all of them."""
    data = toy_data(35)
    with pytest.raises(TrainingDiverged, match=r"'ce' is nan in epoch 1, batch \d") as caught:
        train(bare("toy_breaking", data), data, device="cpu", devices=2)
    good = train(bare("toy_breaking", data, epochs=1), data, device="cpu").defense
    assert largest_difference(load(caught.value.last_good), good.state_dict()) < 1e-5


@pytest.mark.slow
def test_processes_that_part_are_told_so_and_do_not_wait_for_each_other() -> None:
    data = toy_data(48)
    with pytest.raises(PluginError, match=r"number of dicts that loss yields.*--devices 1"):
        train(bare("toy_parting", data), data, device="cpu", devices=2)


@pytest.mark.slow
def test_an_error_in_one_process_is_raised_here() -> None:
    data = toy_data(48)
    with pytest.raises(ZeroDivisionError, match="image 0"):
        train(bare("toy_raising", data), data, device="cpu", devices=2)


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def _no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("processes were started")

    monkeypatch.setattr(training, "launch", refuse)


@pytest.mark.usefixtures("_no_start")
def test_batches_that_do_not_split_evenly_are_refused_with_the_numbers_that_work() -> None:
    data = toy_data()
    spec = bare("nat", data, batch_size=128)
    with pytest.raises(UsageError, match=r"devices is 3.*batch_size of 128.*work: 1, 2, 4, 8, 16, 32, 64$"):
        train(spec, data, device="cpu", devices=3)
    with pytest.raises(UsageError, match=r"devices is 128"):  # one image each
        check_training(spec, 128)
    with pytest.raises(UsageError, match=r"work: 1$"):
        check_training(bare("nat", data, batch_size=1), 2)
    check_training(spec, 64)


@pytest.mark.usefixtures("_no_start")
@pytest.mark.parametrize("method", ["toy_coupled", "cldl", "igat[base=cldl]"])
def test_losses_that_couple_a_batch_are_refused(method: str) -> None:
    data = toy_data()
    name, _, base = method.rstrip("]").partition("[base=")
    spec = toy_spec(name, data, {"base": base} if base else None, batch_size=16)
    with pytest.raises(UsageError, match=r"couples the images of a batch.*--devices 1"):
        train(spec, data, device="cpu", devices=2)
    check_training(spec, 1)


@pytest.mark.usefixtures("_no_start")
@pytest.mark.parametrize("devices", [0, -1])
def test_fewer_than_one_device_is_refused(devices: int) -> None:
    data = toy_data()
    with pytest.raises(UsageError, match=f"devices is {devices}; expected at least 1"):
        train(bare("nat", data), data, device="cpu", devices=devices)


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda", "auto"):
        check_devices(2, device)
        with pytest.raises(UsageError, match=r"devices is 3, but PyTorch sees 2 CUDA devices; ask for 2"):
            check_devices(3, device)
    check_devices(3, "cpu")


@pytest.mark.usefixtures("_no_start")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--devices", "3"], "devices that work: 1, 2, 4, 8, 16, 32"),
        (["--devices", "0"], "0 is not in the range"),
        (["--devices", "2", "--method", "nat,trs"], "the loss of trs couples"),
        # its prerequisite alone cannot be shared
        (["--devices", "2", "--method", "nat", "--attack", "transfer[surrogates=cldl]"], "the loss of cldl couples"),
    ],
)
def test_the_command_refuses_before_any_work(tmp_path: Path, words: list[str], told: str) -> None:
    common = ["--limit", "50", "--samples", "5", "--device", "cpu", "--results", str(tmp_path)]
    result = CliRunner().invoke(cli, ["bench", *common, *([] if "--method" in words else ["--method", "nat"]), *words])
    assert (result.exit_code, told in " ".join(result.output.split())) == (2, True), result.output
    assert not (tmp_path / "checkpoints").exists()


# --- plug-ins and progress in other processes -----------------------------------------------------


def test_plug_ins_that_were_loaded_are_known_until_they_are_forgotten(tmp_path: Path) -> None:
    assert str(PLUGIN) in loaded_plugins()
    path = tmp_path / "passing.py"
    path.write_text(PLUGIN.read_text(encoding="utf-8").split("@register")[0] + PASSING, encoding="utf-8")
    load_plugin(str(path))
    assert loaded_plugins()[-1] == str(path)
    METHODS._registered.pop("toy_passing")
    assert str(path) not in loaded_plugins()


PASSING = """
@register_defense("toy_passing")
class Passing(WithLuckyImage):
    def loss(self, batch, progress):
        return self.plain(batch)
"""


def test_progress_on_the_console_goes_on_in_another_process() -> None:
    assert type(pickle.loads(pickle.dumps(ConsoleProgress()))) is ConsoleProgress


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two processes trained: a plug-in's defence, with batch norm; by the real command."""
    folder = tmp_path_factory.mktemp("results")
    config = folder / "two.toml"
    config.write_text('devices = 2\nepochs = 1\nlimit = 100\nsamples = 20\nmembers = 2\ndevice = "cpu"\n')
    words = ["--config", str(config), "--plugin", str(PLUGIN), "--method", "toy_everything", "--attack", "fgsm"]
    command = [sys.executable, "-m", "ensdef", "bench", *words, "--results", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train toy_everything seed 0" in done.stderr
    return folder, json.loads(done.stdout)


def again(folder: Path, *words: str) -> Result:
    """The same training asked for once more, with one device unless ``words`` say otherwise."""
    same = ["--epochs", "1", "--limit", "100", "--samples", "20", "--members", "2", "--device", "cpu"]
    return CliRunner().invoke(
        cli, ["bench", "--method", "toy_everything", *same, "--results", str(folder), *words], prog_name="ensdef"
    )


def test_the_record_tells_devices_and_batch_norm(results: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (record,) = results
    assert record["error"] is None
    assert record["provenance"]["devices"] == 2
    assert record["provenance"]["batch_norm"] == "per process"


def test_the_number_of_devices_is_no_part_of_a_key(results: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (record,) = results
    result = again(folder, "--attack", "fgsm", "--dry-run")
    assert result.output.startswith("done"), result.output
    assert record["key"][:16] in result.output.partition("\n")[0].split()


@pytest.mark.usefixtures("_no_start")
def test_a_checkpoint_is_used_whatever_the_number_of_devices(results: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = results
    result = again(folder, "--attack", "pgd[steps=1]", "--devices", "3", "--json")
    assert result.exit_code == 0, result.output
    (record,) = json.loads(result.stdout)
    assert record["provenance"]["devices"] == 2  # those it was trained on
