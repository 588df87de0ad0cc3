"""Mixed batches: each row is what its own phi makes of it, in one program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
import transformer
from blocks import MODELS
from cases import first_everywhere
from compiled import compiled
from interop import call, load
from methods_under_test import CONVOLUTION, EVERYWHERE, EXPERTS
from test_conformance import CASES
from zoo import ids, normal

import peftjax as pj
from peftjax import models

TABLES = {'experts': EXPERTS, 'convolution': CONVOLUTION}
INDEX = jnp.array([1, 0, 1, 2])
PAIRS = [
    *((method, ('plain', 'scanned', 'linen', 'flax_nnx')[i % 4])
      for i, method in enumerate(EVERYWHERE)),
    *((method, model) for model, table in TABLES.items() for method in table),
]  # fmt: skip
"""Every method, every seam. JAX has no vmap of `ragged_dot` yet."""


def away(phi, seed):
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    return jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(keys), a.shape), phi)


@functools.cache
def bank(method, model):
    """A model, a plan, four rows of inputs, and three phi of which the first may be the base."""
    case, chosen = MODELS[model], TABLES.get(model, EVERYWHERE)[method]
    peft = pj.attach(chosen, case.fn, case.params, case.inputs)
    known = all(part.identity != 'no' for _, part in chosen.parts)
    first = (pj.base_phi if known else lambda p, t: p.init(jax.random.key(5), t))(peft, case.params)
    inputs = jnp.concatenate([case.inputs, case.inputs[::-1]], 0)[:4]
    return case, peft, inputs, [first, away(first, 1), away(first, 2)], known


def close(one, other, tolerance=1e-5):
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * (1 + np.abs(other).max()))


@pytest.mark.parametrize(('method', 'model'), first_everywhere(PAIRS))
def test_each_row_has_its_own(method, model):
    case, peft, inputs, phis, known = bank(method, model)
    forward = quick.jit(pj.mixed(peft, case.fn))
    out = forward(case.params, pj.Rows(pj.stack(phis), INDEX), inputs)
    alone = quick.jit(peft.wrap(case.fn))
    for row, place in enumerate(INDEX):
        close(out[row], alone(case.params, phis[place], inputs[row : row + 1])[0])
    if known:
        close(out[1], case.fn(case.params, inputs[1:2])[0])
        assert np.abs(out[0] - case.fn(case.params, inputs[:1])[0]).max() > 1e-3


@pytest.mark.parametrize('method', ['lora_patterns', 'ia3', 'adapter_options', 'prompt', 'bitfit'])
def test_gradients_reach_each_phi_from_its_rows(method):
    case, peft, inputs, phis, _ = bank(method, 'plain')
    mixed, alone = pj.mixed(peft, case.fn), peft.wrap(case.fn)
    stacked, index = pj.stack(phis), jnp.array([2, 1, 2, 1])

    def together(phis):
        return jnp.sum(mixed(case.params, pj.Rows(phis, index), inputs) ** 2)

    def apart(phi, rows):
        return jnp.sum(alone(case.params, phi, inputs[rows]) ** 2)

    grads = pj.unstack(quick.jit(jax.grad(together))(stacked))
    one = quick.jit(jax.grad(apart))
    for place, rows in ((1, np.array([1, 3])), (2, np.array([0, 2]))):
        jax.tree.map(close, grads[place], one(phis[place], rows))
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads[0]))


def test_rows_of_peft():
    """PEFT's `adapter_names`, with adapters of different ranks and scales."""
    each = {name: load(CASES / 'llama' / 'multi_adapter_llama' / name) for name in 'abc'}
    case = each['a']
    padded = pj.pad_ranks([one.peft for one in each.values()])
    phis = jax.vmap(padded.scaled)(padded.pad([e.phi() for e in each.values()]), padded.scales)
    base = pj.base_phi(padded.peft, case.params)
    phis = pj.stack([*pj.unstack(phis), base])
    forward = quick.jit(pj.mixed(padded.peft, case.apply_fn))
    for index, name in (([0, 3], 'a_base'), ([1, 2], 'b_c')):
        out = call(forward, case.inputs, case.params, pj.Rows(phis, jnp.array(index)))
        np.testing.assert_allclose(out, case.io[f'out_mixed_batch_{name}'], rtol=0, atol=1e-5)


# One program --------------------------------------------------------------------------------------


