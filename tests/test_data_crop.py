"""Boxes of crops, against their rule written in another way."""

import numpy as np
import pytest

from revjax.data.crop import WORDS, central_box, random_box


def boxes(width, height, number):
    words = np.random.Philox(key=7).random_raw(number * WORDS).reshape(number, WORDS)
    return np.array([random_box(row, width, height) for row in words])


@pytest.mark.parametrize(("width", "height"), [(500, 375), (224, 224), (90, 640), (3, 2), (1, 1)])
def test_a_box_is_inside_and_its_area_and_aspect_are_in_range(width, height):
    left, top, w, h = boxes(width, height, 500).T
    assert (left >= 0).all() and (top >= 0).all() and (w > 0).all() and (h > 0).all()
    assert (left + w <= width).all() and (top + h <= height).all()
    if width > 1:
        assert ((left > 0) & (left + w == width)).any() and ((top > 0) & (top + h == height)).any()
    assert ((w + 0.5) * (h + 0.5) >= 0.08 * width * height).all()
    ends = [(w - 0.5) / (h + 0.5), (w + 0.5) / np.maximum(h - 0.5, 1e-9)]
    assert (ends[0] <= 4 / 3).all() and (ends[1] >= 3 / 4).all()


def test_areas_and_aspects_are_distributed_as_in_the_rule():
    found = boxes(400, 300, 8000)
    generator = np.random.default_rng(0)  # the rule: draw until it fits
    area = generator.uniform(0.08, 1, 40_000) * 400 * 300
    aspect = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3), 40_000))
    w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
    fits = (w <= 400) & (h <= 300)
    for ours, due in ((found[:, 2], w[fits]), (found[:, 3], h[fits])):
        np.testing.assert_allclose(
            np.quantile(ours, [0.1, 0.3, 0.5, 0.7, 0.9]),
            np.quantile(due, [0.1, 0.3, 0.5, 0.7, 0.9]),
            rtol=0.04,
        )
    for start, side, whole in ((0, 2, 400), (1, 3, 300)):  # the place is uniform
        room = whole - found[:, side]
        share = (found[:, start] + 0.5) / (room + 1)
        np.testing.assert_allclose(
            np.quantile(share, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03
        )


def test_where_no_box_fits_it_is_the_largest_in_the_middle():
    assert tuple(boxes(1000, 12, 1)[0]) == (492, 0, 16, 12)
    assert tuple(boxes(12, 1000, 1)[0]) == (0, 492, 12, 16)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (300, 801), (224, 224), (1, 9)])
def test_the_central_box_is_that_of_a_resize_to_256_and_a_crop_of_224(width, height):
    scale = min(width, height) / 256
    left, top, w, h = central_box(width, height)
    due = (width / scale - 224) / 2 * scale, (height / scale - 224) / 2 * scale
    assert abs(left - due[0]) <= 1 and abs(top - due[1]) <= 1
    assert w == h == max(1, round(224 * scale))
