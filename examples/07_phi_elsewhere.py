"""phi in code that knows nothing of peftjax, and many of them at once.

What differs from 06: the trained phi is saved, read back with Orbax alone, and used as what it is:
plain arrays, `w + scale * a @ b`. Then a stack of phi, one for each task, runs under one `vmap`.
"""

import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import peftjax as pj

KEY = jax.random.key(0)


def model(params, x):
    return x @ params['layer']['kernel']


def read(folder):
    """The arrays and the scale of a LoRA, with Orbax and JSON only."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        phi = checkpointer.restore(folder / 'phi')
    about = json.loads((folder / 'adapter.json').read_text())
    return phi, about


params = {'layer': {'kernel': jax.random.normal(KEY, (8, 5))}}
x = jax.random.normal(jax.random.key(1), (3, 8))
method = pj.Lora(rank=2, alpha=6.0, target='kernel')
