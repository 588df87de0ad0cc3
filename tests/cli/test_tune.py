import dataclasses
import functools
import io
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax import checkpoint, data
from peftjax.cli._fit import Fitter, Settings
from peftjax.cli._recipes import chosen
from peftjax.cli._task import load_task
from peftjax.cli._terminal import progress
from peftjax.cli._watch import Watch

TEXTS = ('where is the train', 'please cancel my room', 'such a good card')


def test_an_adapter_labels_new_text(peftjax, tuned):
    ran = peftjax('predict', tuned, *TEXTS)
    assert (ran.code, ran.err) == (0, '')
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert [line['text'] for line in lines] == list(TEXTS)
    assert [line['label'] for line in lines] == ['ask', 'leave', 'praise']
    assert all(1 / 3 < line['probability'] <= 1 for line in lines)


def test_texts_come_from_a_file_or_standard_input(peftjax, tuned, tmp_path, monkeypatch):
    direct = peftjax('predict', tuned, *TEXTS).out
    (tmp_path / 'texts').write_text('\n'.join(TEXTS) + '\n\n')
    assert peftjax('predict', tuned, '--file', tmp_path / 'texts').out == direct
    monkeypatch.setattr('sys.stdin', io.StringIO('\r\n'.join(TEXTS)))
    assert peftjax('predict', tuned).out == direct
    pipe = io.TextIOWrapper(io.BytesIO('\ufeff'.encode() + '\r\n'.join(TEXTS).encode()))
    monkeypatch.setattr('sys.stdin', pipe)
    assert peftjax('predict', tuned).out == direct


def test_texts_are_unicode(peftjax, tuned, monkeypatch):
    ran = peftjax('predict', tuned, 'fine', b'a\xffb'.decode(errors='surrogateescape'))
    assert (ran.code, ran.out) == (2, '')
    assert r"text to label 'a\udcffb' must be Unicode text: character 2 is half of one" in ran.err
    pipe = io.TextIOWrapper(io.BytesIO(b'fine\na\xffb'), errors='surrogateescape')
    monkeypatch.setattr('sys.stdin', pipe)
    ran = peftjax('predict', tuned)
    assert ran.code == 2 and 'standard input must be UTF-8: byte 6 cannot be read' in ran.err


def test_the_accuracy_is_that_of_the_test_file(peftjax, here, tuned_once, tmp_path):
    folder, said = tuned_once
    rows = [json.loads(line) for line in pathlib.Path(here.test).read_text().splitlines()]
    (tmp_path / 'texts').write_text('\n'.join(row['text'] for row in rows))
    lines = peftjax('predict', folder, '--file', tmp_path / 'texts').out.splitlines()
    right = [
        json.loads(line)['label'] == row['label'] for line, row in zip(lines, rows, strict=True)
    ]
    assert f'accuracy on {len(rows)} test messages: {100 * np.mean(right):.1f} %' in said
    assert '150 steps in ' in said and 'bert/encoder/layer/attention/self/query/kernel' in said


def test_a_run_leaves_adapter_metrics_picture_and_options(tuned_once, here):
    folder, said = tuned_once
    found = {path.name for path in folder.iterdir()}
    assert found == {'adapter', 'metrics.jsonl', 'loss.png', 'options.toml'}
    rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    steps = [row for row in rows if 'loss' in row]
    assert [row['step'] for row in steps] == list(range(1, 151))
    assert steps[-1]['loss'] < 0.5 * steps[0]['loss']
    assert [row['rate'] for row in steps[14:17]] == pytest.approx([0.0187, 0.02, 0.0199], abs=1e-4)
    # every epoch is one batch of all texts, each of five tokens or six
    lengths = [
        len(json.loads(line)['text'].split()) + 2
        for line in pathlib.Path(here.train).read_text().splitlines()
    ]
    assert steps[-1]['tokens'] == 150 * sum(lengths)
    assert said.count('tokens/s') == 10


