"""The convolution against `lax.conv_general_dilated` and JAX's own derivatives of it."""

# Calls with options chosen at run time, which no type checker can follow.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

import re
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from networks import COMPILE_FAST

from revjax.conv import _CHUNK_BYTES, _chunks, conv

CASES = {  # images [B, H, W, C_in], kernel [height, width, C_in, C_out], stride
    "3x3": ((2, 6, 6, 3), (3, 3, 3, 4), 1),
    "3x3 stride 2": ((2, 8, 6, 3), (3, 3, 3, 4), 2),
    "3x3 stride 2, odd images": ((2, 7, 5, 3), (3, 3, 3, 2), 2),
    "1x1": ((3, 4, 5, 3), (1, 1, 3, 4), 1),
    "1x1 stride 2": ((2, 4, 7, 3), (1, 1, 3, 4), 2),
    "2x4": ((2, 5, 6, 3), (2, 4, 3, 2), 1),
    "4x1": ((4, 5, 3, 2), (4, 1, 2, 3), 1),
    "7x7 stride 2": ((2, 10, 9, 2), (7, 7, 2, 3), 2),
    "7x7, kernel beyond the images": ((1, 3, 4, 2), (7, 7, 2, 3), 1),
    "3x2 stride 3, one channel": ((2, 8, 7, 1), (3, 2, 1, 1), 3),
}


def lax_conv(x, kernel, *, stride):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def draw(seed, *shapes, dtype: Any = np.float64):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def loss_of(convolve, stride):
    """Not linear in either operand, so that second derivatives have all their terms."""
    return lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel, stride=stride)) ** 3)


@pytest.fixture(params=[False, True], ids=["at once", "in chunks"])
def chunks(request, monkeypatch):
    """How a CPU has the kernel gradient: in chunks of one image of three, or two of more."""
    if request.param:
        monkeypatch.setattr(
            "revjax.conv._chunks", lambda images, _: images // 2 if images > 3 else images
        )


@pytest.mark.parametrize("case", CASES)
def test_value_and_derivatives_are_those_of_lax(case, chunks):
    x_shape, kernel_shape, stride = CASES[case]
    x, dx, kernel, dkernel = draw(0, x_shape, x_shape, kernel_shape, kernel_shape)

    def everything(convolve):
        loss = loss_of(convolve, stride)
        gradient = jax.grad(loss, (0, 1))

        def slope(x, kernel):
            gx, gkernel = gradient(x, kernel)
            return jnp.sum(jnp.cos(gx)) + jnp.sum(jnp.cos(gkernel))

        @partial(jax.jit, compiler_options=COMPILE_FAST)
        def evaluate(x, kernel, dx, dkernel):
            def apply(x, kernel):
                return convolve(x, kernel, stride=stride)

            return {
                "value": apply(x, kernel),
                "jvp": jax.jvp(apply, (x, kernel), (dx, dkernel))[1],
                "grad": gradient(x, kernel),
                "jvp of grad": jax.jvp(gradient, (x, kernel), (dx, dkernel))[1],
                "grad of grad": jax.grad(slope, (0, 1))(x, kernel),
            }

        return evaluate(x, kernel, dx, dkernel)

    with jax.enable_x64(True):
        ours, due = everything(conv), everything(lax_conv)
        chex.assert_trees_all_equal_shapes_and_dtypes(ours, due)
        chex.assert_trees_all_close(ours, due, rtol=1e-11, atol=1e-11)
        assert ours["value"].dtype == jnp.float64


@pytest.mark.parametrize(
    "axes", [(0, None), (3, None), (None, 0), (None, 2), (0, 0), (1, 4)], ids=str
)
def test_vmap_over_images_and_kernels(axes, chunks):
    def shape(shape, axis):
        return shape if axis is None else (*shape[:axis], 3, *shape[axis:])

    x, kernel = draw(1, shape((2, 5, 6, 2), axes[0]), shape((3, 3, 2, 4), axes[1]))

    def value_and_grad(convolve):
        one = jax.value_and_grad(loss_of(convolve, 2), (0, 1))
        return jax.jit(jax.vmap(one, axes))(x, kernel)

    with jax.enable_x64(True):
        ours, due = value_and_grad(conv), value_and_grad(lax_conv)
        chex.assert_trees_all_equal_shapes_and_dtypes(ours, due)
        chex.assert_trees_all_close(ours, due, rtol=1e-11, atol=1e-11)


def test_gradient_of_vmap_over_images():
    x, kernel = draw(2, (3, 2, 5, 5, 2), (3, 3, 2, 4))

    def gradient(convolve):
        mapped = jax.vmap(lambda x, kernel: convolve(x, kernel, stride=1), (0, None))

        def loss(x, kernel):
            return jnp.sum(jnp.sin(mapped(x, kernel)))

        return jax.jit(jax.grad(loss, (0, 1)))(x, kernel)

    with jax.enable_x64(True):
        chex.assert_trees_all_close(gradient(conv), gradient(lax_conv), rtol=1e-11, atol=1e-11)


