"""MNIST (LeCun, Bottou, Bengio, Haffner; Proc. IEEE 1998) and Fashion-MNIST (Xiao, Rasul, Vollgraf; 2017).

60,000 training and 10,000 test images of 28x28, one channel, read by torchvision.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from ensdef.data import Data, DataSource, register_dataset
from ensdef.datasets import _torchvision

FILES = "the files {train,t10k}-images-idx3-ubyte.gz and {train,t10k}-labels-idx1-ubyte.gz in the subfolder "


@register_dataset("mnist")
class Mnist(DataSource):
    """MNIST: 70,000 handwritten digits of 28x28; downloaded when missing."""

    architecture = "cce_mnist"
    eps: ClassVar[dict[str, str]] = {"linf": "0.3", "l2": "2.0"}
    augment = "none"  # a flipped or cropped digit may be another digit

    def load(self, folder: Path | None, image_size: int | None) -> Data:
        return _torchvision.load("mnist", "MNIST", folder, image_size, FILES + "MNIST/raw")


@register_dataset("fashion_mnist")
class FashionMnist(DataSource):
    """Fashion-MNIST: 70,000 pictures of clothes, 28x28, 10 classes; downloaded when missing."""

    architecture = "cce_mnist"
    eps: ClassVar[dict[str, str]] = {"linf": "0.1", "l2": "1.5"}
    augment = "none"

    def load(self, folder: Path | None, image_size: int | None) -> Data:
        return _torchvision.load("fashion_mnist", "FashionMNIST", folder, image_size, FILES + "FashionMNIST/raw")
