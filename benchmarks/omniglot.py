"""Few-shot learning on Omniglot, toward the published accuracies, in pieces of any length.

    python benchmarks/omniglot.py --data omniglot28_background.npz --algorithm maml --ways 5 \
        --shots 1 --steps 20000 --out runs/omniglot/maml-5-1 [--minutes 40] [--record]

Trains the network of `few_shot_network.py` by a recipe of `omniglot_recipes.py` on the characters
of some alphabets and judges it on those of others. The same command goes on where the last one
ended, by `--minutes`, SIGTERM or a kill, and ends with the bits of the unbroken run.

Every `--validate-every` steps the accuracy on fixed tasks of the alphabets for validation goes to
`curve.jsonl` in the run's folder; the best phi by it is kept. After the last step, and with
`--record` wherever the run stands, that phi is judged on fixed tasks of the alphabets for test:
the mean over tasks and its interval of 95 %, 1.96 standard errors. `--record` puts the result into
`benchmarks/results/omniglot.json`, in place of an earlier one of the same run.
"""

import argparse
import functools
import json
import pathlib
import platform
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import omniglot_data
import omniglot_recipes as recipes
from omniglot_curve import Curve, record
from omniglot_programs import Programs, programs

import peftjax as pj
from peftjax import data

RESULTS = pathlib.Path(__file__).parent / 'results' / 'omniglot.json'
RUN = ('algorithm', 'ways', 'shots', 'network', 'rotated', 'seed')
"""What tells a run from another in the table of results."""
LEAST = 600
"""Tasks of a test that is recorded."""


class Run(NamedTuple):
    """All that a run needs, fixed by its options."""

    options: argparse.Namespace
    recipe: recipes.Recipe
    made: Programs
    parts: omniglot_data.Parts
    settings: dict[str, Any]


def prepared(options: argparse.Namespace) -> Run:
    """Data, programs, and the settings that must be the same when the run goes on."""
    recipe = recipes.recipe(options.algorithm, options.ways, options.shots)
    parts = omniglot_data.split(
        options.data, seed=options.seed, validation=options.validation_alphabets,
        test=options.test_alphabets, rotated=options.rotated,
    )  # fmt: skip
    pooled = options.network == 'pooled'
    made = programs(recipe, options.steps, options.convolution, pooled, options.seed)
    named = ('convolution', 'validate_every', 'validation_tasks', *RUN)
    settings = {name: getattr(options, name) for name in named}
    settings['alphabets'] = {name: [*part.alphabets] for name, part in parts._asdict().items()}
    settings |= {'data': omniglot_data.digest(options.data), 'recipe': str(recipe)}
    if options.algorithm == 'reptile':  # its rate goes to zero at the last step
        settings['steps'] = options.steps
    return Run(options, recipe, made, parts, settings)


