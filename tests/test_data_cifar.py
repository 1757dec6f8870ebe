"""CIFAR without TensorFlow, against small archives in the official layout that the tests write."""

import contextlib
import email.message
import hashlib
import http.server
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import types
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.registered import skip_registration

from revjax.data import DATASETS, DataError, DatasetInfo, dataset_info, load_dataset
from revjax.data import cifar as revjax_cifar
from revjax.data.fetch import official_files
from revjax.data.official import OFFICIAL

NAMES = ["cifar10", "cifar100"]
BUILDERS = {"cifar10": revjax_cifar.Cifar10, "cifar100": revjax_cifar.Cifar100}
REAL_OFFICIAL = dict(OFFICIAL)
WAYS_FORWARD = ["get online", "--config.data.source=DIR", "--config configs/digits_revnet.py"]


class Archive:
    """A small distribution in the official layout: its arrays, its files, and where they lie."""

    def __init__(self, name: str, folder: pathlib.Path):
        generator = np.random.default_rng(len(name))
        official = REAL_OFFICIAL[name]
        self.name, self.folder, self.official = name, folder / official.folder, official
        self.classes = {"label": 10} if name == "cifar10" else {"coarse_label": 20, "label": 100}
        self.files: dict[str, bytes] = {}
        self.images, self.labels = {}, {}
        for split, files in official.splits.items():
            count = {"train": 6, "test": 5}[split]
            pixels, labels = [], []
            for file in files:
                planes = generator.integers(0, 256, (count, 3, 32, 32), np.uint8)
                bounds = list(self.classes.values())
                kinds = generator.integers(0, bounds, (count, len(bounds))).astype(np.uint8)
                records = np.concatenate([kinds, planes.reshape(count, 3072)], axis=1)
                self.files[file] = records.tobytes()
                pixels.append(planes.transpose(0, 2, 3, 1))
                labels.append(kinds)
            self.images[split] = np.concatenate(pixels)
            self.labels[split] = dict(zip(self.classes, np.concatenate(labels).T, strict=True))
        for label, file in official.names.items():
            lines = [f"{label}_{n:03d}\n" for n in range(self.classes[label])]
            self.files[file] = ("".join(lines) + "\n").encode()
        self.folder.mkdir()
        for file, content in self.files.items():
            (self.folder / file).write_bytes(content)
        self.tar = self.pack(folder / "elsewhere" / official.archive)

    def pack(self, path: pathlib.Path) -> pathlib.Path:
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w:gz") as tar:
            tar.add(self.folder, arcname=self.official.folder)
        return path

    def patched(self) -> dict:
        """What to put in the place of the real distribution's checksums and sizes."""
        md5 = {file: hashlib.md5(content).hexdigest() for file, content in self.files.items()}
        splits = {
            split: {file: md5[file] for file in files}
            for split, files in self.official.splits.items()
        }
        names_md5 = {file: md5[file] for file in self.official.names_md5}
        sizes = len(self.images["train"]), len(self.images["test"])
        info = ((32, 32, 3), self.classes["label"], *sizes)
        return {"name": self.name, "md5": {"splits": splits, "names_md5": names_md5}, "info": info}


@pytest.fixture(params=NAMES)
def archive(request, tmp_path, monkeypatch):
    archive = Archive(request.param, tmp_path)
    patched = archive.patched()
    official = OFFICIAL[archive.name]._replace(**patched["md5"])
    monkeypatch.setitem(OFFICIAL, archive.name, official)
    monkeypatch.setitem(DATASETS, archive.name, DatasetInfo(*patched["info"]))
    return archive


@pytest.fixture
def data_dir(tmp_path):
    return str(tmp_path / "prepared")


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def load(archive, data_dir, source=None):
    source = None if source is None else str(source)
    return load_dataset(archive.name, data_dir=data_dir, source=source)


def files_in(folder):
    return [path for path in pathlib.Path(folder).rglob("*") if not path.is_dir()]


def one_sentence(error):
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def asserts_equal(first, second):
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(first, field), getattr(second, field))


# -- What is read is what the files hold -----------------------------------------------------------


