"""Two processes, one mesh: the same training, saved by both and read by one.

What differs from 10: the devices belong to two processes, which this file starts. On a cluster each
host runs `train` once, after `jax.distributed.initialize()`; nothing else changes.
"""

import os
import socket
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import peftjax as pj

PROCESSES, DEVICES, STEPS = 2, 4, 20
RULES = (('up/kernel', P(None, 'model')), ('down/kernel', P('model', None)))


def model(params, x):
    return x + jnp.tanh(x @ params['up']['kernel']) @ params['down']['kernel']


def placed(tree, where):
    """What every process holds whole, on each device the part that is its own."""
    put = lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index])
    return jax.tree.map(put, tree, where)


def train(folder, mesh, steps=STEPS):
    """The losses from where the run in this folder stands, to a number of steps."""
    normal = lambda *shape: np.random.default_rng(shape).normal(size=shape).astype(np.float32) / 4
    params = {'up': {'kernel': normal(8, 16)}, 'down': {'kernel': normal(16, 8)}}
    params = placed(params, pj.sharding.by_path(RULES, mesh, params))
    x = placed(normal(8, 8), pj.sharding.batch_sharding(mesh))

    peft = pj.attach(pj.Lora(rank=2, target='kernel'), model, params, x)
    forward, tx = peft.wrap(model), optax.adam(1e-2)
    loss = lambda params, phi, x, key: (forward(params, phi, x) ** 2).mean()
    step, losses = pj.train_step(loss, tx), []
    state = pj.start(tx, peft.init(jax.random.key(0), params), jax.random.key(1))
    with pj.Checkpoints(folder, peft, params) as checkpoints:
        found = checkpoints.restore(state)
        state = state if found is None else found.state
        while int(state.step) < steps:
            state, value = step(params, state, x)
            losses.append(float(value))
            if int(state.step) % 5 == 0:
                checkpoints.save(state)
        pj.save(f'{folder}/adapter', peft, state.phi, params=params, overwrite=True)
    return losses


def mesh_of(devices):
    return jax.make_mesh((4, 2), ('data', 'model'), (AxisType.Auto,) * 2, devices=devices)


def one_of_two(process, port, folder):
    jax.distributed.initialize(f'localhost:{port}', PROCESSES, process)
    losses = train(folder, mesh_of(jax.devices()))
    if process == 0:
        print(*losses)


def start_both(folder):
    """Starts the processes; the losses that the first one prints."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = str(free.getsockname()[1])
    flags = f'--xla_force_host_platform_device_count={DEVICES}'
    command = [sys.executable, __file__, port, folder]
    environment = {**os.environ, 'XLA_FLAGS': flags}
    started = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(PROCESSES)
    ]
    out = [process.communicate()[0] for process in started]
    assert not any(process.returncode for process in started)
    return [float(word) for word in out[0].splitlines()[-1].split()]


if __name__ == '__main__' and len(sys.argv) == 4:
    one_of_two(int(sys.argv[3]), sys.argv[1], sys.argv[2])
elif __name__ == '__main__':
    jax.config.update('jax_num_cpu_devices', PROCESSES * DEVICES)
    with tempfile.TemporaryDirectory() as folder:
        both = start_both(f'{folder}/both')
        print(f'{len(both)} steps over {PROCESSES} processes: loss {both[0]:.4f} to {both[-1]:.4f}')
        assert train(f'{folder}/both', mesh_of(jax.devices())) == []  # all was done already
        print('adapted:', *pj.load(f'{folder}/both/adapter').phi)
        alone = train(f'{folder}/alone', mesh_of(jax.devices()))
    np.testing.assert_allclose(both, alone, rtol=1e-5)
    print('one process with as many devices: the same losses')