def test_another_phi_compiles_nothing():
    case, peft, inputs, phis, _ = bank('lora_all', 'plain')
    forward = jax.jit(pj.mixed(peft, case.fn))
    stacked = pj.stack(phis[:2], room=4)
    wanted = [away(phis[0], seed) for seed in range(3)]
    stacked = pj.swap(stacked, 0, phis[0])
    forward(case.params, pj.Rows(stacked, INDEX), inputs).block_until_ready()
    indices = [jnp.array(rows) for rows in ([0, 1, 2, 3], [3, 3, 2, 0], [1, 1, 1, 1])]
    fewer = jnp.array([0, 1]), inputs[:2]
    with compiled() as names:
        for place, (phi, index) in enumerate(zip(wanted, indices, strict=True)):
            stacked = pj.swap(stacked, place + 1, phi)
            out = forward(case.params, pj.Rows(stacked, index), inputs)
        assert not names, 'a phi put in another place, an empty one among them'
        forward(case.params, pj.Rows(stacked, fewer[0]), fewer[1])
        assert len(names) == 1, 'another shape does'
    close(out[0], peft.wrap(case.fn)(case.params, wanted[0], inputs[:1])[0])


TOKENS = ids(0, transformer.VOCABULARY, 8, 12)


@functools.cache
def costs(form, count):
    """FLOPs and temporary bytes: of the base, and of a mixed batch with so many phi."""
    fn = getattr(transformer, form)
    params = transformer.parameters(2, form == 'scanned')
    target = rf'/({"|".join(transformer.LINEARS)})/kernel'
    peft = pj.attach(pj.Lora(rank=4, target=target), fn, params, TOKENS)
    phis = pj.stack([peft.init(jax.random.key(i), params) for i in range(count)])
    index = jnp.arange(len(TOKENS)) % count
    base = jax.jit(fn).lower(params, TOKENS).compile()
    ours = jax.jit(pj.mixed(peft, fn)).lower(params, pj.Rows(phis, index), TOKENS).compile()
    found = [
        (program.cost_analysis()['flops'], program.memory_analysis().temp_size_in_bytes)
        for program in (base, ours)
    ]
    return peft, params, phis, found


@pytest.mark.parametrize('form', ['scanned', 'unrolled'])
def test_theta_meets_all_rows_in_one_product(form):
    """The FLOPs are those of the base and of the factors, and no weight is copied for a row."""
    peft, params, phis, ((flops, memory), (ours, used)) = costs(form, 4)
    layers = 1 if form == 'scanned' else 2  # of a loop's body once
    rows, tokens = TOKENS.shape
    factors = 2 * rows * tokens * peft.count() * layers // 2
    added = rows * tokens * layers * (5 * transformer.WIDTH + transformer.INNER)
    gathered = 5 * rows * peft.count()  # a few operations for each number
    assert 0 < ours - flops - factors < added + gathered
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(phis)) // 4
    hidden = 4 * rows * tokens * transformer.INNER
    assert used - memory < rows * own + 3 * hidden
    theta = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert used - memory < rows * theta / 4


def test_more_phi_cost_nothing_more():
    few, many = (costs('unrolled', count)[3][1] for count in (2, 8))
    assert many == few


# What else rows have ------------------------------------------------------------------------------


def test_rows_elsewhere_and_arguments_in_common():
    params = {'kernel': normal(0, 3, 4)}

    def model(params, x, shift, *, scale, factor=1.0, tables=None):
        y = jnp.einsum('itj,jk->itk', x['x'], params['kernel'])  # rows in the middle
        return {'y': y * scale[None, :, None] * factor + shift, 'of': tables}, tables[0]

    x, tables = {'x': normal(1, 5, 2, 3)}, (normal(2, 6), jnp.arange(2))
    more = {'scale': normal(3, 2), 'factor': 2.0, 'tables': tables}
    peft = pj.attach(pj.Ia3(target='kernel'), model, params, x, jnp.ones(()), **more)
    phis = [away(peft.init(jax.random.key(0), params), i) for i in range(2)]
    forward = pj.mixed(
        peft,
        model,
        in_axes=(1, None),
        keywords={'tables': (None, 0)},
        out_axes=({'y': 1, 'of': (None, 0)}, None),
    )
    run = jax.jit(lambda *args, **k: forward(*args, factor=2.0, **k))
    rows = pj.Rows(pj.stack(phis), jnp.array([1, 0]))
    arrays = {name: more[name] for name in ('scale', 'tables')}
    out, table = run(params, rows, x, jnp.ones(()), **arrays)
    assert out['y'].shape == (5, 2, 4) and out['of'][1].tolist() == [0, 1]
    np.testing.assert_array_equal(table, tables[0])
    for row, place in enumerate([1, 0]):
        want = peft.wrap(model)(params, phis[place], x, jnp.ones(()), **more)[0]['y']
        close(out['y'][:, row], want[:, row])


