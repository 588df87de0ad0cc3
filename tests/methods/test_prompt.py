import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prompted import IDS, MASK, PARAMS, PLACES, TYPES, attend, model
from zoo import normal

import peftjax as pj

PROMPT = normal(9, 3, 4)
PHI = {'wte/embedding': {'prompt': PROMPT}}
METHOD = pj.PromptTuning(length=3, shift=False)


def reference(side='front', mask=None, types=None, places=None, causal=False):
    """The model on embedded sequences that are lengthened by hand."""
    places = jnp.broadcast_to(jnp.arange(5), (2, 5)) if places is None else places
    x = PARAMS['wte']['embedding'][IDS] + PARAMS['wpe']['embedding'][places]
    virtual = jnp.broadcast_to(PROMPT, (2, 3, 4)) + PARAMS['wpe']['embedding'][virtual_places(side)]
    if types is not None:
        x = x + PARAMS['types']['embedding'][types]
        virtual = virtual + PARAMS['types']['embedding'][0]
    mask = jnp.ones((2, 5), bool) if mask is None else mask != 0
    new = jnp.ones((2, 3), bool)
    both = (lambda a, b: [b, a]) if side == 'front' else (lambda a, b: [a, b])
    out = attend(
        PARAMS, jnp.concatenate(both(x, virtual), 1), jnp.concatenate(both(mask, new), 1), causal
    )
    return out[:, 3:] if side == 'front' else out[:, :5]


def virtual_places(side):
    return {'front': jnp.arange(3), 'back': jnp.arange(5, 8), 'said': jnp.zeros(3, int)}[side]


def prompted(method, *args, fn=model, phi=PHI, **kwargs):
    peft = pj.attach(method, fn, PARAMS, *args, **kwargs)
    return peft.wrap(fn)(PARAMS, phi, *args, **kwargs)


def test_prompts_go_before_the_embedded_tokens():
    wanted = reference(places=3 + jnp.broadcast_to(jnp.arange(5), (2, 5)))
    np.testing.assert_allclose(prompted(METHOD, IDS), wanted, atol=1e-5)
    causal = reference(places=3 + jnp.broadcast_to(jnp.arange(5), (2, 5)), causal=True)
    np.testing.assert_allclose(prompted(METHOD, IDS, causal=True), causal, atol=1e-5)


def test_prompts_may_go_behind_them():
    method = dataclasses.replace(METHOD, side='back')
    np.testing.assert_allclose(prompted(method, IDS), reference('back'), atol=1e-5)


def test_masks_and_types_are_lengthened():
    places = 3 + jnp.broadcast_to(jnp.arange(5), (2, 5))
    wanted = reference(mask=MASK, types=TYPES, places=places)
    out = prompted(METHOD, IDS, attention_mask=MASK, token_type_ids=TYPES)
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    out = prompted(METHOD, IDS, attention_mask=MASK != 0, token_type_ids=TYPES)
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    one_row = prompted(METHOD, IDS, attention_mask=MASK[:1], token_type_ids=TYPES[:1])
    wanted = reference(mask=MASK[:1].repeat(2, 0), types=TYPES[:1], places=places)
    np.testing.assert_allclose(one_row, wanted, atol=1e-5)


def virtual_at(places, real):
    """The model with prompts whose positions are said too."""
    x = PARAMS['wte']['embedding'][IDS] + PARAMS['wpe']['embedding'][real]
    virtual = jnp.broadcast_to(PROMPT + PARAMS['wpe']['embedding'][places], (2, 3, 4))
    return attend(PARAMS, jnp.concatenate([virtual, x], 1), jnp.ones((2, 8), bool))[:, 3:]


@pytest.mark.parametrize(
    ('fields', 'places', 'shift'),
    [
        ({'shift': True}, jnp.arange(3), 3),
        ({'shift': False}, jnp.zeros(3, int), 0),
        ({'shift': True, 'side': 'back'}, jnp.zeros(3, int), 0),
        ({'shift': False, 'side': 'back'}, jnp.zeros(3, int), 0),
    ],
    ids=str,
)
def test_positions_that_are_given(fields, places, shift):
    method = dataclasses.replace(METHOD, **fields)
    out = prompted(method, IDS, position_ids=PLACES)
    # the order of tokens does not count here, only what their positions are
    np.testing.assert_allclose(out, virtual_at(places, PLACES + shift), atol=1e-5)


