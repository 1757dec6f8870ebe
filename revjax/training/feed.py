"""Where the batches of a run come from: from a data set on the devices, or from a stream of images.

Both give training steps and evaluations what they need as `Split`s, and both are functions of the
step: a run that goes on at a step is fed what it would have been fed.
"""

import zlib
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from revjax.data import (
    FIXED_NORMALIZATIONS,
    batch_indices,
    finish_images,
    is_streamed,
    load_dataset,
    open_stream,
)
from revjax.data.image_folder import open_image_folder
from revjax.data.stream import Batch, Batches, ImageStream, empty_batch
from revjax.training.config import Config
from revjax.training.mesh import batch_sharding, put, replicated
from revjax.training.pace import MAX_DISPATCH_STEPS
from revjax.training.step import Split, put_on_device, split_shardings

CLASSES = "classes"  # the term that an evaluation depends on, too

# A part of an evaluation: examples, and bool [batch_size], false where they only fill it up.
Counted = tuple[Split, jax.Array]


class MemoryFeed:
    """A data set that lies whole on every device: a step is told which examples are its batch."""

    longest = MAX_DISPATCH_STEPS  # steps a dispatch

    def __init__(self, config: Config, data: dict[str, Split], mesh: Mesh):
        """Feed from `put_on_device(config.data, dataset, mesh)`."""
        self._config, self._data, self._mesh = config, data, mesh
        self.evaluated = [name for name in data if name != "train"]
        self.broken: dict[str, str] = {}
        whole, parts = replicated(mesh), split_shardings(mesh)
        # A program of its own, so that splits of all sizes share the network's.
        self._take: Any = jax.jit(_take, in_shardings=(whole, whole), out_shardings=parts)

    def training(self, step: int, num_steps: int) -> tuple[Split, np.ndarray]:
        """What `train_steps` takes for steps from `step` on: the data, and which are for each."""
        size = self._config.batch_size
        indices = np.zeros((self.longest, size), np.int32)  # a fresh one: the last may be in use
        for index in range(num_steps):
            indices[index] = self._indices(step + index)
        return self._data["train"], indices

    def statistics(self, number: int) -> Generator[Split]:
        """The batches of the first steps, without augmentation."""
        for step in range(number):
            yield self._take(self._data["train"], self._indices(step))

    def evaluation(self, name: str) -> Generator[Counted]:
        """A split, once."""
        data, size = self._data[name], self._config.batch_size
        number = len(data.labels)
        for start in range(0, number, size):
            places = np.arange(start, start + size, dtype=np.int32)
            counted = put(places < number, batch_sharding(self._mesh))
            yield self._take(data, np.minimum(places, number - 1)), counted

    def example(self) -> Counted:
        """A part of an evaluation, to compile for."""
        return next(self.evaluation("test"))

    def close(self) -> None:
        """Nothing is open."""

    def _indices(self, step: int) -> np.ndarray:
        number = len(self._data["train"].labels)
        return batch_indices(self._config.seed, step, self._config.batch_size, number)


def _take(data: Split, indices: jax.Array) -> Split:
    return data._replace(images=data.images[indices], labels=data.labels[indices])


