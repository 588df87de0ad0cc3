"""`peftjax meta` on a tiny encoder: tasks of one word, learned in a step or two."""

import json
import pathlib
import shutil
import struct

import jax
import numpy as np
import pytest
from commands import call
from conftest import PATTERNS, THINGS

import peftjax as pj
from peftjax import data, models
from peftjax.cli import _report
from peftjax.cli.meta import _frozen, _ground, _record
from peftjax.cli.meta._parts import Parts
from peftjax.cli.meta._results import read

pytestmark = pytest.mark.slow
MORE = ('where is my {}', 'such a {}', 'my good {}', 'cancel the {}')
PARTS = {'train': THINGS[:2], 'valid': THINGS[2:4], 'test': THINGS[4:]}
FEW = (
    '--ways', 2, '--shots', 1, '--queries', 2, '--episodes', 6, '--valid-episodes', 3,
    '--steps', '0,1,2', '--meta-steps', 2, '--meta-tasks', 2, '--inner-steps', 2,
)  # fmt: skip


@pytest.fixture(scope='module')
def files(here, tmp_path_factory) -> list[str]:
    """Options that name the model, and files of labels that no two share."""
    folder, found = tmp_path_factory.mktemp('meta'), ['--model', here.model]
    for name, things in PARTS.items():
        texts = [(t.format(thing), thing) for thing in things for t in (*PATTERNS.values(), *MORE)]
        rows = [json.dumps({'text': text, 'label': label}) + '\n' for text, label in texts]
        (folder / f'{name}.jsonl').write_text(''.join(rows))
        found += [f'--{name}', str(folder / f'{name}.jsonl')]
    return found


@pytest.fixture(scope='module')
def ran(files) -> pathlib.Path:
    """The folder of one run."""
    out = pathlib.Path(files[3]).parent / 'out'
    some = (
        '--methods',
        'nearest,logistic,lora,maml,maml-tuned',
        '--beside',
        'lora,nearest',
        '--out',
        out,
    )
    assert call('meta', *files, *FEW, *some) == 0
    return out


def results(out):
    return json.loads((out / 'results.json').read_text())['results']


def test_it_leaves_table_picture_json_and_what_was_learned(ran):
    assert {path.name for path in ran.iterdir()} == {
        'results.json', 'tasks.jsonl', 'table.txt', 'accuracy.png', 'adapters', 'options.toml',
    }  # fmt: skip
    assert [path.name for path in (ran / 'adapters').iterdir()] == ['maml-2way-1shot']
    first, second, third = (ran / 'table.txt').read_text().split('\n\n')
    title, head, _, *rows = first.splitlines()
    assert title.startswith('2 ways, 1 shots') and '0 steps' in head and 'peak' in head
    assert [row.split()[0] for row in rows] == ['nearest', 'logistic', 'lora', 'maml', 'maml-tuned']
    title, head, _, *rows = second.splitlines()
    assert title == '2 ways, 1 shots: points above lora on the same tasks, ± 95 %'
    assert [row.split()[0] for row in rows] == ['nearest', 'logistic', 'maml', 'maml-tuned']
    title, *_, last = third.splitlines()
    assert 'above nearest' in title and last.split()[0] == 'maml-tuned'
    picture = (ran / 'accuracy.png').read_bytes()
    assert picture[:8] == b'\x89PNG\r\n\x1a\n' and min(struct.unpack('>II', picture[16:24])) > 500


def test_the_json_file_says_what_each_took(ran):
    nearest, logistic, lora, maml, tuned = results(ran)
    assert nearest['phi_parameters'] == logistic['phi_parameters'] == 0
    assert lora['head_parameters'] == logistic['head_parameters'] == 2 * (12 + 1)
    assert lora['phi_parameters'] == maml['phi_parameters'] == 2 * 2 * (12 * 8 + 8 * 12)
    assert lora['meta'] is None and maml['meta'] == tuned['meta']
    assert maml['meta']['steps'] == 2 and maml['meta']['best_step'] in (1, 2)
    assert maml['meta']['seconds'] > 0 < maml['meta']['peak_bytes']
    for record in (lora, maml, tuned):
        assert record['steps'] == [0, 1, 2] and record['rates'][0] is None
        assert record['milliseconds'] > 0 < record['peak_bytes']
        assert len(record['accuracy']) == len(record['interval']) == 3
        best = np.argmax([row['accuracy'] for row in record['validation']], 0)[1:]
        assert record['rates'][1:] == [record['validation'][i]['rates'] for i in best]


