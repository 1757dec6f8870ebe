"""Downloading a file: a progress bar on a terminal, and a sentence where it fails."""

import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import IO

import tqdm

from revjax.data.dataset import DataError
from revjax.data.official import ways_forward

_TIMEOUT_SECONDS = 60
_BLOCK_BYTES = 1 << 20


def download(name: str, url: str, file: IO[bytes], *, looked: str) -> None:
    """Writes what is at a URL to an open file, and rewinds that.

    Args:
        name: the data set that it is for.
        url: what to download.
        file: an empty file, open to be written and read.
        looked: the folder in which the data set was looked for before.

    Raises:
        DataError: where the URL is out of reach, or fewer bytes arrive than were promised.
        OSError: where the file cannot be written.
    """
    with tqdm.tqdm(desc=url.rpartition("/")[2], unit="B", unit_scale=True, disable=None) as bar:
        for block, bar.total in _blocks(name, url, looked):
            file.write(block)
            bar.update(len(block))
    file.seek(0)


def _blocks(name: str, url: str, looked: str) -> Iterator[tuple[bytes, int | None]]:
    """The pieces of what is at a URL, each with the bytes that are due in all."""
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
