"""Normalisation against float64, and augmentation against every crop that numpy can cut out."""

from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revjax.data import DataError, augment, find_normalization, normalize, random_crop_flip


def images_of(batch, height, width, channels, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(1, 256, (batch, height, width, channels)).astype(np.uint8)


def crops(image, padding, flip):
    """Every (top, left, mirrored) and the image that it gives."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            window = padded[top : top + height, left : left + width]
            yield (top, left, False), window
            if flip:
                yield (top, left, True), window[:, ::-1]


def draws(images, outputs, padding, flip):
    """The (top, left, mirrored) of each output; fails where an output is no crop of its image."""
    found = []
    for image, output in zip(images, np.asarray(outputs), strict=True):
        matches = [draw for draw, crop in crops(image, padding, flip) if (crop == output).all()]
        assert len(matches) == 1
        found += matches
    return found


@pytest.mark.parametrize(("padding", "flip"), [(1, True), (2, False), (4, True), (0, True)])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((40, 8, 8, 1), np.uint8), ((40, 6, 9, 3), np.float32)]
)
def test_each_output_is_a_crop_of_its_own_image(shape, padding, flip, dtype):
    images = images_of(*shape).astype(dtype)
    cut = jax.jit(lambda key, x: random_crop_flip(key, x, padding=padding, flip=flip))
    outputs = cut(jax.random.key(1), images)
    chex.assert_shape(outputs, shape)
    assert outputs.dtype == dtype
    found = draws(images, outputs, padding, flip)
    assert len(set(found)) > 1


def test_all_shifts_and_both_sides_are_equally_likely():
    images = images_of(3600, 4, 4, 1)
    cut = jax.jit(lambda key, x: random_crop_flip(key, x, padding=1, flip=True))
    outputs = cut(jax.random.key(2), images)
    counts = Counter(draws(images, outputs, 1, True))
    assert len(counts) == 18
    chi_squared = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_squared < 40.8  # exceeded by chance once in a thousand, at 17 degrees of freedom


def test_neither_shift_nor_flip_is_the_identity():
    images = jnp.asarray(images_of(5, 4, 4, 3))
    cut = jax.jit(lambda key, x: random_crop_flip(key, x, padding=0, flip=False))
    outputs = cut(jax.random.key(0), images)
    np.testing.assert_array_equal(outputs, images)


def test_the_key_decides_and_nothing_else():
    images = jnp.asarray(images_of(50, 8, 8, 3))
    cut = jax.jit(lambda key: random_crop_flip(key, images, padding=2, flip=True))
    np.testing.assert_array_equal(cut(jax.random.key(0)), cut(jax.random.key(0)))
    assert (cut(jax.random.key(0)) != cut(jax.random.key(1))).any()
    eager = random_crop_flip(jax.random.key(0), images, padding=2, flip=True)
    np.testing.assert_array_equal(cut(jax.random.key(0)), eager)


@pytest.mark.parametrize("way", ["mean_image", "channels", "mean_image_std"])
def test_statistics_are_those_of_all_images_in_float64(way):
    images = images_of(2500, 3, 4, 2)
    images[..., 1] //= 3  # so that channels differ
    mean, std = find_normalization(way, images)
    assert mean.dtype == std.dtype == np.float32
    exact = images.astype(np.float64)
    if way == "channels":
        exact_mean, exact_std = exact.mean((0, 1, 2)), exact.std((0, 1, 2))
    else:
        exact_mean = exact.mean(0)
        exact_std = exact.std() if way == "mean_image_std" else 1
    np.testing.assert_allclose(mean, np.broadcast_to(exact_mean, mean.shape), rtol=2**-24)
    np.testing.assert_allclose(std, np.broadcast_to(exact_std, std.shape), rtol=2**-23)
    outputs = jax.jit(normalize)(jnp.asarray(images), (by := find_normalization(way, images)))
    chex.assert_shape(outputs, images.shape)
    assert outputs.dtype == jnp.float32
    np.testing.assert_allclose(outputs, (exact - exact_mean) / exact_std, rtol=1e-5, atol=1e-5)
    if way == "mean_image":  # to the last bit: there is nothing to divide by
        np.testing.assert_array_equal(outputs, images.astype(np.float32) - by.mean)


def test_what_cannot_be_normalized():
    images = images_of(5, 4, 4, 3)
    images[..., 1] = 7
    with pytest.raises(DataError, match=r"deviation, \[\[\[.*, 0\.0, .*choose config\.data\.norm"):
        find_normalization("channels", images)
    with pytest.raises(ValueError, match=r"'pixels' is no normalization: choose one of mean_image"):
        find_normalization("pixels", images)


def test_training_images_lose_the_mean_before_they_are_padded():
    images = images_of(60, 8, 8, 1)
    by = find_normalization("mean_image", images)
    outputs = jax.jit(lambda key, x, by: augment(key, x, by, padding=2, flip=True))(
        jax.random.key(3), images, by
    )
    assert outputs.dtype == jnp.float32
    found = draws(images.astype(np.float32) - by.mean, outputs, 2, True)
    corners = [np.asarray(outputs)[n, 0, 0, 0] for n, draw in enumerate(found) if draw[0] == 0]
    assert corners
    assert not any(corners)
