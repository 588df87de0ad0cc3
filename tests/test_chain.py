import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import MODELS
from zoo import normal

import peftjax as pj

X, PARAMS = normal(0, 3, 6), {'up': {'kernel': normal(1, 6, 4), 'bias': normal(2, 4)}}
PAIR, WIDE = {'a': normal(3, 6, 2), 'b': normal(4, 2, 4)}, normal(5, 4)
LORA, IA3 = pj.Lora(rank=2, target='kernel'), pj.Ia3(target='kernel')


def dense(params, x):
    return x @ params['up']['kernel'] + params['up']['bias'][None]


def attach(*methods, **named):
    return pj.attach(pj.chain(*methods, **named), dense, PARAMS, X)


def test_names():
    lora, bias, norm = LORA, pj.BitFit(), pj.NormTuning()
    inner = pj.chain(IA3, last=norm)
    whole = pj.chain(lora, bias, lora, inner, head=lora)
    assert [name for name, _ in whole.methods] == ['lora', 'bit_fit', 'lora_2', 'chain', 'head']
    assert [keys for keys, _ in whole.parts] == [
        ('lora',),
        ('bit_fit',),
        ('lora_2',),
        ('chain', 'ia3'),
        ('chain', 'last'),
        ('head',),
    ]


def test_phi_is_nested_as_the_chain():
    peft = attach(pj.chain(LORA, pj.BitFit()), outer=IA3)
    phi = peft.init(jax.random.key(0), PARAMS)
    assert jax.tree.map(jnp.shape, phi) == {
        'chain': {
            'lora': {'up/kernel': {'a': (6, 2), 'b': (2, 4)}},
            'bit_fit': {'up/bias': {'value': (4,)}},
        },
        'outer': {'up/kernel': {'l': (4,)}},
    }
    assert 'total: 28 trained' in str(peft)


