"""Optical Recognition of Handwritten Digits (Alpaydin, Kaynak; UCI repository 1998).

The 1,797 images that scikit-learn ships, 8x8, 17 grey levels: no download, and a network trains in seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from ensdef.data import Data, DataSource, Split, register_dataset, subset
from ensdef.errors import DataError

TEST_IMAGES = 500


@register_dataset("digits")
class Digits(DataSource):
    """scikit-learn's 1,797 handwritten digits of 8x8: offline, trains in seconds."""

    architecture = "small_resnet"
    eps: ClassVar[dict[str, str]] = {"linf": "0.2", "l2": "1.0"}
    augment = "none"

    def load(self, folder: Path | None, image_size: int | None) -> Data:
        """1,297 training and 500 test images; ``folder`` is not needed and not read."""
        if image_size not in (None, 8):
            raise DataError(f"digits are 8x8 images, got image size {image_size}; leave --image-size out")
        # here, not above: scikit-learn takes a second to import, and listing data sets wants only the facts
        from sklearn.datasets import load_digits

        bunch = load_digits()
        whole = Split(
            torch.as_tensor(bunch.images).to(torch.uint8).unsqueeze(1),
            torch.as_tensor(bunch.target, dtype=torch.int64),
            levels=16,
        )
        test = subset(len(whole), TEST_IMAGES, "digits test")
        is_train = torch.ones(len(whole), dtype=torch.bool)
        is_train[test] = False
        return Data(
            "digits",
            whole.select(is_train.nonzero().flatten()),
            whole.select(test),
            tuple(str(digit) for digit in range(10)),
        )
