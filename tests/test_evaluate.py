"""``ensdef.evaluate``: a record of a model and images in memory, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ensdef
from ensdef.errors import UsageError
from ensdef.records import Record
from ensdef.testing import LinearClassifier

CLASSES, SHAPE = 4, (1, 8, 8)


def linear(seed: int = 0) -> LinearClassifier:
    return LinearClassifier(torch.randn(CLASSES, 64, generator=torch.Generator().manual_seed(seed)) / 2)


def defence(method: str = "nat", members: int = 2, seed: int = 0, **hyper: Any) -> ensdef.EnsembleDefense:
    return ensdef.create_defense(
        method,
        architecture="small_resnet",
        members=members,
        num_classes=CLASSES,
        image_shape=SHAPE,
        seed=seed,
        **hyper,
    )


def images(count: int = 30) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def labels(model: nn.Module, x: Tensor | None = None) -> Tensor:
    """The model's own decisions, every tenth one made wrong."""
    with torch.no_grad():
        y = model(images() if x is None else x).argmax(dim=1)
    return torch.where(torch.arange(len(y)) % 10 == 9, (y + 1) % CLASSES, y)


def evaluated(model: nn.Module | None = None, **given: Any) -> Record:
    """A quick evaluation; any argument may be replaced."""
    model = linear() if model is None else model
    x = given.pop("x", images())
    y = given.pop("y", None)
    defaults: dict[str, Any] = {"eps": "0.05", "device": "cpu"}
    if given.get("attack", "pgd") == "pgd":
        defaults["steps"] = 3
    return ensdef.evaluate(model, x, labels(model, x) if y is None else y, **{**defaults, **given})


# --- the record -----------------------------------------------------------------------------------

NUMBER = (int, float)
#: What a record promises to have, and of which type.
FIELDS: dict[str, Any] = {
    "method": str,
    "hyper": dict,
    "dataset": str,
    "architecture": str,
    "members": int,
    "train_seed": (int, type(None)),
    "attack": str,
    "attack_params": dict,
    "success": str,
    "norm": str,
    "eps": str,
    "eps_value": float,
    "combiner": str,
    "n": int,
    "clean_accuracy": float,
    "robust_accuracy": float,
    "stderr": float,
    "seconds": NUMBER,
    "forwards": NUMBER,
    "backwards": NUMBER,
    "flags": list,
    "checkpoint": (str, type(None)),
    "path": (str, type(None)),
    "provenance": dict,
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("kind", ["module", "defence"])
def test_a_record_has_every_promised_field_with_its_type(kind: str, name: str) -> None:
    record = evaluated(linear() if kind == "module" else defence())
    assert isinstance(record, Record)
    assert isinstance(getattr(record, name), FIELDS[name])
    assert not isinstance(getattr(record, name), bool)
    assert name in record.summary()


def test_the_numbers_of_a_record_are_counted_from_its_outcomes() -> None:
    record = evaluated()
    clean, robust = record.outcomes["clean"], record.outcomes["robust"]
    assert record.n == len(clean) == len(robust) == 30
    assert record.outcomes["ids"] == list(range(30))
    assert set(clean) | set(robust) <= {0, 1}
    assert record.clean_accuracy == sum(clean) / 30 == 27 / 30
    assert record.robust_accuracy == sum(robust) / 30
    assert 0 < record.robust_accuracy < record.clean_accuracy
    accuracy = record.robust_accuracy
    assert record.stderr == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 30))
    assert record.seconds > 0
    assert all(one <= other for one, other in zip(robust, clean, strict=True))


def test_passes_are_member_passes_per_example() -> None:
    x = images(30)
    model = defence(members=3)
    y = torch.cat([labels(model, x[:1])] * 30)
    record = evaluated(model, x=x[:1].repeat(30, 1, 1, 1), y=y, eps="1e-6", steps=4, restarts=2)
    assert record.clean_accuracy == record.robust_accuracy == 1
    assert record.forwards == 3 * 2 * 5
    assert record.backwards == 3 * 2 * 4


