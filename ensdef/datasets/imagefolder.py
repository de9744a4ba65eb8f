"""Your own images in the folder layout of torchvision's ImageFolder: one subfolder a class.

``FOLDER/train/<class>/*`` and ``FOLDER/test/<class>/*``; hidden files and other types are passed over.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ensdef.data import Data, DataSource, Split, register_dataset
from ensdef.datasets._resize import check_size
from ensdef.errors import DataError

FORMATS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
#: Largest image that is read, in bytes and in pixels.
LARGEST_FILE, MOST_PIXELS = 256 << 20, 64_000_000
LAYOUT = "train/<class>/<image> and test/<class>/<image>"


@register_dataset("imagefolder")
class ImageFolder(DataSource):
    """Any folder of images, train/<class>/* and test/<class>/*; read as RGB."""

    needs_folder = True

    def load(self, folder: Path | None, image_size: int | None) -> Data:
        """Every image, classes and files in the order of their names.

        Args:
            folder: has ``train`` and ``test``; links are followed.
            image_size: side to resize to, bilinear with antialias, whatever the shape; None: all images must
                be square and of one size.
        Raises:
            DataError: the layout is not as expected, an image cannot be read, or sizes differ.
        """
        if folder is None:
            raise DataError(f"imagefolder needs a folder with {LAYOUT}, got none; pass --data-dir FOLDER")
        if not folder.is_dir():
            raise DataError(
                f"expected a folder with {LAYOUT}, but {folder} "
                f"{'is a file' if folder.exists() else 'does not exist'}; check --data-dir"
            )
        check_size(image_size)
        train, test = _files_by_class(folder, "train"), _files_by_class(folder, "test")
        _require_same_classes(folder, set(train), set(test))
        first = next(iter(train.values()))[0]
        side = _rgb(first).width if image_size is None else image_size
        return Data(
            "imagefolder",
            _read(train, side, image_size is not None),
            _read(test, side, image_size is not None),
            tuple(train),
        )


def _files_by_class(folder: Path, split: str) -> dict[str, list[Path]]:
    parent = folder / split
    visible = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if not parent.is_dir():
        raise DataError(
            f"expected {LAYOUT} in {folder}, but there is no folder {split}; "
            f"it has: {_names([path.name for path in visible])}"
        )
    classes = sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise DataError(
            f"expected one subfolder a class in {parent}, at least two, got "
            f"{_names([path.name for path in classes])}; "
            f"put the images of each class into {parent / '<class>'}"
        )
    files = {}
    for path in classes:
        # broken links stay in, so that opening them tells; macOS writes ._name.jpg files that are no images
        files[path.name] = sorted(
            file for file in path.iterdir() if file.suffix.lower() in FORMATS and not file.name.startswith(".")
        )
        if not files[path.name]:
            what = "other files" if any(path.iterdir()) else "an empty folder"
            raise DataError(
                f"expected images ({' '.join(FORMATS)}) in {path}, got {what}; add images or remove the folder"
            )
    return files


def _require_same_classes(folder: Path, train: set[str], test: set[str]) -> None:
    differences = [
        f"only in {split}: {_names(sorted(names))}"
        for split, names in (("train", train - test), ("test", test - train))
        if names
    ]
    if differences:
        raise DataError(
            f"expected the same classes in train and test of {folder}, but "
            f"{'; '.join(differences)}; rename or add folders"
        )


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:10]) or "nothing"
    return f"{shown}, and {len(names) - 10} more" if len(names) > 10 else shown


def _read(files: dict[str, list[Path]], side: int, resize: bool) -> Split:
    paths = [path for of_class in files.values() for path in of_class]
    labels = torch.cat([torch.full((len(of_class),), label) for label, of_class in enumerate(files.values())])
    images = torch.empty(len(paths), 3, side, side, dtype=torch.uint8)
    # threads: decoding and resizing release the interpreter lock
    with ThreadPoolExecutor() as pool:
        for index, pixels in enumerate(pool.map(partial(_pixels, side=side, resize=resize), paths)):
            images[index] = torch.from_numpy(pixels).permute(2, 0, 1)
    return Split(images, labels)


def _pixels(path: Path, side: int, resize: bool) -> NDArray[np.uint8]:
    """One image, (side, side, 3)."""
    image = _rgb(path)
    if resize:
        image = image.resize((side, side), Image.Resampling.BILINEAR)  # antialiased when it shrinks
    elif image.size != (side, side):
        raise DataError(
            f"expected square images, all {side}x{side} like the first one, but {path} is "
            f"{image.width}x{image.height} (width x height); pass --image-size N to resize all"
        )
    return np.array(image, dtype=np.uint8)


def _rgb(path: Path) -> Image.Image:
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise DataError(f"it has {size / 2**20:.0f} MB, more than the {LARGEST_FILE >> 20} MB that are read")
        with Image.open(path) as image:
            # before anything is decoded: a file of a few kilobytes may unpack to gigabytes
            if image.width * image.height > MOST_PIXELS:
                raise DataError(f"it has {image.width}x{image.height} pixels, more than {MOST_PIXELS:,}")
            mode = image.mode
            converted = image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise DataError(
            f"{path} cannot be read as an image ({type(error).__name__}: {error}); replace or remove the file"
        ) from error
    if mode.startswith(("I", "F")):
        # Pillow clips these to 8 bits, which whitens the image without a word
        raise DataError(f"expected 8 bits a channel, but {path} has pixels of mode {mode}; convert it first")
    return converted
