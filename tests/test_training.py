"""The training loop: every notion of the defence contract, reproducibility, and what happens when a loss breaks."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn
from toys_defense import (
    CLASSES,
    Probe,
    number,
    registered,
    same_weights,
    toy_data,
    toy_setting,
    toy_spec,
)

from ensdef import jobs
from ensdef.backend import safe_convolutions
from ensdef.build import build_defense, create_defense
from ensdef.checkpoints import LAST_GOOD, checkpoint_folder, fit, load_checkpoint, read_weights, training_report
from ensdef.data import Data
from ensdef.defense import Batch, EnsembleDefense, register_defense
from ensdef.errors import PluginError, TrainingDiverged, UsageError
from ensdef.loading import find_data
from ensdef.losses import cross_entropy, member_cross_entropy
from ensdef.progress import Progress
from ensdef.registry import METHODS
from ensdef.runner import Run, ensure_trained
from ensdef.specs import Setting, TrainSpec
from ensdef.training import Trained, train

DATA = toy_data()


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with registered():
        yield


def trained(method: str, hyper: Any = None, data: Data = DATA, **changes: Any) -> Trained:
    return train(toy_spec(method, data, hyper, **changes), data, device="cpu")


def untrained(method: str, **changes: Any) -> EnsembleDefense:
    spec = toy_spec(method, DATA, **changes)
    return build_defense(spec.model, spec.setting.seed)


def seen(probe: EnsembleDefense) -> list[tuple[Batch, float, float]]:
    assert isinstance(probe, Probe)
    return probe.seen


# --- registering ----------------------------------------------------------------------------------


def test_a_toy_is_found_while_registered_and_gone_afterwards() -> None:
    assert "toy_probe" in METHODS.names()
    with registered():  # registering the same class again is no clash
        assert METHODS.get("toy_probe") is Probe
    assert not [name for name in METHODS.names() if name.startswith("toy_")]


def test_what_is_no_defence_cannot_be_registered_as_one() -> None:
    with pytest.raises(PluginError, match=r"toy_module.*EnsembleDefense"):
        register_defense("toy_module")(nn.Linear)  # type: ignore[type-var]


# --- batches --------------------------------------------------------------------------------------


def test_every_epoch_sees_every_image_once_with_its_label() -> None:
    batches = [batch for batch, _, _ in seen(trained("toy_probe", epochs=2).defense)]
    assert [len(batch.y) for batch in batches] == [8] * 6
    for epoch in (batches[:3], batches[3:]):
        ids = torch.cat([batch.ids for batch in epoch])
        assert sorted(ids.tolist()) == list(range(24))
        assert torch.equal(torch.cat([batch.x for batch in epoch]), DATA.train.x(ids))
        assert torch.equal(torch.cat([batch.y for batch in epoch]), DATA.train.labels[ids])
    orders = [torch.cat([batch.ids for batch in epoch]).tolist() for epoch in (batches[:3], batches[3:])]
    assert orders[0] != orders[1] != list(range(24))


@pytest.mark.parametrize(
    ("images", "sizes"), [(24, [8, 8, 8]), (25, [8, 8, 8]), (26, [8, 8, 8, 2]), (7, [7]), (1, [1])]
)
def test_a_last_batch_of_one_image_is_dropped(images: int, sizes: list[int]) -> None:
    result = trained("toy_probe", data=toy_data(images))
    assert [len(batch.y) for batch, _, _ in seen(result.defense)] == sizes
    assert result.report["images_seen"] == sum(sizes)


def test_progress_is_the_fraction_of_all_steps_done() -> None:
    progress = [progress for _, progress, _ in seen(trained("toy_probe", epochs=2).defense)]
    assert progress == pytest.approx([step / 6 for step in range(6)])


def test_every_batch_has_randomness_of_its_own_that_the_seed_decides() -> None:
    def drawn(seed: int) -> list[float]:
        probe = trained("toy_probe", epochs=2, seed=seed).defense
        return [number(torch.rand((), generator=batch.rng)) for batch, _, _ in seen(probe)]

    assert len(set(drawn(0))) == 6
    assert drawn(0) == drawn(0)
    assert not set(drawn(0)) & set(drawn(1))


def test_augmentation_changes_the_images_of_a_batch_and_not_the_labels() -> None:
    for batch, _, _ in seen(trained("toy_probe", augment="crop+flip").defense):
        assert not torch.equal(batch.x, DATA.train.x(batch.ids))
        assert torch.equal(batch.y, DATA.train.labels[batch.ids])


def test_the_data_set_s_own_augmentation_is_the_default() -> None:
    for batch, _, _ in seen(trained("toy_probe", augment=None).defense):  # that of digits: none
        assert torch.equal(batch.x, DATA.train.x(batch.ids))


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(UsageError, match="blur"):
        trained("toy_probe", augment="blur")


def test_a_radius_drawn_per_batch_lies_in_its_interval_and_is_reproducible() -> None:
    eps = [[eps for _, _, eps in seen(trained("toy_probe", train_eps="uniform(0.05,0.1)").defense)] for _ in range(2)]
    assert eps[0] == eps[1]
    assert len(set(eps[0])) == 3
    assert all(0.05 <= value <= 0.1 for value in eps[0])


def test_a_defence_with_one_stream_gets_no_further_batches() -> None:
    assert all(batch.streams == () for batch, _, _ in seen(trained("toy_probe").defense))


def test_a_defence_with_two_streams_gets_two_independent_batches_a_step() -> None:
    batches = [batch for batch, _, _ in seen(trained("toy_two_streams", epochs=2).defense)]
    assert all(len(batch.streams) == 1 for batch in batches)
    index = {DATA.train.x(slice(i, i + 1)).numpy().tobytes(): i for i in range(24)}

    def ids(x: Tensor) -> list[int]:
        return [index[image[None].contiguous().numpy().tobytes()] for image in x]

    first = [position for batch in batches for position in ids(batch.x)]
    second = [position for batch in batches for position in ids(batch.streams[0][0])]
    for order in (first, second):
        assert sorted(order[:24]) == sorted(order[24:]) == list(range(24))
    assert first != second
    assert torch.equal(torch.cat([batch.streams[0][1] for batch in batches]), DATA.train.labels[second])
    # the first stream is the one a defence with a single stream would see
    single = seen(trained("toy_probe", epochs=2).defense)
    assert first == torch.cat([batch.ids for batch, _, _ in single]).tolist()


# --- steps ----------------------------------------------------------------------------------------


def test_every_dict_a_defence_yields_is_one_optimiser_step() -> None:
    value = 1.0
    for _ in range(3):  # batches; SGD with rate 0.05 on the number, then on its square at the moved number
        value -= 0.05
        value -= 0.05 * 2 * value
    defense = trained("toy_two_steps", momentum=0, weight_decay=0).defense
    assert number(defense.number) == pytest.approx(value, rel=1e-6)


def test_terms_of_one_dict_are_summed_in_one_step() -> None:
    value = 1.0
    for _ in range(3):
        value -= 0.05 * (1 + 2 * value)
    defense = trained("toy_one_step", momentum=0, weight_decay=0).defense
    assert number(defense.number) == pytest.approx(value, rel=1e-6)


def test_the_report_holds_the_mean_of_every_term_by_epoch() -> None:
    history = trained("toy_two_steps", momentum=0, weight_decay=0, epochs=2).report["history"]
    assert [sorted(terms) for terms in history] == [["first", "second"]] * 2
    value, means = 1.0, []
    for _ in range(2):
        first = second = 0.0
        for _ in range(3):
            first += value / 3
            value -= 0.05
            second += value**2 / 3
            value -= 0.05 * 2 * value
        means.append({"first": first, "second": second})
    assert history[0] == pytest.approx(means[0], rel=1e-5)
    assert history[1] == pytest.approx(means[1], rel=1e-5)


@pytest.mark.parametrize(
    ("recipe", "rates"),
    [
        ({"schedule": "constant"}, [0.05] * 12),
        ({"schedule": "step", "milestones": (0.5, 0.75), "gamma": 0.1}, [0.05] * 6 + [0.005] * 3 + [0.0005] * 3),
        ({"schedule": "cosine"}, [0.025 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]),
        (
            {"schedule": "onecycle"},
            [0.05 * (step / 3.6 if step < 3.6 else (12 - step) / 8.4) for step in range(12)],
        ),
    ],
    ids=lambda value: value.get("schedule") if isinstance(value, dict) else "",
)
def test_the_schedule_reaches_the_optimiser(recipe: dict[str, Any], rates: list[float]) -> None:
    defense = trained("toy_slope", epochs=4, momentum=0, weight_decay=0, **recipe).defense
    path = [*defense.path, number(defense.number)]
    assert [before - after for before, after in pairwise(path)] == pytest.approx(rates, abs=1e-6)


def test_momentum_and_weight_decay_reach_the_optimiser() -> None:
    value, velocity = 1.0, 0.0
    for _ in range(3):
        velocity = 0.5 * velocity + 1.0 + 0.2 * value
        value -= 0.05 * velocity
    defense = trained("toy_slope", momentum=0.5, weight_decay=0.2).defense
    assert number(defense.number) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_optimiser_over_separable_terms_equals_one_optimiser_a_member(optimizer: str) -> None:
    settings: dict[str, Any] = {"optimizer": optimizer, "lr": 0.05 if optimizer == "sgd" else 1e-3, "epochs": 2}
    together = trained("toy_probe", **settings).defense
    apart = untrained("toy_probe", **settings).train()
    for member in apart.members:
        if optimizer == "sgd":
            own: Any = torch.optim.SGD(member.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        else:
            own = torch.optim.Adam(member.parameters(), lr=1e-3, weight_decay=1e-4, eps=1e-7)
        for batch, _, _ in seen(together):
            own.zero_grad()
            with safe_convolutions(member, torch.device("cpu")):
                cross_entropy(member(batch.x), batch.y).mean().backward()
            own.step()
    for name, value in together.state_dict().items():
        torch.testing.assert_close(apart.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)
    assert not same_weights(together, untrained("toy_probe"))


def test_training_lowers_the_loss() -> None:
    history = trained("nat", epochs=15, lr=0.1).report["history"]
    assert history[-1]["ce"] < history[0]["ce"] / 2


# --- what hangs on a defence ----------------------------------------------------------------------


def test_a_further_module_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    _, setting = real_setting()
    spec = TrainSpec.create("toy_extra", {}, setting)
    folder = ensure_trained(spec, Run(tmp_path), Progress())
    weight = read_weights(folder / "weights.safetensors")["extra.weight"]
    assert not torch.equal(weight, build_defense(spec.model, setting.seed).extra.weight)
    assert torch.equal(load_checkpoint(folder).extra.weight, weight)


def test_what_is_not_trainable_stays_bit_identical_with_its_buffers() -> None:
    before, after = untrained("toy_first_only"), trained("toy_first_only", epochs=2).defense
    assert same_weights(before.members[1], after.members[1])
    names = dict(after.members[1].named_buffers())
    assert any(name.endswith("running_mean") for name in names)
    moved, still = after.members[0].state_dict(), before.members[0].state_dict()
    for name in moved:
        if not name.startswith("normalize"):
            assert not torch.equal(moved[name], still[name]), name


def test_what_is_not_trainable_stays_even_while_attacks_run_in_train_mode() -> None:
    class Attacked(METHODS.get("adv_en")):  # type: ignore[misc]
        trainable = METHODS.get("toy_first_only").trainable

    register_defense("toy_attacked")(Attacked)
    try:
        result = trained("toy_attacked", attack={"steps": 2, "batch_norm": "train"}).defense
        assert same_weights(untrained("toy_attacked").members[1], result.members[1])
    finally:
        METHODS._registered.pop("toy_attacked")


def test_begin_epoch_is_called_once_before_each_epoch_with_reproducible_randomness() -> None:
    calls = trained("toy_epochs", epochs=3).defense.calls
    assert [call[0] for call in calls] == ["epoch", "batch", "batch", "batch"] * 3
    epochs = [call for call in calls if call[0] == "epoch"]
    assert [epoch[1] for epoch in epochs] == [0, 1, 2]
    assert {epoch[2] for epoch in epochs} == {"cpu"}
    assert len({epoch[3] for epoch in epochs}) == 3
    assert trained("toy_epochs", epochs=3).defense.calls == calls
    assert trained("toy_epochs", epochs=3, seed=1).defense.calls != calls


def test_a_hyper_parameter_may_name_another_defence_which_is_built_through_the_registry() -> None:
    defense = create_defense("toy_wrapper", base="soe", architecture="resnet8", members=2, num_classes=CLASSES)
    assert type(defense.base) is METHODS.get("soe")
    assert defense.members is defense.base.members
    assert len(defense.views()) == 5
    names = list(defense.state_dict())
    assert names
    assert all(name.startswith("base.") for name in names), "every tensor once, under its owner"
    with pytest.raises(UsageError, match=r"natt.*'nat'"):
        create_defense("toy_wrapper", base="natt", architecture="resnet8")


@pytest.mark.parametrize("base", ["nat", "adv_en", "soe"])
def test_a_wrapped_defence_trains_and_is_loaded_again(base: str, tmp_path: Path) -> None:
    _, setting = real_setting()
    spec = TrainSpec.create("toy_wrapper", {"base": base}, setting)
    folder = ensure_trained(spec, Run(tmp_path), Progress())
    defense = load_checkpoint(folder)
    assert type(defense.base) is METHODS.get(base)
    assert not same_weights(defense, build_defense(spec.model, setting.seed))
    assert {name[:5] for name in training_report(folder)["history"][0]} == {"base_"}


def test_a_loss_of_half_the_size_moves_half_as_far() -> None:
    settings = {"momentum": 0, "weight_decay": 0, "batch_size": 24}
    wrapped = trained("toy_wrapper", **settings, lr=0.1).defense
    plain = trained("nat", **settings, lr=0.05).defense
    for value, other in zip(wrapped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-6)


# --- prerequisites --------------------------------------------------------------------------------


def real_setting(**changes: Any) -> tuple[Data, Setting]:
    """The digits as the runner loads them, few of them."""
    data, spec = find_data("digits", limit=24)
    return data, dataclasses.replace(toy_setting(DATA, **changes), data=spec)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods that the runner trains, in order."""
    methods: list[str] = []

    def counting(spec: TrainSpec, *args: Any, **options: Any) -> Trained:
        methods.append(spec.method)
        return train(spec, *args, **options)

    monkeypatch.setattr(jobs, "train", counting)
    return methods


