"""Configs of data that are streamed, and what the network sees of their batches."""

import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from images import encode, ramp
from test_data_stream import SAMPLE, shades, write

from revjax.data import FIXED_NORMALIZATIONS, distort_color, normalize
from revjax.data.image_folder import open_image_folder
from revjax.training.command_line import Arguments, parse_arguments
from revjax.training.config import Config, check_config
from revjax.training.errors import ConfigError
from revjax.training.feed import StreamFeed, open_stream_of, terms_of
from revjax.training.mesh import make_mesh
from revjax.training.metrics import read_rows
from revjax.training.state import abstract_model
from revjax.training.step import Split, streamed_images

ROOT = Path(__file__).parent.parent
MODELS = ("resnet50", "resnet101", "revnet56", "revnet104")


def parse(*flags, file="imagenet_revnet56"):
    arguments = parse_arguments(["train.py", f"--config={ROOT}/configs/{file}.py", *flags])
    assert isinstance(arguments, Arguments)
    return arguments.config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    write(root, shades(12))
    write(root, shades(5), "val")
    return root


@pytest.mark.parametrize("name", MODELS)
def test_the_recipe_is_the_authors(name):
    """By their code, resnet/configs/imagenet_configs.py."""
    config = check_config(parse(file=f"imagenet_{name}"))
    assert (config.data.name, config.model.name) == ("imagenet2012", name)
    assert (config.batch_size, config.steps) == (256, 600_000)
    optim = config.optim
    assert (optim.learning_rate, optim.boundaries) == (0.1, (160_000, 320_000, 480_000))
    assert (optim.decay_factor, optim.momentum, optim.weight_decay) == (0.1, 0.9, 1e-4)
    assert (optim.decay, optim.name, optim.nesterov) == ("kernels", "sgd", False)
    assert (config.data.image_size, config.data.flip, config.data.color) == (224, True, True)
    edges = jnp.array([0, 255], jnp.uint8).reshape(1, 1, 2, 1)
    seen = normalize(edges, FIXED_NORMALIZATIONS[config.data.normalize])
    assert seen.ravel().tolist() == [-1, 1]


def test_a_folder_has_its_own_classes_and_sizes(folder):
    flags = [f"--config.data.source={folder}", "--config.data.image_size=96"]
    config = check_config(parse(*flags, "--config.batch_size=12"))
    assert config.data.info == ((96, 96, 3), 3, 12, 5)
    last = 4 * 832 + 1  # parameters for each class; 27,553,128 are in all for 1,000
    assert abstract_model(config).num_parameters == 27_553_128 - 997 * last
    stream = open_stream_of(config)
    assert stream.info == config.data.info
    with stream.evaluate("test", 5) as batches:
        assert next(batches).images().shape == (5, 96, 96, 3)


def test_a_feed_is_the_stream_with_its_images_finished(tmp_path):
    """On a mesh of four devices; some of what is seen is smaller than due, or to be mirrored."""
    blobs = [encode(ramp(90 + 10 * index, 80)) for index in range(8)]
    write(tmp_path, blobs)
    write(tmp_path, blobs[:5], "val")
    flags = [f"--config.data.source={tmp_path}", "--config.data.image_size=100"]
    config = check_config(parse(*flags, "--config.batch_size=8", "--config.mesh.fsdp=2"))
    stream, mesh = open_stream_of(config), make_mesh(config)
    with closing(StreamFeed(config, stream, mesh, pytest.fail)) as feed:
        steps = [feed.training(step, 1)[0] for step in range(3)]
        tested = list(feed.evaluation("test"))
    with stream.train(0, 3, 8, seed=config.seed) as batches:
        due = list(batches)
    assert (due[0].boxes[:, 2:] < 100).any()
    assert 0 < due[0].mirrored.sum() < 8
    with stream.evaluate("test", 8) as batches:
        due += batches
    for found, batch in zip([*steps, tested[0][0]], due, strict=True):
        assert len(found.images.sharding.device_set) == 4
        np.testing.assert_array_equal(found.images, batch.images())
        np.testing.assert_array_equal(found.labels, batch.labels)
    np.testing.assert_array_equal(tested[0][1], due[-1].counted)


