"""Causal attention in blocks is attention over everything, with the later keys left out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from peftjax.models import Decoder, attention, plain_attention, read_decoder_config
from peftjax.models._causal import causal_attention
from peftjax.models._sight import causal_mask

TOKENS = 300  # two blocks
SOFT = functools.partial(plain_attention, soft_cap=2.0, scale=0.7)
REAL = jnp.ones((2, 1, TOKENS), bool).at[1, :, 100:150].set(False)
SEGMENTS = jnp.searchsorted(jnp.array([90, 200, 201]), jnp.arange(TOKENS), side='right')
MASKS = {
    'causal': causal_mask(TOKENS, None),
    'padded': causal_mask(TOKENS, None) & REAL,
    'packed': causal_mask(TOKENS, None) & (SEGMENTS[:, None] == SEGMENTS)[None],
}


def draw(tokens=TOKENS):
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (4, 2, 2, 4)
    return [jax.random.normal(k, (2, tokens, h, 6)) for k, h in zip(keys, heads, strict=True)]


@pytest.mark.parametrize('form', [attention, SOFT], ids=['fused', 'soft cap'])
@pytest.mark.parametrize('mask', MASKS)
def test_blocks_are_the_whole(form, mask):
    agree(form, MASKS[mask], None)


@pytest.mark.parametrize('window', [1, 7, 150, 151, 299])
def test_blocks_of_a_window_are_the_whole(window):
    agree(attention, causal_mask(TOKENS, window), window)


def agree(form, mask, window):
    *qkv, weight = draw()
    blocks = functools.partial(causal_attention, form, mask=mask, window=window)
    whole = functools.partial(form, mask=mask)
    run = lambda f: jit(jax.value_and_grad(lambda qkv: (f(*qkv) * weight).sum()))(qkv)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), run(blocks), run(whole)
    )


SHARES = {200: 1, 256: 3 / 4, 512: 5 / 8, 1024: 9 / 16}


@pytest.mark.parametrize(('tokens', 'share'), SHARES.items())
def test_later_keys_are_not_multiplied(tokens, share):
    qkv, mask = draw(tokens)[:3], causal_mask(tokens, None)

    def products(fn):
        jaxpr = jax.make_jaxpr(fn)(*qkv).jaxpr
        sizes = [e.outvars[0].aval.size * e.invars[0].aval.shape[-1] for e in dots(jaxpr)]
        assert sizes
        return sum(sizes)

    blocks = products(lambda *x: causal_attention(plain_attention, *x, mask))
    assert blocks == share * products(lambda *x: plain_attention(*x, mask))


def dots(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == 'dot_general':
            yield eqn
        for value in eqn.params.values():
            if hasattr(inside := getattr(value, 'jaxpr', value), 'eqns'):
                yield from dots(inside)


@pytest.mark.slow
@pytest.mark.parametrize('window', [None, 170], ids=['global', 'windows'])
def test_a_decoder_reads_long_texts_as_with_a_cache(window):
    """The cache's attention knows no blocks: its slots are not its tokens."""
    fields = {
        'model_type': 'mistral' if window is None else 'gemma3_text',
        'vocab_size': 30,
        'hidden_size': 16,
        'intermediate_size': 20,
        'num_hidden_layers': 2,
        'num_attention_heads': 4,
        'num_key_value_heads': 2,
        'head_dim': 6,
        'initializer_range': 0.3,
        'sliding_window': window,
        'sliding_window_pattern': 2,
    }
    model = Decoder(read_decoder_config(fields))
    ids = jax.random.randint(jax.random.key(1), (2, TOKENS), 0, 30)
    mask = REAL[:, 0].astype(jnp.int32)
    params = jit(model.init)(jax.random.key(0), ids[:, :2])['params']
    cache = model.init_cache(2, TOKENS)
    read, _ = jit(model.apply_fn)(params, ids, mask, cache=cache)
    at_once = jit(model.apply_fn)(params, ids, mask)
    np.testing.assert_allclose(at_once[REAL[:, 0]], read[REAL[:, 0]], rtol=1e-4, atol=1e-4)
