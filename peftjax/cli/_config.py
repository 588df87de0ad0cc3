"""A TOML file of options: read in front of the command line, written beside the results.

What the file says becomes arguments that stand before those that were typed, so that it is checked
as they are, and they win.
"""

import argparse
import difflib
import json
import pathlib
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from peftjax.cli import _whole
from peftjax.cli._named import Named

FILE = 'options.toml'
UNSAID = ('command', 'config', 'overwrite', 'resume', 'coordinator', 'process')
"""What a written file leaves out: how a run was asked for, and what became of an earlier one."""


def add_option(sub: argparse.ArgumentParser) -> None:
    """Adds `--config` to a command."""
    sub.add_argument(
        '--config',
        action=Named,
        metavar='FILE',
        help='TOML file of options; those typed beside it win',
    )


def from_file(sub: argparse.ArgumentParser, typed: Sequence[str]) -> list[str]:
    """The arguments that a typed `--config` stands for.

    Args:
      sub: the parser of the command.
      typed: its arguments.

    Returns:
      Arguments to put before the typed ones.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not TOML, or says what the command does not take.
    """
    finder = argparse.ArgumentParser(prog=sub.prog, add_help=False)
    add_option(finder)
    named = finder.parse_known_args(typed)[0].config
    if named is None:
        return []
    taken: dict[str, argparse.Action] = {}
    for action in sub._actions:
        names = [name.removeprefix('--') for name in action.option_strings if name[:2] == '--']
        taken.update(dict.fromkeys(names, action))
    for name in ('help', 'config'):
        taken.pop(name, None)
    found: list[str] = []
    for key, value in read(pathlib.Path(named)).items():
        if key not in taken:
            raise ValueError(f'{named}: {sub.prog} has no option {key!r}. {_nearest(key, taken)}')
        found += _arguments(f'{named}: {key}', key, value, taken[key])
    return found


def write(path: pathlib.Path, options: argparse.Namespace) -> None:
    """Writes the options of a run, so that `--config` with this file runs it again.

    Args:
      path: of the file.
      options: as parsed, defaults filled in; None stands for what was not asked for.

    Raises:
      ValueError: an option that TOML cannot hold.
    """
    said = {k: v for k, v in vars(options).items() if k not in UNSAID and v is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    header = f'# peftjax {options.command} --config {FILE}\n'
    _whole.write(path, header + text(said))


def text(options: Mapping[str, Any]) -> str:
    r"""Options as TOML, one a line.

    Args:
      options: by name; texts, numbers, booleans, or lists of them.

    Returns:
      The text of a file.

    Raises:
      ValueError: a value of another kind.

    Example:
      >>> print(text({'out': 'runs/"a"', 'max_tokens': 8, 'rate': 1e-3, 'pack': True}), end='')
      out = "runs/\"a\""
      max-tokens = 8
      rate = 0.001
      pack = true
    """
    lines = (
        f'{name.replace("_", "-")} = {_value(name, value)}\n' for name, value in options.items()
    )
    return ''.join(lines)


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's too; TOML wants one more character escaped.
        return json.dumps(value, ensure_ascii=False).replace('\x7f', '\\u007f')
    if isinstance(value, list | tuple) and not any(isinstance(one, list | tuple) for one in value):
        return f'[{", ".join(_value(name, one) for one in value)}]'
    raise ValueError(
        f'an option must be text, a number, true or false, or a list; {name}={value!r}'
    )


def read(path: pathlib.Path) -> dict[str, Any]:
    """What a file says, by option.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not TOML in UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f'no such file: {path}')
    try:
        return tomllib.loads(path.read_text(encoding='utf-8-sig'))
    except ValueError as error:
        raise ValueError(f'{path} must be TOML in UTF-8: {error}') from error


def _nearest(key: str, taken: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key.replace('_', '-'), taken, n=1, cutoff=0.5)
    return f'Did you mean {close[0]!r}?' if close else f'There are: {", ".join(sorted(taken))}'


def _arguments(where: str, key: str, value: Any, action: argparse.Action) -> list[str]:
    """A key and its value as they would be typed."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f'{where} must be true or false; got {value!r}')
        no = f'--no-{key}'
        return [f'--{key}'] if value else [no] if no in action.option_strings else []
    if value == '' == action.default:  # as written where no model was named
        return []
    parts = value if isinstance(value, list) else [value]
    if any(isinstance(part, bool) or not isinstance(part, str | int | float) for part in parts):
        raise ValueError(f'{where} must be text, a number, or a list of them; got {value!r}')
    if action.nargs == '+':
        return [f'--{key}', *map(str, parts)]
    return [f'--{key}={",".join(map(str, parts))}']