def test_a_folder_is_told_from_another_by_its_terms(tmp_path):
    def terms(file="imagenet_revnet56", **changes):
        values = parse("--config.batch_size=8", file=file).unlock()
        if file == "imagenet_revnet56":
            values.data.source = str(tmp_path / "now")
        for key, value in changes.items():
            values.model[key] = value
        config = check_config(values)
        open_image_folder.cache_clear()
        return terms_of(config, make_mesh(config))

    write(tmp_path / "now", shades(12))
    write(tmp_path / "now", shades(5), "val")
    first = terms()
    assert list(first) == ["classes", "training images", "test images"]
    assert terms() == first
    renamed = next((tmp_path / "now" / "train").glob("*/*"))
    renamed.rename(renamed.with_stem("another"))
    second = terms()
    assert [name for name in first if first[name] != second[name]] == ["training images"]
    for part in ("train", "val"):
        any_class = sorted((tmp_path / "now" / part).iterdir())[0]
        any_class.rename(any_class.with_name("zebra"))
    assert terms()["classes"] != second["classes"]
    parts = "parts of a batch with statistics of their own"
    assert terms(bn_scope="device")[parts] == jax.device_count()
    assert terms("digits_revnet") == {}


def test_training_examples_are_held_out_of_a_folder(folder):
    flags = [f"--config.data.source={folder}", "--config.batch_size=8"]
    values = parse(*flags).unlock()
    values.data.validation = 4
    assert len(open_stream_of(check_config(values)).splits["validation"]) == 4
    values.data.validation = 5
    with pytest.raises(ConfigError, match=r"batch_size is 8; at most 7"):
        check_config(values)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("data.normalize = 'channels'", "normalize is 'channels'; one of minus_one_to_one, imagen"),
        ("data.workers = -1", r"workers is -1; a number from 0"),
        ("data.image_size = 0", r"image_size is 0; a number from 1"),
        ("data.padding = 4", r"padding is a key that nothing reads: images of a stream"),
        ("data.source = '/nowhere'", r"/nowhere has no folder train, where DIR/train/CLASS"),
    ],
)
def test_refuses_of_a_stream(line, sentence):
    values = parse().unlock()
    exec(f"values.{line}")
    with pytest.raises(ConfigError, match=sentence):
        check_config(values)


@pytest.mark.parametrize("key", ["image_size", "color", "workers"])
def test_what_only_streams_read_is_refused_elsewhere(key):
    values = parse(file="digits_revnet").unlock()
    values.data[key] = {"image_size": 8, "color": False, "workers": 0}[key]
    with pytest.raises(ConfigError, match=rf"{key} is a key that nothing reads: digits is not str"):
        check_config(values)


def test_padding_is_still_due_where_images_are_in_memory():
    values = parse(file="digits_revnet").unlock()
    del values.data.padding
    with pytest.raises(ConfigError, match=r"config\.data\.padding is missing"):
        check_config(values)


@pytest.mark.parametrize("color", [True, False])
@pytest.mark.parametrize("way", ["minus_one_to_one", "imagenet"])
def test_colours_are_distorted_and_then_normalised(color, way):
    values = parse()
    values.data.color, values.data.normalize = color, way
    config: Config = check_config(values)
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    key = jax.random.key(0)
    seen = jax.jit(distort_color)(key, images) if color else images.astype(np.float32)
    mean, std = {
        "minus_one_to_one": (0.5, 0.5),
        # pytorch/vision, references/classification
        "imagenet": (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])),
    }[way]
    due = (np.asarray(seen) / 255 - mean) / std
    batch = Split(images, np.zeros(3, np.int32), FIXED_NORMALIZATIONS[way])  # pyright: ignore
    found = jax.jit(partial(streamed_images, config.data))(key, batch)
    np.testing.assert_allclose(found, due, atol=2e-5)


@pytest.mark.slow
def test_revnet56_trains_and_evaluates_on_jpegs(tmp_path):
    """The config as it is, but for its sizes; on photographs, where a tree of them is named."""
    source = SAMPLE or tmp_path
    if not SAMPLE:
        blobs = [encode(ramp(90 + 10 * index, 80)) for index in range(8)]
        write(tmp_path, blobs)
        write(tmp_path, blobs[:3], "val")
    flags = "data.image_size=64 batch_size=4 steps=3 log_every=1 eval_every=3 precise_bn_batches=1"
    workdir = tmp_path / "run"
    line = [sys.executable, f"{ROOT}/train.py", f"--config={ROOT}/configs/imagenet_revnet56.py"]
    line += [f"--config.{flag}" for flag in flags.split()]
    line += [f"--config.data.source={source}", f"--workdir={workdir}"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "broken" not in done.stderr
    rows = read_rows(workdir)
    steps = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert np.isfinite([row["loss"] for row in rows]).all()
    (test,) = (row for row in rows if row["split"] == "test")
    assert test["step"] == 3 and 0 <= test["accuracy"] <= 1
