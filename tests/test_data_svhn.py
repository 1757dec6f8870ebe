"""SVHN without TensorFlow, against small .mat files in the official layout that the tests write."""

import email.message
import hashlib
import io
import pathlib
import sys
import tempfile
import types
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import PIL.Image
import pytest
import scipy.io
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle
from tensorflow_datasets.core.registered import skip_registration
from test_data_cifar import WAYS_FORWARD, asserts_equal, files_in, one_sentence

from revjax.data import DATASETS, DataError, dataset_info, load_dataset
from revjax.data import svhn as revjax_svhn
from revjax.data.official import OFFICIAL

COUNTS = {"train": 9, "test": 6, "extra": 13}
NAMES = ["svhn_cropped", "svhn_cropped+extra"]


class Files:
    """A small distribution in the official layout: its arrays, and the folder of its files."""

    def __init__(self, folder: pathlib.Path):
        generator = np.random.default_rng(0)
        self.folder = folder
        self.images, self.classes, self.contents = {}, {}, {}
        folder.mkdir()
        for split, count in COUNTS.items():
            images = generator.integers(0, 256, (count, 32, 32, 3), np.uint8)
            classes = generator.permutation(np.arange(count) % 10 + 1).astype(np.uint8)
            content = {"X": images.transpose(1, 2, 3, 0), "y": classes[:, None]}
            file = folder / f"{split}_32x32.mat"
            scipy.io.savemat(file, content, do_compression=True)  # as the official ones are
            self.images[split], self.classes[split] = images, classes
            self.contents[file.name] = file.read_bytes()


@pytest.fixture
def files(tmp_path, monkeypatch):
    files = Files(tmp_path / "official")
    splits = {
        split: {file: hashlib.md5(files.contents[file]).hexdigest() for file in of_split}
        for split, of_split in OFFICIAL["svhn_cropped"].splits.items()
    }
    official = OFFICIAL["svhn_cropped"]._replace(splits=splits)
    monkeypatch.setitem(OFFICIAL, "svhn_cropped", official)
    for name, train in zip(NAMES, (9, 9 + 13), strict=True):
        info = DATASETS[name]._replace(train_size=train, test_size=6)
        monkeypatch.setitem(DATASETS, name, info)
    return files


@pytest.fixture
def data_dir(tmp_path):
    return str(tmp_path / "prepared")


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def load(name, data_dir, source=None):
    return load_dataset(name, data_dir=data_dir, source=None if source is None else str(source))


def prepared(data_dir):
    return pathlib.Path(data_dir, "svhn_cropped", "3.1.0")


# -- What is read is what the files hold -----------------------------------------------------------


def test_examples_are_those_of_the_files(files, data_dir):
    plain, more = (load(name, data_dir, files.folder) for name in NAMES)
    assert (plain.info, more.info) == tuple(dataset_info(name) for name in NAMES)
    assert (plain.name, more.name) == tuple(NAMES)
    arrays = {
        "train": (plain.train_images, plain.train_labels),
        "test": (plain.test_images, plain.test_labels),
        "extra": (more.train_images[9:], more.train_labels[9:]),
    }
    builder: Any = tfds.builder_from_directory(prepared(data_dir))
    for split, (images, labels) in arrays.items():
        assert images.dtype == np.uint8
        assert labels.dtype == np.int32
        records = list(builder.as_data_source(split))
        numbers = [int(record["id"].decode().removeprefix(f"{split}_")) for record in records]
        assert sorted(numbers) == list(range(COUNTS[split]))
        assert all(len(record["id"]) == len(split) + 7 for record in records)
        digits = np.where(files.classes[split] == 10, 0, files.classes[split])
        np.testing.assert_array_equal(images, files.images[split][numbers])
        np.testing.assert_array_equal(labels, digits[numbers])
        assert [record["label"] for record in records] == labels.tolist()
    np.testing.assert_array_equal(more.train_images[:9], plain.train_images)
    np.testing.assert_array_equal(more.train_labels[:9], plain.train_labels)
    np.testing.assert_array_equal(more.test_images, plain.test_images)