def test_a_prerequisite_is_trained_first_and_once_and_handed_over(tmp_path: Path, trainings: list[str]) -> None:
    _, setting = real_setting(lr=0)
    spec = TrainSpec.create("toy_finetuned", {}, setting)
    folder = ensure_trained(spec, Run(tmp_path), Progress())
    assert trainings == ["nat", "toy_finetuned"]
    assert ensure_trained(spec, Run(tmp_path), Progress()) == folder
    ensure_trained(spec.prerequisites["base"], Run(tmp_path), Progress())
    assert trainings == ["nat", "toy_finetuned"]
    base = load_checkpoint(checkpoint_folder(tmp_path, spec.prerequisites["base"]))
    for name, value in load_checkpoint(folder).named_parameters():  # its own rate is 0
        assert torch.equal(value, dict(base.named_parameters())[name])


def test_warm_starting_begins_where_the_prerequisite_ended(tmp_path: Path) -> None:
    data, setting = real_setting()
    spec = TrainSpec.create("toy_finetuned", {"base_seed": 7}, setting)
    base = train(spec.prerequisites["base"], data, device="cpu").defense
    kept = copy.deepcopy(base)
    tuned = train(spec, data, {"base": base}, device="cpu").defense
    assert same_weights(base, kept), "the prerequisite itself is left alone"
    scratch = train(TrainSpec.create("toy_plain", {}, setting), data, device="cpu").defense
    assert not same_weights(tuned, scratch)
    with torch.no_grad():
        losses = [
            number(member_cross_entropy(d.eval().member_logits(data.train.x()), data.train.labels).mean())
            for d in (tuned, scratch)
        ]
    assert losses[0] < losses[1], "two epochs in all beat one"


