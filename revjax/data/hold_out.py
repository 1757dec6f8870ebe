"""Which training examples are held out for validation."""

import numpy as np

from revjax.data.load import DATASETS

# The sets whose rule also says how many: of SVHN, 400 of each digit of `train`, 200 of `extra`.
_SVHN_QUOTAS = {"train": 400, "extra": 200}
HOLD_OUT_SIZES = {"svhn_cropped+extra": 10 * sum(_SVHN_QUOTAS.values())}

_SVHN_TRAIN_SIZE = DATASETS["svhn_cropped"].train_size  # `extra` comes after them
# A seed and an epoch, as in the order of examples, which no run follows this far.
_KEY = np.array([0, 2**64 - 1], np.uint64)


def hold_out(name: str, labels: np.ndarray, number: int) -> np.ndarray:
    """Draws the examples of a training set that are not trained on.

    The draw is uniform, without regard to the classes: the examples with the smallest raw Philox
    words. For "svhn_cropped+extra" that is done within each class of `train`, and of `extra`. No
    seed of a run comes in: every run on a data set holds out the same examples, on every machine
    and with every numpy.

    Args:
        name: of the data set.
        labels: int32 `[N]`, of the training set; they count for "svhn_cropped+extra" alone.
        number: how many to hold out; 0, or what `HOLD_OUT_SIZES` has for the set.

    Returns:
        bool `[N]`, true where an example is held out.

    Raises:
        ValueError: for a number that is not below N, or not the set's own.

    Source: Huang et al. 2016 (arXiv:1603.09382), section 4, who hold out 5,000 of CIFAR's 50,000,
    and SVHN's by the rule above.

    Example:
        >>> hold_out("cifar10", np.zeros(50_000, np.int32), 5_000).sum().item()
        5000
    """
    due = HOLD_OUT_SIZES.get(name)
    if number and due and number != due:
        raise ValueError(f"{number} of {name} cannot be held out: choose 0 or {due}.")
    if not 0 <= number < len(labels):
        raise ValueError(
            f"{number} of {len(labels)} examples cannot be held out: choose a number from 0 to "
            f"{len(labels) - 1}."
        )
    words = np.random.Philox(key=_KEY).random_raw(len(labels))
    groups = [(np.arange(len(labels)), number)]
    if number and due:
        extra = np.arange(len(labels)) >= _SVHN_TRAIN_SIZE
        groups = [
            (np.flatnonzero((labels == digit) & (extra == is_extra)), quota)
            for is_extra, quota in enumerate(_SVHN_QUOTAS.values())
            for digit in range(10)
        ]
    held_out = np.zeros(len(labels), bool)
    for members, quota in groups:
        held_out[members[np.argsort(words[members], kind="stable")[:quota]]] = True
    return held_out
