"""What the commands take."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from peftjax.cli import _config, _distributed, _folder_options, _mesh, _method_options
from peftjax.cli._named import Named
from peftjax.cli._numbers import count, part, positive, seed
from peftjax.cli.language import _options as language
from peftjax.cli.meta import _options as meta


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options that arguments stand for, those of a `--config` file among them.

    Args:
      arguments: without the program's name.

    Returns:
      The options.

    Raises:
      SystemExit: with 0 after `--help`, with 2 where the arguments or the file make no sense.
    """
    whole, commands = _parsers()
    name, *typed = arguments or ['--help']
    if name not in commands:
        return whole.parse_args(arguments)
    sub, found = commands[name], []
    if name in WITH_FILE:
        try:
            found = _config.from_file(sub, typed)
        except (ValueError, OSError) as error:
            sub.error(str(error))
    # the command's own parser takes texts after options, which the one of all commands does not
    return sub.parse_intermixed_args([*found, *typed], argparse.Namespace(command=name))


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    return _parsers()[0]


WITH_FILE = ('compare', 'tune', 'meta')
"""The commands that take `--config`: those whose `--out` is the folder of a run."""


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the whole command line, and those of its commands."""
    whole = argparse.ArgumentParser(
        prog='peftjax', description='Parameter-efficient fine-tuning for any JAX function.'
    )
    commands = whole.add_subparsers(dest='command', required=True, metavar='command')
    for add in (_compare, _meta, _tune, _predict, _generate, _inspect, *_folder_options.COMMANDS):
        add(commands)
    for name in WITH_FILE:
        _config.add_option(commands.choices[name])
    return whole, commands.choices


def _compare(commands: Any) -> None:
    about = 'compare ways of adapting an encoder on a few labeled examples'
    sub = commands.add_parser('compare', help=about, description=about)
    _model(sub)
    _examples(sub)
    sub.add_argument(
        '--shots', type=count, default=10, help='training examples of each label (%(default)s)'
    )
    sub.add_argument(
        '--seeds', type=_seeds, default='0,1,2', help='comma-separated numbers (%(default)s)'
    )
    _training(sub)
    sub.add_argument(
        '--methods', action=_Methods, help='comma-separated; `list` prints them all and ends'
    )
    sub.add_argument(
        '--out', action=Named, default='runs/compare', help='folder for the results (%(default)s)'
    )
    sub.add_argument('--overwrite', action='store_true', help='replace earlier results in --out')


def _meta(commands: Any) -> None:
    about = 'compare ways of learning new labels from a few examples, meta-learned ones among them'
    meta.add(commands.add_parser('meta', help=about, description=about))


def _tune(commands: Any) -> None:
    about = 'adapt an encoder or a language model by one method and save the adapter'
    sub = commands.add_parser('tune', help=about, description=about)
    sub.add_argument(
        '--model',
        action=Named,
        default='',
        help='folder or hub name of an encoder or language model (MiniLM)',
    )
    sub.add_argument(
        '--train',
        '--data',
        action=Named,
        help='jsonl or csv with text and label (the shipped messages); for language models jsonl '
        'with messages, prompt and completion, or text',
    )
    sub.add_argument('--method', action=_Methods, default='lora', help=_METHODS)
    sub.add_argument('--rate', type=positive, help="learning rate (the method's own)")
    sub.add_argument('--epochs', type=count, help='passes over the examples (8; language 3)')
    sub.add_argument('--batch', type=count, help='rows of one step (8)')
    sub.add_argument(
        '--accumulate',
        type=count,
        metavar='PARTS',
        help='compute them in so many parts, one after the other, for less memory (1)',
    )
    sub.add_argument('--mesh', type=_mesh.checked, metavar='AXES', help=_mesh.ABOUT)
    sub.add_argument(
        '--seed', type=seed, default=0, help='of sampling, order and dropout (%(default)s)'
    )
    sub.add_argument(
        '--out',
        action=Named,
        required=True,
        help='folder for the adapter, what was measured, and a picture',
    )
    sub.add_argument('--overwrite', action='store_true', help='replace an earlier run in --out')
    sub.add_argument('--text-column', help='name of the column (text)')
    sub.add_argument(
        '--eval-data', action=Named, metavar='FILE', help='like --data, to evaluate on'
    )
    sub.add_argument(
        '--eval-part', type=part, metavar='PART', help='or a part of --data, held back (0)'
    )
    sub.add_argument('--evaluations', type=count, help='how often, evenly spread (10)')
    sub.add_argument('--save-every', type=count, help='steps between checkpoints (100)')
    _switch(sub, '--resume', 'go on with the run in --out where it was cut off')
    _switch(sub, '--tensorboard', 'write for TensorBoard too')
    _method_options.add(sub)
    _distributed.add(sub)
    _tune_encoder(sub)
    language.add_tune(sub, count)


def _switch(sub: argparse.ArgumentParser, name: str, text: str) -> None:
    sub.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=text)


def _tune_encoder(sub: argparse.ArgumentParser) -> None:
    """What `tune` takes for an encoder; None stands for what was not asked for."""
    group = sub.add_argument_group('for encoders')
    group.add_argument('--test', action=Named, help='file like --train, with the same labels')
    group.add_argument(
        '--shots', type=count, help='take only so many examples of each label (all of them)'
    )
    group.add_argument('--label-column', help='name of the column (label)')
    group.add_argument('--max-tokens', type=count, help='longer texts are cut (64)')


def _generate(commands: Any) -> None:
    about = 'continue prompts with a language model and a saved adapter'
    sub = commands.add_parser('generate', help=about, description=about)
    language.add_generate(sub, count)


def _predict(commands: Any) -> None:
    about = 'label new text with a saved adapter'
    sub = commands.add_parser('predict', help=about, description=about)
    sub.add_argument('adapter', action=Named, help='folder that tune or compare left')
    sub.add_argument('text', nargs='*', help='texts to label; otherwise --file or standard input')
    sub.add_argument('--file', action=Named, help='one text a line')
    sub.add_argument(
        '--model', action=Named, help='folder or hub name of the model, where it has moved'
    )
    sub.add_argument('--any-base', action='store_true', help='take a model of other weights')


def _inspect(commands: Any) -> None:
    about = "print a model's sites or an adapter's content"
    sub = commands.add_parser('inspect', help=about, description=about)
    sub.add_argument(
        'what',
        action=Named,
        nargs='?',
        help='folder of a model or of an adapter, or hub name (MiniLM)',
    )


def _model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        '--model', action=Named, default='', help='folder or hub name of a BERT or RoBERTa (MiniLM)'
    )
    sub.add_argument(
        '--max-tokens', type=count, default=64, help='longer texts are cut (%(default)s)'
    )


def _examples(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        '--train',
        '--data',
        action=Named,
        help='jsonl or csv with text and label (the shipped messages)',
    )
    sub.add_argument('--test', action=Named, help='likewise, with the same labels')
    sub.add_argument('--text-column', default='text', help='name of the column (%(default)s)')
    sub.add_argument('--label-column', default='label', help='name of the column (%(default)s)')


def _training(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        '--epochs', type=count, default=8, help='passes over the examples (%(default)s)'
    )
    sub.add_argument('--batch', type=count, default=8, help='examples of one step (%(default)s)')


_METHODS = '`list` prints them all and ends (%(default)s)'


class _Methods(argparse.Action):
    """Keeps the names of methods; `list` prints what there is and ends, as `--help` does."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, _: Any = None):
        if values == 'list':
            _list_methods(parser)
        setattr(namespace, self.dest, values)


def _list_methods(parser: argparse.ArgumentParser) -> NoReturn:
    from peftjax.cli._recipes import DEFAULT, RECIPES
    from peftjax.cli.language._recipes import RECIPES as LANGUAGE

    def show(recipes: Any, marked: Sequence[str]) -> None:
        width = max(map(len, recipes))
        for recipe in recipes.values():
            mark = '*' if recipe.name in marked else ' '
            print(f'{mark} {recipe.name.ljust(width)}  {recipe.about}')

    show(RECIPES, DEFAULT)
    print('* what compare runs unless told otherwise')
    if parser.prog.endswith(' tune'):
        print('\nfor language models:')
        show(LANGUAGE, ())
    parser.exit()


def _seeds(text: str) -> list[int]:
    seeds = [seed(one.strip()) for one in text.split(',')]
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f'must be different numbers; got {text!r}')
    return seeds
