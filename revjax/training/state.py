"""What a training run is at a step: all that a checkpoint must hold, and nothing else."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from revjax.models import create_model, family_of
from revjax.stage import StreamPeak
from revjax.training.config import DTYPES, Config
from revjax.training.errors import ConfigError
from revjax.training.mesh import replicated, split_over_fsdp


class Interval(NamedTuple):
    """Sums over the steps since the last logged one."""

    steps: jax.Array  # int32 []
    loss: jax.Array  # float32 [], sum over the steps of the mean over the batch
    correct: jax.Array  # int32 [], examples whose largest logit is their label's
    stream_peak: jax.Array  # float32 [], largest |stream|; 0 without a stream


class TrainState(NamedTuple):
    """The state of a run before step `step`.

    The order of the examples and the augmentation's randomness are functions of the seed and the
    step, so neither an iterator nor a key belongs here.
    """

    step: jax.Array  # int32 [], training steps done
    params: Any  # nnx.State of the model's nnx.Param
    variables: Any  # nnx.State of all else of the model: running statistics, the stream's peak
    opt_state: optax.OptState
    interval: Interval
    stream_peak: jax.Array  # float32 [], largest |stream| of all steps done
    failed_step: jax.Array  # int32 [], the step, from 1, that was not finite; 0: there is none
    skipped: jax.Array  # int32 [], steps that were left out since they were not finite


class Abstract(NamedTuple):
    """The network without its numbers."""

    train_graph: Any  # nnx.GraphDef of model.train()
    eval_graph: Any  # nnx.GraphDef of model.eval()
    # As train_graph, but nothing is drawn, and a call leaves its batch's statistics alone.
    statistics_graph: Any
    num_parameters: int
    has_stream: bool  # whether the model reports its largest |stream|
    has_statistics: bool  # whether it has BatchNorm


def build_model(config: Config) -> nnx.Module:
    """Return the config's network, its parameters drawn from the config's seed."""
    model = config.model
    info = config.data.info
    options: dict[str, Any] = {}
    if family_of(model.name) != "resnet":
        options["grid_bits"] = model.grid_bits
        options["store_last"] = None if model.store_last == -1 else model.store_last
    if family_of(model.name) == "revvit":
        options["image_size"] = info.image_shape[0]
    return create_model(
        model.name,
        info.num_classes,
        rngs=nnx.Rngs(config.seed),
        in_channels=info.image_shape[-1],
        backward=model.backward,
        unroll=model.unroll or 1,
        dtype=DTYPES[model.dtype],
        units=model.units,
        filters=model.filters,
        bottleneck=model.bottleneck,
        depth=model.depth,
        width=model.width,
        heads=model.heads,
        patch=model.patch,
        placement=model.placement,
        shortcut=model.shortcut,
        conventions=model.conventions,
        stochastic_depth=model.stochastic_depth,
        **options,
    )


def abstract_model(config: Config) -> Abstract:
    """Trace the network on one batch, so that one that cannot be built is refused early.

    Nothing is compiled and no array is made.

    Raises:
        ConfigError: for what the model or its units refuse, in their words.
    """
    image_shape = config.data.info.image_shape
    images = jax.ShapeDtypeStruct((config.batch_size, *image_shape), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        model = nnx.eval_shape(lambda: build_model(config))
        nnx.eval_shape(lambda model, images, key: model(images, key=key), model, images, key)
    except ValueError as error:
        raise ConfigError(f"config.model: {error}") from error
    model.train()
    train_graph, params, variables = nnx.split(model, nnx.Param, ...)
    model.eval()
    eval_graph = nnx.graphdef(model)
    model.set_attributes(deterministic=True, use_running_average=False, raise_if_not_found=False)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.momentum = 0.0  # averages become those of the last batch
    return Abstract(
        train_graph=train_graph,
        eval_graph=eval_graph,
        statistics_graph=nnx.graphdef(model),
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        has_stream=bool(jax.tree.leaves(nnx.filter_state(variables, StreamPeak))),
        has_statistics=bool(jax.tree.leaves(nnx.filter_state(variables, nnx.BatchStat))),
    )


def initial_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step; a function of the config alone."""
    model = build_model(config)
    model.train()
    _, params, variables = nnx.split(model, nnx.Param, ...)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        variables=variables,
        opt_state=optimizer.init(params),
        interval=Interval(jnp.int32(0), jnp.float32(0), jnp.int32(0), jnp.float32(0)),
        stream_peak=jnp.float32(0),
        failed_step=jnp.int32(0),
        skipped=jnp.int32(0),
    )


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """Where a state, which may be abstract, lies on a mesh: a sharding for each leaf."""
    whole = replicated(mesh)
    return jax.tree.map(lambda _: whole, state)._replace(
        params=split_over_fsdp(mesh, state.params),
        opt_state=split_over_fsdp(mesh, state.opt_state),
    )


def draw(initial: Callable[[], TrainState], mesh: Mesh) -> TrainState:
    """Return `initial()`, laid out on the mesh, as one program compiled without optimisation.

    It runs once, and XLA:CPU needs seconds to optimise the random numbers of every kernel.
    """
    return jax.jit(
        initial,
        compiler_options={"xla_backend_optimization_level": 0},
        out_shardings=state_shardings(mesh, jax.eval_shape(initial)),
    )()
