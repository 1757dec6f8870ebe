"""From the bytes of an image file to the pixels of a part of it.

Nearly all files are plain JPEGs, which simplejpeg decodes and OpenCV shrinks, both in less
time than Pillow takes to decode (benchmarks/input_pipeline.py). What simplejpeg refuses, Pillow
judges: other formats and colour spaces, and JPEGs with blemishes that do no harm. To enlarge what
is smaller is left to the device (revjax/data/finish.py).
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


def decode_part(blob: bytes, choose: Callable[[int, int], Box], out: np.ndarray) -> Box:
    """Decodes the part of an image that is asked for, and resizes it where it is too large.

    Grey, palette and CMYK images become RGB; alpha is dropped, and the orientation that a camera
    may have noted is not looked at, as in TensorFlow and torchvision.

    A part that fits into the square is there pixel for pixel, for `finish_images` to enlarge. One
    of which a side does not fit is resized to the square, bilinearly. A JPEG whose part is at least
    twice the size due is decoded at 1/2, 1/4 or 1/8, whichever leaves enough pixels; then the part
    is rounded to whole pixels of that. Other images that are larger are averaged over the area of
    each new pixel. A JPEG as wide as the square, and no higher, is decoded straight into it.

    Args:
        blob: the file's bytes.
        choose: from an image's width and height to the box that is wanted.
        out: uint8 `[size, size, 3]`, contiguous, to write to, RGB.

    Returns:
        Where in the square the part is. What is beside it is of no account.

    Raises:
        BrokenImageError: where the file is damaged, truncated, empty or no image, or has more
            pixels than Pillow holds to be safe.

    Example:
        >>> file, out = io.BytesIO(), np.zeros((224, 224, 3), np.uint8)
        >>> PIL.Image.new("RGB", (500, 375), "red").save(file, "PNG")
        >>> decode_part(file.getvalue(), lambda width, height: Box(9, 9, 200, 100), out)
        Box(left=0, top=0, width=200, height=100)
        >>> out[99, 199].tolist()
        [255, 0, 0]
    """
    size = len(out)
    pixels, (left, top, width, height) = _decode_jpeg(blob, choose, out) or _decode_any(
        blob, choose
    )
    if np.may_share_memory(pixels, out):
        return Box(left, top, width, height)
    part = pixels[top : top + height, left : left + width]
    if width <= size and height <= size:
        out[:height, :width] = part
        return Box(0, 0, width, height)
    way = cv2.INTER_AREA if min(width, height) > 2 * size else cv2.INTER_LINEAR
    cv2.resize(part, (size, size), dst=out, interpolation=way)
    return Box(0, 0, size, size)


def _decode_jpeg(
    blob: bytes, choose: Callable[[int, int], Box], out: np.ndarray
) -> tuple[np.ndarray, Box] | None:
    """The pixels of a JPEG, shrunk while it still has enough of them, and the box in those.

    The pixels of an image as wide as `out`, and no higher, are in its rows, those of another are
    there until this thread decodes the next.
    """
    try:
        header: tuple = simplejpeg.decode_jpeg_header(blob)
        height, width, *_ = header
        _check_pixels(width, height)
        box = choose(width, height)
        size, least = len(out), min(box.width, box.height)
        k = next((k for k in _SHRINKS if least >= k * size), 1)
        w, h = -(-width // k), -(-height // k)
        kept = _own.kept if 3 * w * h <= _KEPT_BYTES else None
        buffer = out if w == size and h <= size else kept
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
