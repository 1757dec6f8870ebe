"""A reversible network in Haiku: scans of digits, BatchNorm, dropout, jit and optax.

Look at `RESIDUAL`: a function transformed by itself is pure, and its `apply` returns the state
beside the output, which is what `has_aux=True` asks for. `hk.lift_with_state` puts the blocks' own
among those of the network, and its updater sets the state to what the chain returns, once a step.
"""

from functools import partial
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import revjax

WIDTH, DEPTH, RATE = 32, 8, 0.1  # of each half of the stream; blocks of the chain; dropout's
OPTIMIZER = optax.sgd(0.03, momentum=0.9)


@hk.transform_with_state
def RESIDUAL(x, train):  # x: [B, WIDTH]
    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, train)
    x = hk.dropout(hk.next_rng_key(), RATE if train else 0.0, jax.nn.relu(x))
    return hk.Linear(WIDTH)(x)


def init_chain(key, x, train):  # of DEPTH residual functions, every array [DEPTH, ...]
    return jax.vmap(RESIDUAL.init, (0, None, None))(jax.random.split(key, DEPTH), x, train)


def lift(name, init, x):
    """Parameters and states of F and G as the network has them, and what sets the states."""
    lifted = [hk.lift_with_state(init, name=f"{name}_{which}") for which in ("f", "g")]
    rngs = [hk.next_rng_key() if hk.running_init() else None for _ in lifted]
    own = [get(rng, x, True) for (get, _), rng in zip(lifted, rngs, strict=True)]
    params, states = zip(*own, strict=True)
    return params, states, [updater for _, updater in lifted]


@hk.transform_with_state
def NETWORK(images, train=True, backward: Any = "reversible"):
    def residual(which):
        def apply(params, x, per_block):
            state, key = (of_f_and_g[which] for of_f_and_g in per_block)
            return RESIDUAL.apply(params, state, key, x, train)

        return apply

    f, g = residual(0), residual(1)
    keys = jax.random.split(hk.next_rng_key(), (1 + DEPTH, 2))
    x1, x2 = jnp.split(hk.Linear(2 * WIDTH, name="stem")(images), 2, axis=1)
    params, states, set_block = lift("block", RESIDUAL.init, x1)
    x, block = revjax.rev_block_apply(f, g, params, (x1, x2), (states, keys[0]), has_aux=True)
    params, states, set_chain = lift("chain", init_chain, x1)
    x, chain = revjax.rev_chain_apply(
        f, g, params, x, xs=(states, keys[1:]), has_aux=True, backward=backward
    )
    for updater, moved in zip(set_block + set_chain, block + chain, strict=True):
        updater.update(moved)
    return hk.Linear(10, name="head")(jnp.concatenate(x, 1))


def init(key):
    return NETWORK.init(key, jnp.zeros((1, 64)))


def loss(params, stats, images, labels, key, backward: Any = "reversible"):
    logits, stats = NETWORK.apply(params, stats, key, images, backward=backward)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), stats


@jax.jit
def train_step(state, images, labels, key):
    params, stats, opt_state = state
    grad = jax.value_and_grad(loss, has_aux=True)
    (value, stats), grads = grad(params, stats, images, labels, key)
    updates, opt_state = OPTIMIZER.update(grads, opt_state)
    return (optax.apply_updates(params, updates), stats, opt_state), value


def train(steps=100):
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    images, key = (images / 16).astype(np.float32), jax.random.key(1)  # [1797, 64]
    params, stats = jax.jit(init)(jax.random.key(0))
    state, losses = (params, stats, OPTIMIZER.init(params)), []
    for step in range(steps):
        rows = np.random.default_rng(step).choice(1500, 128)
        state, value = train_step(state, images[rows], labels[rows], jax.random.fold_in(key, step))
        losses.append(float(value))
    predict = jax.jit(partial(NETWORK.apply, train=False))
    logits, _ = predict(*state[:2], key, images[1500:])
    return losses, float(jnp.mean(logits.argmax(1) == labels[1500:]))


if __name__ == "__main__":
    losses, accuracy = train()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, accuracy on held-out scans {accuracy:.3f}")
