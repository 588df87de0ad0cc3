"""Language models on the command line: trained, and asked."""

import json
import pathlib
import signal
import struct
import sys
import types

import jax
import numpy as np
import pytest
from commands import call
from talker import COLORS, PROMPTS

from peftjax import checkpoint, data, models
from peftjax.cli import _metrics, _options
from peftjax.cli._metrics import Metrics

FEW = ('--steps', 3, '--batch', 2, '--length', 16, '--evaluations', 1, '--remat', 'none')


def rows(run, name):
    """The lines of a metrics file that have a value."""
    lines = (run / 'metrics.jsonl').read_text().splitlines()
    return [row for row in map(json.loads, lines) if name in row]


@pytest.fixture
def tune(peftjax, talk):
    """Runs `tune` on the language model."""

    def run(*arguments: object, data: object = talk.data):
        return peftjax('tune', '--model', talk.model, '--data', data, *arguments)

    return run


def test_a_run_leaves_adapter_metrics_picture_and_options(talk):
    found = {path.name for path in talk.run.iterdir()}
    assert found == {'adapter', 'metrics.jsonl', 'loss.png', 'options.toml'}
    steps, held = rows(talk.run, 'loss'), rows(talk.run, 'evaluation_loss')
    assert [row['step'] for row in steps] == list(range(1, 61))
    assert [row['step'] for row in held] == [0, 30, 60]
    assert held[2]['evaluation_loss'] < 0.1 < 1 < held[0]['evaluation_loss']
    assert steps[-1]['loss'] < 0.1 and max(row['rate'] for row in steps) == pytest.approx(0.03)
    assert steps[0]['rate'] < 0.03 > steps[-1]['rate']
    assert all(a['tokens'] < b['tokens'] for a, b in zip(steps, steps[1:], strict=False))
    assert all(a['seconds'] < b['seconds'] for a, b in zip(steps, steps[1:], strict=False))
    picture = (talk.run / 'loss.png').read_bytes()
    assert min(struct.unpack('>II', picture[16:24])) > 500
    assert '5 examples in 3 rows, 5 to evaluate on; 60 steps of 4' in talk.said
    assert 'tokens/s' in talk.said and 'self_attn/q_proj/kernel' in talk.said


def test_the_adapter_tells_its_task(talk):
    about = checkpoint.load(talk.run / 'adapter').metadata
    kept = {name: about[name] for name in ('task', 'model', 'max_tokens', 'method', 'seed')}
    expected = {'task': 'language-model', 'model': talk.model, 'max_tokens': 20}
    assert kept == expected | {'method': 'lora', 'seed': 0}
    assert about['settings']['rate'] == 0.03 and about['settings']['pack'] is True


def test_it_says_what_it_has_learned(peftjax, talk):
    ran = peftjax('generate', talk.run, *PROMPTS, '--max-tokens', 4)
    assert (ran.code, ran.err) == (0, '')
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert [line['prompt'] for line in lines] == PROMPTS
    assert [line['completion'] for line in lines] == list(COLORS.values())
    assert {line['tokens'] for line in lines} == {1}
    plain = peftjax('generate', talk.run / 'adapter', *PROMPTS, '--max-tokens', 4, '--plain')
    assert plain.out.splitlines() == list(COLORS.values())


def test_prompts_come_from_a_file_in_batches_of_one_shape(peftjax, talk, tmp_path):
    (tmp_path / 'prompts').write_text('\n'.join(PROMPTS))
    ran = peftjax('generate', talk.run, '--file', tmp_path / 'prompts', '--batch', 2, '--plain')
    assert ran.out.splitlines() == list(COLORS.values())


@pytest.mark.slow
def test_drawing_follows_the_seed(peftjax, talk):
    hot = ('generate', '--model', talk.model, *PROMPTS, '--max-tokens', 6, '--temperature', 3)
    first, again, other = (peftjax(*hot, '--seed', seed).out for seed in (1, 1, 2))
    assert first == again != other
    base = peftjax(*hot[:-2])
    assert peftjax(*hot[:-2], '--top-k', 1).out == base.out != first
    assert peftjax(*hot[:-2], '--temperature', 0).out == base.out


