"""Folding batch norms into convolutions: the same function, and a source that nobody touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ensdef.folding import FoldedCopy, frozen_copy

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights, affine parameters and running statistics as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
                part.running_mean.normal_(0, 0.3, generator=generator)
                part.running_var.uniform_(0.5, 2.0, generator=generator)
                if part.affine:
                    part.weight.uniform_(-1.5, 1.5, generator=generator)
                    part.bias.normal_(0, 0.3, generator=generator)
            elif isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
                part.weight.normal_(0, 0.3, generator=generator)
                if part.bias is not None:
                    part.bias.normal_(0, 0.3, generator=generator)
    return module


def net(bias: bool = False, affine: bool = True) -> nn.Sequential:
    """Two convolutions with norms, nested once, and a head."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=bias),
        nn.BatchNorm2d(6, affine=affine),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(6, 4, 3, stride=2, groups=2, bias=bias), nn.BatchNorm2d(4, affine=affine), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def x(seed: int = 0) -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def norms(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


def agrees(source: nn.Module, images: Tensor | None = None) -> None:
    """The folded copy of ``source`` computes what ``source`` computes in eval mode."""
    images = x() if images is None else images
    torch.testing.assert_close(FoldedCopy(source).module(images), frozen_copy(source)(images), **TOLERANCE)


# --- the same function ----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
def test_a_folded_copy_computes_what_its_source_computes_in_eval_mode(bias: bool, affine: bool) -> None:
    agrees(randomised(net(bias, affine)))


def test_a_folded_copy_has_no_batch_norm_left_behind_a_convolution() -> None:
    assert norms(FoldedCopy(randomised(net())).module) == []


@pytest.mark.parametrize(
    ("conv", "norm", "size"),
    [(nn.Conv1d, nn.BatchNorm1d, (2, 3, 9)), (nn.Conv3d, nn.BatchNorm3d, (2, 3, 5, 5, 5))],
)
def test_convolutions_of_one_and_three_dimensions_are_folded_too(
    conv: type[nn.Module], norm: type[nn.Module], size: tuple[int, ...]
) -> None:
    source = randomised(nn.Sequential(conv(3, 4, 3), norm(4)))
    assert norms(FoldedCopy(source).module) == []
    agrees(source, torch.rand(size, generator=torch.Generator().manual_seed(0)))


def test_the_gradient_at_the_images_is_the_source_s() -> None:
    source = randomised(net()).eval()
    gradients = []
    for module in (source, FoldedCopy(source).module):
        images = x().requires_grad_()
        gradients.append(torch.autograd.grad(module(images)[:, 0].sum(), images)[0])
    torch.testing.assert_close(*gradients, **TOLERANCE)


def test_a_module_with_nothing_to_fold_is_copied() -> None:
    agrees(randomised(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))))


# --- following the source -------------------------------------------------------------------------


def change_weights(source: nn.Module) -> None:
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1)


def change_running_statistics(source: nn.Module) -> None:
    source.train()
    source(3 * x(seed=5) + 1)


def take_an_optimiser_step(source: nn.Module) -> None:
    optimizer = torch.optim.SGD(source.parameters(), lr=0.1, momentum=0.9)
    source.train()
    source(x()).pow(2).sum().backward()
    optimizer.step()


def load_other_weights(source: nn.Module) -> None:
    source.load_state_dict(randomised(net(), seed=9).state_dict())


@pytest.mark.parametrize(
    "change", [change_weights, change_running_statistics, take_an_optimiser_step, load_other_weights]
)
def test_refreshing_follows_the_source(change: Callable[[nn.Module], None]) -> None:
    source = randomised(net())
    folded = FoldedCopy(source)
    before = folded.module(x())
    change(source)
    assert torch.equal(folded.module(x()), before)
    after = folded.refresh()(x())
    assert not torch.allclose(after, before, **TOLERANCE)
    torch.testing.assert_close(after, frozen_copy(source)(x()), **TOLERANCE)


def test_refreshing_returns_the_same_module_each_time() -> None:
    folded = FoldedCopy(randomised(net()))
    assert folded.refresh() is folded.module


# --- the source is left alone ---------------------------------------------------------------------


def test_folding_leaves_weights_and_statistics_of_the_source_as_they_are() -> None:
    source = randomised(net())
    before = {name: value.clone() for name, value in source.state_dict().items()}
    FoldedCopy(source).refresh()
    assert source.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())


@pytest.mark.parametrize("train", [True, False])
def test_folding_leaves_the_train_flags_of_the_source_as_they_are(train: bool) -> None:
    source = randomised(net()).train(train)
    source[3].eval()
    before = [part.training for part in source.modules()]
    FoldedCopy(source).refresh()
    assert [part.training for part in source.modules()] == before


