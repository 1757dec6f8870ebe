"""Which part of an image is seen: a box at random in training, the centre in evaluation."""

import math
from typing import NamedTuple

import numpy as np

TRIES = 10
WORDS = 4 * TRIES  # raw words that `random_box` may use
_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)


class Box(NamedTuple):
    """A part of an image, in whole pixels.

    Attributes:
        left: columns before it.
        top: rows above it.
        width: its columns.
        height: its rows.
    """

    left: int
    top: int
    width: int
    height: int


def random_box(words: np.ndarray, width: int, height: int) -> Box:
    """Draws a box by the rule of Inception: 8% to 100% of the area, 3:4 to 4:3 in aspect.

    Area and logarithm of the aspect are uniform, and so is the place among those where the box is
    inside the image. Of ten draws the first that fits is taken; where none does, the largest box in
    the middle whose aspect is in the range.

    Args:
        words: uint64 `[WORDS]`, uniformly random.
        width: of the image.
        height: of the image.

    Source: Szegedy et al. 2015 (arXiv:1409.4842), section 6; the ten draws and what follows them
    are those of torchvision's RandomResizedCrop.

    Example:
        >>> random_box(np.zeros(WORDS, np.uint64), 500, 375)
        Box(left=0, top=0, width=106, height=141)
    """
    log_low, log_high = map(math.log, _ASPECT)
    for first in range(0, WORDS, 4):
        draw = words[first : first + 4].tolist()
        u, v = draw[0] / 2**64, draw[1] / 2**64
        area = (_AREA[0] + u * (_AREA[1] - _AREA[0])) * width * height
        aspect = math.exp(log_low + v * (log_high - log_low))
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = draw[2] * (width - w + 1) >> 64
            top = draw[3] * (height - h + 1) >> 64
            return Box(left, top, w, h)
    w = max(1, min(width, round(height * _ASPECT[1])))
    h = max(1, min(height, round(width / _ASPECT[0])))
    return _centred(w, h, width, height)


def central_box(width: int, height: int) -> Box:
    """The square in the middle whose side is 7/8 of the shorter side of the image.

    Resized to 224 it is, but for a pixel's rounding, what a resize of the shorter side to 256 and
    then a crop of the middle 224 leave.

    Example:
        >>> central_box(512, 256)
        Box(left=144, top=16, width=224, height=224)
    """
    side = max(1, round(min(width, height) * 7 / 8))
    return _centred(side, side, width, height)


def _centred(w: int, h: int, width: int, height: int) -> Box:
    return Box((width - w) // 2, (height - h) // 2, w, h)
