"""Distortion of colours against Python's own colorsys."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revjax.data import distort_color
from revjax.data.color import adjust_contrast, adjust_hue, adjust_saturation

PIXELS = np.random.default_rng(0).uniform(0, 1, (2, 5, 7, 3)).astype(np.float32)
PIXELS[0, 0, :4] = [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [0.2, 0.7, 0.7]]


def everywhere(value, images=2):
    return jnp.full((images, 1, 1, 1), value, jnp.float32)


def by_pixel(function):
    flat = [colorsys.hsv_to_rgb(*function(*colorsys.rgb_to_hsv(*x))) for x in PIXELS.reshape(-1, 3)]
    return np.array(flat).reshape(PIXELS.shape)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_saturation(factor):
    due = by_pixel(lambda h, s, v: (h, min(1, s * factor), v))
    found = jax.jit(adjust_saturation)(PIXELS, everywhere(factor))
    np.testing.assert_allclose(found, due, atol=2e-6)


@pytest.mark.parametrize("delta", [-0.2, 0.0, 0.13, 0.2])
def test_hue(delta):
    due = by_pixel(lambda h, s, v: ((h + delta) % 1, s, v))
    found = jax.jit(adjust_hue)(PIXELS, everywhere(delta))
    np.testing.assert_allclose(found, due, atol=2e-6)


def test_contrast_keeps_the_mean_of_each_channel():
    found = jax.jit(adjust_contrast)(PIXELS, everywhere(1.5))
    np.testing.assert_allclose(found.mean((1, 2)), PIXELS.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(found.std((1, 2)), 1.5 * PIXELS.std((1, 2)), rtol=1e-5)


def test_values_outside_the_range_are_no_error():
    pixels = [[-0.1, -0.1, -0.1], [-0.1, 0.0, -0.05], [1.1, -0.1, 0.3], [0.0, 0.0, 0.0]]
    x = jnp.array(pixels, jnp.float32).reshape(2, 1, 2, 3)
    for adjust in (adjust_saturation, adjust_hue, adjust_contrast):
        found = jax.jit(adjust)(x, everywhere(0.1))
        assert jnp.isfinite(found).all()


def test_each_image_is_distorted_on_its_own_and_within_bounds():
    flat = np.full((400, 2, 2, 3), 128, np.uint8)  # grey: only brightness moves it
    distort = jax.jit(distort_color)
    found = np.asarray(distort(jax.random.key(0), flat))
    assert found.dtype == np.float32
    shift = found[:, 0, 0, 0] - 128
    assert np.abs(found - found[:, :1, :1, :1]).max() < 1e-3
    assert np.abs(shift).max() <= 32.001
    np.testing.assert_allclose(np.quantile(shift, [0.1, 0.5, 0.9]), [-25.6, 0, 25.6], atol=4)

    images = np.random.default_rng(1).integers(0, 256, flat.shape, np.uint8)
    found = np.asarray(distort(jax.random.key(1), images))
    assert found.min() >= 0 and found.max() <= 255
    assert len({image.tobytes() for image in found}) == len(images)


def test_what_is_drawn_is_uniform_and_independent():
    """By what it does to images of which it changes nothing else."""
    key, images = jax.random.key(3), np.zeros((2_000, 1, 2, 3), np.uint8)
    images[:, 0] = [[150, 110, 110], [110, 110, 110]]  # which nothing clips
    found = np.asarray(jax.jit(distort_color)(key, images))[:, 0, 0]
    # Chroma was 40; contrast c leaves 20 + 20 c of it, early or late, and saturation s times that.
    chroma = found.max(-1) - found.min(-1)
    assert 15 <= chroma.min() < 17 and 72 < chroma.max() <= 75.01
    assert abs(chroma.mean() - 40) < 1  # where s and c were one it would be 41.7
    hues = [colorsys.rgb_to_hsv(*pixel)[0] for pixel in found / 255]
    hues = (np.array(hues) + 0.5) % 1 - 0.5
    np.testing.assert_allclose(np.quantile(hues, [0.05, 0.5, 0.95]), [-0.18, 0, 0.18], atol=0.02)


def test_contrast_comes_early_or_late(monkeypatch):
    """Black and white, made bright: clipped or not, contrast first or last, it is one of two."""
    images = np.zeros((64, 2, 2, 3), np.uint8)
    images[:, 0] = [200, 40, 40]
    images[:, 1] = [40, 60, 200]
    fixed = {"minval": 0.0, "maxval": 1.0}
    draws = iter([0.0, 1.5, 0.1, 0.5])

    def uniform(key, shape, **bounds):
        assert bounds.keys() == fixed.keys()
        return jnp.full(shape, next(draws), jnp.float32)

    monkeypatch.setattr(jax.random, "uniform", uniform)
    found = np.asarray(distort_color(jax.random.key(0), jnp.asarray(images)))
    x = jnp.asarray(images, jnp.float32) / 255
    half, most, turn = (everywhere(value, 64) for value in (0.5, 1.5, 0.1))
    early = adjust_hue(adjust_saturation(adjust_contrast(x, half), most), turn)
    late = adjust_contrast(adjust_hue(adjust_saturation(x, most), turn), half)
    ways = [np.abs(found - 255 * np.clip(way, 0, 1)).max((1, 2, 3)) < 1e-2 for way in (early, late)]
    assert (ways[0] ^ ways[1]).all()
    assert 16 < ways[0].sum() < 48
