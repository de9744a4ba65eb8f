"""Learning Multiple Layers of Features from Tiny Images (Krizhevsky; technical report 2009).

CIFAR-10 and CIFAR-100: 50,000 training and 10,000 test photographs of 32x32, read by torchvision.
"""

from __future__ import annotations

from pathlib import Path

from ensdef.data import Data, DataSource, register_dataset
from ensdef.datasets import _torchvision

HOME = "https://www.cs.toronto.edu/~kriz/"


@register_dataset("cifar10")
class Cifar10(DataSource):
    """CIFAR-10: 60,000 photographs of 32x32 in 10 classes; downloaded when missing."""

    # DVERGE's code, and all that follow it
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2023, 0.1994, 0.2010)

    def load(self, folder: Path | None, image_size: int | None) -> Data:
        return _torchvision.load(
            "cifar10", "CIFAR10", folder, image_size, f"the file cifar-10-python.tar.gz ({HOME}cifar-10-python.tar.gz)"
        )


@register_dataset("cifar100")
class Cifar100(DataSource):
    """CIFAR-100: 60,000 photographs of 32x32 in 100 classes; downloaded when missing."""

    # iGAT's code
    mean = (0.5071, 0.4867, 0.4408)
    std = (0.2675, 0.2565, 0.2761)

    def load(self, folder: Path | None, image_size: int | None) -> Data:
        return _torchvision.load(
            "cifar100",
            "CIFAR100",
            folder,
            image_size,
            f"the file cifar-100-python.tar.gz ({HOME}cifar-100-python.tar.gz)",
        )