def test_folding_leaves_gradients_of_the_source_as_they_are() -> None:
    source = randomised(net())
    source(x()).sum().backward()
    before = [parameter.grad.clone() for parameter in source.parameters()]
    FoldedCopy(source).refresh()
    assert all(torch.equal(p.grad, g) for p, g in zip(source.parameters(), before, strict=True))
    assert all(parameter.requires_grad for parameter in source.parameters())


def test_a_backward_pass_through_the_copy_leaves_no_gradient_in_the_source() -> None:
    source = randomised(net())
    images = x().requires_grad_()
    FoldedCopy(source).module(images).sum().backward()
    assert all(parameter.grad is None for parameter in source.parameters())


def test_folding_leaves_hooks_of_the_source_in_place() -> None:
    source = randomised(net())
    seen = []
    source[2].register_forward_hook(lambda *_: seen.append("relu"))
    FoldedCopy(source).refresh()
    source(x())
    assert seen == ["relu"]


# --- the copy is frozen ---------------------------------------------------------------------------


def test_the_copy_is_in_eval_mode_throughout() -> None:
    assert not any(part.training for part in FoldedCopy(randomised(net()).train()).module.modules())


def test_no_parameter_of_the_copy_asks_for_a_gradient() -> None:
    assert not any(parameter.requires_grad for parameter in FoldedCopy(randomised(net())).module.parameters())


def test_the_copy_shares_no_memory_with_its_source() -> None:
    source = randomised(net())
    theirs = {tensor.data_ptr() for tensor in source.state_dict().values()}
    assert theirs.isdisjoint(tensor.data_ptr() for tensor in FoldedCopy(source).module.state_dict().values())


def test_a_frozen_copy_carries_no_gradient_along() -> None:
    source = randomised(net())
    source(x()).sum().backward()
    assert all(parameter.grad is None for parameter in frozen_copy(source).parameters())


# --- where the order is not certain ---------------------------------------------------------------


class Residual(nn.Module):
    """Calls its parts in an order that only ``forward`` knows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        return images + self.conv(self.norm(images))


class OwnForward(nn.Sequential):
    """A Sequential that is none."""

    def forward(self, images: Tensor) -> Tensor:
        return self[1](self[0](images) + 1)


def with_a_part_between() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))


def norm_before_convolution() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))


def own_forward() -> nn.Module:
    return OwnForward(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def without_running_statistics() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))


def parametrised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    "build",
    [
        with_a_part_between,
        norm_before_convolution,
        Residual,
        own_forward,
        without_running_statistics,
        parametrised,
    ],
)
def test_a_norm_that_does_not_certainly_follow_a_convolution_stays(build: Callable[[], nn.Module]) -> None:
    source = randomised(build()) if build is not parametrised else build()
    assert len(norms(FoldedCopy(source).module)) == 1
    agrees(source)


@pytest.mark.parametrize("part", [0, 1], ids=["convolution", "norm"])
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_a_hook_on_convolution_or_norm_keeps_both(part: int, register: str) -> None:
    source = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    getattr(source[part], register)(lambda *_: None)
    assert len(norms(FoldedCopy(source).module)) == 1


def test_a_hook_that_changes_the_convolution_s_output_is_heard() -> None:
    source = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    source[0].register_forward_hook(lambda module, inputs, output: output.relu())
    agrees(source)


# --- parts that are used twice --------------------------------------------------------------------


def shared_convolution() -> nn.Module:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU(), conv, nn.BatchNorm2d(3))


def shared_weight() -> nn.Module:
    one, two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    two.weight = one.weight
    return nn.Sequential(one, nn.BatchNorm2d(3), nn.ReLU(), two, nn.BatchNorm2d(3))


def convolution_used_bare_as_well() -> nn.Module:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU(), conv)


def shared_norm() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    return nn.Sequential(nn.Conv2d(3, 3, 3), norm, nn.ReLU(), nn.Conv2d(3, 3, 3), norm)


def shared_block() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    return nn.Sequential(block, nn.ReLU(), block)


@pytest.mark.parametrize(
    "build", [shared_convolution, shared_weight, convolution_used_bare_as_well, shared_norm, shared_block]
)
def test_parts_used_twice_still_give_the_source_s_output(build: Callable[[], nn.Module]) -> None:
    agrees(randomised(build()))


def test_a_norm_that_is_folded_in_one_place_and_kept_in_another_is_refreshed_in_both() -> None:
    norm = nn.BatchNorm2d(3)
    source = randomised(nn.Sequential(nn.Conv2d(3, 3, 3), norm, nn.ReLU(), norm))
    folded = FoldedCopy(source)
    change_weights(source)
    torch.testing.assert_close(folded.refresh()(x()), frozen_copy(source)(x()), **TOLERANCE)