def test_shards_join_to_the_same(files, data_dir, monkeypatch):
    expected = load("svhn_cropped+extra", data_dir, files.folder)
    for size in (4, 3):  # 3 divides the test split
        monkeypatch.setattr(revjax_svhn, "_EXAMPLES_A_SHARD", size)
        place = f"{data_dir}{size}"
        asserts_equal(load("svhn_cropped+extra", place, files.folder), expected)
        for split, count in COUNTS.items():
            assert len(list(prepared(place).glob(f"*-{split}.*"))) == -(-count // size)


@pytest.mark.parametrize("first", NAMES)
def test_a_prepared_set_needs_no_source_under_either_name(files, data_dir, offline, first):
    load(first, data_dir, files.folder)
    for name in NAMES:
        assert load(name, data_dir).info == DATASETS[name]


def test_extra_is_read_only_where_it_is_asked_for(files, data_dir):
    expected = load("svhn_cropped", data_dir, files.folder)
    for path in prepared(data_dir).glob("*extra.array_record*"):
        path.unlink()
    asserts_equal(load("svhn_cropped", data_dir), expected)
    with pytest.raises(DataError, match=r"damaged .* delete that folder") as error:
        load("svhn_cropped+extra", data_dir)
    one_sentence(error)


# -- The same as tensorflow-datasets' own builder --------------------------------------------------


def own_builder(files, data_dir, monkeypatch):
    """tensorflow-datasets' own builder, given what it otherwise asks TensorFlow for."""
    original: Any = tfds.builder_cls("svhn_cropped")
    gfile = types.SimpleNamespace(GFile=open)
    tensorflow = types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile))
    monkeypatch.setattr(sys.modules[original.__module__], "tf", tensorflow)
    with skip_registration():

        class Own(original):
            name = "svhn_cropped"

            def _split_generators(self, dl_manager):
                def download(urls):
                    assert set(urls.values()) == {
                        OFFICIAL["svhn_cropped"].url + file for file in files.contents
                    }
                    return {key: files.folder / url.split("/")[-1] for key, url in urls.items()}

                return super()._split_generators(types.SimpleNamespace(download=download))

            def _generate_examples(self, split_prefix, filepath):
                for key, example in super()._generate_examples(split_prefix, filepath):
                    image = PIL.Image.fromarray(example["image"])
                    yield key, {**example, "image": image, "label": int(example["label"])}

    return Own(data_dir=data_dir)


def test_the_builder_is_described_as_its_original(files, data_dir, monkeypatch):
    ours: Any = revjax_svhn.SvhnCropped(data_dir=data_dir)
    theirs = own_builder(files, data_dir, monkeypatch)
    assert (ours.name, ours.version) == (theirs.name, theirs.version)
    assert ours.data_dir == theirs.data_dir
    assert ours.info.features.to_json() == theirs.info.features.to_json()
    assert ours.info.supervised_keys == theirs.info.supervised_keys
    assert ours.info.homepage == theirs.info.homepage
    assert ours.info.disable_shuffling == theirs.info.disable_shuffling


def test_examples_come_in_the_order_of_the_original(files, data_dir, monkeypatch):
    monkeypatch.setattr(revjax_svhn, "_EXAMPLES_A_SHARD", 4)
    ours = load("svhn_cropped+extra", data_dir, files.folder)
    own = own_builder(files, f"{data_dir}_own", monkeypatch)
    own.download_and_prepare(file_format="array_record")
    asserts_equal(load("svhn_cropped+extra", f"{data_dir}_own"), ours)
    builder: Any = tfds.builder("svhn_cropped", data_dir=data_dir)  # reads what ours has prepared
    assert list(builder.info.splits) == list(own.info.splits)
    for split in COUNTS:
        for first, second in zip(
            builder.as_data_source(split), own.as_data_source(split), strict=True
        ):
            assert first.keys() == second.keys()
            for key in first:
                np.testing.assert_array_equal(first[key], second[key])


# -- Without TensorFlow, whatever the size ---------------------------------------------------------


def test_nothing_is_left_to_tensorflow_to_sort(files, data_dir, monkeypatch):
    # What tensorflow-datasets has to sort beyond this size, it sorts on disk, by TensorFlow.
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 0)
    load("svhn_cropped", data_dir, files.folder)
    assert "tensorflow" not in sys.modules


