"""Data sets by name: the digits, sets that tensorflow-datasets has prepared, and names unknown."""

import io
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import sklearn.datasets
from test_data_order import philox4x64

from revjax.data import DATASETS, DataError, dataset_info, load_dataset


def one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# -- Digits ----------------------------------------------------------------------------------------


def test_the_digits_are_those_of_scikit_learn_and_nothing_is_lost():
    digits = load_dataset("digits")
    assert digits.info == dataset_info("digits") == DATASETS["digits"]
    images = np.concatenate([digits.train_images, digits.test_images])
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    assert images.dtype == np.uint8
    assert labels.dtype == np.int32
    pixels, classes = sklearn.datasets.load_digits(return_X_y=True)
    given = sorted(zip(pixels.astype(int).tolist(), classes.tolist(), strict=True))
    stored = images.reshape(-1, 64)
    assert (stored % 15 == 0).all()
    assert sorted(zip((stored // 15).tolist(), labels.tolist(), strict=True)) == given


def test_a_fifth_of_every_digit_is_held_out():
    digits = load_dataset("digits")
    held_out, trained = np.bincount(digits.test_labels), np.bincount(digits.train_labels)
    assert (abs(held_out - (held_out + trained) / 5) < 1).all()
    # Not the last fifth of the file: scikit-learn's order goes by who wrote the digits.
    pixels, _ = sklearn.datasets.load_digits(return_X_y=True)
    where = {scan.tobytes(): n for n, scan in enumerate(pixels.astype(np.uint8))}
    places = [where[(image // 15).tobytes()] for image in digits.test_images]
    assert places == sorted(places)
    assert 800 < np.mean(places) < 1000


def test_the_split_is_the_same_whatever_numpy_does():
    digits = load_dataset("digits")
    pixels, classes = sklearn.datasets.load_digits(return_X_y=True)
    words = philox4x64((1797, 0), 1797)
    order = sorted(range(1797), key=lambda n: (classes[n], words[n]))
    held_out = pixels[sorted(order[::5])].astype(np.uint8)
    np.testing.assert_array_equal(digits.test_images.reshape(-1, 64) // 15, held_out)


@pytest.mark.slow
def test_the_digits_need_no_tensorflow_datasets():
    code = (
        "import sys; from revjax.data import load_dataset; load_dataset('digits');"
        "print('tensorflow_datasets' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_digits_are_read_from_no_folder(tmp_path):
    with pytest.raises(DataError, match="digits cannot be read from") as error:
        load_dataset("digits", source=str(tmp_path))
    one_sentence(error)


# -- Names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifra10", "", "CIFAR10", "two words", "../digits", "a/b/c"])
@pytest.mark.parametrize("function", [dataset_info, load_dataset])
def test_an_unknown_name_is_answered_with_the_names(function, name, tmp_path):
    with pytest.raises(DataError) as error:
        function(name, data_dir=str(tmp_path))
    message = one_sentence(error)
    assert repr(name) in message
    assert str(tmp_path) in message
    assert all(known in message for known in DATASETS)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_folder_elsewhere_is_refused(name):
    with pytest.raises(DataError, match=r"gs://bucket/data is not a local folder") as error:
        load_dataset(name, data_dir="gs://bucket/data")
    one_sentence(error)


@pytest.mark.parametrize("function", [dataset_info, load_dataset])
def test_a_set_never_prepared_is_answered_with_the_command_that_prepares_it(function, tmp_path):
    with pytest.raises(DataError) as error:
        function("mnist", data_dir=str(tmp_path))
    message = one_sentence(error)
    command = message.partition("python -c '")[2].rpartition("'")[0]
    calls = []
    builder = type(
        "Builder", (), {"download_and_prepare": lambda _, **options: calls.append(options)}
    )
    tfds = type(sys)("tensorflow_datasets")
    tfds.builder = lambda name, **options: calls.append((name, options)) or builder()
    code = command.replace("import tensorflow_datasets as tfds; ", "")
    assert code != command
    exec(code, {"tfds": tfds})
    assert calls == [("mnist", {"data_dir": str(tmp_path)}), {"file_format": "array_record"}]


# -- Sets that tensorflow-datasets has prepared ----------------------------------------------------


def prepare(data_dir, features, examples, supervised=("image", "label"), splits=("train", "test")):
    """Has tensorflow-datasets prepare a set "shapes" of the given features and examples."""
    import tensorflow_datasets as tfds

    class Shapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.3")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=supervised,
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            return {split: iter(enumerate(examples)) for split in splits}

        def _generate_examples(self):
            raise NotImplementedError

    Shapes(data_dir=data_dir).download_and_prepare(file_format="array_record")


def png(image):
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, format="png")
    return file.getvalue()


def shapes(count, height, width, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, channels))
    return pixels.astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_any_prepared_set_of_labelled_images_is_read(channels, tmp_path):
    import tensorflow_datasets as tfds

    images = shapes(23, 6, 9, channels)
    images[:, :, :5] = 7  # smooth, so that Pillow writes filtered lines
    features = {
        "picture": tfds.features.Image(shape=(6, 9, channels)),
        "kind": tfds.features.ClassLabel(num_classes=23),
        "note": tfds.features.Text(),
    }
    examples = [
        {"picture": png(image.squeeze(-1) if channels == 1 else image), "kind": n, "note": "a"}
        for n, image in enumerate(images)
    ]
    prepare(tmp_path, features, examples, supervised=("picture", "kind"))
    dataset = load_dataset("shapes", data_dir=str(tmp_path))
    assert dataset.info == dataset_info("shapes", data_dir=str(tmp_path))
    assert dataset.info == ((6, 9, channels), 23, 23, 23)
    assert sorted(dataset.train_labels.tolist()) == list(range(23))
    np.testing.assert_array_equal(dataset.train_images, images[dataset.train_labels])
    np.testing.assert_array_equal(dataset.test_images, images[dataset.test_labels])


def unsuitable(kind):
    import tensorflow_datasets as tfds

    image, label = tfds.features.Image(shape=(4, 4, 1)), tfds.features.ClassLabel(num_classes=2)
    example = {"image": png(np.zeros((4, 4), np.uint8)), "label": 1}
    due = {"features": {"image": image, "label": label}, "examples": [example]}
    match kind:
        case "no test split":
            return due | {"splits": ["train", "validation"]}
        case "no fixed shape":
            return due | {
                "features": {"image": tfds.features.Image(shape=(None, None, 1)), "label": label}
            }
        case "no class":
            return due | {"supervised": ("image", "image")}
        case "no supervision":
            return due | {"supervised": None}
        case "no array_record":
            return due
    raise ValueError(kind)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no test split", "has the splits train, validation, where train and test are due"),
        ("no fixed shape", r"uint8 images of shape \(None, None, 1\), where uint8 of one shape"),
        ("no class", r"is supervised by \('image', 'image'\), where an image and its class"),
        ("no supervision", r"is supervised by \(\), where an image and its class"),
        ("no array_record", "as tfrecord, where array_record is due, .* --config.data.dir=DIR"),
    ],
)
@pytest.mark.parametrize("function", [dataset_info, load_dataset])
def test_a_prepared_set_of_another_kind_is_refused(function, kind, message, tmp_path):
    prepare(tmp_path, **unsuitable(kind))
    if kind == "no array_record":
        metadata = tmp_path / "shapes/1.2.3/dataset_info.json"
        metadata.write_text(metadata.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=message) as error:
        function("shapes", data_dir=str(tmp_path))
    assert str(tmp_path) in one_sentence(error)


def damage(directory: pathlib.Path, kind: str) -> None:
    records = directory / "shapes-train.array_record-00000-of-00001"
    metadata = directory / "dataset_info.json"
    match kind:
        case "records missing":
            records.unlink()
        case "records cut short":
            records.write_bytes(records.read_bytes()[:70_000])
        case "records overwritten":
            content = bytearray(records.read_bytes())
            content[200:400] = bytes(200)
            records.write_bytes(content)
        case "metadata cut short":
            metadata.write_text(metadata.read_text()[:50])
        case "features cut short":
            (directory / "features.json").write_text("{")
        case "more promised than there are":
            content = json.loads(metadata.read_text())
            content["splits"][0]["shardLengths"] = ["50"]
            metadata.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "kind",
    [
        "records missing",
        "records cut short",
        "records overwritten",
        "metadata cut short",
        "features cut short",
        "more promised than there are",
    ],
)
def test_damaged_records_are_named(kind, tmp_path):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(num_classes=2),
    }
    examples = [{"image": png(i), "label": n % 2} for n, i in enumerate(shapes(40, 32, 32, 3))]
    prepare(tmp_path, features, examples)
    load_dataset("shapes", data_dir=str(tmp_path))
    damage(tmp_path / "shapes/1.2.3", kind)
    with pytest.raises(DataError, match=r"damaged .* delete that folder") as error:
        load_dataset("shapes", data_dir=str(tmp_path))
    assert str(tmp_path / "shapes") in one_sentence(error)


def test_damage_is_not_overlooked_wherever_it_is(tmp_path):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(8, 8, 1)),
        "label": tfds.features.ClassLabel(num_classes=2),
    }
    images = shapes(4, 8, 8, 1)
    prepare(tmp_path, features, [{"image": png(i[..., 0]), "label": 1} for i in images])
    whole = load_dataset("shapes", data_dir=str(tmp_path))
    (records,) = (tmp_path / "shapes/1.2.3").glob("*train.array_record*")
    content = records.read_bytes()
    (start,) = itertools.islice(
        (n for n in range(len(content)) if content[n:].startswith(b"IDAT")), 1
    )
    for position in range(start, start + 60, 7):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        records.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged"):
            load_dataset("shapes", data_dir=str(tmp_path))
    records.write_bytes(content)
    again = load_dataset("shapes", data_dir=str(tmp_path))
    np.testing.assert_array_equal(again.train_images, whole.train_images)
