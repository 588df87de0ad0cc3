"""`tune` in two processes: the same run as one, and what happens where one of them ends."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from commands import call
from test_going import EPOCHS, rows

from peftjax import checkpoint

pytestmark = pytest.mark.slow
HOME = pathlib.Path(__file__).parents[2]
MESH = ('--mesh', 'data=2,model=2', '--batch', 4, '--processes', 2)


@pytest.fixture(scope='module')
def files(here):
    return ('--model', here.model, '--train', here.train, '--eval-data', here.test)


def started(*arguments):
    """The command, and a way to its processes."""
    flags = os.environ['XLA_FLAGS'].split()
    environment = {
        **os.environ,
        'PYTHONPATH': str(HOME),
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': ' '.join(flag for flag in flags if 'device_count' not in flag),
    }
    return subprocess.Popen(
        [sys.executable, '-m', 'peftjax', 'tune', *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(command):
    """Its exit code, and what it said on both ways."""
    said, error = command.communicate(timeout=200)
    return command.returncode, said, error


def process_of(command, index):
    """The number of one of the processes that a command has started."""
    children = pathlib.Path(f'/proc/{command.pid}/task/{command.pid}/children').read_text().split()
    lines = {c: pathlib.Path(f'/proc/{c}/cmdline').read_text().split('\0') for c in children}
    return next(int(c) for c, line in lines.items() if line[-3:-1] == ['--process', str(index)])


def wait_for(out, steps):
    """Until so many steps were written down."""
    until = time.monotonic() + 120
    while not (out / 'metrics.jsonl').exists() or len(rows(out)) < steps:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_two_processes_measure_what_one_does(files, tmp_path):
    one, two = tmp_path / 'one', tmp_path / 'two'
    assert call('tune', *files, *EPOCHS, '--batch', 4, '--out', one) == 0
    code, said, error = ended(started(*files, *EPOCHS, *MESH, '--out', two))
    assert code == 0, error
    assert said.count(f'written to {two}') == 1 and 'Gloo' not in said
    for found, wanted in zip(rows(two), rows(one), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    names = [sorted(path.name for path in out.iterdir()) for out in (one, two)]
    assert names[0] == names[1]
    assert 'processes = 2' in (two / 'options.toml').read_text()
    assert 'coordinator' not in (two / 'options.toml').read_text()
    phi = [jax.tree.leaves(checkpoint.load(out / 'adapter').phi) for out in (one, two)]
    for found, wanted in zip(*phi, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('more', [(), ('--quantize', 'int8')], ids=['dense', 'quantized'])
def test_a_language_model_measures_the_same(talk, tmp_path, more):
    one, two = tmp_path / 'one', tmp_path / 'two'
    how = ('--model', talk.model, '--data', talk.data, '--eval-part', 0.2, '--steps', 4, *more)
    how = (*how, '--batch', 8, '--length', 16, '--evaluations', 1)
    assert call('tune', *how, '--out', one) == 0
    mesh = ('--mesh', 'fsdp=2,model=2', '--processes', 2, '--accumulate', 2)
    code, _, error = ended(started(*how, *mesh, '--out', two))
    assert code == 0, error
    for found, wanted in zip(rows(two), rows(one), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.skipif(not pathlib.Path('/proc/self/task').exists(), reason='needs /proc')
@pytest.mark.parametrize('index', [0, 1])
def test_a_killed_process_ends_the_command_and_one_process_goes_on(files, tmp_path, index):
    out = tmp_path / 'out'
    long = (*EPOCHS, '--epochs', 300, '--save-every', 2)
    command = started(*files, *long, *MESH, '--out', out)
    wait_for(out, 5)
    os.kill(process_of(command, index), signal.SIGKILL)
    began = time.monotonic()
    code, _, error = ended(command)
    assert code == 137 and time.monotonic() - began < 60, error
    assert f'process {index} of 2 was ended by SIGKILL' in error and '--resume' in error
    resumed = started(*files, *long, '--batch', 4, '--out', out, '--resume')
    assert resumed.stdout.readline().startswith('method')
    line = next(line for line in resumed.stdout if line.startswith('goes on after step'))
    assert int(line.split()[-1]) >= 2
    resumed.kill()
    resumed.communicate()


def test_a_command_told_to_end_ends_after_a_checkpoint(files, tmp_path):
    out = tmp_path / 'out'
    long = (*EPOCHS, '--epochs', 300, '--save-every', 1000, *MESH)
    command = started(*files, *long, '--out', out)
    wait_for(out, 5)
    command.terminate()
    code, _, error = ended(command)
    assert code == 143, error
    (last,) = (int(path.parent.name) for path in out.glob('checkpoints/steps/*/manifest.json'))
    assert 5 <= last < 1000


@pytest.mark.skipif(not pathlib.Path('/proc/self/task').exists(), reason='needs /proc')
def test_processes_do_not_outlive_their_command(files, tmp_path):
    out = tmp_path / 'out'
    command = started(*files, *EPOCHS, '--epochs', 300, *MESH, '--out', out)
    wait_for(out, 3)
    children = [process_of(command, i) for i in range(2)]
    command.kill()
    command.communicate()
    until = time.monotonic() + 10
    while any(pathlib.Path(f'/proc/{child}').exists() for child in children):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_an_error_of_all_is_told_once(files, tmp_path):
    (tmp_path / 'file').write_text('mine')
    code, said, error = ended(started(*files, *EPOCHS, *MESH, '--out', tmp_path))
    assert code == 2 and not said
    assert error.count('error:') == 1 and 'exists and is not empty' in error
    assert [path.name for path in tmp_path.iterdir()] == ['file']


@pytest.mark.parametrize(
    ('typed', 'said'),
    [
        (('--process', 1), '--process says which of several this is'),
        (('--coordinator', 'localhost:1'), 'add --mesh'),
        (('--coordinator', 'localhost:1', '--mesh', 'data=4'), 'needs --processes'),
        (
            ('--coordinator', 'localhost:1', '--mesh', 'data=4', '--processes', 3, '--process', 0),
            'cannot share evenly',
        ),
        (
            ('--coordinator', 'localhost:1', '--mesh', 'data=4', '--processes', 2, '--process', 2),
            'must be below 2',
        ),
    ],
)
def test_options_that_do_not_fit(files, tmp_path, capsys, typed, said):
    assert call('tune', *files, *typed, '--out', tmp_path / 'out') == 2
    assert said in capsys.readouterr().err
