"""Data sets that torchvision downloads, checks and parses."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch

from ensdef.data import Data, Split
from ensdef.datasets._resize import resized
from ensdef.errors import DataError


def load(name: str, class_name: str, folder: Path | None, image_size: int | None, by_hand: str) -> Data:
    """Both splits of a torchvision data set, downloaded when they are not there.

    Args:
        name: ours, for messages and for the result.
        class_name: torchvision's.
        folder: where it is or shall be; None: ``data`` in the working directory.
        image_size: side to resize to; None: as stored.
        by_hand: what to put where, relative to the folder, when there is no network.
    Raises:
        DataError: neither found nor downloaded, or damaged.
    """
    # here, not above: listing data sets and reading their facts should not take torchvision's import time
    from torchvision import datasets

    root = Path("data") if folder is None else folder
    try:
        # older torchvision prints progress on stdout, which belongs to the caller's output
        with contextlib.redirect_stdout(sys.stderr):
            # one download brings both splits
            train = getattr(datasets, class_name)(root, train=True, download=True)
            test = getattr(datasets, class_name)(root, train=False, download=False)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name} is not in {root.resolve()} and could not be downloaded there "
            f"({type(error).__name__}: {reason}); pass --data-dir with the right folder or, "
            f"without a network, put into {root.resolve()} {by_hand}"
        ) from error
    return Data(name, _split(train, image_size), _split(test, image_size), tuple(map(str, train.classes)))


def _split(dataset: Any, image_size: int | None) -> Split:
    images = torch.as_tensor(dataset.data)
    # (N, H, W) for MNIST, (N, H, W, C) for CIFAR
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Split(resized(images, image_size), torch.as_tensor(dataset.targets, dtype=torch.int64))
