"""The networks by name: those of the papers, and one's own."""

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
from revjax.revvit import RevViT
from revjax.shortcut import Shortcut
from revjax.stochastic_depth import StochasticDepth


class Architecture(NamedTuple):
    """Units of each stage, channels of stem and stages: see `ResNet` and `RevNet`."""

    units: Sequence[int]
    filters: Sequence[int]
    bottleneck: bool = False
    large_images: bool = False
    placement: str | None = None  # of a ResNet, and the next; None: the class's default
    conventions: str | None = None


class Transformer(NamedTuple):
    """Blocks, channels of each half, heads, sides of patches and images: see `RevViT`."""

    depth: int
    width: int
    heads: int
    patch: int = 16
    image_size: int = 224


HE: Any = {"conventions": "identity_mappings"}
HUANG: Any = {"placement": "original", "conventions": "stochastic_depth"}

ARCHITECTURES: dict[str, Architecture | Transformer] = {
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
    # Mangalam et al. 2022, table 1
    "revvit_small": Transformer(12, 384, 6),
    "revvit_base": Transformer(12, 768, 12),
    "revvit_large": Transformer(24, 1024, 16),
}


class Family(NamedTuple):
    """What the networks of a class have in common.

    Attributes:
        network: the class.
        needs: what an architecture of one's own must be told, by an example.
        fixed: arguments that are a named network's own.
        free: arguments that `create_model` passes on to this class, and not to all.
    """

    network: type[ResNet] | type[RevNet] | type[RevViT]
    needs: dict[str, Any]
    fixed: tuple[str, ...]
    free: tuple[str, ...] = ()


UNITS: Any = (
    {"units": (3, 3, 3), "filters": (32, 32, 64, 128)},
    ("units", "filters", "bottleneck"),
)
FAMILIES = {
    "resnet": Family(ResNet, *UNITS, free=("placement", "shortcut", "conventions")),
    "revnet": Family(RevNet, *UNITS, free=("store_last",)),
    "revvit": Family(
        RevViT,
        {"depth": 12, "width": 192, "heads": 6, "patch": 4, "image_size": 32},
        ("depth", "width", "heads", "patch"),
        free=("image_size", "store_last"),
    ),
}


def family_of(name: str) -> str:
    """The key of FAMILIES for a model's name, which need not be one that there is.

    Example:
        >>> family_of("preact_resnet110")
        'resnet'
    """
    return next((family for family in FAMILIES if name.startswith(family)), "resnet")


