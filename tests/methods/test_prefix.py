import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import MODELS
from jax.ad_checkpoint import checkpoint_name
from prompted import IDS, MASK, PARAMS, attend, model
from zoo import normal

import peftjax as pj

KEY, VALUE = normal(9, 3, 4), normal(10, 3, 4)
NAMED = pj.PrefixTuning(length=3)
LAYERS = pj.PrefixTuning(length=3, target=('key', 'value'))


def reference(mask=None, causal=False, key=KEY, places=3):
    """The model with keys and values concatenated in every layer."""
    x = PARAMS['wte']['embedding'][IDS] + PARAMS['wpe']['embedding'][places : places + 5]
    mask = jnp.ones((2, 5), bool) if mask is None else mask != 0
    return attend(PARAMS, x, mask, causal, key, VALUE)


def prefixed(method, *args, fn=model, key=KEY, **kwargs):
    peft = pj.attach(method, fn, PARAMS, *args, **kwargs)
    names = [site.path for site in peft.sites[0]]
    phi = {path: {'prefix': key if 'key' in path else VALUE} for path in names}
    return peft.wrap(fn)(PARAMS, phi, *args, **kwargs)


def test_a_prefix_is_seen_by_every_token():
    np.testing.assert_allclose(prefixed(NAMED, IDS), reference(), atol=1e-5)
    np.testing.assert_allclose(
        prefixed(NAMED, IDS, attention_mask=MASK), reference(MASK), atol=1e-5
    )
    np.testing.assert_allclose(prefixed(NAMED, IDS, causal=True), reference(causal=True), atol=1e-5)


def test_a_prefix_may_lie_behind():
    back = dataclasses.replace(NAMED, side='back')
    np.testing.assert_allclose(
        prefixed(back, IDS, attention_mask=MASK), reference(MASK, places=0), atol=1e-5
    )


def test_named_values_are_after_what_is_done_to_keys():
    """At its layer a key is not yet scaled by 1.5, at its name it is."""
    np.testing.assert_allclose(prefixed(LAYERS, IDS), reference(key=1.5 * KEY), atol=1e-5)


@pytest.mark.parametrize(
    ('model', 'target', 'shape'),
    [
        ('plain', ('@key', '@value'), {'@key/0', '@key/1', '@value/0', '@value/1'}),
        ('scanned', ('@key', '@value'), (2, 3, 2, 4)),
        ('scanned', ('key/kernel', 'value/kernel'), (2, 3, 8)),
        ('linen', ('key/kernel', 'value/kernel'), (2, 3, 2, 4)),
        ('flax_nnx', ('@key', '@value'), (3, 2, 4)),
        ('equinox', ('key/weight', 'value/weight'), (3, 8)),
        ('encoder', ('@key', '@value'), (2, 3, 2, 4)),
    ],
)
def test_phi(model, target, shape):
    case = MODELS[model]
    peft = pj.attach(dataclasses.replace(NAMED, target=target), case.fn, case.params, case.inputs)
    phi = peft.init(jax.random.key(0), case.params)
    if isinstance(shape, set):
        assert set(phi) == shape
    else:
        assert {arrays['prefix'].shape for arrays in phi.values()} == {shape} and len(phi) == 2


def test_every_layer_has_its_own_prefix():
    """In the scanned model as in the unrolled one."""
    plain, scanned = MODELS['plain'], MODELS['scanned']
    layers = [plain.params['layers'][i] for i in '01']
    stacked = {**plain.params, 'layers': jax.tree.map(lambda *w: jnp.stack(w), *layers)}
    one = pj.attach(NAMED, plain.fn, plain.params, plain.inputs)
    two = pj.attach(NAMED, scanned.fn, stacked, scanned.inputs)
    phi = one.init(jax.random.key(0), plain.params)
    stack = {
        name: {'prefix': jnp.stack([phi[f'{name}/{i}']['prefix'] for i in range(2)])}
        for name in ('@key', '@value')
    }
    np.testing.assert_allclose(
        one.wrap(plain.fn)(plain.params, phi, plain.inputs),
        two.wrap(scanned.fn)(stacked, stack, scanned.inputs),
        atol=1e-5,
    )