def test_arguments_may_lie_in_a_batch():
    def fn(params, batch, *, scale):
        return scale * model(params, batch['input_ids'], batch['extra']['attention_mask'])

    batch = {'input_ids': IDS, 'extra': {'attention_mask': MASK}, 'name': 'train', 'none': None}
    method = dataclasses.replace(METHOD, tokens='0/input_ids')
    out = prompted(method, batch, fn=fn, scale=2.0)
    np.testing.assert_allclose(out, 2 * prompted(METHOD, IDS, attention_mask=MASK), atol=1e-5)


def test_tokens_may_be_a_keyword():
    fn = lambda params, *, ids: model(params, ids)
    out = prompted(dataclasses.replace(METHOD, tokens='ids'), fn=fn, ids=IDS)
    np.testing.assert_allclose(out, prompted(METHOD, IDS), atol=1e-6)


def masked_loss(params, ids, labels):
    """Mean over the tokens whose label counts."""
    scores = jax.nn.log_softmax(model(params, ids))
    picked = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return -jnp.sum(picked, where=labels >= 0) / jnp.sum(jnp.float32(labels >= 0))


def test_a_loss_leaves_virtual_tokens_out_by_their_labels():
    labels = IDS % 4
    out = prompted(METHOD, IDS, labels=labels, fn=masked_loss)
    scores = jax.nn.log_softmax(prompted(METHOD, IDS))
    wanted = -jnp.take_along_axis(scores, labels[..., None], -1).mean()
    np.testing.assert_allclose(out, wanted, rtol=1e-5)


def test_one_phi_serves_other_functions_and_lengths():
    peft = pj.attach(METHOD, model, PARAMS, IDS)
    short = peft.wrap(model)(PARAMS, PHI, IDS[:1, :2])
    assert short.shape == (1, 2, 4)
    loss = peft.wrap(masked_loss)(PARAMS, PHI, IDS, labels=IDS % 4)
    np.testing.assert_allclose(loss, prompted(METHOD, IDS, labels=IDS % 4, fn=masked_loss))


def summed(params, ids):
    """A causal model of ids of any rank."""
    return jnp.cumsum(params['wte']['embedding'][ids], -2)


@pytest.mark.parametrize('side', ['front', 'back'])
@pytest.mark.parametrize('first', [IDS[0], IDS, IDS[None]], ids=['one', 'batch', 'batches'])
def test_one_plan_serves_ids_of_every_rank(first, side):
    method = dataclasses.replace(METHOD, side=side)
    forward = pj.attach(method, summed, PARAMS, first).wrap(summed)
    before = PROMPT.sum(0) if side == 'front' else 0
    wanted = before + summed(PARAMS, IDS)
    one = lambda ids: forward(PARAMS, PHI, ids)
    for out in (one(IDS), one(IDS[None])[0], jnp.stack([*map(one, IDS)]), jax.vmap(one)(IDS)):
        np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)


def test_a_named_value_may_hold_the_prompt():
    def fn(params, ids):
        x = params['wte']['embedding'][ids]
        x = jax.ad_checkpoint.checkpoint_name(x, 'embeddings')
        return attend(params, x, jnp.ones(ids.shape, bool))

    method = dataclasses.replace(METHOD, target='@embeddings', initial='random')
    peft = pj.attach(method, fn, PARAMS, IDS)
    phi = peft.init(jax.random.key(0), PARAMS)
    assert jax.tree.map(jnp.shape, phi) == {'@embeddings': {'prompt': (3, 4)}}
    assert jnp.abs(phi['@embeddings']['prompt']).max() <= 0.5
    at_table = prompted(METHOD, IDS, fn=fn, phi={'wte/embedding': phi['@embeddings']})
    np.testing.assert_allclose(peft.wrap(fn)(PARAMS, phi, IDS), at_table, atol=1e-6)


