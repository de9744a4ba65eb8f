"""Trained defences on disk: what comes back, and what is refused with a message that helps."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys_defense import CLASSES, SHAPE, generator, registered, same_weights, spread, toy_data, toy_spec

from ensdef.build import build_defense
from ensdef.checkpoints import (
    SPEC,
    WEIGHTS,
    checkpoint_folder,
    fit,
    is_complete,
    load_checkpoint,
    packed,
    read_weights,
    save_checkpoint,
    save_last_good,
    training_report,
)
from ensdef.defense import EnsembleDefense
from ensdef.errors import CheckpointError, UsageError
from ensdef.records import write_bytes
from ensdef.specs import TrainSpec

DATA = toy_data()


def images() -> Tensor:
    return torch.rand(6, *SHAPE, generator=generator())


def saved(folder: Path, method: str = "soe", **changes: Any) -> tuple[EnsembleDefense, TrainSpec]:
    spec = toy_spec(method, DATA, **changes)
    defense = build_defense(spec.model, seed=3)
    spread(defense)
    save_checkpoint(folder, defense, spec, {"seconds": 1.5, "history": [{"ce": 0.5}]})
    return defense, spec


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """As a version without checksums would have written it."""
    description = json.loads((folder / SPEC).read_text())
    del description["sha256"]
    change(description)
    (folder / SPEC).write_text(json.dumps(description))


def refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load_checkpoint(path)
    assert isinstance(caught.value, UsageError), "the caller's doing: exit code 2"
    assert str(path.parent) in str(caught.value) or str(path) in str(caught.value), "the message names the file"


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nat", "adv", "adv_en", "adp", "soe"])
def test_a_saved_defence_predicts_what_it_predicted(method: str, tmp_path: Path) -> None:
    defense, _ = saved(tmp_path, method)
    loaded = load_checkpoint(tmp_path)
    assert type(loaded) is type(defense)
    assert loaded.hyper == defense.hyper
    assert loaded.spec == defense.spec
    assert same_weights(loaded, defense)
    assert torch.equal(loaded(images()), defense(images()))


def test_hyper_parameters_and_architecture_come_back(tmp_path: Path) -> None:
    spec = toy_spec("soe", DATA, {"phases": "submodel", "sigma": 0.25}, architecture="small_resnet[width=6]", members=3)
    save_checkpoint(tmp_path, build_defense(spec.model), spec, {})
    loaded = load_checkpoint(tmp_path)
    assert (loaded.hyper.phases, loaded.hyper.sigma, len(loaded.members)) == ("submodel", 0.25, 3)
    assert loaded.spec.architecture_call == "small_resnet[width=6]"


def test_the_folder_and_the_weights_file_name_the_same_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path)
    for path in (tmp_path, str(tmp_path), tmp_path / WEIGHTS, str(tmp_path / WEIGHTS)):
        assert same_weights(load_checkpoint(path), load_checkpoint(tmp_path))


def test_a_copied_folder_is_a_checkpoint(tmp_path: Path) -> None:
    defense, _ = saved(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    assert same_weights(load_checkpoint(tmp_path / "other"), defense)


def test_a_loaded_defence_is_in_eval_mode_and_asks_for_gradients_as_usual(tmp_path: Path) -> None:
    saved(tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert all(tensor.device.type == "cpu" for tensor in loaded.state_dict().values())


def test_loading_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    saved(tmp_path)
    before = torch.get_rng_state()
    load_checkpoint(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_channels_last_weights_are_saved_in_the_usual_order(tmp_path: Path) -> None:
    spec = toy_spec("nat", DATA)
    defense = build_defense(spec.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert any(not tensor.is_contiguous() for tensor in defense.state_dict().values())
    save_checkpoint(tmp_path, defense, spec, {})
    assert same_weights(load_checkpoint(tmp_path), defense)


def test_the_description_tells_the_key_and_the_trainer_s_report(tmp_path: Path) -> None:
    _, spec = saved(tmp_path)
    description = json.loads((tmp_path / SPEC).read_text())
    assert description["key"] == spec.key
    assert training_report(tmp_path) == {"seconds": 1.5, "history": [{"ce": 0.5}]}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([SPEC, WEIGHTS])


def test_the_folder_s_name_holds_method_and_key(tmp_path: Path) -> None:
    spec = toy_spec("adp", DATA)
    assert checkpoint_folder(tmp_path, spec) == tmp_path / "checkpoints" / f"adp-{spec.key[:16]}"
    assert checkpoint_folder(tmp_path, toy_spec("adp", DATA, seed=1)) != checkpoint_folder(tmp_path, spec)


def test_a_checkpoint_is_complete_with_weights_and_the_description_of_this_training(tmp_path: Path) -> None:
    _, spec = saved(tmp_path)
    assert is_complete(tmp_path, spec)
    assert not is_complete(tmp_path, toy_spec("soe", DATA, seed=1))
    assert not is_complete(tmp_path / "nowhere", spec)
    for name in (WEIGHTS, SPEC):
        (tmp_path / name).rename(tmp_path / "aside")
        assert not is_complete(tmp_path, spec)
        (tmp_path / "aside").rename(tmp_path / name)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_weights_are_refused(keep: float, tmp_path: Path) -> None:
    saved(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: int(keep * len(content)) if keep == 0.5 else int(keep)])
    refused(tmp_path, r"truncated or no safetensors file.*train again")


class Trap:
    """Unpickling this leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_is_refused_and_never_run(zipped: bool, tmp_path: Path) -> None:
    defense, _ = saved(tmp_path)
    trap = {**defense.state_dict(), "trap": Trap(tmp_path / "sprung")}
    torch.save(trap, tmp_path / WEIGHTS, _use_new_zipfile_serialization=zipped)
    refused(tmp_path, r"pickle.*refused.*ensdef import-pth")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_of_any_protocol_is_refused_and_never_run(protocol: int, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(pickle.dumps(Trap(tmp_path / "sprung"), protocol=protocol))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"architecture": "small_resnet[width=6]"}, r"is \(6, 6, 3, 3\), expected \(4, 4, 3, 3\)"),
        ({"members": 3}, r"unexpected members\.2"),
        ({"members": 1}, r"missing members\.1"),
        ({"method": "nat"}, r"missing members\.0\.head"),
    ],
    ids=["architecture", "more members", "fewer members", "method"],
)
def test_weights_of_another_training_are_refused(other: dict[str, Any], told: str, tmp_path: Path) -> None:
    saved(tmp_path)
    saved(tmp_path / "other", **{"method": "soe", **other})
    shutil.copy(tmp_path / "other" / WEIGHTS, tmp_path / WEIGHTS)
    refused(tmp_path, rf"another architecture: \d+ tensors differ.*({told})")


