"""Two processes of four devices each, as `jax.distributed` joins them on one machine."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.slow
HOME = pathlib.Path(__file__).parents[1]

PROGRAM = """
import importlib.util, json, os, signal, sys
folder, port, process, count, ends = sys.argv[1:]
process, count, ends = int(process), int(count), json.loads(ends)
os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={8 // count}'
import jax
if count > 1:
    jax.distributed.initialize(f'localhost:{port}', count, process, heartbeat_timeout_seconds=10)
import peftjax as pj

found = importlib.util.spec_from_file_location('example', ends['example'])
example = importlib.util.module_from_spec(found)
found.loader.exec_module(example)
make = pj.train_step

def train_step(loss, tx):
    step = make(loss, tx)
    def counted(params, state, batch):
        if process == 1 and int(state.step) == ends.get('at'):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(params, state, batch)
    return counted

pj.train_step = train_step
losses = example.train(folder, example.mesh_of(jax.devices()))
if process == 0:
    print(json.dumps([x.hex() for x in losses]))
"""

TOLD = """
import os, signal, sys
folder, port, process, count, _ = sys.argv[1:]
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=4'
import jax
jax.distributed.initialize(f'localhost:{port}', int(count), int(process))
import jax.numpy as jnp, optax
import peftjax as pj

class Same:
    def __init__(self, x): self.x, self.seen = x, 0
    def __next__(self): self.seen += 1; return self.x
    def __iter__(self): return self
    def state(self): return self.seen
    def restore(self, seen): self.seen = seen

mesh = jax.make_mesh((8,), ('data',), (jax.sharding.AxisType.Auto,))
make = lambda shape, where: jax.jit(lambda: jnp.ones(shape), out_shardings=where)()
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
params, x = {'kernel': make((4, 4), whole)}, make((8, 4), pj.sharding.batch_sharding(mesh))
model = lambda params, x: x @ params['kernel']
peft = pj.attach(pj.Lora(rank=1, target='kernel'), model, params, x)
forward, tx = peft.wrap(model), optax.sgd(1e-3)
step = pj.train_step(lambda params, phi, x, key: (forward(params, phi, x) ** 2).mean(), tx)
state = pj.start(tx, peft.init(jax.random.key(0), params), jax.random.key(1))

def tell(step, state):
    if process == '1' and step == 7:
        os.kill(os.getpid(), signal.SIGTERM)

with pj.Checkpoints(folder, peft, params) as saved:
    batches = Same(x)
    state = saved.resume(state, batches)
    print(int(state.step), flush=True)
    pj.fit(step, params, state, batches, steps=4000, checkpoints=saved, save_every=2000,
           events=[pj.Every(1, tell)])
"""


def run(folder, count=2, program=PROGRAM, **ends):
    """Runs the example's training in so many processes."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = str(free.getsockname()[1])
    ends['example'] = str(HOME / 'examples/11_several_processes.py')
    environment = {**os.environ, 'PYTHONPATH': str(HOME), 'JAX_PLATFORMS': 'cpu'}
    started = [
        subprocess.Popen(
            [sys.executable, '-c', program, folder, port, str(i), str(count), json.dumps(ends)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(count)
    ]  # fmt: skip
    return started


def losses(started):
    """What the first process prints."""
    out = [process.communicate(timeout=120) for process in started]
    assert not any(process.returncode for process in started), out
    return [float.fromhex(word) for word in json.loads(out[0][0].splitlines()[-1])]


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    """The losses of one process with all devices."""
    return losses(run(tmp_path_factory.mktemp('one') / 'run', count=1))


def steps(folder):
    return sorted(int(path.parent.name) for path in folder.glob('steps/*/manifest.json'))


def test_two_processes_are_one_and_one_can_go_on_for_two(unbroken, tmp_path):
    found = losses(run(tmp_path / 'run'))
    assert len(found) == 20 and steps(tmp_path / 'run') == [15, 20]
    np.testing.assert_allclose(found, unbroken, rtol=1e-5)
    assert losses(run(tmp_path / 'run', count=1)) == []  # reads what two have written


def test_a_killed_process_ends_the_other_and_the_run_goes_on(unbroken, tmp_path):
    """The other ends with an error that says so, soon; the last checkpoint is whole."""
    started = run(tmp_path / 'run', at=12)
    started[1].communicate(timeout=120)
    assert started[1].returncode == -signal.SIGKILL
    began = time.monotonic()
    _, text = started[0].communicate(timeout=60)
    assert started[0].returncode not in (0, None) and time.monotonic() - began < 60
    assert 'another task died' in text, text[-2000:]
    assert steps(tmp_path / 'run') == [5, 10]
    rest = losses(run(tmp_path / 'run', count=1))  # one process reads what two have written
    np.testing.assert_allclose(rest, unbroken[10:], rtol=1e-5)
    assert jax.process_count() == 1


def test_told_to_end_one_process_ends_both_after_the_same_step(tmp_path):
    started = run(tmp_path / 'run', program=TOLD)
    out = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [143, 143], out
    (last,) = steps(tmp_path / 'run')
    assert 7 <= last < 2000
