"""One attention layer with everything that goes with tokens, and the same with explicit prompts."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from zoo import ids, normal

PARAMS = {
    'wte': {'embedding': normal(0, 9, 4)},
    'wpe': {'embedding': normal(1, 16, 4)},
    'types': {'embedding': normal(2, 2, 4)},
    **{name: {'kernel': normal(3 + i, 4, 4)} for i, name in enumerate(('query', 'key', 'value'))},
}
IDS = ids(0, 9, 2, 5)
MASK = jnp.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], jnp.int32)
TYPES = jnp.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]], jnp.int32)
PLACES = jnp.array([[2, 3, 4, 5, 6], [1, 2, 3, 4, 5]], jnp.int32)


def model(params, ids, attention_mask=None, token_type_ids=None, position_ids=None, causal=False):
    """Embeds and attends; positions are counted where they are not given."""
    if position_ids is None:
        position_ids = jnp.arange(ids.shape[-1], dtype=jnp.int32)[None]
    x = params['wte']['embedding'][ids] + params['wpe']['embedding'][position_ids]
    if token_type_ids is not None:
        x = x + params['types']['embedding'][token_type_ids]
    mask = jnp.ones(ids.shape) if attention_mask is None else attention_mask
    return attend(params, x, mask.astype(bool), causal)


def attend(params, x, mask, causal=False, key=None, value=None):
    """Attention over `x`, after a prefix of keys and values `(prefix, width)` if there is one."""
    q, k, v = (x @ params[name]['kernel'] for name in ('query', 'key', 'value'))
    q, k, v = (checkpoint_name(y, n) for y, n in ((q, 'query'), (1.5 * k, 'key'), (v, 'value')))
    if key is not None:
        wide = lambda prefix: jnp.broadcast_to(prefix, (len(x), *prefix.shape))
        k, v = jnp.concatenate([wide(key), k], 1), jnp.concatenate([wide(value), v], 1)
        mask = jnp.pad(mask, ((0, 0), (len(key), 0)), constant_values=True)
    ones = jnp.ones((q.shape[1], k.shape[1]), bool)
    seen = jnp.tril(ones, k.shape[1] - q.shape[1]) if causal else ones
    scores = jnp.where(mask[:, None] & seen[None], q @ k.swapaxes(1, 2), -1e9)
    return jax.nn.softmax(scores) @ v