def test_a_projection_makes_the_prefix():
    peft = pj.attach(dataclasses.replace(NAMED, projection=6), model, PARAMS, IDS)
    phi = peft.init(jax.random.key(0), PARAMS)
    assert jax.tree.map(jnp.shape, phi) == {
        'reparametrization': {'tokens': (3, 4), 'down': (4, 6), 'down_bias': (6,)},
        '@key': {'up': (6, 4), 'up_bias': (4,)},
        '@value': {'up': (6, 4), 'up_bias': (4,)},
    }
    phi = jax.tree.map(lambda leaf: leaf + 0.3, phi)
    shared = phi['reparametrization']
    hidden = np.tanh(shared['tokens'] @ shared['down'] + shared['down_bias'][None])
    made = {n: hidden @ phi[n]['up'] + phi[n]['up_bias'][None] for n in ('@key', '@value')}
    plain, folded = peft.fold(phi)
    assert jax.tree.map(jnp.shape, folded) == {n: {'prefix': (3, 4)} for n in made}
    for name, prefix in made.items():
        np.testing.assert_allclose(folded[name]['prefix'], prefix, atol=1e-5)
    assert plain.method == NAMED and plain.count() == 24
    np.testing.assert_allclose(
        peft.wrap(model)(PARAMS, phi, IDS), plain.wrap(model)(PARAMS, folded, IDS), atol=1e-6
    )


@pytest.mark.parametrize('model', ['linen', 'encoder', 'plain'])
def test_folding_changes_nothing(model):
    case = MODELS[model]
    both = pj.chain(pj.NormTuning(), dataclasses.replace(NAMED, projection=6))
    peft = pj.attach(both, case.fn, case.params, case.inputs)
    phi = jax.tree.map(lambda leaf: leaf + 0.1, peft.init(jax.random.key(0), case.params))
    plain, folded = peft.fold(phi)
    assert 'reparametrization' not in folded['prefix_tuning']
    np.testing.assert_allclose(
        plain.wrap(case.fn)(case.params, folded, case.inputs),
        peft.wrap(case.fn)(case.params, phi, case.inputs),
        atol=1e-5,
    )
    again, same = plain.fold(folded)
    assert again == plain and jax.tree.structure(same) == jax.tree.structure(folded)


def test_a_direct_prefix_is_normal():
    wide = dataclasses.replace(NAMED, length=500, deviation=0.1)
    fn = lambda params, ids: model(params, ids, position_ids=0 * ids[:1])
    phi = pj.attach(wide, fn, PARAMS, IDS).init(jax.random.key(0), PARAMS)
    assert abs(float(phi['@key']['prefix'].std()) - 0.1) < 0.01


def layer(params, ids):
    """Values of two heads, summed over what lies before them."""
    x = params['wte']['embedding'][ids]
    x = x @ params['v']
    return jnp.cumsum(checkpoint_name(x.reshape(*ids.shape, 2, 2), 'value'), -3)


def columns(params, ids):
    x = params['wte']['embedding'][ids]
    return jnp.cumsum(jnp.einsum('dk,...td->...kt', params['v'], x), -1)


@pytest.mark.parametrize('first', [IDS[0], IDS], ids=['one', 'batch'])
@pytest.mark.parametrize('target', ['v$', '@value'])
def test_one_plan_serves_ids_of_every_rank(target, first):
    params = {'wte': PARAMS['wte'], 'v': normal(3, 4, 4)}
    peft = pj.attach(pj.PrefixTuning(length=3, target=target), layer, params, first)
    (path,) = [site.path for site in peft.sites[0]]
    prefix = VALUE.reshape(3, 2, 2) if target == '@value' else VALUE
    one = lambda ids: peft.wrap(layer)(params, {path: {'prefix': prefix}}, ids)
    wanted = VALUE.sum(0).reshape(2, 2) + layer(params, IDS)
    for out in (one(IDS), one(IDS[None])[0], jnp.stack([*map(one, IDS)]), jax.vmap(one)(IDS)):
        np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)


