"""Augmentation and normalisation against every crop that numpy can cut out."""

from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revjax.data import augment, mean_image, normalize, random_crop_flip


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


def test_the_mean_image_is_the_mean_of_each_pixel():
    images = images_of(1000, 3, 4, 2)
    mean = mean_image(images)
    assert mean.dtype == np.float32
    exact = images.astype(np.int64).sum(axis=0) / 1000
    np.testing.assert_allclose(mean, exact, rtol=2**-24)


def test_normalized_images_have_mean_zero_and_the_scale_of_pixels():
    images = images_of(100, 4, 4, 3)
    mean = mean_image(images)
    outputs = normalize(jnp.asarray(images), jnp.asarray(mean))
    assert outputs.dtype == jnp.float32
    np.testing.assert_array_equal(outputs, images.astype(np.float32) - mean)
    np.testing.assert_allclose(np.asarray(outputs).mean(axis=0), 0, atol=1e-4)


def test_training_images_lose_the_mean_before_they_are_padded():
    images = images_of(60, 8, 8, 1)
    mean = mean_image(images)
    outputs = jax.jit(lambda key, x, m: augment(key, x, m, padding=2, flip=True))(
        jax.random.key(3), images, mean
    )
    assert outputs.dtype == jnp.float32
    found = draws(images.astype(np.float32) - mean, outputs, 2, True)
    corners = [np.asarray(outputs)[n, 0, 0, 0] for n, draw in enumerate(found) if draw[0] == 0]
    assert corners
    assert not any(corners)
