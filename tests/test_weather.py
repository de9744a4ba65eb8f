"""Fog and snow: the transforms, training on them, and the attacks that apply them."""

from __future__ import annotations

import colorsys
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys_defense import generator, registered, toy_data, toy_spec

from ensdef import augment
from ensdef.attack_spec import AttackSpec
from ensdef.errors import UsageError
from ensdef.evaluation import evaluate
from ensdef.harness import Outcome, attack_model
from ensdef.recipe import check_augmentation
from ensdef.testing import LinearClassifier
from ensdef.training import train
from ensdef.weather import fog, snow

quick = settings(deadline=None, max_examples=60, derandomize=True)


def levels(x: Tensor) -> list[int]:
    """8-bit levels; fails for anything between them."""
    scaled = 255 * x.double()
    assert float((scaled - scaled.round()).abs().max()) < 1e-4
    return [int(level) for level in scaled.round().flatten().tolist()]


def photographs(count: int = 4, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(256, (count, channels, 6, 5), generator=generator(seed)).float() / 255


def image(*pixels: tuple[int, ...]) -> Tensor:
    """One image, (1, C, 1, W), of pixels given by their levels."""
    return torch.tensor(pixels, dtype=torch.float32).t()[None, :, None] / 255


def draws(*u: float) -> Tensor:
    return torch.tensor(u)


# --- fog ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("density", "light", "value"), [(0.13, 0.8, 0.659736), (0.15, 0.6, 0.553743)])
def test_fog_on_a_grey_pixel_gives_the_worked_example(density: float, light: float, value: float) -> None:
    half = torch.full((1, 1, 1, 1), 0.5)
    assert float(fog(half, density, light, quantize=False)) == pytest.approx(value, abs=1e-6)
    assert levels(fog(half, density, light)) == [math.floor(255 * value)]


@quick
@given(st.floats(-20, 20), st.floats(0, 1), st.integers(0, 10**6))
def test_fog_is_that_of_a_plain_rewrite(density: float, light: float, seed: int) -> None:
    x = photographs(2, seed=seed)
    tau = 1 / (1 + np.exp(density))
    expected = tau * x.double().numpy() + (1 - tau) * light
    np.testing.assert_allclose(fog(x, density, light, quantize=False).numpy(), expected, atol=1e-6)
    floored = np.floor(255 * expected + 1e-3).flatten().tolist()
    assert np.abs(np.array(levels(fog(x, density, light))) - floored).max() <= 1
    assert np.mean(np.array(levels(fog(x, density, light))) == floored) > 0.9


def test_thin_fog_leaves_an_8_bit_image_as_it_is_and_thick_fog_leaves_its_light() -> None:
    x = torch.arange(256).view(1, 1, 16, 16) / 255
    assert levels(fog(x, -1000.0, 0.3)) == list(range(256))
    assert torch.equal(fog(x, -1000.0, 0.3, quantize=False), x)
    assert torch.equal(fog(x, 1000.0, 0.25, quantize=False), torch.full_like(x, 0.25))


def test_fog_is_linear_in_the_image_before_it_is_floored() -> None:
    x, z = photographs(seed=1), photographs(seed=2)
    mixed = fog(0.3 * x + 0.7 * z, 0.13, 0.8, quantize=False)
    apart = 0.3 * fog(x, 0.13, 0.8, quantize=False) + 0.7 * fog(z, 0.13, 0.8, quantize=False)
    torch.testing.assert_close(mixed, apart)


# --- snow -----------------------------------------------------------------------------------------


def nearest(value: float) -> int:
    """Half to even; what misses a half by float noise is one."""
    return round(round(value, 9))


def snowed(pixel: tuple[int, ...], u: float, brightness: float) -> list[int]:
    """One RGB pixel by the standard library's colour conversions, HLS kept in 8 bits."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*(level / 255 for level in pixel))
    h, light, s = nearest(180 * hue), nearest(255 * lightness), nearest(255 * saturation)
    # the threshold in single precision, as drawn: 0.4 gives 136 there, and a hair more in double precision
    if light < float(torch.tensor(u) * 127.5 + 85):
        light = min(math.floor(round(light * brightness, 9)), 255)
    return [nearest(255 * channel) for channel in colorsys.hls_to_rgb(h / 180, light / 255, s / 255)]


pixels = st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    st.lists(pixels, min_size=1, max_size=40),
    st.floats(0, 1, exclude_max=True, width=32),
    st.sampled_from([1.0, 1.5, 2.0, 2.5, 4.0]),
)
@example([(16, 16, 255)], 0.4000000059604645, 1.5)
def test_snow_is_that_of_a_plain_rewrite(row: list[tuple[int, ...]], u: float, brightness: float) -> None:
    given_image = image(*row)
    ours = levels(snow(given_image, draws(u), brightness)[0, :, 0].t())
    assert ours == [level for pixel in row for level in snowed(pixel, u, brightness)]


@pytest.mark.parametrize(("u", "threshold"), [(0.0, 85), (0.5, 149), (0.9999, 213)])
def test_what_counts_as_dark_moves_with_the_draw_of_the_image(u: float, threshold: int) -> None:
    greys = torch.arange(256).view(1, 1, 1, 256) / 255
    out = levels(snow(greys, draws(u), 1.1))
    assert [level for level in range(20, 256) if out[level] != level] == list(range(20, threshold))


def test_lightness_is_multiplied_floored_and_ends_at_white() -> None:
    assert levels(snow(image((10,), (51,), (83,)), draws(0.0), 2.5)) == [25, 127, 207]
    assert levels(snow(image((100,), (102,), (103,), (120,)), draws(0.5), 2.5)) == [250, 255, 255, 255]


def test_snow_keeps_the_colour_and_raises_the_lightness() -> None:
    (red, green, blue) = levels(snow(image((60, 20, 20)), draws(0.0), 2.0))
    assert red > green == blue
    assert (red + green) / 2 == pytest.approx(80, abs=1)
    assert (red - green) / (red + green) == pytest.approx(0.5, abs=0.02), "saturation"


@quick
@given(st.integers(0, 10**6), st.floats(1, 4), st.floats(0, 1, exclude_max=True, width=32))
def test_no_pixel_gets_darker(seed: int, brightness: float, u: float) -> None:
    x = photographs(1, seed=seed)
    before, after = ((z.amax(dim=1) + z.amin(dim=1)) / 2 for z in (x, snow(x, draws(u), brightness)))
    assert float((before - after).max()) <= 1.01 / 255, "but for the rounding of lightness and of both extremes"


def test_without_a_factor_colours_come_back_up_to_rounding_and_greys_exactly() -> None:
    x = photographs(8)
    assert float((snow(x, torch.zeros(8), 1.0) - x).abs().max()) <= 5.01 / 255
    greys = torch.arange(256).view(1, 1, 16, 16) / 255
    assert levels(snow(greys, draws(0.9), 1.0)) == list(range(256))


def test_a_single_channel_becomes_what_the_same_grey_becomes_in_colour() -> None:
    grey = photographs(3, channels=1)
    u = draws(0.1, 0.5, 0.9)
    in_colour = snow(grey.expand(3, 3, 6, 5), u, 2.5)
    assert torch.equal(in_colour, snow(grey, u, 2.5).expand(3, 3, 6, 5))


def test_every_image_has_its_own_snow() -> None:
    x = photographs(1).expand(3, 3, 6, 5)
    u = draws(0.1, 0.5, 0.9)
    together = snow(x, u, 2.5)
    assert torch.equal(together, torch.cat([snow(x[:1], u[i : i + 1], 2.5) for i in range(3)]))
    assert not torch.equal(together[0], together[1])


@quick
@given(st.integers(0, 10**6), st.floats(-5, 5), st.floats(0, 1), st.floats(1, 5))
def test_weather_stays_in_the_box_on_8_bit_levels(seed: int, density: float, light: float, brightness: float) -> None:
    x = torch.rand(3, 3, 4, 4, generator=generator(seed)).round(decimals=1)
    for out in (fog(x, density, light), snow(x, torch.rand(3, generator=generator(seed)), brightness)):
        assert out.shape == x.shape
        assert 0 <= min(levels(out)) <= max(levels(out)) <= 255


@pytest.mark.parametrize("shape", [(2, 2, 4, 4), (2, 4, 4, 4), (3, 4, 4), (2, 16)])
def test_snow_on_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"\(B, 3, H, W\) or \(B, 1, H, W\), got"):
        snow(torch.rand(shape), torch.rand(shape[0]), 2.0)


# --- training on it -------------------------------------------------------------------------------


def test_an_augmentation_may_have_parameters() -> None:
    assert check_augmentation("crop+flip+fog[density=0.13,light=0.8]+snow[brightness=2]") == [
        ("crop", {}),
        ("flip", {}),
        ("fog", {"density": 0.13, "light": 0.8}),
        ("snow", {"brightness": 2.0}),
    ]
    assert check_augmentation("fog+snow") == [("fog", {"density": 0.15, "light": 0.6}), ("snow", {"brightness": 2.5})]
    assert check_augmentation("none") == []


def test_a_plus_sign_in_brackets_belongs_to_a_number() -> None:
    assert check_augmentation("fog[density=1e+1]+flip") == [("fog", {"density": 10.0, "light": 0.6}), ("flip", {})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hail", r"unknown augmentation 'hail'; .*crop, shift, flip, noise, fog, snow"),
        ("crop+hail[size=2]", r"unknown augmentation 'hail\[size=2\]'"),
        ("fog[thickness=1]", r"fog has no parameter 'thickness'; it has: density, light"),
        ("crop[pad=4]", r"crop has no parameter 'pad'; it has: none"),
        ("fog[light=1.5]", r"light is 1\.5; expected a brightness in \[0, 1\]"),
        ("snow[brightness=0.5]", r"brightness is 0\.5; expected at least 1"),
        ("snow[brightness=bright]", r"snow\[brightness\] is 'bright'; expected a number"),
        ("snow[brightness=2", r"never closed"),
        ("fog+", r"unknown augmentation ''"),
    ],
)
def test_bad_augmentations_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_augmentation(text)


def test_a_recipe_s_augmentation_is_checked_without_torch() -> None:
    code = "import sys, ensdef.recipe as r; r.check_augmentation('fog[light=1]'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_augmentations_are_the_transforms_with_a_draw_an_image_from_the_generator() -> None:
    x = photographs(5)
    foggy, snowy = augment.parse("fog[density=0.13,light=0.8]+snow[brightness=2]")
    assert torch.equal(foggy(x, generator(3)), fog(x, 0.13, 0.8))
    assert torch.equal(snowy(x, generator(3)), snow(x, torch.rand(5, generator=generator(3)), 2.0))
    assert not torch.equal(snowy(x, generator(3)), snowy(x, generator(4)))


def test_a_training_may_happen_in_the_weather() -> None:
    data = toy_data()
    with registered():
        spec = toy_spec("toy_probe", data, augment="fog[density=0.13,light=0.8]")
        defense: Any = train(spec, data, device="cpu").defense
    for batch, _, _ in defense.seen:
        assert torch.equal(batch.x, fog(data.train.x(batch.ids), 0.13, 0.8))


# --- attacking with it ----------------------------------------------------------------------------


def model_and_images(channels: int = 3, count: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    model = LinearClassifier(torch.randn(4, channels * 30, generator=generator(1)))
    x = photographs(count, channels, seed=5)
    with torch.no_grad():
        return model, x, model(x).argmax(dim=1)


def attacked(name: str, seed: int = 0, channels: int = 3, **params: Any) -> tuple[Tensor, Outcome]:
    model, x, y = model_and_images(channels)
    return x, attack_model(model, x, y, AttackSpec.create(name, params, "linf", "0.1", seed=seed), batch_size=16)


def test_fog_attacks_with_the_paper_s_setting_by_default() -> None:
    x, outcome = attacked("fog")
    assert torch.equal(outcome.x_adv, fog(x, 0.15, 0.6))
    x, outcome = attacked("fog", density=0.13, light=0.8)
    assert torch.equal(outcome.x_adv, fog(x, 0.13, 0.8))


def test_snow_attacks_with_the_paper_s_setting_by_default() -> None:
    x, outcome = attacked("snow", channels=1)
    before, after = torch.tensor(levels(x)).view(40, -1), torch.tensor(levels(outcome.x_adv)).view(40, -1)
    bright = (2.5 * before).floor().clamp(max=255)
    changed = after != before
    assert torch.equal(after[changed], bright.long()[changed])
    lightest = torch.where(changed, before, 0).amax(dim=1)  # what still was dark, image by image
    assert 85 <= int(lightest.max()) < 212.5
    assert len(lightest.unique()) > 10


def test_fog_is_the_same_for_every_seed_and_snow_is_not() -> None:
    assert torch.equal(attacked("fog", seed=0)[1].x_adv, attacked("fog", seed=1)[1].x_adv)
    assert torch.equal(attacked("snow", seed=0)[1].x_adv, attacked("snow", seed=0)[1].x_adv)
    assert not torch.equal(attacked("snow", seed=0)[1].x_adv, attacked("snow", seed=1)[1].x_adv)


@pytest.mark.parametrize("name", ["fog", "snow"])
def test_the_verdict_is_the_model_s_on_the_transformed_image_and_takes_one_pass(name: str) -> None:
    model, _, y = model_and_images()
    _, outcome = attacked(name)
    with torch.no_grad():
        assert torch.equal(outcome.robust, model(outcome.x_adv).argmax(dim=1) == y)
    assert 0 < int(outcome.robust.sum()) < 40
    assert (outcome.forwards, outcome.backwards) == (40, 0)


@pytest.mark.parametrize("name", ["fog", "snow"])
def test_the_record_has_no_radius(name: str) -> None:
    model, x, y = model_and_images()
    record = evaluate(model, x, y, attack=name, eps="8/255", device="cpu")
    assert (record.norm, record.eps, record.eps_value) == (None, None, None)


@pytest.mark.parametrize("call", [("fog", {"light": 2}), ("snow", {"brightness": 0}), ("fog", {"brightness": 2})])
def test_bad_parameters_of_the_attacks_are_refused(call: tuple[str, dict[str, Any]]) -> None:
    with pytest.raises(UsageError, match=rf"{call[0]}.*{next(iter(call[1]))}"):
        attacked(call[0], **call[1])
