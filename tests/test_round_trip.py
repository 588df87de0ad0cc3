"""What other libraries wrote, read and written again: the same phi, method, names and settings."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop import call
from safetensors.numpy import load_file
from test_conformance import (
    BESIDE,
    CASES,
    ELSEWHERE,
    OUTPUTS_ONLY,
    UNROLLED_ONLY,
    WITH_GRADIENTS,
    encoders,
    load,
)

import peftjax as pj
from peftjax.hf import _load, _stored
from peftjax.models import Compute, Decoder, read_decoder_config

pytestmark = pytest.mark.slow

PEFT = (
    *(name for name in WITH_GRADIENTS if '/ah_' not in name),
    *(name for name in ELSEWHERE if not name.startswith('ah_')),
    'experts/lora_target_parameters',
    'lora_olora',
    'lora_pissa',
    'lora_tied_ensure',
    'prefix_tuning_projection',
)
# What is written otherwise: a bias of lora_B goes to the layer's own bias (the base is not at
# hand); how a base was changed before training, and a projection, are not kept.
OTHERWISE = {
    'classifier/lora_lora_bias': {'bias', 'lora_bias'},
    'lora_olora': {'init_lora_weights'},
    'lora_orthogonal': {'init_lora_weights'},
    'lora_pissa': {'init_lora_weights'},
    'prefix_tuning_projection': {'prefix_projection', 'encoder_hidden_size'},
}
# Regular expressions that find the same modules; of names that are there, one suffices.
SPELLED = {'rank_pattern', 'alpha_pattern', 'modules_to_save', 'target_modules', 'auto_mapping'}
# Defaults of theirs that are not nothing, and what they find out from the model.
SAID = {'megatron_core', 'qalora_group_size', 'peft_version', 'num_attention_heads', 'num_layers'}


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def folder_of(name):
    folder = CASES / name if '/' in name else BESIDE / name
    if not folder.is_dir():
        pytest.skip(f'the stored case {name} is not beside the repository')
    return folder


def opened(case, folder):
    stored = _stored.read_stored(folder, allow_nonfinite=False)
    return call(
        lambda *a, **k: _load.open_adapter(stored, case.apply_fn, case.params, *a, **k), case.inputs
    )


def settings(folder):
    return json.loads((folder / 'adapter_config.json').read_text())


@encoders
@pytest.mark.parametrize('name', PEFT)
def test_peft(name, scan_layers, tmp_path):
    if scan_layers and name in UNROLLED_ONLY:
        pytest.skip('layers of different ranks')
    case = load(folder_of(name), scan_layers=scan_layers)
    theirs = settings(folder_of(name))
    written = pj.hf.save_adapter(
        tmp_path / 'x', case.peft, case.phi(), task_type=theirs['task_type']
    )
    again = opened(case, written)
    assert again.peft.method == case.peft.method
    assert equal(again.phi(again.stored.tensors), case.phi())
    ours = settings(written)
    differ = {key for key, value in ours.items() if _plain(theirs[key]) != _plain(value)}
    left = {k for k in theirs.keys() - ours.keys() if theirs[k] not in (None, False, [], {})}
    assert (differ | left) - SPELLED - SAID == OTHERWISE.get(name, set())
    files = [load_file(f / 'adapter_model.safetensors') for f in (written, folder_of(name))]
    ours, theirs = ({n: t for n, t in file.items() if not _of_base(n)} for file in files)
    if name not in OTHERWISE or 'lora_bias' not in OTHERWISE[name]:
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(tensor, theirs[n]) for n, tensor in ours.items())


HUB = (
    *(name for name in WITH_GRADIENTS + OUTPUTS_ONLY if '/ah_' in name),
    *(name for name in ELSEWHERE if name.startswith('ah_')),
    'encoder/ah_composition_bert/a',
    'encoder/ah_composition_bert/avg_a25_b75',
)


@encoders
@pytest.mark.parametrize('name', HUB)
def test_adapterhub(name, scan_layers, tmp_path):
    """Every file is as theirs: the same settings, names, shapes and values."""
    if scan_layers and name in UNROLLED_ONLY:
        pytest.skip('layers of different widths')
    folder = folder_of(name)
    case, theirs = load(folder, scan_layers=scan_layers), settings(folder)
    kept = case.opened.stored
    related = 'dora' in name  # Its magnitudes stand in relation to the base, and are computed.
    written = pj.hf.save_adapter(
        tmp_path,
        case.peft,
        case.phi(),
        format='adapterhub',
        name=theirs['name'],
        model_type=theirs['model_type'],
        head=kept.head,
        params=case.params if related else None,
    )
    again = opened(case, written)
    assert again.peft.method == case.peft.method
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5 if related else 0)
    jax.tree.map(near, again.phi(again.stored.tensors), case.phi())
    assert settings(written) == theirs
    for file in ('adapter.safetensors', 'model_head.safetensors', 'head_config.json'):
        assert (written / file).exists() == (folder / file).exists()
        if file.endswith('.json') and (folder / file).exists():
            assert json.loads((written / file).read_text()) == json.loads(
                (folder / file).read_text()
            )
        elif (folder / file).exists():
            ours, their = load_file(written / file), load_file(folder / file)
            assert ours.keys() == their.keys()
            assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in their.items()}
            jax.tree.map(near, ours, their)


def _plain(value):
    return sorted(value) if isinstance(value, list) else value


def _of_base(name):
    """PEFT puts a copy of an adapted table beside its adapter."""
    return name.endswith('base_layer.weight')


# Experts -----------------------------------------------------------------------------------------

IDS = jnp.asarray([[3, 8, 5, 1]], jnp.int32)
EVERY = 'experts/.*/kernel'
SIZES = {
    'vocab_size': 11,
    'hidden_size': 8,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'num_key_value_heads': 1,
    'head_dim': 4,
    'intermediate_size': 6,
    'moe_intermediate_size': 6,
    'num_local_experts': 3,
    'num_experts': 3,
    'num_experts_per_tok': 2,
}


@functools.cache
def moe(kind, scan_layers=True):
    """A model with experts; of its parameters the shapes."""
    config = read_decoder_config({'model_type': kind, **SIZES})
    model = Decoder(config, Compute(scan_layers=scan_layers))
    return model.apply_fn, jax.eval_shape(model.init, jax.random.key(0), IDS)['params'], IDS


def attached(method, apply_fn, params, *args, **kwargs):
    """A plan and a phi for it, drawn at random."""
    peft, draw = pj.attach(method, apply_fn, params, *args, **kwargs), np.random.default_rng(0)
    phi = {}
    for where, shape, _ in peft.phi:
        keys = next((k for k, _ in method.parts if where.startswith('/'.join((*k, '')))), ())
        path, _, name = where.removeprefix('/'.join((*keys, ''))).rpartition('/')
        home = phi
        for key in (*keys, path):
            home = home.setdefault(key, {})
        home[name] = draw.normal(size=shape).astype(np.float32)
    return peft, phi


MODULES = (pj.Lora(target=EVERY, rank=2), pj.Lora(target='(w2|down_proj)/k', rank=2, alpha=3))
PARAMETERS = (
    pj.Lora(target='(w[13]|gate_proj|up_proj)/k', rank=2, alpha=3),
    pj.Lora(target=EVERY, rank=4, alpha=3, ranks=(('w[13]/|(gate|up)_proj', 2),)),
    pj.Lora(target=(EVERY, 'q_proj'), rank=2, alphas=(('w2|down_proj', 5),)),
    pj.Lora(target=(EVERY, 'q_proj'), rank=2, alpha=3, rank_stabilized=True),
)


@pytest.mark.parametrize('kind', ['mixtral', 'qwen3_moe'])
@pytest.mark.parametrize('method', MODULES + PARAMETERS)
def test_experts(kind, method, tmp_path):
    """Modules where PEFT makes the right parameters of them, else its parameters."""
    peft, phi = attached(method, *moe(kind))
    folder = pj.hf.save_adapter(tmp_path / 'x', peft, phi)
    loaded = pj.hf.load_adapter(folder, *moe(kind))
    assert equal(loaded.phi, phi)
    assert [site.path for site in loaded.peft.sites[0]] == [s.path for s in peft.sites[0]]
    scales = lambda p: {s.path: p.method.scale_at(s) for s in p.sites[0]}
    assert scales(loaded.peft) == pytest.approx(scales(peft), rel=1e-12)
    assert bool(settings(folder).get('target_parameters')) == (method in PARAMETERS)
    names = load_file(folder / 'adapter_model.safetensors')
    assert any('.experts.0.' in name for name in names) == (method in MODULES)
    again = pj.hf.save_adapter(tmp_path / 'y', loaded.peft, loaded.phi)
    for file in ('adapter_config.json', 'adapter_model.safetensors'):
        assert (again / file).read_bytes() == (folder / file).read_bytes()


def test_experts_of_one_layer(tmp_path):
    method = pj.Lora(target='layers/1/.*experts/.*/kernel', rank=2)
    peft, phi = attached(method, *moe('mixtral', False))
    folder = pj.hf.save_adapter(tmp_path / 'x', peft, phi)
    targets = settings(folder)['target_parameters']
    assert targets == [f'model.layers.1.mlp.experts.{n}_proj' for n in ('down', 'gate_up')]
    assert equal(pj.hf.load_adapter(folder, *moe('mixtral', False)).phi, phi)


@pytest.mark.parametrize('kind', ['mixtral', 'qwen3_moe'])
def test_a_router_with_a_scale_of_its_own(kind, tmp_path):
    """PEFT would not find the pattern of a module that it makes a parameter of."""
    method = pj.Lora(target=('gate/kernel', 'o_proj'), rank=2, alphas=(('gate/', 5),))
    peft, phi = attached(method, *moe(kind))
    folder = pj.hf.save_adapter(tmp_path / 'x', peft, phi)
    about = settings(folder)
    assert about['target_modules'] == ['o_proj']
    [target] = about['target_parameters']
    assert target.endswith('gate.weight') and list(about['alpha_pattern'].values()) == [5]
    name = 'base_model.model.model.layers.1.mlp.gate.lora_A.weight'
    assert name in load_file(folder / 'adapter_model.safetensors')
    loaded = pj.hf.load_adapter(folder, *moe(kind))
    assert equal(loaded.phi, phi)
    scales = lambda p: [p.method.scale_at(site) for site in p.sites[0]]
    assert scales(loaded.peft) == scales(peft)


def test_gate_and_up_of_experts_with_ranks_in_common(tmp_path):
    """As PEFT trains them; without it they would grow whenever they are written."""
    peft, phi = attached(pj.Lora(target=EVERY, rank=2), *moe('mixtral'))
    home = 'model/layers/block_sparse_moe/experts'
    phi[f'{home}/w1/kernel']['a'] = phi[f'{home}/w3/kernel']['a']
    folder = pj.hf.save_adapter(tmp_path / 'x', peft, phi)
    assert settings(folder)['rank_pattern'] == {}
    tensors = load_file(folder / 'adapter_model.safetensors')
    start = 'base_model.model.model.layers.0.mlp.experts'
    assert tensors[f'{start}.base_layer.lora_A.weight'].shape == (3 * 2, 8)
    assert tensors[f'{start}.base_layer.lora_B.weight'].shape == (2 * 6, 3 * 2)
    assert tensors[f'{start}.lora_A.weight'].shape == (3 * 2, 6)
    assert equal(pj.hf.load_adapter(folder, *moe('mixtral')).phi, phi)


@pytest.mark.parametrize(
    'method',
    [
        pj.Lora(target=EVERY, rank=2, dropout=0.1),
        pj.Lora(target='experts/w1', rank=2),
        pj.Dora(target=EVERY, rank=2),
    ],
)
def test_experts_that_transformers_4_alone_can_hold(method, tmp_path):
    peft, phi = attached(method, *moe('mixtral'))
    with pytest.warns(UserWarning, match=r'experts.0.w1. is written as a module, which experts'):
        folder = pj.hf.save_adapter(tmp_path / 'x', peft, phi)
    assert equal(pj.hf.load_adapter(folder, *moe('mixtral')).phi, phi)


def raw(first, second):
    """A layer whose experts are parameters of one module, and an adapter of them."""
    shape = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    lin = {'weight': shape((4, first[1]))}
    params = {'experts': {'w1': shape(first), 'w2': shape(second), 'lin': lin}}

    def apply_fn(params, x):
        own = params['experts']
        each = jnp.broadcast_to(x[None], (len(own['w1']), *x.shape))
        inner = jnp.tanh(jnp.einsum('ebd,edf->ebf', each, own['w1']))
        return jnp.einsum('ebf,efd->ebd', inner, own['w2']) @ own['lin']['weight'].T

    return apply_fn, params, shape((2, first[1]))


REFUSED = {
    'two alphas': (
        lambda: attached(pj.Lora(target=EVERY, rank=2, alphas=(('w3', 4),)), *moe('mixtral')),
        "gate_up_proj', for which PEFT has one rank and one alpha",
    ),
    'Ia3': (
        lambda: attached(pj.Ia3(target=EVERY), *moe('mixtral')),
        'experts.0.w1. is a parameter in transformers 5',
    ),
    'parameters alike': (
        lambda: attached(pj.Lora(target='w[12]', rank=2), *raw((3, 8, 8), (3, 8, 8))),
        "order in which the module has them.*'experts.w1', 'experts.w2'.*Give them different",
    ),
    'a module inside': (
        lambda: attached(pj.Lora(target='w1|lin', rank=2), *raw((3, 8, 9), (3, 9, 8))),
        "'experts.lin' is. Leave it out",
    ),
    'dropout': (
        lambda: attached(pj.Lora(target='w[12]', rank=2, dropout=0.1), *raw((3, 8, 9), (3, 9, 8))),
        "'experts/w1', by plain LoRA without dropout",
    ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_peft_cannot_hold(name, tmp_path):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        pj.hf.save_adapter(tmp_path / 'x', *make())
    assert not list(tmp_path.iterdir())


def test_parameters_alike_with_different_ranks(tmp_path):
    apply_fn, params, x = raw((3, 8, 8), (3, 8, 8))
    peft, phi = attached(pj.Lora(target='w[12]', ranks=(('w2', 3),)), apply_fn, params, x)
    folder = pj.hf.save_adapter(tmp_path / 'x', peft, phi)
    assert settings(folder)['rank_pattern'] == {r'experts\.w2': 3}
    loaded = pj.hf.load_adapter(folder, apply_fn, params, x)
    assert equal(loaded.phi, phi) and "ranks=(('^experts/w2$', 3),)" in repr(loaded.peft.method)
