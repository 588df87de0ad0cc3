"""cuDNN's attention: taken where it serves, seen by lowering for CUDA, which needs no GPU.

On a machine with an NVIDIA GPU the comparison of numbers runs through the kernel itself.
"""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import jit

import peftjax as pj
from peftjax import losses, models
from peftjax._flops import flops
from peftjax.models import Compute, Decoder, _kernel, plain_attention, read_decoder_config
from peftjax.models._decoder_attention import attend
from peftjax.models._decoder_config import Attention, LayerKind
from peftjax.models._load_decoder import saved_names
from peftjax.models._sight import causal_mask, find_places, find_sights

TOKENS = 64
FIELDS = {
    'model_type': 'llama',
    'vocab_size': 128,
    'hidden_size': 64,
    'intermediate_size': 96,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'num_key_value_heads': 4,
}
GROUPED = FIELDS | {'num_key_value_heads': 2}
WINDOW = GROUPED | {'model_type': 'mistral', 'sliding_window': 16}
GEMMA = {'head_dim': 16, 'query_pre_attn_scalar': 16, 'sliding_window': 16}
LOCAL_AND_GLOBAL = GROUPED | GEMMA | {'model_type': 'gemma3_text', 'sliding_window_pattern': 2}
CAPPED = GROUPED | GEMMA | {'model_type': 'gemma2', 'attn_logit_softcapping': 50.0}


def half(remat='none', **more):
    """Computation in half precision."""
    return Compute(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, save=saved_names(remat), **more)


HALF = half()
PLAIN, BIASED = '__cudnn$fmhaSoftmax', '__cudnn$fmhaScaleBiasSoftmax'


@pytest.fixture
def cuda(monkeypatch):
    """JAX takes this for a machine with a GPU, until something is to be run."""
    # JAX asks an installed cuDNN for its version, and has no other way to be told one
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(_kernel, '_capability', lambda: 9.0)
    monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91300)


def traced(fields, compute, tokens=TOKENS, rows=2, rank=4, **inputs):
    """LoRA's step on all linears, from shapes: the program, theta, and how much is trained."""
    model = Decoder(read_decoder_config(fields), compute)
    ids = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)['params']

    def mean(params, ids):
        given = dict.fromkeys(inputs, ids)
        hidden = model.apply_fn(params, ids, method='hidden', **given)
        head = model.head_weight(params)
        targets = losses.next_tokens(ids)
        return losses.next_token_loss(hidden, head.weight, targets, soft_cap=head.soft_cap).mean

    method = pj.Lora(rank=rank, target=models.linears(model.config))
    peft = pj.attach(method, mean, params, ids)
    forward, tx = peft.wrap(mean), optax.sgd(1e-4)
    phi = jax.eval_shape(peft.init, jax.random.key(0), params)
    state = jax.eval_shape(lambda phi: pj.start(tx, phi, jax.random.key(0)), phi)
    step = pj.train_step(lambda params, phi, ids, key: forward(params, phi, ids), tx)
    return step.trace(params, state, ids), params, peft.count()


def calls(program):
    """The kernel's calls in a program lowered for CUDA, name, mask and window of each; its text."""
    text = program.lower(lowering_platforms=('cuda',)).as_text()
    found = re.findall(r'@(__cudnn\$\w+)\(.*?backend_config = "(.*?[^\\])"', text)
    told = [(name, json.loads(re.sub(r'\\22', '"', config))) for name, config in found]
    configs = [(name, config['cudnn_fmha_backend_config']) for name, config in told]
    return [(name, c['mask_type'], c['sliding_window_length']) for name, c in configs], text


SERVED = {
    'causal': (FIELDS, {}, (PLAIN, 'CAUSAL', 0)),
    'groups of heads': (GROUPED, {}, (PLAIN, 'CAUSAL', 0)),
    'window': (WINDOW, {}, (PLAIN, 'CAUSAL', 16)),
    'packed rows': (GROUPED, {'segment_ids'}, (BIASED, 'CAUSAL', 0)),
    'packed rows, window': (WINDOW, {'segment_ids'}, (BIASED, 'CAUSAL', 0)),
    'padding': (GROUPED, {'attention_mask'}, (BIASED, 'CAUSAL', 0)),
    'local and global': (LOCAL_AND_GLOBAL, {}, (BIASED, 'CAUSAL', 0)),
}


@pytest.mark.parametrize('case', SERVED)
def test_a_training_step_calls_the_kernel_forward_and_backward(cuda, case):
    fields, inputs, (name, mask, window) = SERVED[case]
    found, text = calls(traced(fields, HALF, **dict.fromkeys(inputs))[0])
    assert found == [(name, mask, window), (f'{name}Backward', mask, window)]
    assert not scores(text)


NOT_SERVED = {
    'soft cap': (CAPPED, HALF, TOKENS, {}),
    'float32': (GROUPED, Compute(save=None), TOKENS, {}),
    'the plain form': (GROUPED, half(attention='plain'), TOKENS, {}),
    'an odd length under a mask': (GROUPED, HALF, TOKENS - 1, {'segment_ids'}),
    'an odd width of heads': (GROUPED | {'head_dim': 12}, HALF, TOKENS, {}),
}


