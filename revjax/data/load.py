"""Data sets by name."""

from typing import TYPE_CHECKING

import numpy as np

from revjax.data.dataset import DataError, Dataset, DatasetInfo
from revjax.data.digits import load_digits

if TYPE_CHECKING:
    from revjax.data.stream import ImageStream

DATASETS = {
    "digits": DatasetInfo((8, 8, 1), num_classes=10, train_size=1437, test_size=360),
    "cifar10": DatasetInfo((32, 32, 3), num_classes=10, train_size=50_000, test_size=10_000),
    "cifar100": DatasetInfo((32, 32, 3), num_classes=100, train_size=50_000, test_size=10_000),
    "svhn_cropped": DatasetInfo((32, 32, 3), num_classes=10, train_size=73_257, test_size=26_032),
    "svhn_cropped+extra": DatasetInfo(
        (32, 32, 3), num_classes=10, train_size=604_388, test_size=26_032
    ),
}

# Too large for memory, and of images of all sizes: they are streamed.
STREAMED = {
    "imagenet2012": DatasetInfo(
        (224, 224, 3), num_classes=1000, train_size=1_281_167, test_size=50_000
    ),
}


def is_streamed(name: str, source: str | None) -> bool:
    """Whether a data set is for `open_stream`, and not for `load_dataset`.

    Example:
        >>> is_streamed("flowers", source="photographs"), is_streamed("cifar10", source="archives")
        (True, False)
    """
    return name in STREAMED or (source is not None and name not in DATASETS)


def dataset_info(
    name: str, *, data_dir: str | None = None, source: str | None = None, image_size: int = 224
) -> DatasetInfo:
    """The sizes of a data set, before anything is downloaded or loaded.

    Args:
        name: one of `DATASETS` or `STREAMED`, the name of a set that tensorflow-datasets has
            prepared, or any name for the folder of images `source`.
        data_dir: where prepared data sets lie; None is tensorflow-datasets' default.
        source: as `open_stream` takes it; not looked at for one of `DATASETS`.
        image_size: the side that a stream's images are resized to.

    Raises:
        DataError: where the name is unknown, or not one of these and never prepared, or the folder
            is not as `open_stream` needs it.

    Example:
        >>> dataset_info("cifar100").num_classes
        100
    """
    if name in DATASETS:
        return DATASETS[name]
    if source is not None:
        from revjax.data.image_folder import open_image_folder

        train, test = open_image_folder(source)
        shape = (image_size, image_size, 3)
        return DatasetInfo(shape, len(train.classes), len(train), len(test))
    if name in STREAMED:
        return STREAMED[name]._replace(image_shape=(image_size, image_size, 3))
    from revjax.data.prepared import find_prepared, prepared_info

    return prepared_info(find_prepared(name, data_dir))


def load_dataset(name: str, *, data_dir: str | None = None, source: str | None = None) -> Dataset:
    """Loads an image-classification data set into host memory.

    `digits` ships inside scikit-learn. `cifar10`, `cifar100` and `svhn_cropped` are downloaded from
    their official home, or read from the official files on disk, and prepared once in
    tensorflow-datasets' array_record layout, without TensorFlow. `svhn_cropped+extra` has the same
    test set, and trains on the first's 73,257 images followed by the 531,131 of the extra set. Any
    other name is looked for among the sets that tensorflow-datasets itself has prepared in that
    layout.

    Args:
        name: one of `DATASETS`, or a name of tensorflow-datasets.
        data_dir: where prepared data sets lie; None is tensorflow-datasets' default, which is
            `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`.
        source: the official files on disk. For CIFAR, the unpacked folder, the folder that it or
            the archive lies in, or the .tar.gz; for SVHN, the folder that the .mat files lie in.
            Not looked at once the set is prepared.

    Raises:
        DataError: where the data are unknown, missing, damaged or out of reach: one sentence, which
            says what to do.

    Example:
        >>> load_dataset("digits").train_images.shape
        (1437, 8, 8, 1)
    """
    official = [known for known in DATASETS if known != "digits"]
    if source is not None and name not in official:
        raise DataError(
            f"{name} cannot be read from {source}: --config.data.source is for "
            f"{', '.join(official)} alone, so leave it out."
        )
    if name == "digits":
        return load_digits()
    from revjax.data import prepared  # tensorflow-datasets, for those who need it

    if name not in DATASETS:
        return prepared.read_prepared(name, prepared.find_prepared(name, data_dir))
    if name.startswith("cifar"):
        from revjax.data.cifar import load_cifar as load
    else:
        from revjax.data.svhn import load_svhn as load
    dataset = load(name, data_dir=data_dir, source=source)
    if dataset.info != DATASETS[name]:
        raise DataError(
            f"{name} as prepared in {prepared.data_directory(data_dir)} is {dataset.info}, where "
            f"{DATASETS[name]} is due: delete it there and start again."
        )
    return dataset


def open_stream(
    name: str,
    *,
    data_dir: str | None = None,
    source: str | None = None,
    image_size: int = 224,
    validation: int = 0,
    workers: int = 0,
) -> "ImageStream":
    """Opens a data set of image files that are read and decoded as they are needed.

    Args:
        name: "imagenet2012", or any name where a source is given.
        data_dir: where tensorflow-datasets has prepared `imagenet2012` in array_record; None is its
            default. Preparing it needs TensorFlow.
        source: a folder of images, DIR of DIR/train/CLASS/*.JPEG and DIR/val/CLASS/*.JPEG, to read
            in place of what is prepared.
        image_size: the side of the images in a batch.
        validation: how many training examples are held out, as the split "validation".
        workers: how many processes decode; 0 for threads.

    Raises:
        DataError: where the data are missing, unusable or damaged: one sentence, which says what to
            do.

    Example:
        >>> stream = open_stream("flowers", source="photographs")             # doctest: +SKIP
        >>> next(stream.train(0, 1000, 32, seed=0)).images().shape            # doctest: +SKIP
        (32, 224, 224, 3)
    """
    from revjax.data.examples import Examples, Subset
    from revjax.data.hold_out import hold_out
    from revjax.data.stream import ImageStream  # grain and OpenCV, for those who need them

    if source is not None:
        from revjax.data.image_folder import open_image_folder

        train, test = open_image_folder(source)
        num_classes = len(train.classes)
    else:
        from revjax.data.imagenet import open_imagenet

        num_classes, train, test = open_imagenet(name, data_dir)
    splits: dict[str, Examples] = {"train": train}
    if validation:
        held_out = hold_out(name, np.zeros(len(train), np.int32), validation)
        splits["train"] = Subset(train, np.flatnonzero(~held_out))
        splits["validation"] = Subset(train, np.flatnonzero(held_out))
    splits["test"] = test
    return ImageStream(splits, num_classes, image_size, workers)