def test_examples_are_those_of_the_files(archive, data_dir):
    dataset = load(archive, data_dir, archive.folder)
    assert dataset.info == dataset_info(archive.name) == DATASETS[archive.name]
    builder: Any = tfds.builder_from_directory(f"{data_dir}/{archive.name}/3.0.2")
    arrays = {
        "train": (dataset.train_images, dataset.train_labels),
        "test": (dataset.test_images, dataset.test_labels),
    }
    for split, (images, labels) in arrays.items():
        assert images.dtype == np.uint8
        assert labels.dtype == np.int32
        records = list(builder.as_data_source(split))
        numbers = [int(record["id"].decode().removeprefix(f"{split}_")) for record in records]
        assert sorted(numbers) == list(range(len(archive.images[split])))
        assert all(len(record["id"]) == len(split) + 6 for record in records)
        np.testing.assert_array_equal(images, archive.images[split][numbers])
        np.testing.assert_array_equal(labels, archive.labels[split]["label"][numbers])
        for record, image in zip(records, images, strict=True):
            np.testing.assert_array_equal(record["image"], image)
        for label, values in archive.labels[split].items():
            assert [record[label] for record in records] == values[numbers].tolist()
    for label, count in archive.classes.items():
        names = [f"{label}_{n:03d}" for n in range(count)]
        assert builder.info.features[label].names == names


def test_every_form_of_source_gives_the_same(archive, data_dir, monkeypatch):
    expected = load(archive, data_dir, archive.folder)
    monkeypatch.setenv("HOME", str(archive.folder.parent))
    sources = [archive.folder.parent, archive.tar, archive.tar.parent, f"~/{archive.folder.name}"]
    for number, source in enumerate(sources):
        asserts_equal(load(archive, f"{data_dir}{number}", source), expected)


def test_a_prepared_set_needs_no_source(archive, data_dir, offline):
    expected = load(archive, data_dir, archive.folder)
    asserts_equal(load(archive, data_dir), expected)
    asserts_equal(load(archive, data_dir, "/nowhere"), expected)


def test_without_data_dir_it_is_that_of_tensorflow_datasets(archive, tmp_path, monkeypatch):
    from tensorflow_datasets.core import constants

    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "default"))
    load(archive, None, archive.folder)
    assert (tmp_path / "default" / archive.name / "3.0.2" / "dataset_info.json").exists()


# -- The same as tensorflow-datasets' own builders -------------------------------------------------


def own_builder(archive, data_dir):
    """tensorflow-datasets' own builder of a set, given what it otherwise asks TensorFlow for."""
    original: Any = tfds.builder_cls(archive.name)
    with skip_registration():

        class Own(original):
            name = archive.name

            def _split_generators(self, dl_manager):
                parent = str(archive.folder.parent)
                dl_manager = types.SimpleNamespace(download_and_extract=lambda url: parent)
                return super()._split_generators(dl_manager)

            def _generate_examples(self, split_prefix, filepaths):
                for key, example in super()._generate_examples(split_prefix, filepaths):
                    image = PIL.Image.fromarray(example["image"])
                    labels = {label: int(example[label]) for label in archive.classes}
                    yield key, {"id": example["id"], "image": image, **labels}

    return Own(data_dir=data_dir)


@pytest.fixture
def files_for_tfds(monkeypatch):
    module = sys.modules[tfds.builder_cls("cifar10").__module__]
    gfile = types.SimpleNamespace(GFile=open)
    tensorflow = types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile))
    monkeypatch.setattr(module, "tf", tensorflow)


def test_the_builder_is_described_as_its_original(archive, data_dir):
    ours: Any = BUILDERS[archive.name](data_dir=data_dir)
    theirs = own_builder(archive, data_dir)
    assert (ours.name, ours.version) == (theirs.name, theirs.version)
    assert ours.data_dir == theirs.data_dir
    assert ours.info.features.to_json() == theirs.info.features.to_json()
    assert ours.info.supervised_keys == theirs.info.supervised_keys
    assert ours.info.homepage == theirs.info.homepage
    assert OFFICIAL[archive.name].url == theirs._cifar_info.url


def test_examples_come_in_the_order_of_the_original(archive, data_dir, files_for_tfds):
    ours = load(archive, data_dir, archive.folder)
    own_builder(archive, f"{data_dir}_own").download_and_prepare(file_format="array_record")
    theirs = load(archive, f"{data_dir}_own")  # which the original has prepared
    asserts_equal(theirs, ours)
    places = data_dir, f"{data_dir}_own"
    builders: list[Any] = [tfds.builder(archive.name, data_dir=place) for place in places]
    for split in ("train", "test"):
        for first, second in zip(*(b.as_data_source(split) for b in builders), strict=True):
            assert first.keys() == second.keys()
            for key in first:
                np.testing.assert_array_equal(first[key], second[key])
    for label in archive.classes:
        assert builders[0].info.features[label].names == builders[1].info.features[label].names


