"""`peftjax quantize`: a decoder's linear layers in 4 or 8 bits, as a folder."""

import argparse
import re

from peftjax import models
from peftjax.cli import _adapters
from peftjax.cli._terminal import say
from peftjax.cli.language._task import SCHEMES


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    _adapters.check_absent(options.out)
    config = models.decoder_config(options.model)
    linears, tables = models.linears(config), models.embeddings(config)
    target = linears if options.target is None else options.target
    made = models.quantize_decoder(
        options.model,
        options.out,
        SCHEMES[options.scheme],
        target=(target, tables) if options.embeddings else target,
    )
    width = max(map(len, made.errors))
    for path, error in made.errors.items():
        say(f'{path.ljust(width)}  {100 * error:.3g} % of the norm changed')
    say(f'{made.before:,} bytes before, {made.after:,} after ({made.after / made.before:.3f}); '
        f'written to {options.out}')  # fmt: skip
    _mention([path for path in made.sizes if re.search(tables, path)], made)
    return 0


def _mention(tables: list[str], made: models.QuantizedFolder) -> None:
    """Says what share the vocabulary takes where it was left as it was."""
    dense = [path for path in tables if path not in made.errors]
    if dense:
        size = sum(made.sizes[path] for path in dense)
        say(f'{" and ".join(dense)} as they were, {size:,} bytes of these '
            f'({100 * size / made.after:.0f} %): --embeddings quantizes them too')  # fmt: skip
