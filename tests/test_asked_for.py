"""What the configuration of an adapter asks for is used, listed or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_case import attached, edit, edit_tensors, load, params

import peftjax as pj
from peftjax.models import Decoder, read_decoder_config


@pytest.fixture
def folder(tmp_path):
    return pj.hf.save_adapter(tmp_path, *attached(), name='x')


# Biases -------------------------------------------------------------------------------------------

MODULES = [f'h.{layer}.{name}' for layer in (0, 1) for name in ('up', 'down')]


def of_modules(end, value):
    """One tensor for each adapted module."""
    names = (f'base_model.model.{module}.{end}' for module in MODULES)
    return {name: np.full(4, value + i, np.float32) for i, name in enumerate(names)}


@pytest.mark.parametrize('which', ['lora_only', 'all'])
def test_a_bias_of_the_pair_is_added_to_the_one_that_was_trained(folder, which):
    edit(folder, lora_bias=True, bias=which)
    edit_tensors(
        folder, lambda t: t | of_modules('lora_B.bias', 2) | of_modules('base_layer.bias', 100)
    )
    loaded = load(folder, jax.eval_shape(params))
    biases = [loaded.phi['saved'][f'{m.replace(".", "/")}/bias']['value'] for m in MODULES]
    for i, bias in enumerate(biases):
        np.testing.assert_allclose(bias, 100 + i + 1.5 * (2 + i))


def test_a_bias_of_the_pair_is_added_to_that_of_the_base(folder):
    edit(folder, lora_bias=True)
    edit_tensors(folder, lambda t: t | of_modules('lora_B.bias', 2))
    found = load(folder).phi['saved']['h/0/up/bias']['value']
    np.testing.assert_allclose(found, params()['h']['0']['up']['bias'] + 3, rtol=1e-6)


def test_a_bias_of_the_pair_that_is_missing(folder):
    edit(folder, lora_bias=True, bias='lora_only')
    edit_tensors(folder, lambda t: t | of_modules('base_layer.bias', 100))
    with pytest.raises(ValueError, match="lora_B.bias for every module.*'h.0.up.lora_B.bias'"):
        load(folder)


# Names --------------------------------------------------------------------------------------------


def test_names_that_nothing_has_are_listed(folder):
    edit(
        folder,
        modules_to_save=['score'],
        target_parameters=['experts.down'],
        trainable_token_indices={'wte': [1, 2]},
    )
    loaded = load(folder)
    assert loaded.unused == (
        "target_parameters 'experts.down', which no parameter has",
        "trainable_token_indices 'wte', which no module has",
        "modules_to_save 'score', which no module has",
    )
    assert loaded.peft.phi == attached()[0].phi


def test_tensors_of_a_module_that_the_model_has_not_are_not_passed_over(folder):
    edit(folder, modules_to_save=['score'])
    more = {'base_model.model.score.weight': np.zeros((2, 4), np.float32)}
    edit_tensors(folder, lambda tensors: tensors | more)
    with pytest.raises(ValueError, match="without a place: 'base_model.model.score.weight'"):
        load(folder)


def test_a_module_to_save_is_found_by_the_end_of_a_word(tmp_path):
    """As PEFT does: `norm` is every norm of a Llama."""
    sizes = {'vocab_size': 9, 'hidden_size': 8, 'num_hidden_layers': 2, 'intermediate_size': 6}
    config = read_decoder_config({'model_type': 'llama', 'num_attention_heads': 2, **sizes})
    decoder, ids = Decoder(config), jax.ShapeDtypeStruct((2, 5), jnp.int32)
    theta = jax.eval_shape(decoder.init, jax.random.key(0), ids)['params']
    method = pj.chain(lora=pj.Lora(target='q_proj', rank=2), saved=pj.Trainable(target='norm'))
    peft = pj.attach(method, decoder.apply_fn, theta, ids)
    draw = np.random.default_rng(0).normal
    phi = jax.tree.map(
        lambda leaf: draw(size=leaf.shape).astype(np.float32),
        jax.eval_shape(peft.init, jax.random.key(0), theta),
    )
    folder = pj.hf.save_adapter(tmp_path / 'x', peft, phi)
    edit(folder, modules_to_save=['norm'])
    loaded = pj.hf.load_adapter(folder, decoder.apply_fn, theta, ids)
    assert [path.split('/')[-2] for path in loaded.phi['saved']] == [
        'input_layernorm', 'post_attention_layernorm', 'norm',
    ]  # fmt: skip
    assert not loaded.unused and jax.tree.all(jax.tree.map(np.array_equal, loaded.phi, phi))


def test_a_module_whose_name_is_the_end_of_another_is_not_saved_alone(tmp_path):
    def model(params, x):
        return x * params['pre_norm']['weight'] * params['norm']['weight'] @ params['up']['kernel']

    one = {'weight': jnp.ones(4)}
    theta = {'pre_norm': one, 'norm': one, 'up': {'kernel': jnp.ones((4, 2))}}
    saved = lambda target: pj.chain(pj.Lora(target='kernel', rank=2), pj.Trainable(target=target))
    for target in ('norm', '^norm'):
        peft = pj.attach(saved(target), model, theta, jnp.ones((3, 4)))
        phi = peft.init(jax.random.key(0), theta)
        if target == 'norm':
            pj.hf.save_adapter(tmp_path / 'both', peft, phi)
        else:
            with pytest.raises(ValueError, match=r"train 'pre_norm' too: its name ends like one"):
                pj.hf.save_adapter(tmp_path / 'one', peft, phi)
    assert not (tmp_path / 'one').exists()


# Rows of tokens -----------------------------------------------------------------------------------

IDS = jnp.asarray([[3, 8, 5]])
TABLES = {name: {'embedding': jnp.ones((9, 4))} for name in ('embed_tokens', 'embed_types')}
ROWS = {f'base_model.model.{name}': np.full((2, 4), 3, np.float32) for name in TABLES}


def look_up(params, ids):
    return sum(params[name]['embedding'][ids] for name in TABLES) @ params['up']['kernel']


def of_tables(tmp_path, method, tensors, **changes):
    """An adapter that asks for rows, loaded."""
    theta = TABLES | {'up': {'kernel': jnp.ones((4, 2))}}
    peft = pj.attach(method, look_up, theta, IDS)
    folder = pj.hf.save_adapter(tmp_path, peft, peft.init(jax.random.key(0), theta), name='x')
    edit(folder, **changes)
    edit_tensors(folder, lambda found: found | tensors)
    return pj.hf.load_adapter(folder, look_up, theta, IDS)


INSIDE = {f'{name}.token_adapter.trainable_tokens_delta': rows for name, rows in ROWS.items()}
ONE = dict([*INSIDE.items()][:1])
LORA = pj.Lora(target='up', rank=2)
ASKED = {
    'a list': ([1, 2], INSIDE, ['tokens', 'tokens_2']),
    'a table': ({'embed_tokens': [1, 2]}, ONE, ['tokens']),
    'both': ({'embed_types': [2, 1], 'embed_tokens': [1, 2]}, INSIDE, ['tokens', 'tokens_2']),
    'a list without rows': ([1, 2], {}, 'all rows of tokens'),
    'a table without rows': ({'embed_tokens': [1, 2]}, {}, "'embed_tokens.trainable_tokens_delta'"),
    'one of two': (
        {'embed_tokens': [1, 2], 'embed_types': [1, 2]},
        ONE,
        r"missing: 'embed_types.trainable_tokens_delta' \(1 in all\)",
    ),
    'a head': (
        {'up': [0, 1]},
        {'base_model.model.up.token_adapter.trainable_tokens_delta': np.ones((2, 4), np.float32)},
        "trainable_token_indices names 'up', which is no embedding",
    ),
    'rows of another': ({'embed_types': [1, 2]}, INSIDE, 'without a place: .*embed_tokens.token'),
}


@pytest.mark.parametrize('name', ASKED)
def test_rows_beside_a_pair(name, tmp_path):
    ids, tensors, wanted = ASKED[name]
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            of_tables(tmp_path, LORA, tensors, trainable_token_indices=ids)
    else:
        loaded = of_tables(tmp_path, LORA, tensors, trainable_token_indices=ids)
        assert sorted(loaded.phi) == ['lora', *wanted] and not loaded.unused
        rows = [p for _, p in loaded.peft.method.parts if isinstance(p, pj.TrainableTokens)]
        said = {part.target: part.ids for part in rows}
        if isinstance(ids, dict):
            assert said == {(f'^{name}/embedding$',): tuple(ids[name]) for name in ids}


def test_rows_alone_are_of_the_tables_that_are_named(tmp_path):
    method = pj.TrainableTokens(target='embed_tokens', ids=(1, 2))
    loaded = of_tables(tmp_path / 'x', method, {}, target_modules=['embed_tokens', 'wte'])
    assert loaded.unused == ('init_weights', "target_modules 'wte', which no module has")
    with pytest.raises(ValueError, match="missing: 'embed_types.trainable_tokens_delta'"):
        of_tables(tmp_path / 'y', method, {}, target_modules=r'embed_\w+')