class StreamFeed:
    """A stream of images, of which every process decodes the share of its devices.

    Attributes:
        broken: names of images that this process could not decode, and why. In training another
            has taken the place of each; in an evaluation it is not counted.
    """

    longest = 1

    def __init__(
        self, config: Config, stream: ImageStream, mesh: Mesh, tell: Callable[[str], None]
    ):
        """Feed from a stream; `tell` is called with a sentence for each broken image, once."""
        self._config, self._stream, self._mesh, self._tell = config, stream, mesh, tell
        self._share = jax.process_index(), jax.process_count()
        self._batches: Batches | None = None
        self._next = -1  # the step of the batch that comes next
        self._normalization = put(FIXED_NORMALIZATIONS[config.data.normalize], replicated(mesh))
        self._finish: Any = jax.jit(finish_images, out_shardings=batch_sharding(mesh))
        self.evaluated = [name for name in stream.splits if name != "train"]
        self.broken: dict[str, str] = {}

    def training(self, step: int, num_steps: int) -> tuple[Split, None]:
        """What `train_steps` takes for a step: its batch."""
        if num_steps == 0:  # to compile for
            return self.example()[0], None
        if step != self._next:
            self.close()
            config = self._config
            self._batches = self._stream.train(
                step,
                config.steps,
                config.batch_size,
                seed=config.seed,
                flip=config.data.flip,
                share=self._share,
            )
        assert self._batches is not None
        self._next = step + 1
        return self._put(next(self._batches))[0], None

    def statistics(self, number: int) -> Generator[Split]:
        """The batches of the first steps, cropped in the middle and not mirrored."""
        size, seed = self._config.batch_size, self._config.seed
        batches = self._stream.train(0, number, size, seed=seed, distort=False, share=self._share)
        with closing(batches):
            yield from (self._put(batch)[0] for batch in batches)

    def evaluation(self, name: str) -> Generator[Counted]:
        """A split, once."""
        batches = self._stream.evaluate(name, self._config.batch_size, share=self._share)
        with closing(batches):
            yield from map(self._put, batches)

    def example(self) -> Counted:
        """A part of an evaluation, to compile for."""
        rows = self._config.batch_size // self._share[1]
        return self._put(empty_batch(rows, self._stream.size))

    def close(self) -> None:
        """End what decodes ahead."""
        if self._batches is not None:
            self._batches.close()

    def _put(self, batch: Batch) -> Counted:
        """A batch on the devices, of which each process has its own part."""
        for name, reason in batch.broken:
            if name not in self.broken:
                self.broken[name] = reason
                self._tell(f"the image {name} is broken ({reason}), and is left out.")
        sharding = batch_sharding(self._mesh)
        pixels, boxes, mirrored, labels, counted = (
            jax.make_array_from_process_local_data(sharding, array)
            for array in (batch.pixels, batch.boxes, batch.mirrored, batch.labels, batch.counted)
        )
        images = self._finish(pixels, boxes, mirrored)
        return Split(images, labels, self._normalization), counted


Feed = MemoryFeed | StreamFeed


def open_stream_of(config: Config) -> ImageStream:
    """Open the data set of a config that is streamed."""
    data = config.data
    return open_stream(
        data.name,
        data_dir=data.dir,
        source=data.source,
        image_size=data.image_size,
        validation=data.validation,
        workers=data.workers,
    )


def terms_of(config: Config, mesh: Mesh) -> dict[str, Any]:
    """What the numbers of a run depend on beside its config: see `check_same_terms`.

    Data sets by name have checksums of their publishers; a folder of images may be any. It is told
    by the names of its files and classes, as reading the files would take too long.
    """
    terms: dict[str, Any] = {}
    if config.model.bn_scope == "device":
        terms["parts of a batch with statistics of their own"] = mesh.size
    source = config.data.source
    if source is not None and is_streamed(config.data.name, source):
        train, test = open_image_folder(source)
        names = zlib.crc32("/".join(train.classes).encode(errors="surrogateescape"))
        terms[CLASSES] = f"{len(train.classes)}, CRC of their names {names:08x}"
        for name, split in (("training images", train), ("test images", test)):
            terms[name] = f"{len(split)}, CRC of their names {split.fingerprint():08x}"
    return terms


def open_feed(config: Config, mesh: Mesh, tell: Callable[[str], None]) -> Feed:
    """Open or load the data set of a config.

    Args:
        config: of the run.
        mesh: the devices that the batches are for.
        tell: is called with a sentence for each image that is broken.

    Raises:
        DataError: where it is missing, unusable or damaged.
    """
    data = config.data
    if not is_streamed(data.name, data.source):
        dataset = load_dataset(data.name, data_dir=data.dir, source=data.source)
        return MemoryFeed(config, put_on_device(data, dataset, mesh), mesh)
    return StreamFeed(config, open_stream_of(config), mesh, tell)
