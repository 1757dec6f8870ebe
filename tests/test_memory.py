"""memory_report on functions whose needs are known, and the bounds that the networks hold."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import COMPILE_FAST

import revjax
from revjax import MemoryReport, memory_report
from revjax.conv import conv
from revjax.memory import __main__ as command
from revjax.memory.network import abstract_network, largest_batch, training_step, usual_image
from revjax.models import ARCHITECTURES, Architecture, Transformer
from revjax.reversible import Backward

pytestmark = pytest.mark.optimised
FAST = COMPILE_FAST  # the figures are the same


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def product(a, b):
    return a @ b


def test_a_matrix_product():
    report = memory_report(product, struct(10, 20), struct(20, 30))
    assert report.argument_bytes == 4 * (10 * 20 + 20 * 30)
    assert report.output_bytes == 4 * 10 * 30
    assert report.operations == 2 * 10 * 20 * 30
    assert report.peak_bytes == sum(report[:3])
    assert report.compile_seconds > 0


def test_arrays_are_as_good_as_structs():
    a = jnp.ones((4, 4))
    assert (
        memory_report(product, a, a)[:5] == memory_report(product, struct(4, 4), struct(4, 4))[:5]
    )


def test_nothing_is_allocated():
    side = 2**20  # 4 TiB a matrix
    assert (
        memory_report(product, struct(side, side), struct(side, side)).output_bytes == 4 * side**2
    )


def test_temporaries_are_what_must_be_kept():
    """sin(sin(...)) by its gradient: the inputs of the cosines."""

    def loss(x):
        for _ in range(8):
            x = jnp.sin(x @ x)
        return x.sum()

    report = memory_report(jax.grad(loss), struct(256, 256))
    assert 7 <= report.temporary_bytes / (4 * 256**2) <= 20


def test_donated_arguments_count_once():
    def add_one(x):
        return x + 1

    donated = memory_report(jax.jit(add_one, donate_argnums=0), struct(1000))
    assert (donated.peak_bytes, donated.output_bytes) == (4000, 4000)
    assert memory_report(add_one, struct(1000)).peak_bytes == 8000


def test_operations_of_loops_and_branches():
    def scanned(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0]

    def branch(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ x, x)

    one, x = 2 * 8**3, struct(8, 8)
    assert memory_report(scanned, x).operations == 7 * one
    assert memory_report(jax.jit(scanned), x).operations == 7 * one
    assert memory_report(branch, struct(dtype=jnp.bool_), x).operations == 2 * one
    assert memory_report(jax.vmap(scanned), struct(3, 8, 8)).operations == 3 * 7 * one


@pytest.mark.parametrize("stride", [1, 2])
def test_operations_of_a_convolution_and_its_gradients(stride):
    def ours(x, kernel):
        return conv(x, kernel, stride=stride)

    def jaxs(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=layout
        )

    x, kernel = struct(2, 8, 8, 3), struct(3, 3, 3, 5)
    forward = 2 * (2 * (8 // stride) ** 2 * 5) * 9 * 3
    for function in (ours, jaxs):
        assert memory_report(function, x, kernel).operations == forward

        def loss(x, kernel, function=function):
            return jnp.sin(function(x, kernel)).sum()

        gradient = jax.grad(loss, argnums=(0, 1))
        assert memory_report(gradient, x, kernel).operations == 3 * forward


def test_a_reversible_chain_evaluates_each_function_twice():
    """Forward 1, reconstruction 1, derivative 2; stored activations spare the second."""

    def dense(w, x):
        return jnp.tanh(x @ w)

    operations = {}
    ways: tuple[Backward, ...] = ("reversible", "store")
    for backward in ways:

        def loss(w, x, backward: Backward = backward):
            y1, y2 = revjax.rev_chain_apply(dense, dense, (w, w), x, backward=backward)
            return (y1 * y2).sum()

        gradient = jax.grad(loss, argnums=(0, 1))
        report = memory_report(gradient, struct(50, 16, 16), (struct(4, 16), struct(4, 16)))
        operations[backward] = report.operations / (2 * 50 * 2 * 4 * 16 * 16)
    assert operations == {"reversible": 4, "store": 3}


def test_topologies():
    here = memory_report(product, struct(8, 8), struct(8, 8), topology="cpu")
    assert here[:5] == memory_report(product, struct(8, 8), struct(8, 8))[:5]
    key = jax.random.key(0)
    assert memory_report(jax.random.normal, key, topology="cpu").output_bytes == 4
    with pytest.raises(
        ValueError, match=r'topology="?\'?moon.*"cpu", "gpu" or "tpu".*"h100".*"v5e:2x2"'
    ):
        memory_report(product, struct(8, 8), struct(8, 8), topology="moon")


@pytest.mark.parametrize(
    "topology, package, install",
    [("h100", "jax_cuda13_plugin", r"jax\[cuda13\]"), ("v5e:2x2", "libtpu", r"revjax\[tpu-aot\]")],
)
def test_a_compiler_that_is_absent_is_named(monkeypatch, topology, package, install):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=f"to compile for .*{install}"):
        memory_report(product, struct(8, 8), struct(8, 8), topology=topology)


def test_a_compiler_that_another_process_has_is_named(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("ABORTED: Internal error when accessing libtpu multi-process lockfile.")

    for name in ("TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.setenv(name, "")  # to be undone: the library sets them
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    with pytest.raises(RuntimeError, match="wait for the process that uses libtpu"):
        memory_report(product, struct(8, 8), struct(8, 8), topology="v5e:2x2")


@pytest.mark.parametrize("available", [0, 99, 100, 1_000, 123_456, 10**9])
@pytest.mark.parametrize("known", [None, {100: 2_100}])
def test_largest_batch(available, known):
    asked = []

    def peak(batch):
        asked.append(batch)
        return 100 + 20 * batch + batch % 7  # nearly affine

    found = largest_batch(peak, available, known)
    due = max((b for b in range(6_200) if 100 + 20 * b + b % 7 <= available), default=0)
    if available < 10**9:
        assert due - max(1, due // 100) <= found <= max(due, 0)
    assert not found or peak(found) <= available < peak(found + max(1, found // 100) + 1)
    assert len(asked) <= 12


def test_largest_batch_where_parameters_are_most_of_it():
    """One image less than fits is more than 1% of the batch, and hardly anything of the memory."""
    assert 198 <= largest_batch(lambda batch: 10**6 + 20 * batch, 10**6 + 4_000) <= 200


def test_largest_batch_where_the_compiler_refuses():
    """As that for TPUs refuses a program that does not fit."""

    def peak(batch):
        return 100 + 20 * batch if batch <= 1000 else float("inf")

    for known in (None, {4000: float("inf")}, {100: 2100}):
        assert 980 <= largest_batch(peak, 10**9, known) <= 1000


def test_one_more_program_says_the_largest_batch():
    """To 4%, if the peak at a good guess is known, and what is there at every batch is not much."""
    asked = []

    def peak(batch):
        asked.append(batch)
        return 50 + 20 * batch

    assert 4_700 <= largest_batch(peak, 10**5, {3_000: 60_050}, tolerance=0.04) <= 4_998
    assert len(asked) == 1


def test_no_argument_for_a_topology():
    with pytest.raises(ValueError, match="topology='cpu': the device goes with the arguments"):
        memory_report(lambda: jnp.zeros(3), topology="cpu")


# Networks ---------------------------------------------------------------------------------------


def bytes_of_step(name, backward, batch, **options):
    network = abstract_network(name, backward, "float32", num_classes=10, **options)
    step, operands = training_step(network, batch, usual_image(name))
    return memory_report(step, *operands, compiler_options=FAST)


@pytest.mark.slow
def test_revnet110_needs_little():
    """A whole training step: 1/14 of stored, 1/3.5 of remat, 1.3 of the operations."""
    found = {way: bytes_of_step("revnet110", way, 100) for way in ("store", "remat", "reversible")}
    temporary = {way: report.temporary_bytes for way, report in found.items()}
    assert temporary["reversible"] < temporary["store"] / 14
    assert temporary["reversible"] < temporary["remat"] / 3.5
    assert found["reversible"].operations < 1.3 * found["store"].operations
    none = bytes_of_step("revnet110", "reversible", 100, store_last=0)
    assert none.operations < 1.34 * found["store"].operations


@pytest.mark.parametrize(
    "name, batch, unroll",
    [
        ("revnet38", 64, 1),
        pytest.param("revnet38", 64, True, marks=pytest.mark.slow),
        pytest.param("revnet110", 100, 1, marks=pytest.mark.slow),
        pytest.param("revnet164", 32, 1, marks=pytest.mark.slow),
        pytest.param("revnet56", 16, 1, marks=pytest.mark.slow),
        pytest.param("revnet104", 16, 1, marks=pytest.mark.slow),
    ],
)
def test_units_that_store_cost_no_memory(name, batch, unroll):
    """Before the peak, in stage 1, their activations are gone."""
    stored, none = (
        bytes_of_step(name, "reversible", batch, store_last=n, unroll=unroll) for n in (None, 0)
    )
    assert stored.temporary_bytes < 1.03 * none.temporary_bytes
    assert stored.operations < 0.985 * none.operations


def test_a_deeper_network_needs_parameters_alone(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "revnet38", Architecture((2,), (16, 16)))
    shallow, deep = (
        bytes_of_step("revnet38", "reversible", 100, times_deeper=times) for times in (2, 6)
    )
    more_arguments = deep.argument_bytes - shallow.argument_bytes  # parameters, momentum, averages
    growth = deep.temporary_bytes - shallow.temporary_bytes - more_arguments / 2
    assert growth <= 0.01 * shallow.temporary_bytes


def test_command(capsys, monkeypatch):
    """As it is, for a small network."""
    monkeypatch.setitem(ARCHITECTURES, "resnet32", Architecture((2,), (4, 4)))
    arguments = ["--model", "resnet32", "--batch", "2", "--image", "8", "--backward", "remat"]
    assert command.main([*arguments, "--dtype", "bfloat16"]) == 0
    first, _, header, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("resnet32, batch 2, 8x8, bfloat16, compiled for cpu by JAX")
    assert header.split() == ["remat"]
    assert [re.split("  +", row)[0] for row in rows] == [
        "stage 1 alone, temporary MB",
        "training step, temporary MB",
        "its arguments, MB",
        "its peak, MB",
        "its operations, 10^9",
        "time to compile, s",
    ]


@pytest.mark.slow
def test_command_of_a_transformer(capsys, monkeypatch):
    """At another size of the images, and deeper; a size that patches do not divide is refused."""
    monkeypatch.setitem(ARCHITECTURES, "revvit_small", Transformer(1, 8, 2))
    arguments = ["--model", "revvit_small", "--batch", "2", "--backward", "reversible"]
    assert command.main([*arguments, "--image", "32", "--deeper", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("revvit_small with 2 times its units, batch 2, 32x32, float32, compiled")
    assert "stage 1 alone" in out
    end = command.main([*arguments, "--image", "40"])
    assert str(end).startswith("revjax.memory: image_size=40 and patch=16: give a patch that")


def test_classes_of_the_command(capsys, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "resnet32", Architecture((1,), (4, 64)))
    arguments = ["--model", "resnet32", "--batch", "2", "--image", "8", "--backward", "store,store"]
    found = []
    for classes in (10, 1_010):
        assert command.main([*arguments, "--whole", "--classes", str(classes)]) == 0
        (row,) = [row for row in capsys.readouterr().out.splitlines() if "arguments" in row]
        found += [float(cell) for cell in row.split()[3:]]
    assert len(found) == 2  # a way that is named twice is one
    # A kernel and a bias, and their momenta, for each class.
    np.testing.assert_allclose(found[1] - found[0], 2 * 1_000 * 65 * 4 / 1e6, atol=0.11)


def test_a_training_step_takes_its_state_in_place():
    network = abstract_network("resnet32", "store", "float32", num_classes=10)
    step, operands = training_step(network, 2, 8)
    report = memory_report(step, *operands, compiler_options=FAST)
    apart = report.argument_bytes + report.output_bytes + report.temporary_bytes
    assert report.peak_bytes < apart - 0.9 * report.output_bytes


@pytest.mark.parametrize(
    "name, way, batch, memory, operations",
    [("resnet32", "remat", 16, 1 / 2.6, 1.15), ("revnet38", "reversible", 64, 1 / 4.6, 1.2)],
)
def test_all_is_recomputed(name, way, batch, memory, operations):
    """The units that change shape and the stem, too, of which each would be enough to see."""
    found, store = (bytes_of_step(name, each, batch) for each in (way, "store"))
    assert found.temporary_bytes < memory * store.temporary_bytes
    assert found.operations > operations * store.operations


def test_largest_batch_on_a_tpu_is_one_that_it_pads_to(capsys, monkeypatch):
    def padded(step, state, images, *rest, **options):
        batch = jax.tree.leaves(images)[0].shape[0]
        return MemoryReport(0, 0, 0, 10**7 + 785_920 * (-(-batch // 128) * 128), 0, 0.0)

    monkeypatch.setitem(ARCHITECTURES, "revnet38", Architecture((1,), (4, 4)))
    monkeypatch.setattr(command, "memory_report", padded)
    monkeypatch.setattr(command, "find_device", lambda topology: None)
    flags = ["--model", "revnet38", "--whole", "--backward", "store", "--topology", "v5e:2x2"]
    assert command.main([*flags, "--fits", "1430800308"]) == 0
    (row,) = [row for row in capsys.readouterr().out.splitlines() if row.startswith("largest")]
    assert row.split()[-1] == "1,792"


@pytest.mark.slow
def test_largest_batch_and_plot(capsys, monkeypatch, tmp_path):
    """Of all ways, with compiling replaced by a formula."""

    def formula(step, state, images, *rest, **options):
        batch = jax.tree.leaves(images)[0].shape[0]
        return MemoryReport(0, 0, 0, 100 + 20 * batch, 0, 0.0)

    monkeypatch.setitem(ARCHITECTURES, "revnet38", Architecture((1,), (4, 4)))
    monkeypatch.setattr(command, "memory_report", formula)
    plot = tmp_path / "plot.png"
    arguments = ["--model", "revnet38", "--fits", "1MiB", "--plot", str(plot), "--whole"]
    assert command.main([*arguments, "--deeper", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("revnet38 with 3 times its units, batch 100, 32x32, float32, compiled")
    assert "stage" not in out
    due = (2**20 - 100) // 20
    (row,) = [row.split() for row in out.splitlines() if row.startswith("largest")]
    assert all(0.99 * due <= int(cell.replace(",", "")) <= due for cell in row[-3:])
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "resnet32", "--backward", "reversible"], "resnet32 has store, remat, not"),
        (["--model", "vgg"], "invalid choice: 'vgg'"),
        (["--model", "revnet38", "--fits", "16XB"], "'16XB' is no size: give one such as 16GB"),
        (["--model", "revnet38", "--fits", "1.2.3GB"], "'1.2.3GB' is no size: give one such as"),
        (["--model", "revnet38", "--fits", "0GB"], "'0GB' is no size: give one such as"),
        (["--model", "revnet38", "--plot", "p.xyz"], "p.xyz is no .png"),
        (["--model", "revnet38", "--batch", "0"], "'0' is no positive integer"),
        (["--model", "revnet38", "--store_last", "-1"], "'-1' is no integer from 0"),
        (
            ["--model", "resnet32", "--store_last", "1"],
            "store_last=1: no way of store, remat stores; leave",
        ),
        (["--model", "revnet38", "--plot", "nowhere/p.png"], "there is no folder nowhere"),
        (["--model", "revnet38", "--plot", "folder.png"], "folder.png is a folder; name a file"),
    ],
)
def test_command_refuses(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    with pytest.raises(SystemExit):
        command.main(flags)
    assert message in capsys.readouterr().err


def test_command_ends_with_a_sentence():
    end = command.main(["--model", "revnet38", "--topology", "moon"])
    assert str(end).startswith("revjax.memory: topology='moon': give")
    end = command.main(["--model", "revnet38", "--store_last", "8"])
    assert str(end).startswith("revjax.memory: store_last=8: give a number from 0 to 7")
    end = command.main(["--model", "revnet38", "--topology", "tpu"])
    assert str(end).endswith('its own is cpu; "h100" and "v5e:2x2", say, need not be there.')
    with pytest.raises(TypeError, match="compiler_options=3: give a dict"):
        memory_report(jnp.sin, jnp.ones(2), compiler_options=3)  # pyright: ignore[reportArgumentType]


def test_networks_are_never_made():
    network = abstract_network("revnet104", "reversible", "bfloat16", num_classes=1000)
    leaves = jax.tree.leaves(nnx.state(network))
    assert leaves
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