def test_a_tied_table_is_overwritten_at_the_lookup_only():
    fn = lambda params, ids: (
        jnp.tanh(params['wte']['embedding'][ids]).cumsum(1) @ (params['wte']['embedding'].T)
    )
    out = prompted(METHOD, IDS, fn=fn)
    table = PARAMS['wte']['embedding']
    x = jnp.concatenate([jnp.broadcast_to(PROMPT, (2, 3, 4)), table[IDS]], 1)
    np.testing.assert_allclose(out, (jnp.tanh(x).cumsum(1) @ table.T)[:, 3:], atol=1e-5)


@pytest.mark.parametrize('side', ['front', 'back'])
def test_two_prompts_lie_in_the_order_of_the_chain(side):
    """The first is nearer to the tokens."""
    first = dataclasses.replace(METHOD, side=side)
    both = pj.chain(first=first, second=dataclasses.replace(first, length=2))
    places = jnp.arange(1.0, 11.0)[None, :, None]
    weighted = lambda x: (x * places).sum(1)

    def fn(params, ids):
        x = params['wte']['embedding'][ids]
        return weighted(x) if ids.shape[1] == 10 else x.sum(1)

    peft = pj.attach(both, fn, PARAMS, IDS)
    more = normal(8, 2, 4)
    phi = {'first': PHI, 'second': {'wte/embedding': {'prompt': more}}}
    rows = [jnp.broadcast_to(row, (2, *row.shape)) for row in (PROMPT, more)]
    x = PARAMS['wte']['embedding'][IDS]
    order = [rows[1], rows[0], x] if side == 'front' else [x, *rows]
    wanted = weighted(jnp.concatenate(order, 1))
    np.testing.assert_allclose(peft.wrap(fn)(PARAMS, phi, IDS), wanted, rtol=1e-4, atol=1e-4)


def test_initial_rows():
    table = PARAMS['wte']['embedding']
    start = lambda initial: np.asarray(
        pj.attach(dataclasses.replace(METHOD, initial=initial), model, PARAMS, IDS).init(
            jax.random.key(0), PARAMS
        )['wte/embedding']['prompt']
    )
    np.testing.assert_array_equal(start((4, 7)), table[jnp.array([4, 7, 4])])
    rows = [np.flatnonzero((np.asarray(table) == row).all(1)) for row in start('vocabulary')]
    assert len({int(row[0]) for row in rows}) == 3
    assert 0.3 < start('random').std() / float(table.std()) < 2


@pytest.mark.parametrize(
    ('fields', 'match'),
    [
        ({'length': 0}, 'PromptTuning: length must be a positive integer; got 0'),
        ({'length': True}, 'PromptTuning: length must be a positive integer; got True'),
        ({'side': 'left'}, "PromptTuning: side must be 'front' or 'back'; got 'left'"),
        ({'initial': 'zeros'}, "initial must be 'vocabulary', 'random' or token ids; got 'zeros'"),
        ({'initial': ()}, r'initial must be .* token ids; got \(\)'),
        ({'fill': ('mask', 1)}, r"PromptTuning: fill must be pairs, .*; got \('mask', 1\)"),
        ({'dtype': 'int8'}, "PromptTuning: dtype must be a floating one, .*; got 'int8'"),
        ({'initial': (1, 2.5)}, r'initial must be .* token ids; got \(1, 2.5\)'),
    ],
)
def test_fields_out_of_range(fields, match):
    with pytest.raises(ValueError, match=match):
        pj.PromptTuning(**fields)


@pytest.mark.parametrize(
    ('fields', 'match'),
    [
        (
            {'tokens': 'input_ids'},
            r"tokens='input_ids' must match one integer argument.*'0': \(2, 5\)",
        ),
        (
            {'target': 'embedding'},
            "needs one embedding; target='embedding' finds 'wpe/embedding', 'wte",
        ),
        ({'target': 'key'}, r'PromptTuning adapts sites of kind embedding, named; .* \(linear\)'),
        ({'initial': (3, 9)}, r'initial holds ids outside the vocabulary of 9: \[3, 9, 3\]'),
        ({'initial': (-1,)}, 'initial holds ids outside the vocabulary of 9'),
        (
            {'length': 10, 'initial': 'vocabulary'},
            r'length=10\) draws different rows .* vocabulary of 9',
        ),
        ({'target': '@key'}, "'@key' set initial='random'"),
    ],
)
def test_what_does_not_fit_the_model(fields, match):
    with pytest.raises(ValueError, match=match):
        pj.attach(dataclasses.replace(METHOD, **fields), model, PARAMS, IDS)


