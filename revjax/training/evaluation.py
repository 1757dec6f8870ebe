"""Evaluation: the whole of a split, a batch at a time.

A network in evaluation normalises by running averages of the batch statistics. At a high learning
rate the parameters run ahead of them, and the accuracy is that of neither. So the averages can be
replaced, for the evaluation alone, by the mean of the statistics of some training batches at the
parameters evaluated: "precise BN" (Wu & Johnson 2021, arXiv:2105.07576). As in the running
averages, the variance is the mean of the batches' variances.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from revjax.data import batch_indices, normalize
from revjax.training.config import Config
from revjax.training.interrupt import StopSignals
from revjax.training.state import Abstract, TrainState
from revjax.training.step import Split


class Evaluator:
    """Computes the loss and accuracy of splits of the data for a state of a run.

    With `config.precise_bn_batches` above 0, the statistics are means over that many batches, the
    run's first, without augmentation; else they are the running averages.
    """

    def __init__(self, config: Config, model: Abstract, data: dict[str, Split]):
        """Keep what every evaluation needs; nothing is compiled yet."""
        self.config, self.model, self.data = config, model, data
        self.add_statistics: Any = jax.jit(self._add_statistics, donate_argnums=0)
        self.eval_batch: Any = jax.jit(self._eval_batch)

    def compile(self, state: TrainState) -> None:
        """Compile for states like this one, so that the first evaluation does not have to."""
        params, variables = state.params, state.variables
        counted = np.zeros(self.config.batch_size, bool)
        batch, *_ = [take(data, counted.astype(np.int32)) for data in self.data.values()]
        if self.config.precise_bn_batches:
            total = nnx.filter_state(variables, nnx.BatchStat)
            lowered = self.add_statistics.lower(total, params, variables, batch)
            self.add_statistics = lowered.compile()
        self.eval_batch = self.eval_batch.lower(params, variables, batch, counted).compile()

    def __call__(
        self, state: TrainState, names: Sequence[str], stop: StopSignals
    ) -> Iterator[dict[str, Any]]:
        """Yield loss, accuracy and speed as a row of metrics, a split after another.

        Told to stop meanwhile, it yields no more rows.
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
        data = self.data[name]
        began, num_examples = time.monotonic(), len(data.labels)
        total_loss, total_correct = 0.0, 0
        for start in range(0, num_examples, self.config.batch_size):
            if stop.requested:
                return None
            places = np.arange(start, start + self.config.batch_size, dtype=np.int32)
            batch = take(data, np.minimum(places, num_examples - 1))
            loss, correct = self.eval_batch(params, variables, batch, places < num_examples)
            total_loss, total_correct = total_loss + float(loss), total_correct + int(correct)
        return {
            "split": name,
            "loss": total_loss / num_examples,
            "accuracy": total_correct / num_examples,
            "images_per_second": num_examples / (time.monotonic() - began),
        }

    def _with_statistics(self, state: TrainState, stop: StopSignals) -> nnx.State | None:
        """The state's variables, with the statistics to evaluate by; None if told to stop."""
        num_batches = self.config.precise_bn_batches
        if not num_batches:
            return state.variables
        total = jax.tree.map(jnp.zeros_like, nnx.filter_state(state.variables, nnx.BatchStat))
        config, train = self.config, self.data["train"]
        for step in range(num_batches):
            if stop.requested:
                return None
            indices = batch_indices(config.seed, step, config.batch_size, len(train.labels))
            batch = take(train, indices)
            total = self.add_statistics(total, state.params, state.variables, batch)
            jax.block_until_ready(total)  # a signal is not to wait for a queue of batches
        mean = jax.tree.map(lambda leaf: leaf / num_batches, total)
        return nnx.merge_state(state.variables, mean)

    def _add_statistics(
        self, total: nnx.State, params: nnx.State, variables: nnx.State, batch: Split
    ) -> nnx.State:
        """`total` plus the statistics of a batch of training images."""
        module = nnx.merge(self.model.statistics_graph, params, variables, copy=True)
        module(normalize(batch.images, batch.normalization))
        return jax.tree.map(jnp.add, total, nnx.state(module, nnx.BatchStat))

    def _eval_batch(
        self, params: nnx.State, variables: nnx.State, batch: Split, counted: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Sums of the loss, float32, and of the correct answers, int32, over a batch.

        Examples where `counted`, bool `[batch_size]`, is false are there to fill it up.
        """
        images = normalize(batch.images, batch.normalization)
        logits = nnx.merge(self.model.eval_graph, params, variables)(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        correct = (jnp.argmax(logits, axis=-1) == batch.labels) & counted
        return jnp.where(counted, losses, 0).sum(), correct.sum(dtype=jnp.int32)


@jax.jit
def take(data: Split, indices: jax.Array) -> Split:
    """The examples that `indices` names.

    It is a program of its own, so that splits of all sizes share the network's.
    """
    return data._replace(images=data.images[indices], labels=data.labels[indices])