def test_a_prerequisite_s_key_is_that_of_its_own_row_overrides_included(tmp_path: Path, trainings: list[str]) -> None:
    _, setting = real_setting(epochs=2, lr=0.02, members=3, seed=4, architecture="small_resnet[width=2]")
    spec = TrainSpec.create("toy_finetuned", {}, setting)
    row = TrainSpec.create("nat", {}, setting)
    assert spec.prerequisites["base"].key == row.key
    assert TrainSpec.create("toy_finetuned", {"base_seed": 5}, setting).prerequisites["base"].key == (
        TrainSpec.create("nat", {}, dataclasses.replace(setting, seed=5)).key
    )
    ensure_trained(row, Run(tmp_path), Progress())
    ensure_trained(spec, Run(tmp_path), Progress())
    assert trainings == ["nat", "toy_finetuned"]
    described = json.loads((checkpoint_folder(tmp_path, spec) / "spec.json").read_text())
    assert described["prerequisites"] == {"base": row.key}


def test_another_prerequisite_gives_another_key() -> None:
    keys = {toy_spec("toy_finetuned", DATA, {"base_seed": seed}).key for seed in (None, 0, 1)}
    assert len(keys) == 3  # the hyper-parameter itself enters, too
    assert toy_spec("toy_finetuned", DATA).key != toy_spec("toy_plain", DATA).key