def test_the_first_stands_closest_to_the_weights():
    peft = attach(LORA, IA3)
    phi = {'lora': {'up/kernel': PAIR}, 'ia3': {'up/kernel': {'l': WIDE}}}
    w = PARAMS['up']['kernel'] + PAIR['a'] @ PAIR['b']
    wanted = (X @ w + PARAMS['up']['bias']) * WIDE
    np.testing.assert_allclose(peft.wrap(dense)(PARAMS, phi, X), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(peft.merge(PARAMS, phi)['up']['kernel'], w * WIDE, rtol=1e-5)


def test_one_weight_may_be_adapted_twice():
    peft = attach(LORA, pj.Lora(rank=1, alpha=3.0, target='kernel'))
    more = {'a': normal(6, 6, 1), 'b': normal(7, 1, 4)}
    phi = {'lora': {'up/kernel': PAIR}, 'lora_2': {'up/kernel': more}}
    w = PARAMS['up']['kernel'] + PAIR['a'] @ PAIR['b'] + 3 * more['a'] @ more['b']
    wanted = X @ w + PARAMS['up']['bias']
    np.testing.assert_allclose(peft.wrap(dense)(PARAMS, phi, X), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(peft.merge(PARAMS, phi)['up']['kernel'], w, rtol=1e-5, atol=1e-6)


def test_scales_of_inputs_and_outputs_meet_on_one_weight():
    inner = pj.Ia3(target='kernel', feedforward='kernel')
    peft, deep = attach(inner, IA3), normal(8, 6)
    phi = {'ia3': {'up/kernel': {'l': deep}}, 'ia3_2': {'up/kernel': {'l': WIDE}}}
    wanted = (X * deep @ PARAMS['up']['kernel'] + PARAMS['up']['bias']) * WIDE
    np.testing.assert_allclose(peft.wrap(dense)(PARAMS, phi, X), wanted, rtol=1e-4, atol=1e-5)
    merged = dense(peft.merge(PARAMS, phi), X)
    np.testing.assert_allclose(merged, wanted, rtol=1e-4, atol=1e-5)


def test_a_trained_leaf_lies_below_what_adapts_it():
    peft = attach(pj.Trainable(target='.'), LORA, IA3)
    leaves = {path: {'value': 2 * w} for path, w in pj._paths.leaves(PARAMS).items()}
    phi = {'trainable': leaves, 'lora': {'up/kernel': PAIR}, 'ia3': {'up/kernel': {'l': WIDE}}}
    w = 2 * PARAMS['up']['kernel'] + PAIR['a'] @ PAIR['b']
    wanted = (X @ w + 2 * PARAMS['up']['bias']) * WIDE
    np.testing.assert_allclose(peft.wrap(dense)(PARAMS, phi, X), wanted, rtol=1e-4, atol=1e-5)
    merged = dense(peft.merge(PARAMS, phi), X)
    np.testing.assert_allclose(merged, wanted, rtol=1e-4, atol=1e-5)


def test_a_prefix_and_a_head():
    case = MODELS['encoder']
    chain = pj.chain(pj.PrefixTuning(length=2), head=pj.Trainable(target='output/LayerNorm'))
    peft = pj.attach(chain, case.fn, case.params, case.inputs)
    phi = peft.init(jax.random.key(0), case.params)
    grads = jax.grad(lambda phi: (peft.wrap(case.fn)(case.params, phi, case.inputs) ** 3).sum())(
        phi
    )
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match='prefix tuning lives in keys and values'):
        peft.merge(case.params, phi)


def test_a_chain_is_associative():
    """Up to the nesting of phi: also the fresh numbers are the same."""
    first, second, third = LORA, pj.Lora(rank=1, target='kernel'), IA3
    pefts = (
        attach(first, second, third),
        attach(pj.chain(first, second), third),
        attach(first, pj.chain(second, third)),
    )
    phis = [peft.init(jax.random.key(0), PARAMS) for peft in pefts]
    leaves = [jax.tree.leaves(list(_parts(*pair))) for pair in zip(pefts, phis, strict=True)]
    for a, b, c in zip(*leaves, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    noisy = [jax.tree.map(lambda leaf: leaf + 0.5, phi) for phi in phis]
    outs = [peft.wrap(dense)(PARAMS, phi, X) for peft, phi in zip(pefts, noisy, strict=True)]
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


def _parts(peft, phi):
    for keys, _ in peft.method.parts:
        part = phi
        for key in keys:
            part = part[key]
        yield part


@pytest.mark.parametrize(
    ('methods', 'match'),
    [
        ((IA3, LORA), "from leaf to weight to output; on 'up/kernel' Ia3 comes before Lora. Swap"),
        ((LORA, pj.Trainable(target='.')), "'up/kernel' Lora comes before Trainable"),
        ((pj.BitFit(), pj.Trainable(target='bias')), "'up/bias' BitFit comes before Trainable"),
    ],
)
def test_the_order_on_one_weight(methods, match):
    with pytest.raises(ValueError, match=match):
        attach(*methods)


def test_a_bias_goes_with_the_output_of_its_layer():
    """Scaled before it is replaced, it would be merged in another way than it is used."""
    bias = pj.BitFit(target='bias')
    with pytest.raises(ValueError, match="on 'up/bias' Ia3 comes before BitFit. Swap them"):
        attach(IA3, bias)
    peft = attach(bias, IA3)
    phi = jax.tree.map(lambda leaf: leaf + 0.3, peft.init(jax.random.key(0), PARAMS))
    out = peft.wrap(dense)(PARAMS, phi, X)
    np.testing.assert_allclose(out, dense(peft.merge(PARAMS, phi), X), atol=1e-6)
    attach(pj.Adapter(target='kernel', reduction=2), bias)  # reads the output, and is not merged


def test_the_order_on_different_weights_is_free():
    case = MODELS['plain']
    chain = pj.chain(pj.Ia3(target='key/kernel'), pj.Lora(rank=2, target='up/kernel'))
    pj.attach(chain, case.fn, case.params, case.inputs)


@pytest.mark.parametrize(
    ('make', 'kind', 'match'),
    [
        (lambda: pj.chain(), ValueError, r'a chain needs methods, .*; got \[\]'),
        (lambda: pj.chain(LORA, lora=LORA), ValueError, r"each with .*; got \['lora', 'lora'\]"),
        (lambda: pj.chain(**{'a/b': LORA}), ValueError, r"an identifier .*; got \['a/b'\]"),
        (lambda: pj.chain(LORA, pj.Lora), TypeError, r"made of methods; 'abcmeta' is <class"),
        (lambda: pj.chain(head='kernel'), TypeError, "made of methods; 'head' is 'kernel'"),
    ],
)
def test_what_is_no_chain(make, kind, match):
    with pytest.raises(kind, match=match):
        make()


def test_a_phi_of_another_chain_is_refused():
    peft = attach(LORA, IA3)
    phi = attach(IA3).init(jax.random.key(0), PARAMS)
    with pytest.raises(ValueError, match="'lora/up/kernel/a' is missing"):
        peft.wrap(dense)(PARAMS, phi, X)
