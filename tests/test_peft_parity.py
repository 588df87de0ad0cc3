"""Side by side with Hugging Face PEFT in PyTorch: theirs loaded here, ours loaded there."""

import json
import shutil
import warnings

import jax
import numpy as np
import pytest
from interop import base_of, call, load
from safetensors.numpy import load_file, save_file
from test_conformance import CASES

import peftjax as pj
from peftjax import models

CONFIGS = {
    'lora': dict(
        kind='LoraConfig',
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=['query', 'value', 'output.dense'],
        rank_pattern={'layer.0.attention.self.query': 2, 'attention.output.dense': 3},
        alpha_pattern={r'layer\.1\.attention\.self\.value': 16},
    ),
    'lora_layers': dict(
        kind='LoraConfig',
        r=2,
        target_modules=['query', 'dense'],
        exclude_modules=['intermediate.dense', 'pooler.dense'],
        layers_to_transform=[1],
        layers_pattern='layer',
        bias='all',
    ),
    'dora': dict(
        kind='LoraConfig',
        r=4,
        lora_alpha=8,
        use_dora=True,
        target_modules=r'.*(query|key|intermediate\.dense)',
        rank_pattern={'key': 2},
    ),
    'ia3': dict(
        kind='IA3Config',
        target_modules=['key', 'value', 'layer.0.output.dense', 'layer.1.output.dense'],
        feedforward_modules=['layer.0.output.dense', 'layer.1.output.dense'],
    ),
    'prompt': dict(kind='PromptTuningConfig', num_virtual_tokens=4),
}


def make(folder, kind, **fields):
    """Writes a case as the stored ones are: base, adapter, inputs, outputs, gradients."""
    torch = pytest.importorskip('torch', reason='parity needs PyTorch')
    peft = pytest.importorskip('peft', reason='parity needs PEFT')
    import transformers

    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=24,
        initializer_range=0.3,
        num_labels=3,
    )
    base = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for name, tensor in base.named_parameters():
            if name.endswith('.bias'):  # zeros would hide what a method does with them
                tensor.normal_(std=0.3)
    base.save_pretrained(folder / 'base')
    ids, mask = torch.randint(3, 50, (3, 6)), torch.ones(3, 6, dtype=torch.int64)
    mask[1, -2:] = 0
    out_base = base(input_ids=ids, attention_mask=mask).logits
    model = peft.get_peft_model(base, getattr(peft, kind)(task_type='SEQ_CLS', **fields)).eval()
    trained = {name: t for name, t in model.named_parameters() if t.requires_grad}
    with torch.no_grad():
        for tensor in trained.values():
            tensor.add_(0.2 * torch.randn_like(tensor))
    out = model(input_ids=ids, attention_mask=mask).logits
    loss = out.square().mean()
    loss.backward()
    model.save_pretrained(folder)
    save_file({k: t.grad.numpy() for k, t in trained.items()}, folder / 'grads.safetensors')
    arrays = dict(input_ids=ids, attention_mask=mask, out_base=out_base, out_adapted=out, loss=loss)
    np.savez(folder / 'io.npz', **{name: t.detach().numpy() for name, t in arrays.items()})


