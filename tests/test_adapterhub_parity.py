"""Side by side with AdapterHub's `adapters` in PyTorch: ours loaded there, outputs equal.

`adapters` 1.3 needs transformers 4.57, hence an environment of its own; elsewhere these skip, and
`test_round_trip.py` holds what is written against what it wrote.
"""

import dataclasses
from contextlib import nullcontext

import jax
import numpy as np
import pytest
from interop import call

import peftjax as pj
from peftjax import models

SIZES = dict(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=24,
    initializer_range=0.3,
)
GPT2 = dict(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_inner=24, n_positions=24)
BASES = {
    'bert': SIZES,
    'roberta': {**SIZES, 'pad_token_id': 1},
    'gpt2': {**GPT2, 'initializer_range': 0.3, 'bos_token_id': 1, 'eos_token_id': 2},
    'llama': {**SIZES, 'num_key_value_heads': 2, 'tie_word_embeddings': True},
    'mistral': {**SIZES, 'num_key_value_heads': 2, 'head_dim': 4, 'tie_word_embeddings': True},
}
PROMPT = pj.PromptTuning(target='@embeddings', length=3, initial='random')
FRONT = pj.PrefixTuning(length=3, shift=False)
EVERY_GATE = dataclasses.replace(pj.HOULSBY, reduction=4, gate=True, scale='channel', norm='both')
EXPORTS = {
    'houlsby': ('bert', dataclasses.replace(pj.HOULSBY, reduction=4)),
    'pfeiffer': ('roberta', dataclasses.replace(pj.PFEIFFER, reduction=3)),
    'parallel': ('bert', pj.PARALLEL),
    'scaled_parallel': ('llama', dataclasses.replace(pj.SCALED_PARALLEL, activation='gelu_tanh')),
    'everything': ('bert', EVERY_GATE),
    'two places': (
        'mistral',
        pj.chain(
            first=pj.Adapter(target='@attention_output', reduction=2, activation='tanh'),
            second=pj.Adapter(target='@mlp_output', reduction=4, scale=0.5),
        ),
    ),
    'some layers': (
        'bert',
        pj.Adapter(target=('@mlp_output/1', '@attention_output/1'), reduction=4, activation='gelu'),
    ),
    'widths': ('gpt2', pj.Adapter(target='@mlp_output', reductions=(('@mlp_output/0', 2),))),
    'lora': (
        'roberta',
        pj.Lora(target='(query|key|layer(/[0-9])?/output/dense)/kernel', rank=3, alpha=5),
    ),
    'lora_llama': ('llama', pj.Lora(target='[qv]_proj|down_proj', rank=3, rank_stabilized=True)),
    'lora_mistral': ('mistral', pj.Lora(target='up_proj', rank=3)),
    'lora_gpt2': ('gpt2', pj.Lora(target='c_attn/k', rank=3, alpha=6)),
    'dora': ('llama', pj.Dora(target='[qk]_proj', rank=3, alpha=6)),
    'ia3': ('bert', pj.Ia3(target='(key|value|intermediate/dense)/kernel')),
    'ia3_gpt2': ('gpt2', pj.Ia3(target='(c_attn|c_fc)/kernel')),
    'prefix': ('bert', pj.PrefixTuning(length=3, side='back')),
    'prefix_network': ('gpt2', dataclasses.replace(FRONT, projection=5)),
    'prefix_grouped': ('llama', dataclasses.replace(FRONT, projection=5)),
    'prompt': (
        'roberta',
        pj.PromptTuning(target='@embeddings', length=3, initial='random', side='back'),
    ),
    'mix': (
        'bert',
        pj.chain(
            pj.PrefixTuning(length=3, projection=5, side='back'),
            pj.Lora(target='query/kernel', rank=2),
            pj.PARALLEL,
        ),
    ),
}
FOLDED = ('prefix_grouped',)  # Its network reads tokens as wide as the model there.
IDS = np.asarray([[5, 9, 31, 8, 2], [7, 4, 40, 1, 1]], np.int32)
MASK = np.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    """Folders with tiny models."""
    torch = pytest.importorskip('torch', reason='parity needs PyTorch')
    pytest.importorskip('adapters', reason="parity needs AdapterHub's adapters")
    import transformers

    torch.manual_seed(3)
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in BASES}
    for kind, folder in folders.items():
        config = transformers.AutoConfig.for_model(kind, **BASES[kind])
        model = transformers.AutoModel.from_config(config)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if name.endswith('.bias'):  # zeros would hide what a method does with them
                    tensor.normal_(std=0.3)
        model.save_pretrained(folder)
    return folders


def ours(folder, kind):
    """The model here: hidden states of given tokens."""
    if kind in ('bert', 'roberta'):
        loaded = models.load_encoder(str(folder), None, scan_layers=False)
        return loaded.model.apply_fn, loaded.params
    loaded = models.load_decoder(str(folder), scan_layers=False)

    def hidden(params, *args, **kwargs):
        return loaded.model.apply({'params': params}, *args, method='hidden', **kwargs)

    return hidden, loaded.params


@pytest.mark.parametrize('name', EXPORTS)
def test_ours_is_read_by_adapterhub(name, bases, tmp_path):
    import adapters
    import torch
    import transformers

    kind, method = EXPORTS[name]
    apply_fn, params = ours(bases[kind], kind)
    start = 2 if kind == 'roberta' else 0
    positions = np.broadcast_to(np.arange(start, start + 5, dtype=np.int32), IDS.shape)
    inputs = {'input_ids': IDS, 'attention_mask': MASK, 'position_ids': positions}
    peft = call(lambda *a, **k: pj.attach(method, apply_fn, params, *a, **k), inputs)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    move = lambda a: a + 0.3 * jax.random.normal(next(keys), a.shape)
    phi = jax.tree.map(move, peft.init(jax.random.key(0), params))
    expected = pytest.warns(UserWarning, match='network') if name in FOLDED else nullcontext()
    with expected:
        folder = pj.hf.save_adapter(
            tmp_path / 'mine',
            peft,
            phi,
            format='adapterhub',
            model_type=kind,
            params=params if name == 'dora' else None,
        )
    out = call(jax.jit(peft.wrap(apply_fn)), inputs, params, phi)
    # Its prefixes and prompts lie wrong under the mask of the other form of attention.
    model = transformers.AutoModel.from_pretrained(bases[kind], attn_implementation='eager').eval()
    tensors = {n: torch.tensor(t, dtype=torch.long) for n, t in inputs.items()}
    adapters.init(model)
    base = model(**tensors).last_hidden_state.detach().numpy()
    info = {}
    found = model.load_adapter(
        str(folder), use_safetensors=True, set_active=True, loading_info=info
    )
    assert found == 'mine' and not info['missing_keys'] and not info['unexpected_keys']
    model.eval()
    theirs = model(**tensors).last_hidden_state.detach().numpy()[:, -5:]
    real = MASK.astype(bool)
    np.testing.assert_allclose(np.asarray(out)[real], theirs[real], rtol=0, atol=1e-5)
    assert np.abs(theirs - base)[real].max() > 0.1