def test_a_defence_is_described_by_how_it_was_made() -> None:
    record = evaluated(defence("soe", members=2, sigma=0.25))
    assert record.method == "soe"
    assert record.hyper["sigma"] == 0.25
    assert record.label == "soe[sigma=0.25]"
    assert record.architecture == "small_resnet"
    assert record.members == 2


def test_the_true_number_of_members_is_told_where_the_method_fixes_it() -> None:
    assert evaluated(defence("adv", members=3)).members == 1


def test_a_plain_module_is_described_by_its_class() -> None:
    record = evaluated()
    assert record.method == record.label == "LinearClassifier"
    assert (record.members, record.hyper, record.train_seed, record.checkpoint) == (1, {}, None, None)


def test_the_attack_is_described_with_all_its_parameters() -> None:
    record = evaluated(steps=3, restarts=2, step_size="eps/2", eps="8/255", success="last")
    assert record.attack == "pgd"
    assert record.attack_params == {
        "steps": 3,
        "step_size": "eps/2",
        "restarts": 2,
        "random_start": True,
        "loss": "ce",
        "targets": 0,
        "decay": 0.0,
        "view": "predict",
    }
    assert record.success == "last"
    assert record.attack_label == "pgd[steps=3,step_size=eps/2,restarts=2,success=last]"
    assert (record.norm, record.eps) == ("linf", "8/255")
    assert record.eps_value == pytest.approx(8 / 255)


@pytest.mark.parametrize(("eps", "written"), [("8/255", "8/255"), (0.1, "0.1"), ("16/510", "16/510"), ("0", "0")])
def test_the_radius_is_told_as_it_was_written(eps: Any, written: str) -> None:
    assert evaluated(eps=eps).eps == written


def test_the_provenance_tells_versions_device_commit_and_seeds() -> None:
    provenance = evaluated(attack_seed=3, batch_size=20, search="bf16+fp32").provenance
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["versions"]["ensdef"] == ensdef.__version__
    assert provenance["device"] == "cpu"
    assert provenance["attack_seed"] == 3
    assert provenance["batch_size"] == 20
    assert provenance["search"] == "bf16+fp32"
    assert {"git_commit", "protocol", "date"} <= set(provenance)


