"""Batches of encoded images, decoded and cropped ahead of time in threads or processes.

The images of a batch are a function of seed and step alone: so are the order of examples
(revjax/data/order.py) and, by a counter-based generator, where each is cropped. The state of an
iterator is then the step that it has come to, which a checkpoint has anyway: `train(start, ...)`
goes on with the very next example, bit for bit, with whatever number of workers or processes. The
state that grain's iterators keep depends on the number of workers, and is not used.
"""

import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from revjax.data.crop import WORDS, central_box, random_box
from revjax.data.dataset import DataError, DatasetInfo
from revjax.data.decode import BrokenImageError, decode_part
from revjax.data.examples import Encoded, Examples
from revjax.data.finish import finish_images
from revjax.data.order import batch_indices

_MAX_THREADS = 16
_MAX_BROKEN_IN_A_ROW = 100
_READ_AT_A_TIME = 32  # examples of a thread; some megabytes


class Broken(NamedTuple):
    """An example that cannot be decoded.

    Attributes:
        name: of the example; for a folder of images, the file's path in it.
        reason: what is wrong with it.
    """

    name: str
    reason: str


class Batch(NamedTuple):
    """A batch of examples, or a process's share of it.

    Attributes:
        pixels: uint8 `[B, S, S, 3]`, in each of them what is seen of an image, not yet enlarged;
            beside that anything, another time something else.
        boxes: int32 `[B, 4]`, where that is, as `Box`.
        mirrored: bool `[B]`, which images are yet to be mirrored.
        labels: int32 `[B]`.
        counted: bool `[B]`; false where a place of an evaluation's batch is empty, as the split
            has come to its end or the image is broken. Pixels and label are then 0. In training
            always true.
        broken: what could not be decoded, each once. In training another example took its place.
    """

    pixels: np.ndarray
    boxes: np.ndarray
    mirrored: np.ndarray
    labels: np.ndarray
    counted: np.ndarray
    broken: tuple[Broken, ...]

    def images(self) -> jax.Array:
        """The finished images, uint8 `[B, S, S, 3]`, by `finish_images` on JAX's default device."""
        return finish_images(*map(jnp.asarray, (self.pixels, self.boxes, self.mirrored)))


