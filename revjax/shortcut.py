"""Shortcuts: the way around a residual function, and what is done to the stream on it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from revjax.architecture import number, one_of
from revjax.layers import Activation, Conv, stream_dtype
from revjax.residual import PLACEMENTS


@dataclasses.dataclass(frozen=True)
class Shortcut:
    """A kind of shortcut (He et al. 2016, figure 2), for `ResNet`.

    With S(x) the stream in the shape of the unit's output, and `g(x) = sigmoid(conv1x1(x) + b)`:

    | kind | y, before any activation |
    |---|---|
    | identity | S(x) + F(x) |
    | constant_scaling | scale S(x) + branch_scale F(x) |
    | exclusive_gating | (1 - g(x)) S(x) + g(x) F(x) |
    | shortcut_only_gating | (1 - g(x)) S(x) + F(x) |
    | convolution | conv1x1(x) + F(x) |
    | dropout | mask S(x) + F(x); in evaluation (1 - rate) S(x) + F(x) |

    Attributes:
        kind: one of those.
        scale, branch_scale: of constant_scaling; by default 0.5 and 0.5.
        gate_bias: what b is initialised to; by default -6.
        rate: the share of the stream's elements that dropout sets to zero, without scaling the
            rest (section 3.1: a scale of 1 - rate in expectation); by default 0.5.

    Numbers that the kind does not read must be left out: `checked`, and with it `ResNet`, raises a
    ValueError that names them, and one for a kind that there is not.

    Example:
        >>> Shortcut("exclusive_gating", gate_bias=-7.0).checked()
        Shortcut(kind='exclusive_gating', scale=None, branch_scale=None, gate_bias=-7.0, rate=None)
    """

    kind: str = "identity"
    scale: float | None = None
    branch_scale: float | None = None
    gate_bias: float | None = None
    rate: float | None = None

    def checked(self) -> "Shortcut":
        """This with defaults filled in, or a ValueError that says what is wrong with it."""
        numbers = dict(NUMBERS[one_of("shortcut kind", self.kind, NUMBERS)])
        for name, value in dataclasses.asdict(self).items():
            if name == "kind" or value is None:
                continue
            if name not in numbers:
                raise ValueError(f"shortcut {name}={value!r}: {self.kind} does not read it.")
            numbers[name] = number(f"shortcut {name}", value, *RANGES.get(name, ()))
        return dataclasses.replace(self, **numbers)


NUMBERS = {
    "identity": {},
    "constant_scaling": {"scale": 0.5, "branch_scale": 0.5},
    "exclusive_gating": {"gate_bias": -6.0},
    "shortcut_only_gating": {"gate_bias": -6.0},
    "convolution": {},
    "dropout": {"rate": 0.5},
}
"""The numbers that each kind of shortcut reads, and what they are by default."""

RANGES: dict[str, Any] = {"rate": ("a number from 0 to below 1", lambda rate: 0 <= rate < 1)}
"""What not every finite number will do for."""


def check_shortcut(how: Any) -> Shortcut:
    """`how`, or the kind that it names, with its numbers; or an error that says what is wrong."""
    how = Shortcut(how) if isinstance(how, str) else how
    if not isinstance(how, Shortcut):
        raise TypeError(f"shortcut={how!r}: give the name of a kind, or revjax.Shortcut(kind).")
    return how.checked()


class PoolAndPad(nnx.Module):
    """The shortcut without parameters: average-pool by the stride, zero-pad the channels evenly."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        self.stride = stride
        self.padding = ((outputs - inputs) // 2, (outputs - inputs + 1) // 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        _, height, width, _ = x.shape
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"images reach a stage of stride {self.stride} as {height}x{width}: their sides "
                "must be divisible by all strides, 4 in a CIFAR network."
            )
        window, zero = (1, self.stride, self.stride, 1), np.zeros((), x.dtype)
        x = jax.lax.reduce_window(x, zero, jax.lax.add, window, window, "VALID")
        x = x / np.asarray(self.stride**2, x.dtype)
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), self.padding))


class Projection(nnx.Module):
    """A 1x1 convolution, with BatchNorm where the placement has it after F's last convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, placement: str, **kind: Any):
        self.conv = Conv(inputs, outputs, 1, stride, **kind)
        normed = PLACEMENTS[placement].last.startswith("norm")
        self.norm = Activation("norm", outputs, **kind) if normed else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        return x if self.norm is None else self.norm(x)


def resize(
    inputs: int,
    outputs: int,
    stride: int,
    *,
    bottleneck: bool,
    placement: str = "full_preactivation",
    **kind: Any,
) -> PoolAndPad | Projection | None:
    """S: what brings the stream into the shape of the unit's output; None where it has it.

    Basic networks pool and pad. Bottleneck networks project by a 1x1 convolution.
    """
    if stride == 1 and inputs == outputs:
        return None
    if bottleneck:
        return Projection(inputs, outputs, stride, placement=placement, **kind)
    return PoolAndPad(inputs, outputs, stride)


class Skip(nnx.Module):
    """The way around F: x to what F(x) is added to, and what F(x) is multiplied by first, or None.

    Args:
        inputs, outputs, stride: of the unit.
        shortcut: the kind, with all its numbers.
        bottleneck, placement: as for `Residual`.
        **kind: conventions, dtype and rngs, as for `Conv`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        *,
        shortcut: Shortcut,
        bottleneck: bool,
        placement: str,
        **kind: Any,
    ):
        self.shortcut = shortcut
        self.deterministic = False  # set by train() and eval()
        if shortcut.kind == "convolution":
            self.resize = Projection(inputs, outputs, stride, placement=placement, **kind)
        else:
            how = dict(bottleneck=bottleneck, placement=placement)
            self.resize = resize(inputs, outputs, stride, **how, **kind)
        self.gate: Any = nnx.data(None)
        self.gate_bias: Any = nnx.data(None)
        if shortcut.gate_bias is not None:
            self.gate = Conv(inputs, outputs, 1, stride, **kind)
            bias = jnp.full(outputs, shortcut.gate_bias, stream_dtype(kind["dtype"]))
            self.gate_bias = nnx.Param(bias)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, Any]:
        skip = x if self.resize is None else self.resize(x)
        how = self.shortcut
        if how.scale is not None:
            return how.scale * skip, how.branch_scale
        if self.gate is not None:
            g = jax.nn.sigmoid(self.gate(x) + self.gate_bias[None, None, None])
            return (1 - g) * skip, g if how.kind == "exclusive_gating" else None
        if how.rate is None:
            return skip, None
        if self.deterministic:
            return (1 - how.rate) * skip, None
        assert key is not None  # the network has asked for one
        keep = jax.random.bernoulli(key, 1 - how.rate, skip.shape)
        return jnp.where(keep, skip, 0), None
