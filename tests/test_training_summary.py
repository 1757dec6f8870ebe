"""What a run amounts to where examples are held out for validation, and where none are."""

import pytest

from revjax.training.curves import draw_curves
from revjax.training.summary import best_validation, summary_table

SUMMARY = {
    "model": "revnet38",
    "data": "cifar10",
    "parameters": 464_890,
    "steps": 3000,
    "precise_bn_batches": 0,
    "test_accuracy": 0.75,
    "test_error": 0.25,
    "wall_seconds": 1.0,
    "device": "cpu",
    "stream_peak": None,
}


def rows_of(*accuracies):
    """An evaluation every 1,000 steps, of which `accuracies` has validation's and test's."""
    return [
        {"step": step, "split": split, "loss": 0.5, "accuracy": accuracy}
        for step, pair in zip(range(1000, 9000, 1000), accuracies, strict=False)
        for split, accuracy in zip(("validation", "test"), pair, strict=True)
    ]


@pytest.mark.parametrize(
    ("accuracies", "step", "test_accuracy"),
    [
        ([(0.5, 0.25), (0.75, 0.125), (0.625, 0.875)], 2000, 0.125),
        ([(0.5, 0.25), (0.75, 0.5), (0.75, 0.875)], 2000, 0.5),  # the earliest among equals
        ([(0.5, 0.25), (0.25, 0.875)], 1000, 0.25),
    ],
)
def test_the_best_is_by_validation_alone(accuracies, step, test_accuracy):
    train = {"step": step, "split": "train", "loss": 0.5, "accuracy": 1.0}
    best = best_validation([train, *rows_of(*accuracies)])
    assert best == {
        "step": step,
        "validation_accuracy": max(validation for validation, _ in accuracies),
        "validation_error": 1 - max(validation for validation, _ in accuracies),
        "test_accuracy": test_accuracy,
        "test_error": 1 - test_accuracy,
    }


def test_a_step_without_a_test_row_is_not_the_best():
    """As where a run ended at a step of its own, stopped between the two, and then went on."""
    rows = rows_of((0.5, 0.25), (1.0, 0.75), (0.625, 0.5))
    del rows[3]
    assert best_validation(rows)["step"] == 3000


def test_the_table_has_the_best_where_there_is_one():
    best = best_validation(rows_of((0.5, 0.25), (0.75, 0.5)))
    lines = [" ".join(line.split()) for line in summary_table(SUMMARY).splitlines()]
    with_best = summary_table(SUMMARY | {"best_validation": best}).splitlines()
    added = [line for line in with_best if " ".join(line.split()) not in lines]
    due = "  best validation  error 25.00% at step 2,000, where the test error is 50.00%"
    assert added == [due]
    assert len(with_best) == len(lines) + 1


@pytest.mark.parametrize(
    ("batches", "due"),
    [
        (0, "75.00% (by running averages)"),
        (50, "75.00% (by precise BN, 50 batches)"),
        (None, "75.00%"),
    ],
)
def test_the_table_has_the_statistics_where_there_are_any(batches, due):
    lines = summary_table(SUMMARY | {"precise_bn_batches": batches}).splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines if "test accuracy" in line] == [due]


def test_curves_are_of_the_splits_that_there_are(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda *_, label, **__: drawn.append(label))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda _: None)
    rows = rows_of((0.5, 0.25))
    draw_curves(rows, "title", tmp_path / "curves.png")
    assert drawn == ["validation", "validation", "test", "test"]  # loss and accuracy of each
    drawn.clear()
    draw_curves(rows[1:], "title", tmp_path / "curves.png")
    assert drawn == ["test", "test"]
