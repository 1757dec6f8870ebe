"""metrics.jsonl and the TensorBoard events of a run that stops, is killed, and goes on."""

import json
import resource

import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from revjax.training.errors import TrainingError
from revjax.training.metrics import MetricsLog, read_rows


def row(step, split="train", loss=0.5):
    return {"step": step, "split": split, "loss": loss, "accuracy": 0.75}


def test_rows_are_read_back(tmp_path):
    log = MetricsLog(tmp_path, step=0)
    for step in (10, 20):
        log.write(row(step))
    log.write(row(20, "test"))
    log.sync()
    log.close()
    assert read_rows(tmp_path) == [row(10), row(20), row(20, "test")]
    assert log.last("train") == row(20)
    assert log.last("validation") is None
    assert log.has("test", 20)
    assert not log.has("test", 10)
    assert not log.has("validation", 20)


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    log = MetricsLog(tmp_path, step=0)
    for step in (10, 20, 30):
        log.write(row(step))
    log.close()
    log = MetricsLog(tmp_path, step=20)
    log.write(row(30, loss=0.25))
    log.close()
    assert read_rows(tmp_path) == [row(10), row(20), row(30, loss=0.25)]


@pytest.mark.parametrize("torn", ['{"step": 30, "spl', "\0\0\0\n", '{"step": 3\n', "30\n"])
def test_a_torn_last_line_is_no_row(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(10)) + "\n" + torn)
    assert read_rows(tmp_path) == [row(10)]
    MetricsLog(tmp_path, step=10).close()
    assert path.read_text() == json.dumps(row(10)) + "\n"


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("not a row\n" + json.dumps(row(10)) + "\n")
    with pytest.raises(TrainingError, match=r"line 1 of .*metrics\.jsonl"):
        read_rows(tmp_path)


def test_a_number_that_json_has_not_is_no_row(tmp_path):
    log = MetricsLog(tmp_path, step=0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write(row(10, loss=float("nan")))
    log.close()


def test_a_full_disk_is_an_error_and_loses_no_row_that_was_synced(tmp_path):
    """By the kernel: no file may grow beyond a size. It does not hang, nor fail once more."""
    log = MetricsLog(tmp_path, step=0)
    log.write(row(10))
    log.sync()
    size = (tmp_path / "metrics.jsonl").stat().st_size
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, old[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            for step in range(20, 1000, 10):
                log.write(row(step))
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert (tmp_path / "metrics.jsonl").stat().st_size > size  # a torn line
    log = MetricsLog(tmp_path, step=10)
    log.close()
    assert log.rows == [row(10)]
    assert read_rows(tmp_path) == [row(10)]


def events(directory):
    """The events of every file: length, its checksum, the event, its checksum (TFRecord)."""
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            payload, checksum = data[12 : 12 + length], data[12 + length : 16 + length]
            assert masked_crc32c(payload) == int.from_bytes(checksum, "little")
            yield event_pb2.Event.FromString(payload)  # pyright: ignore[reportAttributeAccessIssue]
            data = data[16 + length :]


def test_tensorboard_events(tmp_path):
    log = MetricsLog(tmp_path, step=0)
    log.write(row(10))
    log.write(row(10, "test", loss=0.125))
    log.close()
    MetricsLog(tmp_path, step=5).close()
    found = list(events(tmp_path / "tensorboard"))
    scalars = {
        (value.tag, event.step): value.simple_value
        for event in found
        for value in event.summary.value
    }
    assert scalars == {
        ("train/loss", 10): 0.5,
        ("train/accuracy", 10): 0.75,
        ("test/loss", 10): 0.125,
        ("test/accuracy", 10): 0.75,
    }
    restarts = [event.step for event in found if event.HasField("session_log")]
    assert restarts == [1, 6]  # what is read of the steps from there on is forgotten