def test_evaluating_writes_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluated().path is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("attack", ["pgd", "fgsm", "bim", "mim"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_any_attack_can_be_asked_for_in_either_norm(attack: str, norm: str) -> None:
    record = evaluated(attack=attack, norm=norm, eps=0.5 if norm == "l2" else 0.05)
    assert (record.attack, record.norm) == (attack, norm)
    assert record.robust_accuracy is not None
    assert record.clean_accuracy is not None
    assert record.robust_accuracy < record.clean_accuracy


def test_the_defaults_are_pgd_at_eight_of_255_with_fifty_steps() -> None:
    record = ensdef.evaluate(linear(), images(4), labels(linear(), images(4)), device="cpu")
    assert (record.attack, record.norm, record.eps, record.success) == ("pgd", "linf", "8/255", "any")
    assert record.attack_params["steps"] == 50
    assert record.attack_params["step_size"] == "eps/5"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_images_of_another_precision_are_taken_as_float32(dtype: torch.dtype) -> None:
    x = (images() * 16).round() / 16
    reference = evaluated(x=x)
    assert evaluated(x=x.to(dtype), y=labels(linear(), x)).outcomes == reference.outcomes


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_may_be_of_any_integer_type(dtype: torch.dtype) -> None:
    assert evaluated(y=labels(linear()).to(dtype)).outcomes == evaluated().outcomes


# --- the model ------------------------------------------------------------------------------------


def test_a_model_is_left_as_it_was() -> None:
    model = defence()
    y = labels(model)
    model.train()
    next(model.children()).eval()
    frozen = next(model.parameters()).requires_grad_(False)
    flags = [part.training for part in model.modules()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    evaluated(model, y=y)
    assert [part.training for part in model.modules()] == flags
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter for parameter in model.parameters() if not parameter.requires_grad] == [frozen]
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_a_model_in_train_mode_is_attacked_in_eval_mode() -> None:
    model = defence()
    reference = evaluated(model, y=labels(model))
    y = labels(model)
    assert evaluated(model.train(), y=y).outcomes == reference.outcomes


def test_gradients_a_model_already_has_stay() -> None:
    model = linear()
    model.weight.grad = torch.ones_like(model.weight)
    evaluated(model)
    assert torch.equal(model.weight.grad, torch.ones_like(model.weight))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
def test_a_model_evaluated_on_the_gpu_stays_on_the_cpu() -> None:
    model = defence()
    record = evaluated(model, device="cuda")
    assert record.provenance["device"] == "cuda"
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


# --- keys -----------------------------------------------------------------------------------------


def test_the_same_evaluation_has_the_same_key_and_the_same_result() -> None:
    first, second = evaluated(), evaluated()
    assert re.fullmatch("[0-9a-f]{64}", first.key)
    assert first.key == second.key
    assert first.outcomes == second.outcomes
    assert (first.forwards, first.backwards) == (second.forwards, second.backwards)


def test_batch_size_and_the_way_the_radius_is_written_do_not_enter_the_key() -> None:
    assert evaluated(batch_size=16).key == evaluated().key
    assert evaluated(eps="5/100").key == evaluated(eps="0.05").key == evaluated(eps=0.05).key


@pytest.mark.parametrize(
    "change",
    [
        {"attack": "bim"},
        {"steps": 4},
        {"restarts": 2},
        {"loss": "margin"},
        {"eps": "0.06"},
        {"norm": "l2"},
        {"success": "last"},
        {"search": "bf16"},
        {"attack_seed": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_about_the_attack_enters_the_key(change: dict[str, Any]) -> None:
    assert evaluated(**change).key != evaluated().key


def test_the_weights_enter_the_key() -> None:
    model, nudged = linear(), linear()
    with torch.no_grad():
        nudged.weight[0, 0] += 1e-6
    assert evaluated(nudged, y=labels(model)).key != evaluated(model, y=labels(model)).key


def test_buffers_enter_the_key() -> None:
    model, other = defence(), defence()
    for part in other.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            part.running_mean[0] += 0.5
            break
    y = labels(model)
    assert evaluated(model, y=y).key != evaluated(other, y=y).key


def test_the_combiner_enters_the_key_of_a_defence() -> None:
    assert evaluated(defence(), combiner="max").key != evaluated(defence()).key


def test_images_and_labels_enter_the_key() -> None:
    x, y = images(), labels(linear())
    assert evaluated(x=(x + 1e-3).clamp(0, 1), y=y).key != evaluated(y=y).key
    assert evaluated(y=y.flip(0)).key != evaluated(y=y).key


# --- what is refused ------------------------------------------------------------------------------


def changed(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[3, 0, 2, 2] = value
    return x


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (changed(images(), 1.01), "images must be in \\[0, 1\\], got values from .* to 1.01"),
        (changed(images(), -0.5), "images must be in \\[0, 1\\], got values from -0.5"),
        (changed(images(), math.nan), "images must be in \\[0, 1\\]"),
        (changed(images(), math.inf), "images must be in \\[0, 1\\]"),
        (images() * 255, "normalisation inside the model"),
        ((images() * 255).to(torch.uint8), "float tensor"),
        (images()[:0], "non-empty"),
        (images()[:, 0, 0, 0], "non-empty float tensor"),
        ([[0.5]], "float tensor"),
    ],
    ids=["above 1", "below 0", "NaN", "infinite", "0 to 255", "bytes", "empty", "flat", "a list"],
)
def test_images_that_are_none_are_refused(x: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        evaluated(x=x, y=torch.zeros(30, dtype=torch.long))


@pytest.mark.parametrize(
    "y",
    [
        torch.zeros(29, dtype=torch.long),
        torch.zeros(30),
        torch.zeros(30, CLASSES, dtype=torch.long),
        torch.tensor(0),
    ],
    ids=["another length", "floats", "one-hot", "a number"],
)
def test_labels_of_another_shape_or_type_are_refused(y: Tensor) -> None:
    with pytest.raises(UsageError, match="one integer label an image"):
        evaluated(y=y)


@pytest.mark.parametrize("label", [-1, CLASSES, 255])
def test_labels_the_model_has_no_score_for_are_refused(label: int) -> None:
    y = labels(linear())
    y[4] = label
    with pytest.raises(UsageError, match=f"{label}.*{CLASSES}"):
        evaluated(y=y)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"eps": 8}, "images are in \\[0, 1\\]; did you mean '8/255'"),
        ({"eps": "-0.1"}, "at least 0"),
        ({"eps": "much"}, "expected a number"),
        ({"eps": 9, "norm": "l2"}, "further apart than 8.00 in l2"),
        ({"norm": "l1"}, "unknown norm 'l1'"),
        ({"attack": "pdg"}, "unknown attack 'pdg'; did you mean 'pgd'"),
        ({"attack": "zzzzzz"}, "known: .*pgd"),
        ({"step": 4}, "pgd has no parameter 'step'; it has: steps, step_size"),
        ({"steps": "many"}, "steps"),
        ({"steps": -1}, "steps is -1; expected at least 0"),
        ({"restarts": 0}, "restarts is 0; expected at least 1"),
        ({"step_size": "eps*2"}, "step_size"),
        ({"loss": "hinge"}, "expected one of ce, margin, dlr, targeted, targeted_margin, targeted_dlr"),
        ({"success": "sometimes"}, "any, last"),
        ({"search": "fp16"}, "fp32, bf16"),
        ({"combiner": "median"}, "unknown combiner 'median'; expected native, avg, max, vote"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_refused_and_what_could_be_done_is_said(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        evaluated(**given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees a CUDA device here")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(UsageError, match="PyTorch sees no CUDA device"):
        evaluated(device="cuda")


# --- records as text ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["module", "defence"])
def test_a_record_survives_being_written_and_read(kind: str) -> None:
    record = evaluated(linear() if kind == "module" else defence("soe"))
    assert Record.from_json(record.to_json()) == record


def test_a_record_is_plain_json_with_the_outcomes_and_the_summary_has_all_but_those() -> None:
    record = evaluated()
    body = json.loads(record.to_json())
    assert body["outcomes"] == record.outcomes
    assert body["robust_accuracy"] == record.robust_accuracy
    fields = {field.name for field in dataclasses.fields(Record)}
    assert set(record.summary()) == fields - {"outcomes"}
    json.dumps(record.summary(), allow_nan=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("robust_accuracy", 0.99),
        ("clean_accuracy", 1.0),
        ("robust_accuracy", None),
        ("n", 29),
        ("outcomes", {"ids": [], "clean": [], "robust": []}),
        ("outcomes", {}),
    ],
)
def test_a_record_whose_numbers_contradict_its_outcomes_is_refused(field: str, value: Any) -> None:
    body = json.loads(evaluated().to_json())
    body[field] = value
    with pytest.raises(UsageError, match="contradicts the outcomes"):
        Record.from_json(json.dumps(body))


def test_a_record_with_one_outcome_turned_is_refused() -> None:
    body = json.loads(evaluated().to_json())
    body["outcomes"]["robust"][0] = 1 - body["outcomes"]["robust"][0]
    with pytest.raises(UsageError, match="contradicts the outcomes"):
        Record.from_json(json.dumps(body))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 0}', '{"format": 1}'])
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="delete the file"):
        Record.from_json(text)
