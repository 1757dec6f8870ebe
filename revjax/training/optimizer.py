"""SGD as residual networks are trained, AdamW as Transformers are; a rate that drops by steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from revjax.training.config import OptimConfig


def learning_rate_schedule(config: OptimConfig) -> Callable[[ArrayLike], jax.Array]:
    """Return the learning rate as a function of the step, jit-able.

    `rate(s) = learning_rate * decay_factor^n`, n the number of boundaries b with b <= s. The
    boundaries are absolute steps: a shorter run simply ends before some of them. A warm-up is the
    exception of the first steps, and moves no boundary: `rate(s) = warmup_rate, s < warmup_steps`.

    Args:
        config: the rate, the factor, the steps at which it is applied, and the warm-up.
    """
    rates = [
        config.learning_rate * config.decay_factor**n for n in range(len(config.boundaries) + 1)
    ]

    def rate(step: ArrayLike) -> jax.Array:
        dropped = jnp.asarray(config.boundaries, jnp.int32) <= jnp.asarray(step)
        dropping = jnp.asarray(rates, jnp.float32)[dropped.sum()]
        if config.warmup_rate is None:
            return dropping
        warming = jnp.asarray(step) < config.warmup_steps
        return jnp.where(warming, jnp.float32(config.warmup_rate), dropping)

    return rate


def is_kernel(path: tuple[Any, ...]) -> bool:
    """Whether a parameter's path in the tree of parameters is that of a kernel."""
    return any(getattr(key, "key", None) == "kernel" for key in path)


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Return `d = g + weight_decay w;  v <- momentum v + d;  w <- w - rate(step) v`.

    With Nesterov's momentum the last is `w <- w - rate(step) (d + momentum v)`, as in Torch: v is
    that of the line before, and starts at 0.

    The decay, the gradient of `weight_decay / 2 * ||w||^2`, is for convolution and dense kernels
    alone, not for biases, nor for the scale and bias of a norm, nor positions; or for all of them.

    That is "sgd". "adamw" is Loshchilov & Hutter 2019, algorithm 2, where the decay is no gradient:

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
        w <- w - rate(step) (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + 1e-8) + weight_decay w)

    with b1 the momentum and b2 = 0.999, after t steps.

    Args:
        config: the rate's schedule, the momentum and the weight decay.
    """

    def kernels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: is_kernel(path), params)

    mask = kernels if config.decay == "kernels" else None
    if config.name == "adamw":
        return optax.adamw(
            learning_rate_schedule(config),
            b1=config.momentum,
            weight_decay=config.weight_decay,
            mask=mask,
        )
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=mask),
        optax.sgd(learning_rate_schedule(config), config.momentum, config.nesterov),
    )
