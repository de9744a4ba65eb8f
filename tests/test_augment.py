"""Augmentation of whole batches: every image by itself, from a given generator, within its bounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ensdef.augment import crop, flip, noise, parse, shift
from ensdef.errors import UsageError

NAMES = ["crop", "shift", "flip", "noise"]
SHAPES = [(5, 1, 8, 8), (3, 3, 32, 32), (1, 2, 8, 12), (4, 1, 5, 5)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def applied(name: str, x: Tensor, rng: torch.Generator) -> Tensor:
    (augmentation,) = parse(name)
    return augmentation(x, rng)


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator(99))


def ramp(count: int, side: int = 40) -> Tensor:
    """Images whose rows and columns can be read off: channel 0 is the row, channel 1 the column, over the side."""
    line = torch.arange(side) / side
    return torch.stack([line[:, None].expand(side, side), line[None].expand(side, side)]).expand(count, 2, side, side)


# --- what all have in common ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shape_and_type_are_kept_and_the_input_is_not_written_to(name: str, shape: tuple[int, ...]) -> None:
    x = images(*shape)
    before = x.clone()
    changed = applied(name, x, generator())
    assert changed.shape == x.shape
    assert changed.dtype == torch.float32
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_alone_decides(name: str) -> None:
    x = images(8, 1, 8, 8)
    torch.manual_seed(1)
    one = applied(name, x, generator(0))
    torch.manual_seed(2)
    assert torch.equal(applied(name, x, generator(0)), one)
    assert not torch.equal(applied(name, x, generator(1)), one)


@pytest.mark.parametrize("name", ["crop", "shift", "flip"])
def test_moving_pixels_about_stays_in_the_box(name: str) -> None:
    x = images(20, 1, 8, 8).round()
    changed = applied(name, x, generator())
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 1 + 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_every_image_is_changed_by_itself(name: str) -> None:
    x = images(1, 1, 8, 8).expand(30, 1, 8, 8).contiguous()
    changed = applied(name, x, generator())
    assert len({image.numpy().tobytes() for image in changed}) > 1


def test_the_box_check_would_notice_noise() -> None:
    changed = noise(images(20, 1, 8, 8).round(), generator())
    assert float(changed.min()) < 0
    assert float(changed.max()) > 1


# --- each -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "pad"), [(8, 1), (16, 2), (32, 4), (5, 1)])
def test_a_crop_is_a_window_of_the_padded_image(side: int, pad: int) -> None:
    x = images(120, 2, side, side)
    padded = torch.zeros(120, 2, side + 2 * pad, side + 2 * pad)
    padded[:, :, pad : pad + side, pad : pad + side] = x
    windows = set()
    for image, wide in zip(crop(x, generator()), padded, strict=True):
        found = [
            (top, left)
            for top in range(2 * pad + 1)
            for left in range(2 * pad + 1)
            if torch.equal(image, wide[:, top : top + side, left : left + side])
        ]
        assert found, "no window of the padded image"
        windows.update(found)
    assert {top for top, _ in windows} == {left for _, left in windows} == set(range(2 * pad + 1))


def test_all_windows_of_a_crop_are_about_equally_frequent() -> None:
    x = torch.zeros(1800, 1, 8, 8)
    x[:, :, 4, 4] = 1
    places = crop(x, generator()).flatten(1).argmax(dim=1)
    counts = places.unique(return_counts=True)[1]
    assert len(counts) == 9
    assert int(counts.min()) > 150  # 200 expected
    assert int(counts.max()) < 250


def test_a_flip_mirrors_left_to_right_about_half_of_the_images() -> None:
    x = images(1000, 1, 4, 4)
    changed = flip(x, generator())
    mirrored = (changed == x.flip(-1)).flatten(1).all(dim=1)
    same = (changed == x).flatten(1).all(dim=1)
    assert torch.equal(mirrored, ~same)
    assert abs(int(mirrored.sum()) - 500) < 4 * math.sqrt(250)


def test_a_shift_moves_an_image_as_a_whole_by_at_most_a_tenth_of_its_side() -> None:
    side = 40
    x = ramp(300, side)
    middle = slice(side // 4, -side // 4)
    moves = (shift(x, generator()) - x)[:, :, middle, middle] * side  # in pixels, (300, 2, ...)
    flat = moves.flatten(2)
    torch.testing.assert_close(flat.amin(dim=2), flat.amax(dim=2), rtol=0, atol=1e-3)  # bilinear on a ramp is exact
    pixels = flat.mean(dim=2)
    assert float(pixels.abs().max()) <= side / 10 + 1e-3
    assert float(pixels.abs().max()) > 0.95 * side / 10
    assert abs(float(pixels.mean())) < 0.4
    rows, columns = pixels[:, 0], pixels[:, 1]
    assert abs(float(torch.corrcoef(torch.stack([rows, columns]))[0, 1])) < 0.25
    assert bool(((pixels - pixels.round()).abs() > 0.1).any()), "continuous, not whole pixels"


def test_a_shift_replicates_the_edges() -> None:
    assert torch.allclose(shift(torch.full((20, 1, 8, 8), 0.7), generator()), torch.tensor(0.7), atol=1e-6)
    x = ramp(50)
    changed = shift(x, generator())
    assert float(changed[:, 0].min()) >= 0
    pixels = ((changed - x)[:, :, 20, 20] * 40).round(decimals=4)
    down = changed[pixels[:, 0] < -1]  # what moved in from above is the first row again
    assert len(down)
    assert torch.equal(down[:, :, 0], down[:, :, 1]) or torch.allclose(down[:, 0, 0], torch.zeros(()), atol=1e-6)


def test_noise_reaches_about_half_of_the_images_with_its_standard_deviation() -> None:
    x = torch.full((400, 1, 8, 8), 0.5)
    delta = (noise(x, generator()) - x).flatten(1)
    noisy = (delta != 0).any(dim=1)
    assert abs(int(noisy.sum()) - 200) < 4 * math.sqrt(100)
    assert float(delta[noisy].std()) == pytest.approx(0.045, rel=0.03)
    assert abs(float(delta[noisy].mean())) < 0.002


# --- names ----------------------------------------------------------------------------------------


def test_a_sum_of_names_is_read_in_order() -> None:
    assert parse("crop+flip") == [crop, flip]
    assert parse("flip+crop+noise") == [flip, crop, noise]
    assert parse("shift") == [shift]
    assert parse("none") == []


@pytest.mark.parametrize("text", ["blur", "crop+blur", "crop+", "", "crop flip", "crop+none"])
def test_an_unknown_name_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(UsageError, match=r"unknown augmentation .*crop, shift, flip, noise"):
        parse(text)
