"""The site table: kinds, axes, biases, what is unused; how targets find sites."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from applies import APPLIES
from jax.ad_checkpoint import checkpoint_name
from zoo import normal

import peftjax as pj
from peftjax import _paths


def sites_of(name: str) -> pj.Sites:
    case = APPLIES[name]
    return pj.sites(case.fn, case.params, *case.args, **case.kwargs)


def model(params, tokens):
    """A lookup, positions, an RMS norm, a linear layer with a gate, and a head without."""
    x = params['embed']['table'][tokens] + params['embed']['positions'][None]
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True)) * (1 + params['norm']['scale'])
    up, head = params['up'], params['head']
    h = checkpoint_name(x @ up['kernel'] + up['bias'], 'hidden')
    return (jnp.tanh(h) * up['gate']) @ head['kernel'] / head['temperature']


PARAMS = {
    'embed': {'positions': normal(0, 3, 4), 'table': normal(1, 7, 4)},
    'head': {'kernel': normal(2, 5, 6), 'temperature': normal(3)},
    'norm': {'scale': normal(4, 4)},
    'spare': {'kernel': normal(5, 4, 4)},
    'up': {'bias': normal(6, 5), 'gate': normal(7, 5), 'kernel': normal(8, 4, 5)},
}
TOKENS = jnp.zeros((2, 3), jnp.int32)


def test_the_table_reads_well():
    assert str(pj.sites(model, PARAMS, TOKENS)).splitlines() == [
        'path              kind       shape   axes          bias     path taken',
        'embed/positions   bias       3×4                            efficient',
        'embed/table       embedding  7×4     in[0] out[1]           efficient',
        'head/kernel       linear     5×6     in[0] out[1]           efficient',
        'head/temperature  scale      scalar                         efficient',
        'norm/scale        scale      4                              efficient',
        'up/bias           bias       5                              efficient',
        'up/gate           scale      5                              efficient',
        'up/kernel         linear     4×5     in[0] out[1]  up/bias  efficient',
        '@hidden           named      5       out[0]                 efficient',
        'unused: spare/kernel',
    ]


def test_a_vmapped_model_has_the_same_sites():
    one = jax.vmap(lambda params, tokens: model(params, tokens[None])[0], (None, 0))
    table = pj.sites(one, PARAMS, TOKENS)
    kinds = {site.path: site.kind for site in pj.sites(model, PARAMS, TOKENS)}
    assert {site.path: site.kind for site in table} == kinds


def test_the_plan_reads_well():
    method = pj.Lora(rank=2, target=r'table|kernel')
    assert str(pj.attach(method, model, PARAMS, TOKENS)).splitlines() == [
        'method  path         kind       weight  phi           count  path taken',
        'Lora    embed/table  embedding  7×4     a 7×2, b 2×4  22     efficient',
        'Lora    head/kernel  linear     5×6     a 5×2, b 2×6  22     efficient',
        'Lora    up/kernel    linear     4×5     a 4×2, b 2×5  18     efficient',
        'total: 62 trained, 51.2 % of 121',
        'Lora passes over what its target finds: 1 unused (spare/kernel)',
    ]


def test_what_a_target_finds_and_a_method_cannot_adapt_is_listed():
    def two_layers(params, x):
        return (x @ params['a']['kernel'] + params['a']['bias']) @ params['b']['kernel']

    kernel, x = jnp.ones((2, 2)), jnp.ones((1, 2))
    params = {'a': {'kernel': kernel, 'bias': jnp.zeros(2)}, 'b': {'kernel': kernel}}
    method = pj.chain(x=pj.Lora(rank=1, target='a/|b/'), y=pj.Lora(rank=1, target='b/kernel'))
    peft = pj.attach(method, two_layers, params, x)
    assert peft.passed == ((('a/bias', 'bias'),), ())
    assert str(peft).splitlines()[-1] == ('Lora passes over what its target finds: 1 bias (a/bias)')


@pytest.mark.parametrize(
    'name, kind, stack, inputs, outputs',
    [
        ('plain', 'linear', (), (0,), (1,)),
        ('transposed', 'linear', (), (1,), (0,)),
        ('index_traced', 'linear', (0,), (1,), (2,)),
        ('reshaped', 'linear', (), (1,), (0,)),
        ('einsum_first', 'linear', (), (1,), (0,)),
        ('einsum_heads_out', 'linear', (), (0,), (1, 2)),
        ('einsum_heads_in', 'linear', (), (0, 1), (2,)),
        ('einsum_heads_apart', 'linear', (), (0, 2), (1,)),
        ('broadcast', 'linear', (), (0,), (1,)),
        ('experts', 'expert', (0,), (1,), (2,)),
        ('experts_first', 'expert', (1,), (2,), (0,)),
        ('ragged', 'expert', (0,), (1,), (2,)),
        ('conv_nhwc', 'convolution', (), (0, 1, 2), (3,)),
        ('conv_nchw', 'convolution', (), (1, 2, 3), (0,)),
        ('gather', 'embedding', (), (0,), (1,)),
        ('take_columns', 'embedding', (), (1,), (0,)),
        ('lookup_vmapped', 'embedding', (), (0,), (1,)),
        ('lookup_ensemble', 'embedding', (0,), (1,), (2,)),
        ('scan_xs', 'linear', (0,), (1,), (2,)),
        ('scan_nested', 'linear', (0, 1), (2,), (3,)),
        ('linen_scan_axis_1', 'linear', (1,), (0,), (2,)),
        ('inner_jit', 'linear', (), (1,), (0,)),
        ('while_loop', 'linear', (), (0,), (1,)),
        ('shard_map_rows', 'linear', (), (0,), (1,)),
    ],
)
def test_axes_come_from_the_trace(name, kind, stack, inputs, outputs):
    site = next(site for site in sites_of(name) if site.kind not in ('bias', 'scale'))
    assert (site.kind, site.stack, site.inputs, site.outputs) == (kind, stack, inputs, outputs)
    assert not site.dense


@pytest.mark.parametrize(
    'name, kind, why',
    [
        ('concatenated', 'other', 'enters concatenate'),
        ('scaled', 'linear', 'enters mul'),
        ('reshaped_mixing', 'linear', 'axis 0 is split between input and output'),
        ('scan_carry_changed', 'other', 'enters scan'),
        ('custom_jvp_of_weight', 'linear', 'inside custom_jvp_call'),
        ('custom_vjp_of_weight', 'linear', 'inside custom_vjp_call'),
    ],
)
def test_what_is_dense_says_why(name, kind, why):
    site, *_ = sites_of(name)
    assert (site.kind, site.dense) == (kind, why)


def test_a_tied_weight_is_two_sites():
    first, second = sites_of('tied')
    assert (first.path, first.kind, first.inputs) == ('w', 'embedding', (0,))
    assert (second.path, second.kind, second.inputs) == ('w', 'linear', (1,))
    assert first.shared and second.shared


def test_a_use_that_tells_the_axes_comes_before_one_that_does_not():
    def fn(params, x):
        norm = jnp.exp(params['w']).sum()
        return (params['w'] @ x) / norm

    known, unknown = pj.sites(fn, {'w': normal(0, 6, 4)}, normal(1, 4))
    assert (known.kind, known.inputs, unknown.kind) == ('linear', (1,), 'other')


def test_biases_of_stacked_and_split_layers_are_found():
    assert {site.path: site.bias for site in sites_of('linen_attention') if site.bias} == {
        f'{name}/kernel': (f'{name}/bias',) for name in ('key', 'out', 'query', 'value')
    }
    (down, up) = (site for site in sites_of('scan_stacked') if site.kind == 'linear')
    assert (down.bias, up.bias) == ((), ('layers/up/b',))


def test_a_leaf_of_another_module_is_no_bias():
    def fn(p, x):
        return x @ p['one']['w'] + p['two']['b'][None]

    params = {'one': {'w': normal(0, 6, 4)}, 'two': {'b': normal(1, 4)}}
    (linear,) = (site for site in pj.sites(fn, params, normal(2, 3, 6)) if site.kind == 'linear')
    assert linear.bias == ()


LOOKED_UP = {
    'nothing': (lambda rows, p: rows, 1),
    'a number': (lambda rows, p: rows * 2.5, 2.5),
    'an array that is known': (lambda rows, p: jnp.float32(3) * rows, 3),
    'after a cast': (lambda rows, p: rows.astype(jnp.bfloat16) * jnp.bfloat16(7**0.5), 2.640625),
    'divided': (lambda rows, p: rows / 4, 0.25),
    'divides': (lambda rows, p: 4 / rows, None),
    'later': (lambda rows, p: jnp.tanh(rows) * 4, 1),
    'a leaf': (lambda rows, p: rows * p['norm']['scale'], None),
    'numbers': (lambda rows, p: rows * jnp.arange(4.0), None),
    'itself': (lambda rows, p: rows * rows, None),
    'two numbers': (lambda rows, p: rows * 2 + p['embed']['table'][TOKENS] * 3, None),
    'one number twice': (lambda rows, p: rows * 2 + p['embed']['table'][TOKENS] * 2, 2),
}


@pytest.mark.parametrize('name', LOOKED_UP)
def test_what_is_looked_up_may_be_multiplied_at_once(name):
    times, scale = LOOKED_UP[name]
    table = pj.sites(lambda p, i: times(jnp.take(p['embed']['table'], i, 0), p), PARAMS, TOKENS)
    scales = {site.path: site.scale for site in table}
    assert scales.pop('embed/table') == scale and set(scales.values()) <= {None}


def test_named_values_know_their_layers():
    def block(x, w):
        return checkpoint_name(x @ w, 'hidden'), None

    def fn(w, x):
        return checkpoint_name(jax.lax.scan(block, x, w)[0], 'last')

    named = [
        site for site in pj.sites(fn, normal(0, 3, 4, 4), normal(1, 2, 4)) if site.kind == 'named'
    ]
    assert [(site.path, site.shape, site.stack) for site in named] == [
        ('@hidden', (3, 4), (0,)),
        ('@last', (4,), ()),
    ]


def test_paths_of_frameworks_read_alike():
    assert [site.path for site in sites_of('nnx_split_merge')][:3] == [
        'embed/embedding',
        'head/bias',
        'head/kernel',
    ]
    assert 'mlp/~/linear_0/w' in [site.path for site in sites_of('haiku')]
    assert [site.path for site in sites_of('tuple_params')] == ['0', '1']
    assert [site.path for site in sites_of('single_array')] == ['']
    assert [site.path for site in sites_of('equinox') if site.kind == 'linear'] == [
        'layers/0/weight',
        'layers/2/weight',
    ]


class Attention(NamedTuple):
    query: Any
    key: Any
    value: Any


class Boxed(NamedTuple):
    value: Any


def test_an_attribute_named_value_is_a_name_where_it_has_others_beside_it():
    fn = lambda p, x: sum((x @ leaf for leaf in jax.tree.leaves(p)), jnp.zeros(()))
    paths = lambda params: [site.path for site in pj.sites(fn, params, normal(4, 2, 4))]
    weights = Attention(normal(1, 4, 4), normal(2, 4, 4), normal(3, 4, 4))
    named = ['query', 'key', 'value']
    assert paths(weights) == named
    assert paths({'attn': weights}) == [f'attn/{name}' for name in named]
    # what is not there is beside it too: a part of a tree has the names of the whole
    assert paths({'attn': weights._replace(query=None, key=())}) == ['attn/value']
    assert paths({'attn': Attention(*map(Boxed, weights))}) == [f'attn/{name}' for name in named]
    assert paths(Boxed(weights.value)) == ['value']
    peft = pj.attach(pj.Lora(rank=2, target='value'), fn, {'attn': weights}, normal(4, 2, 4))
    phi = jax.tree.map(lambda leaf: leaf + 0.3, peft.init(jax.random.key(0), {'attn': weights}))
    merged = peft.merge({'attn': weights}, phi)['attn']
    assert [bool((a == b).all()) for a, b in zip(merged, weights, strict=True)] == [1, 1, 0]


def test_boxes_of_frameworks_add_nothing_to_a_path():
    linen, nnx = pytest.importorskip('flax.linen'), pytest.importorskip('flax.nnx')
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert sorted(_paths.leaves({'value': state})) == ['value/bias', 'value/kernel']
    boxed = {'kernel': linen.Partitioned(normal(0, 2, 3), ('in', 'out'))}
    assert sorted(_paths.leaves(boxed)) == ['kernel']


# Targets ------------------------------------------------------------------------------------------


def attach(target, method=pj.Lora):
    return pj.attach(method(rank=2, target=target), model, PARAMS, TOKENS)


def adapted(target) -> list[str]:
    return [site.path for site in attach(target).sites[0]]


def test_a_target_is_searched_in_paths():
    assert adapted('kernel') == ['head/kernel', 'up/kernel']
    assert adapted(('up', '^embed/table$')) == ['embed/table', 'up/kernel']


def test_a_pattern_that_finds_nothing_names_the_nearest_five():
    with pytest.raises(ValueError) as caught:
        attach('query_kernel')
    text = str(caught.value)
    assert text.startswith("no site matches target='query_kernel'. Nearest: ")
    assert text.endswith('(9 sites; print(pj.sites(...)) lists them)')
    named = text.partition('Nearest: ')[2].partition(' (')[0].split(', ')
    assert len(named) == 5
    assert {"'head/kernel'", "'up/kernel'"} <= set(named)


def test_each_of_several_patterns_must_find_something():
    with pytest.raises(ValueError, match="no site matches target='v_proj'"):
        attach(('kernel', 'v_proj'))


def test_a_pattern_that_finds_only_what_the_method_cannot_adapt_says_so():
    with pytest.raises(ValueError, match=r"'norm' finds only 'norm/scale' \(scale\)"):
        attach(('kernel', 'norm'))


def test_a_pattern_that_finds_only_what_is_unused_says_so():
    with pytest.raises(ValueError, match="It finds 'spare/kernel', which the traced call does not"):
        attach('spare')


def test_a_list_of_patterns_is_a_tuple_of_them():
    several = pj.Lora(rank=2, target=['kernel', 'scale'])
    assert several == pj.Lora(rank=2, target=('kernel', 'scale')) and hash(several)
    assert attach(['kernel']) == attach(('kernel',))


@pytest.mark.parametrize(
    'target, error, text',
    [
        ('', ValueError, 'must not be empty'),
        ((), ValueError, 'must not be empty'),
        ('(', ValueError, "'.' is not a regular expression"),
        (3, TypeError, 'a regular expression or several of them'),
        (['kernel', 3], TypeError, 'a regular expression or several of them'),
        (None, TypeError, 'a regular expression or several of them'),
    ],
)
def test_a_target_is_a_pattern_or_several(target, error, text):
    with pytest.raises(error, match=text):
        attach(target)
