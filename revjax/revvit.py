"""Reversible Vision Transformers (Mangalam et al. 2022), as the authors' code has them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from revjax.architecture import integer
from revjax.grid import DEFAULT_GRID_BITS
from revjax.layers import stream_dtype
from revjax.reversible import Backward, Pair
from revjax.stage import ReversibleStage, StageGates
from revjax.stochastic_depth import StochasticDepth, check_stochastic_depth, network_gates
from revjax.transformer import MLP, Attention, Dense, layer_norm


class PatchEmbedding(nnx.Module):
    """Square patches to tokens, with learned positions: `[B, S, S, C_in] -> [B, N, width]`.

    N is `(S / patch)^2`, row by row. A dense layer of a patch's pixels is the convolution of size
    and stride `patch` that others have.
    """

    def __init__(self, side, patch, inputs, width, *, dtype, rngs):
        self.patch = patch
        self.dense = Dense(patch * patch * inputs, width, dtype=dtype, rngs=rngs)
        shape = (1, (side // patch) ** 2, width)
        init = nnx.initializers.normal(0.02)
        self.positions = nnx.Param(init(rngs.params(), shape, stream_dtype(dtype)))

    def __call__(self, images: jax.Array) -> jax.Array:
        batch, side, _, channels = images.shape
        across = side // self.patch
        x = images.reshape(batch, across, self.patch, across, self.patch, channels)
        x = x.swapaxes(2, 3).reshape(batch, across * across, -1)
        return self.dense(x.astype(self.positions.dtype)) + self.positions[...]


class TokenHead(nnx.Module):
    """Both halves of the stream to logits: LayerNorm of both, mean of the tokens, dense."""

    def __init__(self, width, num_classes, *, dtype, rngs):
        self.norm = layer_norm(2 * width, dtype=dtype, rngs=rngs)
        self.dense = Dense(2 * width, num_classes, dtype=stream_dtype(dtype), rngs=rngs)

    def __call__(self, halves: Pair) -> jax.Array:
        x = self.norm(jnp.concatenate(halves, axis=-1))
        return self.dense(x.mean(1, keepdims=True))[:, 0]


class RevViT(nnx.Module):
    """A reversible Vision Transformer (Mangalam et al. 2022, section 3.2).

        y1 = x1 + F(x2),  F = attention of LayerNorm(x2)
        y2 = x2 + G(y1),  G = MLP of LayerNorm(y1)

    Patches become tokens once, and both halves of the stream begin as these, each with all the
    channels. At the end the halves are concatenated, normalised and averaged over the tokens; there
    is no class token. `stages[0]` is the blocks, and `stages[0].inverse` undoes them. Kernels are
    drawn by Xavier's rule, positions with a deviation of 0.02. (In the authors' code for ImageNet
    that is the deviation of the kernels, too, which suits wide networks alone.)

    Args:
        depth: blocks.
        width: channels of each half of the stream; the MLP is four times as wide inside.
        heads: of the attention; they divide width.
        num_classes: logits.
        patch: height and width of a patch.
        image_size: height and width of the images, which patch divides.
        in_channels: channels of the images.
        stochastic_depth: as in `RevNet`, a gate for each F and each G. The authors' is
            `granularity="sample"`, except that there both of a block share a gate.
        backward, grid_bits, unroll: as in `RevNet`, with blocks for units.
        store_last: the same; None is 0, as all blocks are of one size.
        dtype: what products compute in, those of the attention too; the stream, LayerNorm, softmax
            and parameters are float32, or float64 where dtype is.
        rngs: with a stream "params".

    Raises:
        TypeError, ValueError: an argument is impossible.

    Example:
        >>> model = RevViT(2, 16, 4, 10, patch=2, image_size=8, in_channels=1, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((3, 8, 8, 1))).shape
        (3, 10)
    """

    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        num_classes: int,
        *,
        patch: int,
        image_size: int,
        in_channels: int = 3,
        stochastic_depth: StochasticDepth | None = None,
        backward: Backward = "reversible",
        grid_bits: int | None = DEFAULT_GRID_BITS,
        unroll: int | bool = 1,
        store_last: int | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.depth = depth = integer("depth", depth)
        width, heads = integer("width", width), integer("heads", heads)
        num_classes = integer("num_classes", num_classes)
        patch = integer("patch", patch)
        self.image_size = image_size = integer("image_size", image_size)
        self.in_channels = in_channels = integer("in_channels", in_channels)
        if width % heads:
            raise ValueError(
                f"width={width} and heads={heads}: give a width that can be split among the heads."
            )
        if image_size % patch:
            raise ValueError(
                f"image_size={image_size} and patch={patch}: give a patch that divides the images."
            )
        self.stochastic_depth = check_stochastic_depth(stochastic_depth)
        self.deterministic = False  # set by train() and eval()
        self.dtype = stream_dtype(dtype)
        kind: Any = dict(dtype=jnp.dtype(dtype), rngs=rngs)

        def attention(rngs):
            return Attention(width, heads, **kind | {"rngs": rngs})

        def mlp(rngs):
            return MLP(width, **kind | {"rngs": rngs})

        rule: Any = dict(backward=backward, grid_bits=grid_bits, unroll=unroll)
        rule["store_last"] = 0 if store_last is None else store_last
        self.stem = PatchEmbedding(image_size, patch, in_channels, width, **kind)
        self.stages = nnx.List([ReversibleStage(attention, mlp, depth, rngs=rngs, **rule)])
        self.head = TokenHead(width, num_classes, **kind)

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """`[B, image_size, image_size, in_channels] -> [B, num_classes]`, in the stream's dtype.

        key is a PRNG key, of which stochastic depth draws its gates in training mode.
        """
        due = (self.image_size, self.image_size, self.in_channels)
        if jnp.ndim(images) != 4 or images.shape[1:] != due:
            raise ValueError(
                f"images of shape {jnp.shape(images)}: give [B, {', '.join(map(str, due))}], or "
                "make the network with another image_size or in_channels."
            )
        x = self.stem(images)
        return self.head(self.stages[0]((x, x), gates=self.gates(len(images), key)))

    def gates(self, batch_size: int, key: jax.Array | None = None) -> StageGates:
        """The gates of the blocks, as `stages[0]` and its inverse take them; see `RevNet.gates`."""
        gates = network_gates(
            self.stochastic_depth,
            2 * self.depth,
            batch_size,
            self.dtype,
            key=key,
            training=not self.deterministic,
        )
        if gates is None:
            return None, None
        # Of each image they are [2 depth, B, 1, 1, 1], and tokens have an axis less than images.
        gates = gates.reshape(gates.shape[:4])
        return gates[0::2], gates[1::2]
