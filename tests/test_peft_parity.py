"""Side by side with Hugging Face PEFT in PyTorch: random adapters on a tiny random BERT."""

import warnings

import numpy as np
import pytest
from interop import load

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
    'dora': dict(
        kind='LoraConfig',
        r=4,
        lora_alpha=8,
        use_dora=True,
        target_modules=['query', 'key', 'intermediate.dense'],
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
    from safetensors.numpy import save_file

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
        error = np.linalg.norm(ours.gradients[tensor] - g) / np.linalg.norm(g)
        assert error < 1e-4, (tensor, error)
