"""The command line: `compare`, `meta`, `tune`, `predict`, `generate`, `inspect`, `plan`, …"""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from peftjax._processes import ElsewhereError
from peftjax.cli import _distributed
from peftjax.cli._options import parse
from peftjax.cli._wording import told, too_large

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ended, as shells have it."""


MEMORY = 'RESOURCE_EXHAUSTED'
"""What XLA says where a device has no room; importing JAX for its error would take a second."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: without the program's name; by default those of the process, which Ctrl-C then
        ends at once.

    Returns:
      The exit code: 0; 1 where the reader of the output went away; 2 where the request could not be
      carried out; 130 after Ctrl-C.

    Raises:
      SystemExit: with 0 after `--help`, with 2 where the arguments make no sense.
    """
    typed = sys.argv[1:] if arguments is None else arguments
    options = parse(typed)
    if _distributed.is_launch(options):
        return _distributed.launch(typed, options.processes)
    try:
        command = importlib.import_module(f'peftjax.cli._{options.command}')
        importlib.import_module('peftjax.cli._opened').check_model(getattr(options, 'model', None))
        return command.run(options)
    except BrokenPipeError:
        # What is still to be flushed at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ElsewhereError) as error:
        print(f'peftjax {options.command}: error: {told(error)}', file=sys.stderr)
        return 2
    except RuntimeError as error:
        if MEMORY not in str(error):
            raise
        print(f'peftjax {options.command}: error: {too_large(error, options)}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'peftjax {options.command}: interrupted', file=sys.stderr)
        if arguments is None:
            _end(INTERRUPTED)
        return INTERRUPTED


def _end(code: int) -> NoReturn:
    """Ends the process as it stands: torn down in the middle of its work, XLA may crash."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
