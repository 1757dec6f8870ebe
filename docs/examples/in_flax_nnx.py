"""A reversible network in Flax NNX: scans of digits, BatchNorm, dropout, jit and optax.

Look at `pure`: modules are split into parameters and statistics, and merged again inside of the
residual function, which returns the new statistics (`has_aux=True`). `nnx.update` puts those of the
forward pass into the modules, so they move once a step. `revjax.ReversibleStage` does all this for
modules of yours; here it is done by hand, as in the other libraries.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import revjax

WIDTH, DEPTH, RATE = 32, 8, 0.1  # of each half of the stream; blocks of the chain; dropout's
OPTIMIZER = optax.sgd(0.03, momentum=0.9)


class Residual(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(RATE)
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, key):  # x: [B, WIDTH]
        return self.linear(self.dropout(jax.nn.relu(self.norm(x)), rngs=key))


def pure(modules):
    """f, g, their parameters and their statistics, of a block or of a chain."""
    graphs, params, stats = zip(*(nnx.split(m, nnx.Param, ...) for m in modules), strict=True)

    def residual(which):
        def apply(params, x, per_block):
            stats, keys = (of_f_and_g[which] for of_f_and_g in per_block)
            module = nnx.merge(graphs[which], params, stats)
            return module(x, keys), nnx.state(module, nnx.Not(nnx.Param))

        return apply

    return residual(0), residual(1), params, stats


class Network(nnx.Module):
    def __init__(self, rngs, backward: Any = "reversible"):
        stack = nnx.split_rngs(splits=DEPTH)(nnx.vmap(Residual))
        self.stem = nnx.Linear(64, 2 * WIDTH, rngs=rngs)
        self.block = nnx.List([Residual(rngs), Residual(rngs)])
        self.chain = nnx.List([stack(rngs), stack(rngs)])  # every array [DEPTH, ...]
        self.head = nnx.Linear(2 * WIDTH, 10, rngs=rngs)
        self.backward = backward

    def __call__(self, images, key):
        keys = jax.random.split(key, (1 + DEPTH, 2))
        x1, x2 = jnp.split(self.stem(images), 2, axis=1)
        f, g, params, stats = pure(self.block)
        x, block = revjax.rev_block_apply(f, g, params, (x1, x2), (stats, keys[0]), has_aux=True)
        f, g, params, stats = pure(self.chain)
        x, chain = revjax.rev_chain_apply(
            f, g, params, x, xs=(stats, keys[1:]), has_aux=True, backward=self.backward
        )
        for module, moved in zip((*self.block, *self.chain), block + chain, strict=True):
            nnx.update(module, moved)
        return self.head(jnp.concatenate(x, 1))


def loss(model, images, labels, key):
    logits = model(images, key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(model, optimizer, images, labels, key):
    value, grads = nnx.value_and_grad(loss)(model, images, labels, key)
    optimizer.update(model, grads)
    return value


def train(steps=100):
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    images, key = (images / 16).astype(np.float32), jax.random.key(1)  # [1797, 64]
    model = nnx.jit(Network)(nnx.Rngs(0))
    optimizer, losses = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param), []
    for step in range(steps):
        rows = np.random.default_rng(step).choice(1500, 128)
        batch = images[rows], labels[rows], jax.random.fold_in(key, step)
        losses.append(float(train_step(model, optimizer, *batch)))
    model.eval()
    logits = nnx.jit(Network.__call__)(model, images[1500:], key)
    return losses, float(jnp.mean(logits.argmax(1) == labels[1500:]))


if __name__ == "__main__":
    losses, accuracy = train()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, accuracy on held-out scans {accuracy:.3f}")
