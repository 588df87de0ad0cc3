"""What the commands take for decoder language models."""

import argparse
from typing import Any

from peftjax.cli._named import Named
from peftjax.cli._numbers import from_zero, part, seed, share

QUANTIZED = ('nf4', 'int4', 'int8')
DTYPES = ('float32', 'bfloat16')
EMBEDDINGS = 'and with them the token embedding and the head'


def add_tune(sub: argparse.ArgumentParser, count: Any) -> None:
    """Adds what `tune` takes for a language model; None stands for what was not asked for.

    Args:
      sub: the parser of the command.
      count: type of an option that counts.
    """
    group = sub.add_argument_group('for language models')
    for name in ('messages', 'prompt', 'completion'):
        group.add_argument(f'--{name}-column', help=f'name of the column ({name})')
    group.add_argument('--steps', type=count, help='end after so many steps, whatever --epochs')
    group.add_argument('--length', type=count, help='tokens of a row (512)')
    _switch(group, '--pack', 'several examples in a row (where the method can)')
    _switch(group, '--answer-only', 'learn answers and completions alone (every token)')
    group.add_argument(
        '--too-long', choices=('refuse', 'cut', 'drop'), help='examples over --length (refuse)'
    )
    group.add_argument('--warmup', type=part, metavar='PART', help='of the steps (0.05)')
    group.add_argument(
        '--decay', choices=('cosine', 'linear', 'none'), help='of the rate after it (cosine)'
    )
    group.add_argument('--weight-decay', type=from_zero, help='on all that is trained (0.01)')
    _model(group)
    group.add_argument(
        '--remat', choices=('none', 'full', 'names'), help='what a gradient keeps (names)'
    )


def add_generate(sub: argparse.ArgumentParser, count: Any) -> None:
    """Adds what `generate` takes.

    Args:
      sub: the parser of the command.
      count: type of an option that counts.
    """
    sub.add_argument(
        'adapter', action=Named, nargs='?', help='folder that tune left; none with --model'
    )
    sub.add_argument('prompt', nargs='*', help='otherwise --file or standard input')
    sub.add_argument('--file', action=Named, help='one prompt a line')
    sub.add_argument(
        '--model', action=Named, help='folder or hub name: alone, or where the base has moved'
    )
    sub.add_argument('--any-base', action='store_true', help='take a model of other weights')
    sub.add_argument(
        '--chat', action='store_true', help="prompts through the model's chat template"
    )
    sub.add_argument('--plain', action='store_true', help='print the texts alone, not as JSON')
    sub.add_argument(
        '--max-tokens', type=count, default=128, help='the most that follows (%(default)s)'
    )
    sub.add_argument('--temperature', type=from_zero, help='0 takes the likeliest token (0)')
    sub.add_argument('--top-k', type=count, help='draw from so many of the likeliest tokens')
    sub.add_argument('--top-p', type=share, help='draw from the likeliest of this probability')
    sub.add_argument('--seed', type=seed, default=0, help='of drawing (%(default)s)')
    sub.add_argument('--batch', type=count, default=8, help='prompts at once (%(default)s)')
    _model(sub)


def _model(sub: Any) -> None:
    sub.add_argument('--dtype', choices=DTYPES, help='of the base (float32)')
    sub.add_argument('--quantize', choices=QUANTIZED, help='the linear layers of the base')
    _switch(sub, '--embeddings', EMBEDDINGS)


def _switch(sub: Any, name: str, text: str) -> None:
    sub.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=text)
