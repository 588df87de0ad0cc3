"""Programs side by side: step times in turns, peak memory and the first step each by itself.

A benchmark of steps says what its programs are, `build(name, args) -> (step, count)` where `step()`
makes one update and returns its loss and `count` is the number of trained parameters; the rest is
here.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time


def parser(description, *, rows, tokens, programs):
    """What all of them can be told."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument('--rows', type=int, default=rows)
    made.add_argument('--tokens', type=int, default=tokens)
    made.add_argument('--steps', type=int, default=10)
    made.add_argument('--threads', type=int, default=os.cpu_count())
    made.add_argument('--programs', default=','.join(programs), help='separated by commas')
    made.add_argument('--no-alone', action='store_true', help='step times only')
    made.add_argument('--alone', help=argparse.SUPPRESS)
    return made


def alone(name, more=()):
    """Peak memory and seconds to the first step of one program in a fresh process."""
    start = time.perf_counter()
    command = [sys.executable, *sys.argv, *more, '--alone', name]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    first = time.perf_counter() - start
    peak = child.stdout.readline()
    if child.wait():
        raise SystemExit(f'{name} failed')
    return {'first_step_s': round(first, 2), 'peak_mib': round(json.loads(peak))}


def run_alone(build, args):
    """The other side of `alone`."""
    step, _ = build(args.alone, args)
    print(step(), flush=True)
    for _ in range(5):
        step()
    print(peak_mib(), flush=True)


def peak_mib():
    """The most memory that this program held; `ru_maxrss` would begin with that of its parent."""
    with open('/proc/self/status', encoding='utf-8') as file:
        (line,) = (line for line in file if line.startswith('VmHWM'))
    return int(line.split()[1]) / 1024


def interleave(names, build, args):
    """Milliseconds per step of each program, one step of each in turn, and how much is trained."""
    steps, counts = zip(*(build(name, args) for name in names), strict=True)
    assert len(set(counts)) == 1, counts
    first = [step() for step in steps]
    for step in steps:
        step()
    times = {name: [] for name in names}
    for _ in range(args.steps):
        for name, step in zip(names, steps, strict=True):
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times, counts[0], first


def measure(case, build, args, *, same=False, more=()):
    """All figures of a benchmark.

    Args:
      case: its name.
      build: `(name, args)` to a step and the number of trained parameters.
      args: of `parser`.
      same: whether the programs start from the same weights, so that their first losses must agree.
      more: arguments for the processes of their own, besides those that this one was given.

    Returns:
      What to print as one JSON line.
    """
    names = args.programs.split(',')
    line = {'case': case, 'batch': [args.rows, args.tokens], 'threads': args.threads}
    if not args.no_alone:
        line['alone'] = {name: alone(name, more) for name in names}
    times, count, first = interleave(names, build, args)
    if same:
        line['first_losses'] = [round(loss, 5) for loss in first]
        assert all(math.isclose(loss, first[0], rel_tol=1e-4) for loss in first), first
    line['phi'] = count
    line['median_ms'] = {name: round(statistics.median(t), 1) for name, t in times.items()}
    line['min_ms'] = {name: round(min(t), 1) for name, t in times.items()}
    if 'torch' in names:
        line['ratio'] = {
            name: round(line['median_ms'][name] / line['median_ms']['torch'], 3) for name in names
        }
    line['processor'] = processor()
    line['versions'] = {name: importlib.metadata.version(name) for name in ('jax', 'torch', 'peft')}
    line['load'] = [round(x, 2) for x in os.getloadavg()]
    return line


def processor():
    """The kind of CPU, and the widest vectors that it computes with."""
    with open('/proc/cpuinfo', encoding='utf-8') as file:
        facts = dict(line.split(':', 1) for line in file if ':' in line)
    told = {name.strip(): value.strip() for name, value in facts.items()}
    vectors = [v for v in ('avx512f', 'avx2', 'avx') if v in told.get('flags', '').split()]
    return ', '.join([told.get('model name', platform.machine()), *vectors[:1]])
