"""Evaluation: the whole test set, a batch at a time.

A network in evaluation normalises by running averages of the batch statistics. At a high learning
rate the parameters run ahead of them, and the accuracy is that of neither. So the averages can be
replaced, for the evaluation alone, by the mean of the statistics of some training batches at the
parameters evaluated: "precise BN" (Wu & Johnson 2021, arXiv:2105.07576). As in the running
averages, the variance is the mean of the batches' variances.
"""

import time
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
    """Computes the test set's loss and accuracy for a state of a run.

    With `config.precise_bn_batches` above 0, the statistics are means over that many batches, the
    run's first, without augmentation; else they are the running averages.
    """

    def __init__(self, config: Config, model: Abstract, train: Split, test: Split):
        """Keep what every evaluation needs; nothing is compiled yet."""
        self.config, self.model, self.train, self.test = config, model, train, test
        self.add_statistics: Any = jax.jit(self._add_statistics, donate_argnums=0)
        self.eval_batch: Any = jax.jit(self._eval_batch)

    def compile(self, state: TrainState) -> None:
        """Compile for states like this one, so that the first evaluation does not have to."""
        params, variables = state.params, state.variables
        if self.config.precise_bn_batches:
            total = nnx.filter_state(variables, nnx.BatchStat)
            indices = self._batch(0)
            lowered = self.add_statistics.lower(total, params, variables, self.train, indices)
            self.add_statistics = lowered.compile()
        lowered = self.eval_batch.lower(params, variables, self.test, np.int32(0))
        self.eval_batch = lowered.compile()

    def __call__(self, state: TrainState, stop: StopSignals) -> dict[str, Any] | None:
        """Return loss, accuracy and speed as a row of metrics; None if told to stop meanwhile."""
        variables = self._with_statistics(state, stop)
        if variables is None:
            return None
        began, num_examples = time.monotonic(), len(self.test.labels)
        total_loss, total_correct = 0.0, 0
        for start in range(0, num_examples, self.config.batch_size):
            if stop.requested:
                return None
            batch = self.test, np.int32(start)
            loss, correct = self.eval_batch(state.params, variables, *batch)
            total_loss, total_correct = total_loss + float(loss), total_correct + int(correct)
        return {
            "split": "test",
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
        for number in range(num_batches):
            if stop.requested:
                return None
            indices = self._batch(number)
            total = self.add_statistics(total, state.params, state.variables, self.train, indices)
            jax.block_until_ready(total)  # a signal is not to wait for a queue of batches
        mean = jax.tree.map(lambda leaf: leaf / num_batches, total)
        return nnx.merge_state(state.variables, mean)

    def _batch(self, number: int) -> np.ndarray:
        config = self.config
        return batch_indices(config.seed, number, config.batch_size, len(self.train.labels))

    def _add_statistics(
        self,
        total: nnx.State,
        params: nnx.State,
        variables: nnx.State,
        data: Split,
        indices: jax.Array,
    ) -> nnx.State:
        """`total` plus the statistics of a batch of training images."""
        module = nnx.merge(self.model.statistics_graph, params, variables, copy=True)
        module(normalize(data.images[indices], data.mean))
        return jax.tree.map(jnp.add, total, nnx.state(module, nnx.BatchStat))

    def _eval_batch(
        self, params: nnx.State, variables: nnx.State, data: Split, start: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Sums of the loss, float32, and of the correct answers, int32, over a batch.

        It is the examples `start` to `start + batch_size`, fewer at the end of the data.
        """
        indices = start + jnp.arange(self.config.batch_size, dtype=jnp.int32)
        counted = indices < len(data.labels)
        indices = jnp.minimum(indices, len(data.labels) - 1)
        labels = data.labels[indices]
        images = normalize(data.images[indices], data.mean)
        logits = nnx.merge(self.model.eval_graph, params, variables)(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = (jnp.argmax(logits, axis=-1) == labels) & counted
        return jnp.where(counted, losses, 0).sum(), correct.sum(dtype=jnp.int32)
