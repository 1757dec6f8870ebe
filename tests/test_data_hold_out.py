"""What is held out for validation: by the published generator, whatever the labels or the seed."""

import numpy as np
import pytest
from test_data_order import MASK, philox4x64

from revjax.data import HOLD_OUT_SIZES, hold_out

SVHN = "svhn_cropped+extra"


@pytest.mark.parametrize("number", [0, 1, 13, 49])
def test_the_smallest_words_of_the_published_generator_are_held_out(number):
    words = philox4x64((0, MASK), 50)
    expected = np.isin(np.arange(50), sorted(range(50), key=words.__getitem__)[:number])
    for labels in (np.zeros(50, np.int32), np.arange(50, dtype=np.int32)):
        held_out = hold_out("cifar10", labels, number)
        assert held_out.dtype == np.bool_
        np.testing.assert_array_equal(held_out, expected)


def test_of_svhn_each_digit_of_both_parts_gives_its_own():
    """Huang et al. 2016: 400 of each in the first 73,257, 200 of each in the rest."""
    generator = np.random.default_rng(0)
    labels = np.minimum(generator.geometric(0.2, 604_388) - 1, 9).astype(np.int32)  # uneven
    held_out = hold_out(SVHN, labels, HOLD_OUT_SIZES[SVHN])
    assert held_out.sum() == HOLD_OUT_SIZES[SVHN] == 6_000
    words = np.random.Philox(key=np.array([0, MASK], np.uint64)).random_raw(604_388)
    for part, quota in ((slice(None, 73_257), 400), (slice(73_257, None), 200)):
        for digit in range(10):
            of_digit = labels[part] == digit
            held, kept = of_digit & held_out[part], of_digit & ~held_out[part]
            assert held.sum() == quota
            assert words[part][held].max() < words[part][kept].min()
    assert not hold_out(SVHN, labels, 0).any()


@pytest.mark.parametrize(
    ("name", "number", "named"),
    [
        ("cifar10", 50, "50 of 50 examples cannot be held out: choose a number from 0 to 49."),
        ("cifar10", -1, "-1 of 50 examples cannot be held out: choose a number from 0 to 49."),
        (SVHN, 40, "40 of svhn_cropped+extra cannot be held out: choose 0 or 6000."),
    ],
)
def test_refuses(name, number, named):
    with pytest.raises(ValueError) as error:
        hold_out(name, np.zeros(50, np.int32), number)
    assert str(error.value) == named
