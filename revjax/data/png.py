"""PNG images without line filters: every reader reads them, and this one at once.

A PNG's lines are stored as differences to their neighbours by one of five filters, 0 being none.
Undoing the other four for 60,000 small images can take longer than compiling the network for them.
"""

import struct
import zlib

import numpy as np

_COLOR_TYPE = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> PNG's number for it


def encode_png(image: np.ndarray) -> bytes:
    """The bytes of a PNG file, its lines neither filtered nor compressed.

    Args:
        image: uint8 `[H, W, C]`, C from 1 to 4.

    Source: Portable Network Graphics (W3C), sections 9 (filtering) and 11 (chunks).
    """
    height, width, channels = image.shape
    lines = np.zeros(
        (height, 1 + width * channels), np.uint8
    )  # a line begins with its filter's number
    lines[:, 1:] = image.reshape(height, -1)
    return (
        _start(image.shape)
        + _chunk(b"IDAT", zlib.compress(lines.tobytes(), level=0))
        + _chunk(b"IEND", b"")
    )


def decode_unfiltered(blob: bytes, shape: tuple[int, int, int]) -> np.ndarray | None:
    """The pixels of a PNG as `encode_png` writes it; None for any other image file.

    Args:
        blob: an image file's bytes.
        shape: the (H, W, C) due.

    Returns:
        uint8 `[H, W, C]`, or None for another shape or format and for a PNG with filtered lines.

    Raises:
        zlib.error: where the pixels are damaged.
    """
    height, width, channels = shape
    start, end = _start(shape), _chunk(b"IEND", b"")
    first, last = len(start) + 8, len(blob) - len(end) - 4
    one_data_chunk = start + struct.pack(">I", max(0, last - first)) + b"IDAT"
    if not (blob.startswith(one_data_chunk) and blob.endswith(end)):
        return None
    lines = np.frombuffer(zlib.decompress(blob[first:last]), np.uint8).reshape(
        height, 1 + width * channels
    )
    return None if lines[:, 0].any() else lines[:, 1:].reshape(shape)


def _start(shape: tuple[int, ...]) -> bytes:
    height, width, channels = shape
    fields = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPE[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", fields)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
