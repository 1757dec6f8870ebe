"""A reversible network in Flax Linen: scans of digits, BatchNorm, dropout, jit and optax.

Look at `residual`: `apply` returns a module's statistics beside its output, which is what
`has_aux=True` asks for. The network holds the blocks' variables as `self.param` and
`self.variable`, and sets the latter to what the chain returns, so they move once a step.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import revjax

WIDTH, DEPTH, RATE = 32, 8, 0.1  # of each half of the stream; blocks of the chain; dropout's
OPTIMIZER = optax.sgd(0.03, momentum=0.9)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):  # x: [B, WIDTH]
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(RATE, deterministic=not train)(nn.relu(x))
        return nn.Dense(WIDTH)(x)


def residual(which, train, params, x, per_block):
    stats, keys = (of_f_and_g[which] for of_f_and_g in per_block)
    variables, rngs = {"params": params, "batch_stats": stats}, {"dropout": keys}
    x, moved = Residual().apply(variables, x, train, rngs=rngs, mutable=["batch_stats"])
    return x, moved["batch_stats"]


def init_block(key, x):  # parameters of F and G, and their statistics
    f, g = (Residual().init(k, x, train=False) for k in jax.random.split(key))
    return (f["params"], g["params"]), (f["batch_stats"], g["batch_stats"])


def init_chain(key, x):  # the same, every array [DEPTH, ...]
    return jax.vmap(init_block, in_axes=(0, None))(jax.random.split(key, DEPTH), x)


class Network(nn.Module):
    backward: Any = "reversible"

    @nn.compact
    def __call__(self, images, train=True):
        f, g = partial(residual, 0, train), partial(residual, 1, train)
        keys = jax.random.split(self.make_rng("dropout"), (1 + DEPTH, 2))
        x1, x2 = jnp.split(nn.Dense(2 * WIDTH, name="stem")(images), 2, axis=1)
        params, block = self.variables_of("block", init_block, x1)
        x, moved_block = revjax.rev_block_apply(
            f, g, params, (x1, x2), (block.value, keys[0]), has_aux=True
        )
        params, chain = self.variables_of("chain", init_chain, x1)
        xs = chain.value, keys[1:]
        x, moved_chain = revjax.rev_chain_apply(
            f, g, params, x, xs=xs, has_aux=True, backward=self.backward
        )
        if train:
            block.value, chain.value = moved_block, moved_chain
        return nn.Dense(10, name="head")(jnp.concatenate(x, 1))

    def variables_of(self, name, init, x):
        key = jax.random.key(0)  # which statistics do not depend on
        params = self.param(name, lambda key: init(key, x)[0])
        return params, self.variable("batch_stats", name, lambda: init(key, x)[1])


def init(key):
    variables = Network().init({"params": key, "dropout": key}, jnp.zeros((1, 64)), train=False)
    return variables["params"], variables["batch_stats"]


def loss(params, stats, images, labels, key, backward: Any = "reversible"):
    variables, rngs = {"params": params, "batch_stats": stats}, {"dropout": key}
    logits, moved = Network(backward).apply(variables, images, rngs=rngs, mutable=["batch_stats"])
    value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return value, moved["batch_stats"]


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
    variables, rngs = {"params": state[0], "batch_stats": state[1]}, {"dropout": key}
    predict = jax.jit(partial(Network().apply, train=False))
    logits = predict(variables, images[1500:], rngs=rngs)
    return losses, float(jnp.mean(logits.argmax(1) == labels[1500:]))


if __name__ == "__main__":
    losses, accuracy = train()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, accuracy on held-out scans {accuracy:.3f}")
