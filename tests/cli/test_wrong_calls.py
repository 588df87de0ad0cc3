"""Calls as they are mistyped: exit code 2, what came and the mend, nothing written."""

import ast
import os
import pathlib

import language
import pytest
from commands import call

from peftjax.cli import _wording


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> pathlib.Path:
    """A model, dense and quantized, an adapter of ours and of PEFT, and a file."""
    here = tmp_path_factory.mktemp('place')
    model = language.write_model(here / 'llama')
    (here / 'runs').mkdir()
    language.write_adapter(here / 'runs' / 'mine', model, 'lora')
    assert call('quantize', model, '--out', here / 'small') == 0
    assert call('export', here / 'runs' / 'mine', '--out', here / 'of-peft') == 0
    (here / 'data.jsonl').write_text('{"text": "a"}\n')
    (here / 'other.jsonl').write_text('[1]\n')
    return here


TUNE = 'tune --model llama --data data.jsonl --out new'
GENERATE = {
    'generate runs/mien hi --model llama':
        "no such adapter folder: 'runs/mien'. Did you mean 'runs/mine'? A prompt that reads like",
    'generate runs/other hi --model llama': "no such adapter folder: 'runs/other'. A prompt that",
    'generate --model llama runz/mine hi': "no such adapter folder: 'runz/mine'",
    'generate hello': "no such adapter folder: 'hello'. Name the folder of an adapter before",
    'generate llama hi': 'llama is a model, not an adapter: name it with --model',
    'generate runs hi': 'Adapters in it: runs/mine',
    'generate of-peft hi': 'peftjax import makes an adapter of it',
    'generate --model runs/mine hi': 'Name that model',
    'generate --model data.jsonl hi': 'data.jsonl is a file. Pass the folder',
    'generate --model ./lama hi': "no such model folder: ./lama. Did you mean 'llama'?",
    'generate --model small --quantize nf4 hi': 'small is quantized already: leave --quantize out',
    'generate --model llama --embeddings hi': 'add --quantize nf4',
    'generate runs/mine hi --file data.jsonl': "not both; got 'hi' and --file data.jsonl",
    'generate runs/mine hi --temperature hot': "from 0 up; got 'hot'",
    'generate runs/mine hi --top-p 90': "above 0, at most 1; got '90'",
    'generate runs/mine hi --top-k 0': "whole number from 1 up; got '0'",
}  # fmt: skip
TUNES = {
    f'{TUNE} --rate 0': "must be a number above 0; got '0'",
    f'{TUNE} --rate nan': "must be a number above 0; got 'nan'",
    f'{TUNE} --weight-decay -1': "must be a number from 0 up; got '-1'",
    f'{TUNE} --mesh data': "must be a whole number from 1 up; got ''",
    f'{TUNE} --mesh tensor=2': 'must be axes among data, fsdp and model, as data=4,model=2; got',
    f'{TUNE} --mesh data=2,data=2': 'must be axes among data, fsdp and model',
    f'{TUNE} --mesh data=3': '--batch 8 must be dealt out over 3 devices of --mesh data=3',
    f'{TUNE} --mesh fsdp=2,data=2 --accumulate 4': '--batch 8 in 4 parts must be dealt out over 4',
    f'{TUNE} --mesh data=4096': 'a mesh of 4096 devices is wanted; JAX runs with 8',
    f'{TUNE} --seed -1': "must be a whole number from 0 below 2**32; got '-1'",
    f'{TUNE} --seed 99999999999999999999': 'must be a whole number from 0 below 2**32',
    f'{TUNE} --method prefix --rank 4': '--rank is not for prefix; it is for lora, ',
    f'{TUNE} --method prompt --pack': '--pack is not for prompt',
    f'{TUNE} --embeddings': 'add --quantize nf4',
    f'{TUNE} --model small --quantize int8': 'small is quantized already',
    f'{TUNE} --model runs/mine': 'Name that model',
    f'{TUNE} --data nothing': 'no such file: nothing',
    f'{TUNE} --data other.jsonl': 'other.jsonl, line 1',
    f'{TUNE} --out data.jsonl': '--out must be a folder',
    f'{TUNE} --out data.jsonl/new': 'data.jsonl is a file. Choose another --out',
    f'{TUNE} --out llama --overwrite': 'llama is the folder of a model. Choose another --out',
    f'{TUNE} more': 'unrecognized arguments: more',
    f'{TUNE} --save-every 0': "whole number from 1 up; got '0'",
    f'{TUNE} --out runs --resume': 'runs exists and is not empty. Choose another --out',
    'tune --data data.jsonl --out runs --resume': 'runs exists and is not empty. Choose another',
    'tune --data data.jsonl --out new --save-every 0.5': "whole number from 1 up; got '0.5'",
}
FOLDERS = {
    'merge runs/mien --out new': "no such adapter folder: runs/mien. Did you mean 'runs/mine'?",
    'merge runs/mine --out new --model small': 'Load that base, or pass --any-base',
    'merge runs/mine --out data.jsonl/new': 'cannot be made',
    'export runs --out new': 'Adapters in it: runs/mine',
    'export runs/mine --out llama --overwrite': 'only a saved adapter is replaced',
    'import runs/mine --model llama --out new': 'This one is an adapter of peftjax already',
    'import of-peft --model runs/mine --out new': 'Name that model',
    'quantize small --out new': 'small is quantized already',
    'quantize runs/mine --out new': 'Name that model',
    'quantize llama --out data.jsonl/new': 'cannot be made',
    'quantize llama --out new --target ((': "target '((' is not a regular expression",
    'plan --model small --quantize nf4': 'small is quantized already',
    'plan --model llama --method lora,dora': 'one method is taken at a time',
    'inspect runs': 'Adapters in it: runs/mine',
    'predict runs/mine hi': 'one of a language model: peftjax generate takes it',
}


