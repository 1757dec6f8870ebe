"""The order of examples: a permutation an epoch, a function of seed and step alone."""

import numpy as np
import pytest

from revjax.data import batch_indices
from revjax.data.order import _permutation

MASK = 2**64 - 1


def philox4x64(key: tuple[int, int], num_words: int) -> list[int]:
    """Philox4x64-10 in Python's integers, as published (Salmon et al. 2011, section 3.3)."""
    words = []
    for counter in range(1, num_words // 4 + 2):  # numpy counts before it draws
        x = [counter, 0, 0, 0]
        k0, k1 = key
        for _ in range(10):
            product0, product1 = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [
                (product1 >> 64) ^ x[1] ^ k0,
                product1 & MASK,
                (product0 >> 64) ^ x[3] ^ k1,
                product0 & MASK,
            ]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
        words += x
    return words[:num_words]


def epoch_of(seed, epoch, batch_size, num_examples):
    steps = num_examples // batch_size
    batches = [
        batch_indices(seed, epoch * steps + step, batch_size, num_examples) for step in range(steps)
    ]
    return np.concatenate(batches)


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (1, 0), (0, 1), (2**64 - 1, 12345)])
def test_the_order_is_that_of_the_published_generator(seed, epoch):
    words = philox4x64((seed, epoch), 50)
    expected = sorted(range(50), key=words.__getitem__)
    np.testing.assert_array_equal(epoch_of(seed, epoch, 10, 50), expected)


@pytest.mark.parametrize(("batch_size", "num_examples"), [(1, 7), (7, 7), (10, 50), (100, 1437)])
def test_no_example_comes_twice_in_an_epoch(batch_size, num_examples):
    for epoch in range(3):
        order = epoch_of(3, epoch, batch_size, num_examples)
        assert order.dtype == np.int32
        assert len(order) == num_examples // batch_size * batch_size
        assert len(set(order.tolist())) == len(order)
        assert order.min() >= 0
        assert order.max() < num_examples


def test_seeds_and_epochs_differ():
    orders = [epoch_of(seed, epoch, 10, 50).tolist() for seed in range(4) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 16


def test_what_the_end_of_an_epoch_leaves_out_changes():
    left_out = [set(range(53)) - set(epoch_of(0, epoch, 10, 53).tolist()) for epoch in range(20)]
    assert len(set().union(*left_out)) > 30


def test_a_resumed_run_draws_what_an_uninterrupted_one_would_have_drawn():
    uninterrupted = [batch_indices(5, step, 16, 100).tolist() for step in range(40)]
    _permutation.cache_clear()
    resumed = [batch_indices(5, step, 16, 100).tolist() for step in range(23, 40)]
    assert resumed == uninterrupted[23:]
    backwards = [batch_indices(5, step, 16, 100).tolist() for step in reversed(range(40))]
    assert backwards[::-1] == uninterrupted


def test_a_batch_cannot_be_changed_for_others():
    with pytest.raises(ValueError, match="read-only"):
        batch_indices(0, 0, 4, 10)[0] = 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 11, 10), r"a batch of 11 .* 10 examples: .* from 1 to 10\."),
        ((0, 0, 0, 10), r"a batch of 0 "),
        ((0, -1, 2, 10), r"step -1 is negative"),
        ((-1, 0, 2, 10), r"seed -1 is out of range"),
        ((2**64, 0, 2, 10), r"seed 18446744073709551616 is out of range"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        batch_indices(*arguments)
