"""LoRA on every linear layer of an encoder: our step beside PyTorch + Hugging Face PEFT (eager).

Both programs live in one process and take turns, step by step, on the same batches; peak memory
and the time to the first step are measured in a process of their own each. Prints one JSON line.
Needs torch, transformers and peft: `python benchmarks/encoder_step.py`.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

SHAPE = dict(
    vocab_size=30522,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
LABELS, RANK, RATE = 6, 8, 1e-4


@dataclasses.dataclass(frozen=True)
class Batch:
    """Token ids, attention mask and labels."""

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray


def draw_batch(rows, tokens, seed=0):
    """Sentences of half to full length, padded at the end."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(tokens // 2, tokens + 1, rows)
    lengths[0] = tokens
    mask = (np.arange(tokens)[None] < lengths[:, None]).astype(np.int32)
    ids = rng.integers(1000, SHAPE['vocab_size'], (rows, tokens)).astype(np.int32) * mask
    return Batch(ids, mask, rng.integers(0, LABELS, rows).astype(np.int32))


def our_step(batch, attention):
    import jax
    import jax.numpy as jnp
    import optax

    import peftjax as pj
    from peftjax.models import Compute, EncoderConfig, SequenceClassifier

    config = EncoderConfig(model_type='bert', num_labels=LABELS, **SHAPE)
    model = SequenceClassifier(config, Compute(attention=attention))
    ids, mask, labels = map(jnp.asarray, (batch.ids, batch.mask, batch.labels))
    params = jax.jit(model.init)(jax.random.key(0), ids[:1, :2])['params']
    method = pj.Lora(rank=RANK, alpha=RANK, target=r'encoder/layer/.*kernel')
    peft = pj.attach(method, model.apply_fn, params, ids, mask)
    forward, phi = peft.wrap(model.apply_fn), peft.init(jax.random.key(1), params)
    optimizer = optax.adamw(RATE)

    def loss(phi, params):
        logits = forward(params, phi, ids, mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def update(params, phi, state):
        value, gradient = jax.value_and_grad(loss)(phi, params)
        change, state = optimizer.update(gradient, state, phi)
        return value, optax.apply_updates(phi, change), state

    held = [phi, jax.jit(optimizer.init)(phi)]

    def step():
        value, *held[:] = update(params, *held)
        return float(value)

    return step, sum(leaf.size for leaf in jax.tree.leaves(phi))


def their_step(batch, threads):
    import peft
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = transformers.BertConfig(num_labels=LABELS, **SHAPE)
    base = transformers.BertForSequenceClassification(config)
    target = r'.*encoder\.layer\..*\.(query|key|value|dense)'
    lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=target)
    model = peft.get_peft_model(base, lora).train()
    ids, mask, labels = (torch.from_numpy(x).long() for x in (batch.ids, batch.mask, batch.labels))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)

    def step():
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step, sum(p.numel() for p in trained)


def build(name, args):
    batch = draw_batch(args.rows, args.tokens)
    return their_step(batch, args.threads) if name == 'torch' else our_step(batch, name)


def alone(name, args):
    """Peak memory and seconds to the first step of one program in a fresh process."""
    start = time.perf_counter()
    command = [sys.executable, __file__, '--alone', name]
    for field in ('rows', 'tokens', 'threads'):
        command += [f'--{field}', str(getattr(args, field))]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    first = time.perf_counter() - start
    peak = json.loads(child.stdout.readline())
    if child.wait():
        raise SystemExit(f'{name} failed')
    return {'first_step_s': round(first, 2), 'peak_mib': round(peak)}


def run_alone(name, args):
    step, _ = build(name, args)
    print(step(), flush=True)
    for _ in range(5):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)


def interleave(names, args):
    """Milliseconds per step of each program, one step of each in turn."""
    steps, counts = zip(*(build(name, args) for name in names), strict=True)
    assert len(set(counts)) == 1, counts
    for step in steps:
        step()
        step()
    times = {name: [] for name in names}
    for _ in range(args.steps):
        for name, step in zip(names, steps, strict=True):
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times, counts[0]


def processor():
    """The kind of CPU, and the widest vectors that it computes with."""
    with open('/proc/cpuinfo', encoding='utf-8') as file:
        facts = dict(line.split(':', 1) for line in file if ':' in line)
    told = {name.strip(): value.strip() for name, value in facts.items()}
    vectors = [v for v in ('avx512f', 'avx2', 'avx') if v in told.get('flags', '').split()]
    return ', '.join([told.get('model name', platform.machine()), *vectors[:1]])


def versions(names):
    """Of what was timed."""
    return {name: importlib.metadata.version(name) for name in names}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rows', type=int, default=32)
    parser.add_argument('--tokens', type=int, default=128)
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--programs', default='fused,torch', help='of fused, plain, torch')
    parser.add_argument('--no-alone', action='store_true', help='step times only')
    parser.add_argument('--alone', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        return run_alone(args.alone, args)
    names = args.programs.split(',')
    line = {'case': 'encoder_step', 'batch': [args.rows, args.tokens], 'threads': args.threads}
    if not args.no_alone:
        line['alone'] = {name: alone(name, args) for name in names}
    times, count = interleave(names, args)
    line['phi'] = count
    line['median_ms'] = {name: round(statistics.median(t), 1) for name, t in times.items()}
    line['min_ms'] = {name: round(min(t), 1) for name, t in times.items()}
    if 'torch' in names:
        line['ratio'] = {
            name: round(line['median_ms'][name] / line['median_ms']['torch'], 3) for name in names
        }
    line['processor'] = processor()
    line['versions'] = versions(['jax', 'torch', 'peft'])
    line['load'] = [round(x, 2) for x in os.getloadavg()]
    print(json.dumps(line))


if __name__ == '__main__':
    main()