@pytest.mark.parametrize('typed', [*GENERATE, *TUNES, *FOLDERS])
def test_a_wrong_call_says_what_came_and_the_mend(peftjax, place, monkeypatch, typed):
    monkeypatch.chdir(place)
    before = sorted(os.walk('.'))
    ran = peftjax(*typed.split())
    command, message = typed.split()[0], {**GENERATE, **TUNES, **FOLDERS}[typed]
    assert (ran.code, ran.out) == (2, '') and message in ran.err, ran
    assert f'peftjax {command}: error: ' in ran.err and '[Errno' not in ran.err
    assert sorted(os.walk('.')) == before


EMPTY = {
    'tune --out new': (
        '--train',
        '--data',
        '--test',
        '--eval-data',
        '--out',
        '--model',
        '--config',
    ),
    'compare': ('--train', '--test', '--out', '--model'),
    'predict runs/mine': ('--file', '--model'),
    'generate runs/mine': ('--file', '--model'),
    'export runs/mine --out new': ('--out', '--base-model'),
    'import of-peft --model llama --out new': ('--model', '--out'),
    'merge runs/mine --out new': ('--model', '--out'),
}
NAMES = [(typed, name) for typed, names in EMPTY.items() for name in names]


@pytest.mark.parametrize(('typed', 'name'), [*NAMES, ('inspect', ''), ('quantize --out new', '')])
def test_an_empty_name_is_no_name(peftjax, place, monkeypatch, typed, name):
    """As of a variable that is not set: neither the default is taken for it, nor nothing."""
    monkeypatch.chdir(place)
    before = sorted(os.walk('.'))
    ran = peftjax(*typed.split(), *([name] if name else []), '')
    assert (ran.code, ran.out) == (2, '') and "name of a file or folder; got ''" in ran.err
    assert name in ran.err.splitlines()[-1] and sorted(os.walk('.')) == before


def test_more_tokens_than_positions_are_told_by_their_options(peftjax, here, tmp_path):
    typed = ('--method', 'prompt', '--virtual-tokens', 60, '--out', tmp_path / 'new')
    ran = peftjax('tune', *here.inputs, *typed)
    assert ran.code == 2 and 'at most 40 tokens' in ran.err
    assert 'Lower --max-tokens or --virtual-tokens' in ran.err


def test_what_does_not_fit_into_memory_is_told(peftjax, place, monkeypatch):
    from peftjax.cli import _generate

    def run(options):
        raise RuntimeError(said)

    monkeypatch.setattr(_generate, 'run', run)
    typed = ('generate', '--model', place / 'llama', 'hi', '--max-tokens', 10**8)
    said = 'RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes.\nMore'
    ran = peftjax(*typed)
    assert ran.code == 2 and f'--max-tokens {10**8}, --batch 8 need more ({said[:20]}' in ran.err
    assert ran.err.endswith('4 bytes.). Lower --max-tokens or --batch\n')
    said = 'something else'
    with pytest.raises(RuntimeError, match=said):
        peftjax(*typed)


def test_a_word_that_is_no_folder_is_a_prompt_and_said_to_be(place, monkeypatch, capsys):
    from peftjax.cli import _generate, _options

    monkeypatch.chdir(place)
    words = lambda *typed: _generate._words(_options.parse(['generate', '--model', 'm', *typed]))
    assert words('is it red/blue?', 'x') == (None, ['is it red/blue?', 'x'])
    assert words('hello') == (None, ['hello']) and capsys.readouterr().err == ''
    assert words('hello', 'you') == (None, ['hello', 'you'])
    assert "no adapter is named 'hello': it is taken as a prompt" in capsys.readouterr().err
    assert words('runs/mine', 'you') == ('runs/mine', ['you'])


def test_what_is_put_into_other_words_is_still_said():
    library = pathlib.Path(_wording.__file__).parents[1]
    files = [file for file in library.rglob('*.py') if 'cli' not in file.parts]
    trees = [ast.parse(file.read_text(encoding='utf-8')) for file in files]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = [node.value for node in nodes if isinstance(node.value, str)]
    for said in _wording.OPTIONS:
        assert any(said in text for text in texts), said