def test_without_an_adapter_the_model_speaks_alone(peftjax, talk):
    ran = peftjax('generate', '--model', talk.model, PROMPTS[0], '--max-tokens', 1)
    loaded = models.load_decoder(talk.model)
    words = ['<begin>', *PROMPTS[0].split()]
    vocabulary = json.loads(pathlib.Path(talk.model, 'tokenizer.json').read_text())['model'][
        'vocab'
    ]
    ids = np.array([[vocabulary[word] for word in words]], np.int32)
    likeliest = int(loaded.model.apply_fn(loaded.params, ids)[0, -1].argmax())
    said = json.loads(ran.out)['completion']
    assert said == {i: word for word, i in vocabulary.items()}[likeliest]


def test_a_prompt_through_the_chat_template(peftjax, talk, monkeypatch):
    seen, encode = [], data.encode_prompt
    monkeypatch.setattr(
        data, 'encode_prompt', lambda *args, **how: seen.append(encode(*args, **how)) or seen[-1]
    )
    for how in (('--chat',), ()):
        args = ('generate', '--model', talk.model, 'the sea', '--max-tokens', 1)
        assert peftjax(*args, *how).code == 0
    assert [ids[0] for ids in seen] == [4, 2] and list(seen[0][-2:]) == [3, 5]


@pytest.mark.slow
def test_an_update_that_explodes_is_an_error_where_it_is_the_last(tune, tmp_path):
    some = ('--steps', 1, '--batch', 2, '--length', 16, '--rate', 1e30, '--remat', 'none')
    ran = tune(*some, '--out', tmp_path / 'out')
    assert ran.code == 2 and 'lora: the loss must stay finite' in ran.err
    assert 'after step 1, the last one' in ran.err and not (tmp_path / 'out/adapter').exists()


def cut_off(self, step, values, add=Metrics.add):
    add(self, step, values)
    if step == 2:
        raise KeyboardInterrupt


@pytest.mark.slow
def test_options_give_the_same_run_again(peftjax, tune, tmp_path, monkeypatch):
    first, again = tmp_path / 'first', tmp_path / 'again'
    assert tune(*FEW, '--eval-part', 0.2, '--seed', 5, '--out', first).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, 'add', cut_off)
        same = ('tune', '--config', first / 'options.toml', '--out', again)
        assert peftjax(*same).code == 130
    assert [row['step'] for row in rows(again, 'loss')] == [1, 2]  # kept, though cut off
    left = {path.name for path in again.iterdir()}
    assert left == {'checkpoints', 'metrics.jsonl', 'options.toml'}
    (again / 'notes.txt').write_text('mine')
    assert peftjax(*same).code == 2
    ran = peftjax(*same, '--overwrite')
    assert (ran.code, ran.err) == (0, '') and (again / 'notes.txt').read_text() == 'mine'
    assert 'exists and is not empty' in peftjax('tune', '--config', first / 'options.toml').err
    for name in ('loss', 'evaluation_loss'):
        assert [r[name] for r in rows(first, name)] == [r[name] for r in rows(again, name)]
    trained = [jax.tree.leaves(checkpoint.load(run / 'adapter').phi) for run in (first, again)]
    assert all((a == b).all() for a, b in zip(*trained, strict=True))
    lines = [(run / 'options.toml').read_text().splitlines() for run in (first, again)]
    assert [a for a, b in zip(*lines, strict=True) if a != b] == [f'out = "{first}"']


@pytest.fixture(scope='module')
def unbroken(talk, tmp_path_factory):
    """A run of nine steps, with evaluations."""
    out = tmp_path_factory.mktemp('unbroken')
    assert call('tune', '--model', talk.model, '--data', talk.data, *NINE, '--out', out) == 0
    return out


NINE = ('--steps', 9, '--batch', 2, '--length', 20, '--evaluations', 3, '--eval-part', 0.2)


def interrupt():
    raise KeyboardInterrupt  # as SIGINT does, which a background process does not get


SIGNALS = {
    'interrupted': (interrupt, 130, 4),
    'told to end': (lambda: signal.raise_signal(signal.SIGTERM), 143, 6),
}


