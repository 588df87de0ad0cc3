"""`peftjax meta`: what helps to learn new labels from a few examples, and in how many steps?"""

import argparse

from peftjax import data
from peftjax.cli._terminal import progress, say
from peftjax.cli.meta import _ground, _learn, _record
from peftjax.cli.meta._cells import Cells
from peftjax.cli.meta._ground import Ground, Shape
from peftjax.cli.meta._methods import Way, chosen
from peftjax.cli.meta._results import FILE, PICTURE, TABLE, TASKS, Results


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    ways, _ = chosen(options.methods), chosen(options.beside)
    shapes = [Shape(n, k) for n in options.ways for k in options.shots]
    if not any(options.steps) and any(not way.still for way in ways):
        raise ValueError(f'--steps must have one above 0; got {options.steps}')
    results = Results(options)
    todo = [(way, shape) for shape in shapes for way in ways if not results.has(way.name, *shape)]
    if not todo:
        results.begin()  # with what --beside says now
        say(f'{results.out} has all of these: there is nothing to go on with\n\n{results.text()}')
        return 0
    examples = _ground.read(options)
    learned_on = _learn.shape(options, [examples[name].labels for name in ('train', 'valid')])
    _check(options, examples, todo, learned_on)
    ground = _ground.load(options, examples)
    results.begin(_ground.digest(examples))
    say(_about(ground, options, len(todo), len(results.records)))
    with progress(len(todo)) as bar:
        cells = Cells(ground, options, results.adapters, results.parts(), learned_on)
        for way, shape in todo:
            bar.set_description(f'{way.name}, {shape.ways} ways, {shape.shots} shots')
            results.add(*cells.record(way, shape))
            bar.write(_record.line(results.records[-1]))
            bar.update()
    say('\n' + results.text())
    results.draw()
    names = ', '.join((FILE, TASKS, TABLE, PICTURE))
    say(f'\nwritten to {results.out}: {names}, {results.adapters.name}/')
    return 0


def _check(
    options: argparse.Namespace,
    examples: dict[str, data.Examples],
    todo: list[tuple[Way, Shape]],
    learned_on: Shape,
) -> None:
    """Refuses tasks that the files have too few labels or texts for, before any work."""
    parts = {name: _ground.Part(name, own.labels, own.names, 0) for name, own in examples.items()}
    for way, shape in todo:
        for name in ('valid', 'test'):
            parts[name].drawn(shape, queries=options.queries, tasks=1, seed=0)
        if way.learner is not None:
            _learn.check(way, learned_on, options)
            task, queries = _learn.drawn(way, learned_on, options.meta_queries)
            parts['train'].drawn(task, queries=queries, tasks=1, seed=0)
            parts['valid'].drawn(learned_on, queries=options.queries, tasks=1, seed=0)


def _about(ground: Ground, options: argparse.Namespace, todo: int, done: int) -> str:
    labels = ', '.join(
        f'{len(set(ground.parts[name].labels.tolist()))} to {what}'
        for name, what in (('train', 'meta-train'), ('valid', 'validate'), ('test', 'test'))
    )
    return (
        f'labels: {labels}; {ground.length} tokens a text; {options.episodes} tasks for each of '
        f'{todo} results' + (f', {done} are there' if done else '')
    )
