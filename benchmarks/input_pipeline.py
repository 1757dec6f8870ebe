"""Images a second of the input pipeline beside what the cores can decode.

Command:   python benchmarks/input_pipeline.py DIR [--workers N] [--batch B] [--turns T]
                                                   [--images I] [--json FILE]
Hardware:  any; nothing else should run on it
Figures:   benchmarks/results/input_pipeline.json (`--json FILE` writes elsewhere)

DIR is a folder of images as --config.data.source takes it. In turns, each begun by another:

- decoding alone: as many processes as there are workers each read files and decode them whole, to
  RGB arrays that are thrown away, by Pillow, and by the decoder of the pipeline, simplejpeg;
- decoding and resizing alone: the same by simplejpeg, and then OpenCV resizes a box at random to
  224x224, one array for all: what a pipeline costs that leaves nothing to the device;
- the pipeline: batches of training, read, decoded, cropped at random, shrunk to 224x224 where they
  are larger, and handed over, by workers, and by threads of one process, one for each core. What is
  smaller is enlarged, and what is due mirrored, by the device, which is given apart.

A share is the median over the turns of the pipeline's speed against the decoding of the same turn,
with the quartiles. Starting processes is not counted, nor are the first batches. Where the machine
has other work, the clock tells little; so the same is given by the time that the cores were at it,
for decoding and for threads: what the clock would say if nothing else ran and no thread waited.

That is done for the files as they are, and for the same pictures at 500x375, which is about what
ImageNet's have on average: samples of it have often been made small. Those are made by
Pillow's bicubic filter at quality 95, in a folder that is removed. So enlarged they are smooth, and
have half the bytes of ImageNet's, whose 1,281,167 for training are 138 GB; a third row is for the
same with noise of a deviation of 7 added, at quality 96, which have about as many bytes as those.
"""

import argparse
import concurrent.futures
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
import PIL.Image
import simplejpeg
from record import RESULTS, environment

from revjax import memory_report
from revjax.data import finish_images, open_stream
from revjax.data.crop import WORDS, random_box
from revjax.data.examples import Examples
from revjax.data.stream import ImageStream

PACKAGES = ("grain", "opencv-python-headless", "pillow", "simplejpeg")
LARGE = (("at 500x375", 0, 95), ("at 500x375, with noise", 7, 96))  # name, noise, quality
SIZE = 224
RESIZED = np.zeros((SIZE, SIZE, 3), np.uint8)
CHUNK = 50  # images that a process decodes at a time


def by_pillow(blob: bytes) -> np.ndarray:
    with PIL.Image.open(io.BytesIO(blob)) as image:
        return np.asarray(image.convert("RGB"))


def and_resize(blob: bytes) -> None:
    pixels = simplejpeg.decode_jpeg(blob)
    words = np.frombuffer(blob[-8 * WORDS :], np.uint64)  # as random as the end of a JPEG
    left, top, width, height = random_box(words, pixels.shape[1], pixels.shape[0])
    part = pixels[top : top + height, left : left + width]
    cv2.resize(part, (SIZE, SIZE), dst=RESIZED, interpolation=cv2.INTER_LINEAR)


DECODERS = {
    "decoding alone, Pillow": by_pillow,
    "decoding alone, simplejpeg": simplejpeg.decode_jpeg,
    "decoding and resizing alone": and_resize,
}


def decode(decoder: str, examples: Examples, chunk: range) -> float:
    """The seconds of a core that it took."""
    began = time.process_time()
    for index in chunk:
        DECODERS[decoder](examples.read(index).blob)
    return time.process_time() - began


