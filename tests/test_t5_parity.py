"""Adapters of T5, which is a plain function here: theirs loaded by us, ours loaded by PEFT."""

import contextlib
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop import nested
from safetensors.numpy import load_file
from t5 import t5

import peftjax as pj

HEADS, TASK = 4, 'FEATURE_EXTRACTION'
THEIRS = {
    'lora': ('LoraConfig', dict(r=4, lora_alpha=6, use_rslora=True, target_modules=['q', 'v', 'wo'],
                                rank_pattern={'EncDecAttention.q': 2})),
    'dora': ('LoraConfig', dict(r=3, use_dora=True, target_modules=['k', 'wi'])),
    'ia3': ('IA3Config', dict(target_modules=['k', 'v', 'wo'], feedforward_modules=['wo'])),
}  # fmt: skip
OURS = {
    'lora': pj.Lora(target='(q|v)/weight', rank=3, alpha=5, alphas=(('EncDec', 7),)),
    'dora': pj.Dora(target='SelfAttention/o/weight|wi/weight', rank=2),
    'ia3': pj.Ia3(target='/(k|v|wo)/weight', feedforward='/wo/'),
}


class Both:
    """A small T5 in PyTorch, and the same as a function of JAX."""

    def __init__(self):
        torch = pytest.importorskip('torch', reason='parity needs PyTorch')
        self.peft = pytest.importorskip('peft', reason='parity needs PEFT')
        import transformers

        torch.manual_seed(5)
        self.torch = torch
        config = transformers.T5Config(
            vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=HEADS,
            dropout_rate=0.0,
        )  # fmt: skip
        self.model = transformers.T5Model(config).eval()
        tensors = {name: t.detach().numpy() for name, t in self.model.state_dict().items()}
        again = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')  # of one table
        self.params = nested({n: t for n, t in tensors.items() if n not in again})
        draw = np.random.default_rng(0)
        ids, answers = draw.integers(2, 40, (3, 9)), draw.integers(2, 40, (3, 5))
        mask = np.ones((3, 9), int)
        mask[1, -3:] = 0
        self.inputs = (ids, mask, answers)
        self.apply = functools.partial(t5, HEADS)

    def theirs(self, model):
        names = ('input_ids', 'attention_mask', 'decoder_input_ids')
        inputs = {n: self.torch.tensor(x) for n, x in zip(names, self.inputs, strict=True)}
        return model(**inputs).last_hidden_state.detach().numpy()

    def ours(self, forward, *trees):
        return forward(self.params, *trees, *map(jnp.asarray, self.inputs))


@pytest.fixture
def both():
    return Both()


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', THEIRS)
def test_theirs_are_read(both, name, tmp_path):
    close(both.ours(both.apply), both.theirs(both.model))
    kind, fields = THEIRS[name]
    config = getattr(both.peft, kind)(task_type=TASK, **fields)
    with quiet():
        model = both.peft.get_peft_model(both.model, config)
    with both.torch.no_grad():
        for tensor in (t for t in model.parameters() if t.requires_grad):
            tensor.add_(0.3 * both.torch.randn_like(tensor))
    model.eval().save_pretrained(tmp_path)
    loaded = pj.hf.load_adapter(tmp_path, both.apply, both.params, *both.inputs)
    out = both.ours(loaded.peft.wrap(both.apply), loaded.phi)
    close(out, both.theirs(model))
    assert np.abs(out - both.ours(both.apply)).max() > 0.1
    merged = loaded.peft.merge(both.params, loaded.phi)
    close(both.apply(merged, *map(jnp.asarray, both.inputs)), out)


@pytest.mark.parametrize('name', OURS)
def test_ours_are_read(both, name, tmp_path):
    peft = pj.attach(OURS[name], both.apply, both.params, *both.inputs)
    phi = peft.init(jax.random.key(0), both.params)
    draw = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    phi = jax.tree.map(draw, phi)
    folder = pj.hf.save_adapter(tmp_path, peft, phi, name='mine', task_type=TASK)
    with quiet():
        model = both.peft.PeftModel.from_pretrained(both.model, str(folder)).eval()
    close(both.ours(peft.wrap(both.apply), phi), both.theirs(model))
    model.save_pretrained(tmp_path / 'again')
    mine, again = (load_file(p / 'adapter_model.safetensors') for p in (folder, tmp_path / 'again'))
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in again.items()}