def test_what_is_held_back_is_evaluated_on_and_never_trained_on(peftjax, here, tmp_path):
    some = ('--method', 'bitfit', '--epochs', 2, '--batch', 3, '--evaluations', 2)
    held = ('--eval-part', 0.25, '--seed', 3)
    files = ('--model', here.model, '--train', here.train)
    ran = peftjax('tune', *files, *some, *held, '--out', tmp_path / 'a')
    assert ran.code == 0, ran.err
    rows = [json.loads(line) for line in (tmp_path / 'a/metrics.jsonl').read_text().splitlines()]
    found = [row for row in rows if 'evaluation_loss' in row]
    assert [row['step'] for row in found] == [0, 3, 6]
    # 9 of 12 texts in batches of three are left to train on
    assert sum('loss' in row for row in rows) == 6
    train = data.load_labelled(here.train)
    order = np.random.default_rng(3).permutation(12)
    (tmp_path / 'held.jsonl').write_text(''.join(
        json.dumps({'text': train.texts[i], 'label': train.names[train.labels[i]]}) + '\n'
        for i in sorted(order[:3])
    ))  # fmt: skip
    (tmp_path / 'texts').write_text('\n'.join(train.texts[i] for i in sorted(order[:3])))
    lines = peftjax('predict', tmp_path / 'a', '--file', tmp_path / 'texts').out.splitlines()
    right = [
        json.loads(line)['label'] == train.names[train.labels[i]]
        for line, i in zip(lines, sorted(order[:3]), strict=True)
    ]
    assert found[-1]['evaluation_accuracy'] == pytest.approx(100 * np.mean(right))
    # the same texts from a file of their own, beside a run that trains on everything
    other = ('--eval-data', tmp_path / 'held.jsonl', '--epochs', 1, '--batch', 12, '--seed', 3)
    ran = peftjax('tune', *files, '--method', 'bitfit', *other, '--out', tmp_path / 'b')
    assert ran.code == 0, ran.err
    rows = [json.loads(line) for line in (tmp_path / 'b/metrics.jsonl').read_text().splitlines()]
    assert rows[0]['evaluation_loss'] == pytest.approx(found[0]['evaluation_loss'], rel=1e-5)
    ran = peftjax('tune', *files, *other, *held[:2], '--out', tmp_path / 'c')
    assert ran.code == 2 and 'evaluate on --eval-data or on --eval-part' in ran.err
    assert not (tmp_path / 'c').exists()


def test_the_probe_is_a_method_too(peftjax, here, tmp_path):
    files = ('--model', here.model, '--train', here.train)
    ran = peftjax('tune', *files, '--method', 'frozen', '--out', tmp_path / 'probe')
    assert ran.code == 0 and 'accuracy' not in ran.out
    assert peftjax('predict', tmp_path / 'probe', *TEXTS).out.count('"label"') == 3


def test_inspect_shows_an_adapter(peftjax, here, tuned):
    ran = peftjax('inspect', tuned)
    assert ran.code == 0
    assert 'body: Lora(' in ran.out and 'head: Trainable(' in ran.out
    assert 'bert/encoder/layer/attention/self/query/kernel' in ran.out
    assert here.model in ran.out and '"praise"' in ran.out


def test_inspect_shows_the_sites_of_a_model(peftjax, here):
    ran = peftjax('inspect', here.model)
    assert ran.code == 0
    assert 'encoder/layer/attention/self/query/kernel' in ran.out and 'linear' in ran.out


def test_inspect_says_what_it_takes(peftjax, tmp_path):
    ran = peftjax('inspect', tmp_path)
    assert ran.code == 2 and 'neither a model' in ran.err


def test_an_adapter_is_replaced_only_when_told(peftjax, here, tuned, tmp_path):
    mine = tmp_path / 'mine'
    shutil.copytree(tuned, mine)
    args = (*here.inputs, '--method', 'frozen', '--out', mine)
    before = checkpoint.load(mine / 'adapter').metadata
    ran = peftjax('tune', *args)
    assert (ran.code, ran.out) == (2, '') and 'exists and is not empty' in ran.err
    assert checkpoint.load(mine / 'adapter').metadata == before
    (mine / 'notes.txt').write_text('mine')
    assert peftjax('tune', *args, '--overwrite').code == 0
    assert checkpoint.load(mine / 'adapter').metadata['method'] == 'frozen'
    # the picture of the earlier run is gone; what no run writes stays
    assert {path.name for path in mine.iterdir()} == {
        'adapter', 'metrics.jsonl', 'options.toml', 'notes.txt',
    }  # fmt: skip