def test_accuracies_on_each_task_are_kept_and_compared(ran):
    found = read(ran)
    assert [len(found.tasks[_record.key(record)]) for record in found.records] == [6] * 5
    for record in found.records:
        means = found.tasks[_record.key(record)].mean(0)
        np.testing.assert_allclose(means, record['accuracy'], atol=2e-3)
    nearest, _, maml, _ = json.loads((ran / 'results.json').read_text())['beside']['lora']
    assert nearest['steps'] == maml['steps'] == [0, 1, 2]
    assert nearest['difference'][0] == nearest['interval'][0] == 0
    differences = found.tasks['maml', 2, 1] - found.tasks['lora', 2, 1]
    np.testing.assert_allclose(maml['difference'], differences.mean(0), atol=2e-3)


def test_a_folder_that_lost_its_tasks_is_no_folder_to_go_on_with(ran, files, peftjax, tmp_path):
    shutil.copytree(ran, tmp_path / 'out')
    (tmp_path / 'out' / 'tasks.jsonl').write_text('')
    found = peftjax('meta', *files, *FEW, '--resume', '--out', tmp_path / 'out')
    assert found.code == 2 and f'{tmp_path / "out" / "tasks.jsonl"} must be what' in found.err


def test_before_the_first_step_fresh_lora_is_the_nearest_prototype(ran):
    nearest, _, lora, maml, tuned = results(ran)
    assert lora['accuracy'][0] == nearest['accuracy'][0]
    assert maml['accuracy'][0] == tuned['accuracy'][0]


def test_what_was_learned_is_an_adapter_of_the_bare_encoder(ran, here):
    loaded = pj.load(ran / 'adapters' / 'maml-2way-1shot')
    encoder = models.load_encoder(here.model)
    ids = jax.numpy.arange(4)[None]
    own = loaded.peft.wrap(encoder.model.apply_fn)(encoder.params, loaded.phi, ids)
    plain = encoder.model.apply_fn(encoder.params, ids)
    assert own.shape == plain.shape and not np.allclose(own, plain, atol=1e-6)
    assert loaded.metadata['meta'] == results(ran)[3]['meta']


def test_a_run_goes_on_with_what_is_missing(ran, files, peftjax, tmp_path):
    some = ('--methods', 'nearest', '--sharpness', 3, '--out', tmp_path)
    assert peftjax('meta', *files, *FEW, *some).code == 0
    before = results(tmp_path)
    refused = peftjax('meta', *files, *FEW, *some)
    assert refused.code == 2 and f'{tmp_path} exists and is not empty' in refused.err
    other = peftjax('meta', *files, *FEW, *some, '--resume', '--seed', 1)
    assert other.code == 2 and '--seed was 0 in' in other.err and 'is 1 now' in other.err
    assert results(tmp_path) == before and before[0]['sharpness'] == 3
    more = ('--methods', 'nearest,logistic', '--sharpness', 3, '--out', tmp_path, '--resume')
    assert '1 are there' in peftjax('meta', *files, *FEW, *more).out
    told = peftjax('meta', *files, *FEW, *more, '--beside', 'nearest').out
    assert 'nothing to go on with' in told and 'points above nearest' in told
    assert 'points above nearest' in (tmp_path / 'table.txt').read_text()
    first, second = results(tmp_path)
    assert first == before[0] and second['accuracy'] == results(ran)[1]['accuracy']


