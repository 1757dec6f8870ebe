"""Evaluation: the whole test set, a batch at a time, with the running averages."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from revjax.data import normalize
from revjax.training.interrupt import StopSignals
from revjax.training.state import Abstract, TrainState
from revjax.training.step import Split


def make_eval_batch(
    model: Abstract, batch_size: int
) -> Callable[[nnx.State, nnx.State, Split, jax.Array], tuple[jax.Array, jax.Array]]:
    """Return the jitted `eval_batch(params, variables, data, start) -> loss, correct`.

    The batch is the examples `start` to `start + batch_size`, fewer at the end of the data; the
    loss, float32, and the number of correct answers, int32, are sums over it.
    """

    def eval_batch(
        params: nnx.State, variables: nnx.State, data: Split, start: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        indices = start + jnp.arange(batch_size, dtype=jnp.int32)
        counted = indices < len(data.labels)
        indices = jnp.minimum(indices, len(data.labels) - 1)
        labels = data.labels[indices]
        images = normalize(data.images[indices], data.mean)
        logits = nnx.merge(model.eval_graph, params, variables)(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = (jnp.argmax(logits, axis=-1) == labels) & counted
        return jnp.where(counted, losses, 0).sum(), correct.sum(dtype=jnp.int32)

    return jax.jit(eval_batch)


def evaluate(
    eval_batch: Callable, state: TrainState, data: Split, batch_size: int, stop: StopSignals
) -> dict[str, Any] | None:
    """Return the test set's loss, accuracy and speed as a row of metrics; None if told to stop."""
    began, num_examples = time.monotonic(), len(data.labels)
    total_loss, total_correct = 0.0, 0
    for start in range(0, num_examples, batch_size):
        loss, correct = eval_batch(state.params, state.variables, data, np.int32(start))
        total_loss, total_correct = total_loss + float(loss), total_correct + int(correct)
        if stop.requested:
            return None
    return {
        "split": "test",
        "loss": total_loss / num_examples,
        "accuracy": total_correct / num_examples,
        "images_per_second": num_examples / (time.monotonic() - began),
    }
