"""Trees of images: what is listed, in what order, and what is refused."""

import os

import numpy as np
import pytest
from images import encode

from revjax.data import DataError, dataset_info
from revjax.data.image_folder import open_image_folder

FILES = {
    "train/b/2.JPEG": 1,
    "train/b/10.jpg": 1,
    "train/a/x.png": 0,
    "train/B/é.jpeg": None,
    "val/a/1.JPEG": 0,
    "val/b/1.JPEG": 1,
    "val/B/1.JPEG": None,
}


@pytest.fixture
def tree(tmp_path):
    for file in FILES:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.encode())
    for passed_over in ("train/README.txt", "train/a/.hidden.JPEG", "train/a/labels.csv"):
        (tmp_path / passed_over).write_bytes(b"")
    (tmp_path / "train/.cache").mkdir()
    return tmp_path


def refusal(tree):
    with pytest.raises(DataError) as raised:
        open_image_folder(str(tree))
    text = str(raised.value)
    assert "\n" not in text and text.endswith(".")
    return text


def test_classes_and_files_are_in_the_order_of_their_names(tree, monkeypatch):
    listing = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listing(path), reverse=True))
    train, test = open_image_folder(str(tree))
    assert train.classes == test.classes == ("B", "a", "b")  # by code points, as torchvision
    names = ["train/B/é.jpeg", "train/a/x.png", "train/b/10.jpg", "train/b/2.JPEG"]
    assert [train.name(index) for index in range(len(train))] == names
    assert train.labels.tolist() == [0, 1, 2, 2]
    assert train.labels.dtype == np.int32
    for index, name in enumerate(names):
        assert train.read(index) == (name.encode(), train.labels[index])
    assert dataset_info("x", source=str(tree), image_size=64) == ((64, 64, 3), 3, 4, 3)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_the_other_split_has_several_names(tree, name):
    (tree / "val").rename(tree / name)
    assert open_image_folder(str(tree))[1].name(0) == f"{name}/B/1.JPEG"


def test_a_class_without_images_is_refused(tree):
    (tree / "val/b/1.JPEG").unlink()
    assert f"{tree}/val/b has no images" in refusal(tree)


def test_splits_of_other_classes_are_refused(tree):
    (tree / "val/b").rename(tree / "val/c")
    text = refusal(tree)
    assert "2 classes that the other has not, such as b" in text


def test_other_trees_are_refused_by_what_is_due(tmp_path):
    due = "DIR/train/CLASS/*.JPEG"
    assert due in refusal(tmp_path / "nowhere")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.JPEG").write_bytes(encode(np.zeros((2, 2, 3), np.uint8)))
    assert "has no folder train" in refusal(tmp_path) and due in refusal(tmp_path)
    (tmp_path / "train").mkdir()
    assert "has no folder val" in refusal(tmp_path)
    (tmp_path / "val").mkdir()
    assert "train has no folder of a class" in refusal(tmp_path)
    (tmp_path / "train/1.JPEG").write_bytes(b"")  # as the official validation files lie
    assert "sort its images by class" in refusal(tmp_path)
