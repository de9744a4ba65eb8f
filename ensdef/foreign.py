"""Tensors out of other people's ``.pth`` files. The one place where a pickle is opened, and only for its tensors.

``torch.load(weights_only=True)`` builds tensors, numbers, texts and containers, and refuses to call anything else.
Before it is asked, the file's size, its zip listing and the whole numbers in its pickle are bounded: a few bytes can
ask for terabytes.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensdef.errors import CheckpointError

#: Largest file, most entries of its archive, largest pickle inside.
LARGEST_FILE, MOST_ENTRIES, LARGEST_PICKLE = 4 << 30, 100_000, 16 << 20
#: Deepest nesting, and most tensors, that are looked at.
DEEPEST, MOST_TENSORS = 16, 100_000
#: How ``torch.save`` began its files before it wrote zip archives.
_MAGIC = 0x1950A86A20F9469CFC6C


def read_foreign(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, named by the dotted way to it; what an optimiser keeps is left out.

    Raises:
        CheckpointError: no such file, too large, no file of ``torch.save``, or one that holds more than data.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"no file {path}; expected what torch.save wrote (.pth, .pth.tar, .pt)")
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise CheckpointError(f"{path} has {size / 2**30:.1f} GB, more than the {LARGEST_FILE >> 30} GB that are read")
    _check_pickle(path, _pickle_in(path, size), size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that torch will not read for ever
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise almost anything
        reason = str(error).partition("\n")[0][:200]
        raise CheckpointError(
            f"{path} holds more than tensors, or is damaged, and was refused; nothing in it was run. torch says: "
            f"{type(error).__name__}: {reason}. Ask its authors for the state dict alone"
        ) from error
    tensors: dict[str, Tensor] = {}
    _collect(content, "", tensors, 0)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors but a {type(content).__name__}")
    return tensors


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pickle_in(path: Path, size: int) -> bytes:
    """The pickle that tells which tensors there are: of the archive, or the head of an older file."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return file.read(LARGEST_PICKLE)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
            if len(entries) > MOST_ENTRIES or packed or sum(entry.file_size for entry in entries) > size:
                raise CheckpointError(
                    f"{path} is no archive of torch.save: {len(entries)} entries, {len(packed)} of them compressed; "
                    "torch stores tensors as they are"
                )
            inside = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            if len(inside) != 1 or inside[0].file_size > LARGEST_PICKLE:
                found = f"{inside[0].file_size} bytes" if len(inside) == 1 else f"{len(inside)} of them"
                raise CheckpointError(
                    f"{path}: expected one data.pkl of at most {LARGEST_PICKLE >> 20} MB, got {found}"
                )
            return archive.read(inside[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} is a damaged archive ({error})") from error


def _check_pickle(path: Path, content: bytes, size: int) -> None:
    """Read a pickle as a list of instructions, none of which is followed.

    No tensor of a file has more elements than the file has bytes.
    """
    stream = io.BytesIO(content)
    try:
        # older files are five pickles in a row: magic number, version, system, content, names of storages
        magic = _MAGIC in _numbers(path, stream, size)
        for _ in range(4 if magic else 0):
            _numbers(path, stream, size)
    except CheckpointError:
        raise
    except Exception as error:  # pickletools raises what it meets
        raise CheckpointError(
            f"{path} is no file of torch.save ({type(error).__name__}: {str(error)[:100]})"
        ) from error


def _numbers(path: Path, stream: io.BytesIO, size: int) -> set[int]:
    """Whole numbers of the next pickle."""
    numbers = {argument for _, argument, _ in pickletools.genops(stream) if isinstance(argument, int)}
    asked = max((abs(number) for number in numbers - {_MAGIC}), default=0)
    if asked > max(size, 2**16):
        raise CheckpointError(f"{path} asks for {asked:,} of something, and has {size:,} bytes; it was refused")
    return numbers


def _collect(content: Any, name: str, tensors: dict[str, Tensor], depth: int) -> None:
    if depth > DEEPEST or len(tensors) > MOST_TENSORS:
        raise CheckpointError(f"more than {MOST_TENSORS:,} tensors, or nested deeper than {DEEPEST} levels")
    if isinstance(content, Tensor):
        tensors[name] = content
    elif isinstance(content, Mapping):
        if "param_groups" in content:  # momentum and the like have the shapes of weights, and are none
            return
        for key, value in content.items():
            _collect(value, f"{name}.{key}" if name else str(key), tensors, depth + 1)
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            _collect(value, f"{name}.{number}" if name else str(number), tensors, depth + 1)
