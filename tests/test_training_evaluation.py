"""Evaluations that are told to stop: no row, nothing left open, at most one more program."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from revjax.training import evaluation
from revjax.training.evaluation import Evaluator
from revjax.training.votes import Votes

BATCHES = 6


class Feed:
    """Batches that are numbers, and whether it has been closed."""

    closed = False

    def evaluation(self, name):
        yield from self.statistics(BATCHES)

    def statistics(self, number):
        try:
            for batch in range(number):
                yield (batch, None)
        finally:
            self.closed = True


@pytest.fixture
def evaluator(monkeypatch):
    """One whose programs note that they ran, and say that a signal came amid batch `stop_at`."""
    monkeypatch.setattr(evaluation, "cast", lambda *_: None)
    made: Any = object.__new__(Evaluator)
    made.feed, made.mesh, made.ran = Feed(), None, []
    made.config = SimpleNamespace(precise_bn_batches=BATCHES)
    made._no_statistics = lambda state: 0
    made.stop_at = BATCHES

    def agreed(batch):
        made.ran.append(batch)
        return Votes(stop=int(batch >= made.stop_at), pace=1)

    made.eval_batch = lambda params, variables, batch, *_: (1.0, 2, 4, agreed(batch))
    made.add_statistics = lambda total, params, variables, batch, _: (total, agreed(batch[0]))
    return made


STATE: Any = SimpleNamespace(params=None, variables={})
SILENT: Any = SimpleNamespace(requested=None)


def test_a_whole_evaluation_counts_every_batch(evaluator):
    row = evaluator._evaluate("test", None, None, SILENT)
    assert evaluator.ran == list(range(BATCHES))
    np.testing.assert_allclose((row["loss"], row["accuracy"]), (0.25, 0.5))


@pytest.mark.parametrize("stop_at", [0, 2, BATCHES - 1])
def test_an_evaluation_that_is_told_to_stop(evaluator, stop_at):
    evaluator.stop_at = stop_at
    assert evaluator._evaluate("test", None, None, SILENT) is None
    assert len(evaluator.ran) <= stop_at + 2
    assert evaluator.feed.closed


@pytest.mark.parametrize("stop_at", [0, 2, BATCHES - 1])
def test_statistics_that_are_told_to_stop(evaluator, stop_at):
    evaluator.stop_at = stop_at
    assert evaluator._with_statistics(STATE, SILENT) is None
    assert len(evaluator.ran) <= stop_at + 2
    assert evaluator.feed.closed


def test_a_result_is_read_once_the_next_has_been_asked_for():
    asked = []

    def results():
        for number in range(3):
            asked.append(number)
            yield number

    for number in evaluation._one_behind(results()):
        assert asked[-1] == min(number + 1, 2)
    assert list(evaluation._one_behind(iter(()))) == []
