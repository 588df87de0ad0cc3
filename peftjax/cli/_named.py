"""Files and folders as options."""

import argparse
from typing import Any


class Named(argparse.Action):
    """Keeps the name of a file or folder; an empty one, as of an unset variable, names none.

    An action and not a type, since a type is asked of defaults too.
    """

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, _: Any = None):
        if values == '':
            raise argparse.ArgumentError(
                self, "must be the name of a file or folder; got ''. Leave it out, or name one"
            )
        setattr(namespace, self.dest, values)
