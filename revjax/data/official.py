"""The official binary distributions of CIFAR-10 and CIFAR-100, read and checked by MD5.

A file is records, one after another: a byte for each label, then 3,072 of pixels, `[3, 32, 32]`.
"""

import hashlib
import http.client
import pathlib
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, NamedTuple

import tqdm

from revjax.data.dataset import DataError

_TIMEOUT_SECONDS = 60
_BLOCK_BYTES = 1 << 20


class Official(NamedTuple):
    """Where a distribution is and what is in it.

    Attributes:
        url: its archive.
        folder: in which the archive's files lie.
        train: the training split's files and the MD5 of each, in order.
        test: the same of the test split.
        names: for each label of a record, in order, the text file that names its classes.
        names_md5: the MD5 of each of those.
    """

    url: str
    folder: str
    train: Mapping[str, str]
    test: Mapping[str, str]
    names: Mapping[str, str]
    names_md5: Mapping[str, str]

    @property
    def archive(self) -> str:
        """The archive's file name."""
        return self.url.rpartition("/")[2]

    @property
    def files(self) -> dict[str, str]:
        """Every file that is needed, and its MD5."""
        return {**self.train, **self.test, **self.names_md5}


OFFICIAL = {
    "cifar10": Official(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        folder="cifar-10-batches-bin",
        train={
            "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
            "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
            "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
            "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
            "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        },
        test={"test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d"},
        names={"label": "batches.meta.txt"},
        names_md5={"batches.meta.txt": "40a0b180e208fe03a63ecc891b2555ad"},
    ),
    "cifar100": Official(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        folder="cifar-100-binary",
        train={"train.bin": "6172c7755cfe09b2fe270c85cebc1b15"},
        test={"test.bin": "4499cfba6c016c1be1438163640a0898"},
        names={"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
        names_md5={
            "coarse_label_names.txt": "50d7751bb0bc2085059b59e23eb6f789",
            "fine_label_names.txt": "b517b835c830bc54413daa4cf904aad9",
        },
    ),
}


def ways_forward(name: str) -> str:
    """How an error about missing files ends: what the user can do."""
    return (
        f"get online and start again, or have the official binary files of {name} read from disk "
        "with --config.data.source=DIR, or train on data that need no download with "
        "python train.py --config configs/digits_revnet.py."
    )


def official_files(name: str, source: str | None, *, scratch: str) -> dict[str, bytes]:
    """Reads a distribution from disk or, where no place is named, from its home.

    An archive's files are read by name; nothing is extracted to disk.

    Args:
        name: "cifar10" or "cifar100".
        source: the unpacked folder, the folder that it or the archive lies in, or the .tar.gz; None
            downloads it.
        scratch: a folder on the disk where a download waits to be read, in a file without a name,
            so that no part of it outlives the process.

    Returns:
        The contents of each of `OFFICIAL[name].files`.

    Raises:
        DataError: where a file is missing or not the official one, or the archive is damaged or out
            of reach.
    """
    official = OFFICIAL[name]
    if source is None:
        place = official.url
        with tempfile.TemporaryFile(dir=scratch) as archive:
            _download(name, archive, scratch)
            files = _read_archive(name, place, archive)
    else:
        place = source
        try:
            path = _find(name, pathlib.Path(source).expanduser())
            place = str(path)
            if path.is_dir():
                present = [file for file in official.files if (path / file).is_file()]
                files = {file: (path / file).read_bytes() for file in present}
            else:
                with path.open("rb") as archive:
                    files = _read_archive(name, place, archive)
        except OSError as error:
            raise DataError(
                f"{name} was looked for in {place}, which cannot be read ({error}): "
                f"{ways_forward(name)}"
            ) from error
    missing = [file for file in official.files if file not in files]
    if missing:
        raise DataError(
            f"{name} was looked for in {place}, which lacks {', '.join(missing)}: "
            f"{ways_forward(name)}"
        )
    for file, due in official.files.items():
        md5 = hashlib.md5(files[file], usedforsecurity=False).hexdigest()
        if md5 != due:
            raise DataError(
                f"{name} was looked for in {place}, and {file} there is damaged or not the "
                f"official one (its MD5 is {md5}, where {due} is due): {ways_forward(name)}"
            )
    return files


def _find(name: str, source: pathlib.Path) -> pathlib.Path:
    official = OFFICIAL[name]
    if source.is_file():
        return source
    for folder in (source, source / official.folder):
        if any((folder / file).is_file() for file in official.files):
            return folder
    if (source / official.archive).is_file():
        return source / official.archive
    raise DataError(
        f"{name} was looked for in {source}, which is not the folder {official.folder} and holds "
        f"neither that nor {official.archive}: {ways_forward(name)}"
    )


def _read_archive(name: str, place: str, archive: IO[bytes]) -> dict[str, bytes]:
    official, files = OFFICIAL[name], {}
    try:
        with tarfile.open(fileobj=archive, mode="r:gz") as members:
            for member in members:
                path = pathlib.PurePosixPath(member.name)
                content = members.extractfile(member) if member.isfile() else None
                if content and path.parent.name == official.folder and path.name in official.files:
                    files[path.name] = content.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(
            f"{name} was looked for in {place}, which is damaged or not a .tar.gz ({error}): "
            f"{ways_forward(name)}"
        ) from error
    return files


def _download(name: str, archive: IO[bytes], looked: str) -> None:
    with tqdm.tqdm(desc=name, unit="B", unit_scale=True, disable=None) as bar:
        for block, bar.total in _blocks(name, looked):
            archive.write(block)
            bar.update(len(block))
    archive.seek(0)


def _blocks(name: str, looked: str) -> Iterator[tuple[bytes, int | None]]:
    """The pieces of the archive, each with the bytes that are due in all."""
    url = OFFICIAL[name].url
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            length = response.headers["Content-Length"]
            due, arrived = None if length is None else int(length), 0
            while block := response.read(_BLOCK_BYTES):
                arrived += len(block)
                yield block, due
        if due is not None and arrived != due:
            raise OSError(f"only {arrived} of {due} bytes arrived")
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise DataError(
            f"{name} was looked for in {looked}, where it is not prepared, and at {url}, which "
            f"cannot be read ({error}): {ways_forward(name)}"
        ) from error