@pytest.mark.slow
@pytest.mark.parametrize('how', SIGNALS)
def test_a_run_that_was_cut_off_goes_on(peftjax, tune, unbroken, tmp_path, monkeypatch, how):
    cut, code, left = SIGNALS[how]
    add = Metrics.add

    def adding(self, step, values):
        add(self, step, values)
        if step == 5:
            cut()

    out = tmp_path / 'out'
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, 'add', adding)
        assert tune(*NINE, '--save-every', 2, '--out', out).code == code
    with (out / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 6, "lo')  # as if the process had been killed
    other = tune(*NINE, '--rate', 1e-5, '--out', out, '--resume')
    assert other.code == 2 and 'rate was 0.0002 and is 1e-05 now' in other.err
    ran = peftjax('tune', '--config', out / 'options.toml', '--resume')
    assert ran.code == 0 and f'goes on after step {left}' in ran.out, ran.err
    for name in ('loss', 'evaluation_loss'):
        assert [(r['step'], r[name]) for r in rows(unbroken, name)] == [
            (r['step'], r[name]) for r in rows(out, name)
        ]
    assert rows(out, 'loss')[-1]['tokens'] == rows(unbroken, 'loss')[-1]['tokens']
    trained = [jax.tree.leaves(checkpoint.load(run / 'adapter').phi) for run in (unbroken, out)]
    assert all((a == b).all() for a, b in zip(*trained, strict=True))
    assert {p.name for p in out.iterdir()} == {p.name for p in unbroken.iterdir()}
    ran = peftjax('tune', '--config', out / 'options.toml', '--resume')
    assert ran.code == 0 and 'has come to its end' in ran.out


@pytest.mark.slow
def test_all_commands_write_options_that_are_read_as_what_was_asked(compared, tuned):
    for command, file in (
        ('compare', compared / 'options.toml'),
        ('tune', tuned / 'options.toml'),
    ):
        options = _options.parse([command, '--config', str(file)])
        written = file.read_text()
        assert options.epochs == {'compare': 1, 'tune': 150}[command] and 'seed' in written
        assert 'overwrite' not in written and 'command' not in written
    assert (options.rate, options.max_tokens, options.steps) == (0.02, 64, None)


def test_tensorboard_gets_what_the_file_gets(tmp_path, monkeypatch):
    added = []
    writer = types.SimpleNamespace(add_scalar=lambda *a: added.append(a), close=lambda: None)
    monkeypatch.setitem(
        sys.modules, 'tensorboardX', types.SimpleNamespace(SummaryWriter=lambda folder: writer)
    )
    with Metrics(tmp_path, _metrics.board()) as metrics:
        metrics.add(1, {'loss': 2.0, 'rate': 0.1})
    assert added == [('loss', 2.0, 1), ('rate', 0.1, 1)]
    assert metrics.rows == rows(tmp_path, 'loss')


def test_tensorboard_must_be_installed(tune, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorboardX', None)
    ran = tune(*FEW, '--tensorboard', '--out', tmp_path / 'run')
    assert ran.code == 2 and "pip install 'peftjax[tensorboard]'" in ran.err


@pytest.mark.slow
def test_parts_of_a_step_are_the_step(tune, tmp_path):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    how = ('--steps', 4, '--batch', 6, '--length', 16, '--evaluations', 1, '--eval-part', 0.2)
    assert tune(*how, '--out', whole).code == 0
    assert tune(*how, '--accumulate', 3, '--out', parts).code == 0
    for name in ('loss', 'tokens', 'evaluation_loss'):
        found, expected = ([row[name] for row in rows(run, name)] for run in (parts, whole))
        assert found == pytest.approx(expected, rel=1e-5) and len(set(found)) > 1
    assert 'accumulate = 3\n' in (parts / 'options.toml').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('mesh', ['data=2', 'fsdp=2,model=4', 'data=2,fsdp=2,model=2'])
def test_on_a_mesh_a_run_measures_the_same(tune, tmp_path, mesh):
    one, several = tmp_path / 'one', tmp_path / 'several'
    how = ('--steps', 4, '--batch', 8, '--length', 16, '--evaluations', 1, '--eval-part', 0.2)
    assert tune(*how, '--out', one).code == 0
    assert tune(*how, '--accumulate', 2, '--mesh', mesh, '--out', several).code == 0
    for name in ('loss', 'tokens', 'evaluation_loss'):
        found, expected = ([row[name] for row in rows(run, name)] for run in (several, one))
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    'how',
    [
        ('--quantize', 'nf4', '--embeddings', '--dtype', 'bfloat16', '--rank', 2),
        ('--method', 'prefix', '--decay', 'linear'),
    ],
    ids=['quantized', 'prefix'],
)
def test_what_was_trained_is_found_again(peftjax, tune, tmp_path, how):
    assert tune(*FEW, *how, '--out', tmp_path / 'run').code == 0
    about = checkpoint.load(tmp_path / 'run' / 'adapter').metadata
    assert about['settings']['pack'] is ('prefix' not in how)
    ran = peftjax('generate', tmp_path / 'run', *PROMPTS[:2], '--max-tokens', 2)
    assert (ran.code, ran.err) == (0, '') and ran.out.count('"completion"') == 2


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('--method', 'lorra'), "unknown method 'lorra'. Methods for language models: lora, "),
        (('--method', 'lora,ia3'), 'one method is taken at a time'),
        (('--method', 'bitfit'), 'BitFit adapts sites of kind bias'),
        (('--method', 'prefix', '--pack'), '--pack is not for prefix'),
        (('--shots', 2), '--shots is for an encoder; '),
        (('--accumulate', 3), '--accumulate 3 must divide --batch 8'),
        (('--eval-data', 'none.jsonl'), 'no such file: none.jsonl'),
        (('--eval-part', 0.01), 'of 5 examples leaves 0 to evaluate on'),
        (('--eval-part', 0.2, '--eval-data', 'a.jsonl'), '--eval-part 0 holds nothing back'),
        (('--length', 4, '--too-long', 'drop'), 'all 5 examples have more than max_tokens=4'),
        (('--length', 4), 'line 1 has 9 tokens, max_tokens is 4'),
        (
            ('--prompt-column', 'question'),
            "'question' must be a text that is not empty: received None",
        ),
        (('--quantize', 'int3'), "invalid choice: 'int3'"),
        (('--warmup', 1.5), "must be from 0 to below 1; got '1.5'"),
    ],
)
def test_what_makes_no_sense_is_said(tune, tmp_path, arguments, message):
    ran = tune(*arguments, '--out', tmp_path / 'run')
    assert ran.code == 2 and message in ran.err
    assert not (tmp_path / 'run').exists()


