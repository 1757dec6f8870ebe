"""Preparing a data set from its official files in tensorflow-datasets' layout, once and whole."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow_datasets as tfds

from revjax.data.dataset import DataError
from revjax.data.fetch import official_files

Examples = Iterator[tuple[int, dict[str, Any]]]


def prepare(
    builder_class: Callable[..., tfds.core.DatasetBuilder],
    name: str,
    directory: pathlib.Path,
    source: str | None,
) -> None:
    """Prepares a data set, unless another process does so first.

    tensorflow-datasets writes into a folder beside the one due and renames that once it is whole.

    Args:
        builder_class: makes the builder from `files=`, the official files, and `data_dir=`.
        name: the data set, one of `revjax.data.official.OFFICIAL`.
        directory: what is to be prepared: DATA_DIR/NAME/VERSION.
        source: as `official_files` takes it.

    Raises:
        DataError: as `official_files`, and where the disk is full or cannot be written.
    """
    data_dir = directory.parent.parent
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with official_files(name, source, scratch=os.fspath(data_dir)) as files, _on_stderr():
            builder = builder_class(files=files, data_dir=data_dir)
            builder.download_and_prepare(file_format="array_record")
    except (OSError, RuntimeError) as error:  # array_record's writer raises the latter
        if not directory.exists():  # else another process has prepared it meanwhile
            raise DataError(
                f"{name} could not be prepared in {directory} ({error}): free some space there, or "
                "choose another folder with --config.data.dir=DIR."
            ) from error


@contextlib.contextmanager
def _on_stderr() -> Iterator[None]:
    """What tensorflow-datasets prints goes to stderr, and its progress bars only to a terminal."""
    quiet = not sys.stderr.isatty()
    if quiet:
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            yield
    finally:
        if quiet:
            tfds.enable_progress_bar()
