"""Errors in the words of the command line: the library's mends are its arguments, here options."""

import argparse

OPTIONS = {
    'pass allow_other_base=True': 'pass --any-base',
    'print(pj.sites(...)) lists them': 'peftjax inspect lists them',
    "format='adapterhub'": '--format adapterhub',
    "say too_long='cut' or 'drop'": 'say --too-long cut or drop',
    "(prompt='question')": '(--prompt-column question)',
    'or answers_only=False': 'or leave --answer-only out',
    'or set answers_only=False': 'or leave --answer-only out',
    'Truncate the text, or pass position_ids': 'Lower --max-tokens or --virtual-tokens',
    'Pass fall_back=True to take': 'Remove the folder of that step to take',
    'Pass strict=False to ignore them': 'Pass --lenient to ignore them',
    'strict=False to ignore them': '--lenient to ignore them',
}
"""What the library says, and what it is called on the command line."""


SIZES = ('max_tokens', 'length', 'batch')
"""Options that memory grows with."""


def too_large(error: RuntimeError, options: argparse.Namespace) -> str:
    """The message where a device has no room for what options ask for.

    Args:
      error: of XLA.
      options: as parsed.
    """
    sizes = [name for name in SIZES if getattr(options, name, None) is not None]
    said = ', '.join(f'--{name.replace("_", "-")} {getattr(options, name)}' for name in sizes)
    said = f'{said} need' if said else 'the model needs'
    mend = f'Lower {" or ".join("--" + n.replace("_", "-") for n in sizes)}' if sizes else (
        'Take a smaller one')  # fmt: skip
    first = str(error).splitlines()[0]
    return f'what is computed must fit into memory; {said} more ({first:.200}). {mend}'


def told(error: Exception) -> str:
    """The message of an error.

    Args:
      error: of the library, of the system, or of a command.

    Returns:
      Text in the words of the command line.

    Example:
      >>> told(ValueError('Load that base, or pass allow_other_base=True'))
      'Load that base, or pass --any-base'
      >>> told(FileExistsError(17, 'File exists', 'runs'))
      "File exists: 'runs'"
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f'{error.strerror}: {error.filename!r}'
    for said, meant in OPTIONS.items():
        text = text.replace(said, meant)
    return text
