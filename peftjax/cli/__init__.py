"""The command line: `peftjax compare`, `tune`, `predict`, `inspect`."""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    'compare': 'compare ways of adapting an encoder on a few labeled examples',
    'tune': 'adapt an encoder by one method and save the adapter',
    'predict': 'label new text with a saved adapter',
    'inspect': "print a model's sites or an adapter's content",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: without the program's name; by default those of the process.

    Returns:
      The exit code: 0, or 2 where the request could not be carried out.
    """
    options = parser().parse_args(arguments)
    command = importlib.import_module(f'peftjax.cli._{options.command}')
    try:
        return command.run(options)
    except (ValueError, TypeError, OSError) as error:
        print(f'peftjax {options.command}: error: {error}', file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    whole = argparse.ArgumentParser(
        prog='peftjax', description='Parameter-efficient fine-tuning for any JAX function.'
    )
    commands = whole.add_subparsers(dest='command', required=True, metavar='command')
    for name, about in COMMANDS.items():
        sub = commands.add_parser(name, help=about, description=about)
        globals()[f'_{name}'](sub)
    return whole


def _compare(sub: argparse.ArgumentParser) -> None:
    _model(sub)
    _examples(sub)
    _training(sub)
    sub.add_argument('--shots', type=_positive, default=10, help='training examples of each label')
    sub.add_argument(
        '--seeds', type=_seeds, default=[0, 1, 2], help='comma-separated, e.g. 0,1,2,3,4'
    )
    sub.add_argument('--methods', help='comma-separated; `list` names them all')
    sub.add_argument('--out', default='runs/compare', help='folder for the results')
    sub.add_argument('--overwrite', action='store_true', help='replace earlier results in --out')


def _tune(sub: argparse.ArgumentParser) -> None:
    _model(sub)
    _examples(sub)
    _training(sub)
    sub.add_argument('--method', default='lora', help='see peftjax compare --methods list')
    sub.add_argument('--shots', type=_positive, help='take only so many examples of each label')
    sub.add_argument('--seed', type=int, default=0, help='of sampling, order and dropout')
    sub.add_argument('--rate', type=float, help="learning rate instead of the method's own")
    sub.add_argument('--out', required=True, help='folder for the adapter')
    sub.add_argument('--overwrite', action='store_true', help='replace an earlier adapter in --out')


def _predict(sub: argparse.ArgumentParser) -> None:
    sub.add_argument('adapter', help='folder that tune or compare left')
    sub.add_argument('text', nargs='*', help='texts to label; otherwise --file or standard input')
    sub.add_argument('--file', help='one text a line')
    sub.add_argument('--model', help='folder or hub name, where it has moved')
    sub.add_argument('--any-base', action='store_true', help='take a base of other weights')


def _inspect(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        'what', nargs='?', help='model folder, hub name or adapter folder; by default the model'
    )


def _model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        '--model', default='', help='folder or hub name of a BERT or RoBERTa; default: MiniLM'
    )
    sub.add_argument('--max-tokens', type=_positive, default=64, help='longer texts are cut')


def _examples(sub: argparse.ArgumentParser) -> None:
    sub.add_argument('--train', help='jsonl or csv with text and label; default: the shipped set')
    sub.add_argument('--test', help='likewise')
    sub.add_argument('--text-column', default='text', help='name of the column with texts')
    sub.add_argument('--label-column', default='label', help='name of the column with labels')


def _training(sub: argparse.ArgumentParser) -> None:
    sub.add_argument('--epochs', type=_positive, default=20, help='passes over the examples')
    sub.add_argument('--batch', type=_positive, default=16, help='examples of one step')


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {value}')
    return value


def _seeds(text: str) -> list[int]:
    seeds = [int(part) for part in text.split(',')]
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise argparse.ArgumentTypeError(f'must be different numbers from 0 up, got {text!r}')
    return seeds
