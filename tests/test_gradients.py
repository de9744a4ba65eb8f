"""Input gradients as terms of a loss, and the cosines between those of different members."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys_defense import ARCHITECTURE, CLASSES, SHAPE, generator, spread
from toys_gradients import per_image_gradients

from ensdef.build import create_defense
from ensdef.gradients import input_gradients, pairwise_cosines
from ensdef.losses import cross_entropy

quick = settings(deadline=None, max_examples=60, derandomize=True)


def members_of(count: int = 3) -> list[nn.Module]:
    defense = create_defense("nat", architecture=ARCHITECTURE, members=count, num_classes=CLASSES, image_shape=SHAPE)
    return list(spread(defense).double().members)  # type: ignore[arg-type]


def images(count: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, *SHAPE, generator=generator(), dtype=torch.float64)
    return x.requires_grad_(), torch.arange(count) % CLASSES


def drawn(members: int, batch: int = 4, size: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(members, batch, size, generator=generator(seed), dtype=torch.float64)


# --- input gradients ------------------------------------------------------------------------------


def test_each_member_s_gradient_is_that_of_each_image_alone() -> None:
    members, (x, y) = members_of(), images()
    gradients = input_gradients([cross_entropy(member(x), y) for member in members], x)
    assert gradients.shape == (3, 6, 64)
    for member, ours in zip(members, gradients, strict=True):

        def loss(image: Tensor, label: Tensor, member: nn.Module = member) -> Tensor:
            return cross_entropy(member(image), label)

        torch.testing.assert_close(ours.detach(), per_image_gradients(loss, x.detach(), y))


def test_an_image_s_gradient_does_not_depend_on_the_size_of_its_batch() -> None:
    members, (x, y) = members_of(), images()
    whole = input_gradients([cross_entropy(member(x), y) for member in members], x)
    x_two = x.detach()[:2].requires_grad_()
    part = input_gradients([cross_entropy(member(x_two), y[:2]) for member in members], x_two)
    torch.testing.assert_close(part, whole[:, :2])


def test_the_gradients_can_be_differentiated_once_more() -> None:
    weight = torch.randn(3, 5, generator=generator(), dtype=torch.float64).requires_grad_()
    x = torch.rand(4, 5, generator=generator(1), dtype=torch.float64)

    def squared_length(weight: Tensor) -> Tensor:
        images = x.clone().requires_grad_()
        return input_gradients([cross_entropy(images @ weight.T, torch.tensor([0, 1, 2, 0]))], images).square().sum()

    assert torch.autograd.gradcheck(squared_length, weight)


class Counted(torch.autograd.Function):
    """The identity; counts how often it is differentiated."""

    backward_calls = 0

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        Counted.backward_calls += 1
        return gradient


def test_every_member_is_differentiated_once() -> None:
    members, (x, y) = members_of(4), images()
    losses = [cross_entropy(Counted.apply(member(x)), y) for member in members]
    Counted.backward_calls = 0
    input_gradients(losses, x)
    assert Counted.backward_calls == 4


# --- cosines --------------------------------------------------------------------------------------


def test_pairs_come_in_order_and_have_the_cosine_of_their_gradients() -> None:
    gradients = torch.tensor([[[1.0, 0.0]], [[-1.0, 1.0]], [[3.0, 0.0]]])
    root = math.sqrt(0.5)
    assert pairwise_cosines(gradients).squeeze(1).tolist() == pytest.approx([-root, 1.0, -root])


@quick
@given(st.integers(2, 5), st.integers(1, 4), st.integers(1, 9), st.integers(0, 10**6))
def test_cosines_are_those_of_a_plain_rewrite(members: int, batch: int, size: int, seed: int) -> None:
    gradients = drawn(members, batch, size, seed)
    g = gradients.numpy()
    expected = [
        [g[a, i] @ g[b, i] / np.linalg.norm(g[a, i]) / np.linalg.norm(g[b, i]) for i in range(batch)]
        for a in range(members)
        for b in range(a + 1, members)
    ]
    np.testing.assert_allclose(pairwise_cosines(gradients).numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e-8, 1e8, 1e30])
def test_the_length_of_a_gradient_does_not_matter_however_short_or_long(scale: float) -> None:
    gradients = drawn(3).float()
    scaled = gradients.clone()
    scaled[0] *= scale
    torch.testing.assert_close(pairwise_cosines(scaled), pairwise_cosines(gradients), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-15, 1e-4, 1.0])
def test_the_cosine_of_a_short_gradient_is_as_steep_as_its_angle_says(scale: float) -> None:
    """A floor under the length would flatten it."""
    gradients = (scale * drawn(2)).requires_grad_()
    slope = torch.autograd.grad(pairwise_cosines(gradients).sum(), gradients)[0] * scale
    reference = drawn(2).requires_grad_()
    torch.testing.assert_close(slope, torch.autograd.grad(pairwise_cosines(reference).sum(), reference)[0])


def test_no_part_of_the_cosine_is_detached() -> None:
    assert torch.autograd.gradcheck(pairwise_cosines, drawn(3, 2, 4).requires_grad_())


def test_a_gradient_of_zero_has_cosine_zero_and_neither_receives_nor_gives_a_slope() -> None:
    gradients = drawn(3)
    gradients[1, 2] = 0.0
    gradients.requires_grad_()
    cosines = pairwise_cosines(gradients)  # pairs (0, 1), (0, 2), (1, 2)
    assert cosines[:, 2].tolist()[::2] == [0.0, 0.0]
    slope = torch.autograd.grad(cosines[[0, 2]].sum(), gradients)[0]
    assert bool((slope[:, 2] == 0).all())
    assert bool((slope[:, [0, 1, 3]] != 0).all())


def test_all_gradients_zero_give_finite_values_and_slopes() -> None:
    gradients = torch.zeros(3, 2, 5, requires_grad=True)
    cosines = pairwise_cosines(gradients)
    assert bool((cosines == 0).all())
    assert bool((torch.autograd.grad(cosines.sum(), gradients)[0] == 0).all())