@pytest.mark.parametrize('name', CONFIGS)
def test_outputs_and_gradients(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        make(tmp_path, **CONFIGS[name])
    stored = load(tmp_path)
    ours = stored.outcome()
    np.testing.assert_allclose(stored.base(), stored.io['out_base'], rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours.out, stored.io['out_adapted'], rtol=0, atol=1e-5)
    assert np.abs(stored.io['out_adapted'] - stored.io['out_base']).max() > 0.1
    assert set(ours.gradients) == set(stored.grads)
    for tensor, g in stored.grads.items():
        error = np.linalg.norm(ours.gradients[tensor] - g)
        # A softmax does not see the bias of a key: its gradient is rounding.
        rounding = 1e-6 if tensor.endswith('key.bias') else 0
        assert error < 1e-4 * np.linalg.norm(g) + rounding, (tensor, error)


LANGUAGE, CLASSES = 'CAUSAL_LM', 'SEQ_CLS'
OUTPUT = 'layer(/[0-9])?/output/dense'
HEAD = pj.Trainable(target='classifier')
EXPORTS = {
    'lora': (
        'llama',
        pj.Lora(
            target='(q|v)_proj/kernel|down_proj',
            rank=4,
            alpha=6,
            ranks=(('down', 2),),
            alphas=(('v_proj', 3),),
            rank_stabilized=True,
        ),
        LANGUAGE,
    ),
    'dora_saved': (
        'llama',
        pj.chain(pj.Dora(target='(q|v)_proj/k', rank=4), saved=pj.Trainable(target='lm_head')),
        LANGUAGE,
    ),
    'lora_embedding': ('llama', pj.Lora(target=('embed_tokens', 'o_proj'), rank=3), LANGUAGE),
    'lora_tokens': (
        'llama',
        pj.chain(
            pj.Lora(target='o_proj', rank=3), pj.TrainableTokens(target='embed_tokens', ids=(3, 9))
        ),
        LANGUAGE,
    ),
    'tokens': ('llama', pj.TrainableTokens(target='embed_tokens', ids=(9, 3)), LANGUAGE),
    'ia3': ('llama', pj.Ia3(target='(k|v|down)_proj', feedforward='down_proj'), LANGUAGE),
    'prefix': ('llama', pj.PrefixTuning(length=3, projection=5), LANGUAGE),
    'prompt': ('llama', pj.PromptTuning(length=3), LANGUAGE),
    'gpt2_lora': ('gpt2', pj.Lora(target=('c_attn/k', 'c_fc/k', 'mlp/c_proj/k')), LANGUAGE),
    'gpt2_ia3': ('gpt2', pj.Ia3(target='(c_attn|mlp/c_proj)/k', feedforward='mlp'), LANGUAGE),
    'gpt2_prefix': ('gpt2', pj.PrefixTuning(length=3), LANGUAGE),
    'tied_lora': (
        'gpt2',
        pj.Lora(target='wte|c_attn/k', rank=3, ranks=(('wte', 2),), alphas=(('wte', 5),)),
        LANGUAGE,
    ),
    'tied_saved': (
        'gpt2',
        pj.chain(pj.Lora(target='c_attn/k', rank=3), saved=pj.Trainable(target='wte')),
        LANGUAGE,
    ),
    'tied_tokens': ('gpt2', pj.TrainableTokens(target='wte', ids=(9, 3)), LANGUAGE),
    'bert_biases': (
        'classifier',
        pj.chain(
            pj.Lora(target=('query/kernel', f'{OUTPUT}/kernel'), rank=4),
            bias=pj.BitFit(target=f'(query|{OUTPUT})/bias'),
            saved=HEAD,
        ),
        CLASSES,
    ),
    'bert_all_biases': (
        'classifier',
        pj.chain(pj.Lora(target='query/kernel', rank=4), bias=pj.BitFit()),
        None,
    ),
    'bert_prompt': ('classifier', pj.chain(pj.PromptTuning(length=3), saved=HEAD), CLASSES),
}


def in_peft(base, folder, inputs):
    """Outputs of PEFT with an adapter, and the folder that it writes."""
    torch = pytest.importorskip('torch', reason='parity needs PyTorch')
    peft = pytest.importorskip('peft', reason='parity needs PEFT')
    import transformers

    auto = transformers.AutoModelForSequenceClassification
    auto = auto if 'classifier' in str(base) else transformers.AutoModelForCausalLM
    model = peft.PeftModel.from_pretrained(auto.from_pretrained(base).eval(), folder).eval()
    inputs = {n: torch.tensor(inputs[n], dtype=torch.long) for n in ('input_ids', 'attention_mask')}
    out = model(**inputs).logits.detach().numpy()
    again = folder.parent / 'again'
    model.save_pretrained(again)
    return out[:, -inputs['input_ids'].shape[1] :] if out.ndim == 3 else out, again


@pytest.mark.parametrize('name', EXPORTS)
def test_ours_is_read_by_peft(name, tmp_path):
    pytest.importorskip('peft', reason='parity needs PEFT')  # before the work
    kind, method, task = EXPORTS[name]
    base = CASES / kind / 'base'
    apply_fn, params = base_of(base, {}, True)
    io = dict(np.load(next((CASES / kind).glob('*/io.npz'))))
    ids, mask = (io[n].astype(np.int32) for n in ('input_ids', 'attention_mask'))
    inputs = {'input_ids': ids, 'attention_mask': mask}
    if kind != 'classifier':
        inputs['position_ids'] = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    peft = call(lambda *a, **k: pj.attach(method, apply_fn, params, *a, **k), inputs)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    move = lambda a: a + 0.2 * jax.random.normal(next(keys), a.shape)
    phi = jax.tree.map(move, peft.init(jax.random.key(0), params))
    out = call(jax.jit(peft.wrap(apply_fn)), inputs, params, phi)
    folder = pj.hf.save_adapter(tmp_path / 'ours', peft, phi, task_type=task)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        theirs, again = in_peft(base, folder, inputs)
    np.testing.assert_allclose(out, theirs, rtol=0, atol=1e-5)
    ours, written = (load_file(f / 'adapter_model.safetensors') for f in (folder, again))
    # PEFT puts a copy of an adapted table beside its adapter.
    written = {n: t for n, t in written.items() if not n.endswith('base_layer.weight')}
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in written.items()}
    assert all((ours[n] == t).all() for n, t in written.items())
    loaded = call(lambda *a, **k: pj.hf.load_adapter(folder, apply_fn, params, *a, **k), inputs)
    plain = peft.fold(phi)[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), flat(loaded.phi), flat(plain)))
    config = json.loads((folder / 'adapter_config.json').read_text())
    assert config['inference_mode'] and config['task_type'] == task
    shutil.rmtree(again)