def test_dropout_is_drawn_for_each_row():
    case = MODELS['plain']
    method = pj.Lora(rank=2, dropout=0.5, target='query/kernel')
    peft = pj.attach(method, case.fn, case.params, case.inputs)
    phis = pj.stack([away(peft.init(jax.random.key(0), case.params), 1)])
    same = jnp.broadcast_to(case.inputs[:1], (4, *case.inputs.shape[1:]))
    forward = jax.jit(pj.mixed(peft, case.fn))
    rows = pj.Rows(phis, jnp.zeros(4, jnp.int32))
    still = forward(case.params, rows, same)
    close(still, jnp.broadcast_to(still[:1], still.shape), 1e-6)
    one, again = (forward(case.params, rows, same, dropout_key=jax.random.key(1)) for _ in 'ab')
    np.testing.assert_array_equal(one, again)
    assert len(np.unique(np.asarray(one).round(5), axis=0)) == 4


def test_a_mixed_batch_is_trained():
    """Two tasks in one batch, by the step of the library; each learns its own."""
    params = {'kernel': normal(0, 6, 4, fan=6)}
    model = lambda params, x: x @ params['kernel']
    x = normal(1, 32, 6)
    index = jnp.arange(32) % 2
    y = jnp.where(index[:, None] == 0, x @ normal(2, 6, 4), x @ normal(3, 6, 4))
    peft = pj.attach(pj.Lora(rank=4, target='kernel'), model, params, x)
    forward, tx = pj.mixed(peft, model), optax.adam(3e-2)
    phis = pj.stack([peft.init(jax.random.key(i), params) for i in range(2)])

    def loss_fn(params, phis, batch, key):
        x, y, index = batch
        return jnp.mean((forward(params, pj.Rows(phis, index), x) - y) ** 2)

    step, state = pj.train_step(loss_fn, tx), pj.start(tx, phis, jax.random.key(0))
    with jax.numpy_dtype_promotion('standard'):  # of optax's counts
        for _ in range(300):
            state, loss = step(params, state, (x, y, index))
    assert loss < 1e-3
    for place, phi in enumerate(pj.unstack(state.phi)):
        mine = index == place
        close(peft.wrap(model)(params, phi, x[mine]), y[mine], 0.05)


CACHE = models.Cache(1, 1, 0, None)


@pytest.mark.parametrize('method', [pj.Lora(rank=2, target='q_proj'), pj.PrefixTuning(length=3)])
def test_a_mixed_batch_is_continued(method):
    config = models.read_decoder_config(
        {'model_type': 'llama', 'vocab_size': 64, 'hidden_size': 16, 'num_hidden_layers': 2,
         'num_attention_heads': 4, 'intermediate_size': 24}
    )  # fmt: skip
    model = models.Decoder(config)
    prompts = ids(1, 64, 3, 5)
    mask = jnp.ones((3, 5), jnp.int32).at[1, :2].set(0)
    params = model.init(jax.random.key(0), prompts)['params']
    peft = pj.attach(method, model.apply_fn, params, prompts)
    phis = [away(peft.init(jax.random.key(1), params), i) for i in range(2)]
    keywords = {'cache': CACHE}
    mixed = pj.mixed(peft, model.apply_fn, keywords=keywords, out_axes=(0, CACHE))
    how = {'init_cache': model.init_cache, 'length': 4}
    rows = pj.Rows(pj.stack(phis), jnp.array([1, 0, 1]))
    out = pj.generate(mixed, params, rows, prompts, mask, **how)
    forward = peft.wrap(model.apply_fn)
    for row, place in enumerate([1, 0, 1]):
        part = slice(row, row + 1)
        alone = pj.generate(forward, params, phis[place], prompts[part], mask[part], **how)
        assert out.tokens[row].tolist() == alone.tokens[0].tolist()
        close(out.log_probs[row], alone.log_probs[0], 1e-5)


# Refusals -----------------------------------------------------------------------------------------


def wrong(message, call, kind=ValueError):
    with pytest.raises(kind, match=message):
        call()


def test_a_place_that_is_not_there_shows():
    case, peft, inputs, phis, _ = bank('lora_all', 'plain')
    forward = quick.jit(pj.mixed(peft, case.fn))
    out = forward(case.params, pj.Rows(pj.stack(phis), jnp.array([0, 3, -1, 2])), inputs)
    assert jnp.isfinite(out).all(axis=(1, 2)).tolist() == [True, False, False, True]


def test_an_index_is_as_narrow_or_wide_as_it_is():
    params, x = {'w': jnp.eye(3)}, jnp.ones((4, 3))
    model = lambda params, x: x @ params['w']
    peft = pj.attach(pj.Ia3(target='w'), model, params, x)
    phis = {'w': {'l': jnp.tile(jnp.arange(300.0)[:, None], (1, 3))}}
    index = jnp.array([0, 100, 127, -1], jnp.int8)
    out = pj.mixed(peft, model)(params, pj.Rows(phis, index), x)
    np.testing.assert_array_equal(out[:, 0], [0, 100, 127, np.nan])
    wide = np.array([2, 2**32, 2**32 + 1, -(2**32)])  # 0, 1 and 0 in their lower half
    out = pj.mixed(peft, model)(params, pj.Rows(phis, wide), x)
    np.testing.assert_array_equal(out[:, 0], [2, np.nan, np.nan, np.nan])


