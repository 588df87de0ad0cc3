"""What `peftjax meta` takes."""

import argparse
from typing import Any, NoReturn

from peftjax.cli._named import Named
from peftjax.cli._numbers import count, place, positive, seed


def add(sub: argparse.ArgumentParser) -> None:
    """Adds the options of the command.

    Args:
      sub: its parser.
    """
    sub.add_argument(
        '--model', action=Named, default='', help='folder or hub name of a BERT or RoBERTa (MiniLM)'
    )
    sub.add_argument(
        '--max-tokens', type=count, default=64, help='longer texts are cut (%(default)s)'
    )
    for name, what in (
        ('train', 'to meta-train on'),
        ('valid', 'to choose rates and checkpoints on'),
        ('test', 'to judge on'),
    ):
        text = f'jsonl or csv with text and label, {what}; no label in two files'
        sub.add_argument(f'--{name}', required=True, action=Named, metavar='FILE', help=text)
    for name in ('text', 'label'):
        text = 'name of the column (%(default)s)'
        sub.add_argument(f'--{name}-column', default=name, help=text)
    _tasks(sub)
    sub.add_argument(
        '--methods', action=_Methods, help='comma-separated; `list` prints them all and ends (all)'
    )
    sub.add_argument(
        '--beside', default='lora', help='those that others are compared with (%(default)s)'
    )
    _learning(sub)
    sub.add_argument('--seed', type=seed, default=0, help='of all that is drawn (%(default)s)')
    sub.add_argument(
        '--out', action=Named, default='runs/meta', help='folder for the results (%(default)s)'
    )
    sub.add_argument('--overwrite', action='store_true', help='replace earlier results in --out')
    sub.add_argument(
        '--resume',
        action='store_true',
        help='go on with the run in --out: what is there is kept, the rest is done',
    )


def _tasks(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group('tasks')
    group.add_argument('--ways', type=_ways, default='5', help='labels, as 5,10 (%(default)s)')
    group.add_argument(
        '--shots', type=_counts, default='1,5', help='examples of each to adapt on (%(default)s)'
    )
    group.add_argument(
        '--queries', type=count, default=10, help='others to be judged on (%(default)s)'
    )
    group.add_argument('--episodes', type=count, default=200, help='test tasks (%(default)s)')
    group.add_argument(
        '--valid-episodes', type=count, default=20, help='validation tasks (%(default)s)'
    )
    group.add_argument(
        '--sharpness',
        type=positive,
        help='of the heads that tasks begin with (what frozen prototypes do best with)',
    )
    group.add_argument(
        '--steps',
        type=_steps,
        default='0,1,2,5,10,20,50',
        help='on a task, after which it is judged (%(default)s)',
    )


def _learning(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group('meta-training')
    group.add_argument('--meta-steps', type=count, default=300, help='(%(default)s)')
    group.add_argument('--meta-tasks', type=count, default=1, help='tasks of a step (%(default)s)')
    group.add_argument('--meta-rate', type=positive, default=2e-4, help="Adam's rate (%(default)s)")
    group.add_argument(
        '--meta-ways', type=count, help='labels of a task (20, or as many as the files have)'
    )
    for name, what, default in (('shots', 'adapted to', 1), ('queries', 'then judged on', 4)):
        text = f'examples of each that are {what} (%(default)s)'
        group.add_argument(f'--meta-{name}', type=count, default=default, help=text)
    group.add_argument('--inner-steps', type=count, default=5, help='on each task (%(default)s)')


class _Methods(argparse.Action):
    """Keeps the names of methods; `list` prints what there is and ends, as `--help` does."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, _: Any = None):
        if values == 'list':
            _list(parser)
        setattr(namespace, self.dest, values)


def _list(parser: argparse.ArgumentParser) -> NoReturn:
    from peftjax.cli.meta._methods import WAYS

    width = max(map(len, WAYS))
    for way in WAYS.values():
        print(f'{way.name.ljust(width)}  {way.about}')
    parser.exit()


def _counts(text: str) -> list[int]:
    return _different(text, [count(one.strip()) for one in text.split(',')])


def _ways(text: str) -> list[int]:
    found = _counts(text)
    if min(found) < 2:
        raise argparse.ArgumentTypeError(f'must be numbers of labels from 2 up; got {text!r}')
    return found


def _steps(text: str) -> list[int]:
    return sorted(_different(text, [place(one.strip()) for one in text.split(',')]))


def _different(text: str, numbers: list[int]) -> list[int]:
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f'must be different numbers; got {text!r}')
    return numbers
