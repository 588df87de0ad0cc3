import dataclasses
import json
import pathlib
import re
import shlex
import struct

import pytest

from peftjax import checkpoint
from peftjax.cli._options import parser
from peftjax.cli._recipes import DEFAULT, RECIPES
from peftjax.cli.language._recipes import RECIPES as LANGUAGE

README = pathlib.Path(__file__).parents[2] / 'README.md'
FEW = ('--shots', 2, '--epochs', 1, '--seeds', 0, '--methods')


def test_it_leaves_table_picture_json_and_adapters(compared):
    assert {path.name for path in compared.iterdir()} == {
        'results.json', 'table.txt', 'accuracy.png', 'adapters', 'options.toml',
    }  # fmt: skip
    head, _, *rows = (compared / 'table.txt').read_text().splitlines()
    columns = 'method', 'trained', '% of model', 'on disk', 'steps/s', 'peak', 'accuracy'
    assert all(column in head for column in columns)
    assert [row.split()[0] for row in rows] == ['frozen', 'lora', 'prompt']
    picture = (compared / 'accuracy.png').read_bytes()
    assert picture[:8] == b'\x89PNG\r\n\x1a\n'
    assert min(struct.unpack('>II', picture[16:24])) > 500


def test_the_json_file_says_what_was_done(compared):
    found = json.loads((compared / 'results.json').read_text())
    assert found['options']['seeds'] == [3]
    assert {'jax', 'peftjax', 'python'} <= set(found['versions'])
    frozen, lora, prompt = found['methods']
    assert lora['trained_parameters'] == 2 * 2 * (12 * 8 + 8 * 12) + 12 * 3 + 3
    assert prompt['trained_parameters'] == 10 * 12 + 12 * 3 + 3
    assert lora['steps'] == 2 and frozen['steps'] == 0
    assert lora['learning_rate'] == RECIPES['lora'].rate
    for record in found['methods']:
        assert 0 <= record['accuracy_mean'] <= 100
        assert record['accuracy_sd'] is None
        assert record['bytes_on_disk'] > 4 * record['trained_parameters']
        assert record['peak_bytes'] > 0


def test_a_run_cut_off_keeps_its_finished_methods(peftjax, here, tmp_path, monkeypatch):
    def cut():
        raise KeyboardInterrupt

    monkeypatch.setitem(RECIPES, 'lora', dataclasses.replace(RECIPES['lora'], build=cut))
    assert peftjax('compare', *here.inputs, *FEW, 'frozen,lora', '--out', tmp_path).code != 0
    (frozen,) = json.loads((tmp_path / 'results.json').read_text())['methods']
    assert frozen['method'] == 'frozen' and frozen['learning_rate'] is None
    assert (tmp_path / 'table.txt').read_text().splitlines()[-1].startswith('frozen')
    assert not (tmp_path / 'accuracy.png').exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'adapters', 'options.toml', 'results.json', 'table.txt',
    ]  # fmt: skip


def test_each_adapter_is_saved_with_its_task(compared, here):
    folders = sorted(path.name for path in (compared / 'adapters').iterdir())
    assert folders == ['frozen-seed3', 'lora-seed3', 'prompt-seed3']
    loaded = checkpoint.load(compared / 'adapters' / 'lora-seed3')
    assert loaded.metadata['labels'] == ['ask', 'leave', 'praise']
    assert loaded.metadata['model'] == here.model
    assert loaded.metadata['settings']['rate'] == RECIPES['lora'].rate
    assert loaded.fingerprint is not None


@pytest.mark.slow
def test_earlier_results_are_kept_unless_told_otherwise(peftjax, here, tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    ran = peftjax('compare', *here.inputs, *FEW, 'frozen', '--out', tmp_path)
    assert (ran.code, ran.out) == (2, '')
    assert f'{tmp_path} exists and is not empty' in ran.err
    for seed in (1, 2):
        again = (*here.inputs, *FEW, 'frozen', '--seeds', seed, '--out', tmp_path, '--overwrite')
        assert peftjax('compare', *again).code == 0
    assert [path.name for path in (tmp_path / 'adapters').iterdir()] == ['frozen-seed2']
    assert (tmp_path / 'notes.txt').read_text() == 'mine'


def test_nothing_is_left_where_the_model_cannot_be_loaded(peftjax, here, tmp_path):
    files = ('--train', here.train, '--test', here.test)
    ran = peftjax('compare', *files, '--model', tmp_path / 'none', '--out', tmp_path / 'out')
    assert ran.code == 2 and 'no such model folder' in ran.err
    assert not (tmp_path / 'out').exists()


def test_list_prints_all_methods_and_ends(peftjax):
    ran = peftjax('compare', '--methods', 'list')
    assert (ran.code, ran.err) == (0, '')
    *rows, _ = ran.out.splitlines()
    assert [row.split()[-len(row.split()) + row.startswith('*')] for row in rows] == list(RECIPES)
    assert [row.split()[1] for row in rows if row.startswith('*')] == list(DEFAULT)
    of_tune = peftjax('tune', '--method', 'list').out
    assert of_tune.startswith(ran.out)
    _, _, *language = of_tune.removeprefix(ran.out).splitlines()
    assert [row.split()[0] for row in language] == list(LANGUAGE)


def test_the_readme_is_right_about_the_commands():
    text = README.read_text()
    names = 'compare|meta|tune|predict|generate|inspect'  # with arguments; a name alone is no call
    for command in re.findall(rf'peftjax ((?:{names}) [^`\n]+)', text):
        parser().parse_args(shlex.split(command))
    assert 'compares nine ways' in text and len(DEFAULT) == 9


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--methods', 'lora,lorra'), "unknown method 'lorra'. Methods: frozen, "),
        (('--methods', 'lora,lora'), 'a method twice'),
        (('--shots', '9'), "every class needs at least shots=9 examples: 'ask' has 4"),
        (('--shots', '0'), "must be a whole number from 1 up; got '0'"),
        (('--shots', 'few'), "must be a whole number from 1 up; got 'few'"),
        (('--seeds', '1,1'), "must be different numbers; got '1,1'"),
        (('--seeds', '0,x'), "must be a whole number from 0 below 2**32; got 'x'"),
    ],
)
def test_what_makes_no_sense_is_said(peftjax, here, tmp_path, arguments, message):
    ran = peftjax('compare', *here.inputs, '--out', tmp_path / 'out', *arguments)
    assert ran.code == 2 and message in ran.err
    assert not (tmp_path / 'out').exists()


def test_own_training_examples_need_test_examples(peftjax, here, tmp_path):
    ran = peftjax('compare', '--train', here.train, '--out', tmp_path / 'out')
    assert ran.code == 2 and '--train goes with --test' in ran.err