EVERY = 'experts/.*/kernel'
EXPERTS = {
    'modules': ('mixtral', pj.Lora(target=(EVERY, 'q_proj', 'gate/'), rank=2, alpha=6)),
    'down': ('qwen3_moe', pj.Lora(target=('down_proj', 'o_proj'), rank=2)),
    'gate_up': ('mixtral', pj.Lora(target='experts/w[13]/', rank=2, alpha=6)),
    'ranks': (
        'mixtral',
        pj.Lora(target=EVERY, rank=4, alpha=6, ranks=(('w[13]/', 2),), alphas=(('w2', 3),)),
    ),
    'router': (
        'mixtral',
        pj.Lora(target=('gate/', 'w2', 'q_proj'), rank=2, alpha=6, alphas=(('gate/', 3),)),
    ),
    'stabilized': (
        'qwen3_moe',
        pj.Lora(target=(EVERY, 'q_proj'), rank=4, alpha=6, rank_stabilized=True),
    ),
}


@pytest.fixture(scope='module')
def with_experts(tmp_path_factory):
    """Folders with tiny models whose layers have experts."""
    torch = pytest.importorskip('torch', reason='parity needs PyTorch')
    transformers = pytest.importorskip('transformers', minversion='5', reason='experts as there')
    pytest.importorskip('peft', reason='parity needs PEFT')
    sizes = dict(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        initializer_range=0.3,
        num_experts_per_tok=2,
        intermediate_size=12,
    )
    more = {
        'mixtral': dict(num_local_experts=3),
        'qwen3_moe': dict(num_experts=3, moe_intermediate_size=12, norm_topk_prob=True),
    }
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in more}
    torch.manual_seed(3)
    for kind, folder in folders.items():
        config = transformers.AutoConfig.for_model(kind, **sizes, **more[kind])
        transformers.AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    return folders


IDS = np.asarray([[5, 9, 31, 8, 2], [3, 3, 40, 7, 6]], np.int32)


@pytest.mark.parametrize('name', EXPERTS)
def test_experts_are_read_by_peft(name, with_experts, tmp_path):
    kind, method = EXPERTS[name]
    loaded = models.load_decoder(str(with_experts[kind]))
    apply_fn, params = loaded.model.apply_fn, loaded.params
    peft = pj.attach(method, apply_fn, params, IDS)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    move = lambda a: a + 0.2 * jax.random.normal(next(keys), a.shape)
    phi = jax.tree.map(move, peft.init(jax.random.key(0), params))
    folder = pj.hf.save_adapter(tmp_path / 'ours', peft, phi, task_type=LANGUAGE)
    inputs = {'input_ids': IDS, 'attention_mask': np.ones_like(IDS)}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        theirs, again = in_peft(with_experts[kind], folder, inputs)
    out = jax.jit(peft.wrap(apply_fn))(params, phi, IDS)
    np.testing.assert_allclose(out, theirs, rtol=0, atol=1e-5)
    assert np.abs(out - apply_fn(params, IDS)).max() > 0.1
    for written in (folder, again):  # As modules, or as the parameters that they make of them.
        found = pj.hf.load_adapter(written, apply_fn, params, IDS)
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found.phi, phi))


