"""What JAX compiles meanwhile, as it says by itself."""

import contextlib
import logging
import re
from collections.abc import Iterator

import jax

SAID = re.compile(r'Finished XLA compilation of (\S+)')


@contextlib.contextmanager
def compiled() -> Iterator[list[str]]:
    """A list that gets the name of each function that is compiled."""
    names: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if found := SAID.search(record.getMessage()):
                names.append(found[1])

    log, listener = logging.getLogger('jax'), Listener()
    log.addHandler(listener)
    try:
        with jax.log_compiles():
            yield names
    finally:
        log.removeHandler(listener)
