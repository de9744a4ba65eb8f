"""Data sets: what a source says of itself, what it loads, and what it says when it cannot."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ensdef.architecture import ImageSpec
from ensdef.data import Data, DataSource, subset
from ensdef.datasets._resize import CHUNK, resized
from ensdef.errors import DataError
from ensdef.registry import ARCHITECTURES, DATASETS

NAMES = ["cifar10", "cifar100", "digits", "fashion_mnist", "imagefolder", "mnist"]


def source(name: str) -> DataSource:
    found: DataSource = DATASETS.get(name)()
    return found


@pytest.fixture(scope="module")
def digits() -> Data:
    return source("digits").load(None, None)


# facts


@pytest.mark.parametrize(
    ("name", "architecture", "linf", "l2", "augment", "needs_folder"),
    [
        ("digits", "small_resnet", "0.2", "1.0", "none", False),
        ("cifar10", "resnet20", "8/255", "128/255", "crop+flip", False),
        ("cifar100", "resnet20", "8/255", "128/255", "crop+flip", False),
        ("mnist", "cce_mnist", "0.3", "2.0", "none", False),
        ("fashion_mnist", "cce_mnist", "0.1", "1.5", "none", False),
        ("imagefolder", "resnet20", "8/255", "128/255", "crop+flip", True),
    ],
)
def test_defaults_are_known_without_loading(
    name: str, architecture: str, linf: str, l2: str, augment: str, needs_folder: bool
) -> None:
    plugin = source(name)
    assert plugin.architecture == architecture
    assert plugin.eps == {"linf": linf, "l2": l2}
    assert (plugin.augment, plugin.needs_folder) == (augment, needs_folder)
    ARCHITECTURES.get(plugin.architecture)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ("cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        ("digits", None, None),
        ("mnist", None, None),
        ("fashion_mnist", None, None),
        ("imagefolder", None, None),
    ],
)
def test_normalisation_is_dverges_for_cifar_and_the_default_elsewhere(name: str, mean: Any, std: Any) -> None:
    assert (source(name).mean, source(name).std) == (mean, std)


def test_all_six_sources_are_found() -> None:
    assert set(NAMES) <= set(DATASETS.names())


# digits


def test_digits_have_1297_training_and_500_test_images_of_8x8(digits: Data) -> None:
    assert (len(digits.train), len(digits.test)) == (1297, 500)
    assert digits.image_shape == (1, 8, 8)
    assert digits.classes == tuple("0123456789")


def test_digits_have_17_grey_levels_that_become_0_to_1(digits: Data) -> None:
    for split in (digits.train, digits.test):
        assert split.levels == 16
        assert (int(split.images.min()), int(split.images.max())) == (0, 16)
        x = split.x()
        assert x.dtype == torch.float32
        assert (x.min().item(), x.max().item()) == (0.0, 1.0)


def test_digits_are_the_same_everywhere(digits: Data) -> None:
    assert digits.train.checksum() == "9dc9dd05e67b87f7"
    assert digits.test.checksum() == "f668587662e7edae"


def test_digits_test_images_lead_the_permutation_and_training_images_are_the_rest(digits: Data) -> None:
    from sklearn.datasets import load_digits

    pixels = torch.as_tensor(load_digits().images).to(torch.uint8).unsqueeze(1)
    labels = torch.as_tensor(load_digits().target)
    test = subset(1797, 500, "digits test")
    train = torch.tensor(sorted(set(range(1797)) - set(test.tolist())))
    assert torch.equal(digits.test.images, pixels[test])
    assert torch.equal(digits.test.labels, labels[test])
    assert torch.equal(digits.train.images, pixels[train])
    assert torch.equal(digits.train.labels, labels[train])


def test_every_digit_is_in_both_splits(digits: Data) -> None:
    for split in (digits.train, digits.test):
        assert split.labels.bincount(minlength=10).min() > 30


def test_smaller_training_sets_are_prefixes_of_larger_ones(digits: Data) -> None:
    small, large = digits.limited(100), digits.limited(400)
    assert (len(small.train), len(large.train)) == (100, 400)
    assert torch.equal(small.train.images, large.train.images[:100])
    assert torch.equal(small.train.labels, large.train.labels[:100])
    assert small.test is digits.test
    assert not torch.equal(large.train.images, digits.train.images[:400])
    with pytest.raises(DataError, match="1298 digits training images, but there are 1297"):
        digits.limited(1298)


def test_digits_come_in_8x8_only() -> None:
    assert source("digits").load(None, 8).image_shape == (1, 8, 8)
    with pytest.raises(DataError, match=r"8x8 images, got image size 32; leave --image-size out"):
        source("digits").load(None, 32)


def test_the_default_network_takes_the_digits(digits: Data) -> None:
    architecture = ARCHITECTURES.get(source("digits").architecture)
    network = architecture(ImageSpec(digits.image_shape, len(digits.classes)), architecture.Params())
    assert network(digits.test.x(slice(3))).shape == (3, 10)


# torchvision


class FakeTorchvision:
    """Stands in for a torchvision class: ten training and four test images, remembers how it was called."""

    def __init__(self, shape: tuple[int, ...], tensors: bool) -> None:
        self.shape, self.tensors = shape, tensors
        self.calls: list[dict[str, Any]] = []

    def __call__(self, root: Path, train: bool, download: bool) -> SimpleNamespace:
        self.calls.append({"root": root, "train": train, "download": download})
        print("Files already downloaded and verified")
        n = 10 if train else 4
        data = np.random.default_rng(n).integers(0, 256, (n, *self.shape), dtype=np.uint8)
        targets = [label % 3 for label in range(n)]
        return SimpleNamespace(
            data=torch.from_numpy(data) if self.tensors else data,
            targets=torch.tensor(targets) if self.tensors else targets,
            classes=["a", "b", "c"],
        )


TORCHVISION = [
    ("cifar10", "CIFAR10", (32, 32, 3)),
    ("cifar100", "CIFAR100", (32, 32, 3)),
    ("mnist", "MNIST", (28, 28)),
    ("fashion_mnist", "FashionMNIST", (28, 28)),
]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, tuple[int, ...]], FakeTorchvision]:
    def install(class_name: str, shape: tuple[int, ...]) -> FakeTorchvision:
        made = FakeTorchvision(shape, tensors=len(shape) == 2)
        monkeypatch.setattr(torchvision.datasets, class_name, made)
        return made

    return install


@pytest.mark.parametrize(("name", "class_name", "shape"), TORCHVISION)
def test_torchvision_arrays_become_channels_first_bytes(
    name: str, class_name: str, shape: tuple[int, ...], fake: Any, tmp_path: Path
) -> None:
    made = fake(class_name, shape)
    data = source(name).load(tmp_path, None)
    channels = shape[2] if len(shape) == 3 else 1
    assert data.name == name
    assert data.classes == ("a", "b", "c")
    assert data.image_shape == (channels, *shape[:2])
    assert (len(data.train), len(data.test)) == (10, 4)
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    original = np.asarray(made(tmp_path, True, False).data).reshape(10, *shape[:2], channels)
    assert data.train.images[7, channels - 1, 3, 5] == original[7, 3, 5, channels - 1]
    assert np.array_equal(data.train.images.numpy(), np.moveaxis(original, 3, 1))
    assert data.train.levels == 255
    assert data.train.images.is_contiguous()


def test_torchvision_looks_in_the_given_folder_or_in_data_and_prints_nothing_on_stdout(
    fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = fake("CIFAR10", (32, 32, 3))
    source("cifar10").load(tmp_path, None)
    source("cifar10").load(None, None)
    assert [call["root"] for call in made.calls] == [tmp_path, tmp_path, Path("data"), Path("data")]
    assert [call["train"] for call in made.calls] == [True, False, True, False]
    assert made.calls[0]["download"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("name", "class_name", "shape"), TORCHVISION)
def test_torchvision_images_are_resized_on_request(
    name: str, class_name: str, shape: tuple[int, ...], fake: Any, tmp_path: Path
) -> None:
    fake(class_name, shape)
    data = source(name).load(tmp_path, 16)
    assert data.train.images.shape == (10, 3 if len(shape) == 3 else 1, 16, 16)
    assert data.test.images.shape[2:] == (16, 16)


@pytest.mark.parametrize(
    ("name", "class_name", "wanted"),
    [
        ("cifar10", "CIFAR10", "cifar-10-python.tar.gz"),
        ("cifar100", "CIFAR100", "cifar-100-python.tar.gz"),
        ("mnist", "MNIST", "MNIST/raw"),
        ("fashion_mnist", "FashionMNIST", "FashionMNIST/raw"),
    ],
)
def test_a_failed_download_says_what_to_put_where(
    name: str, class_name: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("<urlopen error\nno route to host>")

    monkeypatch.setattr(torchvision.datasets, class_name, offline)
    with pytest.raises(DataError) as caught:
        source(name).load(tmp_path / "store", None)
    message = str(caught.value)
    assert message.startswith(f"{name} is not in {tmp_path / 'store'} and could not be downloaded")
    assert "no route to host" in message
    assert wanted in message
    assert "--data-dir" in message
    assert "\n" not in message


def test_resizing_keeps_constants_averages_pixels_and_covers_every_chunk() -> None:
    constant = torch.full((CHUNK + 3, 1, 4, 4), 255, dtype=torch.uint8)
    assert torch.equal(resized(constant, 7), torch.full((CHUNK + 3, 1, 7, 7), 255, dtype=torch.uint8))
    stripes = torch.zeros(1, 1, 12, 12, dtype=torch.uint8)
    stripes[..., 1::3] = 150
    # without antialias a third of the size would sample just the bright or just the dark columns
    assert (resized(stripes, 4).float() - 50).abs().max() <= 25
    images = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    assert resized(images, None) is images
    assert resized(images, 5) is images
    with pytest.raises(DataError, match="image size is 0"):
        resized(images, 0)


# image folders


def save(path: Path, colour: Any = (10, 20, 30), size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; two training and one test image each, whose red value says which it is."""
    for label, name in enumerate(("cat", "dog")):
        for index in range(2):
            save(tmp_path / "train" / name / f"{index}.png", (100 * label + index, 5, 250))
        save(tmp_path / "test" / name / "0.png", (100 * label + 50, 5, 250))
    return tmp_path


