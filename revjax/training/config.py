"""A run's configuration as a typed record, and every check that needs no computation.

The fields below are all the keys there are: what is not a field is refused, so that a key that
nothing reads is an error and not a silence.
"""

import dataclasses
import functools
import itertools
import math
import types
import typing
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from revjax.architecture import FLOAT32_MAX
from revjax.conventions import CONVENTIONS
from revjax.data import (
    FIXED_NORMALIZATIONS,
    HOLD_OUT_SIZES,
    NORMALIZATIONS,
    DataError,
    DatasetInfo,
    dataset_info,
    is_streamed,
)
from revjax.models import FAMILIES, family_of, list_models
from revjax.residual import PLACEMENTS
from revjax.shortcut import Shortcut
from revjax.stochastic_depth import StochasticDepth
from revjax.training.errors import ConfigError

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
DECAYS = ("kernels", "all")
OPTIMIZERS = ("sgd", "adamw")
BN_SCOPES = ("global", "device")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the examples come from, which are held out, and what is done to the images."""

    name: str
    flip: bool  # mirror half of the images
    padding: int = 0  # pixels a side, before the random crop to the original size; not for streams
    dir: str | None = None  # of the prepared data set; None: the data layer's default
    source: str | None = None  # official files already on disk, or a folder of images
    normalize: str = "mean_image"  # or another of revjax.data.NORMALIZATIONS
    validation: int = 0  # training examples held out, which every evaluation evaluates beside test
    image_size: int = 224  # of streams only, as the next two: the side of a crop, resized
    color: bool = False  # distort brightness, saturation, hue and contrast
    workers: int = 0  # processes that decode images; 0: threads

    @property
    def info(self) -> DatasetInfo:
        """The sizes of the data set; a DataError where it is not to be had."""
        return dataset_info(
            self.name, data_dir=self.dir, source=self.source, image_size=self.image_size
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network, and how its gradient is found."""

    name: str
    backward: str  # "reversible", "remat" or "store"
    dtype: str  # of the residual functions: "float32" or "bfloat16"
    grid_bits: int | None = None  # reversible networks only: the grid 2^-k; None: plain float
    units: tuple[int, ...] | None = None  # the generic names only: units of each stage
    filters: tuple[int, ...] | None = None  # the same: the stem's width, then each stage's
    bottleneck: bool | None = None  # the same
    depth: int | None = None  # "revvit" only, and the next three, see RevViT: blocks
    width: int | None = None  # channels of each half
    heads: int | None = None
    patch: int | None = None  # side of a patch
    placement: str | None = None  # ResNets only, as the next two; None: the model's own
    shortcut: Shortcut | None = None
    conventions: str | None = None
    stochastic_depth: StochasticDepth | None = None  # None: constant depth
    bn_scope: str = "global"  # statistics of the whole batch, or "device": of each device's part
    unroll: bool = False  # no loop over the units of a stage: longer to compile, faster on a GPU
    store_last: int = (
        -1
    )  # reversible networks only: how many of the last units store; -1: see RevNet


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """SGD with momentum, or AdamW, on a piecewise constant learning rate.

    The defaults are the RevNet authors' way. He et al. (arXiv:1603.05027) and Huang et al.
    (arXiv:1603.09382) have `nesterov` and `decay="all"` in their code, and the former warm up.
    Transformers are trained by AdamW (Loshchilov & Hutter, arXiv:1711.05101).
    """

    learning_rate: float
    boundaries: tuple[int, ...]  # steps from which the rate is multiplied once more
    decay_factor: float
    momentum: float  # of AdamW beta_1
    weight_decay: float  # the loss has weight_decay / 2 * ||w||^2 for every w that decays
    name: str = "sgd"  # or "adamw", whose weight_decay is not of the loss: see make_optimizer
    decay: str = "kernels"  # what decays: "kernels", or "all" parameters
    nesterov: bool = False  # Nesterov's momentum, as PyTorch has it
    warmup_steps: int = 0  # how many steps are made first, at warmup_rate
    warmup_rate: float | None = None  # needed where there are such steps, refused elsewhere


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices there are along each axis of the mesh.

    The batch is split over both axes. Parameters and the optimiser's state are whole on every
    device, or, along fsdp, split as well (Rajbhandari et al. 2020, arXiv:1910.02054).
    """

    data: int = -1  # -1: as many as there are
    fsdp: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run is told; all lengths and intervals are in training steps."""

    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    seed: int
    steps: int
    batch_size: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    keep_checkpoints: int
    precise_bn_batches: int  # whose statistics an evaluation uses; 0: the running averages
    mesh: MeshConfig = MeshConfig()
    skip_nonfinite: int = 0  # steps that may be left out, over the run, as they are not finite


