"""Files written whole or not at all: a run that is killed leaves no half of one."""

import pathlib


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file; an earlier one stays until its successor is there.

    Args:
      path: of the file.
      text: all of it.
    """
    part = path.with_name(f'.{path.name}.part')
    part.write_text(text, encoding='utf-8')
    part.replace(path)
