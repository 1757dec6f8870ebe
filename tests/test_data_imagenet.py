"""ImageNet as tensorflow-datasets prepares it, by a small set of its name and features."""

import pickle
import shutil
from typing import Any

import pytest
import tensorflow_datasets as tfds
from images import encode, ramp
from test_data_stream import SIZE, all_of, shade_of, shades

from revjax.data import DataError, dataset_info, is_streamed, open_stream

TRAIN, TEST = 13, 5
BLOBS = {"train": shades(TRAIN), "validation": [*shades(TEST - 1), encode(ramp(50, 40))[:300]]}


class Imagenet2012(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The names, splits and features of the one that ships with tensorflow-datasets."""

    VERSION = tfds.core.Version("5.1.0")
    SPLITS = ("train", "validation")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=4),
            "file_name": tfds.features.Text(),
        }
        keys = ("image", "label")
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=keys
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.SPLITS}

    def _generate_examples(self, split) -> Any:
        for index, blob in enumerate(BLOBS[split]):
            file = f"n0_{index}.JPEG"
            yield file, {"image": blob, "label": index % 4, "file_name": file}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("prepared"))
    Imagenet2012(data_dir=directory).download_and_prepare(file_format="array_record")
    return directory


def opened(data_dir, **options):
    return open_stream("imagenet2012", data_dir=data_dir, image_size=SIZE, **options)


def test_its_sizes_are_known_before_it_is_there():
    assert is_streamed("imagenet2012", None)
    assert dataset_info("imagenet2012", image_size=160) == ((160, 160, 3), 1000, 1_281_167, 50_000)


def test_every_example_comes_with_its_label(data_dir):
    stream = opened(data_dir)
    assert stream.info == ((SIZE, SIZE, 3), 4, TRAIN, TEST)
    (epoch,) = all_of(stream.train(0, 1, TRAIN, seed=0))
    numbers = [shade_of(image) for image in epoch.images()]
    assert sorted(numbers) == list(range(TRAIN))
    assert epoch.labels.tolist() == [number % 4 for number in numbers]


def test_it_reaches_a_worker(data_dir):
    examples = opened(data_dir).splits["train"]
    there = pickle.loads(pickle.dumps(examples))
    assert [there.read(index) for index in range(TRAIN)] == list(map(examples.read, range(TRAIN)))


def test_a_broken_image_is_named_by_its_file(data_dir):
    batches = all_of(opened(data_dir).evaluate("test", 2))
    ((name, reason),) = [item for batch in batches for item in batch.broken]
    assert name.startswith("validation[") and name.endswith("] n0_4.JPEG")
    assert "truncated" in reason.lower()
    assert sum(batch.counted.sum() for batch in batches) == TEST - 1


def test_damaged_and_missing_sets_are_sentences(data_dir, tmp_path):
    with pytest.raises(DataError, match="was never prepared there"):
        opened(str(tmp_path))
    copy = tmp_path / "copy"
    shutil.copytree(data_dir, copy)
    (records,) = copy.glob("**/*train.array_record*")
    records.write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match="is damaged"):
        all_of(opened(str(copy)).train(0, 1, 2, seed=0))


def test_other_splits_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Imagenet2012, "SPLITS", ("train",))
    Imagenet2012(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    with pytest.raises(DataError, match=r"the splits train, where .* validation are due"):
        opened(str(tmp_path))
