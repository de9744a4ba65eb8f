"""Training uses oneDNN's convolutions, except where they would write past a buffer."""

import pytest
import torch
from torch import nn

from ensdef.backend import safe_convolutions
from ensdef.build import create_defense

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("architecture", ["small_resnet", "resnet8", "resnet18"])
def test_the_papers_networks_keep_the_fast_kernels(architecture: str) -> None:
    defense = create_defense("nat", architecture=architecture, members=1, image_shape=(3, 32, 32))
    with safe_convolutions(defense, CPU):
        assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize(("inputs", "kernel", "fast"), [(4, 1, False), (12, 1, False), (16, 1, True), (4, 3, True)])
def test_a_1x1_convolution_of_few_channels_does_without(inputs: int, kernel: int, fast: bool) -> None:
    module = nn.Sequential(nn.Conv2d(inputs, 16, kernel))
    with safe_convolutions(module, CPU):
        assert torch.backends.mkldnn.enabled is fast
    with safe_convolutions(module, CUDA):
        assert torch.backends.mkldnn.enabled
    assert torch.backends.mkldnn.enabled, "the setting is given back"
