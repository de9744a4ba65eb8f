"""Transfer: images crafted on surrogates, once, and offered to every defence alike."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import ensdef
import ensdef.cli.inspect
import ensdef.cli.plugins
import ensdef.cli.run
from ensdef.adversarial_sets import AdversarialSets
from ensdef.attack_spec import AttackSpec
from ensdef.checkpoints import packed, read_weights
from ensdef.cli import cli
from ensdef.defense import Batch, EnsembleDefense, Terms
from ensdef.errors import DataError, UsageError
from ensdef.harness import Outcome, attack_model
from ensdef.loading import find_data
from ensdef.records import write_bytes
from ensdef.registry import ATTACKS
from ensdef.specs import Setting, TrainSpec
from ensdef.testing import LinearClassifier

SMALL = {"attacks": ("mim",), "steps": 8}


class Mean(EnsembleDefense):
    """A plain ensemble."""

    def loss(self, batch: Batch, progress: float) -> Terms:
        raise NotImplementedError


def ensemble(seed: int = 0) -> Mean:
    generator = torch.Generator().manual_seed(seed)
    return Mean([LinearClassifier(torch.randn(4, 64, generator=generator)) for _ in range(3)])


def images(count: int = 40) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def offered(
    model: Mean, surrogate: Mean, eps: float, sets: AdversarialSets | None = None, name: str = "transfer", **params: Any
) -> Outcome:
    x = images()
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    spec = AttackSpec.create(name, {**SMALL, **params}, "linf", eps)
    return attack_model(model, x, y, spec, prerequisites={"nat x 3": surrogate}, sets=sets)


def test_from_the_defence_itself_transfer_is_the_white_box_attack() -> None:
    model, x = ensemble(), images()
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    white = attack_model(model, x, y, AttackSpec.create("mim", {"steps": 8, "success": "last"}, "linf", 0.05))
    outcome = offered(model, ensemble(), 0.05)
    assert 0 < int(outcome.robust.sum()) < len(x)
    assert torch.equal(outcome.robust, white.robust)


def test_from_another_ensemble_it_is_weaker_and_costs_the_target_one_pass_a_variant() -> None:
    outcome = offered(ensemble(), ensemble(seed=5), 0.05)
    assert int(outcome.robust.sum()) > int(offered(ensemble(), ensemble(), 0.05).robust.sum())
    assert (outcome.forwards, outcome.backwards) == (40 * 3, 0)
    assert outcome.broken_by == {"nat x 3, mim, ce": int((~outcome.robust).sum())}


def test_images_are_robust_only_if_they_withstand_every_variant() -> None:
    both = offered(ensemble(), ensemble(seed=5), 0.1, losses=("ce", "margin"))
    alone = [offered(ensemble(), ensemble(seed=5), 0.1, losses=(loss,)) for loss in ("ce", "margin")]
    assert torch.equal(both.robust, alone[0].robust & alone[1].robust)


def test_sets_are_crafted_once_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = offered(ensemble(), ensemble(seed=5), 0.1, AdversarialSets(tmp_path))
    stored = sorted(path.name for path in (tmp_path / "adversarial_sets").iterdir())
    assert [Path(name).suffix for name in stored] == ["", ".safetensors", ".json"], "claims, images, manifest"
    module = __import__(ATTACKS.get("transfer").__module__, fromlist=["craft"])
    monkeypatch.setattr(module, "craft", lambda *args, **kwargs: pytest.fail("crafted again"))
    again = offered(ensemble(), ensemble(seed=5), 0.1, AdversarialSets(tmp_path))
    assert torch.equal(first.x_adv, again.x_adv)
    manifest = json.loads((tmp_path / "adversarial_sets" / stored[2]).read_text())
    assert manifest["surrogate"] == "nat x 3"
    assert manifest["attack"]["eps"] == "1/10"
    assert len(manifest["weights"]) == len(manifest["sha256"]) == 64


@pytest.mark.parametrize(
    ("damage", "told"), [("altered", "was altered"), ("missing", "are missing"), ("text", "no manifest")]
)
def test_a_damaged_set_is_refused(tmp_path: Path, damage: str, told: str) -> None:
    offered(ensemble(), ensemble(seed=5), 0.1, AdversarialSets(tmp_path))
    _, content, manifest = sorted((tmp_path / "adversarial_sets").iterdir())
    if damage == "altered":
        content.write_bytes(content.read_bytes()[:-1] + b"\x01")
    elif damage == "missing":
        content.unlink()
    else:
        manifest.write_text("{}")
    with pytest.raises(DataError, match=told) as caught:
        offered(ensemble(), ensemble(seed=5), 0.1, AdversarialSets(tmp_path))
    assert f"delete {manifest.name}" in str(caught.value)

    told_of: list[str] = []
    again = offered(ensemble(), ensemble(seed=5), 0.1, AdversarialSets(tmp_path, told_of.append))
    assert len(told_of) == 1
    assert manifest.with_name(f"{manifest.name}.damaged-1").is_file()
    fresh = offered(ensemble(), ensemble(seed=5), 0.1, AdversarialSets(tmp_path))
    assert torch.equal(again.x_adv, fresh.x_adv), "the next one finds it whole"


def test_a_set_that_another_process_crafts_is_waited_for_and_not_crafted_twice(tmp_path: Path) -> None:
    made, crafted = {"surrogate": "nat x 3"}, []

    def craft_slowly() -> Tensor:
        crafted.append(threading.get_ident())
        time.sleep(0.3)
        return images(2)

    found: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(AdversarialSets(tmp_path).get(made, "a" * 64, craft_slowly)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(crafted) == 1
    assert all(torch.equal(one, found[0]) for one in found)


def test_a_set_of_a_surrogate_that_was_trained_anew_to_other_weights_is_crafted_again(tmp_path: Path) -> None:
    made_from = {"surrogate": "nat x 3", "trained as": "0" * 64}
    told: list[str] = []
    sets = AdversarialSets(tmp_path, told.append)
    sets.get(made_from, "a" * 64, lambda: images(2))
    assert torch.equal(sets.get(made_from, "b" * 64, lambda: images(3)), images(3))
    assert "the surrogate now has bbbbbbbbbbbbbbbb" in told[0]


def test_a_surrogate_altered_since_is_refused(tmp_path: Path) -> None:
    made_from = {"surrogate": "nat x 3", "trained as": "0" * 64}
    sets = AdversarialSets(tmp_path)
    sets.get(made_from, "a" * 64, lambda: images(2))
    with pytest.raises(DataError, match="weights aaaaaaaaaaaaaaaa, but the surrogate now has bbbbbbbbbbbbbbbb"):
        sets.get(made_from, "b" * 64, lambda: images(2))


def test_without_its_surrogate_the_attack_says_which_is_missing() -> None:
    model, x = ensemble(), images()
    with pytest.raises(UsageError, match=r"no surrogate nat x 3; .* prerequisites"):
        ensdef.evaluate(model, x, torch.zeros(len(x), dtype=torch.int64), attack="transfer", eps=0.1)


def test_evaluate_takes_surrogates() -> None:
    model, x = ensemble(), images()
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    found = [
        ensdef.evaluate(model, x, y, attack="transfer", eps=0.05, prerequisites={"nat x 3": surrogate}, **SMALL)
        for surrogate in (ensemble(), ensemble(seed=5))
    ]
    assert float(found[0].robust_accuracy or 0) < float(found[1].robust_accuracy or 0)
    assert found[0].key != found[1].key


# --- the published sets ---------------------------------------------------------------------------


def variants(name: str) -> list[str]:
    return [variant.name for variant in ATTACKS.get(name)().variants()]


def test_transfer3_is_one_ensemble_of_three_and_three_ways_to_craft() -> None:
    assert variants("transfer3") == [
        "nat x 3, mim[random_start=true], ce",
        "nat x 3, sgm, ce",
        "nat x 3, m_fgsm, ce",
    ]


def test_transfer30_is_thirty_variants_and_holds_the_three() -> None:
    found = variants("transfer30")
    assert len(found) == len(set(found)) == 30
    assert set(variants("transfer3")) <= set(found)
    assert sum("start 3" in name for name in found) == 3 * 2


def test_surrogates_are_plain_ensembles_from_hold_out_seeds() -> None:
    _, spec = find_data("digits", limit=100)
    training = TrainSpec.create("adv", {}, Setting(spec, "small_resnet", 3, "linf", "0.2", {"epochs": 1}))
    attack = ATTACKS.get("transfer30")
    needed = attack.prerequisites(attack.Params(), training)
    assert {role: (found.method, found.model.members) for role, found in needed.items()} == {
        "nat x 3": ("nat", 3),
        "nat x 5": ("nat", 5),
        "nat x 8": ("nat", 8),
    }
    assert {found.setting.seed for found in needed.values()} == {10_000}


def test_every_defence_meets_the_same_surrogates() -> None:
    _, spec = find_data("digits", limit=100)
    keys = set()
    for method, seed, eps in (("adv", 0, "0.2"), ("nat", 1, "0.1"), ("soe", 2, "0.3")):
        training = TrainSpec.create(method, {}, Setting(spec, "small_resnet", 3, "linf", eps, {"epochs": 1}, seed=seed))
        attack = ATTACKS.get("transfer3")
        keys |= {found.key for found in attack.prerequisites(attack.Params(), training).values()}
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("transfer[surrogates=nobody]", "unknown method 'nobody'"),
        ("transfer[attacks=fog]", "fog is no gradient attack"),
        ("transfer[attacks=mim[steps=5]]", "set losses and steps of transfer"),
        ("transfer[attacks=mim[stride=5]]", "mim has no parameter 'stride'"),
        ("transfer[members=0]", "members is 0"),
        ("transfer[starts=0]", "starts is 0"),
        ("transfer[steps=0]", "steps is 0"),
        ("transfer[losses=cw]", "expected one of ce, margin"),
    ],
)
def test_what_cannot_be_crafted_is_refused_before_training(tmp_path: Path, call: str, told: str) -> None:
    result = CliRunner().invoke(cli, ["bench", "--method", "nat", "--attack", call, "--results", str(tmp_path)])
    assert result.exit_code == 2
    assert told in result.output
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_the_command_trains_the_surrogate_crafts_and_offers(tmp_path: Path) -> None:
    call = "transfer[attacks=mim,steps=5,members=2]"
    arguments = ["bench", "--method", "nat,adv", "--attack", call, "--epochs", "1", "--limit", "200", "--samples", "40"]
    result = CliRunner().invoke(cli, [*arguments, "--results", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    assert len(list((tmp_path / "adversarial_sets").glob("*.json"))) == 1, "both defences meet the same images"

    (surrogate,) = [path for path in (tmp_path / "checkpoints").iterdir() if trained_from(path) == 10_000]
    weights = read_weights(surrogate / "weights.safetensors")
    write_bytes(surrogate / "weights.safetensors", packed({name: 0.9 * value for name, value in weights.items()}))
    again = CliRunner().invoke(cli, [*arguments, "--seed", "1", "--results", str(tmp_path)])
    assert again.exit_code == 0, again.output
    assert again.output.count("set aside") == 1, "the surrogate is trained again to the same weights, so its set stands"
    assert read_weights(surrogate / "weights.safetensors").keys() == weights.keys()
    assert all(torch.equal(read_weights(surrogate / "weights.safetensors")[name], weights[name]) for name in weights)


def test_the_code_of_the_crafting_attacks_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = AttackSpec.create("transfer", {}, "linf", 0.1).identity()
    assert set(before["uses"]) == {"mim"}
    assert set(AttackSpec.create("transfer3", {}, "linf", 0.1).identity()["uses"]) == {"m_fgsm", "mim", "sgm"}
    assert "uses" not in AttackSpec.create("mim", {}, "linf", 0.1).identity()
    monkeypatch.setattr("ensdef.attack_spec.code_hash", lambda plugin: f"changed {plugin.__name__}")
    assert AttackSpec.create("transfer", {}, "linf", 0.1).identity()["uses"] != before["uses"]


def trained_from(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / "spec.json").read_text())["setting"]["seed"])
