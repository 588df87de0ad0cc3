"""A tiny model with Hugging Face's names and an adapter of it, for tests of reading and writing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import peftjax as pj

X = jnp.ones((2, 4), jnp.float32)
CONFIG, TENSORS = 'adapter_config.json', 'adapter_model.safetensors'


def params(layers=2, width=4, seed=0):
    rng = np.random.default_rng(seed)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    one = lambda: {n: {'kernel': make(width, width), 'bias': make(width)} for n in ('up', 'down')}
    return {'h': {str(i): one() for i in range(layers)}, 'head': {'kernel': make(width, 3)}}


def model(params, x):
    for layer in params['h'].values():
        x = jnp.tanh(x @ layer['up']['kernel'] + layer['up']['bias'][None])
        x = x @ layer['down']['kernel'] + layer['down']['bias'][None]
    return x @ params['head']['kernel']


METHOD = pj.Lora(target='(up|down)/kernel', rank=2, alpha=3)


def attached(method=METHOD):
    peft = pj.attach(method, model, params(), X)
    phi = peft.init(jax.random.key(0), params())
    return peft, jax.tree.map(lambda a: a + 0.1, phi)


def load(folder, params=None, **options):
    theta = globals()['params']() if params is None else params
    return pj.hf.load_adapter(folder, model, theta, X, **options)


def edit(folder, **changes):
    """Changes keys of the configuration; a foreign folder has no manifest."""
    (folder / 'manifest.json').unlink(missing_ok=True)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def edit_tensors(folder, change):
    (folder / 'manifest.json').unlink(missing_ok=True)
    save_file(change(load_file(folder / TENSORS)), folder / TENSORS)