def test_an_adapter_is_no_place_for_a_run(peftjax, here, tuned):
    inside = tuned / 'adapter'
    before = sorted(inside.rglob('*'))
    args = ('--method', 'frozen', '--out', inside, '--overwrite')
    ran = peftjax('tune', *here.inputs, *args)
    assert ran.code == 2 and 'must be the folder of a run' in ran.err
    assert sorted(inside.rglob('*')) == before


@pytest.mark.slow
def test_an_update_that_explodes_is_an_error_where_it_is_the_last(peftjax, here, tmp_path):
    """The loss of a step is before its update: nothing but a further one tells."""
    for held, batch in (((), 12), (('--eval-part', 0.5), 6)):
        out = tmp_path / f'out{batch}'
        some = ('--epochs', 1, '--batch', batch, '--rate', 1e30, *held, '--out', out)
        ran = peftjax('tune', '--model', here.model, '--train', here.train, *some)
        assert ran.code == 2 and ' after step 1' in ran.err and 'the learning rate' in ran.err
        assert not (out / 'adapter').exists() and not (out / 'checkpoints/steps/1').exists()


@pytest.mark.slow
def test_the_only_step_trains(peftjax, here, tmp_path):
    """A rate that rises from zero would leave it without an update."""
    out, some = tmp_path / 'out', ('--epochs', 1, '--batch', 12)
    ran = peftjax('tune', '--model', here.model, '--train', here.train, *some, '--out', out)
    assert ran.code == 0 and '1 steps' in ran.out
    phi = checkpoint.load(out / 'adapter').phi
    pairs = [pair for pair in phi['body'].values() if 'b' in pair]
    assert pairs and all(np.abs(pair['b']).max() > 0 for pair in pairs)


def test_predictions_that_are_not_finite_are_refused(peftjax, tuned, tmp_path):
    loaded = checkpoint.load(tuned / 'adapter')
    huge = jax.tree.map(lambda array: array * 1e30, loaded.phi)
    checkpoint.save(tmp_path / 'huge', loaded.peft, huge, metadata=loaded.metadata)
    ran = peftjax('predict', tmp_path / 'huge', '--any-base', *TEXTS)
    assert (ran.code, ran.out) == (2, '') and 'Train it anew' in ran.err
    assert f'NaN or infinity of {TEXTS[0]!r} (3 of 3 texts)' in ran.err


def test_a_loss_that_is_not_finite_is_an_error(peftjax, here, tmp_path):
    few = ('--shots', 2, '--epochs', 3, '--batch', 2)
    ran = peftjax('tune', *here.inputs, *few, '--rate', 1e30, '--out', tmp_path / 'out')
    assert ran.code == 2
    assert 'lora: the loss must stay finite' in ran.err and '1e+30' in ran.err
    left = {path.name for path in (tmp_path / 'out').iterdir()}
    assert left == {'checkpoints', 'metrics.jsonl', 'options.toml'}


def test_another_model_is_refused_unless_told(peftjax, here, tuned, tmp_path):
    from safetensors.numpy import load_file, save_file

    other = shutil.copytree(here.model, tmp_path / 'other')
    weights = load_file(other / 'model.safetensors')
    save_file({k: w + np.float32(0.1) for k, w in weights.items()}, other / 'model.safetensors')
    ran = peftjax('predict', tuned, TEXTS[0], '--model', other)
    assert ran.code == 2 and 'the base must be the one that phi was trained on' in ran.err
    assert peftjax('predict', tuned, TEXTS[0], '--model', other, '--any-base').code == 0


def test_a_model_that_has_moved_is_named(peftjax, here, tuned, tmp_path):
    moved = shutil.copytree(here.model, tmp_path / 'moved')
    args = ('tune', '--model', moved, '--train', here.train, '--method', 'frozen')
    assert peftjax(*args, '--out', tmp_path / 'out').code == 0
    shutil.move(moved, tmp_path / 'elsewhere')
    args = ('predict', tmp_path / 'out', TEXTS[0])
    ran = peftjax(*args)
    assert ran.code == 2 and str(moved) in ran.err and '--model' in ran.err
    assert peftjax(*args, '--model', tmp_path / 'elsewhere').code == 0


def test_one_method_at_a_time(peftjax, here, tmp_path):
    ran = peftjax('tune', *here.inputs, '--method', 'lora,ia3', '--out', tmp_path / 'out')
    assert ran.code == 2 and 'tune takes one method' in ran.err