def test_a_run_goes_on_with_its_own_texts_alone(files, peftjax, tmp_path):
    test, out = pathlib.Path(shutil.copy(files[-1], tmp_path)), tmp_path / 'out'
    some = ('meta', *files[:-1], test, *FEW, '--out', out, '--methods')
    assert peftjax(*some, 'nearest').code == 0
    before = results(out)
    test.write_text(test.read_text().replace('where is the', 'such a good', 1))
    refused = peftjax(*some, 'nearest,logistic', '--resume')
    assert refused.code == 2 and '--train, --valid or --test hold others now' in refused.err
    assert f'than {out / "results.json"} was made of' in refused.err and results(out) == before


def test_a_result_of_other_versions_than_the_first_says_so(files, peftjax, tmp_path, monkeypatch):
    some = ('meta', *files, *FEW, '--out', tmp_path, '--methods')
    assert peftjax(*some, 'nearest').code == 0
    first = _report.versions()
    monkeypatch.setattr(_report, 'versions', lambda: first | {'jax': 'another'})
    assert peftjax(*some, 'nearest,logistic', '--resume').code == 0
    nearest, logistic = results(tmp_path)
    assert json.loads((tmp_path / 'results.json').read_text())['versions'] == first
    assert 'versions' not in nearest and logistic['versions'] == first | {'jax': 'another'}


def test_a_result_that_is_cut_off_goes_on_where_it_was(files, peftjax, tmp_path, monkeypatch):
    """Batch by batch: a task of full fine-tuning may take minutes."""
    some = ('--methods', 'full', '--out', tmp_path)
    real, seen = Parts.add, []

    def add(parts, name, batch):
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(name)
        real(parts, name, batch)

    monkeypatch.setattr(Parts, 'add', add)
    assert peftjax('meta', *files, *FEW, *some).code != 0 and len(seen) == 4
    with (tmp_path / 'parts.jsonl').open('a') as file:
        file.write('{"of": "full, ')  # and the machine went down
    seen.clear()
    monkeypatch.setattr(Parts, 'add', lambda *args: seen.append(args[1]) or real(*args))
    assert peftjax('meta', *files, *FEW, *some, '--resume').code == 0
    gone_on, (own,) = len(seen), results(tmp_path)
    assert not (tmp_path / 'parts.jsonl').exists()
    seen.clear()
    again = ('--methods', 'full', '--out', tmp_path / 'again')
    assert peftjax('meta', *files, *FEW, *again).code == 0
    (whole,) = results(tmp_path / 'again')
    assert len(seen) == gone_on + 4
    assert own['accuracy'] == whole['accuracy'] and own['validation'] == whole['validation']


def test_every_kind_of_method_runs(files, peftjax, tmp_path):
    some = 'full', 'prefix', 'reptile', 'prototypical', 'reptile-logistic'
    assert peftjax('meta', *files, *FEW, '--methods', ','.join(some), '--out', tmp_path).code == 0
    found = {record['method']: record for record in results(tmp_path)}
    assert tuple(found) == some
    for name, record in found.items():
        assert record['steps'] == ([0, 1, 2] if name in some[:3] else [0])
        assert all(0 <= one <= 100 for one in record['accuracy'])
    assert found['full']['phi_parameters'] > found['prefix']['phi_parameters'] == 2 * 2 * 10 * 12
    assert sorted(path.name for path in (tmp_path / 'adapters').iterdir()) == [
        'prototypical-2way-1shot', 'reptile-2way-1shot',
    ]  # fmt: skip


