"""Image files that tests write: what is where in them can be read off their pixels."""

import io

import numpy as np
import PIL.Image


def ramp(width, height):
    """RGB: red grows from left to right, green downwards, blue is 128; a smooth image."""
    x = (np.arange(width) + 0.5) / width * 255
    y = (np.arange(height) + 0.5) / height * 255
    red, green = np.broadcast_arrays(x[None, :], y[:, None])
    return np.stack([red, green, np.full_like(red, 128)], -1).round().astype(np.uint8)


def encode(image, form="JPEG", mode="RGB", **options):
    """The bytes of a file."""
    file = io.BytesIO()
    if form == "JPEG":
        options = {"quality": 95, "subsampling": 0, **options}
    PIL.Image.fromarray(image).convert(mode).save(file, form, **options)
    return file.getvalue()


def place(image):
    """Where a part of a `ramp` lies in it: (left, top, right, bottom), as fractions.

    Pixels are read at their centres; left > right where it is mirrored.
    """
    size = len(image)
    ends = []
    for channel, axis in ((0, 0), (1, 1)):
        line = image[..., channel].astype(float).mean(axis) / 255
        middle = slice(size // 4, size - size // 4)  # apart from the edges, which are cut off
        slope, start = np.polyfit((np.arange(size)[middle] + 0.5) / size, line[middle], 1)
        ends.append((start, start + slope))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom
