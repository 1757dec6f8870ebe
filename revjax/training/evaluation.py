"""Evaluation: the whole of a split, a batch at a time.

A network in evaluation normalises by running averages of the batch statistics. At a high learning
rate the parameters run ahead of them, and the accuracy is that of neither. So the averages can be
replaced, for the evaluation alone, by the mean of the statistics of some training batches at the
parameters evaluated: "precise BN" (Wu & Johnson 2021, arXiv:2105.07576). As in the running
averages, the variance is the mean of the batches' variances.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from revjax.data import DataError, normalize
from revjax.training.compiler import compiler_options
from revjax.training.config import Config
from revjax.training.feed import Feed
from revjax.training.interrupt import StopSignals
from revjax.training.mesh import BATCH_AXES, on_each_device, platform_of, put, replicated
from revjax.training.state import Abstract, TrainState
from revjax.training.step import Split
from revjax.training.votes import Votes, cast, count


class Evaluator:
    """Computes the loss and accuracy of splits of the data for a state of a run.

    With `config.precise_bn_batches` above 0, the statistics are means over that many batches, the
    run's first, without augmentation; else they are the running averages.
    """

    def __init__(self, config: Config, model: Abstract, feed: Feed, mesh: Mesh):
        """Keep what every evaluation needs; nothing is compiled yet."""
        self.config, self.model, self.feed, self.mesh = config, model, feed, mesh
        options: Any = dict(
            out_shardings=replicated(mesh), compiler_options=compiler_options(platform_of(mesh))
        )
        self.add_statistics: Any = jax.jit(self._add_statistics, donate_argnums=0, **options)
        self.eval_batch: Any = jax.jit(self._eval_batch, **options)

    def compile(self, state: TrainState) -> None:
        """Compile for states like this one, so that the first evaluation does not have to."""
        params, variables = state.params, state.variables
        (batch, counted), votes = self.feed.example(), cast(self.mesh, False)
        if self.config.precise_bn_batches:
            total = self._no_statistics(state)
            lowered = self.add_statistics.lower(total, params, variables, batch, votes)
            self.add_statistics = lowered.compile()
        self.eval_batch = self.eval_batch.lower(params, variables, batch, counted, votes).compile()

    def __call__(
        self, state: TrainState, names: Sequence[str], stop: StopSignals
    ) -> Iterator[dict[str, Any]]:
        """Yield loss, accuracy and speed as a row of metrics, a split after another.

        Told to stop meanwhile, in any process, it yields no more rows.
        """
        variables = self._with_statistics(state, stop)
        if variables is None:
            return
        for name in names:
            row = self._evaluate(name, state.params, variables, stop)
            if row is None:
                return
            yield row

    def _evaluate(
        self, name: str, params: nnx.State, variables: nnx.State, stop: StopSignals
    ) -> dict[str, Any] | None:
        """The row of a split; None if told to stop meanwhile."""
        began = time.monotonic()
        total_loss, total_correct, num_examples = 0.0, 0, 0

        def parts() -> Generator[Any]:
            with closing(self.feed.evaluation(name)) as batches:
                for batch, counted in batches:
                    votes = cast(self.mesh, stop.requested is not None)
                    yield self.eval_batch(params, variables, batch, counted, votes)

        with closing(parts()) as results:
            for loss, correct, number, agreed in _one_behind(results):
                if agreed.stop:
                    return None
                total_loss, total_correct = total_loss + float(loss), total_correct + int(correct)
                num_examples += int(number)
        if not num_examples:
            raise DataError(f"no image of the split {name} can be decoded: is it the right data?")
        return {
            "split": name,
            "loss": total_loss / num_examples,
            "accuracy": total_correct / num_examples,
            "images_per_second": num_examples / (time.monotonic() - began),
        }

    def _no_statistics(self, state: TrainState) -> nnx.State:
        statistics = nnx.filter_state(state.variables, nnx.BatchStat)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), statistics)
        return put(zeros, replicated(self.mesh))

    def _with_statistics(self, state: TrainState, stop: StopSignals) -> nnx.State | None:
        """The state's variables, with the statistics to evaluate by; None if told to stop."""
        num_batches = self.config.precise_bn_batches
        if not num_batches:
            return state.variables
        total = self._no_statistics(state)

        def votes_of_batches() -> Generator[Votes]:
            nonlocal total
            with closing(self.feed.statistics(num_batches)) as batches:
                for batch in batches:
                    votes = cast(self.mesh, stop.requested is not None)
                    total, agreed = self.add_statistics(
                        total, state.params, state.variables, batch, votes
                    )
                    yield agreed

        with closing(votes_of_batches()) as results:
            if any(agreed.stop for agreed in _one_behind(results)):
                return None
        mean = jax.tree.map(lambda leaf: leaf / num_batches, total)
        return nnx.merge_state(state.variables, mean)

    def _add_statistics(
        self, total: nnx.State, params: nnx.State, variables: nnx.State, batch: Split, votes: Votes
    ) -> tuple[nnx.State, Votes]:
        """`total` plus the statistics of a batch of training images, in its `bn_scope`."""

        def statistics(params: nnx.State, variables: nnx.State, images: jax.Array) -> nnx.State:
            module = nnx.merge(self.model.statistics_graph, params, variables, copy=True)
            module(images)
            return nnx.state(module, nnx.BatchStat)

        def joined(*args: Any) -> nnx.State:
            return jax.lax.pmean(statistics(*args), BATCH_AXES)

        params = jax.lax.with_sharding_constraint(params, replicated(self.mesh))
        find = statistics
        if self.config.model.bn_scope == "device":
            find = on_each_device(self.mesh, joined, (False, False, True))
        new = find(params, variables, normalize(batch.images, batch.normalization))
        return jax.tree.map(jnp.add, total, new), count(votes)

    def _eval_batch(
        self,
        params: nnx.State,
        variables: nnx.State,
        batch: Split,
        counted: jax.Array,
        votes: Votes,
    ) -> tuple[jax.Array, jax.Array, jax.Array, Votes]:
        """Over a batch: the loss, float32; the correct answers and the examples, int32.

        Examples where `counted`, bool `[batch_size]`, is false are there to fill it up.
        """
        params = jax.lax.with_sharding_constraint(params, replicated(self.mesh))
        images = normalize(batch.images, batch.normalization)
        logits = nnx.merge(self.model.eval_graph, params, variables)(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        correct = (jnp.argmax(logits, axis=-1) == batch.labels) & counted
        loss = jnp.where(counted, losses, 0).sum()
        number = counted.sum(dtype=jnp.int32)
        return loss, correct.sum(dtype=jnp.int32), number, count(votes)


def _one_behind(results: Iterator[Any]) -> Iterator[Any]:
    """The same, each after the next has been asked for: the host reads one while the next runs.

    So the device does not wait for the host, and a signal for no more than two batches.
    """
    behind = next(results, None)
    for result in results:
        yield behind
        behind = result
    if behind is not None:
        yield behind
