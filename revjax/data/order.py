"""The order of examples, as a function of seed and step alone."""

import functools

import numpy as np


def batch_indices(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
    """Which training examples make up the batch of one step.

    An epoch is `num_examples // batch_size` steps. Each epoch has its own permutation of the
    examples, and its batches are consecutive pieces of that: no example comes twice in an epoch,
    and the `num_examples % batch_size` at its end are left out. As nothing else is remembered, a
    resumed run draws what an uninterrupted one would have drawn.

    Args:
        seed: any integer in `0 .. 2**64 - 1`.
        step: the step's number, from 0.
        batch_size: examples a batch.
        num_examples: examples in the split.

    Returns:
        int32 `[batch_size]`, distinct, each in `0 .. num_examples - 1`; not writable.

    Raises:
        ValueError: where the batch does not fit the split, or the seed or step is out of range.

    Example:
        >>> batch_indices(seed=0, step=0, batch_size=4, num_examples=10).shape
        (4,)
    """
    if not 0 < batch_size <= num_examples:
        raise ValueError(
            f"a batch of {batch_size} cannot be drawn from {num_examples} examples: "
            f"choose a batch size from 1 to {num_examples}."
        )
    if step < 0:
        raise ValueError(f"step {step} is negative: steps are counted from 0.")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} is out of range: choose one from 0 to 2**64 - 1.")
    epoch, position = divmod(step, num_examples // batch_size)
    order = _permutation(seed, epoch, num_examples)
    return order[position * batch_size : (position + 1) * batch_size]


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    # Sorting raw words: numpy promises a bit generator's raw stream, not Generator.permutation's.
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_examples)
    order = np.argsort(words, kind="stable").astype(np.int32)
    order.setflags(write=False)
    return order
