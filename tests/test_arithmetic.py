"""Sums of adapters: those that PEFT made, formulas, and what cannot be summed."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import MODELS
from cases import first_everywhere
from interop import load
from test_conformance import CASES
from zoo import normal

import peftjax as pj
from peftjax import arithmetic

STORED = CASES / 'llama' / 'multi_adapter_llama'
ASKED = json.loads((STORED / 'case.json').read_text())['info']
BY_KIND = {
    'linear': arithmetic.linear,
    'cat': arithmetic.cat,
    'svd': arithmetic.svd,
    'ties': arithmetic.ties,
    'magnitude_prune': arithmetic.magnitude_prune,
    'dare_linear': functools.partial(arithmetic.dare, key=jax.random.key(0)),
    'dare_ties': functools.partial(arithmetic.dare, key=jax.random.key(0), elect='total'),
}
RENAMED = {'svd_rank': 'rank', 'majority_sign_method': 'elect'}


@functools.cache
def stored(name):
    return load(STORED / name)


def summed(asked):
    """What PEFT was asked, asked of ours."""
    kind, adapters = asked['combination_type'], [stored(name) for name in asked['adapters']]
    how = {RENAMED.get(name, name): value for name, value in asked['kw'].items()}
    if kind.endswith('_svd'):
        kind, how['on'] = kind.removesuffix('_svd'), 'update'
    return BY_KIND[kind]([(case.peft, case.phi()) for case in adapters], asked['weights'], **how)


@pytest.mark.slow
@pytest.mark.parametrize('name', ASKED)
def test_sums_are_those_of_peft(name):
    case, (peft, phi) = stored(name), summed(ASKED[name])
    assert peft.method.rank == ASKED[name]['r'] and not peft.method.ranks
    own = dataclasses.replace(case, peft=peft)
    np.testing.assert_allclose(own.forward(phi), case.io[f'out_{name}'], rtol=0, atol=1e-5)
    assert np.abs(case.io[f'out_{name}'] - case.io['out_base']).max() > 0.01
    for path, theirs in case.phi().items():
        if 'svd' in name:  # vectors of either sign
            one, other = (pair['a'] @ pair['b'] for pair in (phi[path], theirs))
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
        else:
            for factor in 'ab':
                np.testing.assert_allclose(phi[path][factor], theirs[factor], rtol=0, atol=1e-6)


# Formulas -----------------------------------------------------------------------------------------

LINEARS = '(query|down|up)/kernel'
EVERY = {
    'lora': pj.Lora(rank=2, alpha=3.0, target=LINEARS),
    'lora_stabilized': pj.Lora(
        rank=2,
        alpha=4.0,
        rank_stabilized=True,
        ranks=(('up', 3),),
        alphas=(('down', 5.0),),
        target=(LINEARS, 'wte'),
    ),
    'biases': pj.BitFit(),
    'norms': pj.NormTuning(),
    'layer': pj.Trainable(target='down/kernel'),
    'tokens': pj.TrainableTokens(target='wte', ids=(1, 4)),
    'ia3': pj.Ia3(target='(key|value|down)/kernel', feedforward='down'),
    'chain': pj.chain(
        pj.Trainable(target='down/kernel'),
        inner=pj.chain(pj.Lora(rank=2, alpha=1.0, target='(down|query)/kernel'), pj.BitFit()),
    ),
}


@functools.cache
def adapters(name, model='plain', count=2):
    """Adapters of one method on one model, each with a phi of its own."""
    case = MODELS[model]
    peft = pj.attach(EVERY[name], case.fn, case.params, case.inputs)
    found = []
    for i in range(count):
        keys = iter(jax.random.split(jax.random.key(i), 99))
        move = lambda a, keys=keys: a + 0.3 * jax.random.normal(next(keys), a.shape)
        found.append((peft, jax.tree.map(move, peft.init(jax.random.key(9), case.params))))
    return case, found


def changes(case, peft, phi):
    """What an adapter changes of theta."""
    return jax.tree.map(lambda new, old: new - old, peft.merge(case.params, phi), case.params)


def close(one, other, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), one, other)


EXACT = [
    *(('cat', name, 'scanned') for name in EVERY),
    *(('svd', name, 'plain') for name in EVERY if name != 'lora_stabilized'),
]
"""Where ranks differ from path to path, no one rank is exact."""


@pytest.mark.parametrize(('kind', 'name', 'model'), first_everywhere(EXACT))
def test_updates_add_up(kind, name, model):
    """`merge` knows nothing of sums: theta plus the weighted changes of all."""
    case, both = adapters(name, model)
    more = {'rank': 4} if kind == 'svd' else {}
    peft, phi = BY_KIND[kind](both, [0.5, -2.0], params=case.params, **more)
    first, second = (changes(case, *adapter) for adapter in both)
    want = jax.tree.map(lambda a, b: 0.5 * a - 2 * b, first, second)
    close(changes(case, peft, phi), want)


@pytest.mark.parametrize('name', EVERY)
@pytest.mark.parametrize('kind', ['linear', 'cat', 'svd', 'ties', 'dare_linear', 'magnitude_prune'])
def test_one_adapter_of_weight_one_is_itself(kind, name):
    case, [(peft, phi), _] = adapters(name)
    whole = {} if kind in ('linear', 'cat', 'svd') else {'density': 1.0}
    result = BY_KIND[kind]([(peft, phi)], [1.0], params=case.params, **whole)
    close(changes(case, *result), changes(case, peft, phi), 3e-6)


@pytest.mark.parametrize('kind', ['linear', 'cat'])
def test_where_the_scale_is_one_nothing_is_rounded(kind):
    case, [(_, phi), _] = adapters('lora')
    method = dataclasses.replace(EVERY['lora'], alpha=None)
    peft = pj.attach(method, case.fn, case.params, case.inputs)
    same, own = BY_KIND[kind]([(peft, phi)], [1.0])
    assert same == peft
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), own, phi))


@pytest.mark.parametrize('name', EVERY)
@pytest.mark.parametrize('kind', ['linear', 'cat'])
def test_minus_one_takes_back(kind, name):
    case, [one, _] = adapters(name)
    negated = BY_KIND[kind]([one], [-1.0], params=case.params)
    close(changes(case, *negated), jax.tree.map(jnp.negative, changes(case, *one)), 3e-6)


def test_ranks_of_a_sum():
    case, both = adapters('lora_stabilized')
    peft, phi = arithmetic.cat(both, [1.0, 1.0])
    ranks = {path: own['a'].shape[-1] for path, own in phi.items()}
    assert ranks['layers/0/up/kernel'] == 6 and ranks['layers/0/query/kernel'] == 4
    assert {site.path: peft.method.rank_at(site) for site in peft.sites[0]} == ranks
    assert all(math.isclose(peft.method.scale_at(site), 1) for site in peft.sites[0])
    small, own = arithmetic.svd(both, [1.0, 1.0])
    assert {path: pair['a'].shape[-1] for path, pair in own.items()} == {
        path: rank // 2 for path, rank in ranks.items()
    }
    again = pj.attach(small.method, case.fn, case.params, case.inputs)
    assert again == small  # the plan is one that attach makes


def test_svd_is_the_nearest_of_its_rank():
    case, both = adapters('lora')
    peft, phi = arithmetic.svd(both, [0.5, 2.0], rank=1)
    for path, own in phi.items():
        update = sum(w * 1.5 * one[path]['a'] @ one[path]['b']
                     for w, (_, one) in zip((0.5, 2.0), both, strict=True))  # fmt: skip
        u, s, vh = np.linalg.svd(update)
        close(own['a'] @ own['b'], s[0] * u[:, :1] @ vh[:1], 1e-5)


def test_ties_by_hand():
    """On a bias: trimmed to two of four, signs elected, means of those that agree."""
    params, x = {'bias': jnp.ones(4)}, jnp.ones((2, 4))
    peft = pj.attach(pj.BitFit(target='bias'), lambda p, x: x + p['bias'][None], params, x)
    each = [[5.0, -3.0, 1.0, 0.5], [2.0, 4.0, 1.0, 0.0], [-1.0, -3.0, 0.0, 2.0]]
    of = [(peft, {'bias': {'value': 1 + jnp.array(change)}}) for change in each]
    trimmed = {'density': 0.5, 'params': params}
    _, total = arithmetic.ties(of, [1.0, 2.0, 1.0], **trimmed)
    _, votes = arithmetic.ties(of, [1.0, 2.0, 1.0], elect='frequency', **trimmed)
    close(total['bias']['value'] - 1, jnp.array([(5 + 2 * 2) / 2, -(3 + 3) / 2, 0.0, 2.0]))
    close(votes['bias']['value'] - 1, jnp.array([(5 + 2 * 2) / 2, -(3 + 3) / 2, 0.0, 2.0]))
    of[2] = (peft, {'bias': {'value': 1 + jnp.array([0.0, 0.5, 0.0, 0.5])}})
    _, total = arithmetic.ties(of, [1.0, 2.0, 1.0], **trimmed)
    _, votes = arithmetic.ties(of, [1.0, 2.0, 1.0], elect='frequency', **trimmed)
    assert float(total['bias']['value'][1]) == 1 + (2 * 4 + 0.5) / 2  # -3 + 4 + 0.5 > 0
    assert float(votes['bias']['value'][1]) == 1 + (2 * 4 + 0.5) / 2  # two of three


def test_layers_of_a_scan_are_trimmed_one_by_one():
    """As modules of PEFT are: a layer of small numbers keeps as many as one of large ones."""
    _, [(peft, phi), _] = adapters('lora', 'scanned')
    first = jnp.array([100.0, 1.0])
    large = jax.tree.map(lambda a: a * first.reshape(2, *(1,) * (a.ndim - 1)), phi)
    _, own = arithmetic.magnitude_prune([(peft, large)], [1.0], density=0.5)
    for pair in own.values():
        for leaf in pair.values():
            kept = (leaf != 0).reshape(2, -1).sum(1)
            assert kept.tolist() == [leaf[0].size // 2] * 2


def test_dare_keeps_the_mean_and_draws_from_its_key():
    params, x = {'w': jnp.zeros((100, 100))}, jnp.ones((2, 100))
    peft = pj.attach(pj.Trainable(target='w'), lambda p, x: x @ p['w'], params, x)
    phi = {'w': {'value': 1 + 0.1 * normal(0, 100, 100)}}
    dare = functools.partial(arithmetic.dare, [(peft, phi)], [1.0], density=0.2, params=params)
    one, other, again = (dare(key=jax.random.key(i))[1]['w']['value'] for i in (0, 1, 0))
    assert (one == again).all() and (one != other).any()
    assert abs(float((one != 0).mean()) - 0.2) < 0.02
    assert abs(float(one.mean()) - 1) < 0.1
    np.testing.assert_allclose(one[one != 0], phi['w']['value'][one != 0] / 0.2, rtol=1e-6)


def test_what_was_loaded_can_be_summed(tmp_path):
    _, both = adapters('lora')
    pj.save(tmp_path / 'one', *both[0])
    loaded = pj.load(tmp_path / 'one')
    peft, phi = arithmetic.cat([loaded, both[1]], [1.0, 2.0])
    want, own = arithmetic.cat(both, [1.0, 2.0])
    assert peft == want
    jax.tree.map(np.testing.assert_array_equal, phi, own)


def test_the_dtype_of_a_sum_does_not_depend_on_the_order():
    _, both = adapters('lora')
    half = both[0][0], jax.tree.map(lambda x: x.astype(jnp.bfloat16), both[0][1])
    for pair in ([half, both[1]], [both[1], half]):
        _, phi = arithmetic.cat(pair, [1.0, 1.0])
        assert {leaf.dtype for leaf in jax.tree.leaves(phi)} == {jnp.dtype('float32')}


def wide_pair(dtype, seed):
    """An adapter whose scale and factors float32 would round."""
    fn = lambda params, x: x @ params['w']
    params, x = {'w': normal(0, 8, 7)}, normal(1, 2, 8)
    peft = pj.attach(pj.Lora(rank=3, alpha=1, target='w', dtype=dtype), fn, params, x)
    draw = np.random.default_rng(seed).normal
    return peft, {'w': {name: jnp.asarray(draw(size=shape), dtype)
                        for name, shape in (('a', (8, 3)), ('b', (3, 7)))}}  # fmt: skip


@pytest.mark.parametrize('kind', ['cat', 'linear'])
def test_sums_in_float64_are_exact(kind):
    with jax.enable_x64(True):
        peft, phi = wide_pair('float64', 2)
        _, own = BY_KIND[kind]([(peft, phi)], [0.3])
        found, wanted = (np.asarray(one['w']['a']) @ one['w']['b'] for one in (own, phi))
        assert found.dtype == np.float64
        wanted = 0.3 / 3 * wanted
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-15 * np.abs(wanted).max())


def test_a_sum_of_changes_in_float64_is_exact():
    with jax.enable_x64(True):
        draw = np.random.default_rng(0).normal
        params, new = ({'w': jnp.asarray(draw(size=(4, 4)))} for _ in 'ab')
        peft = pj.attach(pj.Trainable(target='w'), lambda p, x: x @ p['w'], params, params['w'])
        _, own = arithmetic.cat([(peft, {'w': {'value': new['w']}})], [0.3], params=params)
        wanted = params['w'] + 0.3 * (new['w'] - params['w'])
        np.testing.assert_allclose(own['w']['value'], wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize('order', [1, -1])
def test_a_sum_is_of_the_widest_dtype(order):
    with jax.enable_x64(True):
        both = [wide_pair('float32', 2), wide_pair('float64', 3)][::order]
        _, own = arithmetic.cat(both, [1.0, 1.0])
        assert {leaf.dtype for leaf in jax.tree.leaves(own)} == {jnp.dtype('float64')}
        product = lambda phi: np.asarray(phi['w']['a'], float) @ np.asarray(phi['w']['b'], float)
        wanted = sum(product(phi) for _, phi in both) / 3
        np.testing.assert_allclose(product(own), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize('name', EVERY)
def test_a_sum_is_saved_and_loaded(name, tmp_path):
    case, both = adapters(name)
    peft, phi = arithmetic.cat(both, [0.5, 0.5], params=case.params)
    pj.save(tmp_path / 'sum', peft, phi, params=case.params)
    loaded = pj.load(tmp_path / 'sum', params=case.params)
    assert loaded.peft == peft
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded.phi, phi))


def test_a_sum_is_exported_and_read_again(tmp_path):
    asked = ASKED['w_cat_a_c_0p3_0p7']
    peft, phi = summed(asked)
    case = stored('a')
    folder = pj.hf.save_adapter(tmp_path / 'sum', peft, phi, task_type='CAUSAL_LM')
    ids = {name: value for name, value in case.inputs.items() if name != 'input_ids'}
    again = pj.hf.load_adapter(folder, case.apply_fn, case.params, case.inputs['input_ids'], **ids)
    assert again.config['r'] == again.config['lora_alpha'] == 6
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again.phi, phi))


# Refusals -----------------------------------------------------------------------------------------


def wrong(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def attached(method, model='plain', seed=0):
    case = MODELS[model]
    peft = pj.attach(method, case.fn, case.params, case.inputs)
    return peft, peft.init(jax.random.key(seed), case.params)


def test_what_cannot_be_summed():
    case, both = adapters('lora')
    sums = lambda *others, **more: arithmetic.linear(
        [both[0], *others], [1.0] * (1 + len(others)), **more
    )
    wrong('each adapter needs a weight; got 2 adapters and 1', lambda: arithmetic.cat(both, [1.0]))
    wrong('each adapter needs a weight; got 0', lambda: arithmetic.cat([], []))
    wrong(r'2 adapters and weights of shape \(\)', lambda: arithmetic.cat(both, 1.0))
    wrong('weights must be finite', lambda: arithmetic.cat(both, [1.0, np.nan]))
    with pytest.raises(TypeError, match=r'received one. Give \[adapter\]'):
        arithmetic.linear(both[0], [1.0])
    with pytest.raises(TypeError, match=r'adapter 1 must be \(peft, phi\)'):
        arithmetic.linear([both[0], both[0][1]], [1.0, 1.0])
    for key in (jax.random.PRNGKey(0), None):
        with pytest.raises(TypeError, match='one typed PRNG key'):
            arithmetic.dare(both, [1.0, 1.0], key=key, density=0.5)
    with pytest.raises(TypeError, match='rank must be an integer: received True'):
        arithmetic.svd(both, [1.0, 1.0], rank=True)
    other = attached(pj.Lora(rank=2, target='query/kernel'))
    wrong("not the same sites of Lora: 'layers/0/down", lambda: sums(other))
    wrong('is of another model', lambda: sums(attached(EVERY['lora'], 'linen')))
    wrong('is made of BitFit, the first of Lora', lambda: sums(attached(pj.BitFit())))
    thick = attached(pj.Lora(rank=3, target=LINEARS))
    wrong(r'factors of one rank .* the ranks are \[2, 3\]. Use cat', lambda: sums(thick))
    wrong('the ranks add up to 10. Use svd', lambda: arithmetic.cat([both[0]] * 5, [1.0] * 5))
    wrong('rank must be from 1 to 4; got 5', lambda: arithmetic.svd(both, [1.0, 1.0], rank=5))
    wrong('phi must be of the model', lambda: sums((both[0][0], thick[1])))
    tokens = [attached(pj.TrainableTokens(target='wte', ids=ids)) for ids in ((1, 4), (1, 5))]
    wrong(r'tokens \(1, 5\), the first \(1, 4\)', lambda: arithmetic.cat(tokens, [1.0, 1.0]))
    scales = [
        attached(pj.Ia3(target='(key|down)/kernel', feedforward=feed)) for feed in ('down', 'key')
    ]
    wrong("scales inputs at 'layers/0", lambda: arithmetic.cat(scales, [1.0, 1.0]))


@pytest.mark.parametrize(
    ('method', 'mend'),
    [
        (pj.Dora(rank=2, target=LINEARS), 'Dora at .* Merge each'),
        (pj.Adapter(target='down/kernel', reduction=2), 'Adapter at .* several at once'),
        (pj.PromptTuning(length=2, target='wte'), 'PromptTuning at'),
        (pj.chain(pj.Lora(rank=2, target='up/k'), pj.PrefixTuning(length=2)), 'PrefixTuning at'),
    ],
)
def test_methods_whose_updates_do_not_add_up(method, mend):
    wrong(mend, lambda: arithmetic.linear([attached(method)], [1.0]))


def test_arguments_are_checked():
    case, both = adapters('layer')
    wrong(
        "new values of 'layers/0/down/kernel'.* Give params",
        lambda: arithmetic.cat(both, [1, 1]),
    )
    wrong('params must be of the model', lambda: arithmetic.cat(both, [1, 1], params={}))
    prune = functools.partial(arithmetic.magnitude_prune, both, [1, 1], params=case.params)
    wrong(r'density .* in \(0, 1\]; got 0', lambda: prune(density=0))
    wrong("on must be one of .* got 'sum'", lambda: prune(density=0.5, on='sum'))
    wrong("got rank=2. Use on='update'", lambda: prune(density=0.5, rank=2))
    ties = functools.partial(arithmetic.ties, both, [1, 1], params=case.params, density=0.5)
    wrong("elect must be one of .* got 'mean'", lambda: ties(elect='mean'))


@pytest.mark.parametrize('order', [1, -1])
def test_a_sum_of_narrow_and_wide_is_wide_in_its_plan_too(order):
    pairs = [attached(pj.Lora(rank=2, target='query', dtype=d)) for d in ('bfloat16', 'float32')]
    peft, phi = arithmetic.linear(pairs[::order], [1.0, 1.0])
    assert peft.method.dtype == 'float32'
    base = pj.base_phi(peft, MODELS['plain'].params)
    pj.stack([base, phi])
