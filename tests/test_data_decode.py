"""Decoding against Pillow's, and what is broken told from what can be had."""

import io
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from images import encode, place, ramp

from revjax.data import finish_images
from revjax.data.crop import Box
from revjax.data.decode import BrokenImageError, _decode_jpeg, decode_part

BOX = Box(20, 10, 64, 48)


def decoded(blob, box=BOX, size=96):
    """As a network sees it."""
    out = np.zeros((size, size, 3), np.uint8)
    return finished(out, decode_part(blob, lambda *_: box, out))


def finished(pixels, box, mirrored=False):
    arrays = pixels[None], np.array([box], np.int32), np.array([mirrored])
    return np.asarray(finish_images(*map(jnp.asarray, arrays)))[0]


def noise(width=100, height=80):
    coarse = np.random.default_rng(0).integers(0, 256, (height // 10, width // 10, 3), np.uint8)
    return np.asarray(PIL.Image.fromarray(coarse).resize((width, height)))


@pytest.mark.parametrize(
    "blob",
    [
        encode(noise()),
        encode(noise(), subsampling=2),
        encode(noise(), progressive=True),
        encode(noise(), mode="L"),
        encode(noise(), mode="CMYK"),
        encode(noise(), "PNG"),
        encode(noise(), "PNG", mode="RGBA"),
        encode(noise(), "PNG", mode="LA"),
        encode(noise(), "GIF", mode="P", transparency=3),
        encode(noise(), "PNG", mode="P", transparency=b"\0\1\2\3"),
        encode(noise(), "PNG", mode="1"),
        encode(noise(), "BMP"),
    ],
    ids=lambda blob: repr(PIL.Image.open(io.BytesIO(blob)))[1:40],
)
def test_it_is_what_pillow_gives(blob):
    with PIL.Image.open(io.BytesIO(blob)) as image:
        whole = image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")
    left, top, width, height = BOX
    part = whole.crop((left, top, left + width, top + height))
    due = np.asarray(part.resize((96, 96), PIL.Image.Resampling.BILINEAR)).astype(int)
    found = decoded(blob)
    assert found.dtype == np.uint8
    assert np.abs(found - due).max() <= 6
    assert np.abs(found - due).mean() < 1


@pytest.mark.parametrize("box", [Box(0, 0, 1601, 1203), Box(37, 51, 700, 500), Box(5, 3, 213, 197)])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_large_image_is_cut_where_it_should_be(box, form):
    """By 1/8, 1/4, 1/2 and 1: the part is where the box is, to half a pixel of the result."""
    width, height = 1601, 1203
    blob = encode(ramp(width, height), form)
    for size in (50, 100, 128, 224):
        left, top, right, bottom = place(decoded(blob, box, size))
        found = np.array([left * width, top * height, right * width, bottom * height])
        due = [box.left, box.top, box.left + box.width, box.top + box.height]
        pixel = max(1, min(box.width, box.height) / size)
        np.testing.assert_allclose(found, due, atol=0.7 * pixel + 1)


@pytest.mark.parametrize(("form", "off"), [("JPEG", 3), ("PNG", 0)])
@pytest.mark.parametrize("size", [64, 80, 99, 100, 101])
def test_what_need_not_be_shrunk_is_there_as_it_is(size, form, off):
    blob, out = encode(noise(), form), np.zeros((2, size, size, 3), np.uint8)
    left, top, width, height = decode_part(blob, lambda *_: BOX, out[1])
    assert (width, height) == (64, 48)
    assert not out[0].any()
    found = out[1, top : top + height, left : left + width].astype(int)
    with PIL.Image.open(io.BytesIO(blob)) as image:
        due = np.asarray(image)[10:58, 20:84]
    np.testing.assert_allclose(found, due, atol=off)


@pytest.mark.parametrize("size", [20, 48, 63])
def test_what_does_not_fit_is_resized(size):
    """Also where one side would fit."""
    out = np.zeros((2, size, size, 3), np.uint8)
    for box in (BOX, Box(20, 10, 48, 64)):
        found = decode_part(encode(ramp(100, 80), "PNG"), lambda *_, box=box: box, out[1])
        assert found == (0, 0, size, size)
        assert not out[0].any()
        left, top, width, height = box
        due = [left / 100, top / 80, (left + width) / 100, (top + height) / 80]
        np.testing.assert_allclose(place(out[1]), due, atol=0.02)


@pytest.mark.parametrize(("height", "size"), [(80, 100), (100, 100), (100, 50), (110, 100)])
def test_a_jpeg_as_wide_as_is_due_is_decoded_in_place(height, size):
    """If it is no higher."""
    blob, out = encode(noise(height=height)), np.zeros((size, size, 3), np.uint8)
    whole = Box(0, 0, 100, height)
    pixels, box = _decode_jpeg(blob, lambda *_: whole, out) or pytest.fail("it was refused")
    assert np.shares_memory(pixels, out) == (height <= 100)
    assert box == (0, 0, size, height * size // 100)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(
    ("side", "box"),
    [
        (50, Box(0, 0, 50, 50)),
        (50, Box(3, 0, 1, 50)),
        (50, Box(0, 7, 50, 1)),
        (50, Box(49, 49, 1, 1)),
        (50, Box(9, 4, 37, 13)),
        (224, Box(100, 3, 124, 221)),
        (224, Box(0, 0, 37, 211)),
    ],
)
def test_enlarging_is_that_of_pillow_in_float(side, box, mirrored):
    left, top, width, height = box
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    part = pixels[top : top + height, left : left + width].astype(np.float32)
    channels = [PIL.Image.fromarray(part[..., channel]) for channel in range(3)]
    way = PIL.Image.Resampling.BILINEAR
    due = np.stack([np.asarray(channel.resize((side, side), way)) for channel in channels], -1)
    found = finished(pixels, box, mirrored)
    assert found.dtype == np.uint8
    np.testing.assert_allclose(found, due[:, ::-1] if mirrored else due, atol=0.5 + 1e-4)


def test_threads_do_not_see_what_others_decode():
    blobs = [encode(np.full((300, 400, 3), 8 * shade, np.uint8)) for shade in range(32)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(decoded, blobs * 8))
    for shade, image in enumerate(found):
        assert np.abs(image.astype(int) - 8 * (shade % 32)).max() <= 1


def broken(kind):
    blob = encode(noise())
    sixteen = io.BytesIO()
    PIL.Image.fromarray(np.zeros((80, 100), np.uint16)).save(sixteen, "PNG")
    return {
        "empty": b"",
        "text": b"<html>404</html>",
        "half a JPEG": blob[: len(blob) // 2],
        "a JPEG's header": blob[:300],
        "half a PNG": (png := encode(noise(), "PNG"))[: len(png) // 2],
        "16 bits": sixteen.getvalue(),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }[kind]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "the file is empty"),
        ("text", "no image that can be read"),
        ("half a JPEG", "truncated"),
        ("a JPEG's header", "(?i)truncated"),
        ("half a PNG", "truncated"),
        ("16 bits", "not of 8 bits"),
        ("PostScript", "no image that can be read"),
    ],
)
@pytest.mark.parametrize("size", [96, 100])  # 100: straight into the square, as far as it goes
def test_what_is_broken_is_refused(kind, reason, size):
    with pytest.raises(BrokenImageError, match=reason):
        decoded(broken(kind), size=size)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as users have it
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_bombs_are_refused_and_not_decoded(form, monkeypatch):
    blob = encode(noise(), form)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 7_999)
    with pytest.raises(BrokenImageError, match="pixels"):
        decoded(blob)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 8_000)
    decoded(blob)


def test_a_blemish_that_does_no_harm_is_forgiven():
    blob = encode(noise())
    assert blob.endswith(b"\xff\xd9")
    blemished = blob[:-2] + b"\0\1\2" + blob[-2:]  # bytes before the end: simplejpeg warns
    np.testing.assert_allclose(decoded(blemished), decoded(blob).astype(int), atol=3)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF"])
def test_damage_of_any_kind_is_no_other_error(form):
    blob, generator = encode(noise(), form), np.random.default_rng(1)
    for length in generator.integers(0, len(blob), 60):
        damaged = bytearray(blob)
        damaged[length] ^= 1 << generator.integers(8)
        for attempt in (bytes(damaged), blob[:length]):
            try:
                assert decoded(attempt, Box(0, 0, 1, 1), 8).shape == (8, 8, 3)
            except BrokenImageError as error:
                assert "\n" not in str(error)
