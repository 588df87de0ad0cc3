"""Collective operations, counted in programs whose traffic is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from peftjax._collectives import Collective, collectives

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')


def compiled(fn, *specs):
    """The text of a program over arrays `(16, 16)`."""
    mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Auto,))
    arrays = [
        jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=NamedSharding(mesh, spec))
        for spec in specs
    ]
    whole = NamedSharding(mesh, P())
    return jax.jit(fn, out_shardings=whole).lower(*arrays).compile().as_text()


def test_a_gather_counts_what_it_gives():
    found = collectives(compiled(lambda x: x + 1, P('x')))
    assert found == [Collective('all-gather', (16 * 16 * 4,), 1)] and found[0].nbytes == 1024


def test_a_sum_counts_its_result():
    found = collectives(compiled(lambda x, w: x @ w, P(None, 'x'), P('x')))
    assert [(one.operation, one.nbytes) for one in found] == [('all-reduce', 1024)]


def test_a_loop_counts_as_often_as_it_runs():
    def nested(x, w):
        inner = lambda x, _: (jnp.tanh(x @ w), None)
        outer = lambda x, _: (jax.lax.scan(inner, x, None, length=3)[0], None)
        return jax.lax.scan(outer, x, None, length=5)[0]

    found = collectives(compiled(nested, P(None, 'x'), P('x')))
    assert sum(one.times for one in found if one.operation == 'all-reduce') == 15


def test_nothing_is_sent_by_what_stays_where_it_is():
    mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, P('x'))
    x = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=where)
    text = jax.jit(jnp.tanh, out_shardings=where).lower(x).compile().as_text()
    assert collectives(text) == []


def test_several_arrays_and_narrow_numbers():
    """As XLA writes combined, begun and nested operations."""
    text = """HloModule m
%body (p: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %g = (bf16[4]{0}, /*index=1*/f8e4m3fn[2,3]{1,0}) all-gather(%a, %b), dimensions={0}
}

%cond (p: (s32[], bf16[4])) -> pred[] {
  %c = s32[] constant(7)
}

ENTRY %main (a: f32[]) -> f32[] {
  %w = (s32[], bf16[4]{0}) while(%t), condition=%cond, body=%body
  %s = (f32[2]{0}, f32[16]{0}) all-gather-start(%x), dimensions={0}
  %d = f32[16]{0} all-gather-done(%s)
  ROOT %r = pred[5]{0} collective-permute(%y), source_target_pairs={{0,1}}
}
"""
    assert collectives(text) == [
        Collective('all-gather', (8, 6), 7),
        Collective('all-gather', (64,), 1),
        Collective('collective-permute', (5,), 1),
    ]