@pytest.mark.parametrize('kind', ['mixtral', 'qwen3_moe'])
def test_experts_that_peft_trained(kind, with_experts, tmp_path):
    """Gate and up of an expert have one `lora_A` there; read and written, the file is the same."""
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(with_experts[kind]).eval()
    config = peft.LoraConfig(
        r=3,
        target_modules=['q_proj'],
        target_parameters=['experts.gate_up_proj', 'experts.down_proj'],
        rank_pattern={'experts.gate_up_proj': 2},
        task_type=LANGUAGE,
    )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for tensor in (t for t in model.parameters() if t.requires_grad):
            tensor.add_(0.2 * torch.randn_like(tensor))
    out = model(input_ids=torch.tensor(IDS, dtype=torch.long)).logits.detach().numpy()
    model.save_pretrained(tmp_path / 'theirs')
    loaded = models.load_decoder(str(with_experts[kind]))
    apply_fn, params = loaded.model.apply_fn, loaded.params
    found = pj.hf.load_adapter(tmp_path / 'theirs', apply_fn, params, IDS)
    ours = jax.jit(found.peft.wrap(apply_fn))(params, found.phi, IDS)
    np.testing.assert_allclose(ours, out, rtol=0, atol=1e-5)
    assert np.abs(out - apply_fn(params, IDS)).max() > 0.1
    folder = pj.hf.save_adapter(tmp_path / 'ours', found.peft, found.phi, task_type=LANGUAGE)
    ours, theirs = (
        load_file(f / 'adapter_model.safetensors') for f in (folder, tmp_path / 'theirs')
    )
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == tensor).all() for name, tensor in theirs.items())


def test_parameters_of_a_module_are_read_by_peft(tmp_path):
    """Experts that are parameters here too."""
    torch = pytest.importorskip('torch', reason='parity needs PyTorch')
    peft = pytest.importorskip('peft', reason='parity needs PEFT')
    stored = load(CASES / 'experts' / 'lora_target_parameters')
    method = pj.Lora(target='w[12]', rank=2, alpha=5, ranks=(('w2', 3),), alphas=(('w1', 7),))
    case = stored.attached(method)
    keys = iter(jax.random.split(jax.random.key(1), 9))
    move = lambda a: a + 0.2 * jax.random.normal(next(keys), a.shape)
    phi = jax.tree.map(move, case.peft.init(jax.random.key(0), case.params))
    folder = pj.hf.save_adapter(tmp_path / 'x', case.peft, phi)

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            shape = lambda leaf: torch.nn.Parameter(torch.tensor(np.array(leaf)))
            own = case.params['experts']
            self.w1, self.w2 = shape(own['w1']), shape(own['w2'])
            self.router, self.lin = torch.nn.Linear(16, 3), torch.nn.Linear(16, 4)
            for name in ('router', 'lin'):
                for leaf in ('weight', 'bias'):
                    setattr(getattr(self, name), leaf, shape(own[name][leaf]))

        def forward(self, x):
            weights = torch.softmax(self.router(x), -1)
            inner = torch.relu(torch.einsum('bd,edf->ebf', x, self.w1))
            y = torch.einsum('ebf,efd->ebd', inner, self.w2)
            return self.lin(torch.einsum('ebd,be->bd', y, weights))

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Experts()

        def forward(self, x):
            return self.experts(x)

    x = torch.tensor(np.array(case.io['x']))
    np.testing.assert_allclose(Outer()(x).detach().numpy(), case.base(), rtol=0, atol=1e-5)
    with warnings.catch_warnings():  # It looks for the names of parameters among modules.
        warnings.filterwarnings('ignore', message='The following (rank|alpha)_pattern')
        theirs = peft.PeftModel.from_pretrained(Outer(), folder)(x).detach().numpy()
    np.testing.assert_allclose(case.forward(phi), theirs, rtol=0, atol=1e-5)
    assert np.abs(theirs - case.base()).max() > 0.1


def flat(phi):
    """Arrays by path, whatever the names of the parts of a chain."""
    leaf = lambda one: not any(isinstance(inner, dict) for inner in one.values())
    parts = [phi] if all(map(leaf, phi.values())) else phi.values()
    return {(path, n): a for part in parts for path, one in part.items() for n, a in one.items()}
