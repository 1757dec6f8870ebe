"""What is read from compiled programs is what was written into them."""

import jax
import jax.numpy as jnp
import pytest
from collectives import Array, Collective, read_collectives
from jax.sharding import PartitionSpec as P


@pytest.fixture(scope="module")
def exchange():
    """A program for four devices whose collectives are written out."""
    mesh = jax.make_mesh((4,), ("i",))

    def body(x, y):
        def advance(x, _):
            return jax.lax.psum(x.T @ x, "i") @ x.T @ x @ x.T, None

        x, _ = jax.lax.scan(advance, x.T, length=5)
        whole = jax.lax.all_gather(y, "i", tiled=True)
        return x[:8] + jax.lax.psum_scatter(whole @ whole.T, "i", tiled=True).sum(), whole.sum()

    def program(x, y):
        shared = jax.shard_map(
            body, mesh=mesh, in_specs=P("i"), out_specs=(P("i"), P()), check_vma=False
        )
        return shared(x, y)

    split = jax.NamedSharding(mesh, P("i"))
    x = jax.ShapeDtypeStruct((12, 3), jnp.float32, sharding=split)
    y = jax.ShapeDtypeStruct((32, 7), jnp.float32, sharding=split)
    return jax.jit(program).lower(x, y).compile().as_text()


def test_loops_are_multiplied_out(exchange):
    summed = [found for found in read_collectives(exchange) if found.kind == "all-reduce"]
    assert summed == [Collective("all-reduce", (Array("f32", (3, 3)),), 5)]


def test_what_is_outside_of_loops_counts_once(exchange):
    others = [found for found in read_collectives(exchange) if found.kind != "all-reduce"]
    assert set(others) == {
        Collective("all-gather", (Array("f32", (32, 7)),), 1),
        Collective("reduce-scatter", (Array("f32", (8, 32)),), 1),
    }


def test_bytes():
    assert Array("bf16", (3, 5)).bytes == 30
    assert Array("f32", ()).bytes == 4
    assert Array("pred", (7,)).bytes == 7
    assert Array("f8e4m3fn", (7,)).bytes == 7


def test_forms_of_other_compilers():
    """Of a TPU's: lengths that are said, and operations that begin here, go on and end there."""
    length = 'backend_config={"known_trip_count":{"n":"6"}}'
    text = """HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = (f32[8]{0:T(256)}, bf16[1,2]{1,0:T(2,128)(2,1)S(1)}) all-reduce-start(%x, %y), to_apply=%add
  %f = f32[8]{0} fusion(%x), kind=kCustom, calls=%goes_on
  ROOT %d = (f32[8]{0}, bf16[1,2]{1,0}) all-reduce-done(%r)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  ROOT %more = pred[] custom-call(%p)
}

%fused (p: f32[4]) -> f32[8] {
  ROOT %g = (f32[4]{0}, f32[8]{0}) all-gather-start(%p), channel_id=2, dimensions={0}
}

%goes_on (p: f32[4]) -> f32[8] {
  ROOT %h = f32[8]{0} all-gather(%p), channel_id=2, dimensions={0}
}

ENTRY %main (x: f32[4]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%condition, body=%body, LENGTH
  %f = f32[8]{0} fusion(%x), kind=kCustom, calls=%fused
  ROOT %c = (f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=1
}
"""
    assert read_collectives(text.replace("LENGTH", length)) == [
        Collective("collective-permute", (Array("f32", (2,)),), 1),
        Collective("all-reduce", (Array("f32", (8,)), Array("bf16", (1, 2))), 6),
        Collective("all-gather", (Array("f32", (8,)),), 1),
    ]
