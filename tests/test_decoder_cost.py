"""What a gradient step of a scanned decoder costs, against methods written into it by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import llama
import numpy as np
import pytest
from quick import jit
from zoo import ids

import peftjax as pj
from peftjax.models import SAVED, Decoder, read_decoder_config

BATCH, TOKENS, LAYERS = 4, 48, 4
CONFIG = read_decoder_config(
    {
        'model_type': 'llama',
        'vocab_size': 256,
        'hidden_size': 64,
        'num_hidden_layers': LAYERS,
        'num_attention_heads': 4,
        'num_key_value_heads': 2,
        'intermediate_size': 176,
    }
)
MODEL = Decoder(CONFIG)
IDS = ids(0, CONFIG.vocab_size, BATCH, TOKENS)
# Over which part of ours the FLOPs and bytes by hand are bound; virtual tokens go through all of a
# layer in ours, by hand a prefix is keys and values alone.
BOUND = dict.fromkeys(('LoRA', 'DoRA', 'IA3', 'adapters', 'adapters (Houlsby)'), 1.005)
BOUND['prefix tuning'] = 1.005 * (TOKENS + 8) / TOKENS


def arguments(peft: pj.Peft) -> tuple[Any, ...]:
    params = MODEL.init(jax.random.key(0), IDS)['params']
    phi = jax.tree.map(lambda x: x + 0.05, peft.init(jax.random.key(1), params))
    return phi, params, IDS, jnp.roll(IDS, -1, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize('name', BOUND)
def test_a_gradient_step_costs_what_it_costs_by_hand(name: str):
    peft, forward = llama.ours(llama.METHODS[name][0], MODEL, IDS)
    args = jit(lambda: arguments(peft))()
    programs = [
        jax.jit(llama.step(MODEL, function, chunk=64)).lower(*args).compile()
        for function in (forward, llama.by_hand(name, CONFIG))
    ]
    ours, by_hand = (jax.tree.leaves(program(*args)) for program in programs)
    for one, other in zip(ours, by_hand, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=3e-5 * np.abs(other).max())
    flops = [program.cost_analysis()['flops'] for program in programs]
    memory = [program.memory_analysis().temp_size_in_bytes for program in programs]
    assert flops[0] <= BOUND[name] * flops[1]
    assert memory[0] <= BOUND[name] * memory[1]


@pytest.mark.parametrize('name', ['LoRA', 'IA3', 'adapters (Houlsby)'])
def test_a_gradient_keeps_what_was_named_and_nothing_of_the_method(name: str):
    peft, forward = llama.ours(llama.METHODS[name][0], MODEL, IDS)
    args = jax.eval_shape(lambda: arguments(peft))
    jaxpr = jax.make_jaxpr(llama.step(MODEL, forward, chunk=64))(*args).jaxpr
    first, _ = (
        eqn for eqn in jaxpr.eqns if eqn.primitive.name == 'scan' and eqn.params['length'] == LAYERS
    )
    residual, *kept = (var.aval.shape for var in first.outvars)
    width, inner = CONFIG.hidden_size, CONFIG.mlp.width
    named = {
        'query': (4, 16),
        'key': (2, 16),
        'value': (2, 16),
        'gate': (inner,),
        'up': (inner,),
        'attention_output': (width,),
        'mlp_output': (width,),
    }
    assert set(named) == set(SAVED)
    if name != 'adapters (Houlsby)':  # its gradient alone needs what is only added up
        del named['mlp_output']
    assert residual == (BATCH, TOKENS, width)
    expected = [*named.values(), (width,)]  # and what comes into each layer
    assert sorted(kept) == sorted((LAYERS, BATCH, TOKENS, *shape) for shape in expected)
