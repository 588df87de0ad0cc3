"""What a command shows while it runs."""

from typing import Any


def progress(total: int) -> Any:
    """A progress bar on a terminal; elsewhere only the lines that are written.

    Args:
      total: how many steps there will be.

    Returns:
      A `tqdm` bar, a context manager.
    """
    from tqdm import tqdm

    return tqdm(total=total, unit='step', dynamic_ncols=True, disable=None, leave=False)


def say(text: str) -> None:
    """Prints at once, also into a pipe."""
    print(text, flush=True)