def decoding_speed(
    pool: concurrent.futures.Executor, decoder: str, examples: Examples, number: int
) -> tuple[float, float]:
    """Images that the pool's processes decode, of `number`: in a second, and in one of a core."""
    chunks = [range(start, start + CHUNK) for start in range(0, len(examples) - CHUNK + 1, CHUNK)]
    todo = [chunks[turn % len(chunks)] for turn in range(-(-number // CHUNK))]
    began = time.perf_counter()
    used = sum(pool.map(decode, [decoder] * len(todo), [examples] * len(todo), todo))
    images = len(todo) * CHUNK
    return images / (time.perf_counter() - began), images / used


def pipeline_speed(stream: ImageStream, batch_size: int, number: int) -> tuple[float, float]:
    """Images of training batches in a second, and in one of a core, the first few not counted.

    The second number is NaN for workers, whose time is not that of this process.
    """
    first, last = 4 + 4 * stream.workers, -(-number // batch_size)
    with stream.train(0, first + last + first, batch_size, seed=0) as batches:
        for _ in range(first):
            next(batches)
        began, used = time.perf_counter(), time.process_time()
        for _ in range(last):  # and not to the end: as many are in the making as when this began
            assert not next(batches).broken
        seconds, used = time.perf_counter() - began, time.process_time() - used
    images = last * batch_size
    return images / seconds, math.nan if stream.workers else images / used


def finishing(batch_size: int) -> dict[str, Any]:
    """What it costs the device to finish what the pipeline hands over."""
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, SIZE, SIZE, 3), np.uint8)
    boxes, mirrored = np.tile([9, 9, 160, 120], (batch_size, 1)), np.arange(batch_size) % 2 == 0
    batch = jax.device_put((pixels, boxes.astype(np.int32), mirrored))
    report = memory_report(finish_images, *batch)
    jax.block_until_ready(finish_images(*batch))
    speeds = []
    for _ in range(9):
        began = time.perf_counter()
        jax.block_until_ready(finish_images(*batch))
        speeds.append(batch_size / (time.perf_counter() - began))
    return {
        "images_per_second": quartiles(speeds),
        "temporary_bytes_an_image": report.temporary_bytes / batch_size,
        "operations_an_image": report.operations / batch_size,
    }


def measure(source: str, workers: int, batch_size: int, turns: int, number: int) -> dict[str, Any]:
    streams = {
        f"pipeline, {workers} workers": open_stream("x", source=source, workers=workers),
        "pipeline, threads": open_stream("x", source=source),
    }
    examples = next(iter(streams.values())).splits["train"]
    speeds: dict[str, list[float]] = {name: [] for name in (*DECODERS, *streams)}
    of_a_core: dict[str, list[float]] = {name: [] for name in (*DECODERS, *streams)}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
        contest: dict[str, Callable[[], tuple[float, float]]] = {
            name: partial(decoding_speed, pool, name, examples, number) for name in DECODERS
        } | {
            name: partial(pipeline_speed, stream, batch_size, number)
            for name, stream in streams.items()
        }
        for turn in range(-1, turns):  # the first reads the files into memory
            for place in range(len(contest)):  # another comes first each turn
                kind = list(contest)[(turn + place) % len(contest)]
                speed, core = contest[kind]()
                if turn >= 0:
                    speeds[kind].append(speed)
                    of_a_core[kind].append(core)
    blobs = [examples.read(index).blob for index in range(0, len(examples), 10)]
    sizes = [by_pillow(blob).shape[:2] for blob in blobs]
    shares = {
        f"{name} / {alone}": quartiles(np.divide(speeds[name], speeds[alone]))
        for name in streams
        for alone in DECODERS
    }
    of_a_core = {kind: found for kind, found in of_a_core.items() if not np.isnan(found).any()}
    shares_of_a_core = {
        f"pipeline, threads / {alone}": quartiles(
            np.divide(of_a_core["pipeline, threads"], of_a_core[alone])
        )
        for alone in DECODERS
    }
    return {
        "mean_height_and_width": np.mean(sizes, 0).round(1).tolist(),
        "mean_bytes": round(float(np.mean([len(blob) for blob in blobs]))),
        "images_per_second": {kind: quartiles(values) for kind, values in speeds.items()},
        "shares": shares,
        "images_per_second_of_a_core": {k: quartiles(found) for k, found in of_a_core.items()},
        "shares_of_a_core": shares_of_a_core,
    }


def enlarge(source: str, folder: str, noise: float, quality: int) -> None:
    """Writes the images of a folder again, at 500x375."""
    generator = np.random.default_rng(0)
    for path in Path(source).expanduser().glob("*/*/*.JPEG"):
        there = Path(folder, *path.parts[-3:])
        there.parent.mkdir(parents=True, exist_ok=True)
        with PIL.Image.open(path) as image:
            large = image.convert("RGB").resize((500, 375), PIL.Image.Resampling.BICUBIC)
        noisy = np.asarray(large, np.float32) + generator.normal(0, noise, (375, 500, 3))
        pixels = noisy.round().clip(0, 255).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(there, "JPEG", quality=quality)


def quartiles(values: np.ndarray | list[float]) -> list[float]:
    """First quartile, median and third quartile."""
    return np.percentile(values, [25, 50, 75]).round(4).tolist()


def print_table(name: str, row: dict[str, Any]) -> None:
    height, width = row["mean_height_and_width"]
    print(f"\n{name}: {width:.0f}x{height:.0f} pixels and {row['mean_bytes']:,} bytes on average\n")
    print("| | images/s (quartiles) |\n|---|---|")
    for kind, (low, median, high) in row["images_per_second"].items():
        print(f"| {kind} | {median:,.0f} ({low:,.0f} to {high:,.0f}) |")
    print("\n| share | |\n|---|---|")
    for kind, (low, median, high) in row["shares"].items():
        print(f"| {kind} | {median:.0%} ({low:.0%} to {high:.0%}) |")
    print("\n| by time of the cores | images/s of a core, or share |\n|---|---|")
    for kind, (low, median, high) in row["images_per_second_of_a_core"].items():
        print(f"| {kind} | {median:,.0f} ({low:,.0f} to {high:,.0f}) |")
    for kind, (low, median, high) in row["shares_of_a_core"].items():
        print(f"| {kind} | {median:.0%} ({low:.0%} to {high:.0%}) |")


def main() -> None:
    parser = argparse.ArgumentParser(description="The input pipeline beside decoding alone.")
    parser.add_argument("source", help="a folder of images: DIR/train/CLASS/*.JPEG, DIR/val/...")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="default: a core each")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=10, help="a multiple of 5 is fair")
    parser.add_argument("--images", type=int, default=2_000, help="that each has a turn")
    parser.add_argument("--json", type=Path, default=RESULTS / "input_pipeline.json")
    arguments = parser.parse_args()
    if min(arguments.workers, arguments.batch, arguments.turns, arguments.images) < 1:
        parser.error("--workers, --batch, --turns and --images must be 1 or more.")
    options = arguments.workers, arguments.batch, arguments.turns, arguments.images
    rows = {"as they are": measure(arguments.source, *options)}
    print_table("as they are", rows["as they are"])
    for name, noise, quality in LARGE:
        with tempfile.TemporaryDirectory() as folder:
            enlarge(arguments.source, folder, noise, quality)
            rows[name] = measure(folder, *options)
        print_table(name, rows[name])
    record = environment()
    record["versions"] |= {name: importlib.metadata.version(name) for name in PACKAGES}
    record["finishing"] = cost = finishing(arguments.batch)
    print(
        f"\nthe device finishes {cost['images_per_second'][1]:,.0f} images/s, each by "
        f"{cost['operations_an_image'] / 1e9:.3f} x 10^9 operations and with "
        f"{cost['temporary_bytes_an_image'] / 1e6:.2f} MB of temporaries"
    )
    record |= {"workers": arguments.workers, "batch_size": arguments.batch}
    record |= {"turns": arguments.turns, "images_a_turn": arguments.images, "rows": rows}
    arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