def test_predict_says_what_is_missing(peftjax, tuned, tmp_path):
    assert 'no such file' in peftjax('predict', tuned, '--file', tmp_path / 'none').err
    (tmp_path / 'empty').write_text('\n')
    assert 'no text to label' in peftjax('predict', tuned, '--file', tmp_path / 'empty').err
    (tmp_path / 'latin').write_bytes('où'.encode('latin-1'))
    assert 'must be UTF-8' in peftjax('predict', tuned, '--file', tmp_path / 'latin').err
    ran = peftjax('predict', tmp_path / 'none', 'text')
    assert ran.code == 2 and 'no such adapter folder' in ran.err


def test_interrupting_ends_with_130(peftjax, here, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Fitter, 'fit', interrupt)
    ran = peftjax('tune', *here.inputs, '--out', tmp_path / 'out')
    assert ran.code == 130 and ran.err == 'peftjax tune: interrupted\n'
    assert not (tmp_path / 'out' / 'adapter').exists()


def fit(fitter, tokens, labels, seed, watch=None):
    batches = fitter.batches(tokens, labels, seed)
    watch = watch or Watch('bitfit', fitter.rates, progress(1))
    return fitter.fit((tokens, labels), fitter.start(seed), batches, watch)


@pytest.mark.slow
def test_the_same_seed_makes_the_same_adapter(here):
    (recipe,) = chosen('bitfit')
    train = data.load_labelled(here.train)
    with jax.numpy_dtype_promotion('standard'):
        task = load_task(here.model, train.names, 16)
        tokens, settings = task.encode(train.texts), Settings(epochs=2, batch=4)
        fitter = Fitter(task, recipe, settings, tokens.input_ids.shape[1], 6)
        fits = [fit(fitter, tokens, train.labels, seed) for seed in (1, 1, 2)]
    first, again, other = (jax.tree.leaves(fit.phi) for fit in fits)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not all((a == b).all() for a, b in zip(first, other, strict=True))
    assert fits[0].compile_seconds > 0 == fits[1].compile_seconds


@pytest.mark.slow
def test_parts_of_a_step_are_the_step(here):
    """Rows that fill a batch up count in no part; without dropout, which each part draws anew."""
    (recipe,) = chosen('bitfit')
    train, losses = data.load_labelled(here.train), {}
    with jax.numpy_dtype_promotion('standard'):
        task = load_task(here.model, train.names, 16)
        still = functools.partial(task.apply, deterministic=True)
        task = dataclasses.replace(
            task, apply=lambda *args, deterministic, rngs=None, **how: still(*args, **how)
        )
        tokens = task.encode(train.texts)
        for parts in (1, 4):
            settings = Settings(epochs=2, batch=8, accumulate=parts)
            fitter = Fitter(task, recipe, settings, tokens.input_ids.shape[1], 4)
            watch = Seen('bitfit', fitter.rates, progress(1))
            fit(fitter, tokens, train.labels, 0, watch)
            losses[parts] = watch.losses
    assert losses[4] == pytest.approx(losses[1], rel=1e-5) and len(set(losses[1])) == 4


class Seen(Watch):
    """Keeps the losses."""

    def loss(self, step, value):
        super().loss(step, value)
        self.losses = [*getattr(self, 'losses', ()), value]


@pytest.mark.slow
def test_each_seed_starts_from_a_classifier_of_its_own(here):
    (recipe,) = chosen('bitfit')
    train = data.load_labelled(here.train)
    with jax.numpy_dtype_promotion('standard'):
        task = load_task(here.model, train.names, 16)
        tokens = task.encode(train.texts)
        still = Settings(epochs=1, batch=16, rate=0.0, head_rate=0.0)
        fitter = Fitter(task, recipe, still, tokens.input_ids.shape[1], 1)
        fits = [fit(fitter, tokens, train.labels, seed) for seed in range(8)]
    heads = [fit.phi['head'] for fit in fits]
    kernels = jnp.stack([head['classifier/kernel']['value'] for head in heads])
    assert len({float(kernel[0, 0]) for kernel in kernels}) == len(fits)
    assert 0.7 < float(kernels.std()) / task.deviation < 1.3
    assert not any(head['classifier/bias']['value'].any() for head in heads)
