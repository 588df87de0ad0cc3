"""How long tracing takes: a deep unrolled model through `wrap`, against `jax.make_jaxpr` of it.

The two take turns; means are compared, because Python collects garbage once in several traces: a
median would count such a pause whole on one side and not at all on the other. Prints one JSON line,
with medians too, and fails where the ratio exceeds the bound of three:
`python benchmarks/trace_time.py`.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

import peftjax as pj

BOUND = 3.0
NAMES = ('q', 'k', 'v', 'o', 'up', 'down')


def model(params: Any, tokens: jax.Array) -> jax.Array:
    """A decoder of width 64, its layers unrolled."""
    x = params['embed'][tokens]
    for layer in params['layers']:
        linear = lambda name, x, layer=layer: x @ layer[name]['kernel'] + layer[name]['bias']
        norm = lambda x, layer=layer: (
            x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True)) * layer['scale']
        )
        h = norm(x)
        q, k, v = (linear(name, h).reshape(*x.shape[:-1], 4, -1) for name in 'qkv')
        scores = jax.nn.softmax(jnp.einsum('bthd,bshd->bhts', q, k))
        x = x + linear('o', jnp.einsum('bhts,bshd->bthd', scores, v).reshape(x.shape))
        x = x + linear('down', jax.nn.gelu(linear('up', norm(x))))
    return x @ params['embed'].T


def parameters(layers: int, width: int = 64, inner: int = 256) -> Any:
    """Shapes only: nothing is computed."""
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    sizes = {name: (width, width) for name in 'qkvo'}
    sizes |= {'up': (width, inner), 'down': (inner, width)}
    layer = {n: {'kernel': spec(*size), 'bias': spec(size[1])} for n, size in sizes.items()}
    return {'embed': spec(1000, width), 'layers': [{**layer, 'scale': spec(width)}] * layers}


def seconds(fn: Any, *args: Any) -> float:
    """The time of one fresh trace."""
    start = time.perf_counter()
    jax.make_jaxpr(lambda *args: fn(*args))(*args)
    return time.perf_counter() - start


def main() -> None:
    """Measures, prints, judges."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--layers', type=int, default=32)
    parser.add_argument('--rounds', type=int, default=30)
    options = parser.parse_args()
    params, tokens = parameters(options.layers), jax.ShapeDtypeStruct((2, 16), jnp.int32)
    peft = pj.attach(pj.Lora(rank=8, target='kernel'), model, params, tokens)
    phi = jax.eval_shape(lambda p: peft.init(jax.random.key(0), p), params)
    forward = peft.wrap(model)
    plain, ours = [], []
    for turn in range(options.rounds + 1):
        times = seconds(model, params, tokens), seconds(forward, params, phi, tokens)
        if turn:  # the first warms the caches of jax.numpy
            plain.append(times[0])
            ours.append(times[1])
    ratio = statistics.mean(ours) / statistics.mean(plain)
    result = {
        'benchmark': 'trace_time',
        'jax': jax.__version__,
        'layers': options.layers,
        'make_jaxpr_ms': round(1e3 * statistics.mean(plain), 1),
        'wrap_ms': round(1e3 * statistics.mean(ours), 1),
        'ratio': round(ratio, 2),
        'ratio_of_medians': round(statistics.median(ours) / statistics.median(plain), 2),
        'bound': BOUND,
    }
    print(json.dumps(result))
    sys.exit(ratio > BOUND)


if __name__ == '__main__':
    main()