# -- Missing, damaged, out of reach ----------------------------------------------------------------


def refused(name, data_dir, source=None):
    """The sentence with which loading is refused; nothing may be left of the attempt."""
    with pytest.raises(DataError) as error:
        load(name, data_dir, source)
    assert files_in(data_dir) == []
    message = one_sentence(error)
    assert message.startswith("svhn_cropped was looked for in")
    assert all(way in message for way in WAYS_FORWARD)
    return message


@pytest.mark.parametrize("name", NAMES)
def test_offline(files, data_dir, offline, name):
    message = refused(name, data_dir)
    assert data_dir in message
    assert "http://ufldl.stanford.edu/housenumbers/train_32x32.mat" in message
    assert "Name or service not known" in message


def test_a_source_that_is_not_the_folder(files, data_dir, tmp_path):
    for source in ("/no/such/place", tmp_path, files.folder / "train_32x32.mat"):
        message = refused("svhn_cropped", data_dir, source)
        listed = "train_32x32.mat, test_32x32.mat, extra_32x32.mat"
        assert f"{source}, which is not a folder that holds {listed}:" in message


@pytest.mark.parametrize("split", COUNTS)
def test_a_source_that_lacks_a_file(files, data_dir, split):
    (files.folder / f"{split}_32x32.mat").unlink()
    message = refused("svhn_cropped", data_dir, files.folder)
    assert f"{files.folder}, which lacks {split}_32x32.mat:" in message


@pytest.mark.parametrize("split", COUNTS)
def test_one_byte_of_a_file_is_wrong(files, data_dir, split):
    path = files.folder / f"{split}_32x32.mat"
    content = bytearray(files.contents[path.name])
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    message = refused("svhn_cropped+extra", data_dir, files.folder)
    assert f"{files.folder}, and {path.name} there is damaged" in message


def test_a_source_of_another_set_is_refused(tmp_path):
    with pytest.raises(DataError, match=f"is for cifar10, cifar100, {NAMES[0]}, .* alone") as error:
        load("mnist", str(tmp_path), tmp_path)
    assert "svhn_cropped+extra" in one_sentence(error)


# -- Downloading -----------------------------------------------------------------------------------


@pytest.fixture
def served(files, monkeypatch):
    """The official files under their URLs; returns what is asked for."""
    asked = []

    class Response(io.BytesIO):
        headers = email.message.Message()

    def open_url(url, timeout):
        assert timeout > 0
        asked.append(url)
        return Response(files.contents[url.removeprefix(OFFICIAL["svhn_cropped"].url)])

    monkeypatch.setattr(urllib.request, "urlopen", open_url)
    return asked


def test_downloaded_files_are_as_good_as_others(files, data_dir, served):
    expected = load("svhn_cropped", f"{data_dir}_other", files.folder)
    assert served == []
    for _ in range(2):
        asserts_equal(load("svhn_cropped", data_dir), expected)
    assert [url.rpartition("/")[2] for url in served] == list(files.contents)
    assert [path for path in files_in(data_dir) if "3.1.0" not in path.parts] == []


def test_a_download_that_is_damaged(files, data_dir, served):
    files.contents["extra_32x32.mat"] = b"<html>a hotel's login page</html>"
    message = refused("svhn_cropped", data_dir)
    assert f"{OFFICIAL['svhn_cropped'].url}, and extra_32x32.mat there is damaged" in message


def test_a_disk_that_is_full_before_a_download_is_whole(files, data_dir, served, monkeypatch):
    class Full(io.BytesIO):
        def write(self, block):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
    with pytest.raises(DataError, match=r"could not be prepared in .*: free some space"):
        load("svhn_cropped", data_dir)


# -- Interrupted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 5, 20])
def test_ctrl_c_leaves_nothing(files, data_dir, monkeypatch, after):
    encode, count = revjax_svhn.encode_png, iter(range(1_000_000))

    def interrupted(image):
        if next(count) == after:
            raise KeyboardInterrupt
        return encode(image)

    with monkeypatch.context() as patch:
        patch.setattr(revjax_svhn, "encode_png", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load("svhn_cropped", data_dir, files.folder)
    assert files_in(data_dir) == []
    load("svhn_cropped", data_dir, files.folder)
