"""Streams of images: order, resuming, shares, crops, broken files, workers."""

import collections
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from images import encode, place, ramp

from revjax.data import DataError, batch_indices, open_stream
from revjax.data.stream import Broken, ImageStream

SIZE, TRAIN, TEST = 32, 30, 11
SAMPLE = os.environ.get("REVJAX_IMAGE_FOLDER")  # a tree of real photographs


def write(root, blobs, split="train", classes=3):
    """Files of a class folder each, so that the class of example i is i % classes; their names."""
    order = sorted(range(len(blobs)), key=lambda index: (index % classes, index))
    for index, blob in enumerate(blobs):
        path = root / split / f"class{index % classes}" / f"{index:03}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob)
    return [f"{split}/class{index % classes}/{index:03}.JPEG" for index in order]


def shades(number, start=0):
    """Images of one colour each, which tells their number."""
    return [
        encode(np.full((40, 50, 3), 5 * (start + index), np.uint8), "PNG")
        for index in range(number)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("shades")
    write(root, shades(TRAIN))
    write(root, shades(TEST), "val")
    return root


@pytest.fixture(scope="module")
def ramps(tmp_path_factory):
    root = tmp_path_factory.mktemp("ramps")
    write(root, [encode(ramp(120, 90), "PNG")] * 6)
    write(root, [encode(ramp(120, 90), "PNG")] * 3, "val")
    return root


def opened(root, **options) -> ImageStream:
    return open_stream("photographs", source=str(root), image_size=SIZE, **options)


def all_of(batches):
    with batches:
        return list(batches)


def shade_of(image):
    image = np.asarray(image)
    assert (image == image[0, 0]).all()
    return round(image[0, 0, 0] / 5)


def same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.broken == other.broken
        np.testing.assert_array_equal(one.images(), other.images())
        for key in ("labels", "counted"):
            np.testing.assert_array_equal(getattr(one, key), getattr(other, key))


def test_examples_come_in_the_order_of_seed_and_step(folder):
    stream = opened(folder)
    assert stream.info == ((SIZE, SIZE, 3), 3, TRAIN, TEST)
    examples = stream.splits["train"]
    numbers = [int(examples.name(index)[-8:-5]) for index in range(TRAIN)]
    batches = all_of(stream.train(0, 9, 8, seed=3))
    assert len(batches) == 9
    for step, batch in enumerate(batches):
        due = [numbers[index] for index in batch_indices(3, step, 8, TRAIN)]
        assert [shade_of(image) for image in batch.images()] == due
        assert batch.labels.tolist() == [number % 3 for number in due]
        assert (batch.images().dtype, batch.labels.dtype) == (np.uint8, np.int32)
        assert batch.counted.all() and batch.broken == ()


def test_a_resumed_stream_goes_on_with_the_next_example(ramps):
    stream = opened(ramps)
    uninterrupted = all_of(stream.train(0, 8, 4, seed=1))
    same(all_of(stream.train(5, 8, 4, seed=1)), uninterrupted[5:])
    assert all_of(stream.train(8, 8, 4, seed=1)) == []
    others = all_of(stream.train(0, 8, 4, seed=2))
    images = {batch.images().tobytes() for batch in uninterrupted + others}
    assert len(images) == 16


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_batch(ramps, processes):
    stream = opened(ramps)
    for whole, pieces in [
        (stream.train(2, 4, 4, seed=1), lambda p: stream.train(2, 4, 4, seed=1, share=p)),
        (stream.evaluate("test", 4), lambda p: stream.evaluate("test", 4, share=p)),
    ]:
        shares = [all_of(pieces((process, processes))) for process in range(processes)]
        for batch, *parts in zip(all_of(whole), *shares, strict=True):
            joined = np.concatenate([part.images() for part in parts])
            np.testing.assert_array_equal(joined, batch.images())
            for key in ("labels", "counted"):
                joined = np.concatenate([getattr(part, key) for part in parts])
                np.testing.assert_array_equal(joined, getattr(batch, key))


def test_crops_are_of_inceptions_rule_and_half_of_them_mirrored(ramps):
    stream = opened(ramps)
    images = np.concatenate([batch.images() for batch in all_of(stream.train(0, 40, 6, seed=0))])
    places = np.array([place(image) for image in images])
    left, top, right, bottom = places.T
    mirrored = left > right
    assert 80 < mirrored.sum() < 160  # of 240
    areas = np.abs(right - left) * (bottom - top)
    assert 0.06 < areas.min() < 0.16 and 0.85 < areas.max() < 1.03
    assert places[:, [0, 2]].min() > -0.03 and places[:, [0, 2]].max() < 1.03
    assert len(set(map(tuple, places.round(6)))) > 235
    plain = all_of(stream.train(0, 10, 6, seed=0, flip=False))
    kept = np.concatenate([batch.images() for batch in plain])
    flips = np.where(mirrored[:60, None, None, None], images[:60, :, ::-1], images[:60])
    np.testing.assert_array_equal(kept, flips)  # the same crops


def test_without_distortion_and_in_evaluation_it_is_the_centre(ramps):
    stream = opened(ramps)
    (batch,) = all_of(stream.train(0, 1, 6, seed=0, distort=False))
    (test,) = all_of(stream.evaluate("test", 3))
    side = 90 * 7 / 8
    due = [0.5 - side / 240, 0.5 - side / 180, 0.5 + side / 240, 0.5 + side / 180]
    for image in (*batch.images(), *test.images()):
        np.testing.assert_allclose(place(image), due, atol=0.015)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 16])
