"""Honest results folders, made by `ensdef bench` itself: small ones of many kinds, and one of a thousand images."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from ensdef.cli import cli, run  # noqa: F401 - run adds its commands

SMALL = ("--members", "2", "--device", "cpu", "--health", "off")
#: Attacks of every kind: a ball in two norms or none, shortest perturbations, searches without a gradient.
KINDS = (
    ("pgd[steps=10]", "fgsm", "mim[steps=5]", "cw[steps=20]", "deepfool", "square[queries=40]", "fog", "snow"),
    ("pgd[steps=10]", "deepfool"),
)


@dataclass(frozen=True)
class Honest:
    """A results folder that nobody touched.

    Args:
        data_dir: the image folder its cells were attacked on; None: the shipped digits.
        record: of the cell that forgers take; ``sibling`` of another attack on the same weights, ``stranger`` of the
            same attack on other weights.
    """

    results: Path
    data_dir: Path | None
    record: Path
    sibling: Path
    stranger: Path


def bench(*words: str | Path) -> None:
    """Run `ensdef bench` in this process, in silence.

    Raises:
        SystemExit: a cell failed.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cli.main(["bench", *map(str, words)], standalone_mode=False)


def photos(folder: Path, train: int = 300, test: int = 60) -> Path:
    """Handwritten digits as an image folder of PNG files."""
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    for number, (image, label) in enumerate(zip(pixels[: train + test], digits.target, strict=False)):
        place = folder / ("train" if number < train else "test") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert("RGB").save(place / f"{number:04d}.png")
    return folder


def for_forgers(folder: Path) -> Honest:
    """A folder with three cells, of which some images are wrong, some fooled and some robust."""
    data, results = photos(folder / "photos"), folder / "results"
    common = ("--dataset", "imagefolder", "--data-dir", data, "--arch", "small_resnet[width=8]", *SMALL)
    same = (*common, "--method", "nat", "--epochs", "12", "--results", results)
    bench(*same, "--attack", "pgd[steps=5],fgsm", "--eps", "16/255")
    (record,), (sibling,) = (list(results.glob(f"records/*/nat/{name}-*")) for name in ("pgd", "fgsm"))
    bench(*same, "--attack", "pgd[steps=5]", "--eps", "16/255", "--seed", "1")
    (stranger,) = set(results.glob("records/*/nat/pgd-*")) - {record}
    return Honest(results, data, record, sibling, stranger)


def of_every_kind(results: Path, methods: Sequence[str]) -> list[Path]:
    """Records of every kind of attack on each defence, ten a defence."""
    common = ("--epochs", "4", "--limit", "300", "--samples", "100", *SMALL, "--method", ",".join(methods))
    linf, l2 = KINDS
    bench(*common, "--attack", ",".join(linf), "--eps", "0.1", "--results", results)
    bench(*common, "--attack", ",".join(l2), "--norm", "l2", "--eps", "0.5", "--results", results)
    return sorted(results.glob("records/*/*/*.json"))


def of_many_images(folder: Path, count: int) -> tuple[Path, Path]:
    """Three ResNet-8 attacked on as many random images of CIFAR's size, bright or dark: the record, the images."""
    rng = np.random.default_rng(0)
    for split, total in (("train", 400), ("test", count)):
        for number in range(total):
            bright = number % 2
            place = folder / "photos" / split / ("bright" if bright else "dark")
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 216, (32, 32, 3)) + 40 * bright
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number:05d}.png")
    results = folder / "results"
    words = ("--dataset", "imagefolder", "--data-dir", folder / "photos", "--arch", "resnet8", "--method", "nat")
    attack = ("--attack", "fgsm", "--eps", "20/255", "--samples", str(count), "--epochs", "3")
    bench(*words, *attack, "--members", "3", "--device", "cpu", "--health", "off", "--results", results)
    (record,) = results.glob("records/*/*/*.json")
    return record, folder / "photos"