@pytest.mark.parametrize('length', [4, 5])
def test_another_lookup_in_the_same_table_would_be_overwritten(length):
    def fn(params, ids, target):
        table = params['wte']['embedding']
        return table[ids].sum(1)[:, None] + table[target]

    method = pj.PromptTuning(length=3, target='wte', tokens='ids', fill=(('target', None),))
    calls = {'ids': IDS, 'target': jnp.zeros((2, length), jnp.int32)}
    with pytest.raises(ValueError, match=rf"'wte/embedding', \(2, {length}, 4\), does not grow"):
        pj.attach(method, fn, PARAMS, **calls)


def test_a_lookup_without_tokens():
    def fn(params, ids, task):
        return model(params, ids) + params['types']['embedding'][task][:, None]

    method = dataclasses.replace(METHOD, target='types')
    with pytest.raises(ValueError, match=r"output of 'types/embedding', \(2, 4\), does not grow"):
        pj.attach(method, fn, PARAMS, IDS, jnp.array([1, 0]))


def test_an_unknown_argument_is_refused_with_the_mend():
    def fn(params, ids, weights, features):
        return (model(params, ids) * weights[..., None]).sum((1, 2)) + features.sum(-1)

    args = (IDS, jnp.ones((2, 5)), jnp.ones((2, 5)))
    with pytest.raises(
        ValueError, match=r"'1' of shape \(2, 5\) has none. Say it: fill=\(\('1', value"
    ):
        prompted(METHOD, *args, fn=fn)
    method = dataclasses.replace(METHOD, fill=(('1', 0.0), ('2', None)))
    wanted = prompted(METHOD, IDS).sum((1, 2)) + 5
    np.testing.assert_allclose(prompted(method, *args, fn=fn), wanted, rtol=1e-5)


def test_labels_of_examples_are_not_those_of_tokens():
    """As many examples as tokens: the shape does not tell."""

    def fn(params, ids, labels):
        return (model(params, ids)[:, -1].argmax(-1) == labels).mean()

    square = IDS[:, :2]
    with pytest.raises(
        ValueError, match=r"'labels' of shape \(2,\) may go with the tokens or with"
    ):
        prompted(METHOD, square, labels=jnp.zeros(2, jnp.int32), fn=fn)
    method = dataclasses.replace(METHOD, fill=(('labels', None),))
    prompted(method, square, labels=jnp.zeros(2, jnp.int32), fn=fn)
    prompted(METHOD, IDS, labels=jnp.zeros(2, jnp.int32), fn=fn)


def test_a_size_fixed_inside_the_function():
    fn = lambda params, ids: model(params, ids) * jnp.ones((2, 5, 1))
    with pytest.raises(ValueError, match='with 3 virtual tokens the function cannot be traced'):
        pj.attach(METHOD, fn, PARAMS, IDS)


def test_tokens_that_are_joined_with_other_axes_are_refused_with_the_place():
    flat = lambda params, ids: {'logits': model(params, ids).reshape(-1, 4)}
    match = r"the result\['logits'\] of shape \(10, 4\) became \(16, 4\) with 3 of them. Let"
    with pytest.raises(ValueError, match=match):
        pj.attach(METHOD, flat, PARAMS, IDS)


def test_merge_refuses():
    peft = pj.attach(METHOD, model, PARAMS, IDS)
    with pytest.raises(ValueError, match='lives in the input.* nothing to merge .*Keep phi'):
        peft.merge(PARAMS, PHI)


def test_fill_may_be_a_dict():
    given: dict = {'fill': {'weights': np.int64(1), 'rows': None}}
    want = (('weights', 1), ('rows', None))
    assert pj.PromptTuning(**given).fill == pj.PrefixTuning(**given).fill == want
