"""Side by side with transformers' PyTorch: logits, greedy generation, folders written back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import greedy
from quick import jit
from torch_decoders import FAMILIES, ROTATIONS, make_inputs, make_model

from peftjax.models import load_decoder, save_decoder

torch = pytest.importorskip('torch', reason='parity needs PyTorch')
transformers = pytest.importorskip('transformers', reason='parity needs transformers')
pytestmark = pytest.mark.filterwarnings('default')


def saved(folder, name, **changes):
    torch.manual_seed(len(name))
    model = make_model(name, **changes)
    model.save_pretrained(folder)
    return model


def logits_of(model, given):
    with torch.no_grad():
        return model(**given).logits.numpy()


def logits_of_each(model, given):
    """The same of each row alone: PyTorch rotates all rows of a batch by the longest of them.

    The shortest first: it rotates by the longest that it has met, too.
    """
    ids, mask = given['input_ids'], given['attention_mask'] == 1
    out = np.zeros((*ids.shape, model.config.vocab_size), np.float32)
    for row in mask.sum(1).argsort().tolist():
        real = mask[row]
        out[row, real.numpy()] = logits_of(model, {'input_ids': ids[row : row + 1, real]})[0]
    return out


def ours(loaded, given):
    ids, mask = (jnp.asarray(given[name].numpy()) for name in ('input_ids', 'attention_mask'))
    return np.asarray(jit(loaded.model.apply_fn)(loaded.params, ids, mask))


def close(out, expected, given, atol=1e-4):
    real = given['attention_mask'].numpy()[..., None]
    np.testing.assert_allclose(out * real, expected * real, rtol=1e-4, atol=atol)


@pytest.mark.parametrize('name', FAMILIES)
def test_logits_and_greedy_generation_agree(name, tmp_path):
    model, given = saved(tmp_path, name), make_inputs()
    loaded = load_decoder(tmp_path)
    close(ours(loaded, given), logits_of(model, given), given)
    model.generation_config.eos_token_id = None
    front = [0, 2]  # generation continues the last token: prompts are padded in front
    prompt = {k: given[k][front] for k in ('input_ids', 'attention_mask')}
    expected = model.generate(**prompt, max_new_tokens=64, do_sample=False, pad_token_id=0)
    ids, mask = (jnp.asarray(value.numpy()) for value in prompt.values())
    tokens = greedy(loaded.model, loaded.params, ids, mask, 64)
    np.testing.assert_array_equal(tokens, expected[:, 9:].numpy())
    assert len(np.unique(tokens)) > 2


@pytest.mark.parametrize('name', ['gemma3_text', 'mixtral'])
def test_unrolled_layers_agree(name, tmp_path):
    model, given = saved(tmp_path, name), make_inputs()
    expected = logits_of(model, given)
    close(
        ours(load_decoder(tmp_path, scan_layers=False, attention='plain'), given), expected, given
    )


@pytest.mark.parametrize('rotation', ROTATIONS)
@pytest.mark.parametrize('tokens', [12, 40], ids=['short', 'long'])
def test_stretched_rotations_agree(rotation, tokens, tmp_path):
    """PyTorch rounds frequencies on the way: angles are off the more, the further on a token is.

    In float64, frequencies too, its logits of 40 tokens are ours to 2e-5.
    """
    name = 'phi3' if rotation == 'longrope' else 'llama'
    changes = {'rope_parameters': {'rope_theta': 100.0, **ROTATIONS[rotation]}}
    if rotation == 'dynamic':
        changes['max_position_embeddings'] = 16
    if rotation == 'longrope':
        changes['original_max_position_embeddings'] = 16
    model, given = saved(tmp_path, name, **changes), make_inputs(tokens)
    loaded = load_decoder(tmp_path)
    if rotation not in ('dynamic', 'longrope'):  # those go by the length of a text
        rotated = loaded.config.kinds[0].rope.frequencies(None).ravel()
        np.testing.assert_allclose(rotated, model.model.rotary_emb.inv_freq, rtol=2e-7)
    close(ours(loaded, given), logits_of_each(model, given), given, 1e-4 * tokens / 12)


def test_a_part_of_the_features_is_rotated(tmp_path):
    rope = {'rope_type': 'default', 'rope_theta': 1e4, 'partial_rotary_factor': 0.5}
    model, given = saved(tmp_path, 'phi3', rope_parameters=rope), make_inputs()
    loaded = load_decoder(tmp_path)
    assert loaded.config.kinds[0].rope.dim == 2
    close(ours(loaded, given), logits_of(model, given), given)


@pytest.mark.parametrize('tied', [True, False])
def test_heads_tied_or_not_agree(tied, tmp_path):
    model, given = saved(tmp_path, 'llama', tie_word_embeddings=tied), make_inputs()
    loaded = load_decoder(tmp_path)
    assert ('lm_head' in loaded.params) != tied
    out = ours(loaded, given)
    close(out, logits_of(model, given), given)
    hidden = loaded.model.apply_fn(
        loaded.params, given['input_ids'].numpy(), given['attention_mask'].numpy(), method='hidden'
    )
    weight = np.asarray(loaded.model.head_weight(loaded.params).weight)
    close(np.asarray(hidden) @ weight, out, given)


@pytest.mark.parametrize('scan_layers', [True, False], ids=['scanned', 'unrolled'])
@pytest.mark.parametrize('name', ['gpt2', 'gemma2', 'qwen3_moe', 'mixtral'])
def test_what_is_saved_is_read_by_transformers(name, scan_layers, tmp_path):
    model, given = saved(tmp_path / 'one', name), make_inputs()
    loaded = load_decoder(tmp_path / 'one', scan_layers=scan_layers)
    save_decoder(tmp_path / 'two', loaded.config, loaded.params, shard_bytes=5000)
    assert len(list((tmp_path / 'two').glob('*.safetensors'))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / 'two', attn_implementation='eager'
    )
    assert type(again) is type(model)
    kept = again.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())
    close(logits_of(again, given), logits_of(model, given), given)


def test_gradients_agree(tmp_path):
    model, given = saved(tmp_path, 'gemma2'), make_inputs()
    real = given['attention_mask']
    (model(**given).logits * real[..., None]).square().sum().backward()
    loaded = load_decoder(tmp_path)
    ids, mask = (jnp.asarray(given[name].numpy()) for name in ('input_ids', 'attention_mask'))

    def loss(params):
        real = mask[..., None].astype(jnp.float32)
        return jnp.square(loaded.model.apply_fn(params, ids, mask) * real).sum()

    gradient = jit(jax.grad(loss))(loaded.params)['model']
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
    layer = gradient['layers']
    for mine, name in [
        (layer['self_attn']['k_proj']['kernel'][1].T, 'layers.1.self_attn.k_proj.weight'),
        (
            layer['post_feedforward_layernorm']['scale'][0],
            'layers.0.post_feedforward_layernorm.weight',
        ),
        (gradient['embed_tokens']['embedding'], 'embed_tokens.weight'),
    ]:
        expected = theirs[f'model.{name}']
        if 'embed' in name:  # PyTorch gives the looked-up padding row no gradient, its head does
            mine, expected = mine[1:], expected[1:]
        np.testing.assert_allclose(mine, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
