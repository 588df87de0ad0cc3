"""Runs on an encoder that are cut off and go on; folders in which a run stands still."""

import json
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
from commands import call

import peftjax as pj
from peftjax import checkpoint
from peftjax.cli import _run_folder
from peftjax.cli._listed import Listed
from peftjax.cli._metrics import Metrics

# twelve examples, in batches of five: the last of an epoch is not full
EPOCHS = ('--epochs', 3, '--batch', 5, '--evaluations', 3, '--seed', 3)


def rows(out):
    """What was measured, but for times."""
    lines = (out / 'metrics.jsonl').read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != 'seconds'} for line in lines]


def bits(out):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(checkpoint.load(out / 'adapter').phi)]


@pytest.fixture(scope='module')
def files(here):
    return ('--model', here.model, '--train', here.train, '--eval-data', here.test)


@pytest.fixture(scope='module')
def unbroken(files, tmp_path_factory):
    """A run of nine steps, with evaluations."""
    out = tmp_path_factory.mktemp('unbroken')
    assert call('tune', *files, *EPOCHS, '--out', out) == 0
    return out


def interrupt():
    raise KeyboardInterrupt  # as SIGINT does, which a background process does not get


SIGNALS = {
    'interrupted': (interrupt, 130, 'goes on after step 4'),
    'told to end': (lambda: signal.raise_signal(signal.SIGTERM), 143, 'goes on after step 6'),
    'before a checkpoint': (interrupt, 130, ''),
}


def cut_off(monkeypatch, cut):
    """Lets something happen once the fifth step is written down."""
    add = Metrics.add

    def adding(self, step, values):
        add(self, step, values)
        if step == 5:
            cut()

    monkeypatch.setattr(Metrics, 'add', adding)


@pytest.mark.slow
@pytest.mark.parametrize('how', SIGNALS)
def test_a_run_that_was_cut_off_goes_on(peftjax, files, here, unbroken, tmp_path, monkeypatch, how):
    cut, code, said = SIGNALS[how]
    out, every = tmp_path / 'out', 9 if 'before' in how else 2
    with monkeypatch.context() as patch:
        cut_off(patch, cut)
        ran = peftjax('tune', *files, *EPOCHS, '--save-every', every, '--out', out)
        assert ran.code == code, ran.err
    assert not (out / 'adapter').exists()
    again = ('tune', '--config', out / 'options.toml')
    assert 'exists and is not empty' in peftjax(*again).err
    other = peftjax(*again, '--resume', '--rate', 1e-5)
    assert other.code == 2 and 'rate was 0.002 and is 1e-05 now' in other.err
    if said:
        other = peftjax(*again, '--resume', '--train', here.test)
        assert other.code == 2 and 'the state is of other batches' in other.err
    ran = peftjax(*again, '--resume', '--evaluations', 3)
    assert ran.code == 0 and said in ran.out and ('goes on' in ran.out) == bool(said), ran.err
    assert rows(out) == rows(unbroken) and bits(out) == bits(unbroken)
    assert (out / 'loss.png').stat().st_size == (unbroken / 'loss.png').stat().st_size
    assert {p.name for p in out.iterdir()} == {p.name for p in unbroken.iterdir()}
    ran = peftjax(*again, '--resume', '--evaluations', 2)
    assert ran.code == 0 and 'has come to its end' in ran.out
    other = peftjax(*again, '--resume', '--rate', 1e-5, '--target', 'query/kernel')
    assert other.code == 2 and 'rate was 0.002 and is 1e-05 now; target was' in other.err


