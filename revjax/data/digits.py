"""The 1,797 handwritten digits that ship inside scikit-learn: real data without a download."""

import numpy as np

from revjax.data.dataset import Dataset

_SPLIT_SEED = 1797


def load_digits() -> Dataset:
    """The 8x8 scans of scikit-learn's `load_digits`, with a fixed held-out fifth.

    A pixel counts the inked points in a 4x4 block of the original scan, 0 to 16. It is stored times
    15, so 0 to 240: nothing is lost, and the scale is about that of other images.

    The split is stratified, and the same on every machine and with every numpy: examples are sorted
    by class, inside a class by raw Philox words, and every fifth of that list is held out.

    Returns:
        1,437 training and 360 test images, uint8 `[N, 8, 8, 1]`, of 10 classes; each split in
        scikit-learn's order.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998; what
    scikit-learn ships is its test set.
    """
    import sklearn.datasets  # seconds to import: only who asks for digits waits

    pixels, classes = sklearn.datasets.load_digits(return_X_y=True)
    images = (15 * pixels).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = classes.astype(np.int32)
    noise = np.random.Philox(key=_SPLIT_SEED).random_raw(len(labels))
    held_out = np.zeros(len(labels), bool)
    held_out[np.lexsort((noise, labels))[::5]] = True
    return Dataset(
        name="digits",
        train_images=images[~held_out],
        train_labels=labels[~held_out],
        test_images=images[held_out],
        test_labels=labels[held_out],
        num_classes=10,
    )
