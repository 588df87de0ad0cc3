"""Rotations that go by the length of a text: of each text for itself, and of what it may become."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from peftjax.models import Decoder, read_decoder_config
from peftjax.models._rope import Rope, rotation

ORIGINAL = 8
SIZES = {
    'vocab_size': 30,
    'hidden_size': 16,
    'intermediate_size': 20,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'initializer_range': 0.5,
    'max_position_embeddings': ORIGINAL,
}
DYNAMIC = {'rope_type': 'dynamic', 'factor': 4.0, 'rope_theta': 100.0}
FIELDS = {
    'longrope': {
        'model_type': 'phi3',
        'rope_scaling': {'type': 'longrope', 'short_factor': [1.0, 1.0], 'long_factor': [4.0, 9.0]},
        'max_position_embeddings': 32,
        'original_max_position_embeddings': ORIGINAL,
    },
    'dynamic': {'model_type': 'llama', 'rope_scaling': DYNAMIC},
    # The layers of one kind go by it, those of the other do not.
    'some layers': {
        'model_type': 'gemma3_text',
        'head_dim': 4,
        'query_pre_attn_scalar': 4,
        'sliding_window': 3,
        'layer_types': ['sliding_attention', 'full_attention'],
        'rope_parameters': {
            'full_attention': DYNAMIC,
            'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0},
        },
    },
}
TEXTS = [jax.random.randint(jax.random.key(n), (1, n), 3, 30) for n in (ORIGINAL, 12, 5)]
every = pytest.mark.parametrize('name', FIELDS)


@functools.cache
def build(name):
    model = Decoder(read_decoder_config(SIZES | FIELDS[name]))
    params = jit(model.init)(jax.random.key(0), TEXTS[0])['params']
    return model, params, jit(model.apply_fn)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def padded(text, front, width):
    wide = ((0, 0), (front, width - front - text.shape[1]))
    return jnp.pad(text, wide), jnp.pad(jnp.ones_like(text), wide)


def test_each_text_has_its_own_frequencies():
    short, long = (1.0, 2.0), (4.0, 9.0)
    rope = Rope(dim=4, theta=100.0, scaling='longrope', original=8, short=short, long=long)
    plain = np.array([1, 0.1])
    lengths = jnp.array([[8], [9]])
    np.testing.assert_allclose(rope.frequencies(lengths)[0, 0], plain / short, rtol=1e-6)
    np.testing.assert_allclose(rope.frequencies(lengths)[1, 0], plain / long, rtol=1e-6)
    rope = Rope(dim=4, theta=100.0, scaling='dynamic', original=8, factor=4.0)
    second = (100 * (4 * 10 / 8 - 3) ** 2) ** -0.5
    np.testing.assert_allclose(
        rope.frequencies(jnp.array([[3, 10]]))[0], [plain, [1, second]], rtol=1e-6
    )
    cos, sin = rotation(rope, jnp.array([[0, 5]]), jnp.array([[10]]))
    np.testing.assert_allclose(cos[0, 1], np.cos([5, 5 * second]), rtol=1e-5)
    np.testing.assert_allclose(sin[0, 1], np.sin([5, 5 * second]), rtol=1e-5)


@pytest.mark.slow
@every
def test_neither_padding_nor_other_rows_change_a_text(name):
    _, params, apply = build(name)
    places = [(TEXTS[0], 0), (TEXTS[0], 3), (TEXTS[1], 0), (TEXTS[2], 2)]
    ids, mask = (jnp.concatenate(x) for x in zip(*(padded(*p, 12) for p in places), strict=True))
    together = apply(params, ids, mask)
    for row, (text, front) in enumerate(places):
        close(together[row, front : front + text.shape[1]], apply(params, text)[0])


@every
def test_packed_texts_are_of_their_own_lengths(name):
    _, params, apply = build(name)
    segments = jnp.concatenate([jnp.full_like(x, i) for i, x in enumerate(TEXTS)], axis=1)
    packed = apply(params, jnp.concatenate(TEXTS, axis=1), segment_ids=segments)
    ends = np.cumsum([x.shape[1] for x in TEXTS])[:-1]
    for part, text in zip(jnp.split(packed, ends, axis=1), TEXTS, strict=True):
        close(part, apply(params, text))


@every
def test_a_cache_takes_a_text_to_become_as_long_as_it_allows(name):
    model, params, apply = build(name)
    whole = TEXTS[1]
    slots = whole.shape[1] + 3
    short, short_mask = padded(whole[:, :2], 3, 5)  # its padding takes three of the slots
    ids = jnp.concatenate([short, jnp.full((1, 5), 7)])
    mask = jnp.concatenate([short_mask, jnp.ones((1, 5), jnp.int32)])
    logits, cache = apply(params, ids, mask, cache=model.init_cache(2, slots))
    expected = apply(params, whole)[0]
    close(logits[0, 3:], expected[:2])
    for start in range(2, 12, 5):
        more = jnp.concatenate([whole[:, start : start + 5], jnp.full((1, 5), 7)])
        logits, cache = apply(params, more, cache=cache)
        close(logits[0], expected[start : start + 5])
    assert cache.length.tolist() == [12, 15]


@every
def test_a_cache_of_few_slots_is_of_a_short_text(name):
    model, params, apply = build(name)
    logits, cache = apply(params, TEXTS[0][:, :1], cache=model.init_cache(1, ORIGINAL))
    assert cache.length.tolist() == [0]  # at position 0 nothing is turned
    rest, cache = apply(params, TEXTS[0][:, 1:], cache=cache)
    close(jnp.concatenate([logits, rest], axis=1), apply(params, TEXTS[0]))
    assert cache.length.tolist() == [ORIGINAL]


def test_a_cache_without_a_place_for_the_length_is_refused():
    model, params, _ = build('dynamic')
    cache = model.init_cache(1, 8)
    with pytest.raises(ValueError, match='the length of a text needs its place in the cache'):
        model.apply_fn(params, TEXTS[0], cache=cache._replace(length=None))
    plain = Decoder(read_decoder_config(SIZES | {'model_type': 'llama'}))
    assert plain.init_cache(1, 8).length is None
