"""LoRA steps of large models on a GPU: tokens per second, MFU and peak memory, beside PyTorch.

    python benchmarks/gpu.py --list        # the pieces, and about how long each takes
    python benchmarks/gpu.py               # those not done yet, as many as fit into --minutes
    python benchmarks/gpu.py --only 8b/4   # those whose name this regular expression finds
    python benchmarks/gpu.py --report      # what is in the results, ours beside theirs
    python benchmarks/gpu.py --check       # needs no GPU: FLOPs and bytes of our steps, planned
    python benchmarks/gpu.py --tiny        # needs no GPU: all pieces with tiny shapes, to see them

A piece is a model, a length of rows, a side, and what a gradient keeps. Models have the shapes of
Llama-3.1-8B, Qwen3-1.7B and Qwen3-0.6B in bfloat16; weights are random and made on the device. LoRA
of rank 16 is on all linears, AdamW on phi alone, 8,192 tokens a step. The sides:

* `peftjax`: the donated, jitted `pj.train_step`, the loss fused with the head; `names`, `full` and
  `none` are those of `load_decoder(remat=...)`. Attention must be cuDNN's, else a piece fails.
* `torch`: transformers and PEFT, sdpa, the model's own loss; `full` is gradient checkpointing.
  Adapters are float32 under autocast, as PEFT makes them and transformers' trainer runs them.
* `torch-bfloat16`: the same with adapters in bfloat16 and no casts, which is faster and coarser.

Every piece is a process of its own, so that no framework's memory stands in the other's way. It
ends with a large bfloat16 product: MFU is tokens per second times the FLOPs that LoRA needs at
least (`gpu_cases.Counts`; what is computed again counts nothing), over the speed of that. Times of
steps are medians over windows, the first steps left out. One row a piece goes to
`benchmarks/results/gpu.jsonl`, and what is there for this device and batch is not run again. Not to
fit into memory is a result; to fail, or to outlast the call, is none. The last two pieces are tests
of what a GPU computes by other means than a CPU.

It runs from a checkout, where peftjax's dependencies are, and torch, transformers and peft.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import subprocess
import sys
import time

from gpu_cases import GOALS, PIECES, RANK, TESTS, count

ROOT = pathlib.Path(__file__).parents[1]
STEP = ROOT / 'benchmarks/gpu_step.py'
RESULTS = ROOT / 'benchmarks/results/gpu.jsonl'
SETTINGS = {
    'peftjax': {'XLA_PYTHON_CLIENT_PREALLOCATE': 'true', 'XLA_CLIENT_MEM_FRACTION': '0.92'},
    'torch': {'PYTORCH_ALLOC_CONF': 'expandable_segments:True'},
}
"""Of the allocators, where the environment says nothing else. Peaks are of what they gave out, not
of what they took from the device."""


def wanted(options):
    """Pieces and names of tests."""
    every = [*PIECES, *TESTS]
    return [piece for piece in every if re.search(options.only, name_of(piece))]


def name_of(piece):
    return piece if piece in TESTS else piece.name


def seconds_of(piece, options):
    return 200 if piece in TESTS else piece.seconds(options)


def print_pieces(options):
    total = 0
    for piece in wanted(options):
        seconds = seconds_of(piece, options)
        total += seconds
        print(f'{name_of(piece):40} {seconds:4.0f} s')
    print(f'about {total / 60:.0f} minutes in all')


# Running -----------------------------------------------------------------------------------------


def run_all(options):
    """Those that are wanted, not done, and fit into the time; how many gave no result."""
    kind = device_kind(options)
    known = [] if options.tiny else read(options.results)
    ends, broken, left = time.monotonic() + 60 * options.minutes, 0, 0
    for piece in wanted(options):
        name, remaining = name_of(piece), ends - time.monotonic()
        if any(same(row, piece, kind, options) for row in known):
            continue
        if remaining < (1 if options.tiny else seconds_of(piece, options)):
            left += 1
            continue
        print(f'{name} …', file=sys.stderr, flush=True)
        try:
            row = (tests if piece in TESTS else measured)(piece, kind, options, remaining)
        except (ChildProcessError, subprocess.TimeoutExpired) as error:
            late = isinstance(error, subprocess.TimeoutExpired)
            print(f'{name} gave no result: {"it outlasted the call" if late else error}')
            broken += 1
            continue
        print(json.dumps(row), flush=True)
        if not options.tiny:
            with options.results.open('a', encoding='utf-8') as file:
                file.write(json.dumps(row) + '\n')
    print(f'{broken} gave no result, {left} did not fit into the time', flush=True)
    return broken


def same(row, piece, kind, options):
    """Whether a row is what this piece would find out."""
    if (row['piece'], row['device']) != (name_of(piece), kind):
        return False
    if piece in TESTS:
        return not row['failed']
    return (row['batch'][0] * row['batch'][1], row['chunk']) == (options.tokens, options.chunk)


def measured(piece, kind, options, limit):
    """The row of a step."""
    told = piece.told(options)
    settings = SETTINGS[piece.side.split('-')[0]]
    environment = {**settings, **os.environ}
    if options.device == 'cpu':
        environment['JAX_PLATFORMS'] = 'cpu'
    found = last_json(step_process(told, environment, limit))
    row = about(piece.name, kind, options) | {
        'batch': told['batch'],
        'chunk': options.chunk,
        'rank': RANK,
        'settings': {name: environment.get(name) for name in (*settings, 'XLA_FLAGS')},
        **found,
    }
    if 'does_not_fit' in found:
        return row
    counts, (rows, length) = count(told['fields'], told['length']), told['batch']
    speed = 1e3 * rows * length / found['step_ms']['median']
    return row | {
        'tokens_per_s': round(speed, 1),
        'flops_per_token': counts.minimum,
        'mfu': round(speed * counts.minimum / found['ceiling_tflops'] / 1e12, 4),
        'goals': GOALS[piece.model] if piece.side == 'peftjax' else {},
    }


def tests(name, kind, options, limit):
    """The row of some tests, compiled as users do; full float32 precision has to be asked for."""
    asked = {'JAX_DEFAULT_MATMUL_PRECISION': 'highest', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'}
    environment = {**os.environ, **asked}
    if options.device == 'cpu':
        environment['JAX_PLATFORMS'] = 'cpu'
    environment['PYTHONPATH'] = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    # warnings of a machine that tests were not made for are no failures
    command = ['-m', 'pytest', '-o', 'addopts=', '-o', 'filterwarnings=', '-q', '--tb=short']
    command += [*TESTS[name], *(['--collect-only'] if options.tiny else [])]
    said = process(command, environment, limit, fine=(0, 1))
    failed = [line for line in said.splitlines() if line.startswith(('FAILED', 'ERROR'))]
    if failed:
        print(said, flush=True)
    return about(name, kind, options) | {'said': said.strip().splitlines()[-1], 'failed': failed}


def about(name, kind, options):
    """What every row begins with."""
    row = {'case': 'gpu', 'piece': name, 'device': kind, 'date': f'{datetime.date.today()}'}
    return row | ({'tiny': True} if options.tiny else {})


def step_process(told, environment, limit):
    return process([str(STEP), json.dumps(told)], environment, limit)


def process(arguments, environment, limit, fine=(0,)):
    """What Python prints, if it ends in time and well; complaints go to the terminal."""
    ran = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=limit,
    )
    if ran.returncode not in fine:
        raise ChildProcessError(f'it ended with {ran.returncode}. {ran.stdout[-2000:]}')
    return ran.stdout


def last_json(text):
    return json.loads(text.strip().splitlines()[-1])


def device_kind(options):
    """What is here, asked in a process that ends: JAX would hold the memory."""
    if options.device == 'cpu':
        return 'cpu'
    code = 'import jax; d = jax.devices()[0]; print(d.platform, d.device_kind)'
    environment = {**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
    platform, kind = process(['-c', code], environment, 120).strip().split(maxsplit=1)
    if platform != 'gpu':
        raise SystemExit(f'JAX finds no GPU here ({kind}). --tiny and --check need none')
    return kind


def read(path):
    return (
        [json.loads(line) for line in path.read_text('utf-8').splitlines()] if path.exists() else []
    )


# Looking -----------------------------------------------------------------------------------------


def check(options):
    """Our steps, traced and compiled for the CPU at hand and never run."""
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    print('of a step: FLOPs over what LoRA needs at least, and bytes as a CPU would hold them')
    for piece in wanted(options):
        if piece in TESTS or piece.side != 'peftjax':
            continue
        told = piece.told(options) | {'check': True}
        found = last_json(step_process(told, environment, None))
        counts = count(told['fields'], told['length'])
        flops = found['flops'] / found['tokens']  # some masked pairs of tokens among them
        print(
            f'{piece.name:36} {flops / counts.minimum:.4f}  '
            f'{gib(found["held"])} held + {gib(found["temporaries"])} in a step',
            flush=True,
        )


def gib(count):
    return '–' if count is None else f'{count / 2**30:.1f} GiB'


def report(options):
    """The newest rows of each device, ours over PyTorch with checkpointing."""
    newest = {(row['device'], row['piece']): row for row in read(options.results)}
    for device in dict.fromkeys(device for device, _ in newest):
        print(f'\n{device}')
        found = {name: row for (kind, name), row in newest.items() if kind == device}
        for name, row in found.items():
            print(f'{name:40} {line(row, peer(name, found))}')


def peer(name, found):
    """The faster of PyTorch's runs with checkpointing of the same model and length."""
    start = '/'.join(name.split('/')[:2])
    rows = [found.get(f'{start}/{side}/full', {}) for side in ('torch', 'torch-bfloat16')]
    rows = [row for row in rows if 'tokens_per_s' in row]
    return max(rows, key=lambda row: row['tokens_per_s'], default=None)


