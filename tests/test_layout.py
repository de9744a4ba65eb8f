"""Training runs in the channels-last layout, except where a CPU kernel would write past its buffer."""

import pytest
import torch
from torch import nn

from ensdef.build import create_defense
from ensdef.layout import training_layout

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("architecture", ["small_resnet", "resnet8", "resnet18"])
def test_the_papers_networks_train_channels_last(architecture: str) -> None:
    defense = create_defense("nat", architecture=architecture, members=1, image_shape=(3, 32, 32))
    assert training_layout(defense, CPU) is torch.channels_last


@pytest.mark.parametrize(
    ("inputs", "kernel", "expected"),
    [
        (4, 1, torch.contiguous_format),
        (12, 1, torch.contiguous_format),
        (16, 1, torch.channels_last),
        (4, 3, torch.channels_last),
    ],
)
def test_a_1x1_convolution_of_few_channels_keeps_the_usual_layout(
    inputs: int, kernel: int, expected: torch.memory_format
) -> None:
    module = nn.Sequential(nn.Conv2d(inputs, 16, kernel))
    assert training_layout(module, CPU) is expected
    assert training_layout(module, CUDA) is torch.channels_last
