"""`peftjax quantize`: a decoder's linear layers in 4 or 8 bits, as a folder."""

import argparse

from peftjax import models
from peftjax.cli import _adapters
from peftjax.cli._terminal import say
from peftjax.cli.language._task import SCHEMES


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    _adapters.check_absent(options.out)
    made = models.quantize_decoder(
        options.model, options.out, SCHEMES[options.scheme], target=options.target
    )
    width = max(map(len, made.errors))
    for path, error in made.errors.items():
        say(f'{path.ljust(width)}  {100 * error:.3g} % of the norm changed')
    say(f'{made.before:,} bytes before, {made.after:,} after ({made.after / made.before:.3f}); '
        f'written to {options.out}')  # fmt: skip
    return 0