def line(row, peer):
    if 'said' in row:
        return row['said']
    if 'does_not_fit' in row:
        return 'does not fit into memory'
    text = (
        f'{row["tokens_per_s"]:9,.0f} tokens/s  MFU {row["mfu"]:.3f} of '
        f'{row["ceiling_tflops"]:.0f} TFLOP/s  peak {gib(row["peak_bytes"])}  '
        f'first step {row["first_step_s"]:.0f} s'
    )
    if peer is None or not row['goals']:
        return text
    speed, memory = (row[n] / peer[n] for n in ('tokens_per_s', 'peak_bytes'))
    return f'{text}  beside torch: speed × {speed:.2f}, memory × {memory:.2f}; goals {row["goals"]}'


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--list', action='store_true')
    parser.add_argument('--report', action='store_true')
    parser.add_argument('--check', action='store_true')
    parser.add_argument('--tiny', action='store_true')
    parser.add_argument('--only', default='', help='a regular expression, searched in names')
    parser.add_argument('--minutes', type=float, default=9.5, help='that this call may take')
    parser.add_argument('--tokens', type=int, default=8192, help='of a step')
    parser.add_argument('--chunk', type=int, default=1024, help='tokens at the head at once')
    parser.add_argument('--windows', type=int, default=8, help='of two seconds or a step')
    parser.add_argument('--device', choices=('cuda', 'cpu'), help='of --tiny: cpu, else cuda')
    parser.add_argument('--results', type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    options.device = options.device or ('cpu' if options.tiny else 'cuda')
    if options.device == 'cpu' and not options.tiny:
        parser.error('these models are for a GPU; --device cpu goes with --tiny')
    if not wanted(options):
        parser.error(f'no piece has {options.only!r} in its name; --list prints them')
    for chosen, action in ('list', print_pieces), ('report', report), ('check', check):
        if getattr(options, chosen):
            return action(options)
    sys.exit(run_all(options) > 0)


if __name__ == '__main__':
    main()
