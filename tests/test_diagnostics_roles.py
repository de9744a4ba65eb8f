"""Who does what: members, the best of them, and the one that answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys_defense import CLASSES, SHAPE, generator, spread
from toys_diagnostics import Written, WrittenChoice, images_of

from ensdef.build import create_defense
from ensdef.diagnostics import Roles, dead_members, member_roles


def chosen_images(predictions: Any, chosen: list[int], classes: int = 3) -> Tensor:
    """Images (N, K, C + 1) with the members' predictions and the member that is trusted most."""
    images = images_of(predictions, classes)
    trust = torch.nn.functional.one_hot(torch.tensor(chosen), images.shape[1]).float()
    return torch.cat([images, trust[:, :, None]], dim=2)


def test_accuracies_and_oracle_in_a_case_counted_by_hand() -> None:
    y = torch.tensor([0, 1, 2, 0, 1])
    x = chosen_images([[0, 1, 0, 1, 0], [0, 0, 2, 1, 0]], [0, 1, 1, 0, 1])
    roles = member_roles(WrittenChoice(2, 3), x, y)
    assert roles.accuracy == pytest.approx(2 / 5)
    assert roles.members.tolist() == pytest.approx([2 / 5, 2 / 5])
    assert roles.oracle == pytest.approx(3 / 5)
    assert roles.selected is not None
    assert roles.selected.tolist() == pytest.approx([2 / 5, 3 / 5])
    # where both members are equally sure, either is a best one: images 0, 3 and 4
    assert roles.agreement == pytest.approx(4 / 5)


def test_a_member_that_never_answers_has_a_place_in_the_histogram() -> None:
    x = chosen_images([[0, 1], [0, 1], [0, 1]], [1, 1])
    selected = member_roles(WrittenChoice(3, 3), x, torch.tensor([0, 1])).selected
    assert selected is not None
    assert selected.tolist() == [0.0, 1.0, 0.0]


def test_without_a_selection_its_parts_are_none() -> None:
    roles = member_roles(Written(2, 3), images_of([[0, 1], [0, 0]], 3), torch.tensor([0, 1]))
    assert roles.selected is None
    assert roles.agreement is None
    assert dead_members(roles, 2, 3) is None
    assert roles.oracle == 1.0


def test_a_perfect_selection_beats_every_member_and_a_perverse_one_none() -> None:
    x = torch.randn(200, 3, 4, generator=generator())
    y = torch.randint(3, (200,), generator=generator(1))
    losses = -x[:, :, :3].log_softmax(dim=2).gather(2, y.view(-1, 1, 1).expand(-1, 3, 1)).squeeze(2)
    best, worst = (
        member_roles(WrittenChoice(3, 3), torch.cat([x[:, :, :3], sign * losses[:, :, None]], dim=2), y)
        for sign in (-1, 1)
    )
    assert (best.agreement, worst.agreement) == (1.0, 0.0)
    assert worst.accuracy < float(best.members.min()) <= float(best.members.max()) < best.accuracy <= best.oracle


@pytest.mark.parametrize("method", ["nat", "soe"])
def test_no_rule_that_selects_beats_the_oracle(method: str) -> None:
    defense = create_defense(
        method, architecture="small_resnet[width=4]", members=3, num_classes=CLASSES, image_shape=SHAPE
    )
    spread(defense)
    x = torch.rand(60, *SHAPE, generator=generator())
    y = torch.randint(CLASSES, (60,), generator=generator(1))
    roles = member_roles(defense, x, y)
    assert roles.oracle >= float(roles.members.max())
    if method == "soe":
        assert roles.selected is not None
        assert float(roles.selected.sum()) == pytest.approx(1.0)
        assert roles.accuracy <= roles.oracle
        assert roles.agreement is not None
        assert 0 < roles.agreement < 1


# --- the alarm ------------------------------------------------------------------------------------


def clean_roles(accuracies: list[float], selected: list[float]) -> Roles:
    members, share = (torch.tensor(part, dtype=torch.float64) for part in (accuracies, selected))
    return Roles(0.8, members, 0.9, share, 0.5)


@pytest.mark.parametrize(
    ("accuracy", "selected", "dead"),
    [
        (0.10, 0.0, True),
        (0.10, 0.019, True),
        (0.10, 0.02, False),  # it answers
        (0.128, 0.0, True),  # 3 standard errors at 1000 images of 10 classes are 0.0285
        (0.129, 0.0, False),  # it knows something
        (0.26, 0.0, False),  # specialised
        (0.02, 0.0, True),  # worse than chance is no knowledge
    ],
)
def test_a_member_is_dead_when_it_neither_answers_nor_knows(accuracy: float, selected: float, dead: bool) -> None:
    found = dead_members(clean_roles([accuracy, 0.8], [selected, 1 - selected]), 1000, 10)
    assert found is not None
    assert found.tolist() == [dead, False]


def test_with_fewer_images_the_alarm_needs_less_ignorance() -> None:
    roles = clean_roles([0.15, 0.8], [0.0, 1.0])
    few, many = (dead_members(roles, count, 10) for count in (100, 1000))
    assert few is not None
    assert many is not None
    assert (few.tolist(), many.tolist()) == ([True, False], [False, False])
