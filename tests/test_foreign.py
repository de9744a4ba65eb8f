"""`ensdef import-pth`: every layout of authors' files comes back as the same network; what is no tensor is refused."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

import ensdef
from ensdef import foreign
from ensdef.checkpoints import SPEC, WEIGHTS
from ensdef.cli import cli
from ensdef.cli import import_pth as commands  # noqa: F401 - adds the command
from ensdef.defense import EnsembleDefense
from ensdef.errors import CheckpointError
from ensdef.foreign import read_foreign

ARCH = "small_resnet[width=4]"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)
State = dict[str, Tensor]


def ensemble(method: str = "nat", members: int = 3, **hyper: Any) -> EnsembleDefense:
    """Members that have seen images, so that their batch norms differ from new ones."""
    torch.manual_seed(7)
    defense = ensdef.create_defense(
        method, architecture=ARCH, members=members, num_classes=4, image_shape=(3, 8, 8), mean=MEAN, std=STD, **hyper
    ).train()
    for _ in range(3):
        defense(torch.rand(16, 3, 8, 8))
    return defense.eval()


def authors_names(state: Mapping[str, Tensor], normaliser: bool) -> State:
    """A member as the defences' code bases write it; in the order of the file."""
    renamed = {
        "stem.0": "conv1",
        "stem.1": "bn1",
        "first.0": "conv1",
        "first.1": "bn1",
        "second.0": "conv2",
        "second.1": "bn2",
        "classifier": "linear",
    }
    found: State = {}
    for name, tensor in state.items():
        if name.startswith("normalize."):
            if normaliser:
                found[f"0.{name.rpartition('.')[2]}"] = tensor
            continue
        if name.endswith("num_batches_tracked"):  # files of PyTorch before 1.0 have none
            continue
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        name = name.replace("blocks.0", "layer1.0").replace("blocks.1", "layer2.0")
        found[f"1.{name}" if normaliser else name] = tensor
    return found


def members_of(defense: EnsembleDefense, normaliser: bool = True) -> list[State]:
    return [authors_names(member.state_dict(), normaliser) for member in defense.members]


def prefixed(state: Mapping[str, Tensor], *prefixes: str) -> State:
    return {".".join((*prefixes, name)): tensor for name, tensor in state.items()}


def imported(folder: Path, *files: Path, options: tuple[str, ...] = (), method: str = "nat") -> Result:
    arguments = [*map(str, files), "--method", method, "--arch", ARCH, "--classes", "4", "--image", "3,8,8"]
    return CliRunner().invoke(cli, ["import-pth", *arguments, "--out", str(folder / "ours"), *options])


def same_answers(folder: Path, defense: EnsembleDefense) -> None:
    x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ensdef.load_checkpoint(folder / "ours")(x), defense(x))


