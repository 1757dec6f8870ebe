"""A reversible network in Equinox: scans of digits, BatchNorm, dropout, jit and optax.

Look at `pure`: `jax.vmap` over the examples stands *inside* of the residual function; around the
chain, its rule would keep the parameters' gradients of each example. `state.substate` is what goes
into the chain, and `state.update` takes what comes out of it, so statistics move once a step.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import revjax

WIDTH, DEPTH, RATE = 32, 8, 0.1  # of each half of the stream; blocks of the chain; dropout's
OPTIMIZER = optax.sgd(0.03, momentum=0.9)


class Residual(eqx.Module):
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    linear: eqx.nn.Linear

    def __init__(self, key):
        self.norm = eqx.nn.BatchNorm(WIDTH, "batch", momentum=0.9, mode="batch")
        self.dropout = eqx.nn.Dropout(RATE)
        self.linear = eqx.nn.Linear(WIDTH, WIDTH, key=key)

    def __call__(self, x, state, key):  # x: [WIDTH]
        # Its division by a root would be compiled otherwise when the chain goes back: this keeps
        # the bits of the forward pass, which are what the chain reconstructs its stream from.
        x, state = eqx.filter_checkpoint(self.norm)(x, state)
        x = self.dropout(jax.nn.relu(x), key=key)
        return self.linear(x), state


def pure(modules, state):
    """f, g, their parameters and their states, of a block or of a chain."""
    params, static = eqx.partition(modules, eqx.is_array)

    def residual(which):
        def apply(params, x, per_block):  # x: [B, WIDTH]
            state, key = (of_f_and_g[which] for of_f_and_g in per_block)
            module = eqx.combine(params, static[which])
            batched = jax.vmap(module, (0, None, 0), (0, None), axis_name="batch")
            return batched(x, state, jax.random.split(key, len(x)))

        return apply

    return residual(0), residual(1), params, tuple(state.substate(module) for module in modules)


class Network(eqx.Module):
    stem: eqx.nn.Linear
    block: tuple[Residual, Residual]
    chain: tuple[Residual, Residual]  # every array [DEPTH, ...]
    head: eqx.nn.Linear

    def __init__(self, key):
        stem, head, *keys = jax.random.split(key, 6)
        self.stem = eqx.nn.Linear(64, 2 * WIDTH, key=stem)
        stack = eqx.filter_vmap(Residual)
        self.block = Residual(keys[0]), Residual(keys[1])
        self.chain = tuple(stack(jax.random.split(key, DEPTH)) for key in keys[2:])
        self.head = eqx.nn.Linear(2 * WIDTH, 10, key=head)

    def __call__(self, images, state, key, backward: Any = "reversible"):
        keys = jax.random.split(key, (1 + DEPTH, 2))
        x1, x2 = jnp.split(jax.vmap(self.stem)(images), 2, axis=1)
        f, g, params, own = pure(self.block, state)
        x, block = revjax.rev_block_apply(f, g, params, (x1, x2), (own, keys[0]), has_aux=True)
        f, g, params, own = pure(self.chain, state)
        x, chain = revjax.rev_chain_apply(
            f, g, params, x, xs=(own, keys[1:]), has_aux=True, backward=backward
        )
        for moved in (*block, *chain):
            state = state.update(moved)
        return jax.vmap(self.head)(jnp.concatenate(x, 1)), state


init = eqx.nn.make_with_state(Network)


def loss(model, state, images, labels, key, backward: Any = "reversible"):
    logits, state = model(images, state, key, backward)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state


@eqx.filter_jit
def train_step(state, images, labels, key):
    model, stats, opt_state = state
    grad = eqx.filter_value_and_grad(loss, has_aux=True)
    (value, stats), grads = grad(model, stats, images, labels, key)
    updates, opt_state = OPTIMIZER.update(grads, opt_state)
    return (eqx.apply_updates(model, updates), stats, opt_state), value


def train(steps=100):
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    images, key = (images / 16).astype(np.float32), jax.random.key(1)  # [1797, 64]
    model, stats = eqx.filter_jit(init)(jax.random.key(0))
    state = model, stats, OPTIMIZER.init(eqx.filter(model, eqx.is_inexact_array))
    losses = []
    for step in range(steps):
        rows = np.random.default_rng(step).choice(1500, 128)
        state, value = train_step(state, images[rows], labels[rows], jax.random.fold_in(key, step))
        losses.append(float(value))
    predict = eqx.filter_jit(eqx.nn.inference_mode(state[0]))
    logits, _ = predict(images[1500:], state[1], key)
    return losses, float(jnp.mean(logits.argmax(1) == labels[1500:]))


if __name__ == "__main__":
    losses, accuracy = train()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, accuracy on held-out scans {accuracy:.3f}")
