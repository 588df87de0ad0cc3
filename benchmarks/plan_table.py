"""What LoRA on Llama-3.1 takes on 8, 64 and 256 devices: a table of plans, from shapes alone.

LoRA of rank 16 on all linears, AdamW, bfloat16, rows of 2,048 tokens, one row for each device that
rows are split over. Each plan is compiled in a process of its own, on as many CPU devices as its
mesh has, at most four minutes long; what is in the results already is not planned again. Then
prints the results as a Markdown table.

`python benchmarks/plan_table.py`
"""

import argparse
import datetime
import json
import math
import pathlib
import platform
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType

import peftjax as pj
from peftjax import losses, models, sharding
from peftjax.models._load_decoder import saved_names

HERE = pathlib.Path(__file__).parent
SHAPES = HERE.parent / 'tests' / 'cli' / 'shapes'
RESULTS = HERE / 'results' / 'plans.json'
LENGTH, RANK, LIMIT = 2048, 16, 240
SIZES = ('8b', '70b', '405b')
MESHES = (
    {'data': 8}, {'fsdp': 8}, {'model': 8}, {'fsdp': 4, 'model': 2},
    {'fsdp': 64}, {'fsdp': 8, 'model': 8},
    {'fsdp': 256}, {'fsdp': 32, 'model': 8},
)  # fmt: skip
DEVICES = (16, 24, 40, 80, 141)
"""GB of the memories that devices come with."""


def rows():
    """Every plan that makes sense: a mesh of data alone needs all of theta on each device."""
    for mesh in MESHES:
        for size in SIZES:
            if 'data' not in mesh or size == '8b':
                for remat in ('names', 'full'):
                    yield {'model': size, 'mesh': mesh, 'remat': remat}


def planned(row):
    """The plan of one row, compiled here."""
    config = models.read_decoder_config(
        json.loads((SHAPES / f'llama-3.1-{row["model"]}.json').read_text())
    )
    names, counts = tuple(row['mesh']), tuple(row['mesh'].values())
    mesh = jax.make_mesh(counts, names, axis_types=(AxisType.Auto,) * len(names))
    half = {'dtype': jnp.bfloat16, 'param_dtype': jnp.bfloat16}
    compute = models.Compute(save=saved_names(row['remat']), **half)
    model = models.Decoder(config, compute)
    ids = jax.ShapeDtypeStruct((batch(row), LENGTH), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)['params']
    where = models.decoder_sharding(config, mesh)
    name = lambda keys: jax.tree_util.keystr(keys, simple=True, separator='/')
    at = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    params = jax.tree_util.tree_map_with_path(lambda keys, x: at(x, where(name(keys))), shapes)
    ids = at(ids, sharding.batch_sharding(mesh))
    peft = pj.attach(pj.Lora(rank=RANK, target=models.linears(config)), model.apply_fn, params, ids)

    def mean(params, ids):
        hidden = model.apply_fn(params, ids, method='hidden')
        weight = model.head_weight(params).weight
        return losses.next_token_loss(hidden, weight, losses.next_tokens(ids)).mean

    forward = peft.wrap(mean)
    loss = lambda params, phi, ids, key: forward(params, phi, ids)
    return pj.plan(peft, loss, params, ids, tx=optax.adamw(1e-4), tokens=math.prod(ids.shape))


def batch(row):
    """Rows of a step: one for each device that rows are split over."""
    return math.prod(count for axis, count in row['mesh'].items() if axis != 'model')


def figures(plan):
    """What of a plan goes into the results."""
    return {
        'theta': plan.device.params,
        'phi_and_optimizer': plan.device.phi + plan.device.optimizer,
        'temporaries': plan.temporaries,
        'total': plan.peak,
        'flops_per_device': plan.flops / plan.devices,
        'received': dict(plan.received),
    }


def measured(row):
    """A row with its figures, or with the reason why there are none."""
    command = [sys.executable, __file__, '--row', json.dumps(row)]
    began = time.perf_counter()
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return row | {'failed': f'not compiled within {LIMIT} s'}
    if ran.returncode:
        return row | {'failed': (ran.stderr.strip() or f'exit {ran.returncode}').splitlines()[-1]}
    return row | json.loads(ran.stdout) | {'seconds': round(time.perf_counter() - began, 1)}


def here():
    """Where and when a row was planned."""
    versions = {'jax': jax.__version__, 'peftjax': pj.__version__}
    return {'date': str(datetime.date.today()), 'python': platform.python_version(), **versions}


def table(found):
    """The rows as Markdown, a table for each model."""
    heads = ('devices', 'mesh', 'remat', 'θ', 'φ, AdamW', 'temporaries', 'all', 'TFLOPs',
             'gathered', 'summed', 'permuted', 'fits from')  # fmt: skip
    for size in SIZES:
        yield f'\nLlama-3.1-{size.upper()}:\n'
        yield f'| {" | ".join(heads)} |'
        yield '|---' * len(heads) + '|'
        for row in found:
            if row['model'] == size:
                yield f'| {" | ".join(cells(row))} |'


def cells(row):
    mesh = ', '.join(f'{axis} {count}' for axis, count in row['mesh'].items())
    first = (str(math.prod(row['mesh'].values())), mesh, row['remat'])
    if 'failed' in row:
        return (*first, row['failed'], *[''] * 8)
    received = dict(row['received'])
    sent = [received.pop(name, 0) for name in ('all-gather', 'all-reduce', 'collective-permute')]
    assert not received, f'operations that the table has no column for: {received}'
    parts = (row['theta'], row['phi_and_optimizer'], row['temporaries'], row['total'])
    fits = next((f'{size} GB' for size in DEVICES if row['total'] <= size * 1e9), 'none')
    teras = short(row['flops_per_device'] / 1e12)
    return (*first, *map(giga, parts), teras, *map(giga, sent), fits)


def giga(count):
    return short(count / 1e9) if count else '–'


def short(number):
    return f'{number:,.0f}' if number >= 100 else f'{number:.3g}'


def main():
    """Plans what is missing, and prints all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--row', type=json.loads, help='one plan, printed as JSON')
    row = parser.parse_args().row
    jax.config.update('jax_platforms', 'cpu')
    if row is not None:
        jax.config.update('jax_num_cpu_devices', math.prod(row['mesh'].values()))
        print(json.dumps(figures(planned(row)) | here()))
        return
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    key = lambda row: (row['model'], tuple(row['mesh'].items()), row['remat'])
    done = {key(row): row for row in found}
    for row in rows():
        if key(row) not in done:
            done[key(row)] = measured(row)
            print(json.dumps(done[key(row)]), file=sys.stderr, flush=True)
            ordered = [done[key(row)] for row in rows() if key(row) in done]
            RESULTS.write_text(json.dumps(ordered, indent=1) + '\n')
    print('\n'.join(table([done[key(row)] for row in rows()])))


if __name__ == '__main__':
    main()
