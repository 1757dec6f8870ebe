"""From the bytes of an image file to the pixels of a part of it.

Nearly all files are plain JPEGs, which simplejpeg decodes and OpenCV resizes, both in less
time than Pillow takes to decode (benchmarks/input_pipeline.py). What simplejpeg refuses, Pillow
judges: other formats and colour spaces, and JPEGs with blemishes that do no harm.
"""

import io
import threading
from collections.abc import Callable

import cv2
import numpy as np
import PIL.Image
import simplejpeg

from revjax.data.crop import Box

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")  # not all that Pillow has: some start programs
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}  # of 8 bits a channel
_SHRINKS = (8, 4, 2)  # what a JPEG can be divided by while it is decoded, at a profit
_KEPT_BYTES = 2**22  # of a thread's pixels: 1,182 pixels square


class _Pixels(threading.local):
    """Memory of a thread for what it decodes: the allocator's would be given back each time."""

    def __init__(self) -> None:
        self.kept = np.empty(_KEPT_BYTES, np.uint8)


_own = _Pixels()


class BrokenImageError(Exception):
    """A file that is no image, or one that cannot be had whole; the message says why."""


def decode_part(
    blob: bytes, choose: Callable[[int, int], Box], size: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Decodes the part of an image that is asked for, resized to a square.

    Grey, palette and CMYK images become RGB; alpha is dropped, and the orientation that a camera
    may have noted is not looked at, as in TensorFlow and torchvision.

    Resizing is bilinear. A JPEG whose part is at least twice the size due is decoded at 1/2, 1/4 or
    1/8, whichever leaves enough pixels; then the part is rounded to whole pixels of that. Other
    images that are larger are averaged over the area of each new pixel.

    Args:
        blob: the file's bytes.
        choose: from an image's width and height to the box that is wanted.
        size: of the result.
        out: uint8 `[size, size, 3]`, contiguous, to write to; None makes one.

    Returns:
        uint8 `[size, size, 3]`, RGB; `out` where that is given.

    Raises:
        BrokenImageError: where the file is damaged, truncated, empty or no image, or has more
            pixels than Pillow holds to be safe.

    Example:
        >>> file = io.BytesIO()
        >>> PIL.Image.new("RGB", (500, 375), "red").save(file, "PNG")
        >>> decode_part(file.getvalue(), lambda width, height: Box(9, 9, 99, 99), 2)[0, 0].tolist()
        [255, 0, 0]
    """
    pixels, box = _decode_jpeg(blob, choose, size) or _decode_any(blob, choose)
    left, top, width, height = box
    part = pixels[top : top + height, left : left + width]
    way = cv2.INTER_AREA if min(width, height) > 2 * size else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(part, (size, size), dst=out, interpolation=way))


def _decode_jpeg(
    blob: bytes, choose: Callable[[int, int], Box], size: int
) -> tuple[np.ndarray, Box] | None:
    """The pixels of a JPEG, shrunk while it still has enough of them, and the box in those.

    The pixels are there until this thread decodes the next.
    """
    try:
        header: tuple = simplejpeg.decode_jpeg_header(blob)
        height, width, *_ = header
        _check_pixels(width, height)
        box = choose(width, height)
        least = min(box.width, box.height)
        k = next((k for k in _SHRINKS if least >= k * size), 1)
        w, h = -(-width // k), -(-height // k)
        buffer = _own.kept if 3 * w * h <= _KEPT_BYTES else None
        pixels = simplejpeg.decode_jpeg(blob, min_width=w, min_height=h, buffer=buffer)
    except ValueError:
        return None
    if k == 1:
        return pixels, box
    left, top = round(box.left / k), round(box.top / k)
    right, bottom = round((box.left + box.width) / k), round((box.top + box.height) / k)
    return pixels, Box(left, top, right - left, bottom - top)


def _decode_any(blob: bytes, choose: Callable[[int, int], Box]) -> tuple[np.ndarray, Box]:
    try:
        with PIL.Image.open(io.BytesIO(blob), formats=_FORMATS) as image:
            _check_pixels(*image.size)
            if image.mode not in _MODES:
                raise BrokenImageError(f"its pixels are {image.mode}, not of 8 bits a channel")
            opaque = image.convert("RGBA") if "transparency" in image.info else image
            pixels = np.asarray(opaque.convert("RGB"))
    except (BrokenImageError, MemoryError):
        raise
    except PIL.UnidentifiedImageError as error:
        what = "no image that can be read" if blob else "empty"
        raise BrokenImageError(f"the file is {what}") from error
    except Exception as error:  # there is no class for all that Pillow raises on damaged files
        raise BrokenImageError(str(error).partition("\n")[0]) from error
    return pixels, choose(pixels.shape[1], pixels.shape[0])


def _check_pixels(width: int, height: int) -> None:
    most = PIL.Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise BrokenImageError(f"it has {width}x{height} pixels, more than {most:,}")