@pytest.mark.slow
def test_a_run_goes_on_under_the_names_of_its_labels(peftjax, files, here, tmp_path, monkeypatch):
    """Other names in the same order give the same numbers."""
    out, renamed = tmp_path / 'out', tmp_path / 'renamed.jsonl'
    renamed.write_text(pathlib.Path(here.train).read_text().replace('"ask"', '"asking"'))
    again = ('tune', '--model', here.model, *EPOCHS, '--out', out)
    with monkeypatch.context() as patch:
        cut_off(patch, interrupt)
        assert peftjax(*again, '--train', here.train, '--save-every', 2).code == 130
    ran = peftjax(*again, '--train', renamed, '--resume')
    assert ran.code == 2 and "labels was ['ask', 'leave', 'praise'] and is ['asking'" in ran.err
    assert peftjax(*again, '--train', here.train, '--resume').code == 0


@pytest.mark.slow
def test_a_probe_makes_no_steps_and_goes_on_from_its_beginning(
    peftjax, files, tmp_path, monkeypatch
):
    out, probe = tmp_path / 'out', ('tune', *files, '--method', 'frozen')
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, 'add', lambda self, step, values: interrupt())
        assert peftjax(*probe, '--out', out).code == 130
    ran = peftjax(*probe, '--out', out, '--resume')
    assert ran.code == 0, ran.err
    again = ('--config', out / 'options.toml', '--out', tmp_path / 'unbroken')
    assert peftjax('tune', *again).code == 0
    assert bits(out) == bits(tmp_path / 'unbroken') and rows(out) == rows(tmp_path / 'unbroken')
    assert 'has come to its end' in peftjax(*probe, '--out', out, '--resume').out


def test_a_folder_that_a_run_writes_to_is_not_replaced(peftjax, files, tmp_path, monkeypatch):
    """Neither taken up beside it nor cleared away under it."""
    out, said = tmp_path / 'out', []
    again = ('tune', *files, *EPOCHS, '--out', out)

    def others():
        said.extend(peftjax(*again, how) for how in ('--resume', '--overwrite'))

    cut_off(monkeypatch, others)
    assert peftjax(*again).code == 0
    assert [ran.code for ran in said] == [2, 2]
    assert all('a run folder has one writer; process' in ran.err for ran in said)
    assert [row['step'] for row in rows(out) if 'loss' in row] == list(range(1, 10))


def test_a_run_that_was_cut_off_at_its_very_beginning_goes_on(peftjax, files, unbroken, tmp_path):
    """The lock is there, what the run is made of is not."""
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints/lock').write_text('process 1 of nowhere\n')
    (tmp_path / 'checkpoints/.run.json.part').write_text('{')
    ran = peftjax('tune', *files, *EPOCHS, '--out', tmp_path, '--resume')
    assert ran.code == 0, ran.err
    assert bits(tmp_path) == bits(unbroken)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in unbroken.iterdir()}


def test_a_removal_that_was_cut_off_is_ended_by_the_next(tmp_path, monkeypatch):
    """At no moment is a part of a folder taken for the whole."""
    for name in ('adapter', 'checkpoints'):
        (tmp_path / name).mkdir()
    for name in ('adapter/adapter.json', 'adapter/manifest.json', 'checkpoints/run.json'):
        (tmp_path / name).write_text('x')
    assert _run_folder.is_begun(tmp_path) and not _run_folder.is_finished(tmp_path)
    monkeypatch.setattr(_run_folder.shutil, 'rmtree', lambda *_, **__: None)
    _run_folder.clear(tmp_path)
    assert _run_folder.is_finished(tmp_path)
    monkeypatch.undo()
    _run_folder.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['adapter']


def copied(unbroken, tmp_path):
    """A run that has come to its end, to be replaced."""
    return pathlib.Path(shutil.copytree(unbroken, tmp_path / 'out'))


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_adapter_that_it_should_replace(
    peftjax, files, unbroken, tmp_path
):
    out = copied(unbroken, tmp_path)
    ran = peftjax('tune', *files, *EPOCHS, '--rate', 1e30, '--out', out, '--overwrite')
    assert ran.code == 2 and bits(out) == bits(unbroken), ran.err
    ran = peftjax('tune', *files, *EPOCHS, '--seed', 4, '--out', out, '--overwrite')
    assert ran.code == 0 and bits(out) != bits(unbroken), ran.err
    assert {p.name for p in out.iterdir()} == {p.name for p in unbroken.iterdir()}


