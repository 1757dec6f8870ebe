"""PNG files: what is written is read by Pillow, and what is read is never wrong."""

import io
import zlib

import numpy as np
import PIL.Image
import pytest

from revjax.data.png import decode_unfiltered, encode_png

SHAPES = [(8, 8, 1), (32, 32, 3), (5, 7, 3), (3, 4, 2), (3, 4, 4), (200, 150, 3)]


def image_of(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def written_by_pillow(image, **options):
    file = io.BytesIO()
    PIL.Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, **options)
    return file.getvalue()


@pytest.mark.parametrize("shape", SHAPES)
def test_pillow_reads_what_is_written(shape):
    image = image_of(shape)
    with PIL.Image.open(io.BytesIO(encode_png(image))) as file:
        assert file.format == "PNG"
        np.testing.assert_array_equal(np.asarray(file).reshape(shape), image)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_is_read(shape):
    image = image_of(shape)
    np.testing.assert_array_equal(decode_unfiltered(encode_png(image), shape), image)


def test_other_images_are_left_to_others():
    smooth = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None, None], (32, 32, 3)).copy()
    assert decode_unfiltered(written_by_pillow(smooth, format="png"), (32, 32, 3)) is None
    assert decode_unfiltered(written_by_pillow(smooth, format="jpeg"), (32, 32, 3)) is None
    assert decode_unfiltered(encode_png(smooth), (32, 32, 1)) is None
    assert decode_unfiltered(encode_png(smooth), (16, 64, 3)) is None
    assert decode_unfiltered(b"", (32, 32, 3)) is None


def test_pixels_in_two_chunks_are_left_to_others():
    image = image_of((8, 8, 1))
    blob = encode_png(image)
    data = blob[41:-16]
    chunks = b"".join(
        len(part).to_bytes(4, "big")
        + b"IDAT"
        + part
        + zlib.crc32(b"IDAT" + part).to_bytes(4, "big")
        for part in (data[:20], data[20:])
    )
    split = blob[:33] + chunks + blob[-12:]
    with PIL.Image.open(io.BytesIO(split)) as file:
        np.testing.assert_array_equal(np.asarray(file)[..., None], image)
    assert decode_unfiltered(split, (8, 8, 1)) is None


def test_damage_is_never_read_as_pixels():
    image = image_of((8, 8, 3))
    blob = encode_png(image)
    for position in range(len(blob)):
        damaged = bytearray(blob)
        damaged[position] ^= 0x10
        try:
            pixels = decode_unfiltered(bytes(damaged), image.shape)
        except zlib.error:
            continue
        # Only a chunk's own checksum, which zlib's makes superfluous, may be off unnoticed.
        assert pixels is None or (pixels == image).all()
    for length in range(len(blob)):
        assert decode_unfiltered(blob[:length], image.shape) is None