# --- reproducibility ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nat", "adv_en", "adp", "soe"])
def test_the_same_specification_gives_the_same_weights_bit_for_bit(method: str) -> None:
    first = trained(method, train_eps="uniform(0.05,0.1)", augment="crop+flip").defense
    torch.rand(17)
    assert same_weights(first, trained(method, train_eps="uniform(0.05,0.1)", augment="crop+flip").defense)


@pytest.mark.parametrize("architecture", ["small_resnet[width=4]", "cce_mnist"])
def test_the_global_random_state_is_neither_read_nor_moved(architecture: str) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(trained("nat", architecture=architecture, members=1).defense)  # cce_mnist has dropout
        assert torch.equal(torch.get_rng_state(), before)
    assert same_weights(*results)


@pytest.mark.parametrize("method", ["nat", "adv_en"])
def test_another_seed_gives_other_weights(method: str) -> None:
    assert not same_weights(trained(method, seed=0).defense, trained(method, seed=1).defense)


def test_the_seed_decides_the_order_of_the_images_as_well_as_the_initial_weights() -> None:
    orders = [
        torch.cat([batch.ids for batch, _, _ in seen(trained("toy_probe", seed=seed).defense)]).tolist()
        for seed in (0, 1)
    ]
    assert orders[0] != orders[1]
    assert not same_weights(untrained("nat", seed=0), untrained("nat", seed=1))