@pytest.mark.optimised
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_narrow_types(dtype, stride):
    """Value and gradients keep the dtype, and are the float32 ones to its rounding."""
    x, kernel = draw(3, (2, 6, 6, 3), (3, 3, 3, 4), dtype=np.float32)

    def both(convolve, dtype):
        def apply(x, kernel):
            return convolve(x, kernel, stride=stride)

        y, pullback = jax.vjp(apply, jnp.asarray(x, dtype), jnp.asarray(kernel, dtype))
        return y, pullback(jnp.ones_like(y))

    ours, due = both(conv, dtype), both(lax_conv, jnp.float32)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(ours))
    ours = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), ours)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(due))
    chex.assert_trees_all_close(ours, due, rtol=0, atol=4 * scale * float(jnp.finfo(dtype).eps))


def test_many_images_in_bfloat16_are_summed_in_float32(chunks):
    x, dy = draw(7, (96, 2, 2, 3), (96, 2, 2, 4), dtype=np.float32)
    x, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)

    def gradient(x, dy):
        _, pullback = jax.vjp(lambda kernel: conv(x, kernel), jnp.zeros((3, 3, 3, 4), x.dtype))
        return pullback(dy)[0].astype(jnp.float32)

    got, due = gradient(x, dy), gradient(x.astype(jnp.float32), dy.astype(jnp.float32))
    chex.assert_trees_all_close(got, due, rtol=2**-8, atol=1e-5)


def compiled_kernel_gradient(images, shardings=(None, None)):
    """Of so many images of 32x32x16; the shardings are of images and of kernels."""
    like = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    x = like((images, 32, 32, 16), sharding=shardings[0])
    kernel = like((3, 3, 16, 16), sharding=shardings[1])

    def gradient(x, dy, kernel):
        return jax.vjp(lambda kernel: conv(x, kernel), kernel)[1](dy)

    return jax.jit(gradient).lower(x, x, kernel).compile(COMPILE_FAST)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how a CPU has the kernel gradient")
def test_memory_of_the_kernel_gradient_does_not_grow_with_the_batch():
    """Copies of all images at once would be six times as large as x."""

    def temporary(images):
        return compiled_kernel_gradient(images).memory_analysis().temp_size_in_bytes

    assert temporary(64) - temporary(32) < 2**12
    assert temporary(61) < temporary(64)  # no two equal chunks: one image at a time


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how a CPU has the kernel gradient")
def test_chunks_of_images_on_a_mesh_gather_nothing():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    shardings = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    text = compiled_kernel_gradient(128, shardings).as_text() or ""
    assert "while(" in text and "all-reduce" in text
    assert "all-gather" not in text and "all-to-all" not in text and "permute" not in text


def test_how_many_chunks():
    def chunks(images):
        return _chunks(images, [jax.ShapeDtypeStruct((images, 2**17), jnp.float32)])

    assert _CHUNK_BYTES == 8 * 4 * 2**17
    assert [chunks(n) for n in (0, 1, 8, 16, 97, 100)] == [1, 1, 1, 2, 97, 20]


def scanned_loss(convolve):
    def loss(x, kernels):
        def step(x, kernel):
            return jnp.tanh(convolve(x, kernel, stride=1)), None

        return jnp.sum(lax.scan(step, x, kernels)[0] ** 2)

    return loss


def test_inside_scan(chunks):
    x, kernels = draw(4, (2, 5, 4, 3), (4, 3, 3, 3, 3))

    def unrolled(x, kernels):
        for kernel in kernels:
            x = jnp.tanh(lax_conv(x, kernel, stride=1))
        return jnp.sum(x**2)

    with jax.enable_x64(True):
        ours = jax.jit(jax.value_and_grad(scanned_loss(conv), (0, 1)))(x, kernels)
        due = jax.jit(jax.value_and_grad(unrolled, (0, 1)))(x, kernels)
        chex.assert_trees_all_close(ours, due, rtol=1e-11, atol=1e-11)


def in_scan(convolve, pattern):
    """What the pattern finds in a compiled gradient of a scan."""
    x, kernels = draw(5, (2, 8, 8, 4), (3, 3, 3, 4, 4), dtype=np.float32)
    gradient = jax.jit(jax.grad(scanned_loss(convolve), (0, 1)))
    text = gradient.lower(x, kernels).compile().as_text()
    assert text is not None
    return set(re.findall(pattern, text))


@pytest.mark.optimised
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the layouts of XLA:CPU")
def test_operands_in_a_scan_have_the_layout_of_the_fast_kernels():
    """JAX's own gradients have another, which is the reason for this convolution."""
    fast, layout = "b01f_01io->b01f", r"dim_labels=(\S+?)[,\s]"
    assert in_scan(conv, layout) == {fast}
    assert in_scan(lax_conv, layout) > {fast}
    # The kernel gradient: a product of two matrices, pixels first.
    contracted = r"lhs_contracting_dims=\{(\d)\}, rhs_contracting_dims=\{(\d)\}"
    assert in_scan(conv, contracted) == {("0", "0")}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA:CPU evaluates again")