# -- TensorFlow is never imported, installed or not ------------------------------------------------

PATCH = """
import hashlib, json, sys
from revjax.data import DATASETS, DatasetInfo, load_dataset
from revjax.data import cifar
from revjax.data.official import OFFICIAL

patched = json.loads(sys.argv[1])
name = patched["name"]
OFFICIAL[name] = OFFICIAL[name]._replace(**patched["md5"])
shape, *sizes = patched["info"]
DATASETS[name] = DatasetInfo(tuple(shape), *sizes)
"""


def script(code, archive, data_dir, *more):
    arguments = [json.dumps(archive.patched()), data_dir, str(archive.folder), *more]
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("archive", ["cifar100"], indirect=True)
@pytest.mark.parametrize("installed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tensorflow_is_never_imported(archive, data_dir, installed, tmp_path):
    package = tmp_path / "site" / ("tensorflow" if installed else "nothing")
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import sys; print('imported', file=sys.stderr)")
    code = f"""{PATCH}
sys.path.append(sys.argv[4])
for _ in range(2):
    load_dataset(name, data_dir=sys.argv[2], source=sys.argv[3])
print("tensorflow" in sys.modules)
"""
    process = script(code, archive, data_dir, str(package.parent))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out == "False\n"  # and nothing of tensorflow-datasets' own
    assert "imported" not in err.splitlines()


# -- Missing, damaged, out of reach ----------------------------------------------------------------


def refused(archive, data_dir, source=None):
    """The sentence with which loading is refused; nothing may be left of the attempt."""
    with pytest.raises(DataError) as error:
        load(archive, data_dir, source)
    assert files_in(data_dir) == []
    message = one_sentence(error)
    assert archive.name in message
    assert all(way in message for way in WAYS_FORWARD)
    return message


def test_offline(archive, data_dir, offline):
    message = refused(archive, data_dir)
    assert data_dir in message
    assert OFFICIAL[archive.name].url in message
    assert "Name or service not known" in message


def test_a_source_that_is_not_there(archive, data_dir, offline):
    assert "/no/such/place" in refused(archive, data_dir, "/no/such/place")


def test_a_source_without_the_files(archive, data_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refused(archive, data_dir, tmp_path / "empty")
    assert str(tmp_path / "empty") in message
    assert OFFICIAL[archive.name].folder in message
    assert OFFICIAL[archive.name].archive in message


def test_a_source_that_lacks_a_file(archive, data_dir):
    for file in archive.files:
        (archive.folder / file).rename(archive.folder.parent / file)
        message = refused(archive, data_dir, archive.folder)
        assert f"{archive.folder}, which lacks {file}:" in message
        (archive.folder.parent / file).rename(archive.folder / file)


@pytest.mark.parametrize("packed", [False, True])
def test_one_byte_of_a_file_is_wrong(archive, data_dir, packed):
    for file in archive.official.files:
        content = bytearray(archive.files[file])
        content[len(content) // 2] ^= 1
        (archive.folder / file).write_bytes(content)
        place = archive.pack(archive.tar) if packed else archive.folder
        message = refused(archive, data_dir, place)
        assert f"{place}, and {file} there is damaged" in message
        (archive.folder / file).write_bytes(archive.files[file])


def test_a_source_that_cannot_be_read(archive, data_dir, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    message = refused(archive, data_dir, archive.folder)
    assert f"{archive.folder}, which cannot be read ([Errno 13] Permission denied" in message


@pytest.mark.parametrize("kept", [0, 10, 1000, -3000])
def test_an_archive_cut_short(archive, data_dir, kept):
    archive.tar.write_bytes(archive.tar.read_bytes()[:kept])
    assert str(archive.tar) in refused(archive, data_dir, archive.tar)


def test_an_archive_overwritten(archive, data_dir):
    content = bytearray(archive.tar.read_bytes())
    content[5000:6000] = bytes(1000)
    archive.tar.write_bytes(content)
    assert str(archive.tar) in refused(archive, data_dir, archive.tar)


def test_an_archive_of_something_else(archive, data_dir):
    archive.tar.write_text("not an archive")
    assert "not a .tar.gz" in refused(archive, data_dir, archive.tar)
    with tarfile.open(archive.tar, "w:gz"):
        pass
    assert "which lacks" in refused(archive, data_dir, archive.tar)


def test_nothing_of_an_archive_is_written_to_disk(archive, data_dir, tmp_path):
    with tarfile.open(archive.tar, "w:gz") as tar:
        for place in ("../../escaped", f"{tmp_path}/escaped", f"{archive.official.folder}/new"):
            member = tarfile.TarInfo(place)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"bad"))
        link = tarfile.TarInfo(f"{archive.official.folder}/{next(iter(archive.files))}")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        tar.add(archive.folder, arcname=archive.official.folder)
    before = set(files_in(tmp_path))
    load(archive, data_dir, archive.tar)
    written = {path.name for path in set(files_in(tmp_path)) - before}
    assert all(name.endswith((".json", "labels.txt", "-of-00001")) for name in written)


def test_a_data_dir_that_cannot_be_written(archive, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"--config\.data\.dir=DIR") as error:
        load(archive, str(tmp_path / "file"), archive.folder)
    assert str(tmp_path / "file") in one_sentence(error)


def test_a_prepared_set_of_other_sizes(archive, data_dir, monkeypatch):
    load(archive, data_dir, archive.folder)
    monkeypatch.setitem(DATASETS, archive.name, DATASETS[archive.name]._replace(train_size=99))
    with pytest.raises(DataError, match=r"train_size=99.* delete it"):
        load(archive, data_dir)


@pytest.mark.parametrize("left", ["nothing", "records", "a file"])
def test_a_prepared_set_that_is_not_whole(archive, data_dir, left):
    directory = pathlib.Path(data_dir, archive.name, "3.0.2")
    load(archive, data_dir, archive.folder)
    for path in files_in(directory):
        if left != "records" or path.suffix == ".json":
            path.unlink()
    if left == "a file":
        directory.rmdir()
        directory.write_text("in the way")
    with pytest.raises(DataError, match=r"damaged .* delete that folder") as error:
        load(archive, data_dir, archive.folder)
    assert str(directory) in one_sentence(error)


# -- Downloading -----------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(content, *, sent=None, status=200):
    """A server on this machine that promises `content` and sends the first `sent` bytes of it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:sent])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/{'archive.tar.gz'}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def from_url(archive, monkeypatch, url):
    monkeypatch.setitem(OFFICIAL, archive.name, OFFICIAL[archive.name]._replace(url=url))


def test_downloaded_files_are_as_good_as_others(archive, data_dir, monkeypatch, no_proxy):
    expected = load(archive, f"{data_dir}_other", archive.folder)
    with serving(archive.tar.read_bytes()) as url:
        from_url(archive, monkeypatch, url)
        asserts_equal(load(archive, data_dir), expected)
    assert [path for path in files_in(data_dir) if "3.0.2" not in path.parts] == []


def test_a_download_cut_short(archive, data_dir, monkeypatch, no_proxy):
    content = archive.tar.read_bytes()
    with serving(content, sent=10_000) as url:
        from_url(archive, monkeypatch, url)
        message = refused(archive, data_dir)
        assert url in message
        assert f"10000 of {len(content)} bytes" in message
    with serving(content) as url:  # what came first is not in the way
        from_url(archive, monkeypatch, url)
        load(archive, data_dir)


def test_a_download_that_is_damaged(archive, data_dir, monkeypatch, no_proxy):
    with serving(b"<html>a hotel's login page</html>") as url:
        from_url(archive, monkeypatch, url)
        assert f"{url}, which is damaged" in refused(archive, data_dir)


def test_a_download_that_is_refused(archive, data_dir, monkeypatch, no_proxy):
    with serving(b"", status=404) as url:
        from_url(archive, monkeypatch, url)
        assert "HTTP Error 404" in refused(archive, data_dir)


def test_a_disk_that_is_full_before_the_download_is_whole(archive, data_dir, monkeypatch, no_proxy):
    class Full(io.BytesIO):
        def write(self, block):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
    with serving(archive.tar.read_bytes()) as url:
        from_url(archive, monkeypatch, url)
        with pytest.raises(DataError, match=r"could not be prepared in .*: free some space"):
            load(archive, data_dir)


def test_a_disk_that_is_full_amid_the_records(archive, data_dir, monkeypatch):
    """As array_record's writer says it, which is in C++."""

    def fail(*_, **__):
        raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(revjax_cifar.Cifar10, "download_and_prepare", fail)
    with pytest.raises(DataError, match=r"could not be prepared in .*No space left.*: free some"):
        load(archive, data_dir, archive.tar)


def test_a_download_without_a_length_is_read_to_its_end(archive, data_dir, monkeypatch):
    class Response(io.BytesIO):
        headers = email.message.Message()

    content = archive.tar.read_bytes()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Response(content))
    load(archive, data_dir)


# -- Interrupted, and two at once ------------------------------------------------------------------


def interrupting(monkeypatch, after, act):
    """Has `act` called at the `after`-th image that is prepared."""
    encode, count = revjax_cifar.encode_png, iter(range(1_000_000))

    def interrupted(image):
        if next(count) == after:
            act()
        return encode(image)

    monkeypatch.setattr(revjax_cifar, "encode_png", interrupted)


@pytest.mark.parametrize("after", [0, 3, 8])
def test_ctrl_c_leaves_nothing(archive, data_dir, monkeypatch, after):
    with monkeypatch.context() as patch:

        def press():
            raise KeyboardInterrupt

        interrupting(patch, after, press)
        with pytest.raises(KeyboardInterrupt):
            load(archive, data_dir, archive.folder)
    assert files_in(data_dir) == []
    load(archive, data_dir, archive.folder)


@pytest.mark.parametrize("archive", ["cifar10"], indirect=True)
def test_a_kill_leaves_nothing_that_is_taken_for_whole(archive, data_dir):
    code = f"""{PATCH}
import os, signal
import tensorflow_datasets as tfds
write, count = tfds.core.DatasetInfo.write_to_directory, 0

def killed(self, directory, **options):  # the last that is written
    assert any("train.array_record" in file for file in os.listdir(directory))
    os.kill(os.getpid(), signal.SIGKILL)

tfds.core.DatasetInfo.write_to_directory = killed
load_dataset(name, data_dir=sys.argv[2], source=sys.argv[3])
"""
    process = script(code, archive, data_dir)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    assert files_in(data_dir)
    assert not os.path.lexists(f"{data_dir}/{archive.name}/3.0.2")
    dataset = load(archive, data_dir, archive.folder)
    assert sorted(map(bytes, dataset.train_images)) == sorted(map(bytes, archive.images["train"]))


def test_another_process_is_first(archive, data_dir, monkeypatch):
    seen = []
    interrupting(monkeypatch, 2, lambda: seen.append(load(archive, data_dir, archive.folder)))
    asserts_equal(load(archive, data_dir, archive.folder), seen[0])
    left = {path.name for path in pathlib.Path(data_dir, archive.name).iterdir()}
    assert left == {"3.0.2"}


@pytest.mark.slow
@pytest.mark.parametrize("archive", ["cifar10"], indirect=True)
def test_processes_at_once(archive, data_dir):
    code = f"""{PATCH}
dataset = load_dataset(name, data_dir=sys.argv[2], source=sys.argv[3])
print(hashlib.md5(dataset.train_images.tobytes() + dataset.test_labels.tobytes()).hexdigest())
"""
    processes = [script(code, archive, data_dir) for _ in range(2)]
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert len({out.splitlines()[-1] for out, _ in results}) == 1


# -- The real thing --------------------------------------------------------------------------------

PACKED = pathlib.Path(__file__).parents[2] / "shared/data"


@pytest.mark.slow
@pytest.mark.skipif(not (PACKED / "unpack.py").exists(), reason="the packed CIFAR is not there")
@pytest.mark.parametrize("name", NAMES)
def test_the_real_cifar(name, tmp_path):
    command = [sys.executable, PACKED / "unpack.py", name, tmp_path, "--tar"]
    subprocess.run(command, check=True, capture_output=True)
    official = OFFICIAL[name]
    dataset = load_dataset(name, data_dir=str(tmp_path / "data"), source=str(tmp_path))
    with official_files(name, str(tmp_path / official.archive), scratch=str(tmp_path)) as files:
        packed = {file: content.read() for file, content in files.items()}
    assert dataset.info == DATASETS[name]
    for images, labels, files in (
        (dataset.train_images, dataset.train_labels, official.splits["train"]),
        (dataset.test_images, dataset.test_labels, official.splits["test"]),
    ):
        width = len(official.names) + 3072
        records = np.concatenate([np.frombuffer(packed[file], np.uint8) for file in files])
        records = records.reshape(-1, width)
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
        read = np.concatenate([labels[:, None].astype(np.uint8), planes], axis=1)
        expected = records[:, len(official.names) - 1 :]
        assert sorted(map(bytes, read)) == sorted(map(bytes, expected))
        assert (np.bincount(labels) == len(images) // dataset.num_classes).all()