def test_what_is_no_mixed_batch():
    case, peft, inputs, phis, _ = bank('lora_all', 'plain')
    rows, params = pj.Rows(pj.stack(phis), INDEX), case.params
    forward = pj.mixed(peft, case.fn)
    wrong('of 3 rows .*argument 0 has shape \\(4, 5\\)',
          lambda: forward(params, rows._replace(index=INDEX[:3]), inputs))  # fmt: skip
    wrong('index .* is an array of int, \\(rows,\\); got float32',
          lambda: forward(params, rows._replace(index=jnp.ones(4)), inputs), TypeError)  # fmt: skip
    wrong('index .* is an array of int, \\(rows,\\); got list',
          lambda: forward(params, rows._replace(index=[0] * 4), inputs), TypeError)  # fmt: skip
    wrong('got int32 of shape \\(1, 4\\)',
          lambda: forward(params, rows._replace(index=INDEX[None]), inputs), TypeError)  # fmt: skip
    other = pj.stack([{'x': {'a': jnp.ones(2)}}])
    wrong('phi must be of the model', lambda: forward(params, rows._replace(phis=other), inputs))
    wrong('takes pj.Rows.* got dict', lambda: forward(params, phis[0], inputs), TypeError)
    mean = lambda params, ids: case.fn(params, ids).mean()
    wrong('of one row there must be one result; result has shape \\(\\)',
          lambda: pj.mixed(peft, mean)(params, rows, inputs))  # fmt: skip
    wrong('in_axes must say something of each argument .* got 2 for 1',
          lambda: pj.mixed(peft, case.fn, in_axes=(0, 0))(params, rows, inputs))  # fmt: skip
    wrong("a tree over argument 0; got \\{'x': 0\\}",
          lambda: pj.mixed(peft, case.fn, in_axes={'x': 0})(params, rows, inputs))  # fmt: skip
    wrong('argument 0 has shape \\(4, 5\\), and axis 2',
          lambda: pj.mixed(peft, case.fn, in_axes=2)(params, rows, inputs))  # fmt: skip
    named = pj.mixed(peft, case.fn, keywords={'bais': None})
    wrong("it has no 'bais', but none by name", lambda: named(params, rows, inputs))
    stack = rows._replace(phis={**rows.phis, 'more': jnp.zeros((2, 1))})
    wrong("first axis in common; got 3 at .*2 at 'more'", lambda: forward(params, stack, inputs))


@pytest.mark.parametrize('method', ['prompt', 'prefix', 'prompt_prefix_norms'])
def test_methods_without_a_phi_of_the_base(method):
    case, peft, *_ = bank(method, 'plain')
    wrong('(Prompt|Prefix)Tuning.* does not start at the base',
          lambda: pj.base_phi(peft, case.params))  # fmt: skip


def test_an_adapter_that_starts_elsewhere_has_no_phi_of_the_base():
    case = MODELS['plain']
    method = pj.Adapter(target='down/kernel', reduction=2, initial='bert')
    peft = pj.attach(method, case.fn, case.params, case.inputs)
    wrong('Adapter does not start at the base', lambda: pj.base_phi(peft, case.params))


def test_a_mixed_forward_is_a_value():
    _, peft, *_ = bank('lora_all', 'plain')
    fn = MODELS['plain'].fn
    assert pj.mixed(peft, fn) == pj.mixed(peft, fn)
    assert hash(pj.mixed(peft, fn)) == hash(dataclasses.replace(pj.mixed(peft, fn)))


@pytest.mark.parametrize(
    'axes',
    [{'in_axes': ({'a': 0},)}, {'out_axes': {'y': 0}}, {'keywords': {'more': {'b': 0}}}],
    ids=lambda axes: next(iter(axes)),
)
def test_a_mixed_forward_with_trees_of_axes_is_compiled(axes):
    params, x = {'w': normal(0, 3, 3)}, {'a': normal(1, 4, 3)}
    model = lambda params, x, more: {'y': x['a'] @ params['w'] + more['b']}
    peft = pj.attach(pj.Ia3(target='w'), model, params, x, more={'b': x['a']})
    phis = pj.stack([away(peft.init(jax.random.key(0), params), i) for i in range(3)])
    mixed, rows = pj.mixed(peft, model, **axes), pj.Rows(phis, INDEX)
    out, wanted = (f(params, rows, x, more={'b': x['a']}) for f in (jax.jit(mixed), mixed))
    close(out['y'], wanted['y'], 1e-6)