def test_weights_of_another_seed_are_refused_by_their_checksum(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = {name: value + 1 for name, value in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    refused(tmp_path, r"not the file that spec\.json describes: its SHA-256 is [0-9a-f]{16}, expected [0-9a-f]{16}")


def test_an_edited_description_is_refused_by_its_checksum(tmp_path: Path) -> None:
    saved(tmp_path)
    text = (tmp_path / SPEC).read_text()
    assert '"seconds": 1.5' in text
    (tmp_path / SPEC).write_text(text.replace('"seconds": 1.5', '"seconds": 1.0'))
    refused(tmp_path, r"was edited since it was saved")


def test_a_description_with_a_history_that_is_no_number_keeps_its_checksum(tmp_path: Path) -> None:
    spec = toy_spec("soe", DATA)
    report = {"history": [{"ce": float("nan")}, {2: 1, 10: 1}]}
    save_checkpoint(tmp_path, build_defense(spec.model), spec, report)
    load_checkpoint(tmp_path)


def test_the_last_good_epoch_of_a_broken_training_is_verified_too(tmp_path: Path) -> None:
    spec = toy_spec("soe", DATA)
    defense = build_defense(spec.model)
    path = save_last_good(tmp_path, packed(defense.state_dict()), spec, "the loss became NaN")
    assert same_weights(load_checkpoint(path), defense)
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    refused(path, "not the file")


def test_one_renamed_tensor_is_told_by_both_names(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["members.0.hat.weight"] = tensors.pop("members.0.head.weight")
    save_file(tensors, tmp_path / WEIGHTS)
    refused(tmp_path, r"2 tensors differ \(missing members\.0\.head\.weight; unexpected members\.0\.hat\.weight\)")


def test_refused_weights_leave_the_defence_as_it_was(tmp_path: Path) -> None:
    defense, _ = saved(tmp_path)
    before = {name: value.clone() for name, value in defense.state_dict().items()}
    tensors = {name: value + 1 for name, value in load_file(tmp_path / WEIGHTS).items()}
    del tensors["members.0.head.bias"]
    with pytest.raises(CheckpointError):
        fit(defense, tensors, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in defense.state_dict().items())


@pytest.mark.parametrize("path", ["nowhere", "nowhere/weights.safetensors"])
def test_a_missing_checkpoint_is_told_with_what_was_expected(path: str, tmp_path: Path) -> None:
    refused(tmp_path / path, rf"no checkpoint at .*{WEIGHTS} and {SPEC}")


def test_a_folder_without_weights_is_told_as_such(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    refused(tmp_path, rf"no checkpoint at .*{WEIGHTS}")


def test_weights_without_a_description_are_told_as_such(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / SPEC).unlink()
    refused(tmp_path, rf"{SPEC} is missing; a checkpoint is a folder with {WEIGHTS} and {SPEC}")


@pytest.mark.parametrize("text", ["", "{", '{"model": ', "not json", "\x00\x01"])
def test_a_description_that_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / SPEC).write_text(text)
    refused(tmp_path, r"is no JSON .*train again")


def test_a_description_that_is_no_text_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / SPEC).write_bytes(b"\xff\xfe\x00")
    refused(tmp_path, r"is no UTF-8 text .*train again")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"text"'])
def test_a_description_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / SPEC).write_text(text)
    refused(tmp_path, r"is no checkpoint description")


@pytest.mark.parametrize(
    "change",
    [
        lambda description: description.pop("model"),
        lambda description: description.update(model=[1, 2]),
        lambda description: description["model"].pop("mean"),
        lambda description: description["model"].pop("num_classes"),
        lambda description: description["model"].update(image_shape=None),
    ],
    ids=["no model", "a list", "no mean", "no number of classes", "no shape"],
)
def test_a_description_without_a_model_is_refused(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, change)
    refused(tmp_path, r"does not describe a model")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda model: model.update(method="forgotten"), r"unknown method 'forgotten'"),
        (lambda model: model.update(architecture="vgg"), r"unknown architecture 'vgg'"),
        (lambda model: model["hyper"].update(sigma=0), r"sigma is 0"),
    ],
    ids=["method", "architecture", "hyper-parameter"],
)
def test_a_description_of_something_unknown_is_refused(
    change: Callable[[dict[str, Any]], None], match: str, tmp_path: Path
) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda description: change(description["model"]))
    refused(tmp_path, rf"{SPEC}: .*{match}")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model["hyper"].update(tau=1),
        lambda model: model["architecture_params"].update(depth=1),
        lambda model: model["hyper"].update(sigma="hot"),
        lambda model: model["architecture_params"].update(width="wide"),
        lambda model: model.update(hyper=None),
        lambda model: model.update(members="two"),
        lambda model: model.update(image_shape=[8, 8]),
    ],
    ids=["hyper", "parameter", "hyper's type", "parameter's type", "no hyper", "members", "shape"],
)
def test_a_description_of_parameters_that_the_method_does_not_have_is_refused(
    change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    """As after an update of the method, or by hand."""
    saved(tmp_path)
    rewrite(tmp_path, lambda description: change(description["model"]))
    refused(tmp_path, r"does not describe a model .*train it again")


def test_a_method_that_is_no_longer_registered_is_named(tmp_path: Path) -> None:
    with registered():
        saved(tmp_path, "toy_plain")
        assert isinstance(load_checkpoint(tmp_path), EnsembleDefense)
    refused(tmp_path, r"unknown method 'toy_plain'")


def test_reading_weights_gives_the_tensors_by_name(tmp_path: Path) -> None:
    defense, _ = saved(tmp_path)
    weights = read_weights(tmp_path / WEIGHTS)
    assert weights.keys() == defense.state_dict().keys()


# --- writing --------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(OSError, match="No space left"):
                write_bytes(path, b"new")
        assert path.read_bytes() == b"old"
        assert [item.name for item in tmp_path.iterdir()] == ["file"]
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_training_whose_description_cannot_be_written_counts_as_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The description comes last: a crash between the two files leaves nothing that looks complete."""
    replace = os.replace

    def only_weights(source: Any, target: Any) -> None:
        if Path(target).name == SPEC:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", only_weights)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path)
    assert (tmp_path / WEIGHTS).is_file()
    assert not is_complete(tmp_path, toy_spec("soe", DATA))


def test_the_number_of_classes_of_the_description_is_the_number_of_scores(tmp_path: Path) -> None:
    saved(tmp_path)
    assert load_checkpoint(tmp_path)(images()).shape == (6, CLASSES)
