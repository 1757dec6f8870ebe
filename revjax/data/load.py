"""Data sets by name."""

from revjax.data.dataset import DataError, Dataset, DatasetInfo
from revjax.data.digits import load_digits

DATASETS = {
    "digits": DatasetInfo((8, 8, 1), num_classes=10, train_size=1437, test_size=360),
    "cifar10": DatasetInfo((32, 32, 3), num_classes=10, train_size=50_000, test_size=10_000),
    "cifar100": DatasetInfo((32, 32, 3), num_classes=100, train_size=50_000, test_size=10_000),
    "svhn_cropped": DatasetInfo((32, 32, 3), num_classes=10, train_size=73_257, test_size=26_032),
    "svhn_cropped+extra": DatasetInfo(
        (32, 32, 3), num_classes=10, train_size=604_388, test_size=26_032
    ),
}


def dataset_info(name: str, *, data_dir: str | None = None) -> DatasetInfo:
    """The sizes of a data set, before anything is downloaded or loaded.

    Args:
        name: one of `DATASETS`, or the name of a set that tensorflow-datasets has prepared.
        data_dir: where prepared data sets lie; None is tensorflow-datasets' default.

    Raises:
        DataError: where the name is unknown, or not one of `DATASETS` and never prepared.

    Example:
        >>> dataset_info("cifar100").num_classes
        100
    """
    if name in DATASETS:
        return DATASETS[name]
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