def load(path: Path | None, image_size: int | None = None) -> Data:
    return source("imagefolder").load(path, image_size)


def test_an_image_folder_is_read_in_the_order_of_its_names(folder: Path) -> None:
    data = load(folder)
    assert data.classes == ("cat", "dog")
    assert data.image_shape == (3, 8, 8)
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert data.train.images[:, :, 4, 4].tolist() == [[0, 5, 250], [1, 5, 250], [100, 5, 250], [101, 5, 250]]
    assert data.test.labels.tolist() == [0, 1]
    assert data.test.images[:, 0, 0, 0].tolist() == [50, 150]
    assert data.train.levels == 255


def test_rows_and_columns_are_not_swapped(folder: Path) -> None:
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[2, 6, 1] = 77
    Image.fromarray(pixels).save(folder / "train/cat/0.png")
    assert load(folder).train.images[0, 1, 2, 6] == 77


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.jpg", "a.JPEG", "a.bmp", "a.webp", "a.ppm", "a.tif", "a.Tiff"])
def test_every_format_is_read_whatever_the_case_of_its_suffix(folder: Path, name: str) -> None:
    save(folder / "train/cat" / name, (200, 100, 50))
    data = load(folder)
    assert len(data.train) == 5
    # JPEG and WebP are lossy
    assert (data.train.images[2, :, 4, 4].int() - torch.tensor([200, 100, 50])).abs().max() <= 4


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("L", 90, [90, 90, 90]),
        ("RGBA", (1, 2, 3, 255), [1, 2, 3]),
        ("P", 0, None),
        ("1", 1, [255, 255, 255]),
    ],
)
def test_other_colour_modes_become_rgb(folder: Path, mode: str, colour: Any, rgb: list[int] | None) -> None:
    save(folder / "train/cat/0.png", colour, mode=mode)
    images = load(folder).train.images
    assert images.shape == (4, 3, 8, 8)
    if rgb is not None:
        assert images[0, :, 0, 0].tolist() == rgb


