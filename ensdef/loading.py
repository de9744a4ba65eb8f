"""Finding a data set: from names on the command line to tensors and the specification that can load them again."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from ensdef.data import Data, DataSource, Split, subset
from ensdef.errors import DataError
from ensdef.registry import DATASETS
from ensdef.specs import DataSpec

#: Test images attacked when nothing else is asked for.
DEFAULT_SAMPLES = 1000


@lru_cache(maxsize=2)
def find_data(
    name: str, folder: str | None = None, image_size: int | None = None, limit: int | None = None
) -> tuple[Data, DataSpec]:
    """Load a data set and describe it.

    Args:
        name: registered data set.
        folder: ``--data-dir``.
        image_size: side to resize to, in pixels.
        limit: number of training images to keep.
    Raises:
        UsageError: no such data set.
        DataError: it cannot be read, or has fewer images than asked for.
    """
    source: DataSource = DATASETS.get(name)()
    if image_size is not None and image_size < 1:
        raise DataError(f"image-size is {image_size}; expected at least 1 pixel")
    data = source.load(Path(folder) if folder is not None else None, image_size)
    data = data.limited(limit)
    spec = DataSpec(
        name,
        folder,
        image_size,
        limit,
        data.train.checksum(),
        data.test.checksum(),
        data.image_shape,
        len(data.classes),
        source.mean or (0.5,),
        source.std or (0.25,),
    )
    return data, spec


def reload_data(spec: DataSpec) -> Data:
    """Load what a specification names and make sure that it is still the same.

    Raises:
        DataError: the images or labels changed since.
    """
    data, found = find_data(spec.name, spec.folder, spec.image_size, spec.limit)
    if dataclasses.replace(found, folder=None) != dataclasses.replace(spec, folder=None):
        raise DataError(
            f"data set {spec.name} changed: checksums {found.train_checksum}, {found.test_checksum} where "
            f"{spec.train_checksum}, {spec.test_checksum} were expected"
        )
    return data


def attacked_subset(data: Data, samples: int | None) -> tuple[Split, Tensor]:
    """The first ``samples`` images of the permuted test set and their positions in it.

    Args:
        samples: None: all, up to 1,000.
    Raises:
        DataError: more asked for than there are.
    """
    total = len(data.test)
    ids = subset(total, min(total, DEFAULT_SAMPLES) if samples is None else samples, f"{data.name} test")
    return data.test.select(ids), ids
