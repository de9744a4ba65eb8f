"""Member networks: sizes as published, layers where DVERGE has them, gradients where SGM scales them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensdef.architecture import ImageSpec, Network, ResidualBlock
from ensdef.errors import UsageError
from ensdef.notation import fill
from ensdef.registry import ARCHITECTURES

EVERY = [
    "resnet",
    "resnet2",
    "resnet8",
    "resnet14",
    "resnet20",
    "resnet26",
    "resnet32",
    "small_resnet",
    "cce_mnist",
    "cce_cifar10",
    "cce_cifar100",
    "resnet18",
]
SMALL = {"resnet": {"depth": 8}, "resnet18": {"width": 4}, "small_resnet": {"width": 4}}


def build(name: str, shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10, **params: Any) -> Network:
    torch.manual_seed(0)
    architecture = ARCHITECTURES.get(name)
    network: Network = architecture(ImageSpec(shape, num_classes), fill(architecture.Params, params, name))
    return network.eval()


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def test_the_families_register_the_twelve_names() -> None:
    assert set(EVERY) <= set(ARCHITECTURES.names())


@pytest.mark.parametrize(
    ("name", "params", "shape", "num_classes", "published"),
    [
        ("resnet2", {}, (3, 32, 32), 10, 3_034),
        ("resnet8", {}, (3, 32, 32), 10, 78_042),
        ("resnet14", {}, (3, 32, 32), 10, 175_258),
        ("resnet20", {}, (3, 32, 32), 10, 272_474),
        ("resnet20", {"shortcut": "identity"}, (3, 32, 32), 10, 269_722),
        ("resnet", {"depth": 14}, (3, 32, 32), 10, 175_258),
        ("resnet", {}, (3, 32, 32), 10, 272_474),
        ("cce_mnist", {}, (1, 28, 28), 10, 734_602),
        ("cce_cifar10", {}, (3, 32, 32), 10, 2_425_930),
        ("cce_cifar100", {}, (3, 32, 32), 100, 2_699_364),
        ("resnet18", {}, (3, 32, 32), 10, 11_173_962),
    ],
)
def test_parameter_counts_are_the_published_ones(
    name: str, params: dict[str, Any], shape: tuple[int, int, int], num_classes: int, published: int
) -> None:
    assert sum(p.numel() for p in build(name, shape, num_classes, **params).parameters()) == published


@pytest.mark.parametrize(("name", "depth"), [(f"resnet{depth}", depth) for depth in (2, 8, 14, 20, 26, 32)])
def test_a_cifar_resnet_has_as_many_layers_as_its_depth(name: str, depth: int) -> None:
    network = build(name)
    assert network.num_layers == depth
    assert len(list(network.trunk(images(1, 3, 32, 32)))) == depth - 1
    weights = [part for part in network.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    assert len([part for part in weights if getattr(part, "kernel_size", None) != (1, 1)]) == depth


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 8, 8), (4, 4, 4), (3, 9, 13)])
def test_any_image_of_at_least_4x4_gives_logits(name: str, shape: tuple[int, int, int]) -> None:
    network = build(name, shape, num_classes=7, **SMALL.get(name, {}))
    logits, embedding = network(images(2, *shape), with_embedding=True)
    assert logits.shape == (2, 7)
    assert embedding.shape == (2, network.embedding_size)
    assert logits.isfinite().all()
    assert torch.equal(network.classifier(embedding), logits)


@pytest.mark.parametrize("name", EVERY)
def test_smaller_images_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"at least 4x4, got 8x3"):
        build(name, (3, 8, 3))


@pytest.mark.parametrize("name", EVERY)
def test_every_layer_can_be_asked_for_and_the_last_is_the_logits(name: str) -> None:
    network = build(name, (1, 8, 8), **SMALL.get(name, {}))
    x = images(2, 1, 8, 8)
    layers = [network.features(x, layer) for layer in range(1, network.num_layers + 1)]
    assert all(len(features) == 2 for features in layers)
    assert torch.equal(layers[-1], network(x))
    assert torch.equal(network.classifier(network.embed(layers[-2])), layers[-1])
    # two numbers that name one tensor would pass everything above
    assert all(a.shape != b.shape or not torch.equal(a, b) for a, b in pairwise(layers))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_features_are_taken_before_the_activation(name: str, activation: str) -> None:
    network = build(name, (1, 16, 16), activation=activation, **SMALL.get(name, {}))
    x = images(4, 1, 16, 16)
    activated: list[Tensor] = []
    for part in network.modules():
        if isinstance(part, nn.ReLU | nn.LeakyReLU):
            part.register_forward_pre_hook(lambda _, inputs: activated.append(inputs[0]))
    network(x)
    assert len(activated) == network.num_layers - 1
    for layer, before in enumerate(list(activated), start=1):
        assert torch.equal(network.features(x, layer), before)
        assert before.min() < 0


@pytest.mark.parametrize("layer", [-1, 0, 9])
def test_a_layer_that_does_not_exist_is_refused(layer: int) -> None:
    with pytest.raises(UsageError, match=f"layer is {layer}; ResNet8 has layers 1 to 8"):
        build("resnet8").features(images(1, 3, 32, 32), layer)


def test_layers_of_a_residual_network_are_stem_then_first_convolution_and_sum_of_each_block() -> None:
    network = build("resnet8")
    x = images(2, 3, 32, 32)
    h = network.stem(network.normalize(x))  # type: ignore[operator]
    expected = [h]
    for block in network.residual_blocks():
        h = F.relu(h)
        inner = block.first(h)
        h = block.shortcut(h) + block.second(F.relu(inner))
        expected += [inner, h]
    expected.append(network.classifier(F.relu(h).mean((2, 3))))
    assert [tuple(e.shape[1:]) for e in expected] == [
        (16, 32, 32),
        (16, 32, 32),
        (16, 32, 32),
        (32, 16, 16),
        (32, 16, 16),
        (64, 8, 8),
        (64, 8, 8),
        (10,),
    ]
    for layer, features in enumerate(expected, start=1):
        torch.testing.assert_close(network.features(x, layer), features)


def test_resnet2_pools_to_4x4_before_its_classifier() -> None:
    network = build("resnet2")
    x = images(2, 3, 32, 32)
    pooled = F.avg_pool2d(F.relu(network.features(x, 1)), 8)
    assert network.embedding_size == 256
    torch.testing.assert_close(network(x), network.classifier(pooled.flatten(1)))


def test_identity_shortcuts_subsample_and_add_zero_channels() -> None:
    network = build("resnet8", shortcut="identity")
    first_of_stage_two = network.residual_blocks()[1]
    x = images(1, 16, 6, 6)
    shortcut = first_of_stage_two.shortcut(x)
    assert shortcut.shape == (1, 32, 3, 3)
    assert torch.equal(shortcut[:, :16], x[:, :, ::2, ::2])
    assert not shortcut[:, 16:].any()
    assert network(images(2, 3, 9, 9)).shape == (2, 10)  # odd sides: both branches round up


def test_leaky_relu_keeps_a_tenth_of_the_gradient_of_dead_units() -> None:
    network = build("cce_mnist", (1, 8, 8), activation="leaky_relu")
    pre = torch.tensor([[-2.0, 3.0]])
    torch.testing.assert_close(network.embed(pre), torch.tensor([[-0.2, 3.0]]))
    assert not any(isinstance(part, nn.ReLU) for part in network.modules())


@pytest.mark.parametrize(
    ("depth", "nearest"), [(10, "8 and 14"), (1, "2 and 8"), (-3, "2 and 8"), (19, "14 and 20"), (33, "32 and 38")]
)
def test_a_depth_that_is_not_6n_plus_2_is_refused_with_the_nearest_two(depth: int, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"depth is {depth}; expected 6n\\+2, the nearest are {nearest}$"):
        build("resnet", depth=depth)


def test_a_depth_in_the_name_takes_no_second_depth() -> None:
    with pytest.raises(UsageError, match="resnet8 has no parameter 'depth'; it has: activation, shortcut"):
        build("resnet8", depth=14)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("small_resnet", {"width": 0}, "width is 0; expected at least 1"),
        ("resnet18", {"width": 0}, "width is 0; expected at least 1"),
        ("cce_cifar10", {"dropout": 1.0}, "dropout is 1.0"),
        ("cce_cifar10", {"dropout": -0.1}, "dropout is -0.1"),
        ("resnet8", {"activation": "gelu"}, "expected one of relu, leaky_relu"),
        ("resnet8", {"shortcut": "conv"}, "expected one of projection, identity"),
    ],
)
def test_impossible_parameters_are_refused(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(name, **params)


@pytest.mark.parametrize("name", ["cce_mnist", "cce_cifar10", "cce_cifar100"])
def test_cce_networks_follow_their_table_and_have_no_batch_norm(name: str) -> None:
    network = build(name, (1, 28, 28))
    per_block, width, hidden = {
        "cce_mnist": (2, 32, [200, 200]),
        "cce_cifar10": (2, 64, [256, 256]),
        "cce_cifar100": (3, 64, [256, 256, 256]),
    }[name]
    shapes = [tuple(features.shape[1:]) for features in network.trunk(images(1, 1, 28, 28))]
    convolutions = [(width, 28, 28)] * per_block + [(2 * width, 14, 14)] * per_block
    assert shapes == [*convolutions, *[(n,) for n in hidden]]
    assert not any(isinstance(part, nn.BatchNorm2d) for part in network.modules())


def test_dropout_acts_once_and_in_training_mode_only() -> None:
    network = build("cce_cifar100", (1, 8, 8))
    x = images(2, 1, 8, 8)
    calls: list[Tensor] = []
    assert isinstance(network.dropout, nn.Dropout)
    handle = network.dropout.register_forward_hook(lambda _, inputs, output: calls.append(inputs[0]))
    network(x)
    handle.remove()
    assert len(calls) == 1
    assert torch.equal(network(x), network(x))
    network.train()
    first, second = network.num_layers - 3, network.num_layers - 2
    assert torch.equal(network.features(x, first), network.features(x, first))
    assert not torch.equal(network.features(x, second), network.features(x, second))
    torch.manual_seed(0)
    fixed = network(x)
    torch.manual_seed(0)
    assert torch.equal(network(x), fixed)
    without = build("cce_cifar100", (1, 8, 8), dropout=0.0).train()
    assert torch.equal(without(x), without(x))


def test_normalisation_constants_are_buffers_inside_the_network() -> None:
    architecture = ARCHITECTURES.get("small_resnet")
    spec = ImageSpec((3, 8, 8), 10, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    network = architecture(spec, architecture.Params())
    assert not {"normalize.mean", "normalize.std"} & {name for name, _ in network.named_parameters()}
    x = images(1, 3, 8, 8)
    expected = torch.stack([(x[:, 0] - 0.1) / 0.5, x[:, 1] - 0.2, (x[:, 2] - 0.3) / 2.0], dim=1)
    torch.testing.assert_close(network.normalize(x), expected)


def input_gradient(network: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).square().sum(), x)
    return gradient


@pytest.mark.parametrize("name", ["resnet8", "small_resnet", "resnet18"])
def test_branch_scale_leaves_the_logits_bit_for_bit_and_changes_the_gradient(name: str) -> None:
    network = build(name, (3, 8, 8), **SMALL.get(name, {}))
    x = images(2, 3, 8, 8)
    logits, gradient = network(x), input_gradient(network, x)
    for block in network.residual_blocks():
        block.branch_scale = 0.3
    assert torch.equal(network(x), logits)
    assert not torch.allclose(input_gradient(network, x), gradient, rtol=0.01)


def test_branch_scale_zero_leaves_the_gradient_of_the_shortcuts_alone() -> None:
    network = build("resnet8", (3, 8, 8))
    x = images(2, 3, 8, 8)
    for block in network.residual_blocks():
        block.branch_scale = 0.0
    skip = x.clone().requires_grad_()
    h = network.stem(network.normalize(skip))  # type: ignore[operator]
    for block in network.residual_blocks():
        h = F.relu(h)
        h = block.shortcut(h) + block(h)[1].detach() - block.shortcut(h).detach()
    logits = network.classifier(F.relu(h).mean((2, 3)))
    (expected,) = torch.autograd.grad(logits.square().sum(), skip)
    torch.testing.assert_close(input_gradient(network, x), expected, rtol=1e-4, atol=1e-6)


def test_two_scalar_blocks_compose_as_products_of_one_plus_gamma_f_prime() -> None:
    class Scalar(ResidualBlock):
        def __init__(self, slope: float) -> None:
            super().__init__(1, 1, 1, "relu")
            conv = nn.Conv2d(1, 1, 1, bias=False)
            nn.init.constant_(conv.weight, slope)
            self.first, self.second = nn.Sequential(nn.Identity()), nn.Sequential(conv)

    gamma, blocks = 0.25, [Scalar(3.0), Scalar(5.0)]
    x = torch.ones(1, 1, 1, 1, requires_grad=True)
    h = x
    for block in blocks:
        block.branch_scale = gamma
        h = block(h)[1]
    (gradient,) = torch.autograd.grad(h.sum(), x)
    assert h.item() == (1 + 3) * (1 + 5)
    assert gradient.item() == (1 + gamma * 3) * (1 + gamma * 5)


def test_plain_networks_have_no_residual_blocks() -> None:
    assert build("cce_mnist", (1, 8, 8)).residual_blocks() == []
    assert len(build("resnet20").residual_blocks()) == 9