@pytest.mark.slow
def test_a_run_that_replaces_another_is_taken_up_where_it_was_cut_off(
    peftjax, files, unbroken, tmp_path, monkeypatch
):
    """The adapter beside it is the earlier one: the run has not come to its end."""
    out, other = copied(unbroken, tmp_path), ('tune', *files, *EPOCHS, '--rate', 1e-3)
    with monkeypatch.context() as patch:
        cut_off(patch, interrupt)
        some = ('--save-every', 2, '--out', out)
        assert peftjax(*other, *some, '--overwrite').code == 130
    assert bits(out) == bits(unbroken)
    ran = peftjax(*other, '--out', out, '--resume')
    assert ran.code == 0 and 'goes on after step 4' in ran.out, ran.err
    assert peftjax(*other, '--out', tmp_path / 'new').code == 0
    assert rows(out) == rows(tmp_path / 'new') and bits(out) == bits(tmp_path / 'new')


def test_an_adapter_that_cannot_be_replaced_is_refused_before_the_run(
    peftjax, files, unbroken, tmp_path
):
    out = copied(unbroken, tmp_path)
    (out / 'adapter/notes').write_text('mine')
    ran = peftjax('tune', *files, *EPOCHS, '--out', out, '--overwrite')
    assert ran.code == 2 and 'only a saved adapter is replaced' in ran.err
    assert rows(out) == rows(unbroken) and (out / 'adapter/notes').is_file()


def test_an_evaluation_that_is_not_finite_ends_the_run(peftjax, files, tmp_path, monkeypatch):
    from peftjax.cli._fit import Fitter

    calls = iter(range(9))
    found = lambda *_: {'evaluation_loss': float('nan') if next(calls) else 1.0}
    monkeypatch.setattr(Fitter, 'evaluate', found)
    ran = peftjax('tune', *files, *EPOCHS, '--save-every', 2, '--out', tmp_path / 'out')
    assert ran.code == 2 and 'evaluation_loss is nan after step 3' in ran.err
    assert not (tmp_path / 'out/adapter').exists()
    states = tmp_path / 'out/checkpoints/steps'
    assert [path.name for path in states.iterdir()] == ['2']


def test_batches_are_taken_up_where_they_stood():
    batches = [{'x': np.full(2, i)} for i in range(3)]
    listed = Listed(batches)
    next(listed)
    state = json.loads(json.dumps(pj.Checkpoints.position(listed)))
    other = Listed(batches)
    other.restore(state)
    assert [batch['x'][0] for batch in other] == [1, 2] and len(other) == 3
    with pytest.raises(ValueError, match='is of other batches'):
        Listed(batches[:2]).restore(state)


MESHES = ('data=5', 'fsdp=5', 'model=2', 'fsdp=5,model=1', 'data=1,model=4')


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
def test_on_a_mesh_a_run_measures_the_same(files, unbroken, tmp_path, mesh):
    """Also where one device goes on with what a mesh has begun."""
    out = tmp_path / 'out'
    assert call('tune', *files, *EPOCHS, '--mesh', mesh, '--out', out) == 0
    assert f'mesh = "{mesh}"' in (out / 'options.toml').read_text()
    for found, wanted in zip(rows(out), rows(unbroken), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)


def test_one_device_goes_on_with_what_a_mesh_has_begun(
    peftjax, files, unbroken, tmp_path, monkeypatch
):
    out = tmp_path / 'out'
    with monkeypatch.context() as patch:
        cut_off(patch, lambda: signal.raise_signal(signal.SIGTERM))
        mesh = ('--mesh', 'fsdp=5', '--save-every', 2)
        assert peftjax('tune', *files, *EPOCHS, *mesh, '--out', out).code == 143
    assert peftjax('tune', *files, *EPOCHS, '--resume', '--out', out).code == 0
    for found, wanted in zip(rows(out), rows(unbroken), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
