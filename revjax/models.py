"""The networks by name: those of the three papers, and one's own."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from revjax.grid import DEFAULT_GRID_BITS, GridBits, resolve_grid_bits
from revjax.layers import stream_dtype
from revjax.resnet import ResNet
from revjax.revnet import RevNet
from revjax.shortcut import Shortcut
from revjax.stochastic_depth import StochasticDepth


class Architecture(NamedTuple):
    """Units of each stage, channels of stem and stages: see `ResNet` and `RevNet`."""

    units: Sequence[int]
    filters: Sequence[int]
    bottleneck: bool = False
    large_images: bool = False
    placement: str = "full_preactivation"
    conventions: str = "revnet"


HE: Any = {"conventions": "identity_mappings"}
HUANG: Any = {"placement": "original", "conventions": "stochastic_depth"}

ARCHITECTURES = {
    # Gomez et al. 2017, table 1, as its authors' code has them
    "resnet32": Architecture((5, 5, 5), (16, 16, 32, 64)),
    "resnet110": Architecture((18, 18, 18), (16, 16, 32, 64)),
    "resnet164": Architecture((18, 18, 18), (16, 16, 32, 64), bottleneck=True),
    "resnet50": Architecture((3, 4, 6, 3), (64, 64, 128, 256, 512), True, True),
    "resnet101": Architecture((3, 4, 23, 3), (64, 64, 128, 256, 512), True, True),
    "resnet152": Architecture((3, 8, 36, 3), (64, 64, 128, 256, 512), True, True),
    "revnet38": Architecture((3, 3, 3), (32, 32, 64, 112)),
    "revnet110": Architecture((9, 9, 9), (32, 32, 64, 128)),
    "revnet164": Architecture((9, 9, 9), (32, 32, 64, 128), bottleneck=True),
    "revnet56": Architecture((2, 2, 3, 2), (128, 128, 256, 512, 832), True, True),
    "revnet104": Architecture((2, 2, 11, 2), (128, 128, 256, 512, 832), True, True),
    # He et al. 2016
    "preact_resnet110": Architecture((18, 18, 18), (16, 16, 32, 64), **HE),
    "preact_resnet164": Architecture((18, 18, 18), (16, 16, 32, 64), True, **HE),
    "resnet1001": Architecture((111, 111, 111), (16, 16, 32, 64), True, **HE),
    "resnet200": Architecture((3, 24, 36, 3), (64, 64, 128, 256, 512), True, True, **HE),
    # Huang et al. 2016
    "resnet1202": Architecture((200, 200, 200), (16, 16, 32, 64), **HUANG),
}


def list_models() -> list[str]:
    """The names that `create_model` knows the architecture of. Raises nothing.

    Example:
        >>> "revnet110" in list_models()
        True
    """
    return list(ARCHITECTURES)


def create_model(
    name: str,
    num_classes: int,
    *,
    rngs: nnx.Rngs,
    in_channels: int = 3,
    backward: str | None = None,
    grid_bits: GridBits = "default",
    unroll: int | bool = 1,
    dtype: Any = jnp.float32,
    units: Sequence[int] | None = None,
    filters: Sequence[int] | None = None,
    bottleneck: bool | None = None,
    placement: str | None = None,
    shortcut: str | Shortcut | None = None,
    conventions: str | None = None,
    stochastic_depth: StochasticDepth | None = None,
) -> ResNet | RevNet:
    """Make a network of Gomez et al. 2017, He et al. 2016 or Huang et al. 2016 by name.

    The networks for ImageNet (resnet50, 101, 152, 200; revnet56, 104) take images of 224x224, or of
    any sides. The others take those of CIFAR, 32x32, or of any sides that two halvings divide.
    Parameters are equal in number to the authors' code. resnet110 and resnet164 are those that the
    RevNets were compared with; preact_resnet110 and preact_resnet164 are He et al.'s.

    Args:
        name: one of `list_models()`; or "resnet" or "revnet" for an architecture of one's own.
        num_classes: logits.
        rngs: `nnx.Rngs`, of which the stream "params" is used.
        in_channels: channels of the images.
        backward: how the gradient is found, see `RevNet`: "reversible" (the default of a RevNet),
            "remat" or "store" (the default of a ResNet, which cannot be "reversible").
        grid_bits: see `RevNet`; by default 14 for a RevNet. A ResNet has no grid.
        unroll: see `RevNet`.
        dtype: what convolutions compute in: float32, bfloat16, float16 or float64.
        units, filters, bottleneck: of an architecture of one's own, see `RevNet`.
        placement, shortcut, conventions: see `ResNet`; None is the architecture's own. A RevNet has
            full pre-activation and identity shortcuts.
        stochastic_depth: see `ResNet` and `RevNet`; None is constant depth.

    Returns:
        The network, in training mode. `model(images [B, H, W, in_channels])` gives logits
        `[B, num_classes]` and moves the batch statistics; `model.eval()` uses the averages. With
        stochastic depth or dropout it is `model(images, key=jax.random.key(step))` in training.

    Raises:
        ValueError: no such model, or an argument that is impossible for it.
        TypeError: rngs, grid_bits or stochastic_depth is nothing of the kind.

    Example:
        >>> model = create_model("revnet", 10, rngs=nnx.Rngs(0), units=(1,), filters=(8, 8))
        >>> model(jnp.zeros((2, 8, 8, 3))).shape
        (2, 10)
    """
    own = {"units": units, "filters": filters, "bottleneck": bottleneck}
    if name in ARCHITECTURES:
        given = [key for key, value in own.items() if value is not None]
        if given:
            generic = "revnet" if name.startswith("revnet") else "resnet"
            raise ValueError(
                f"{name} has its own {', '.join(given)}: leave them out, or name the model "
                f'"{generic}" to give an architecture of your own.'
            )
        architecture = ARCHITECTURES[name]
    elif name in ("resnet", "revnet"):
        if units is None or filters is None:
            raise ValueError(
                f'"{name}" needs units and filters, such as units=(3, 3, 3) and '
                "filters=(32, 32, 64, 128); or name one of " + ", ".join(list_models())
            )
        architecture = Architecture(units, filters, bool(bottleneck))
    else:
        raise ValueError(
            f"There is no model {name!r}: name one of {', '.join(list_models())}, or "
            '"resnet" or "revnet" with units and filters.'
        )
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs={rngs!r}: give nnx.Rngs(seed).")
    dtype = _known_dtype(dtype)
    options: dict[str, Any] = dict(
        in_channels=in_channels,
        bottleneck=architecture.bottleneck,
        large_images=architecture.large_images,
        stochastic_depth=stochastic_depth,
        unroll=unroll,
        dtype=dtype,
    )
    if backward is not None:
        options["backward"] = backward
    styles = {"placement": placement, "shortcut": shortcut, "conventions": conventions}
    styles = {key: value for key, value in styles.items() if value is not None}
    reversible = name.startswith("revnet")
    if reversible:
        stream = jnp.zeros((), stream_dtype(dtype))
        options["grid_bits"] = resolve_grid_bits(grid_bits, DEFAULT_GRID_BITS, stream)
        for key, value in styles.items():
            raise ValueError(
                f"{key}={value!r}: {name} is reversible, which a unit is with full pre-activation "
                "and identity shortcuts alone; leave it out, or take a ResNet."
            )
    elif grid_bits not in ("default", None):
        raise ValueError(f"grid_bits={grid_bits!r}: {name} is not reversible and has no grid.")
    else:
        options |= dict(placement=architecture.placement, conventions=architecture.conventions)
        options |= styles

    def make(key):
        network = RevNet if reversible else ResNet
        return network(*architecture[:2], num_classes, rngs=nnx.Rngs(params=key), **options)

    return _initialise(make, rngs.params())


def _initialise(make, key):
    """`make(key)`, in one program that is compiled without optimisation: it runs only once.

    Operation by operation it would be dozens of programs, and optimised it would take longer to
    compile than a small network takes to learn.
    """
    disabled = jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(key, Tracer) or disabled:
        return make(key)
    init = jax.jit(lambda key: nnx.split(make(key)))
    options: Any = {"xla_backend_optimization_level": 0}
    return nnx.merge(*init.lower(key).compile(compiler_options=options)(key))


def _known_dtype(dtype):
    """`dtype` as a NumPy dtype, or a ValueError that says which there are."""
    try:
        known = None if dtype is None else jnp.dtype(dtype)  # NumPy takes None for float64
    except TypeError:
        known = None
    if known is None or known.name not in ("float32", "bfloat16", "float16", "float64"):
        raise ValueError(f"dtype={dtype!r}: give float32, bfloat16, float16 or float64.")
    if known.name == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError('dtype=float64 needs jax.config.update("jax_enable_x64", True) first.')
    return known
