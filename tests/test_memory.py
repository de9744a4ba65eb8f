"""Running out of memory: batches are halved and the run goes on, with the same result."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_executors import cell
from torch import Tensor, nn
from toys_queries import decisions, images, linear

from ensdef.attack_spec import AttackSpec
from ensdef.backend import is_out_of_memory
from ensdef.evaluation import evaluate_cell
from ensdef.harness import Outcome, attack_model
from ensdef.rows import SMALLEST_BATCH
from ensdef.runner import Run, run_cells
from ensdef.training import train

limited = pytest.mark.parametrize("where", ["everywhere", "with gradients", "without gradients"])


#: What running out of memory looks like: on a GPU, in PyTorch on the CPU, in NumPy or Python.
OUT_OF_MEMORY: dict[str, Exception] = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9000 "
        "bytes. Error code 12 (Cannot allocate memory)"
    ),
    "python": MemoryError("Unable to allocate 9.00 GiB for an array"),
}


class Small(nn.Module):
    """A model on a device with room for ``most`` images a pass."""

    def __init__(self, model: nn.Module, most: int, where: str = "everywhere", kind: str = "cuda") -> None:
        super().__init__()
        self.model, self.most, self.where, self.kind = model, most, where, kind
        self.refused = torch.zeros(1)

    def __deepcopy__(self, memo: dict[int, Any]) -> Small:
        copy = Small(deepcopy(self.model), self.most, self.where, self.kind)
        copy.refused = self.refused
        return copy

    def forward(self, x: Tensor) -> Tensor:
        asked = torch.is_grad_enabled() and x.requires_grad
        if len(x) > self.most and self.where != ("without gradients" if asked else "with gradients"):
            self.refused += 1
            raise OUT_OF_MEMORY[self.kind]
        scores: Tensor = self.model(x)
        return scores


def outcome(model: nn.Module, attack: str, **params: Any) -> Outcome:
    x = images(200)
    spec = AttackSpec.create(attack, params, "linf", 0.02)
    return attack_model(model, x, decisions(linear(10), x), spec, health="off")


@limited
@pytest.mark.parametrize(
    ("attack", "params"),
    [("pgd", {"steps": 5, "restarts": 2}), ("square", {"queries": 30}), ("deepfool", {"steps": 3})],
)
def test_the_result_is_the_same_in_smaller_batches(attack: str, params: dict[str, Any], where: str) -> None:
    small = Small(linear(10), 40, where)
    expected, found = outcome(linear(10), attack, **params), outcome(small, attack, **params)
    assert torch.equal(found.robust, expected.robust)
    assert torch.equal(found.x_adv, expected.x_adv)
    assert (found.forwards, found.backwards) == (expected.forwards, expected.backwards)
    if attack != "square" or where != "with gradients":
        assert float(small.refused) > 0, "a test that never ran out of memory shows nothing"
    # 128 -> 64 -> 32: twice in the clean pass, in the attack and in the recount
    assert float(small.refused) <= 6


@limited
@pytest.mark.parametrize("kind", ["cpu", "python"])
def test_the_cpu_s_memory_runs_out_like_the_gpu_s(kind: str, where: str) -> None:
    small = Small(linear(10), 40, where, kind)
    expected, found = outcome(linear(10), "pgd", steps=5), outcome(small, "pgd", steps=5)
    assert torch.equal(found.x_adv, expected.x_adv)
    assert 0 < float(small.refused) <= 6


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_a_cell_that_never_fits_fails_with_what_to_do_and_the_others_finish(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(defense: Any, asked: Any, *args: Any, **kwargs: Any) -> Any:
        if asked.attack.name == "pgd":
            raise OUT_OF_MEMORY[kind]
        return evaluate_cell(defense, asked, *args, **kwargs)

    monkeypatch.setattr("ensdef.jobs.evaluate_cell", evaluate)
    failed, fine = run_cells([cell(attack="pgd"), cell()], Run(tmp_path))
    assert str(OUT_OF_MEMORY[kind]) in str(failed.error)
    assert "--batch-size" in str(failed.error)
    assert fine.error is None


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_a_training_that_does_not_fit_fails_with_what_to_do_and_the_others_finish(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(spec: Any, *args: Any, **kwargs: Any) -> Any:
        if spec.setting.seed == 1:
            raise OUT_OF_MEMORY[kind]
        return train(spec, *args, **kwargs)

    monkeypatch.setattr("ensdef.jobs.train", lacking)
    failed, fine = run_cells([cell(seed=1), cell()], Run(tmp_path))
    assert str(OUT_OF_MEMORY[kind]) in str(failed.error)
    assert "--members" in str(failed.error)
    assert "batch_size" in str(failed.error)
    assert fine.error is None


@pytest.mark.parametrize("attack", ["pgd", "square"])
@pytest.mark.parametrize("count", [10, 12, 40])
def test_room_for_the_smallest_batch_is_enough(attack: str, count: int) -> None:
    x = images(count)
    spec = AttackSpec.create(attack, {"queries": 30} if attack == "square" else {"steps": 5}, "linf", 0.02)
    y = decisions(linear(10), x)
    small, model = Small(linear(10), SMALLEST_BATCH), linear(10)
    found, expected = (attack_model(one, x, y, spec, batch_size=SMALLEST_BATCH, health="off") for one in (small, model))
    assert torch.equal(found.robust, expected.robust)


def test_the_health_report_looks_with_batches_that_fit() -> None:
    x = images(200)
    y = decisions(linear(10), x)
    spec = AttackSpec.create("pgd", {"steps": 5}, "linf", 0.02)
    findings = [
        [finding["flag"] for finding in attack_model(model, x, y, spec, health="full").findings]
        for model in (linear(10), Small(linear(10), 40))
    ]
    assert findings[0] == findings[1]


def test_a_step_that_wrote_into_its_state_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from ensdef.attack import IterativeAttack, State, register_attack
    from ensdef.errors import AttackError
    from ensdef.registry import ATTACKS
    from ensdef.rng import KeyedRandom
    from ensdef.target import Target
    from ensdef.threat import Threat

    monkeypatch.setattr(ATTACKS, "_registered", {**ATTACKS._registered})

    @register_attack("writes")
    class Writes(IterativeAttack):
        steps = 3

        def start(self, target: Target, x: Tensor, y: Tensor, threat: Threat, rng: KeyedRandom) -> State:
            return {"sum": torch.zeros_like(x)}

        def step(
            self, target: Target, x_adv: Tensor, y: Tensor, state: State, threat: Threat, rng: KeyedRandom
        ) -> tuple[Tensor, State]:
            state["sum"] += 1
            target(x_adv)
            return x_adv, state

    assert outcome(linear(10), "writes").robust.any()
    with pytest.raises(AttackError, match="return new state tensors"):
        outcome(Small(linear(10), 40, "without gradients"), "writes")


@pytest.mark.parametrize("attack", ["pgd", "square"])
def test_where_not_even_the_smallest_batch_fits_the_error_is_told(attack: str) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        outcome(Small(linear(10), SMALLEST_BATCH - 1), attack)


def test_other_errors_are_no_reason_to_try_again() -> None:
    class Broken(Small):
        def forward(self, x: Tensor) -> Tensor:
            self.refused += 1
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

        def __deepcopy__(self, memo: dict[int, Any]) -> Broken:
            copy = Broken(deepcopy(self.model), self.most)
            copy.refused = self.refused
            return copy

    broken = Broken(linear(10), 40)
    with pytest.raises(RuntimeError, match="shapes"):
        outcome(broken, "pgd")
    assert float(broken.refused) == 1


def test_the_cpu_s_own_error_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
