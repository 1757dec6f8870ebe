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

# The tests of what optimised programs do: their bits, and their memory.
OPTIMISED = ("conv", "coupling", "gates", "memory", "models", "recompute", "reversible")


@pytest.fixture(scope="module", autouse=True)
def compile_fast(request):
    """Compile the programs of other tests without optimisation: they run once, in the end."""
    if request.module.__name__.removeprefix("test_") in OPTIMISED:
        yield
        return
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for the processes that they start
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]


jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
