"""Every test runs on four CPU devices under JAX's strict promotion rules."""

import os

# Set before JAX starts, and inherited by the processes that tests start. JAX_PLATFORMS may be set
# to run the suite on an accelerator. NPROC sizes XLA's thread pool: with fewer cores than devices,
# all threads of the pool can wait in one collective (seen with jax 0.10.2 on two cores), so every
# device has two.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["NPROC"] = "8"

import jax
import pytest

# The programs of most tests run once: what optimisation would save is less than it takes.
jax.config.update("jax_disable_most_optimizations", True)


# The files that take longest, in their order.
LONGEST = ("train", "reversible", "identity_mappings", "models", "stochastic_depth", "docstrings")
LONGEST += (
    "readme",
    "training_mesh",
    "memory",
    "training_step",
    "stage",
    "examples",
    "gates",
    "check",
    "revvit",
)


def pytest_collection_modifyitems(items):
    """Begin with them, so that no process is left alone with one at the end."""

    def place(item):
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(autouse=True)
def keep_xla_flags(monkeypatch):
    """What a test asks in XLA_FLAGS is not asked for the programs and processes of others."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))


@pytest.fixture(autouse=True)
def optimise(request):
    """Let the programs of tests that are marked `optimised` be compiled as users have them."""
    marked = request.node.get_closest_marker("optimised") is not None
    jax.config.update("jax_disable_most_optimizations", not marked)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
