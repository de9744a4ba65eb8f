"""How fast an input gradient turns: losses whose curvature is known."""

from __future__ import annotations

import pytest
import torch
from toys_defense import CLASSES, SHAPE, Plain, generator, spread

from ensdef.build import create_defense
from ensdef.diagnostics import defense_curvature, loss_curvature
from ensdef.errors import UsageError
from ensdef.losses import cross_entropy
from ensdef.testing import LinearClassifier


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def test_a_linear_loss_has_no_curvature() -> None:
    weight = draw(2, 3)
    curvature = loss_curvature(lambda x: (x * weight).sum(dim=(1, 2)), draw(5, 2, 3, seed=1), draw(5, 2, 3, seed=2))
    assert curvature.tolist() == [0.0] * 5


def test_a_quadratic_loss_has_the_curvature_of_its_matrix_along_the_perturbation() -> None:
    root, x, delta = draw(4, 4), draw(5, 4, seed=1), draw(5, 4, seed=2)
    matrix = root @ root.T
    curvature = loss_curvature(lambda z: 0.5 * ((z @ matrix) * z).sum(dim=1), x, delta)
    torch.testing.assert_close(curvature, (delta @ matrix).norm(dim=1) / delta.norm(dim=1))
    values, vectors = torch.linalg.eigh(matrix)
    along = loss_curvature(lambda z: 0.5 * ((z @ matrix) * z).sum(dim=1), draw(4, 4, seed=3), 0.1 * vectors.T)
    torch.testing.assert_close(along, values)


@pytest.mark.parametrize("size", [1e-3, 1.0, 10.0])
def test_the_curvature_of_a_quadratic_does_not_depend_on_the_length_of_the_perturbation(size: float) -> None:
    curvature = loss_curvature(lambda z: 1.5 * z.square().sum(dim=1), draw(3, 4), size * draw(3, 4, seed=1))
    assert curvature.tolist() == pytest.approx([3.0] * 3)


def test_gradients_too_small_for_their_squares_still_count() -> None:
    x, delta = torch.rand(2, 4, generator=generator()), torch.full((2, 4), 0.1)
    curvature = loss_curvature(lambda z: 1e-30 * z.square().sum(dim=1), x, delta)
    assert curvature.tolist() == pytest.approx([2e-30] * 2, rel=1e-3)


def test_a_perturbation_of_zero_is_refused() -> None:
    delta = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    with pytest.raises(UsageError, match="1 of 2 perturbations are 0"):
        loss_curvature(lambda z: z.sum(dim=1), torch.zeros(2, 2), delta)


@pytest.mark.parametrize("member", [0, 1])
def test_a_linear_member_s_cross_entropy_has_the_softmax_curvature(member: int) -> None:
    """The input gradient is W^T (p - e_y), so its change is W^T (p(x + delta) - p(x))."""
    weights = draw(2, CLASSES, 6)
    defense = Plain([LinearClassifier(weight) for weight in weights])
    x, delta, y = draw(7, 6, seed=1), draw(7, 6, seed=2), torch.arange(7) % CLASSES
    weight = weights[member]
    turn = ((x + delta) @ weight.T).softmax(dim=1) - (x @ weight.T).softmax(dim=1)
    expected = (turn @ weight).norm(dim=1) / delta.norm(dim=1)
    torch.testing.assert_close(defense_curvature(defense, x, y, delta, view=f"member{member}"), expected)


def test_the_curvature_of_a_defence_is_that_of_its_loss_in_eval_mode_in_any_batch_size() -> None:
    defense = create_defense(
        "nat", architecture="small_resnet[width=4]", members=2, num_classes=CLASSES, image_shape=SHAPE
    )
    spread(defense)
    x, delta = (torch.rand(5, *SHAPE, generator=generator(seed)) for seed in (0, 1))
    y = torch.arange(5) % CLASSES
    expected = loss_curvature(lambda z: cross_entropy(defense(z), y), x, delta)
    assert bool((expected > 0).all())
    defense.train()
    for batch_size in (2, 100):
        torch.testing.assert_close(
            defense_curvature(defense, x, y, delta, batch_size=batch_size), expected, rtol=1e-3, atol=1e-6
        )


def test_an_unknown_view_is_refused() -> None:
    defense = Plain([LinearClassifier(torch.ones(2, 3))])
    with pytest.raises(UsageError, match="no view 'gate'"):
        defense_curvature(defense, torch.zeros(1, 3), torch.tensor([0]), torch.ones(1, 3), view="gate")
