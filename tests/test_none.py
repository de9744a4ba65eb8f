"""The attack ``none``: the clean accuracy as a cell of its own."""

from __future__ import annotations

import torch

import ensdef
from ensdef.attack_spec import AttackSpec
from ensdef.registry import ATTACKS


def test_without_an_attack_the_robust_accuracy_is_the_clean_one_image_by_image() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(40, 1, 4, 4, generator=generator), torch.randint(0, 3, (40,), generator=generator)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    record = ensdef.evaluate(model, x, y, attack="none")
    with torch.no_grad():
        right = (model(x).argmax(dim=1) == y).int().tolist()
    assert 0 < sum(right) < 40
    assert record.outcomes["clean"] == record.outcomes["robust"] == right
    assert record.robust_accuracy == record.clean_accuracy == sum(right) / 40
    assert (record.norm, record.eps) == (None, None)


def test_it_is_no_suggestion_for_a_model_without_gradients() -> None:
    attack = ATTACKS.get("none")
    assert attack.budget == "none"
    assert AttackSpec.create("none", {}, "linf", "0.1").eps is None