class Batches(Iterator[Batch]):
    """An iterator that has batches made ahead of time, and is to be closed when it is not needed.

    The workers of one that is forgotten end when it is collected, or with the process.

    Args:
        make: from a number to a batch; a function that pickles.
        numbers: of the batches.
        workers: how many processes make them; 0 for threads in this one, one for each core up to
            16. Threads hand over a batch at no cost, but more than these wait for each other.

    Raises:
        DataError: by `next`, where the data set is damaged or a worker died.
    """

    def __init__(self, make: Callable[[int], Batch], numbers: range, workers: int):
        if not flags.FLAGS.is_parsed():  # grain reads flags, of which few programs know
            flags.FLAGS.mark_as_parsed()
        threads = 1 if workers else min(os.cpu_count() or 1, _MAX_THREADS)
        # Twice as many, so that no thread waits for the one with the batch that is due.
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        batches = grain.MapDataset.range(numbers.start, numbers.stop).map(make)
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        ahead = batches.to_iter_dataset(options).mp_prefetch(processes, _start_worker)
        self._shared = workers > 0
        self._batches = iter(ahead) if numbers else iter(())
        self._close: Callable[[], object] = getattr(self._batches, "close", tuple)

    def __next__(self) -> Batch:
        """The next batch."""
        try:
            batch = next(self._batches)
        except RuntimeError as error:  # by grain, of a worker
            raise DataError(
                f"images can no longer be read ({str(error).rstrip('.')}): a worker needs room for "
                "its batches in memory and in /dev/shm; give it that, or start again with "
                "--config.data.workers=0."
            ) from error
        if not self._shared:
            return batch
        # Out of the memory shared with a worker, which is to be free again for its next ones.
        arrays = {
            name: np.array(array) for name, array in batch._asdict().items() if name != "broken"
        }
        return batch._replace(**arrays)

    def close(self) -> None:
        """Ends the workers."""
        self._close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class ImageStream:
    """A data set of image files of all sizes, as a stream of batches of one size.

    Attributes:
        splits: the examples to train on as "train", those to test on as "test", and others.
        num_classes: how many classes the labels name.
        size: S, the side of an image in a batch.
        workers: how many processes decode; 0 for threads.
    """

    splits: dict[str, Examples]
    num_classes: int
    size: int = 224
    workers: int = 0

    @property
    def info(self) -> DatasetInfo:
        """The sizes of the data set."""
        sizes = len(self.splits["train"]), len(self.splits["test"])
        return DatasetInfo((self.size, self.size, 3), self.num_classes, *sizes)

    def train(
        self,
        start: int,
        stop: int,
        batch_size: int,
        *,
        seed: int,
        distort: bool = True,
        flip: bool = True,
        share: tuple[int, int] = (0, 1),
    ) -> Batches:
        """The batches of the training steps `start .. stop - 1`.

        An image is cropped by `random_box`, and mirrored or not; both are drawn from the seed, the
        step and the image's place in the batch. The place of a broken image is taken by the next
        in the epoch's order that can be decoded.

        Args:
            start: the first step.
            stop: the step before which to end.
            batch_size: examples a step, over all processes.
            seed: any integer in `0 .. 2**64 - 1`.
            distort: False crops by `central_box` instead, and mirrors nothing.
            flip: whether to mirror an image with probability one half.
            share: (p, n): of the batch only the p-th of n equal pieces, for the p-th process.

        Raises:
            ValueError: where the batch does not fit the split or cannot be divided by n.
            DataError: by `next`, where 100 examples in a row are broken.

        Example:
            >>> stream = open_stream("imagenette", source="imagenette2")      # doctest: +SKIP
            >>> with stream.train(0, 100, 32, seed=0) as batches:             # doctest: +SKIP
            ...     for batch in batches:
            ...         print(batch.images().shape)
        """
        examples, rows = self.splits["train"], _rows(batch_size, share)
        if start < stop:
            batch_indices(seed, start, batch_size, len(examples))  # it refuses what is impossible
        make = functools.partial(
            _train_batch, examples, self.size, seed, batch_size, rows, distort, flip
        )
        return Batches(make, range(start, stop), self.workers)

    def evaluate(self, split: str, batch_size: int, *, share: tuple[int, int] = (0, 1)) -> Batches:
        """All examples of a split once, in their order, cropped by `central_box`.

        Each process gets the same number of batches; the last of them is filled up.

        Args:
            split: one of `splits`.
            batch_size: examples a batch, over all processes.
            share: as `train` takes it.

        Raises:
            ValueError: as `train`.
        """
        examples, rows = self.splits[split], _rows(batch_size, share)
        make = functools.partial(_test_batch, examples, self.size, batch_size, rows)
        return Batches(make, range(-(-len(examples) // batch_size)), self.workers)


def _rows(batch_size: int, share: tuple[int, int]) -> range:
    """The places of a process's share of a batch."""
    process, processes = share
    if batch_size < 1 or batch_size % processes:
        raise ValueError(
            f"a batch of {batch_size} cannot be shared by {processes} processes: choose a multiple "
            f"of {processes}."
        )
    rows = batch_size // processes
    return range(process * rows, (process + 1) * rows)


def _train_batch(
    examples: Examples,
    size: int,
    seed: int,
    batch_size: int,
    rows: range,
    distort: bool,
    flip: bool,
    step: int,
) -> Batch:
    batch, broken = empty_batch(len(rows), size), []
    number = len(examples)
    epoch, position = divmod(step, number // batch_size)
    order = batch_indices(seed, epoch, number, number)  # of the epoch, which is a batch of all
    # One generator for all places of the batch, as it takes longer to make one than to draw a box;
    # its counters are apart from the order's, which are small.
    counter, key = np.array([0, 0, 0, 1], np.uint64), np.array([seed, step], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw((rows.stop, WORDS + 1))
    if distort and flip:
        batch.mirrored[:] = words[rows.start :, WORDS] >> np.uint64(63) == 1
    start = position * batch_size
    due = order[start + rows.start : start + rows.stop].tolist()
    for place, (row, example) in enumerate(zip(rows, _read_all(examples, due), strict=True)):
        choose = functools.partial(random_box, words[row, :WORDS]) if distort else central_box
        last = start + row + _MAX_BROKEN_IN_A_ROW
        others = (int(order[after % number]) for after in range(start + row + 1, last))
        replacements = ((index, _read(examples, index)) for index in others)
        for index, found in itertools.chain([(due[place], example)], replacements):
            reason = _put(batch, place, found, choose)
            if reason is None:
                break
            broken.append(Broken(examples.name(index), reason))
        else:
            raise DataError(
                f"{_MAX_BROKEN_IN_A_ROW} images in a row are broken, the last of them "
                f"{broken[-1].name} ({broken[-1].reason}): is this the right data set?"
            )
    return batch._replace(broken=tuple(dict.fromkeys(broken)))


def _test_batch(examples: Examples, size: int, batch_size: int, rows: range, number: int) -> Batch:
    batch, broken = empty_batch(len(rows), size), []
    start = number * batch_size
    due = range(start + rows.start, min(start + rows.stop, len(examples)))
    for place, (index, example) in enumerate(zip(due, _read_all(examples, due), strict=True)):
        reason = _put(batch, place, example, central_box)
        if reason is not None:
            broken.append(Broken(examples.name(index), reason))
            _leave_out(batch, place)
    for place in range(len(due), len(rows)):
        _leave_out(batch, place)
    return batch._replace(broken=tuple(dict.fromkeys(broken)))


def empty_batch(rows: int, size: int) -> Batch:
    """A batch whose places are to be filled, or not counted."""
    return Batch(
        pixels=np.empty((rows, size, size, 3), np.uint8),
        boxes=np.tile(np.array([0, 0, size, size], np.int32), (rows, 1)),
        mirrored=np.zeros(rows, bool),
        labels=np.zeros(rows, np.int32),
        counted=np.ones(rows, bool),
        broken=(),
    )


def _leave_out(batch: Batch, place: int) -> None:
    batch.pixels[place], batch.labels[place], batch.counted[place] = 0, 0, False


def _read_all(examples: Examples, due: Sequence[int]) -> Iterator[Encoded | OSError]:
    """Reads examples some at a time, and not each before it is decoded.

    Reading is short, and lets go of Python's lock again and again; decoding is long, and does so
    once. So most of the time no thread that decodes waits for one that reads.
    """
    for start in range(0, len(due), _READ_AT_A_TIME):
        yield from [_read(examples, index) for index in due[start : start + _READ_AT_A_TIME]]


def _read(examples: Examples, index: int) -> Encoded | OSError:
    try:
        return examples.read(index)
    except OSError as error:
        return error


def _put(batch: Batch, place: int, example: Encoded | OSError, choose: Callable) -> str | None:
    """Puts an example in its place, or says why it is broken."""
    if isinstance(example, OSError):
        return str(example)
    batch.labels[place] = example.label
    try:
        batch.boxes[place] = decode_part(example.blob, choose, batch.pixels[place])
    except BrokenImageError as error:
        return str(error)
    return None


def _start_worker(worker: int, workers: int) -> None:
    """Prepares a worker process for what may come of the process that started it."""
    del worker, workers
    # A signal to all processes of the run is for the one that saves it: it still needs batches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when its parent has; killed, that could not do it itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
