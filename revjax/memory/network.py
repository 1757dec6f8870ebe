"""The training step of a network, and the gradient of each of its stages, as functions to compile.

They come with abstract arguments: the network is never made.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from revjax.grid import DEFAULT_GRID_BITS
from revjax.memory.target import is_tpu
from revjax.models import FAMILIES, architecture_of, family_of
from revjax.resnet import ResNet
from revjax.revnet import RevNet
from revjax.revvit import RevViT

Network = ResNet | RevNet | RevViT
Compilable = tuple[Callable, tuple[Any, ...]]  # a jitted function, and its arguments


def ways_of(name: str) -> tuple[str, ...]:
    """The backward passes that a network of `list_models()` has."""
    return ("store", "remat") if family_of(name) == "resnet" else ("store", "remat", "reversible")


def usual_image(name: str) -> int:
    """The height and width of the images that a network of `list_models()` is for."""
    own = architecture_of(name)
    return own.get("image_size", 224 if own.get("large_images") else 32)


def abstract_network(
    name: str,
    backward: str,
    dtype: str,
    *,
    num_classes: int,
    grid_bits: int | None = DEFAULT_GRID_BITS,
    times_deeper: int = 1,
    unroll: int | bool = 1,
    store_last: int | None = None,
    topology: str | None = None,
    image_size: int | None = None,
) -> Network:
    """A network of `list_models()` without its numbers.

    Args:
        name, backward, dtype, num_classes: as `create_model` takes them.
        grid_bits: of a reversible network.
        times_deeper: what to multiply the units of every stage, or the blocks, by.
        unroll, store_last: as `create_model` takes them; the latter is read where backward is
            "reversible".
        topology: what it is for, as `memory_report` takes it: a network for TPUs is as made there.
        image_size: of a Transformer, as `create_model` takes it.
    """
    options = architecture_of(name)
    if "depth" in options:
        options["depth"] *= times_deeper
    else:
        options["units"] = [times_deeper * units for units in options["units"]]
    if "image_size" in options and image_size is not None:
        options["image_size"] = image_size
    family = family_of(name)
    if family != "resnet":
        options["grid_bits"] = grid_bits
        store_last = 0 if store_last is None and is_tpu(topology) else store_last
        options["store_last"] = store_last if backward == "reversible" else None
    options |= dict(backward=backward, unroll=unroll, dtype=jnp.dtype(dtype))
    network: Any = FAMILIES[family].network
    return nnx.eval_shape(lambda: network(num_classes=num_classes, rngs=nnx.Rngs(0), **options))


def training_step(network: Network, batch: int, image: int) -> Compilable:
    """A step of SGD with momentum and weight decay on cross-entropy, its state donated.

    Args:
        network: may be abstract.
        batch: images a step.
        image: their height and width.
    """
    graph, params, variables = nnx.split(network, nnx.Param, ...)
    optimizer = optax.chain(optax.add_decayed_weights(2e-4), optax.sgd(0.1, momentum=0.9))

    def loss_fn(params, variables, images, labels):
        module = nnx.merge(graph, params, variables, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(module(images), labels)
        return losses.mean(), nnx.state(module, nnx.Not(nnx.Param))

    def step(state, images, labels):
        params, variables, opt_state = state
        gradient, variables = jax.grad(loss_fn, has_aux=True)(params, variables, images, labels)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), variables, opt_state

    state = jax.eval_shape(lambda: (params, variables, optimizer.init(params)))
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return jax.jit(step, donate_argnums=0), (state, _images(network, batch, image), labels)


def stage_gradients(network: Network, batch: int, image: int) -> Iterator[Compilable]:
    """Of each stage, its output, and its gradient by parameters and input for a given cotangent.

    Args:
        network, batch, image: as for `training_step`.
    """
    x = nnx.eval_shape(
        lambda stem, images: stem(images), network.stem, _images(network, batch, image)
    )
    if isinstance(network, RevNet):
        half = jax.ShapeDtypeStruct((*x.shape[:-1], x.shape[-1] // 2), x.dtype)
        x = (half, half)
    elif isinstance(network, RevViT):
        x = (x, x)
    for stage in network.stages:
        graph, params, variables = nnx.split(stage, nnx.Param, ...)

        def gradient(params, variables, x, dy, graph=graph):
            def apply(params, x):
                module = nnx.merge(graph, params, variables, copy=True)
                return module(x), nnx.state(module, nnx.Not(nnx.Param))

            y, pullback, variables_after = jax.vjp(apply, params, x, has_aux=True)
            return y, variables_after, pullback(dy)

        y = nnx.eval_shape(lambda stage, x: stage(x), stage, x)
        yield jax.jit(gradient), (params, variables, x, y)
        x = y


def largest_batch(
    peak_bytes: Callable[[int], float],
    available: int,
    known: Mapping[int, float] | None = None,
    tolerance: float = 0.01,
) -> int:
    """The largest batch whose peak is at most `available` bytes; 0 if not even 1 fits.

    Args:
        peak_bytes: of a batch. Each call may compile a program, so it is asked few times: it is
            nearly affine, and the line through the two nearest that are known tells the next.
            Infinite where it is too large to say.
        available: bytes.
        known: peaks by batch, if some are.
        tolerance: the batch is good enough where one larger by that share of it does not fit, as
            is known, or by that line.
    """
    peaks = {0: 0.0, **(known or {1: peak_bytes(1)})}
    while True:
        fits = max(batch for batch, peak in peaks.items() if peak <= available)
        too_large = min((batch for batch, peak in peaks.items() if peak > available), default=None)
        step = max(1, int(tolerance * fits))
        if too_large is not None and too_large - fits <= step:
            return fits
        finite = [batch for batch, peak in peaks.items() if batch and peak < math.inf]
        if finite:
            nearest = sorted(finite, key=lambda batch: abs(peaks[batch] - available))
            a, b = [*nearest, 0][:2]  # of one alone the next is told by the line through zero
            slope = max((peaks[b] - peaks[a]) / (b - a), 1)
            due = a + (available - peaks[a]) / slope
            if len(finite) > 1 and 0 < (1 - tolerance) * due <= fits:
                return fits
            batch = max(int((1 - tolerance / 2) * due), fits + step)
        else:
            batch = 1 if too_large is None else too_large // 2
        if too_large is None:
            batch = min(batch, 64 * max(peaks))
        elif batch >= too_large or len(peaks) > 8:
            batch = (fits + too_large) // 2
        peaks[batch] = peak_bytes(batch)


def batch_unit(guess: float) -> int:
    """What batches on a TPU are multiples of, where about so many images fit: it pads to that."""
    return 128 if guess >= 1024 else 8


def _images(network: Network, batch: int, image: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, image, image, network.in_channels), jnp.float32)
