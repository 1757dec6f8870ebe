"""The training step, compiled, and several of them a dispatch."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from revjax.data import (
    Dataset,
    Normalization,
    augment,
    distort_color,
    find_normalization,
    hold_out,
    is_streamed,
    normalize,
)
from revjax.stage import StreamPeak
from revjax.training.compiler import compiler_options
from revjax.training.config import Config, DataConfig
from revjax.training.mesh import (
    BATCH_AXES,
    batch_sharding,
    on_each_device,
    platform_of,
    put,
    replicated,
    split_over_fsdp,
)
from revjax.training.state import Abstract, Interval, TrainState, initial_state, state_shardings
from revjax.training.votes import Votes, count

# Apart from the counters 0, 1, 2, ... by which nnx.Rngs folds the same seed for the parameters.
AUGMENTATION_STREAM = 2**31
MODEL_STREAM = 2**31 + 1


class Split(NamedTuple):
    """Examples of a data set, on the device."""

    images: jax.Array  # uint8 [N, H, W, C]
    labels: jax.Array  # int32 [N]
    normalization: Normalization  # of the examples that are *trained* on


class Report(NamedTuple):
    """What a dispatch of training steps tells the host, about the steps since the last log."""

    loss: jax.Array  # float32 [], mean cross-entropy
    accuracy: jax.Array  # float32 [], on augmented batches, in training mode
    learning_rate: jax.Array  # float32 [], of the last step
    stream_peak: jax.Array  # float32 [], largest |stream|
    run_peak: jax.Array  # float32 [], the same since step 0
    failed_step: jax.Array  # int32 [], as in TrainState
    skipped: jax.Array  # int32 [], as in TrainState
    counted: jax.Array  # int32 [], steps that loss and accuracy are of: all but those skipped
    agreed: Votes  # what the processes agree on


def split_shardings(mesh: Mesh) -> Any:
    """Where a batch lies, a sharding for each of its fields."""
    parts: Any = batch_sharding(mesh)
    return Split(parts, parts, normalization=cast(Any, replicated(mesh)))


def put_on_device(config: DataConfig, dataset: Dataset, mesh: Mesh) -> dict[str, Split]:
    """Return the splits "train", "validation" if any example is held out for it, and "test".

    Args:
        config: how many examples are held out, and how images are normalised: by the statistics of
            what is then left to train on.
        dataset: the data set of the config.
        mesh: the devices, of which each gets all of it.

    Raises:
        DataError: where the images cannot be normalised that way.
    """
    images, labels = dataset.train_images, dataset.train_labels
    arrays = {"train": (images, labels)}
    if config.validation:
        held_out = hold_out(config.name, labels, config.validation)
        arrays["train"] = images[~held_out], labels[~held_out]
        arrays["validation"] = images[held_out], labels[held_out]
    arrays["test"] = dataset.test_images, dataset.test_labels
    found = find_normalization(config.normalize, arrays["train"][0])
    whole = replicated(mesh)
    normalization = put(found, whole)
    return {
        name: Split(put(images, whole), put(labels, whole), normalization)
        for name, (images, labels) in arrays.items()
    }


def streamed_images(config: DataConfig, key: jax.Array, batch: Split) -> jax.Array:
    """What the network sees in training of a batch from a stream, float32 `[B, H, W, 3]`."""
    images = distort_color(key, batch.images) if config.color else batch.images
    return normalize(images, batch.normalization)


def stream_key(seed: int, stream: int, step: jax.Array) -> jax.Array:
    """The key of one use of randomness in a step: a function of the config's seed and the step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)