LAYOUTS: dict[str, Callable[[list[State]], Any]] = {
    "a dict of members": lambda members: {f"model_{k}": state for k, state in enumerate(members)},
    "one state dict": lambda members: {
        f"models.{k}.{n}": t for k, state in enumerate(members) for n, t in state.items()
    },
    "nested prefixes": lambda members: {
        "state_dict": {f"module.model.{k}.module.{n}": t for k, state in enumerate(members) for n, t in state.items()},
        "epoch": 3,
        "best_acc": torch.tensor(0.9),
    },
    "with the optimiser inside": lambda members: {
        **{f"expert_{k}": prefixed(state, "module") for k, state in enumerate(members)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(4)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 12,
    },
    "a list of members": lambda members: [{"net": state} for state in members],
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_file_with_all_members_comes_back_as_the_same_network(layout: str, zipped: bool, tmp_path: Path) -> None:
    defense = ensemble()
    file = tmp_path / "theirs.pth.tar"
    torch.save(LAYOUTS[layout](members_of(defense)), file, _use_new_zipfile_serialization=zipped)
    found = imported(tmp_path, file)
    assert found.exit_code == 0, found.output
    assert "nat, 3 x small_resnet[width=4]" in found.output
    same_answers(tmp_path, defense)


def test_a_file_for_each_member_comes_back_as_the_same_network(tmp_path: Path) -> None:
    defense, files = ensemble(), []
    for number, state in enumerate(members_of(defense)):
        files.append(tmp_path / f"name.{number}")
        torch.save({"state_dict": prefixed(state, "module"), "epoch": number}, files[-1])
    assert imported(tmp_path, *files).exit_code == 0
    same_answers(tmp_path, defense)


def test_a_single_network_is_an_ensemble_of_one(tmp_path: Path) -> None:
    defense = ensemble(members=1)
    torch.save(members_of(defense)[0], tmp_path / "theirs.pth")
    assert imported(tmp_path, tmp_path / "theirs.pth").exit_code == 0
    same_answers(tmp_path, defense)


def test_experts_and_a_gate_find_their_places(tmp_path: Path) -> None:
    torch.manual_seed(3)
    defense = ensemble("more", members=5)
    gate = {name: tensor for name, tensor in defense.gate.state_dict().items() if "num_batches" not in name}
    content = {f"expert_{k}": state for k, state in enumerate(members_of(defense))}
    torch.save({**content, "gate": prefixed(gate, "module")}, tmp_path / "theirs.pth")
    found = imported(tmp_path, tmp_path / "theirs.pth", method="more")
    assert found.exit_code == 0, found.output
    same_answers(tmp_path, defense)


def test_without_a_normaliser_inside_it_has_to_be_told(tmp_path: Path) -> None:
    defense = ensemble()
    torch.save({f"model_{k}": s for k, s in enumerate(members_of(defense, normaliser=False))}, tmp_path / "theirs.pth")
    found = imported(tmp_path, tmp_path / "theirs.pth")
    assert found.exit_code == 2
    assert "no normaliser inside; say with --mean and --std" in found.output
    told = ("--mean", ",".join(map(str, MEAN)), "--std", ",".join(map(str, STD)))
    assert imported(tmp_path, tmp_path / "theirs.pth", options=told).exit_code == 0
    same_answers(tmp_path, defense)


def test_another_normaliser_than_the_one_inside_is_refused(tmp_path: Path) -> None:
    torch.save(members_of(ensemble(members=1))[0], tmp_path / "theirs.pth")
    found = imported(tmp_path, tmp_path / "theirs.pth", options=("--mean", "0", "--std", "1"))
    assert found.exit_code == 2
    assert "leave them out" in found.output


def test_a_record_of_imported_weights_says_so_and_its_key_is_that_of_the_weights(tmp_path: Path) -> None:
    torch.save(members_of(ensemble(members=1))[0], tmp_path / "theirs.pth")
    assert imported(tmp_path, tmp_path / "theirs.pth").exit_code == 0
    defense = ensdef.load_checkpoint(tmp_path / "ours")
    x, y = torch.rand(6, 3, 8, 8), torch.zeros(6, dtype=torch.int64)
    record = ensdef.evaluate(defense, x, y, attack="fgsm", eps="0.1", health="off")
    assert record.training["imported"]["files"][0]["name"] == "theirs.pth"
    assert len(record.training["imported"]["files"][0]["sha256"]) == 64
    from ensdef.weights import weights_hash

    assert json.loads((tmp_path / "ours" / SPEC).read_text())["key"] == weights_hash(defense)


# what does not fit


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda members: members[:2], "found 2 members, expected 3"),
        (lambda members: [{**members[0], "1.extra.weight": torch.zeros(3)}], "expected"),
        (lambda members: [dict(list(members[0].items())[:-1])], "tensors"),
        (
            lambda members: [{**members[0], "1.linear.weight": torch.zeros(5, 8)}],
            "linear.weight (5, 8)",
        ),
        (lambda members: [{**members[0], "1.conv1.weight": torch.full((4, 3, 3, 3), torch.nan)}], "NaN"),
        (lambda members: [{n: t for n, t in members[0].items() if n != "0.std"}], "expected both mean and std"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_found(
    change: Callable[[list[State]], list[State]], told: str, tmp_path: Path
) -> None:
    members = change(members_of(ensemble()))
    torch.save({f"model_{k}": state for k, state in enumerate(members)}, tmp_path / "theirs.pth")
    found = imported(tmp_path, tmp_path / "theirs.pth", options=("--members", "3") if len(members) == 2 else ())
    assert found.exit_code == 2, found.output
    assert told in found.output
    assert not (tmp_path / "ours").exists()


def test_several_files_of_which_one_has_all_members_are_refused(tmp_path: Path) -> None:
    members = members_of(ensemble())
    torch.save({f"model_{k}": state for k, state in enumerate(members)}, tmp_path / "all.pth")
    torch.save(members[0], tmp_path / "one.pth")
    found = imported(tmp_path, tmp_path / "one.pth", tmp_path / "all.pth")
    assert found.exit_code == 2
    assert "has 3 members itself" in found.output


def test_a_folder_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    torch.save(members_of(ensemble(members=1))[0], tmp_path / "theirs.pth")
    assert imported(tmp_path, tmp_path / "theirs.pth").exit_code == 0
    before = (tmp_path / "ours" / WEIGHTS).read_bytes()
    assert imported(tmp_path, tmp_path / "theirs.pth").exit_code == 2
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == before


# what is no tensor


class Trap:
    """Unpickled, it would write a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("write", ["zip", "legacy", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_is_run(write: str, tmp_path: Path) -> None:
    content = {**members_of(ensemble(members=1))[0], "extra": Trap(tmp_path / "sprung")}
    file = tmp_path / "theirs.pth"
    if write == "plain pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=write == "zip")
    found = imported(tmp_path, file)
    assert found.exit_code == 2
    assert "nothing in it was run" in found.output
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "ours").exists()
    # the trap is one
    with pytest.raises(Exception):  # noqa: B017, PT011 - what torch raises behind it does not matter
        torch.load(file, weights_only=False)["nothing"]
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 no archive", b"\x80\x02", b"\x80\x04\x95"])
def test_what_is_no_file_of_torch_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "theirs.pth").write_bytes(content)
    with pytest.raises(CheckpointError):
        read_foreign(tmp_path / "theirs.pth")


def test_a_compressed_archive_and_one_that_claims_more_than_it_has_are_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(100_000), tmp_path / "good.pth")
    with (
        zipfile.ZipFile(tmp_path / "good.pth") as good,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in good.infolist():
            bomb.writestr(entry.filename, good.read(entry))
    with pytest.raises(CheckpointError, match="of them compressed"):
        read_foreign(tmp_path / "bomb.pth")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_storage_larger_than_its_file_is_refused_before_torch_sees_it(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(torch.zeros(123_456), tmp_path / "good.pth", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "good.pth").read_bytes()
    asked = content.replace(struct.pack("<i", 123_456), struct.pack("<i", 2**31 - 1))
    assert asked != content
    (tmp_path / "bomb.pth").write_bytes(asked)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch was asked"))
    with pytest.raises(CheckpointError, match=r"asks for 2,147,483,647 of something|damaged archive"):
        read_foreign(tmp_path / "bomb.pth")


def test_a_file_beyond_the_limit_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(torch.zeros(3), tmp_path / "theirs.pth")
    monkeypatch.setattr(foreign, "LARGEST_FILE", 100)
    with pytest.raises(CheckpointError, match="GB"):
        read_foreign(tmp_path / "theirs.pth")
