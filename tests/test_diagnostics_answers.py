"""What a defence and its members answer on a set of images."""

from __future__ import annotations

import math

import pytest
import torch
from toys_defense import CLASSES, SHAPE, generator, same_weights, spread
from toys_diagnostics import Written, WrittenChoice

from ensdef.build import create_defense
from ensdef.diagnostics import answer, right
from ensdef.errors import UsageError


def test_the_answers_are_those_of_the_defence_in_eval_mode_whatever_the_batch_size() -> None:
    defense = create_defense("nat", architecture="small_resnet[width=4]", num_classes=CLASSES, image_shape=SHAPE)
    spread(defense)
    x = torch.rand(7, *SHAPE, generator=generator())
    with torch.no_grad():
        scores, logits = defense(x), defense.member_logits(x)
    defense.train()
    for batch_size in (1, 3, 100):
        answers = answer(defense, x, batch_size)
        torch.testing.assert_close(answers.scores, scores)
        torch.testing.assert_close(answers.logits, logits)


def test_the_defence_is_left_as_it_was() -> None:
    defense, twin = (
        create_defense("nat", architecture="small_resnet[width=4]", num_classes=CLASSES, image_shape=SHAPE)
        for _ in range(2)
    )
    defense.train()
    answer(defense, torch.rand(4, *SHAPE, generator=generator()))
    assert same_weights(defense, twin)
    assert all(module.training for module in defense.modules())


def test_a_selection_is_kept_where_the_defence_has_one() -> None:
    x = torch.randn(5, 2, 4, generator=generator())
    assert answer(Written(2, 4), x).selection is None
    selection = answer(WrittenChoice(2, 3), x, batch_size=2).selection
    assert selection is not None
    assert torch.equal(selection, x[:, :, -1])


def test_no_images_are_refused() -> None:
    with pytest.raises(UsageError, match="no images"):
        answer(Written(2, 3), torch.zeros(0, 2, 3))


def test_right_means_finite_scores_that_choose_the_label() -> None:
    scores = torch.tensor([[[2.0, 1.0], [1.0, 2.0], [math.nan, 1.0]], [[0.0, 1.0], [math.inf, 0.0], [3.0, 1.0]]])
    assert right(scores, torch.tensor([0, 0, 0])).tolist() == [[True, False, False], [False, False, True]]
    assert right(scores[0], torch.tensor([0, 1, 1])).tolist() == [True, True, False]
