"""What a config says of data that are streamed."""

import jax

from revjax.data import FIXED_NORMALIZATIONS, distort_color, normalize, open_stream
from revjax.data.stream import ImageStream
from revjax.training.config import Config


def open_stream_of(config: Config) -> ImageStream:
    """Open the config's data set.

    Raises:
        DataError: where it is missing, unusable or damaged.
    """
    return open_stream(
        config.data.name,
        data_dir=config.data.dir,
        source=config.data.source,
        image_size=config.data.image_size,
        validation=config.data.validation,
        workers=config.data.workers,
    )


def seen_in_training(config: Config, key: jax.Array, images: jax.Array) -> jax.Array:
    """What the network sees of a batch in training: its colours distorted, if asked for.

    Args:
        config: of the run.
        key: a PRNG key, of the step.
        images: uint8 `[B, H, W, 3]`, cropped and mirrored.

    Returns:
        float32 `[B, H, W, 3]`.
    """
    return seen_in_evaluation(config, distort_color(key, images) if config.data.color else images)


def seen_in_evaluation(config: Config, images: jax.Array) -> jax.Array:
    """What the network sees of a batch in evaluation, float32 `[B, H, W, 3]`."""
    return normalize(images, FIXED_NORMALIZATIONS[config.data.normalize])