def test_evaluation_sees_every_example_once_in_order(folder, batch_size):
    batches = all_of(opened(folder).evaluate("test", batch_size))
    assert len(batches) == -(-TEST // batch_size)
    assert all(len(batch.images()) == batch_size for batch in batches)
    counted = np.concatenate([batch.counted for batch in batches])
    assert counted.tolist() == [index < TEST for index in range(len(counted))]
    images = np.concatenate([batch.images() for batch in batches])
    labels = np.concatenate([batch.labels for batch in batches])
    seen = [shade_of(image) for image in images[:TEST]]
    assert seen == sorted(range(TEST), key=lambda index: (index % 3, index))
    assert labels[:TEST].tolist() == [number % 3 for number in seen]
    assert not images[TEST:].any() and not labels[TEST:].any()


@pytest.fixture
def damaged(tmp_path):
    """Of 12 and 7 images, three and two cannot be had."""
    half = encode(ramp(50, 40))[:400]
    train, test = shades(12), shades(7)
    train[4], train[7], train[8] = b"", half, b"no image"
    test[1], test[6] = half, b""
    names = write(tmp_path, train), write(tmp_path, test, "val")
    return tmp_path, names


def test_a_broken_image_is_named_and_the_next_takes_its_place(damaged):
    root, (names, _) = damaged
    numbers = [int(name[-8:-5]) for name in names]
    stream, found = opened(root), []
    for step, batch in enumerate(all_of(stream.train(0, 9, 4, seed=0))):
        epoch = [numbers[index] for index in batch_indices(0, step // 3, 12, 12)]
        start = step % 3 * 4
        due, broken = [], []
        for first in range(start, start + 4):
            for number in itertools.islice(itertools.cycle(epoch), first, None):
                if number not in (4, 7, 8):
                    due.append(number)
                    break
                broken.append(number)
        assert [shade_of(image) for image in batch.images()] == due
        assert batch.labels.tolist() == [number % 3 for number in due]
        assert batch.counted.all()
        assert [int(item.name[-8:-5]) for item in batch.broken] == list(dict.fromkeys(broken))
        found += batch.broken
    reasons = {item.name: item.reason for item in found}
    assert reasons.keys() == {f"train/class{n % 3}/{n:03}.JPEG" for n in (4, 7, 8)}
    assert reasons["train/class1/004.JPEG"] == "the file is empty"
    assert "truncated" in reasons["train/class1/007.JPEG"].lower()
    assert found[0] == Broken(*found[0])


def test_a_broken_image_does_not_count_in_evaluation(damaged):
    root, (_, names) = damaged
    batches = all_of(opened(root).evaluate("test", 4))
    counted = np.concatenate([batch.counted for batch in batches])
    due = [not name.endswith(("001.JPEG", "006.JPEG")) for name in names]
    assert counted.tolist() == [*due, False]
    told = [item.name for batch in batches for item in batch.broken]
    assert told == [name for name, fits in zip(names, due, strict=True) if not fits]


def test_a_file_that_is_gone_is_broken(damaged):
    root, _ = damaged
    stream = opened(root)
    (root / "val/class0/000.JPEG").unlink()
    first = all_of(stream.evaluate("test", 7))[0]
    assert not first.counted[0]
    assert first.broken[0].name == "val/class0/000.JPEG"
    assert "No such file" in first.broken[0].reason


def test_where_nothing_can_be_decoded_it_ends(tmp_path):
    write(tmp_path, [b""] * 3)
    write(tmp_path, shades(3), "val")
    match = r"100 images in a row .* \(the file is empty\)"
    with (
        opened(tmp_path).train(0, 1, 2, seed=0) as batches,
        pytest.raises(DataError, match=match),
    ):
        next(batches)


def test_examples_are_held_out(folder):
    stream = opened(folder, validation=10)
    assert stream.info.train_size == TRAIN - 10
    validation = all_of(stream.evaluate("validation", 10))[0]
    held_out = {shade_of(image) for image in validation.images()}
    (epoch,) = all_of(stream.train(0, 1, TRAIN - 10, seed=0))
    trained = {shade_of(image) for image in epoch.images()}
    assert held_out | trained == set(range(TRAIN))
    assert len(held_out) == 10 and len(trained) == TRAIN - 10


def test_impossible_arguments_are_refused(folder):
    stream = opened(folder)
    with pytest.raises(ValueError, match=r"a batch of 31 cannot be drawn from 30"):
        stream.train(0, 1, 31, seed=0)
    match = r"10 cannot be shared by 4 processes: .* multiple of 4"
    with pytest.raises(ValueError, match=match):
        stream.train(0, 1, 10, seed=0, share=(0, 4))
    with pytest.raises(ValueError, match=match):
        stream.evaluate("test", 10, share=(0, 4))


def test_workers_give_the_same_and_outlive_signals_to_all(damaged):
    root, _ = damaged
    due = all_of(opened(root).train(1, 40, 4, seed=0))
    with opened(root, workers=2).train(1, 40, 4, seed=0) as batches:
        found = [next(batches), next(batches)]  # of both, which are then past their start
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker, sent in itertools.product(workers, (signal.SIGTERM, signal.SIGINT)):
            assert worker.pid
            os.kill(worker.pid, sent)
        found += batches
        same(found, due)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_worker_that_dies_is_a_sentence(folder):
    with opened(folder, workers=1).train(0, 10_000, 8, seed=0) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        with pytest.raises(DataError, match=r"exit code -9.*--config\.data\.workers=0"):
            collections.deque(batches, maxlen=0)
    assert multiprocessing.active_children() == []


ORPHANS = """
import multiprocessing, os, signal, sys
from revjax.data import open_stream
if __name__ == "__main__":
    stream = open_stream("x", source=sys.argv[1], image_size=32, workers=1)
    batches = stream.train(0, 10_000, 8, seed=0)
    next(batches)
    print(multiprocessing.active_children()[0].pid, flush=True)
    {end}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "end",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os._exit(0)",
        "pass",
        "del batches\n    while multiprocessing.active_children(): pass",
    ],
)
def test_workers_end_with_their_process(folder, tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(ORPHANS.replace("{end}", end))
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, script, folder],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    worker, until = int(done.stdout), time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()


@pytest.mark.skipif(not SAMPLE, reason="REVJAX_IMAGE_FOLDER names no tree of photographs")
def test_photographs():
    stream = open_stream("photographs", source=SAMPLE)
    batches = all_of(stream.evaluate("test", 50))
    assert sum(batch.counted.sum() for batch in batches) == stream.info.test_size
    assert not any(batch.broken for batch in batches)
    batches = all_of(stream.train(0, stream.info.train_size // 50, 50, seed=0))
    assert np.mean([batch.images().mean() for batch in batches]) > 64
    labels = np.bincount(np.concatenate([batch.labels for batch in batches]))
    assert len(labels) == stream.num_classes