def test_logistic_regression_looks_at_features_of_the_learned_phi(
    files, here, peftjax, tmp_path, monkeypatch
):
    seen, real = [], _frozen.logistic
    spy = lambda features, *rest: seen.append(np.asarray(features)) or real(features, *rest)
    monkeypatch.setattr(_frozen, 'logistic', spy)
    some = ('--methods', 'logistic,prototypical-logistic', '--meta-rate', 0.1, '--out', tmp_path)
    assert peftjax('meta', *files, *FEW, *some).code == 0
    frozen, learned = results(tmp_path)
    assert frozen['meta'] is None and learned['meta']['learner'] == 'prototypical'
    assert [row['strength'] for row in learned['validation']] == list(_frozen.STRENGTHS)

    encoder, tokenizer = models.load_encoder(here.model), models.load_tokenizer(here.model)
    rows = pathlib.Path(files[files.index('--valid') + 1]).read_text().splitlines()
    texts = [json.loads(row)['text'] for row in rows]
    tokens = data.encode(tokenizer, texts, 64, pad_id=encoder.config.pad_token_id)
    adapter = pj.load(tmp_path / 'adapters' / 'prototypical-2way-1shot')
    forward, mask = adapter.peft.wrap(encoder.model.apply_fn), tokens.attention_mask
    for phi, features in ((adapter.peft.init(jax.random.key(0), encoder.params), seen[0]),
                          (adapter.phi, seen[-1])):  # fmt: skip
        hidden = forward(encoder.params, phi, tokens.input_ids, attention_mask=mask)
        wanted = _ground.pooled(hidden, mask)
        np.testing.assert_allclose(features[: len(texts)], wanted, atol=2e-6)
    assert np.abs(seen[0] - seen[-1]).max() > 1e-3


def test_one_phi_is_learned_for_all_shapes_on_as_many_labels_as_there_are(files, peftjax, tmp_path):
    shapes = ('--shots', '1,2', '--meta-shots', 2, '--meta-queries', 1)
    some = ('--methods', 'prototypical,reptile', '--out', tmp_path)
    assert peftjax('meta', *files, *FEW, *shapes, *some).code == 0
    learned = {record['method']: record['meta'] for record in results(tmp_path)}
    assert sorted(path.name for path in (tmp_path / 'adapters').iterdir()) == [
        'prototypical-2way-2shot', 'reptile-2way-2shot',
    ]  # fmt: skip
    assert all(record['meta'] == learned[record['method']] for record in results(tmp_path))


WRONG = {
    '--methods lorra': "unknown method 'lorra'. Methods: nearest, logistic",
    '--methods lora,lora': 'a method twice',
    '--beside lorra': "unknown method 'lorra'. Methods: nearest, logistic",
    '--ways 3': '--valid: a task of ways=3 needs as many classes: there are 2',
    '--shots 9': '--valid: every label needs at least 11 texts, for shots and queries: ',
    '--meta-shots 9': '--train: every label needs at least 13 texts, for shots and queries: ',
    '--ways 1': 'must be numbers of labels from 2 up',
    '--methods maml --meta-shots 6 --meta-queries 1':
        '--valid: every label needs at least 8 texts, for shots and queries: ',
    '--ways 2,2': "must be different numbers; got '2,2'",
    '--steps -1': "must be a whole number from 0 up; got '-1'",
    '--steps 1,x': "must be a whole number from 0 up; got 'x'",
    '--steps 0': '--steps must have one above 0; got [0]',
    '--sharpness 0': "must be a number above 0; got '0'",
    '--episodes 0': "must be a whole number from 1 up; got '0'",
    '--methods reptile --meta-shots 2 --meta-queries 5':
        '--train: every label needs at least 8 texts, for shots and queries: ',
    '--methods reptile --inner-steps 1': '--inner-steps must be 2 or more for reptile, got 1',
    '--methods maml --meta-ways 1': '--meta-ways must be 2 or more, and so must be the labels',
}  # fmt: skip


@pytest.mark.parametrize('typed', WRONG)
def test_what_makes_no_sense_is_said_before_any_work(files, peftjax, tmp_path, typed):
    found = peftjax('meta', *files, *FEW, *typed.split(), '--out', tmp_path / 'out')
    assert (found.code, found.out) == (2, '') and WRONG[typed] in found.err
    assert not (tmp_path / 'out').exists()


def test_labels_that_two_files_share_are_refused(files, peftjax, tmp_path):
    shared = ('--valid', files[files.index('--test') + 1])
    found = peftjax('meta', *files, *FEW, *shared, '--out', tmp_path / 'out')
    assert found.code == 2 and "--valid and --test both have 'garden' (2 in all)" in found.err


def test_methods_are_listed(peftjax):
    found = peftjax('meta', '--methods', 'list')
    assert found.code == 0 and [row.split()[0] for row in found.out.splitlines()][:3] == [
        'nearest', 'logistic', 'full',
    ]  # fmt: skip