def test_members_start_from_different_weights() -> None:
    one, other = untrained("nat").members
    assert not same_weights(one, other)


def test_a_trained_defence_is_an_ordinary_module_in_eval_mode() -> None:
    defense = trained("adv_en").defense
    assert not any(module.training for module in defense.modules())
    assert all(tensor.device.type == "cpu" for tensor in defense.state_dict().values())
    assert all(tensor.is_contiguous() for tensor in defense.state_dict().values())
    x = DATA.train.x()
    assert torch.equal(defense(x), defense.predict(x))
    with pytest.raises(RuntimeError, match="lent by the trainer"):
        defense.adversary(defense, x, DATA.train.labels)


def test_reduced_precision_trains_to_finite_weights_in_full_precision() -> None:
    defense = trained("adv_en", precision="bf16", epochs=2).defense
    assert all(value.dtype == torch.float32 for value in defense.parameters())
    assert all(bool(torch.isfinite(value).all()) for value in defense.parameters())
    assert not same_weights(defense, trained("adv_en", epochs=2).defense)


@pytest.mark.parametrize(
    ("method", "hyper"), [("soe", {}), ("soe", {"variant": "code"}), ("adp", {}), ("toy_two_steps", {})]
)
def test_every_loss_runs_in_reduced_precision(method: str, hyper: dict[str, Any]) -> None:
    history = trained(method, hyper, precision="bf16").report["history"]
    assert all(math.isfinite(value) for value in history[0].values())


