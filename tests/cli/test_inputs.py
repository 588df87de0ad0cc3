"""Clear errors: exit code 2 and one message, whatever is wrong with what was given."""

import json
import pathlib

import pytest

COMMANDS = {
    'compare': ('--methods', 'frozen', '--seeds', 0, '--shots', 1),
    'tune': ('--method', 'frozen'),
}


@pytest.fixture(params=list(COMMANDS))
def refused(request, peftjax, tmp_path):
    """Runs compare and tune, and returns what they say when they refuse."""

    def run(*arguments: object) -> str:
        options = (*COMMANDS[request.param], '--out', tmp_path / 'out')
        ran = peftjax(request.param, *arguments, *options)
        assert (ran.code, ran.out) == (2, '')
        assert ran.err.startswith(f'peftjax {request.param}: error: ')
        assert not (tmp_path / 'out').exists()
        return ran.err

    return run


def rows(path, *found) -> str:
    path.write_text(''.join(json.dumps(row) + '\n' for row in found))
    return str(path)


def test_a_missing_file(refused, here, tmp_path):
    model = ('--model', here.model)
    missing = str(tmp_path / 'none.jsonl')
    assert f'no such file: {missing}' in refused(*model, '--train', missing, '--test', here.test)
    assert f'no such file: {missing}' in refused(*model, '--train', here.train, '--test', missing)


def test_a_missing_column(refused, here, tmp_path):
    train = rows(tmp_path / 't.jsonl', {'text': 'a', 'intent': 'x'}, {'text': 'b', 'intent': 'y'})
    message = refused('--model', here.model, '--train', train, '--test', here.test)
    assert "line 1: every example needs the columns 'text' and 'label'" in message
    assert "Columns found: 'text', 'intent'" in message


def test_one_class_only(refused, here, tmp_path):
    train = rows(tmp_path / 't.jsonl', {'text': 'a', 'label': 'x'}, {'text': 'b', 'label': 'x'})
    message = refused('--model', here.model, '--train', train, '--test', here.test)
    assert "one class only, 'x'" in message


def test_a_label_that_training_does_not_know(refused, here, tmp_path):
    test = rows(tmp_path / 't.jsonl', {'text': 'a', 'label': 'sell'})
    assert "'sell'" in refused('--model', here.model, '--train', here.train, '--test', test)


def test_columns_can_be_named(peftjax, here, tmp_path):
    rename = {'text': 'words', 'label': 'act'}
    table = [json.loads(line) for line in pathlib.Path(here.train).read_text().splitlines()]
    train = rows(tmp_path / 't.jsonl', *({rename[k]: v for k, v in row.items()} for row in table))
    names = ('--text-column', 'words', '--label-column', 'act')
    args = ('--model', here.model, '--train', train, *names, '--out', tmp_path / 'out')
    assert peftjax('tune', *args, '--method', 'frozen').code == 0


def test_a_hub_that_does_not_answer(refused, here, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError('no route to host')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    files = ('--train', here.train, '--test', here.test)
    message = refused('--model', 'owner/model', *files)
    assert "'owner/model' is no folder here" in message and 'no route to host' in message


def test_a_folder_without_a_model(refused, here, tmp_path):
    files = ('--train', here.train, '--test', here.test)
    assert 'config.json' in refused('--model', tmp_path, *files)


def test_a_file_where_the_results_should_go(peftjax, here, tmp_path):
    (tmp_path / 'out').write_text('mine')
    for command, some in COMMANDS.items():
        ran = peftjax(command, *here.inputs, *some, '--out', tmp_path / 'out')
        assert ran.code == 2 and '--out must be a folder' in ran.err
    assert (tmp_path / 'out').read_text() == 'mine'


EVERY = (
    'compare', 'tune', 'predict', 'generate', 'inspect',
    'plan', 'merge', 'export', 'import', 'quantize',
)  # fmt: skip


@pytest.mark.parametrize('command', EVERY)
def test_help_names_every_option(peftjax, command):
    ran = peftjax(command, '--help')
    assert ran.code == 0 and ran.out.startswith(f'usage: peftjax {command}')
    promised = {
        'compare': '--model --train --test --shots --seeds --methods --epochs --batch --out '
        '--config',
        'tune': '--model --train --data --test --shots --seed --method --rate --out --overwrite '
        '--config --epochs --steps --batch --length --pack --no-pack --answer-only --eval-data '
        '--eval-part --warmup --decay --dtype --quantize --embeddings --tensorboard --rank --alpha '
        '--dropout --reduction --virtual-tokens --target',
        'generate': 'adapter prompt --file --model --chat --max-tokens --temperature --top-k '
        '--top-p --seed',
        'predict': '--file --model --any-base standard',
        'inspect': 'model adapter',
        'plan': '--model --method --rank --target --batch --length --mesh --dtype --quantize '
        '--optimizer --remat --embeddings --virtual-tokens',
        'merge': 'adapter --out --dtype --model --any-base --dequantize',
        'export': 'adapter --out --format --base-model --overwrite',
        'import': 'folder --model --out --max-tokens --lenient --overwrite',
        'quantize': 'model --out --scheme --target --embeddings',
    }
    assert all(word in ran.out for word in promised[command].split())
    assert '%(' not in ran.out


def test_help_names_every_command(peftjax):
    ran = peftjax('--help')
    assert ran.code == 0
    assert all(name in ran.out for name in EVERY)


def test_an_unknown_command(peftjax):
    ran = peftjax('compair')
    assert ran.code == 2 and 'invalid choice' in ran.err
