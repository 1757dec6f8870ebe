"""Streamed images, of which two processes decode a half of each batch."""

import re
import signal

import numpy as np
import pytest
from images import encode
from processes import differing, finish, losses, run_all, wait_for_checkpoint

from revjax.data import batch_indices
from revjax.training.metrics import read_rows

pytestmark = pytest.mark.slow
STEPS, BATCH, CLASSES = 60, 8, 3
BROKEN = 10  # the step whose last image is broken, which process 1 is to decode
CONFIG = f"""
from configs.imagenet import recipe

def get_config():
    config = recipe("revnet")
    config.model.units, config.model.filters, config.model.bottleneck = (1, 1), (8, 8, 16), False
    config.data.image_size = 16
    config.optim.learning_rate = 0.01  # what float32 rounds differently stays small
    config.steps, config.batch_size = {STEPS}, {BATCH}
    config.log_every = 1
    config.eval_every = {STEPS}
    config.precise_bn_batches = 2
    config.checkpoint_every = 3
    config.keep_checkpoints = {STEPS}
    return config
"""


def write(folder, number):
    """As many JPEGs, sorted by class; their paths."""
    rng, paths = np.random.default_rng(number), []
    for index in range(number):
        label = index * CLASSES // number
        path = folder / f"class{label}" / f"{index:03}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (3, 4, 3), np.uint8)
        coarse[..., label] //= 4
        path.write_bytes(encode(coarse.repeat(10, 0).repeat(10, 1)))
        paths.append(path)
    return paths


@pytest.fixture
def folder(tmp_path):
    """Images for one epoch, one of them cut off, and some to test on; the name of the broken."""
    number = STEPS * BATCH
    paths = write(tmp_path / "images" / "train", number)
    write(tmp_path / "images" / "val", 2 * BATCH - 3)
    path = paths[batch_indices(0, BROKEN, BATCH, number)[-1]]
    path.write_bytes(path.read_bytes()[:-200])
    return tmp_path / "images", f"train/{path.parent.name}/{path.name}"


def rows(workdir):
    return [dict(row, images_per_second=0) for row in read_rows(workdir)]


def test_processes_share_a_stream(start, tmp_path, folder):
    """Two processes compute what one with two devices does, stopped by a signal or not."""
    source, broken = folder
    flag, sentence = f"--config.data.source={source}", rf"the image {broken} is broken \(.*\)"

    def told(said):
        return [len(re.findall(sentence, err)) for err in said]

    assert told(run_all(start, 1, 2, flag, workdir="alone")) == [1]
    assert told(run_all(start, 2, 1, flag, workdir="whole")) == [0, 1]
    due, ours = losses(tmp_path / "alone"), losses(tmp_path / "whole")
    assert len(due) == len(ours) == STEPS
    assert ours[: BROKEN + 5] == pytest.approx(due[: BROKEN + 5], rel=1e-4)  # later steps amplify
    assert ours == pytest.approx(due, rel=0.2)

    processes = start(2, 1, flag)
    wait_for_checkpoint(processes, tmp_path / "run")
    processes[1].send_signal(signal.SIGTERM)
    stopped = finish(processes)
    assert [code for code, *_ in stopped] == [0, 0], stopped
    assert re.search(rf"Stopped by .* at step \d+ of {STEPS}: saved in", stopped[0][1])
    before = told(err for *_, err in stopped)
    after = told(run_all(start, 2, 1, flag))
    assert np.add(before, after).tolist() == [0, 1]
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert differing(tmp_path / "run", tmp_path / "whole", STEPS) == []