def test_an_attack_that_never_happens_does_not_matter() -> None:
    specs = [{"train_eps": eps, "attack": {"steps": steps}} for eps, steps in (("0.1", 1), ("0.2", 3))]
    natural = [trained("nat", **changes).defense for changes in specs]
    assert same_weights(*natural)
    attacked = [trained("adv_en", **changes).defense for changes in specs]
    assert not same_weights(*attacked)


# --- keeping the best epoch -----------------------------------------------------------------------


def zeros(count: int = 40) -> Data:
    """Images that all belong to class 0."""
    data = toy_data(count)
    data.train.labels.zero_()
    return data


@pytest.mark.parametrize(("keep", "epoch"), [("best", 1), ("last", 2)])
def test_the_recipe_says_which_epoch_is_kept(keep: str, epoch: int) -> None:
    data = zeros()
    result = trained("toy_best_in_the_middle", data=data, epochs=3, keep=keep)
    assert int(result.defense.epoch) == epoch
    robust = [terms.get("holdout_robust_accuracy") for terms in result.report["history"]]
    assert robust == ([0.0, 1.0, 0.0] if keep == "best" else [None] * 3)
    assert keep in result.report["kept"]


def test_held_out_images_are_a_tenth_and_are_not_trained_on() -> None:
    batches = [batch for batch, _, _ in seen(trained("toy_probe", data=toy_data(40), keep="best", epochs=2).defense)]
    used = {image[None].contiguous().numpy().tobytes() for batch in batches for image in batch.x}
    assert len(used) == 36


def test_the_held_out_score_is_under_attack() -> None:
    """The same weights score worse at a larger radius."""
    scores = []
    for eps in ("0", "0.5"):
        result = trained(
            "nat", data=toy_data(200), keep="best", epochs=8, train_eps=eps, attack={"steps": 3}, lr=0.1, batch_size=50
        )
        scores.append(max(terms["holdout_robust_accuracy"] for terms in result.report["history"]))
    assert scores[1] < scores[0]


# --- divergence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_loss_that_breaks_names_term_epoch_and_batch(value: str) -> None:
    with pytest.raises(TrainingDiverged, match=f"'broken' is {value} in epoch 1, batch 2"):
        trained("toy_diverging", {"epoch": 1, "batch": 2, "value": value}, epochs=3)


