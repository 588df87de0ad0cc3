"""One piece of `gpu.py` in a process of its own: a LoRA step of one side, measured.

One argument says what to do, as JSON, and one line of JSON comes last.
"""

import contextlib
import importlib.metadata
import json
import math
import re
import statistics
import sys
import time

BEGAN = time.perf_counter()

import gpu_sides as sides  # noqa: E402 (the first step counts from before any import)


def ceiling(told):
    """TFLOP/s of a large product in bfloat16, by the side's own framework: a median of windows."""
    size, repeats, times = told['matrix'], 10, []
    own = told['side'] == 'peftjax'
    a, x, product, wait = sides.our_product(size) if own else sides.their_product(told)
    for _ in range(9):
        begin = time.perf_counter()
        for _ in range(repeats):
            x = product(a, x)
        wait(x)
        times.append((time.perf_counter() - begin) / repeats)
    return 2 * size**3 / statistics.median(times[2:]) / 1e12


def windows(side, told):
    """Seconds of a step in each of several windows, how many steps one has, and the last loss."""
    for _ in range(3):
        side.wait(side.step())
    begin = time.perf_counter()
    side.wait(side.step())
    count = max(1, math.ceil(told['window_s'] / (time.perf_counter() - begin)))
    times, loss, value = [], math.nan, None
    for _ in range(told['windows']):
        begin = time.perf_counter()
        for _ in range(count):
            value = side.step()
        loss = side.wait(value)
        times.append((time.perf_counter() - begin) / count)
    return times, count, loss


def measure(told):
    """Everything of one piece; the ceiling last, on a warm device whose peak is known by then."""
    side = (sides.ours if told['side'] == 'peftjax' else sides.theirs)(told)
    first = side.wait(side.step())
    first_s = time.perf_counter() - BEGAN
    times, count, last = windows(side, told)
    if not (math.isfinite(first) and math.isfinite(last)):
        raise FloatingPointError(f'the loss is {first}, then {last}')
    memory = side.memory()
    return {
        'first_step_s': round(first_s, 2),
        'step_ms': {
            name: round(1e3 * found(times), 2)
            for name, found in (('median', statistics.median), ('least', min), ('most', max))
        },
        'windows': [len(times), count],
        'losses': [round(first, 4), round(last, 4)],
        **memory,
        'ceiling_tflops': float(f'{ceiling(told):.4g}'),
        **side.facts,
        'versions': versions(),
    }


def check(told):
    """What a step computes and holds, from shapes alone."""
    import peftjax as pj

    shapes, ids, peft, loss, tx = sides.our_parts(told)
    found = pj.plan(peft, loss, shapes, ids, tx=tx, tokens=math.prod(told['batch']))
    return {
        'flops': found.flops,
        'tokens': found.tokens,
        'held': sum(found.device),
        'temporaries': found.temporaries,
    }


def versions():
    names = ('jax', 'jaxlib', 'flax', 'optax', 'torch', 'transformers', 'peft', 'nvidia-cudnn-cu13')
    found = {'python': sys.version.split()[0]}
    for name in (*names, 'nvidia-cublas'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main():
    told = json.loads(sys.argv[1])
    if told.get('check'):
        return print(json.dumps(check(told)))
    try:
        row = measure(told)
    except Exception as error:
        text = f'{type(error).__name__}: {error}'
        if not re.search('RESOURCE_EXHAUSTED|OutOfMemory|out of memory', text):
            raise
        row = {'does_not_fit': text[:300], 'versions': versions()}
    print(json.dumps(row), flush=True)


if __name__ == '__main__':
    main()