def test_data_that_cannot_be_used_is_said(peftjax, tune, talk, tmp_path):
    out = ('--out', tmp_path / 'run')
    assert 'no such file' in tune(*out, data=tmp_path / 'none.jsonl').err
    (tmp_path / 'empty.jsonl').write_text('\n')
    assert 'is empty' in tune(*out, data=tmp_path / 'empty.jsonl').err
    assert '--data with a jsonl file' in peftjax('tune', '--model', talk.model, *out).err


def test_an_encoder_has_options_of_its_own(peftjax, here, tmp_path):
    ran = peftjax('tune', *here.inputs, '--steps', 3, '--out', tmp_path / 'run')
    assert ran.code == 2 and '--steps is for a language model' in ran.err


def test_adapters_go_to_the_command_that_takes_them(peftjax, talk, tuned):
    ran = peftjax('generate', tuned, 'a')
    assert ran.code == 2 and 'it holds one of an encoder: peftjax predict takes it' in ran.err
    ran = peftjax('predict', talk.run, 'a')
    assert ran.code == 2 and 'one of a language model: peftjax generate takes it' in ran.err
    assert '"language-model"' in peftjax('inspect', talk.run).out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((), 'name the folder of an adapter, or a model with --model'),
        (('none', 'a'), "no such adapter folder: 'none'"),
        (('--model', 'MODEL', 'a', '--temperature', 0, '--top-k', 3), 'leave --top-k and --top-p'),
        (('--model', 'MODEL', 'a', '--temperature', -1), "must be a number from 0 up; got '-1'"),
        (('--model', 'MODEL', '--file', 'none'), 'no such file: none'),
    ],
)
def test_generate_says_what_is_wrong(peftjax, talk, arguments, message):
    ran = peftjax('generate', *(talk.model if a == 'MODEL' else a for a in arguments))
    assert ran.code == 2 and message in ran.err and ran.out == ''