def make_train_step(
    config: Config, model: Abstract, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[[TrainState, jax.Array, jax.Array], TrainState]:
    """Return `train_step(state, images, labels) -> state`, which is not jitted.

    `images` is a batch as the network sees it, float32 `[B, H, W, C]`; `labels` is int32 `[B]`.

    A step whose loss, gradient or update is not finite has failed. Up to `config.skip_nonfinite`
    of a run are skipped instead: parameters, variables, the optimizer's state and sums are as
    before the step, the learning rate's schedule too, and only the step counter moves on.
    """

    def gradient(
        params: Any, variables: Any, key: jax.Array, images: jax.Array, labels: jax.Array
    ) -> tuple[tuple[jax.Array, tuple[jax.Array, Any]], Any]:
        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            module = nnx.merge(model.train_graph, params, variables, copy=True)
            logits = module(images, key=key)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            correct = (jnp.argmax(logits, axis=-1) == labels).sum(dtype=jnp.int32)
            return losses.mean(), (correct, nnx.state(module, nnx.Not(nnx.Param)))

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    def joined(
        params: Any, variables: Any, key: jax.Array, images: jax.Array, labels: jax.Array
    ) -> tuple[tuple[jax.Array, tuple[jax.Array, Any]], Any]:
        """The mean, sum or largest of what each device has of its part of the batch."""
        own = jax.lax.pcast(params, BATCH_AXES, to="varying")  # else each block's would be summed
        (loss, (correct, variables)), grads = gradient(own, variables, key, images, labels)
        peaks, statistics, others = nnx.split_state(variables, StreamPeak, nnx.BatchStat, ...)
        peaks, correct = jax.lax.pmax(peaks, BATCH_AXES), jax.lax.psum(correct, BATCH_AXES)
        loss, grads, statistics = jax.lax.pmean((loss, grads, statistics), BATCH_AXES)
        return (loss, (correct, nnx.merge_state(peaks, statistics, others))), grads

    find_gradient = gradient
    if config.model.bn_scope == "device":
        find_gradient = on_each_device(mesh, joined, (False, False, False, True, True))

    def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
        key = stream_key(config.seed, MODEL_STREAM, state.step)
        whole = replicated(mesh)
        params = jax.lax.with_sharding_constraint(state.params, whole)
        (loss, (correct, variables)), grads = find_gradient(
            params, state.variables, key, images, labels
        )
        grads = jax.lax.with_sharding_constraint(grads, whole)  # else activations would be split
        grads = jax.lax.with_sharding_constraint(grads, split_over_fsdp(mesh, grads))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        peaks = jax.tree.leaves(nnx.filter_state(variables, StreamPeak))
        peak = jnp.max(jnp.stack(peaks)) if peaks else jnp.float32(0)
        fresh = state.step % config.log_every == 0  # the first step after a logged one
        last = jax.tree.map(lambda total: jnp.where(fresh, 0, total), state.interval)
        finite = jnp.isfinite(loss + optax.tree.norm(grads) + optax.tree.norm(updates))
        done = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            variables=variables,
            opt_state=opt_state,
            interval=Interval(
                steps=last.steps + 1,
                loss=last.loss + loss,
                correct=last.correct + correct,
                stream_peak=jnp.maximum(last.stream_peak, peak),
            ),
            stream_peak=jnp.maximum(state.stream_peak, peak),
            failed_step=jnp.where(finite, 0, state.step + 1),
            skipped=state.skipped,
        )
        if not config.skip_nonfinite:
            return done
        skipped = state._replace(
            step=state.step + 1, interval=last, failed_step=jnp.int32(0), skipped=state.skipped + 1
        )
        skip = ~finite & (state.skipped < config.skip_nonfinite)
        return jax.tree.map(lambda a, b: jnp.where(skip, a, b), skipped, done)

    return train_step


def make_train_steps(
    config: Config,
    model: Abstract,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    mesh: Mesh,
) -> Callable[[TrainState, Split, jax.Array, jax.Array, Votes], tuple[TrainState, Report]]:
    """Return the jitted `train_steps(state, data, indices, num_steps, votes) -> state, report`.

    `indices`, int32 [K, batch_size], names the examples of up to K steps, of which the first
    `num_steps` are made. As `num_steps` is a traced value, one program serves every number of
    steps, and each step is the same machine code whichever dispatch it falls into: the result
    does not depend, to the last bit, on how the steps are dispatched. Of a data set that is
    streamed, `data` is the batch of a single step, and `indices` is None.

    The state is donated. A step whose loss, gradient or update is not finite is the last one made,
    and the report names it: the state is then lost, and the newest checkpoint is what is left.
    """
    train_step = make_train_step(config, model, optimizer, mesh)
    streamed = is_streamed(config.data.name, config.data.source)

    def batch(
        state: TrainState, data: Split, indices: jax.Array, index: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        key = stream_key(config.seed, AUGMENTATION_STREAM, state.step)
        if streamed:  # cropped and mirrored it has come
            return streamed_images(config.data, key, data), data.labels
        chosen = jax.lax.with_sharding_constraint(indices[index], batch_sharding(mesh))
        images = augment(
            key,
            data.images[chosen],
            data.normalization,
            padding=config.data.padding,
            flip=config.data.flip,
        )
        return images, data.labels[chosen]

    def train_steps(
        state: TrainState, data: Split, indices: jax.Array, num_steps: jax.Array, votes: Votes
    ) -> tuple[TrainState, Report]:
        def unfinished(carry: tuple[jax.Array, TrainState]) -> jax.Array:
            index, state = carry
            return (index < num_steps) & (state.failed_step == 0)

        def advance(carry: tuple[jax.Array, TrainState]) -> tuple[jax.Array, TrainState]:
            index, state = carry
            return index + 1, train_step(state, *batch(state, data, indices, index))

        _, state = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), state))
        steps = jnp.maximum(state.interval.steps, 1).astype(jnp.float32)
        report = Report(
            loss=state.interval.loss / steps,
            accuracy=state.interval.correct.astype(jnp.float32) / (steps * config.batch_size),
            learning_rate=schedule(state.step - 1 - state.skipped),
            stream_peak=state.interval.stream_peak,
            run_peak=state.stream_peak,
            failed_step=state.failed_step,
            skipped=state.skipped,
            counted=state.interval.steps,
            agreed=count(votes),
        )
        return state, report

    whole = replicated(mesh)
    states = state_shardings(mesh, jax.eval_shape(partial(initial_state, config, optimizer)))
    return jax.jit(
        train_steps,
        donate_argnums=0,
        compiler_options=compiler_options(platform_of(mesh)),
        in_shardings=(
            states,
            split_shardings(mesh) if streamed else whole,
            whole,
            whole,
            batch_sharding(mesh),
        ),
        out_shardings=(states, whole),
    )