@pytest.mark.parametrize('case', NOT_SERVED)
def test_where_the_kernel_does_not_serve_scores_are_computed(cuda, case):
    fields, compute, tokens, inputs = NOT_SERVED[case]
    found, text = calls(traced(fields, compute, tokens, **dict.fromkeys(inputs))[0])
    assert not found
    assert scores(text, tokens)


def scores(text, tokens=TOKENS):
    """Products that give a number for each pair of tokens, heads of a group one after another."""
    wide = rf'-> tensor<2x2x{2 * tokens}x{tokens}x|-> tensor<2x4x{tokens}x{tokens}x'
    return [line for line in text.splitlines() if 'dot_general' in line and re.search(wide, line)]


def test_without_a_gpu_there_is_no_kernel(monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    for told, found in (('9.0', 9.0), ('12.1', 12.1), ('gfx942', 0.0), (None, 0.0)):
        device = type('Device', (), {} if told is None else {'compute_capability': told})
        monkeypatch.setattr(jax, 'devices', lambda device=device: [device])
        assert _kernel._capability() == found
    monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
    assert _kernel._capability() == 0


@pytest.mark.parametrize('remat, forwards', [('none', 1), ('names', 1), ('full', 2)])
def test_attention_is_computed_again_only_where_nothing_is_kept(cuda, remat, forwards):
    for scan in (True, False):
        found, _ = calls(traced(GROUPED, half(remat, scan_layers=scan))[0])
        layers = 1 if scan else 3
        names = [name for name, *_ in found]
        assert names.count(PLAIN) == layers * forwards
        assert names.count(f'{PLAIN}Backward') == layers


def test_the_step_of_a_llama_of_eight_billion_parameters(cuda):
    shapes = pathlib.Path(__file__).parents[1] / 'cli/shapes/llama-3.1-8b.json'
    fields = json.loads(shapes.read_text())
    names, none = (
        traced(fields, half(remat), tokens=4096, rows=2, rank=16) for remat in ('names', 'none')
    )
    found, _ = calls(names[0])
    assert found == [(PLAIN, 'CAUSAL', 0), (f'{PLAIN}Backward', 'CAUSAL', 0)]
    # The kernel hides its products. The others run once forward and once back to their input, and
    # phi gets a gradient besides.
    norms, embedding, phi = 65 * 4096, 128_256 * 4096, 41_943_040
    products = sum(leaf.size for leaf in jax.tree.leaves(none[1])) - norms - embedding
    assert none[2] == phi
    assert flops(none[0].jaxpr) == 8192 * (4 * products + 6 * phi)


# Numbers -----------------------------------------------------------------------------------------

SEGMENTS = jnp.repeat(jnp.array([[1, 2, 3, 3], [1, 1, 1, 2]], jnp.int32), TOKENS // 4, axis=1)
PADDED = (jnp.arange(TOKENS) >= jnp.array([[10], [0]])).astype(jnp.int32)
NUMBERS = {
    'causal': (4, None, None, None),
    'groups of heads': (2, None, None, None),
    'window': (2, 16, None, None),
    'packed rows': (2, None, None, SEGMENTS),
    'packed rows, window': (2, 16, None, SEGMENTS),
    'padding': (2, None, PADDED, None),
}


@pytest.mark.parametrize('case', NUMBERS)
def test_numbers_and_gradients_are_those_of_the_formula(case):
    kv_heads, window, padding, segments = NUMBERS[case]
    shape = Attention(heads=4, kv_heads=kv_heads, head_dim=64, scale=0.125)
    places, _ = find_places((2, TOKENS), padding, segments, None)
    sight = find_sights((LayerKind(window=window),), places, jnp.zeros((1, TOKENS), jnp.int32))
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key, heads: jax.random.normal(key, (2, TOKENS, heads, 64), jnp.bfloat16)
    qkv = tuple(draw(key, heads) for key, heads in zip(keys, (4, kv_heads, kv_heads), strict=False))
    weight = draw(keys[3], 4).astype(jnp.float32)
    if padding is not None:
        weight = weight * padding[..., None, None].astype(jnp.float32)
    if jax.default_backend() == 'gpu':
        assert _kernel.serves(qkv[0], qkv[1], sight, shape, HALF)
    mask = causal_mask(TOKENS, window) if sight.mask is None else sight.mask

    def ours(query, key, value):
        return (attend(query, key, value, sight, shape, HALF).astype(jnp.float32) * weight).sum()

    def formula(*qkv):
        with jax.default_matmul_precision('highest'):
            wide = (x.astype(jnp.float32) for x in qkv)
            return (plain_attention(*wide, mask, scale=0.125) * weight).sum()

    found, right = (jit(jax.value_and_grad(f, (0, 1, 2)))(*qkv) for f in (ours, formula))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        assert np.linalg.norm(one - other) <= 0.02 * np.linalg.norm(other)
