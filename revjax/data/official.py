"""The official distributions of data sets: where they are, what is in them, and each file's MD5.

The MD5s of SVHN's files are those that torchvision's `SVHN` checks.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Official(NamedTuple):
    """Where a distribution is and what is in it.

    Attributes:
        url: its archive, or, ending in a slash, the place where its files lie one by one.
        folder: in which the archive's files lie; empty where there is no archive.
        splits: for each split the files that it is made of, in order, and the MD5 of each.
        names: for each label of a record, in order, the text file that names its classes.
        names_md5: the MD5 of each of those.
    """

    url: str
    folder: str
    splits: Mapping[str, Mapping[str, str]]
    names: Mapping[str, str] = {}
    names_md5: Mapping[str, str] = {}

    @property
    def archive(self) -> str:
        """The archive's file name; empty where there is no archive."""
        return self.url.rpartition("/")[2]

    @property
    def files(self) -> dict[str, str]:
        """Every file that is needed, and its MD5."""
        of_splits = {file: md5 for files in self.splits.values() for file, md5 in files.items()}
        return {**of_splits, **self.names_md5}


OFFICIAL = {
    "cifar10": Official(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        folder="cifar-10-batches-bin",
        splits={
            "train": {
                "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
                "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
                "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
                "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
                "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
            },
            "test": {"test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d"},
        },
        names={"label": "batches.meta.txt"},
        names_md5={"batches.meta.txt": "40a0b180e208fe03a63ecc891b2555ad"},
    ),
    "cifar100": Official(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        folder="cifar-100-binary",
        splits={
            "train": {"train.bin": "6172c7755cfe09b2fe270c85cebc1b15"},
            "test": {"test.bin": "4499cfba6c016c1be1438163640a0898"},
        },
        names={"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
        names_md5={
            "coarse_label_names.txt": "50d7751bb0bc2085059b59e23eb6f789",
            "fine_label_names.txt": "b517b835c830bc54413daa4cf904aad9",
        },
    ),
    "svhn_cropped": Official(
        url="http://ufldl.stanford.edu/housenumbers/",
        folder="",
        splits={
            "train": {"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373"},
            "test": {"test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3"},
            "extra": {"extra_32x32.mat": "a93ce644f1a588dc4d68dda5feec44a7"},
        },
    ),
}


def ways_forward(name: str) -> str:
    """How an error about missing files ends: what the user can do."""
    return (
        f"get online and start again, or have the official files of {name} read from disk with "
        "--config.data.source=DIR, or train on data that need no download with "
        "python train.py --config configs/digits_revnet.py."
    )