def test_tokens_that_lie_elsewhere_than_when_attached_are_refused():
    params = {'wte': PARAMS['wte'], 'v': normal(3, 4, 4)}
    peft = pj.attach(pj.PrefixTuning(length=3, target='v$'), columns, params, IDS[0])
    phi = peft.init(jax.random.key(0), params)
    with pytest.raises(ValueError, match=r"output of 'v' is of shape \(2, 8, 4\) now"):
        peft.wrap(columns)(params, phi, IDS)


def test_prefix_and_prompt_share_the_room():
    """A chain of both: the prompt is nearer to the tokens where it is listed first."""
    both = pj.chain(pj.PromptTuning(length=2), NAMED)
    fn = lambda params, ids: attend(
        params, params['wte']['embedding'][ids], jnp.ones(ids.shape, bool)
    )
    peft = pj.attach(both, fn, PARAMS, IDS)
    prompt = normal(3, 2, 4)
    phi = {
        'prompt_tuning': {'wte/embedding': {'prompt': prompt}},
        'prefix_tuning': {'@key': {'prefix': KEY}, '@value': {'prefix': VALUE}},
    }
    x = jnp.concatenate([jnp.broadcast_to(prompt, (2, 2, 4)), PARAMS['wte']['embedding'][IDS]], 1)
    wanted = attend(PARAMS, x, jnp.ones((2, 7), bool), False, KEY, VALUE)[:, 2:]
    np.testing.assert_allclose(peft.wrap(fn)(PARAMS, phi, IDS), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ('fields', 'match'),
    [
        ({'length': 0}, 'PrefixTuning: length must be a positive integer; got 0'),
        ({'side': 'top'}, "PrefixTuning: side must be 'front' or 'back'; got 'top'"),
        ({'projection': -1}, 'PrefixTuning: projection must be 0 or a width; got -1'),
        ({'projection': 1.5}, 'PrefixTuning: projection must be 0 or a width; got 1.5'),
        ({'projection': True}, 'PrefixTuning: projection must be 0 or a width; got True'),
    ],
)
def test_fields_out_of_range(fields, match):
    with pytest.raises(ValueError, match=match):
        pj.PrefixTuning(**fields)


@pytest.mark.parametrize(
    ('fields', 'match'),
    [
        ({'target': ('@key', '@val')}, "no site matches target='@val'. Nearest: '@value'"),
        ({'target': 'wte'}, r'PrefixTuning adapts sites of kind linear, named; .* \(embedding\)'),
        ({'tokens': '1'}, "tokens='1' must match one integer argument of token ids"),
    ],
)
def test_what_does_not_fit_the_model(fields, match):
    with pytest.raises(ValueError, match=match):
        pj.attach(dataclasses.replace(NAMED, **fields), model, PARAMS, IDS)


def test_a_value_without_tokens():
    def fn(params, ids):
        pooled = model(params, ids).mean(1)
        return pooled @ params['pool']['kernel']

    params = {**PARAMS, 'pool': {'kernel': jnp.eye(4)}}
    with pytest.raises(ValueError, match=r"output of 'pool/kernel', \(2, 4\), does not grow"):
        pj.attach(dataclasses.replace(NAMED, target='pool'), fn, params, IDS)


def test_merge_refuses():
    peft = pj.attach(NAMED, model, PARAMS, IDS)
    phi = peft.init(jax.random.key(0), PARAMS)
    with pytest.raises(ValueError, match='lives in keys and values.* nothing to merge .*Keep phi'):
        peft.merge(PARAMS, phi)
