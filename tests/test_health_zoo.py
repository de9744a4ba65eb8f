"""The planted zoo: every trick raises its finding and none outside its list; honest ensembles raise no alarm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn
from zoo import CLASSES, EPS, HONEST, IDLE, ZOO, Animal, Says, images

import ensdef
from ensdef.errors import PluginError
from ensdef.health.catalogue import FLAGS

#: Two hundred images are few: that may always be said.
ALWAYS = {"uncertain"}


def flags(model: nn.Module, health: str, eps: float = EPS) -> dict[str, str]:
    """Severity by flag."""
    x, y = images()
    record = ensdef.evaluate(model, x, y, attack="pgd", steps=20, eps=eps, health=health, device="cpu")
    return {flag["flag"]: flag["severity"] for flag in record.flags}


@pytest.mark.parametrize("animal", [pytest.param(value, id=name) for name, value in {**ZOO, **IDLE}.items()])
def test_a_trick_raises_its_finding_and_none_outside_its_list(animal: Animal) -> None:
    found = flags(animal.build(), animal.tier)
    assert {name for name in animal.masking if found.get(name) != "masking"} == set(), found
    assert {name for name in animal.info if found.get(name) != "info"} == set(), found
    assert set(found) <= animal.masking | animal.info | animal.allowed | ALWAYS


def test_a_model_that_returns_probabilities_is_refused() -> None:
    with pytest.raises(PluginError, match="probabilities"):
        flags(Says(after=lambda scores: scores.softmax(dim=1)), "basic")


@pytest.mark.parametrize("health", ["basic", "full"])
@pytest.mark.parametrize("build", [pytest.param(value, id=name) for name, value in HONEST.items()])
def test_an_honest_ensemble_raises_no_alarm(build: Callable[[], nn.Module], health: str) -> None:
    found = flags(build(), health)
    assert [name for name, severity in found.items() if severity == "masking"] == []
    assert "unexamined" not in found


def test_the_zoo_is_large_enough_and_names_known_flags() -> None:
    assert len([animal for animal in ZOO.values() if animal.masking]) >= 20
    assert len(HONEST) >= 6
    for animal in (*ZOO.values(), *IDLE.values()):
        assert animal.masking | animal.info | animal.allowed <= set(FLAGS)


def test_the_zoo_is_fed_with_images_that_its_linear_model_gets_right_and_that_an_attack_fools_in_part() -> None:
    x, y = images()
    assert set(y.tolist()) == set(range(CLASSES))
    record = ensdef.evaluate(Says(), x, y, attack="pgd", steps=20, eps=EPS, device="cpu")
    assert record.clean_accuracy is not None
    assert record.robust_accuracy is not None
    assert record.clean_accuracy > 0.9
    assert 0.2 < record.robust_accuracy < 0.8