def test_a_break_before_the_last_step_of_a_batch_is_named_just_as_well() -> None:
    with pytest.raises(TrainingDiverged, match="'broken' is inf in epoch 0, batch 1"):
        trained("toy_diverging", {"epoch": 0, "batch": 1, "steps": 2})


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_loss_that_breaks_hands_over_the_weights_of_the_last_good_epoch(epoch: int) -> None:
    spec = toy_spec("toy_diverging", DATA, {"epoch": epoch}, epochs=3)
    with pytest.raises(TrainingDiverged) as caught:
        train(spec, DATA, device="cpu")
    weights = load(caught.value.last_good)
    good = build_defense(spec.model, 0)
    if epoch:
        sound = toy_spec("toy_diverging", DATA, {"epoch": 9}, epochs=epoch)
        good = train(sound, DATA, device="cpu").defense
    assert weights.keys() == good.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in good.state_dict().items())


def test_the_runner_writes_the_last_good_weights_and_says_where(tmp_path: Path) -> None:
    _, setting = real_setting(epochs=2)
    spec = TrainSpec.create("toy_diverging", {"epoch": 1}, setting)
    with pytest.raises(TrainingDiverged, match=rf"epoch 1.*{LAST_GOOD}"):
        ensure_trained(spec, Run(tmp_path), Progress())
    path = checkpoint_folder(tmp_path, spec) / LAST_GOOD
    defense = build_defense(spec.model, seed=9)
    fit(defense, read_weights(path), path)
    assert all(bool(torch.isfinite(value).all()) for value in defense.state_dict().values())
    assert number(defense.number) < 1, "one epoch was learned"


def test_a_training_that_broke_is_tried_again(tmp_path: Path, trainings: list[str]) -> None:
    _, setting = real_setting()
    spec = TrainSpec.create("toy_diverging", {"epoch": 0}, setting)
    for _ in range(2):
        with pytest.raises(TrainingDiverged):
            ensure_trained(spec, Run(tmp_path), Progress())
    assert len(trainings) == 2


# --- what enters a training's key -----------------------------------------------------------------


def test_radius_and_inner_attack_enter_the_key_of_a_training_that_attacks() -> None:
    keys = {
        toy_spec("adv_en", DATA, **changes).key
        for changes in ({}, {"train_eps": "0.2"}, {"norm": "l2"}, {"attack": {"steps": 2}})
    }
    assert len(keys) == 4


def test_radius_and_inner_attack_do_not_enter_the_key_of_one_that_does_not() -> None:
    keys = {
        toy_spec(method, DATA, hyper, **changes).key
        for changes in ({}, {"train_eps": "0.2"}, {"norm": "l2"}, {"attack": {"steps": 2}})
        for method, hyper in (("nat", {}),)
    }
    assert len(keys) == 1
    silent = {toy_spec("adp", DATA, {"adversarial": "none"}, train_eps=eps).key for eps in ("0.1", "0.2")}
    assert len(silent) == 1


def test_where_the_best_epoch_under_attack_is_kept_radius_and_attack_enter_every_key() -> None:
    keys = {
        toy_spec("nat", DATA, keep="best", **changes).key
        for changes in ({}, {"train_eps": "0.2"}, {"norm": "l2"}, {"attack": {"steps": 2}})
    }
    assert len(keys) == 4


def test_the_adversary_a_toy_meets_is_bounded_by_the_specification() -> None:
    """An end-to-end check that radius and norm reach the inner loop."""
    distances: list[float] = []

    class Watching(METHODS.get("adv_en")):  # type: ignore[misc]
        def adversary(self, objective: Any, x: Tensor, y: Tensor | None = None, **options: Any) -> Tensor:
            x_adv = super().adversary(objective, x, y, **options)
            distances.append(number((x_adv - x).flatten(1).norm(dim=1).max()))
            return x_adv

    register_defense("toy_watching")(Watching)
    try:
        trained("toy_watching", norm="l2", train_eps="0.25", attack={"steps": 5, "step_size": "eps"})
    finally:
        METHODS._registered.pop("toy_watching")
    assert len(distances) == 3
    assert max(distances) == pytest.approx(0.25, abs=1e-4)
