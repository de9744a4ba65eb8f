"""A small results folder with one of everything, for hostile inputs to be made of and tried on."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ensdef
from ensdef.checkpoints import SPEC, WEIGHTS, packed
from ensdef.health.catalogue import finding
from ensdef.keys import content_key
from ensdef.manifests import Manifests
from ensdef.measurement import Measurement, Measurements
from ensdef.records import Record, Store, with_outcomes, write_bytes, write_text

#: A protocol that every mutation starts from.
PROTOCOL = """
title = "Two defences"
version = 2
methods = ["nat", { call = "adv_en[]", members = 2 }]
dataset = "digits"
samples = 20
limit = 60
epochs = 1
eps = ["0.1", "1/5"]
train_eps = "0.2"
seeds = [0, 1]

[[attacks]]
call = "pgd[steps=2]"

[[attacks]]
call = "fgsm"
norm = "l2"
eps = "1.0"

[recipe]
lr = 0.05
attack = { steps = 2 }
""".replace("adv_en[]", "adv_en")


@dataclass(frozen=True)
class Victims:
    """Where things are.

    Args:
        folder: working directory; ``results`` is in it.
        record, measurement, manifest, checkpoint, pth: one file of each kind.
        protocol: text of a good protocol.
    """

    folder: Path
    results: Path
    record: Path
    measurement: Path
    manifest: Path
    checkpoint: Path
    pth: Path
    protocol: str


def make_victims(guarded: Path) -> Victims:
    """Build them in an empty folder."""
    results = guarded / "results"
    rng = random.Random(0)
    store = Store(results)
    made = [
        store.write(_record(method, attack, seed, rng))
        for method in ("nat", "soe")
        for attack in ("pgd", "mim")
        for seed in (0, 1)
    ]
    manifests = Manifests(results)
    manifests.write("grid", "A grid", made, extend=False)
    manifests.write("board", "A board", made, extend=False, kind="leaderboard")
    measured = Measurements(results).write(_measurement())
    manifests.write_measurements("measures", "Measures", [measured])
    checkpoint = results / "checkpoints" / "nat-ab"
    defense = ensdef.create_defense(
        "nat", architecture="small_resnet[width=4]", members=2, num_classes=3, image_shape=(1, 8, 8)
    )
    model = {**vars(defense.spec)}
    write_bytes(checkpoint / WEIGHTS, packed(defense.state_dict()))
    write_text(checkpoint / SPEC, json.dumps({"format": 1, "key": "ab", "model": model, "report": {"seconds": 1.0}}))
    pth = guarded / "theirs.pth"
    torch.save({f"model_{number}": member.state_dict() for number, member in enumerate(defense.members)}, pth)
    write_text(guarded / "outside" / "secret.json", json.dumps({"title": "secret", "records": []}))
    return Victims(
        guarded,
        results,
        Path(str(made[0].path)),
        Path(str(measured.path)),
        manifests.folder / "grid.json",
        checkpoint / SPEC,
        pth,
        PROTOCOL,
    )


def _record(method: str, attack: str, seed: int, rng: random.Random) -> Record:
    clean = [int(rng.random() < 0.9) for _ in range(24)]
    robust = [int(right and rng.random() < 0.5) for right in clean]
    blank = Record(
        key=content_key([method, attack, seed]),
        method=method,
        hyper={},
        label=method,
        dataset="digits",
        architecture="small_resnet",
        members=3,
        train_seed=seed,
        training={"key": content_key([method, seed]), "norm": "linf", "eps": "0.2", "recipe": {"epochs": 1}},
        attack=attack,
        attack_params={"steps": 2},
        attack_label=attack,
        success="any",
        norm="linf",
        eps="0.2",
        eps_value=0.2,
        combiner="native",
        n=len(clean),
        seconds=1.5,
        forwards=12.0,
        backwards=10.0,
        broken_by={"the decision": 3, "member0": 2},
        flags=[finding("uncertain", 0.2, "0.2 wide")],
        checkpoint="results/checkpoints/nat-ab",
        provenance={"protocol": "board-v1", "subset_checksum": "ab", "attack_seed": 0, "versions": {"torch": "2"}},
    )
    return with_outcomes(blank, list(range(len(clean))), clean, robust)


def _measurement() -> Measurement:
    fields: dict[str, Any] = dict.fromkeys(("norm", "eps", "eps_value", "architecture", "members"))
    return Measurement(
        key=content_key("measured"),
        name="training_cost",
        params={},
        call="training_cost",
        method="nat",
        hyper={},
        label="nat",
        dataset="digits",
        train_seed=0,
        training={},
        combiner="native",
        seed=0,
        n=10,
        values={"seconds": 1.25, "passes": 300.0},
        stderr={"seconds": 0.1},
        series={"loss": [[0, 1.0], [1, 0.5]]},
        **fields,
    )
