"""Generation with a cache against the whole forward, token by token, for every method."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import first_everywhere

import peftjax as pj
from peftjax.models import Cache, Decoder, read_decoder_config

CONFIG = read_decoder_config(
    {
        'model_type': 'llama',
        'vocab_size': 37,
        'hidden_size': 16,
        'num_hidden_layers': 2,
        'num_attention_heads': 4,
        'num_key_value_heads': 2,
        'intermediate_size': 24,
        'max_position_embeddings': 64,
        'initializer_range': 0.4,
    }
)
MODEL = Decoder(CONFIG)
IDS = jnp.array([[5, 9, 2, 30, 11], [8, 4, 21, 7, 3]], jnp.int32)
PARAMS = jax.jit(MODEL.init)(jax.random.key(0), IDS)['params']
LINEAR = 'q_proj|v_proj|down_proj'
METHODS = {
    'lora': pj.Lora(target=LINEAR, rank=2),
    'dora': pj.Dora(target=LINEAR, rank=2),
    'ia3': pj.Ia3(target='k_proj|v_proj'),
    'adapter': pj.HOULSBY,
    'trainable': pj.Trainable(target='norm'),
    'prompt': pj.PromptTuning(length=3),
    'prefix': pj.PrefixTuning(length=3),
    'prefix without shift': pj.PrefixTuning(length=3, shift=False),
    'chain': pj.chain(pj.Lora(target=LINEAR, rank=2), pj.PromptTuning(length=2), pj.PrefixTuning()),
    'chain, one without shift': pj.chain(
        pj.PromptTuning(length=2), pj.PrefixTuning(length=3, shift=False)
    ),
}
LENGTH = 5


@functools.cache
def adapted(name):
    """A plan, and a phi away from its start."""
    ids = {'position_ids': jnp.zeros_like(IDS)} if 'without shift' in name else {}
    peft = pj.attach(METHODS[name], MODEL.apply_fn, PARAMS, IDS, **ids)
    fresh = peft.init(jax.random.key(1), PARAMS)
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return peft, jax.tree.unflatten(tree, moved)


def by_whole_forwards(forward, phi, ids, length, counted=False):
    """The likeliest next token of the whole text so far, again and again."""
    width = ids.shape[1] + length
    text = jnp.pad(ids, ((0, 0), (0, length)))
    slots = jnp.arange(width)[None]

    @jax.jit
    def next_token(text, count):
        where = {'position_ids': jnp.broadcast_to(slots, text.shape)} if counted else {}
        mask = jnp.broadcast_to(slots < count, text.shape).astype(jnp.int32)
        logits = forward(PARAMS, phi, text, attention_mask=mask, **where)
        return jnp.take_along_axis(logits, (count - 1)[None, None, None], 1)[:, 0].argmax(-1)

    for count in range(ids.shape[1], width):
        text = text.at[:, count].set(next_token(text, jnp.array(count)))
    return text[:, -length:]


@pytest.mark.parametrize('name', first_everywhere(METHODS))
def test_the_cache_changes_no_token(name):
    peft, phi = adapted(name)
    forward = peft.wrap(MODEL.apply_fn)
    out = pj.generate(forward, PARAMS, phi, IDS, init_cache=MODEL.init_cache, length=LENGTH)
    expected = by_whole_forwards(forward, phi, IDS, LENGTH, 'without shift' in name)
    np.testing.assert_array_equal(out.tokens, expected)
    np.testing.assert_array_equal(out.lengths, [LENGTH, LENGTH])
    base = pj.generate(
        lambda p, phi, *a, **k: MODEL.apply_fn(p, *a, **k), PARAMS, {}, IDS,
        init_cache=MODEL.init_cache, length=LENGTH,
    )  # fmt: skip
    assert (base.tokens != out.tokens).any()


@pytest.mark.parametrize('name', [name for name in METHODS if 'without shift' in name])
def test_positions_go_on_where_the_prompt_left_them(name):
    peft, phi = adapted(name)
    forward = peft.wrap(MODEL.apply_fn)
    out = pj.generate(forward, PARAMS, phi, IDS, init_cache=MODEL.init_cache, length=LENGTH)
    text = jnp.concatenate([IDS, out.tokens], axis=1)
    positions = jnp.broadcast_to(jnp.arange(text.shape[1]), text.shape)
    scores = jax.nn.log_softmax(jax.jit(forward)(PARAMS, phi, text, position_ids=positions))
    close_to_chosen(out, scores[:, IDS.shape[1] - 1 : -1])


def close_to_chosen(out, scores):
    picked = jnp.take_along_axis(scores, out.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(out.log_probs, picked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['lora', 'prefix'])
def test_padding_on_either_side_changes_nothing(name):
    peft, phi = adapted(name)
    run = functools.partial(
        pj.generate, peft.wrap(MODEL.apply_fn), PARAMS, phi,
        init_cache=MODEL.init_cache, length=LENGTH,
    )  # fmt: skip
    short = jnp.array([[5, 9, 2, 30, 11], [0, 0, 21, 7, 3], [21, 7, 3, 0, 0]], jnp.int32)
    mask = jnp.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    out = run(short, mask)
    np.testing.assert_array_equal(out.tokens[0], run(IDS[:1]).tokens[0])
    alone = run(short[1:2, 2:])
    np.testing.assert_array_equal(out.tokens[1:], np.repeat(alone.tokens, 2, 0))
    np.testing.assert_allclose(out.log_probs[1:], np.repeat(alone.log_probs, 2, 0), atol=1e-5)


def test_one_token_prompts_after_virtual_tokens():
    peft, phi = adapted('prompt')
    forward = peft.wrap(MODEL.apply_fn)
    one = IDS[:, :1]
    out = pj.generate(forward, PARAMS, phi, one, init_cache=MODEL.init_cache, length=3)
    np.testing.assert_array_equal(out.tokens, by_whole_forwards(forward, phi, one, 3))


def test_the_front_door_knows_what_continues():
    forward, phi = pj.method_wrap(
        METHODS['prefix'], MODEL.apply_fn, PARAMS, IDS, key=jax.random.key(1)
    )
    run = functools.partial(pj.generate, init_cache=MODEL.init_cache, length=3)
    out = run(forward, PARAMS, phi, IDS)
    same = run(forward.peft.wrap(MODEL.apply_fn), PARAMS, phi, IDS)
    np.testing.assert_array_equal(out.tokens, same.tokens)


def test_a_stop_token_ends_its_row_and_all_rows_end_the_loop():
    peft, phi = adapted('lora')
    run = functools.partial(
        pj.generate, peft.wrap(MODEL.apply_fn), PARAMS, phi, IDS,
        init_cache=MODEL.init_cache, pad_id=36,
    )  # fmt: skip
    free = run(length=8)
    stops = [int(free.tokens[0, 2]), int(free.tokens[1, 4])]
    ends = [1 + min(int(np.argmax(np.asarray(free.tokens[row]) == s)) for s in stops
                    if s in free.tokens[row]) for row in (0, 1)]  # fmt: skip
    out = run(length=8, stop=stops)
    np.testing.assert_array_equal(out.lengths, ends)
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(out.tokens[row, :end], free.tokens[row, :end])
        assert (out.tokens[row, end:] == 36).all() and not out.log_probs[row, end:].any()


def test_log_probs_are_those_of_the_whole_forward():
    peft, phi = adapted('lora')
    forward = jax.jit(peft.wrap(MODEL.apply_fn))
    out = pj.generate(
        peft.wrap(MODEL.apply_fn), PARAMS, phi, IDS, init_cache=MODEL.init_cache, length=LENGTH,
        sampling=pj.Sampling(temperature=1.5), key=jax.random.key(5),
    )  # fmt: skip
    text = jnp.concatenate([IDS, out.tokens], 1)
    close_to_chosen(out, jax.nn.log_softmax(forward(PARAMS, phi, text))[:, IDS.shape[1] - 1 : -1])


LOGITS = jnp.log(jnp.array([0.5, 0.2, 0.15, 0.1, 0.05]))


@pytest.mark.parametrize(
    ('sampling', 'odds'),
    [
        (pj.Sampling(), [0.5, 0.2, 0.15, 0.1, 0.05]),
        (pj.Sampling(temperature=0.5), np.array([0.5, 0.2, 0.15, 0.1, 0.05]) ** 2 / 0.325),
        (pj.Sampling(top_k=2), [5 / 7, 2 / 7, 0, 0, 0]),
        (pj.Sampling(top_p=0.75), [0.5 / 0.85, 0.2 / 0.85, 0.15 / 0.85, 0, 0]),
        (pj.Sampling(top_p=0.01), [1, 0, 0, 0, 0]),
        (pj.Sampling(top_k=3, top_p=0.6), [5 / 7, 2 / 7, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_by_their_odds(sampling, odds):
    count = 20000
    drawn = sampling.draw(jax.random.key(0), jnp.broadcast_to(LOGITS, (count, 5)))
    found = np.bincount(drawn, minlength=5) / count
    assert found[np.array(odds) == 0].sum() == 0
    np.testing.assert_allclose(found, odds, atol=5 * 0.5 / np.sqrt(count))


@pytest.mark.parametrize('temperature', [1e-30, 1e-38, 1e-45, 1e-300])
def test_the_least_temperatures_draw_the_likeliest_token(temperature):
    logits = jnp.array([[20.0, 100.0, 60.0, -jnp.inf], [1.0, 0.0, 1.001, 0.5]])
    draw = pj.Sampling(temperature=temperature).draw
    for seed in range(4):
        assert draw(jax.random.key(seed), logits).tolist() == [1, 2]


@pytest.mark.parametrize('temperature', [1e38, 1e300, float('inf')])
def test_the_greatest_temperatures_draw_whatever_can_be(temperature):
    logits = jnp.broadcast_to(jnp.array([9.0, -jnp.inf, 0.0]), (100, 3))
    drawn = pj.Sampling(temperature=temperature).draw(jax.random.key(0), logits)
    assert set(drawn.tolist()) == {0, 2}


@pytest.mark.parametrize(
    ('sampling', 'drawn'),
    [
        (pj.Sampling(top_k=1), {0}),
        (pj.Sampling(top_k=3), {0, 1, 2}),
        (pj.Sampling(top_p=0.2), {0, 1}),  # each has 1/8
        (pj.Sampling(top_k=4, top_p=0.3), {0, 1}),
    ],
    ids=str,
)
def test_no_more_are_drawn_from_where_all_are_alike(sampling, drawn):
    assert set(sampling.draw(jax.random.key(0), jnp.zeros((200, 8))).tolist()) == drawn


def test_one_program_serves_every_call():
    peft, phi = adapted('lora')
    traces = []

    def apply(*args, **kwargs):
        traces.append(1)
        return MODEL.apply_fn(*args, **kwargs)

    for _ in range(2):  # a forward made anew is the same forward
        pj.generate(peft.wrap(apply), PARAMS, phi, IDS, init_cache=MODEL.init_cache, length=2)
    first = len(traces)
    pj.generate(peft.wrap(apply), PARAMS, phi, IDS + 1, init_cache=MODEL.init_cache, length=2)
    assert len(traces) == first == 2


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'tokens': IDS[:, :0]}, 'a token at least'),
        ({'length': 0}, 'length must be at least 1; got 0'),
        ({'sampling': pj.Sampling()}, 'sampling and key go together'),
        ({'key': jax.random.key(0)}, 'sampling and key go together'),
        ({'attention_mask': jnp.ones((2, 4))}, 'shape \\(2, 5\\); got shape \\(2, 4\\)'),
        ({'attention_mask': jnp.ones((1, 5))}, 'shape \\(2, 5\\); got shape \\(1, 5\\)'),
        ({'attention_mask': jnp.ones((2, 5)).at[1].set(0)}, 'it leaves none in rows \\[1\\]'),
    ],
)
def test_errors(change, message):
    peft, phi = adapted('lora')
    call = dict(tokens=IDS, init_cache=MODEL.init_cache, length=2) | change
    with pytest.raises(ValueError, match=message):
        pj.generate(peft.wrap(MODEL.apply_fn), PARAMS, phi, call.pop('tokens'), **call)


@pytest.mark.parametrize('method', [pj.PromptTuning, pj.PrefixTuning])
def test_virtual_tokens_at_the_back_are_not_continued(method):
    """No real token would see them in the whole forward, and all that is generated would."""
    forward, phi = pj.method_wrap(
        method(length=3, side='back'), MODEL.apply_fn, PARAMS, IDS, key=jax.random.key(1)
    )
    with pytest.raises(ValueError, match="in front of a text that goes on.*3 with side='back'"):
        pj.generate(forward, PARAMS, phi, IDS, init_cache=MODEL.init_cache, length=2)


@pytest.mark.parametrize('field', [{'temperature': 0}, {'top_k': 0}, {'top_p': 0}, {'top_p': 1.1}])
def test_sampling_is_checked(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        pj.Sampling(**field)


# What is not a number ----------------------------------------------------------------------------

GPT2 = Decoder(
    read_decoder_config(
        {'model_type': 'gpt2', 'vocab_size': 37, 'n_embd': 16, 'n_layer': 2, 'n_head': 4,
         'n_positions': 8}
    )
)  # fmt: skip


@functools.cache
def of_positions(method=None):
    """A model of eight positions."""
    params = jax.jit(GPT2.init)(jax.random.key(0), IDS)['params']
    method = pj.Trainable(target='ln_f') if method is None else method
    said = {} if method.virtual is None or method.virtual.shift else {'position_ids': IDS}
    peft = pj.attach(method, GPT2.apply_fn, params, IDS, **said)
    return peft.wrap(GPT2.apply_fn), params, peft.init(jax.random.key(1), params)


@pytest.mark.parametrize(
    ('method', 'most'),
    [
        (pj.Trainable(target='ln_f'), 5),
        (pj.PrefixTuning(length=2), 3),
        (pj.PrefixTuning(length=2, shift=False), 5),
    ],
    ids=str,
)
def test_no_more_tokens_than_positions(method, most):
    """A prompt of four tokens, padded: padding has no position; nor has what is drawn last."""
    forward, params, phi = of_positions(method)
    run = functools.partial(pj.generate, forward, params, phi, init_cache=GPT2.init_cache)
    mask = jnp.array([[1, 1, 1, 1, 0], [0, 0, 0, 1, 1]])
    assert run(IDS, mask, length=most).lengths.tolist() == [most, most]
    with pytest.raises(ValueError, match='at most 8 tokens.* 4 of a prompt.* are 9. Lower length'):
        run(IDS, mask, length=most + 1)
    with pytest.raises(ValueError, match='at most 8 tokens.* 5 of a prompt.* are 9. Lower length'):
        run(IDS, length=most)


def test_of_a_traced_mask_one_token_is_known():
    forward, params, phi = of_positions()
    run = functools.partial(pj.generate, forward, params, phi, IDS, init_cache=GPT2.init_cache)
    jax.eval_shape(functools.partial(run, length=8), jnp.ones((2, 5)))
    with pytest.raises(ValueError, match='1 of a prompt.* are 9'):
        jax.eval_shape(functools.partial(run, length=9), jnp.ones((2, 5)))


def test_a_row_ends_where_its_logits_are_not_numbers():
    forward, params, phi = of_positions()
    how = {'init_cache': lambda batch, slots: GPT2.init_cache(batch, slots), 'pad_id': 36}
    run = functools.partial(pj.generate, forward, params, phi, **how)
    mask = jnp.array([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    with pytest.raises(ValueError, match='rows \\[0\\] are not, after \\[4\\] .*more tokens than'):
        run(IDS, mask, length=6)
    out = jax.jit(functools.partial(run, length=6))(IDS, mask)
    np.testing.assert_array_equal(out.lengths, [4, 6])
    np.testing.assert_array_equal(out.tokens[0, 4:], [36, 36])
    np.testing.assert_array_equal(np.isnan(out.log_probs), [[0, 0, 0, 0, 1, 0], [0] * 6])
    assert not out.log_probs[0, 5]
    alone = run(IDS[1:], mask[1:], length=6)
    np.testing.assert_array_equal(out.tokens[1:], alone.tokens)


@pytest.mark.parametrize('sampling', [None, pj.Sampling()])
def test_an_id_outside_of_the_vocabulary_is_told_by_its_row(sampling):
    forward, params, phi = of_positions()
    key = None if sampling is None else jax.random.key(0)
    run = functools.partial(
        pj.generate, forward, params, phi, IDS.at[1, 2].set(37),
        init_cache=GPT2.init_cache, length=2, sampling=sampling, key=key,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match='rows \\[1\\] are not, after \\[0\\] .*outside of its voc'
    ):
        run()
    np.testing.assert_array_equal(jax.jit(run)().lengths, [2, 0])


def test_a_token_that_cannot_be_is_no_loss():
    """Logits of minus infinity are of tokens that are never drawn."""
    peft, phi = adapted('lora')
    forward = peft.wrap(MODEL.apply_fn)

    def without_evens(params, phi, *args, **kwargs):
        logits, cache = forward(params, phi, *args, **kwargs)
        return jnp.where(jnp.arange(37) % 2 == 0, -jnp.inf, logits), cache

    out = pj.generate(without_evens, PARAMS, phi, IDS, init_cache=MODEL.init_cache, length=3)
    assert (out.tokens % 2 == 1).all() and jnp.isfinite(out.log_probs).all()


# Rotations that go by the length of a text --------------------------------------------------------

SCALED = {
    'longrope': {
        'model_type': 'phi3',
        'rope_scaling': {'type': 'longrope', 'short_factor': [1.0, 1.0], 'long_factor': [4.0, 9.0]},
        'original_max_position_embeddings': 8,
        'max_position_embeddings': 32,
    },
    'dynamic': {
        'model_type': 'llama',
        'rope_scaling': {'rope_type': 'dynamic', 'factor': 4.0},
        'max_position_embeddings': 8,
    },
}
VIRTUAL = {
    'base': pj.Trainable(target='norm'),
    'prompt': pj.PromptTuning(length=3),
    'prefix without shift': pj.PrefixTuning(length=3, shift=False),
    'prompt without shift': pj.PromptTuning(length=3, shift=False),
}


@functools.cache
def scaled(rotation):
    fields = {'vocab_size': 37, 'hidden_size': 16, 'num_hidden_layers': 2, 'intermediate_size': 24,
              'num_attention_heads': 4, 'initializer_range': 0.4}  # fmt: skip
    model = Decoder(read_decoder_config(fields | SCALED[rotation]))
    return model, jax.jit(model.init)(jax.random.key(0), IDS)['params']


@pytest.mark.slow
@pytest.mark.parametrize('name', VIRTUAL)
@pytest.mark.parametrize('rotation', SCALED)
@pytest.mark.parametrize('length', [2, 3, 6])
def test_what_is_generated_is_the_whole_text_of_its_length(rotation, name, length):
    """Rows of five tokens and one, before and after the original length of eight."""
    model, params = scaled(rotation)
    say = lambda x: {'position_ids': x} if 'without shift' in name else {}
    peft = pj.attach(VIRTUAL[name], model.apply_fn, params, IDS, **say(IDS))
    phi, forward = peft.init(jax.random.key(1), params), peft.wrap(model.apply_fn)
    mask = jnp.array([[1, 1, 1, 1, 1], [0, 0, 1, 0, 0]])
    out = pj.generate(forward, params, phi, IDS, mask, init_cache=model.init_cache, length=length)
    for row, prompt in enumerate([IDS[:1], IDS[1:, 2:3]]):
        text = jnp.concatenate([prompt, out.tokens[row : row + 1]], axis=1)
        logits = forward(params, phi, text, **say(jnp.arange(text.shape[1])[None]))
        scores = jax.nn.log_softmax(logits)[:, prompt.shape[1] - 1 : -1]
        close_to_chosen(jax.tree.map(lambda x, row=row: x[row : row + 1], out), scores)


def test_rows_of_a_mixed_batch_have_lengths_of_their_own():
    model, params = scaled('longrope')
    peft = pj.attach(METHODS['prompt'], model.apply_fn, params, IDS)
    phis = [peft.init(jax.random.key(seed), params) for seed in (1, 2)]
    axes = Cache(1, 1, 0, None, 0)
    mixed = pj.mixed(peft, model.apply_fn, keywords={'cache': axes}, out_axes=(0, axes))
    mask = jnp.array([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    run = functools.partial(pj.generate, init_cache=model.init_cache, length=3)
    out = run(mixed, params, pj.Rows(pj.stack(phis), jnp.array([1, 0])), IDS, mask)
    for row, place in enumerate([1, 0]):
        part = slice(row, row + 1)
        alone = run(peft.wrap(model.apply_fn), params, phis[place], IDS[part], mask[part])
        np.testing.assert_array_equal(out.tokens[part], alone.tokens)
        np.testing.assert_allclose(out.log_probs[part], alone.log_probs, atol=1e-5)
