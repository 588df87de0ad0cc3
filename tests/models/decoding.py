"""Greedy decoding in its shortest form: prefill, then one token a step."""

import functools

import jax.numpy as jnp
import numpy as np
from quick import jit


@functools.cache
def _program(model):
    def step(params, ids, mask, cache):
        logits, cache = model.apply_fn(params, ids, mask, cache=cache)
        return logits[:, -1].argmax(-1)[:, None].astype(jnp.int32), cache

    return jit(step)


def greedy(model, params, ids, mask, count):
    """The next `count` tokens of prompts that end with their last token."""
    step = _program(model)
    cache = model.init_cache(len(ids), ids.shape[1] + count)
    token, cache = step(params, ids, mask, cache)
    tokens = [token]
    for _ in range(count - 1):
        token, cache = step(params, token, jnp.ones_like(token), cache)
        tokens.append(token)
    return np.concatenate(tokens, axis=1)