def test_other_files_and_hidden_files_are_passed_over(folder: Path) -> None:
    (folder / "train/cat/notes.txt").write_text("no image")
    (folder / "train/cat/._0.png").write_bytes(b"left by macOS")
    (folder / "train/.cache").mkdir()
    (folder / "train/labels.csv").write_text("no folder")
    assert len(load(folder).train) == 4
    assert load(folder).classes == ("cat", "dog")


def test_links_are_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    os.rename(folder / "train/dog", elsewhere / "dog")
    (folder / "train/dog").symlink_to(elsewhere / "dog")
    (folder / "train/cat/2.png").symlink_to(elsewhere / "dog" / "1.png")
    assert load(folder).train.images[:, 0, 0, 0].tolist() == [0, 1, 101, 100, 101]


def test_image_size_resizes_everything_with_antialias(folder: Path) -> None:
    stripes = np.zeros((40, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 200
    Image.fromarray(stripes).save(folder / "train/cat/0.png")
    data = load(folder, 4)
    assert data.image_shape == (3, 4, 4)
    assert (data.train.images[0].int() - 100).abs().max() <= 10
    assert data.test.images.shape == (2, 3, 4, 4)


def test_without_image_size_the_first_odd_file_is_named(folder: Path) -> None:
    save(folder / "train/cat/1.png", size=(8, 6))
    save(folder / "train/dog/0.png", size=(9, 9))
    with pytest.raises(DataError, match=r"all 8x8 like the first one.*cat/1.png is 8x6 .* pass --image-size"):
        load(folder)
    save(folder / "train/cat/1.png")
    with pytest.raises(DataError, match=r"dog/0.png is 9x9"):
        load(folder)


def test_a_first_image_that_is_not_square_and_a_test_image_of_another_size_are_named(folder: Path) -> None:
    save(folder / "test/dog/0.png", size=(4, 4))
    with pytest.raises(DataError, match=r"test/dog/0.png is 4x4"):
        load(folder)
    save(folder / "train/cat/0.png", size=(6, 8))
    with pytest.raises(DataError, match=r"square images.*train/cat/0.png is 6x8"):
        load(folder)


def test_a_folder_must_be_given() -> None:
    with pytest.raises(DataError, match=r"imagefolder needs a folder with train/<class>/.*pass --data-dir"):
        load(None)


def test_a_missing_folder_and_a_file_in_its_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a folder .*nowhere does not exist; check --data-dir"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file is a file; check --data-dir"):
        load(tmp_path / "file")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_refused_with_what_is_there(folder: Path, split: str) -> None:
    os.rename(folder / split, folder / "validation")
    other = "test" if split == "train" else "train"
    there = ", ".join(sorted([other, "validation"]))
    with pytest.raises(DataError, match=f"there is no folder {split}; it has: {there}$"):
        load(folder)


def test_a_split_without_class_folders_is_refused(folder: Path) -> None:
    os.rename(folder / "train", folder / "old")
    save(folder / "train/0.png")
    with pytest.raises(DataError, match=r"one subfolder a class in .*train, at least two, got nothing"):
        load(folder)
    save(folder / "train/cat/0.png")
    with pytest.raises(DataError, match=r"at least two, got cat;"):
        load(folder)


def test_a_class_without_images_is_refused(folder: Path) -> None:
    (folder / "train/emu").mkdir()
    with pytest.raises(DataError, match=r"expected images \(.png .*\) in .*train/emu, got an empty folder"):
        load(folder)
    (folder / "train/emu/readme.txt").touch()
    with pytest.raises(DataError, match=r"train/emu, got other files"):
        load(folder)


def test_classes_that_differ_between_the_splits_are_listed(folder: Path) -> None:
    save(folder / "train/emu/0.png")
    save(folder / "test/fox/0.png")
    save(folder / "test/gnu/0.png")
    with pytest.raises(DataError, match=r"same classes .*only in train: emu; only in test: fox, gnu; rename"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", None])
def test_an_unreadable_image_is_named(folder: Path, content: bytes | None) -> None:
    path = folder / "test/dog/0.png"
    whole = save(path, size=(64, 64)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(DataError, match=r"test/dog/0.png cannot be read as an image .*replace or remove"):
        load(folder, 8)


def test_a_broken_link_is_named_rather_than_left_out(folder: Path) -> None:
    (folder / "train/cat/9.png").symlink_to(folder / "gone.png")
    with pytest.raises(DataError, match=r"train/cat/9.png cannot be read"):
        load(folder)


def test_sixteen_bit_images_are_refused_rather_than_clipped(folder: Path) -> None:
    Image.fromarray(np.full((8, 8), 30_000, dtype=np.uint16)).save(folder / "train/cat/0.png")
    with pytest.raises(DataError, match=r"8 bits a channel, but .*cat/0.png has pixels of mode I"):
        load(folder)


def test_image_size_must_be_positive(folder: Path) -> None:
    with pytest.raises(DataError, match="image size is 0; expected a side of at least 1"):
        load(folder, 0)
