"""A tree of image files whose folders are named after classes."""

import dataclasses
import functools
import os
import pathlib
import zlib

import numpy as np

from revjax.data.dataset import DataError
from revjax.data.examples import Encoded

_TEST_FOLDERS = ("val", "validation", "test")
_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".gif", ".webp")
_FLAG = "--config.data.source=DIR"
_DUE = "where DIR/train/CLASS/*.JPEG and DIR/val/CLASS/*.JPEG are due"


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """A split: the files of a folder of class folders.

    Attributes:
        folder: the split's folder.
        classes: names of the class folders, sorted; a label is a place in that.
        files: bytes `[N]`, the files' names, sorted in each class. As one array, since a list of a
            million strings takes long to reach a worker process.
        labels: int32 `[N]`.
    """

    folder: pathlib.Path
    classes: tuple[str, ...]
    files: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Encoded:
        """As `Examples.read`."""
        # A file object would let go of Python's lock twice as often, for which threads wait.
        place = f"{self.folder}{os.sep}{self._place(index)}"
        descriptor = os.open(place, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            size, blob = os.fstat(descriptor).st_size, b""
            while len(blob) < size and (more := os.read(descriptor, size - len(blob))):
                blob += more
        finally:
            os.close(descriptor)
        return Encoded(blob, int(self.labels[index]))

    def name(self, index: int) -> str:
        """As `Examples.name`: the path from the folder that both splits lie in."""
        return os.path.join(self.folder.name, self._place(index))

    def fingerprint(self) -> int:
        """Of the files' names and classes, and of their order: the CRC-32 of both."""
        return zlib.crc32(self.files.tobytes(), zlib.crc32(self.labels.tobytes()))

    def _place(self, index: int) -> str:
        return f"{self.classes[self.labels[index]]}{os.sep}{os.fsdecode(self.files[index])}"


@functools.lru_cache(maxsize=1)  # its sizes are asked for first, and a listing may take long
def open_image_folder(source: str) -> tuple[ImageFolder, ImageFolder]:
    """Lists the files of a tree of images, once; none is opened.

    Args:
        source: the folder DIR of DIR/train/CLASS/FILE and DIR/val/CLASS/FILE; the latter may be
            called `validation` or `test`, too. Classes are sorted by name, as torchvision does.
            Hidden files and those that are no images by their names' ends are passed over.

    Returns:
        The training split, and the one to test on.

    Raises:
        DataError: where a folder is missing or cannot be read, a class has no images, or the two
            splits are not of the same classes.
    """
    root = pathlib.Path(source).expanduser()
    try:
        train = root / "train"
        if not train.is_dir():
            raise DataError(f"{root} has no folder train, {_DUE}: choose another {_FLAG}.")
        test = next((root / name for name in _TEST_FOLDERS if (root / name).is_dir()), None)
        if test is None:
            raise DataError(f"{root} has no folder val, {_DUE}: add it, or choose another {_FLAG}.")
        splits = _list_split(train), _list_split(test)
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read ({error.strerror}): choose another {_FLAG}."
        ) from error
    odd = sorted(set(splits[0].classes) ^ set(splits[1].classes))
    if odd:
        raise DataError(
            f"{train} and {test} have {len(odd)} classes that the other has not, such as {odd[0]}: "
            "give both a folder for each class, or remove it."
        )
    return splits


def _list_split(folder: pathlib.Path) -> ImageFolder:
    with os.scandir(folder) as entries:
        classes = sorted(item.name for item in entries if _is_class(item))
    if not classes:
        raise DataError(f"{folder} has no folder of a class, {_DUE}: sort its images by class.")
    files: list[bytes] = []
    labels: list[np.ndarray] = []
    for label, name in enumerate(classes):
        names = sorted(os.fsencode(file) for file in os.listdir(folder / name) if _is_image(file))
        if not names:
            raise DataError(f"{folder / name} has no images: add some, or remove the folder.")
        files += names
        labels.append(np.full(len(names), label, np.int32))
    return ImageFolder(folder, tuple(classes), np.array(files), np.concatenate(labels))


def _is_class(item: os.DirEntry) -> bool:
    return item.is_dir() and not item.name.startswith(".")


def _is_image(file: str) -> bool:
    return file.lower().endswith(_SUFFIXES) and not file.startswith(".")
