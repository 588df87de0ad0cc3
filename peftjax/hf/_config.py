"""Reads `adapter_config.json` of anyone's making: every key is used, listed or refused."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftjax._manifest import CheckpointError

NAME = 'adapter_config.json'
LARGEST = 2**22
"""Bytes; real ones have a few thousand."""

NOTHING = (None, False, 0, '', [], {})
"""Values by which an unknown key says that it is not used."""


def read_config(folder: Path, name: str = NAME) -> dict[str, Any]:
    """The content of a configuration in a folder.

    Raises:
      FileNotFoundError: there is none.
      CheckpointError: it is not a JSON object in UTF-8 of reasonable size and depth.
    """
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(
            f'a folder with an adapter must hold {name}; {str(folder)!r} does not'
        )
    if path.stat().st_size > LARGEST:
        raise CheckpointError(
            f'{str(path)!r} must be a configuration; it has {path.stat().st_size:,} bytes, more '
            f'than {LARGEST:,}. Take another copy'
        )
    try:
        found = json.loads(path.read_bytes().decode('utf-8'))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f'{str(path)!r} must hold JSON; reading it ended with: {error}. Take another copy'
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f'{str(path)!r} must hold a JSON object; got {found!r:.80}')
    return found


class Fields:
    """A configuration that remembers which of its keys were asked for.

    Args:
      config: the configuration.
      where: its file, for messages.
    """

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config, self.where = config, where
        self._asked: set[str] = set()

    def value(self, key: str, default: Any = None) -> Any:
        """A value as it stands, or the default where it is missing or null."""
        self._asked.add(key)
        found = self.config.get(key)
        return default if found is None else found

    def integer(self, key: str, default: Any = None) -> int:
        """A positive integer."""
        found = self.value(key, default)
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise self.wrong(key, 'a positive integer', found)
        return found

    def number(self, key: str, default: Any = None) -> float:
        """A finite number."""
        found = self.value(key, default)
        if not _is_number(found):
            raise self.wrong(key, 'a finite number', found)
        return found

    def flag(self, key: str) -> bool:
        """True or false; false where it is missing."""
        found = self.value(key, False)
        if not isinstance(found, bool):
            raise self.wrong(key, 'true or false', found)
        return found

    def text(self, key: str, default: str | None = None) -> Any:
        """A string."""
        found = self.value(key, default)
        if found is not None and not isinstance(found, str):
            raise self.wrong(key, 'a string', found)
        return found

    def names(self, key: str) -> tuple[str, ...] | str:
        """Names of modules, or one regular expression; nothing where it is missing."""
        found = self.value(key, ())
        if isinstance(found, str):
            self._compiled(key, found)
            return found
        if not isinstance(found, list | tuple) or not all(isinstance(n, str) for n in found):
            raise self.wrong(key, 'a string or a list of strings', found)
        return tuple(found)

    def integers(self, key: str) -> tuple[int, ...]:
        """Integers, or one; nothing where it is missing."""
        found = self.value(key, ())
        found = [found] if isinstance(found, int) else found
        if not isinstance(found, list | tuple) or not all(type(n) is int for n in found):
            raise self.wrong(key, 'an integer or a list of integers', found)
        return tuple(found)

    def patterns(self, key: str) -> dict[str, Any]:
        """Regular expressions with a positive number each."""
        found = self.value(key, {})
        if not isinstance(found, dict) or not all(_is_number(v) and v > 0 for v in found.values()):
            raise self.wrong(key, 'an object of positive numbers', found)
        for pattern in found:
            self._compiled(key, pattern)
        return found

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Refuses keys that are set to something, each for its reason.

        Raises:
          ValueError: one is set.
        """
        for key, reason in reasons.items():
            if not _is_nothing(found := self.value(key)):
                raise ValueError(
                    f'{self.where}: {key}={found!r:.80} cannot be represented: {reason}'
                )

    def rest(self) -> dict[str, Any]:
        """The keys that nobody asked for, except those that are set to nothing."""
        left = {key: v for key, v in self.config.items() if key not in self._asked}
        return {key: v for key, v in left.items() if not _is_nothing(v)}

    def wrong(self, key: str, wanted: str, found: Any) -> CheckpointError:
        """The error for a value of the wrong kind."""
        return CheckpointError(
            f'{self.where}: {key!r} must be {wanted}; got {found!r:.80}. Correct it'
        )

    def _compiled(self, key: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise self.wrong(key, f'regular expressions ({error})', pattern) from error


def whole(number: float) -> float:
    """A number, whole where it is but for rounding."""
    return round(number) if abs(number - round(number)) < 1e-9 * abs(number) else number


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_nothing(value: Any) -> bool:
    return any(type(value) is type(nothing) and value == nothing for nothing in NOTHING)
