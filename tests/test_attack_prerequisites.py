"""An attack may name trainings it needs: they are trained once, handed over, and part of the cell's key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ensdef.attack import IterativeAttack, State, register_attack
from ensdef.attack_spec import AttackSpec
from ensdef.defense import EnsembleDefense
from ensdef.loading import attacked_subset, find_data
from ensdef.losses import cross_entropy
from ensdef.registry import ATTACKS
from ensdef.rng import KeyedRandom
from ensdef.runner import Run, run_cells
from ensdef.specs import Cell, Setting, TrainSpec
from ensdef.target import Target
from ensdef.threat import Threat

NAME = "toy_surrogate_step"


@pytest.fixture(autouse=True)
def surrogate_attack() -> Iterator[None]:
    """One gradient step on a plain ensemble trained with another seed."""

    class SurrogateStep(IterativeAttack):
        @property
        def steps(self) -> int:
            return 1

        @classmethod
        def prerequisites(cls, params: Any, training: TrainSpec) -> Mapping[str, TrainSpec]:
            return {"surrogate": training.derive("nat", seed=10_000)}

        def warm_start(self, prerequisites: Mapping[str, EnsembleDefense]) -> None:
            self.surrogate = prerequisites["surrogate"]

        def step(
            self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
        ) -> tuple[Tensor, State]:
            x_adv = x_adv.detach().requires_grad_()
            gradient = torch.autograd.grad(cross_entropy(self.surrogate(x_adv), y).sum(), x_adv)[0]
            return x_adv.detach() + threat.eps * gradient.sign(), state

    register_attack(NAME)(SurrogateStep)
    yield
    ATTACKS._registered.pop(NAME)


def cell(name: str = NAME) -> Cell:
    data, spec = find_data("digits", limit=120)
    recipe = {"epochs": 2, "batch_size": 30, "lr": 0.1, "schedule": "onecycle"}
    setting = Setting(spec, "small_resnet[width=4]", 2, "linf", "0.2", recipe)
    test, _ = attacked_subset(data, 30)
    attack = AttackSpec.create(name, {}, "linf", "0.3")
    return Cell(TrainSpec.create("nat", {}, setting), attack, len(test), test.checksum())


def test_the_surrogate_is_trained_handed_over_and_kept(tmp_path: Path) -> None:
    (record,) = run_cells([cell()], Run(tmp_path))
    assert record.error is None
    assert record.robust_accuracy is not None
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2, "the defence and its surrogate"
    assert record.forwards == pytest.approx(record.clean_accuracy * 2 * 2, abs=0.5), (
        "the surrogate's passes are its own"
    )


def test_the_surrogate_is_the_same_training_as_its_own_row() -> None:
    own = cell().training.derive("nat", seed=10_000)
    assert cell().prerequisites["surrogate"].key == own.key


def test_another_surrogate_makes_another_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    key = cell().key
    other = classmethod(lambda cls, params, training: {"surrogate": training.derive("nat", seed=10_001)})
    monkeypatch.setattr(ATTACKS.get(NAME), "prerequisites", other)
    assert cell().key != key


def test_a_surrogate_that_cannot_be_trained_fails_its_own_cells_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ensdef.jobs

    tried: list[int] = []

    def train(spec: TrainSpec, *args: Any, **options: Any) -> Any:
        tried.append(spec.setting.seed)
        if spec.setting.seed == 10_000:
            raise RuntimeError("the surrogate broke")
        return ensdef.training.train(spec, *args, **options)

    monkeypatch.setattr(ensdef.jobs, "train", train)
    other = Cell(cell().training.derive("nat", seed=1), cell().attack, cell().samples, cell().subset_checksum)
    records = run_cells([cell(), cell("fgsm"), other], Run(tmp_path))
    assert [record.error for record in records] == ["the surrogate broke", None, "the surrogate broke"]
    assert tried.count(10_000) == 1, "not trained again for the other defence"
