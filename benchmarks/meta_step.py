"""What an outer step costs: the four-layer network of few-shot image papers, theta itself as phi.

64 filters, 28 × 28 pixels, strides of two, norms of the batch at hand; of each task one image a
class to adapt on and 15 to be judged on. Prints a JSON line for each algorithm: seconds to trace
and to compile, seconds of a step (fastest and median), bytes of temporaries.
`python benchmarks/meta_step.py maml fomaml`, all of them by default. `--convolution native` uses
XLA's convolution in place of a product with patches: see `docs/meta.md`.
"""

import argparse
import functools
import json
import statistics
import time
from typing import Any

import few_shot_network as few_shot
import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj
from peftjax import data

WAYS, SHOTS, QUERIES, CLASSES, EACH = 5, 1, 15, 100, 20


def learners(forward: Any, steps: int) -> dict[str, Any]:
    """The algorithms by name."""

    def loss(params: Any, phi: Any, batch: Any, key: jax.Array) -> jax.Array:
        said = forward(params, phi, batch.inputs)
        return optax.softmax_cross_entropy_with_integer_labels(said, batch.labels).mean()

    tx, meta = optax.sgd(0.4), pj.meta
    embed = lambda params, phi, x, key: forward(params, phi, x)
    return {
        'maml': meta.maml(loss, tx, steps=steps),
        'fomaml': meta.maml(loss, tx, steps=steps, first_order=True),
        'anil': meta.maml(loss, tx, steps=steps, target='head'),
        'meta_sgd': meta.meta_sgd(loss, rate=0.4, steps=steps),
        'reptile': meta.reptile(loss, tx, steps=steps),
        'imaml': meta.imaml(loss, tx, steps=steps, strength=2.0),
        'prototypes': meta.prototypical(embed, ways=WAYS),
    }


def tasks(count: int) -> data.Episode:
    """One batch of tasks, of noise."""
    images = np.random.default_rng(0).normal(size=(CLASSES * EACH, 28, 28, 1)).astype(np.float32)
    names = np.repeat(np.arange(CLASSES), EACH)
    return next(
        data.Episodes(
            names, ways=WAYS, shots=SHOTS, queries=QUERIES, tasks=count, seed=0,
            rows=lambda index: images[index],
        )
    )  # fmt: skip


def measured(learner: Any, params: Any, phi: Any, batch: Any, rounds: int) -> dict[str, Any]:
    """Times and bytes of one algorithm."""
    tx, init = optax.adam(1e-3), getattr(learner, 'init', lambda phi: phi)
    state = pj.start(tx, jax.tree.map(jnp.copy, init(phi)), jax.random.key(1))
    begun = time.perf_counter()
    lowered = pj.train_step(learner.loss, tx).lower(params, state, batch)  # type: ignore
    traced = time.perf_counter()
    step = lowered.compile()
    compiled, seconds = time.perf_counter(), []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        state, loss = step(params, state, batch)
        loss.block_until_ready()
        seconds.append(time.perf_counter() - start)
    return {
        'trace_s': round(traced - begun, 1),
        'compile_s': round(compiled - traced, 1),
        'step_s': round(min(seconds[1:]), 3),
        'median_step_s': round(statistics.median(seconds[1:]), 3),
        'temporary_mb': round(step.memory_analysis().temp_size_in_bytes / 1e6, 1),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('only', nargs='*', help='algorithms, all by default')
    parser.add_argument('--tasks', type=int, default=4)
    parser.add_argument('--steps', type=int, default=5)
    parser.add_argument('--rounds', type=int, default=8)
    parser.add_argument('--convolution', choices=('patches', 'native'), default='patches')
    options = parser.parse_args()
    convolution = getattr(few_shot, options.convolution)
    apply = functools.partial(few_shot.network, convolution)
    params = few_shot.parameters(WAYS)
    peft = pj.attach(pj.Trainable(target='.'), apply, params, jnp.ones((WAYS, 28, 28, 1)))
    phi, batch = peft.init(jax.random.key(0), params), tasks(options.tasks)
    found = learners(peft.wrap(apply), options.steps)
    for name in options.only or found:
        case = {**vars(options), 'algorithm': name, 'jax': jax.__version__}
        del case['only']
        print(json.dumps({**case, **measured(found[name], params, phi, batch, options.rounds)}))


if __name__ == '__main__':
    main()