def architecture_of(name: str) -> dict[str, Any]:
    """The arguments by which a network of `list_models()` differs from others of its class.

    Example:
        >>> architecture_of("revvit_small")["depth"]
        12
    """
    own = ARCHITECTURES[name]._asdict()
    return {key: value for key, value in own.items() if value is not None}


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
    store_last: int | None = None,
    dtype: Any = jnp.float32,
    units: Sequence[int] | None = None,
    filters: Sequence[int] | None = None,
    bottleneck: bool | None = None,
    depth: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    patch: int | None = None,
    image_size: int | None = None,
    placement: str | None = None,
    shortcut: str | Shortcut | None = None,
    conventions: str | None = None,
    stochastic_depth: StochasticDepth | None = None,
) -> ResNet | RevNet | RevViT:
    """Make a network by name: of Gomez et al. 2017, or of the papers beside it.

    The networks for ImageNet (resnet50, 101, 152, 200; revnet56, 104) take images of 224x224, or of
    any sides. The others take those of CIFAR, 32x32, or of any sides that two halvings divide.
    Parameters are equal in number to the authors' code. resnet110 and resnet164 are those that the
    RevNets were compared with; preact_resnet110 and preact_resnet164 are He et al.'s. A
    Transformer (revvit_small, revvit_base, revvit_large) is for images of one size.

    Args:
        name: one of `list_models()`; or "resnet", "revnet" or "revvit" for an architecture of one's
            own.
        num_classes: logits.
        rngs: `nnx.Rngs`, of which the stream "params" is used.
        in_channels: channels of the images.
        backward: how the gradient is found, see `RevNet`: "reversible" (the default, but
            for a ResNet, which cannot have it), "remat" or "store" (that of a ResNet).
        grid_bits: see `RevNet`; by default 14. A ResNet has no grid.
        unroll: see `RevNet`.
        store_last: how many of the last units store, see `RevNet`; None is as many as leave the
            peak of memory as it is, and in a RevViT none. A ResNet has no such option.
        dtype: what convolutions and products compute in: float32, bfloat16, float16 or float64.
        units, filters, bottleneck: of an architecture of one's own, see `RevNet`.
        depth, width, heads, patch: the same of a Transformer, see `RevViT`.
        image_size: of a Transformer, see there; those that have a name have 224.
        placement, shortcut, conventions: see `ResNet`; None is the architecture's own. A RevNet has
            full pre-activation and identity shortcuts.
        stochastic_depth: see `RevNet`; None is constant depth.

    Returns:
        The network, in training mode. `model(images [B, H, W, in_channels])` gives logits
        `[B, num_classes]` and moves the batch statistics (of which a Transformer has none);
        `model.eval()` uses the averages. With stochastic depth or dropout it is
        `model(images, key=jax.random.key(step))` in training.

    Raises:
        ValueError: no such model, or an argument that is impossible for it.
        TypeError: rngs, grid_bits or stochastic_depth is nothing of the kind.

    Example:
        >>> model = create_model("revnet", 10, rngs=nnx.Rngs(0), units=(1,), filters=(8, 8))
        >>> model(jnp.zeros((2, 8, 8, 3))).shape
        (2, 10)
    """
    if not isinstance(name, str) or name not in (*ARCHITECTURES, *FAMILIES):
        raise ValueError(
            f"There is no model {name!r}: name one of {', '.join(list_models())}, or "
            '"resnet", "revnet" or "revvit" for an architecture of your own.'
        )
    given = {
        "units": units,
        "filters": filters,
        "bottleneck": bottleneck,
        "store_last": store_last,
        "depth": depth,
        "width": width,
        "heads": heads,
        "patch": patch,
        "image_size": image_size,
        "placement": placement,
        "shortcut": shortcut,
        "conventions": conventions,
    }
    given = {key: value for key, value in given.items() if value is not None}
    _check_given(name, given)
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs={rngs!r}: give nnx.Rngs(seed).")
    dtype = _known_dtype(dtype)
    network: Any = FAMILIES[family_of(name)].network
    options = (architecture_of(name) if name in ARCHITECTURES else {}) | given
    options |= dict(
        in_channels=in_channels, stochastic_depth=stochastic_depth, unroll=unroll, dtype=dtype
    )
    if backward is not None:
        options["backward"] = backward
    if network is not ResNet:
        stream = jnp.zeros((), stream_dtype(dtype))
        options["grid_bits"] = resolve_grid_bits(grid_bits, DEFAULT_GRID_BITS, stream)
    elif grid_bits not in ("default", None):
        raise ValueError(f"grid_bits={grid_bits!r}: {name} is not reversible and has no grid.")

    def make(key):
        return network(num_classes=num_classes, rngs=nnx.Rngs(params=key), **options)

    return _initialise(make, rngs.params())


def _check_given(name, given):
    """Raise a ValueError if a network of that name cannot have, or lacks, what only some have."""
    generic = family_of(name)
    family = FAMILIES[generic]
    for key, value in given.items():
        if key in (*family.fixed, *family.free):
            continue
        if generic == "revnet" and key in FAMILIES["resnet"].free:
            raise ValueError(
                f"{key}={value!r}: {name} is reversible, which a unit is with full pre-activation "
                "and identity shortcuts alone; leave it out, or take a ResNet."
            )
        raise ValueError(
            f"{key}={value!r}: {name} is a {family.network.__name__}, which has no {key}; leave it "
            "out, or take another model."
        )
    own = [key for key in family.fixed if key in given]
    if name in ARCHITECTURES and own:
        raise ValueError(
            f"{name} has its own {', '.join(own)}: leave them out, or name the model "
            f'"{generic}" to give an architecture of your own.'
        )
    if name == generic and not family.needs.keys() <= given.keys():
        *others, last = family.needs
        example = ", ".join(f"{key}={value}" for key, value in family.needs.items())
        raise ValueError(
            f'"{name}" needs {", ".join(others)} and {last}, such as {example}; or name one of '
            + ", ".join(list_models())
        )


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