def test_an_activation_is_not_evaluated_again_for_the_kernel_gradient():
    """Of the two ReLUs of a block each is there for its value, and once in the recomputation."""

    def block(x, kernel):
        for _ in range(2):
            x = conv(jax.nn.relu(1.5 * x + 0.25), kernel)
        return x, None

    def loss(x, kernels):
        return jnp.sum(jax.lax.scan(jax.checkpoint(block), x, kernels)[0] ** 2)

    x = jax.ShapeDtypeStruct((32, 32, 32, 16), jnp.float32)  # the gradient is a sum over chunks
    kernels = jax.ShapeDtypeStruct((3, 3, 3, 16, 16), jnp.float32)
    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernels).compile().as_text() or ""
    assert text.count(" maximum(") == 2 + 2


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowering_elsewhere_is_that_of_lax(platform):
    """Accelerators get JAX's own convolutions, operand layouts and all; the CPU does not."""

    def convolutions(convolve):
        gradient = jax.jit(jax.grad(loss_of(convolve, 2), (0, 1)))
        shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in [(2, 7, 8, 3), (3, 3, 3, 4)])
        text = gradient.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
        lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
        numbers = [re.sub(r"%\w+", "", line).strip() for line in lines]
        return sorted(numbers), text.count("stablehlo.transpose")

    ours, due = convolutions(conv), convolutions(lax_conv)
    # The value, and a gradient for each operand: on a CPU that of the kernel is a product.
    assert len(ours[0]) == (2 if platform == "cpu" else 3)
    assert (ours == due) == (platform != "cpu")


def test_export_for_many_platforms():
    gradient = jax.jit(jax.grad(loss_of(conv, 1), (0, 1)))
    x, kernel = draw(6, (2, 5, 5, 3), (3, 3, 3, 4), dtype=np.float32)
    exported = jax.export.export(gradient, platforms=["cpu", "cuda", "tpu"])(x, kernel)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    images = jax.export.symbolic_shape("b, 5, 5, 3")
    jax.export.export(gradient)(jax.ShapeDtypeStruct(images, x.dtype), kernel)
    if jax.default_backend() == "cpu":
        due = jax.grad(loss_of(lax_conv, 1), (0, 1))(x, kernel)
        chex.assert_trees_all_close(exported.call(x, kernel), due, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "x, kernel",
    [
        ((6, 6, 3), (3, 3, 3, 4)),
        ((2, 6, 6, 3), (3, 3, 4)),
        ((2, 6, 6, 3), (3, 3, 2, 4)),
    ],
)
def test_shapes_that_do_not_fit(x, kernel):
    with pytest.raises(
        TypeError, match=r"conv takes x \[B, H, W, C_in\] and kernel .* got \("
    ) as e:
        conv(jnp.zeros(x), jnp.zeros(kernel))
    assert str(x) in str(e.value) and str(kernel) in str(e.value)


def test_dtypes_that_differ():
    with pytest.raises(TypeError, match="one floating dtype, got x float32 and kernel bfloat16"):
        conv(jnp.zeros((2, 6, 6, 3)), jnp.zeros((3, 3, 3, 4), jnp.bfloat16))
    with pytest.raises(TypeError, match="one floating dtype, got x int32 and kernel int32"):
        conv(jnp.zeros((2, 6, 6, 3), jnp.int32), jnp.zeros((3, 3, 3, 4), jnp.int32))


def test_a_stride_of_zero():
    with pytest.raises(ValueError, match="stride=0: give 1 or more"):
        conv(jnp.zeros((2, 6, 6, 3)), jnp.zeros((3, 3, 3, 4)), stride=0)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(axis_type, chunks):
    """The batch sharded, the kernel replicated: by the compiler, and by shard_map."""
    x, kernel = draw(5, (4, 6, 6, 2), (3, 3, 2, 3), dtype=np.float32)
    due = jax.grad(loss_of(lax_conv, 1), (0, 1))(x, kernel)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
        replicated = jax.device_put(kernel, NamedSharding(mesh, P()))
        got = jax.jit(jax.grad(loss_of(conv, 1), (0, 1)))(sharded, replicated)
    chex.assert_trees_all_close(jax.device_get(got), due, rtol=1e-4, atol=1e-4)

    @partial(jax.shard_map, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    def loss(x, kernel):
        return lax.psum(loss_of(conv, 1)(x, kernel), "data")

    got = jax.jit(jax.grad(loss, (0, 1)))(sharded, replicated)
    chex.assert_trees_all_close(jax.device_get(got), due, rtol=1e-4, atol=1e-4)
