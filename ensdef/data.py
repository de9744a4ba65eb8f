"""Data sets as tensors: whole, in memory, 8 bits a value, scaled to [0, 1] a batch at a time.

A data set plug-in is a class with a few facts (known without loading) and ``load``.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ensdef.errors import DataError, PluginError
from ensdef.registry import DATASETS

#: Test images are permuted once with this seed, so that subsets of different sizes nest and never move.
SUBSET_SEED = 0


@dataclass(frozen=True)
class Split:
    """Images and labels of one split.

    Args:
        images: (N, C, H, W), uint8 in [0, levels].
        labels: (N,), int64 in [0, number of classes).
        levels: the value that becomes 1.0 (255 for photographs, 16 for digits).
    """

    images: Tensor
    labels: Tensor
    levels: int = 255

    def __post_init__(self) -> None:
        assert (self.images.dtype, self.images.dim()) == (torch.uint8, 4), self.images.shape
        assert (self.labels.dtype, self.labels.shape) == (torch.int64, self.images.shape[:1]), self.labels.shape

    def __len__(self) -> int:
        return len(self.labels)

    def x(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Images as float32 in [0, 1], (B, C, H, W)."""
        return self.images[index].float().div_(self.levels)

    def select(self, index: Tensor) -> Split:
        """The images at ``index``, in that order."""
        return Split(self.images[index], self.labels[index], self.levels)

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device), self.levels)

    def checksum(self) -> str:
        """SHA-256 of shape, levels, pixels and labels, first 16 hex digits."""
        digest = hashlib.sha256(f"{tuple(self.images.shape)} {self.levels}".encode())
        digest.update(self.images.contiguous().cpu().numpy().tobytes())
        digest.update(self.labels.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Data:
    """A loaded data set."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def limited(self, limit: int | None) -> Data:
        """The first ``limit`` training images of the fixed permutation; None keeps all.

        Raises:
            DataError: fewer training images than asked for.
        """
        if limit is None:
            return self
        return Data(
            self.name,
            self.train.select(subset(len(self.train), limit, f"{self.name} training")),
            self.test,
            self.classes,
        )


class DataSource(ABC):
    """A data set plug-in: facts that need no loading, and ``load``."""

    #: Default architecture, radii by norm, augmentation.
    architecture: ClassVar[str] = "resnet20"
    eps: ClassVar[dict[str, str]] = {"linf": "8/255", "l2": "128/255"}
    augment: ClassVar[str] = "crop+flip"
    needs_folder: ClassVar[bool] = False
    #: Per-channel mean and standard deviation for the normalisation inside the members; None: 0.5 and 0.25.
    mean: ClassVar[tuple[float, ...] | None] = None
    std: ClassVar[tuple[float, ...] | None] = None

    @abstractmethod
    def load(self, folder: Path | None, image_size: int | None) -> Data:
        """Read the whole data set.

        Args:
            folder: ``--data-dir``; None: the source's own place.
            image_size: side in pixels to resize to; None: as stored.
        Raises:
            DataError: folder missing, empty, or not what it should be.
        """


def subset(total: int, size: int, what: str) -> Tensor:
    """The first ``size`` of a fixed permutation of ``range(total)``, (size,), int64.

    Raises:
        DataError: more asked for than there are.
    """
    if size > total:
        raise DataError(f"asked for {size} {what} images, but there are {total}")
    if size < 1:
        raise DataError(f"asked for {size} {what} images; expected at least 1")
    generator = torch.Generator().manual_seed(SUBSET_SEED)
    return torch.randperm(total, generator=generator)[:size]


S = TypeVar("S", bound=type[DataSource])


def register_dataset(name: str) -> Callable[[S], S]:
    """Class decorator: makes ``--dataset name`` find this class."""

    def check(plugin: Any) -> None:
        if not (isinstance(plugin, type) and issubclass(plugin, DataSource)):
            raise PluginError(
                f"@register_dataset({name!r}) expects a subclass of ensdef.data.DataSource, got {plugin!r}"
            )

    return DATASETS.register(name, check)