def check_config(values: Any) -> Config:
    """Turn the config of the command line into a record, or say what is wrong with it.

    Args:
        values: the ConfigDict that `get_config()` returned, under the command line's overrides.

    Returns:
        The same values, checked one by one and against each other and the data set's sizes.

    Raises:
        ConfigError: a sentence that names the key, its value, and what was due.
    """
    config = _record(Config, values, "config")
    data, model, optim = config.data, config.model, config.optim

    def require(holds: bool, key: str, due: str) -> None:
        if not holds:
            value = functools.reduce(getattr, key.split("."), config)
            raise ConfigError(f"config.{key} is {value!r}; {due} is due.")

    # Names, and the keys that only some of them read.
    try:
        info = data.info
    except DataError as error:
        raise ConfigError(f"config.data.name is {data.name!r}: {error}") from error
    streamed = is_streamed(data.name, data.source)
    if streamed:
        why = "images of a stream are cropped at random out of what they are"
        _refuse(values.data, "data", ("padding",), why)
    else:
        why = f"{data.name} is not streamed"
        _refuse(values.data, "data", ("image_size", "color", "workers"), why)
        if "padding" not in values.data:
            raise ConfigError("config.data.padding is missing from the config.")
    normalizations = FIXED_NORMALIZATIONS if streamed else NORMALIZATIONS
    ways = ", ".join(normalizations)
    require(data.normalize in normalizations, "data.normalize", f"one of {ways}")
    require(0 < data.image_size <= 4096, "data.image_size", "a number from 1 to 4096")
    require(0 <= data.workers <= 1024, "data.workers", "a number from 0 to 1024")
    if data.name == "digits":
        _refuse(values.data, "data", ("dir", "source"), "digits comes with scikit-learn")
    names = (*FAMILIES, *list_models())
    require(model.name in names, "model.name", f"one of {', '.join(names)}")
    family = family_of(model.name)
    if family == "resnet":
        keys = "grid_bits", "store_last"
        _refuse(values.model, "model", keys, "a ResNet has no reversible stream")
    elif "grid_bits" not in values.model:
        network = FAMILIES[family].network.__name__
        raise ConfigError(f"config.model.grid_bits is missing; a {network} needs it (14, or None).")
    own = FAMILIES[family].fixed if model.name in FAMILIES else ()
    fixed = [key for other in FAMILIES.values() for key in other.fixed if key not in own]
    why = f"{model.name} is fixed" if not own else f"the model {model.name!r} has none"
    _refuse(values.model, "model", fixed, why)
    for key in own:
        if getattr(model, key) is None:
            raise ConfigError(f"config.model.{key} is missing; the model {model.name!r} needs it.")
    require(model.dtype in DTYPES, "model.dtype", f"one of {', '.join(DTYPES)}")
    bits = model.grid_bits
    require(bits is None or 0 <= bits <= 23, "model.grid_bits", "None or a number from 0 to 23")

    require(
        model.store_last >= -1, "model.store_last", "a number of units or -1, for the network's,"
    )

    # What the network is made of; what remains is for the network itself to refuse.
    ways = ("reversible", "remat", "store")[not model.name.startswith("rev") :]
    require(model.backward in ways, "model.backward", f"one of {', '.join(ways)}")
    require(model.bn_scope in BN_SCOPES, "model.bn_scope", f"one of {', '.join(BN_SCOPES)}")
    if family == "revvit":
        _refuse(values.model, "model", ("bn_scope",), f"{model.name} has no batch statistics")
    for key, known in (("placement", PLACEMENTS), ("conventions", CONVENTIONS)):
        fits = getattr(model, key) in (None, *known)
        require(fits, f"model.{key}", f"one of {', '.join(known)}")
    for key in ("shortcut", "stochastic_depth"):
        how = getattr(model, key)
        try:
            _ = how and how.checked()
        except ValueError as error:
            raise ConfigError(f"config.model.{key}: {error}") from error

    # Numbers; a comparison with NaN does not hold.
    for key in ("batch_size", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints"):
        require(getattr(config, key) > 0, key, "a number above 0")
    for key in ("data", "fsdp"):
        size = getattr(config.mesh, key)
        fits = size > 0 or (size == -1 and key == "data")
        require(fits, f"mesh.{key}", "a number of devices" + " or -1, for all," * (key == "data"))
    for key in ("precise_bn_batches", "skip_nonfinite"):
        require(getattr(config, key) >= 0, key, "a number from 0")
    fits = family != "revvit" or not config.precise_bn_batches
    require(fits, "precise_bn_batches", f"0, as {model.name} has no batch statistics,")
    require(0 < config.steps < 2**31, "steps", "a number from 1 to 2^31 - 1")
    require(0 <= config.seed < 2**31, "seed", "a number from 0 to 2^31 - 1")
    require(0 < optim.learning_rate < FLOAT32_MAX, "optim.learning_rate", "a number above 0")
    require(0 < optim.decay_factor < FLOAT32_MAX, "optim.decay_factor", "a number above 0")
    require(0 <= optim.momentum < 1, "optim.momentum", "a number in [0, 1)")
    require(0 <= optim.weight_decay < FLOAT32_MAX, "optim.weight_decay", "a number from 0")
    require(optim.decay in DECAYS, "optim.decay", f"one of {', '.join(DECAYS)}")
    require(optim.name in OPTIMIZERS, "optim.name", f"one of {', '.join(OPTIMIZERS)}")
    plain = optim.name == "sgd" or not optim.nesterov
    require(plain, "optim.nesterov", "False, as config.optim.name is not 'sgd',")
    moves = optim.momentum > 0 or not optim.nesterov
    require(moves, "optim.nesterov", "False, as the momentum is 0,")
    require(0 <= optim.warmup_steps < 2**31, "optim.warmup_steps", "a number from 0")
    rate = optim.warmup_rate
    if optim.warmup_steps:
        fits = rate is not None and 0 < rate < FLOAT32_MAX
        require(fits, "optim.warmup_rate", "a number above 0 for the warm-up's steps")
    else:
        require(rate is None, "optim.warmup_rate", "None, as config.optim.warmup_steps is 0,")
    edges = itertools.pairwise((0, *optim.boundaries, 2**31))
    increasing = all(left < right for left, right in edges)
    require(increasing, "optim.boundaries", "a tuple of increasing steps above 0")
    last = math.log(optim.learning_rate) + len(optim.boundaries) * math.log(optim.decay_factor)
    fits = last < math.log(FLOAT32_MAX)
    require(fits, "optim.decay_factor", "a rate that stays a float32 number to the last boundary")

    # Against the data.
    size = info.train_size
    require(0 <= data.validation < size, "data.validation", f"a number from 0 to {size - 1}")
    if data.name in HOLD_OUT_SIZES:
        due = HOLD_OUT_SIZES[data.name]
        fits = data.validation in (0, due)
        require(fits, "data.validation", f"0 or {due}, by the rule of {data.name},")
    size -= data.validation
    fits = config.batch_size <= size
    require(fits, "batch_size", f"at most {size}, the examples of {data.name} to train on,")
    side = min(info.image_shape[:2])
    require(0 <= data.padding < side, "data.padding", f"a number from 0 to {side - 1}")
    return config


def optional_keys(record: type = Config, prefix: str = "") -> dict[str, Any]:
    """The keys that a config may leave out, as in "mesh.data", and what they are then.

    Those whose default is None are not among them: it does not say of which type a value would be.
    """
    hints, keys = typing.get_type_hints(record), {}
    for field in dataclasses.fields(record):
        hint, name = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            keys |= optional_keys(typing.cast(type, hint), f"{name}.")
        elif field.default not in (dataclasses.MISSING, None):
            keys[name] = field.default
    return keys


def _record(record: type, values: Any, path: str) -> Any:
    """Build a dataclass from a ConfigDict whose keys and types must be its fields'."""
    if not isinstance(values, ConfigDict):
        raise ConfigError(f"{path} is {values!r}; a group of keys is due.")
    hints = typing.get_type_hints(record)
    for key in values:
        if key not in hints:
            raise ConfigError(f"{path}.{key} is a key that nothing reads; remove it.")
    fields = {}
    for field in dataclasses.fields(record):
        key = f"{path}.{field.name}"
        if field.name in values:
            fields[field.name] = _value(hints[field.name], values[field.name], key)
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"{key} is missing from the config.")
    return record(**fields)


def _value(hint: Any, value: Any, key: str) -> Any:
    """Return `value` as the field's type, which is the only one it may have."""
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast(type, hint), value, key)
    if isinstance(hint, types.UnionType):  # TYPE | None
        return None if value is None else _value(typing.get_args(hint)[0], value, key)
    if hint is float and type(value) is int:
        return float(value)
    if hint == tuple[int, ...]:
        if isinstance(value, tuple) and all(type(item) is int for item in value):
            return tuple(_value(int, item, key) for item in value)
        shown = "a group of keys" if isinstance(value, ConfigDict) else repr(value)
        raise ConfigError(f"{key} is {shown}; a tuple of integers is due.")
    if type(value) is not hint:
        shown = "a group of keys" if isinstance(value, ConfigDict) else repr(value)
        raise ConfigError(f"{key} is {shown}; {hint.__name__} is due.")
    if hint is int and not -(2**31) <= value < 2**31:  # the step counts in 32 bits
        raise ConfigError(f"{key} is {value!r}; an integer of at most 32 bits is due.")
    return value


def _refuse(group: Any, name: str, keys: Sequence[str], why: str) -> None:
    for key in keys:
        if key in group:
            raise ConfigError(f"config.{name}.{key} is a key that nothing reads: {why}.")
