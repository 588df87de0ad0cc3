"""K adapters trained at once on one theta, against K runs: peak bytes, and the time of a step.

LoRA on every linear layer, AdamW, the step of the library: `jax.vmap` of it over K states and K
batches, one program, beside the same step once for each. Both take turns, so that neighbors on the
machine slow both. The peak is what the compiled program says: arguments, results that are no
arguments, and temporaries. Prints one JSON line for each kind of model and K:
`python benchmarks/many_at_once.py >> benchmarks/results/many_at_once.jsonl`.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import statistics
import time
from typing import Any, NamedTuple

import beside
import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj
from peftjax import models
from peftjax.losses import next_token_loss, next_tokens

RANK, RATE, LABELS = 8, 1e-4, 6
ENCODER = dict(
    vocab_size=8192,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
DECODER = {
    'model_type': 'llama',
    'vocab_size': 8192,
    'hidden_size': 384,
    'num_hidden_layers': 6,
    'num_attention_heads': 6,
    'intermediate_size': 1024,
}
TINY = {'vocab_size': 100, 'hidden_size': 24, 'num_hidden_layers': 2, 'intermediate_size': 32}


def encoder(shape, ids):
    """A classifier: its parameters, plan and loss."""
    config = models.EncoderConfig(model_type='bert', num_labels=LABELS, **(ENCODER | shape))
    model = models.SequenceClassifier(config)
    params = jax.jit(model.init)(jax.random.key(0), ids)['params']
    method = pj.Lora(rank=RANK, target='encoder/layer/.*kernel')
    peft = pj.attach(method, model.apply_fn, params, ids)
    forward = peft.wrap(model.apply_fn)

    def loss(params, phi, ids, key):
        logits = forward(params, phi, ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 0] % LABELS).mean()

    return params, peft, loss


def decoder(shape, ids):
    """A language model: its parameters, plan and loss."""
    model = models.Decoder(models.read_decoder_config(DECODER | shape))
    params = jax.jit(model.init)(jax.random.key(0), ids)['params']
    method = pj.Lora(rank=RANK, target='layers/.*_proj/kernel')
    peft = pj.attach(method, model.apply_fn, params, ids)

    def whole(params, ids):
        hidden = model.apply_fn(params, ids, method='hidden')
        return next_token_loss(hidden, model.head_weight(params).weight, next_tokens(ids)).mean

    forward = peft.wrap(whole)
    return params, peft, lambda params, phi, ids, key: forward(params, phi, ids)


def peak(program):
    """MiB of a compiled program while it runs."""
    found = program.memory_analysis()
    sizes = found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes
    return (sum(sizes) - found.alias_size_in_bytes) / 2**20


class Task(NamedTuple):
    """One kind of model with its step, compiled for one adapter."""

    kind: str
    params: Any
    peft: pj.Peft
    step: Any
    fresh: Any
    one: Any


def prepare(kind, args):
    params, peft, loss = {'encoder': encoder, 'decoder': decoder}[kind](
        args.shape, draw(1, args)[0]
    )
    tx = optax.adamw(RATE)
    step = pj.train_step(loss, tx)
    init = jax.jit(lambda key: pj.start(tx, peft.init(key, params), key))
    fresh = lambda seed: init(jax.random.key(seed))
    one = step.lower(params, fresh(0), draw(1, args)[0]).compile()
    return Task(kind, params, peft, step, fresh, one)


def draw(count, args):
    """Token ids, a batch for each adapter."""
    shape = count, args.rows, args.tokens
    ids = np.random.default_rng(0).integers(0, (DECODER | args.shape)['vocab_size'], shape)
    return jnp.asarray(ids.astype(np.int32))


def measure(task, count, args):
    """One line: K at once, and one after the other."""
    params, ids, one = task.params, draw(count, args), task.one
    states = [task.fresh(seed) for seed in range(count)]
    held = {'together': pj.stack(states), 'apart': states}
    start = time.perf_counter()
    many = jax.jit(jax.vmap(task.step, in_axes=(None, 0, 0)), donate_argnums=1)
    many = many.lower(params, held['together'], ids).compile()
    seconds = time.perf_counter() - start

    def together():
        held['together'], losses = many(params, held['together'], ids)
        return losses.block_until_ready()

    def apart():
        both = [one(params, state, own) for state, own in zip(held['apart'], ids, strict=True)]
        held['apart'] = [state for state, _ in both]
        return jnp.stack([loss for _, loss in both]).block_until_ready()

    times = turns(functools.partial(same, together, apart), together, apart, args.steps)
    theta = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**20
    return {
        'case': 'many_at_once', 'model': task.kind, 'K': count, 'batch': [args.rows, args.tokens],
        'theta_mib': round(theta, 1), 'phi': task.peft.count(),
        'peak_mib': {'together': round(peak(many), 1), 'apart': round(count * peak(one), 1)},
        'median_ms': {name: round(statistics.median(t), 1) for name, t in times.items()},
        'min_ms': {name: round(min(t), 1) for name, t in times.items()},
        'compile_s': round(seconds, 2), 'processor': beside.processor(),
        'jax': importlib.metadata.version('jax'), 'load': round(os.getloadavg()[0], 1),
    }  # fmt: skip


def same(together, apart):
    """Both have the same losses."""
    np.testing.assert_allclose(together(), apart(), rtol=1e-4)


def turns(first, together, apart, steps):
    """Milliseconds of each, one step of each in turn."""
    first()
    times = {'together': [], 'apart': []}
    for _ in range(steps):
        for name, step in (('together', together), ('apart', apart)):
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--models', default='encoder,decoder', help='separated by commas')
    parser.add_argument('--counts', default='1,2,4,8,16', help='of adapters, separated by commas')
    parser.add_argument('--rows', type=int, default=1)
    parser.add_argument('--tokens', type=int, default=32)
    parser.add_argument('--steps', type=int, default=5)
    parser.add_argument('--tiny', action='store_true', help='tiny models, to see that all runs')
    args = parser.parse_args()
    args.shape = TINY if args.tiny else {}
    for kind in args.models.split(','):
        task = prepare(kind, args)
        for count in map(int, args.counts.split(',')):
            print(json.dumps(measure(task, count, args)), flush=True)


if __name__ == '__main__':
    main()
