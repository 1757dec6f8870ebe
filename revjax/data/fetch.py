"""Official files from disk or from their home on the web, checked by MD5 before they are used."""

import contextlib
import hashlib
import io
import pathlib
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from typing import IO

from revjax.data.dataset import DataError
from revjax.data.download import download
from revjax.data.official import OFFICIAL, ways_forward

Files = Mapping[str, io.BufferedIOBase]


def official_files(
    name: str, source: str | None, *, scratch: str
) -> contextlib.AbstractContextManager[Files]:
    """Opens the files of a distribution on disk or, where no place is named, from its home.

    An archive's files are read into memory; nothing is extracted to disk. Other files stay where
    they are, for some are larger than what should be held.

    Args:
        name: one of `OFFICIAL`.
        source: the folder that the files lie in, or, where the distribution is an archive, the
            folder that this folder or the archive lies in, or the .tar.gz; None downloads it.
        scratch: a folder on the disk where downloads wait to be read, in files without a name, so
            that no part of them outlives the process.

    Returns:
        A context, in which each of `OFFICIAL[name].files` is open at its start. It is entered with
        DataError where a file is missing or not the official one, or the archive is damaged or out
        of reach, and with OSError where a download cannot be written to `scratch`.
    """
    return _from_home(name, scratch) if source is None else _from_disk(name, source)


@contextlib.contextmanager
def _from_home(name: str, scratch: str) -> Iterator[Files]:
    official = OFFICIAL[name]
    with contextlib.ExitStack() as opened:
        if official.archive:
            with tempfile.TemporaryFile(dir=scratch) as archive:
                download(name, official.url, archive, looked=scratch)
                files = _read_archive(name, official.url, archive)
        else:
            files = {}
            for file in official.files:
                files[file] = opened.enter_context(tempfile.TemporaryFile(dir=scratch))
                download(name, official.url + file, files[file], looked=scratch)
        _check(name, official.url, files)
        yield files


@contextlib.contextmanager
def _from_disk(name: str, source: str) -> Iterator[Files]:
    place = source
    with contextlib.ExitStack() as opened:
        try:
            path = _find(name, pathlib.Path(source).expanduser())
            place = str(path)
            if path.is_dir():
                present = [path / file for file in OFFICIAL[name].files if (path / file).is_file()]
                files = {file.name: opened.enter_context(file.open("rb")) for file in present}
            else:
                with path.open("rb") as archive:
                    files = _read_archive(name, place, archive)
            _check(name, place, files)
        except OSError as error:
            raise DataError(
                f"{name} was looked for in {place}, which cannot be read ({error}): "
                f"{ways_forward(name)}"
            ) from error
        yield files


def _find(name: str, source: pathlib.Path) -> pathlib.Path:
    official = OFFICIAL[name]
    if official.archive and source.is_file():
        return source
    for folder in (source, source / official.folder):
        if any((folder / file).is_file() for file in official.files):
            return folder
    if not official.archive:
        raise DataError(
            f"{name} was looked for in {source}, which is not a folder that holds "
            f"{', '.join(official.files)}: {ways_forward(name)}"
        )
    if (source / official.archive).is_file():
        return source / official.archive
    raise DataError(
        f"{name} was looked for in {source}, which is not the folder {official.folder} and holds "
        f"neither that nor {official.archive}: {ways_forward(name)}"
    )


def _read_archive(name: str, place: str, archive: IO[bytes]) -> Files:
    official, files = OFFICIAL[name], {}
    try:
        with tarfile.open(fileobj=archive, mode="r:gz") as members:
            for member in members:
                path = pathlib.PurePosixPath(member.name)
                content = members.extractfile(member) if member.isfile() else None
                if content and path.parent.name == official.folder and path.name in official.files:
                    files[path.name] = io.BytesIO(content.read())
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(
            f"{name} was looked for in {place}, which is damaged or not a .tar.gz ({error}): "
            f"{ways_forward(name)}"
        ) from error
    return files


def _check(name: str, place: str, files: Files) -> None:
    official = OFFICIAL[name]
    missing = [file for file in official.files if file not in files]
    if missing:
        raise DataError(
            f"{name} was looked for in {place}, which lacks {', '.join(missing)}: "
            f"{ways_forward(name)}"
        )
    for file, due in official.files.items():
        md5 = hashlib.file_digest(files[file], _md5).hexdigest()
        files[file].seek(0)
        if md5 != due:
            raise DataError(
                f"{name} was looked for in {place}, and {file} there is damaged or not the "
                f"official one (its MD5 is {md5}, where {due} is due): {ways_forward(name)}"
            )


def _md5() -> "hashlib._Hash":
    return hashlib.md5(usedforsecurity=False)