def judged(run: Run, part: str, phi: Any, count: int) -> np.ndarray:
    """The accuracy of each of so many fixed tasks of the alphabets held back for this."""
    own, (ways, shots, queries) = getattr(run.parts, part), run.recipe.judged
    group = min(count, max(1, 600 // (ways * (shots + queries))))
    seed = run.options.seed + {'validation': 1, 'test': 2}[part]
    tasks = data.Episodes(
        own.labels, ways=ways, shots=shots, queries=queries, tasks=group, seed=seed
    )
    params, key, found = (run.made.params, jnp.asarray(own.images)), jax.random.key(seed), []
    for i in range(-(-count // group)):
        found.append(run.made.judge(params, phi, next(tasks), jax.random.fold_in(key, i)))
    return np.concatenate(jax.device_get(found))[:count]


def until(seconds: float) -> Any:
    """Ends a training after so long."""
    end = time.perf_counter() + seconds

    def ended(step: int, state: pj.TrainState) -> None:
        del step, state
        if time.perf_counter() > end:
            raise pj.Stop

    return ended


def trained(run: Run) -> tuple[pj.TrainState, Curve]:
    """The run up to its last step, or as far as it comes."""
    options, recipe, made = run.options, run.recipe, run.made
    ways, shots, queries = recipe.trained
    batches = data.Episodes(
        run.parts.train.labels, ways=ways, shots=shots, queries=queries, tasks=recipe.tasks,
        seed=options.seed,
    )  # fmt: skip
    key = jax.random.key(options.seed)
    phi = made.init(made.peft.init(key, made.params))
    fresh = pj.start(made.tx, phi, key, keep_best=True)
    folder = pathlib.Path(options.out)
    with pj.Checkpoints(folder, made.peft, made.params, settings=run.settings) as checkpoints:
        state = checkpoints.resume(fresh, batches)
        curve = Curve(folder / 'curve.jsonl', int(state.step))
        reached = [int(state.step)]

        def validated(step: int, phi: Any) -> float:
            curve.pause()
            found = float(judged(run, 'validation', phi, options.validation_tasks).mean())
            curve.point(step, validation=round(100 * found, 2))
            print(json.dumps(curve.rows[-1]), flush=True)
            curve.go_on()
            return found

        def noted(step: int, loss: float) -> None:
            reached[0] = step
            curve.loss(step, loss)

        best = pj.KeepBest(validated, maximize=True)
        events = [pj.Every(options.validate_every, best)]
        if options.minutes is not None:
            events.append(pj.Every(10, until(60 * options.minutes)))
        try:
            state = pj.fit(
                made.step, (made.params, jnp.asarray(run.parts.train.images)),
                state, batches, steps=options.steps, on_loss=noted, events=events,
                checkpoints=checkpoints, save_every=options.validate_every,
            )  # fmt: skip
        finally:
            curve.pause()
            if not curve.rows or curve.rows[-1]['step'] < reached[0]:
                curve.point(reached[0])
    return state, curve


def tested(run: Run, state: pj.TrainState, curve: Curve) -> dict[str, Any]:
    """The test of the best phi so far, which is made once."""
    step, best = int(state.step), state.best
    assert best is not None
    if found := curve.test(step):
        return found
    phi = state.phi if int(best.step) == 0 else best.phi
    each = 100 * judged(run, 'test', phi, run.options.test_tasks)
    row = {
        'step': step,
        'test': round(float(each.mean()), 2),
        'interval': round(float(1.96 * each.std() / len(each) ** 0.5), 2),
        'tasks': len(each),
        'of_step': int(best.step) or step,
    }
    curve.note(row)
    print(json.dumps(row), flush=True)
    return row


def result(run: Run, test: dict[str, Any], curve: Curve) -> dict[str, Any]:
    """A row of the table of results."""
    timed = [row['step_ms'] for row in curve.rows if 'step_ms' in row]
    seconds = [row['seconds'] for row in curve.rows if 'seconds' in row]
    points = [row for row in curve.rows if 'validation' in row]
    return {
        **{name: getattr(run.options, name) for name in RUN},
        'accuracy': test['test'],
        'interval': test['interval'],
        'test_tasks': test['tasks'],
        'published': run.recipe.published,
        'steps': test['step'],
        'tested_step': test['of_step'],
        'steps_wanted': run.options.steps,
        'steps_published': run.recipe.steps,
        'seconds': seconds[-1] if seconds else 0.0,
        'step_ms': statistics.median(timed) if timed else None,
        'shared': run.options.shared,
        'norm': 'of the batch, transductive',
        'recipe': str(run.recipe),
        'alphabets': run.settings['alphabets'],
        'curve': [[row['step'], row.get('loss'), row['validation']] for row in points],
        'device': jax.devices()[0].device_kind,
        'versions': {
            'peftjax': pj.__version__,
            'jax': jax.__version__,
            'python': platform.python_version(),
        },
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = functools.partial(made.add_argument, type=int)
    made.add_argument('--data', required=True, help='the npz: see omniglot_data.py')
    made.add_argument('--algorithm', required=True, choices=recipes.ALGORITHMS)
    add('--ways', default=5, choices=(5, 20))
    add('--shots', default=1, choices=(1, 5))
    add('--steps', help="of the whole run; default: the recipe's")
    made.add_argument('--out', required=True, help='the folder of the run')
    made.add_argument('--minutes', type=float, help='of this piece, from its first step on')
    made.add_argument('--record', action='store_true', help='puts the result into the table')
    made.add_argument(
        '--shared', action='store_true', help='the device has other work, and times say little'
    )
    add('--seed', default=0, help='of alphabets, network, tasks')
    add('--validation-alphabets', default=3)
    add('--test-alphabets', default=5)
    made.add_argument('--rotated', default='train', choices=('train', 'all', 'none'))
    made.add_argument('--network', default='strided', choices=('strided', 'pooled'))
    made.add_argument('--convolution', default='patches', choices=('patches', 'native'))
    add('--validate-every', default=1000)
    add('--validation-tasks', default=200)
    add('--test-tasks', default=LEAST)
    made.add_argument('--results', type=pathlib.Path, default=RESULTS, help='the table')
    return made


def main(arguments: list[str] | None = None) -> None:
    """Trains, tests, records."""
    options = parser().parse_args(arguments)
    if options.steps is None:
        options.steps = recipes.recipe(options.algorithm, options.ways, options.shots).steps
    if options.record and options.test_tasks < LEAST:
        raise SystemExit(
            f'what is recorded must be tested on at least {LEAST} tasks: received '
            f'--test-tasks {options.test_tasks}. Leave the option out'
        )
    run = prepared(options)
    state, curve = trained(run)
    if int(state.step) < options.steps:
        print(f'step {int(state.step)} of {options.steps}: the same command goes on', flush=True)
    if int(state.step) >= options.steps or options.record:
        test = tested(run, state, curve)
        if options.record:
            record(options.results, result(run, test, curve), RUN)


if __name__ == '__main__':
    main()
