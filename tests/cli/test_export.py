"""`export`: an encoder's adapter without its classifier, and AdapterHub's format."""

import json
import warnings

import jax
import jax.numpy as jnp
import language
import numpy as np
import pytest
from safetensors.numpy import load_file

import peftjax as pj
from peftjax import data, models
from peftjax.cli._saved import TASK

TEXTS = ('where is the train', 'please cancel my room', 'such a good card', 'my train is')


def predicted(peftjax, tuned):
    """Label and probability of each text, as `predict` says them."""
    lines = peftjax('predict', tuned, *TEXTS).out.splitlines()
    return [(found['label'], found['probability']) for found in map(json.loads, lines)]


def tokens(model):
    encoded = data.encode(models.load_tokenizer(model), TEXTS, 32, pad_id=0)
    return encoded.input_ids, encoded.attention_mask


def classified(folder, hidden, mask):
    """The same by the files beside an exported adapter: a mean, a product, a softmax."""
    about = json.loads((folder / 'classifier.json').read_text())
    head = load_file(folder / 'classifier.safetensors')
    weight = mask[..., None] / mask.sum(1)[:, None, None]
    logits = (hidden * weight).sum(1) @ head['weight'].T + head['bias']
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = [about['labels'][best] for best in chances.argmax(1)]
    return list(zip(labels, chances.max(1).round(4).tolist(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize('form', ['peft', 'adapterhub'])
def test_an_encoder_goes_without_its_classifier(peftjax, tuned, here, tmp_path, form):
    """The adapter is one of the encoder; its classifier lies beside, and both give the labels."""
    ran = peftjax('export', tuned, '--out', tmp_path / 'out', '--format', form)
    assert ran.code == 0 and 'no class of transformers does' in ran.out
    folder = tmp_path / 'out'
    config = json.loads((folder / 'adapter_config.json').read_text())
    if form == 'peft':
        assert config['task_type'] == 'FEATURE_EXTRACTION'
        assert not config.get('modules_to_save')
    else:
        assert config['model_class'] == 'BertModel' and config['name'] == 'out'
    encoder = models.load_encoder(here.model)
    ids, mask = tokens(here.model)
    apply_fn, params = encoder.model.apply_fn, encoder.params
    loaded = pj.hf.load_adapter(folder, apply_fn, params, ids, mask)
    assert loaded.verified and not loaded.ignored and not loaded.notes
    hidden = loaded.peft.wrap(apply_fn)(params, loaded.phi, ids, mask)
    found = classified(folder, np.asarray(hidden), mask)
    wanted = predicted(peftjax, tuned)
    assert [label for label, _ in found] == [label for label, _ in wanted]
    np.testing.assert_allclose([p for _, p in found], [p for _, p in wanted], atol=2e-4)
    assert {label for label, _ in wanted} == {'ask', 'leave', 'praise'}
    again = peftjax('export', tuned, '--out', folder, '--overwrite')
    assert again.code == 0 and (folder / 'adapter_model.safetensors').exists()


def test_parity_of_an_encoder(peftjax, tuned, here, tmp_path):
    torch = pytest.importorskip('torch', reason='parity needs PyTorch')
    peft = pytest.importorskip('peft', reason='parity needs PEFT')
    import transformers

    assert peftjax('export', tuned, '--out', tmp_path / 'out').code == 0
    ids, mask = tokens(here.model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Theirs, about each other.
        base = transformers.AutoModel.from_pretrained(here.model).eval()
        model = peft.PeftModel.from_pretrained(base, tmp_path / 'out').eval()
    assert isinstance(model, peft.PeftModelForFeatureExtraction)
    given = {'input_ids': torch.tensor(ids).long(), 'attention_mask': torch.tensor(mask).long()}
    hidden = model(**given).last_hidden_state.detach().numpy()
    found = classified(tmp_path / 'out', hidden, mask)
    wanted = predicted(peftjax, tuned)
    assert [label for label, _ in found] == [label for label, _ in wanted]
    np.testing.assert_allclose([p for _, p in found], [p for _, p in wanted], atol=2e-4)


def test_a_classifier_alone_is_refused(peftjax, tuned, tmp_path):
    loaded = pj.load(tuned / 'adapter')
    head = dict(loaded.peft.method.methods)['head']
    kernel = loaded.phi['head']['classifier/kernel']['value']
    params = {'classifier': {'kernel': jnp.zeros_like(kernel), 'bias': jnp.zeros(3)}}
    fn = lambda p, x: x @ p['classifier']['kernel'] + p['classifier']['bias']
    peft = pj.attach(pj.chain(head=head), fn, params, jnp.ones((2, len(kernel))))
    phi = peft.init(jax.random.key(0), params)
    pj.save(tmp_path / 'frozen', peft, phi, metadata=loaded.metadata | {'task': TASK})
    ran = peftjax('export', tmp_path / 'frozen', '--out', tmp_path / 'out')
    assert (ran.code, ran.out) == (2, '') and 'a classifier over a frozen encoder' in ran.err
    assert not (tmp_path / 'out').exists()


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> str:
    return language.write_model(tmp_path_factory.mktemp('llama') / 'model')


def test_adapterhub_and_back(peftjax, model, tmp_path):
    adapter = language.write_adapter(tmp_path / 'adapter', model, 'adapter')
    ran = peftjax('export', adapter, '--out', tmp_path / 'out', '--format', 'adapterhub')
    assert ran.code == 0 and f"AdapterHub's format over {model}" in ran.out
    config = json.loads((tmp_path / 'out' / 'adapter_config.json').read_text())
    assert config['model_type'] == 'llama' and config['model_name'] == model
    assert (
        peftjax('import', tmp_path / 'out', '--model', model, '--out', tmp_path / 'back').code == 0
    )
    ours, theirs = (language.adapted(str(tmp_path / name)) for name in ('adapter', 'back'))
    np.testing.assert_array_equal(ours, theirs)


def test_what_adapterhub_cannot_hold_writes_nothing(peftjax, model, tmp_path):
    adapter = language.write_adapter(tmp_path / 'adapter', model, 'lora')
    ran = peftjax('export', adapter, '--out', tmp_path / 'out', '--format', 'adapterhub')
    assert (ran.code, ran.out) == (2, '') and 'is none of them. Leave it out' in ran.err
    assert not (tmp_path / 'out').exists()
