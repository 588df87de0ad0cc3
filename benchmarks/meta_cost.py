"""Counts what `peftjax meta` computes, before it is run: FLOPs by method and shape of tasks.

    python benchmarks/meta_cost.py --ways 5,10 --shots 1,5,10 [--tokens 24] [--gflops 100]

One JSON line each: FLOPs of products in the traced programs (`peftjax/_flops.py`; nothing is
compiled or run), for validation and test, or for meta-training; and minutes, if products run at so
many GFLOP/s. The options are those of the command, with its defaults. Prototypes are counted as if
no text came in two tasks, which is the most that they can take.
"""

import argparse
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import data, models
from peftjax._flops import flops
from peftjax.cli._options import parse
from peftjax.cli.meta import _learn
from peftjax.cli.meta._adapt import Adapting
from peftjax.cli.meta._ground import Ground, Part, Shape
from peftjax.cli.meta._learn import Meta
from peftjax.cli.meta._methods import WAYS, Way
from peftjax.cli.meta._space import Space, attached


def main() -> None:
    parser = argparse.ArgumentParser(description='FLOPs of peftjax meta')
    parser.add_argument('--tokens', type=int, default=24, help='of a row (%(default)s)')
    parser.add_argument('--gflops', type=float, default=100.0, help='a second (%(default)s)')
    own, others = parser.parse_known_args()
    options = parse(['meta', '--train=-', '--valid=-', '--test=-', *others])
    ground = empty(options.model, own.tokens)
    for way in WAYS.values():
        for row in counted(ground, way, options) if way.recipe else ():
            row['minutes'] = round(row['gflop'] / own.gflops / 60, 1)
            print(json.dumps(row), flush=True)


def empty(model: str, tokens: int) -> Ground:
    """The encoder, and one text."""
    loaded = models.load_encoder(model or models.default_model_path())
    row = jnp.zeros((1, tokens), jnp.int32)
    theta = {'params': loaded.params, 'ids': row, 'mask': row}
    theta['sharpness'] = jnp.float32(1)
    labels, names = np.repeat(np.arange(99, dtype=np.int32), 99), [*map(str, range(99))]
    parts = {'train': Part('train', labels, names, 0)}
    return Ground(model, loaded.model.apply_fn, theta, jnp.zeros((1, 1)), parts, tokens)


def counted(ground: Ground, way: Way, options: argparse.Namespace) -> list[dict]:
    """What adapting costs for each shape of tasks, and what learning phi costs, where it is used as
    it is."""
    plan = attached(ground, way.method())
    phi = jax.eval_shape(plan[0].init, jax.random.key(0), ground.theta['params'])
    found = []
    for ways, shots in itertools.product(options.ways, options.shots):
        shape = Shape(ways, shots)
        gflop = adapting(ground, Space(*plan, ways), way, shape, options, phi)
        said = {'method': way.name, **shape._asdict()}
        found.append(said | {'of': 'adapting', 'gflop': gflop})
    if way.learner == way.name:
        shape = _learn.shape(options, [np.arange(_learn.WAYS)])
        space = Space(*plan, shape.ways)
        judged = Adapting(ground.theta, space, way, options.inner_steps, (1, 1))
        valid = drawn(shape, options.queries)
        meta = Meta(ground, way, space, shape, judged, valid, 1.0, options, phi)
        tasks = next(_learn.episodes(meta))
        loss = _learn.loss(meta, way.grid()[0])
        of_step = flops(
            jax.make_jaxpr(jax.grad(loss, argnums=1))(ground.theta, phi, tasks, jax.random.key(0))
        )
        said = {'method': way.name, **shape._asdict(), 'of': 'meta-training'}
        found.append(said | {'gflop': options.meta_steps * of_step / 1e9})
    return found


def adapting(ground, space: Space, way: Way, shape: Shape, options, phi) -> float:
    """GFLOPs of validation at all rates, and of the test at those that were chosen for some steps
    (as if two were)."""
    task = drawn(shape, options.queries)
    support, query = (jax.tree.map(lambda x: x[0], half) for half in task)
    count = lambda fn, *args: flops(jax.make_jaxpr(fn)(ground.theta, *args)) / 1e9
    begin = count(space.begin, phi, support)
    head = jax.eval_shape(space.begin, ground.theta, phi, support)
    judge = count(space.accuracy, {**phi, **head}, query)
    if way.still:
        return options.episodes * (begin + judge)
    step = count(jax.grad(space.loss, argnums=1), {**phi, **head}, support, None)
    once = begin + max(options.steps) * step + len(options.steps) * judge
    chosen = begin + max(options.steps) * step  # the second rate judges nothing twice
    return (options.valid_episodes * len(way.grid()) + options.episodes) * once + (
        options.episodes * chosen
    )


def drawn(shape: Shape, queries: int) -> data.Episode:
    """One task of the shape."""
    labels = np.repeat(np.arange(99, dtype=np.int32), 99)
    return next(data.Episodes(labels, **shape._asdict(), queries=queries, tasks=1, seed=0))


if __name__ == '__main__':
    main()
