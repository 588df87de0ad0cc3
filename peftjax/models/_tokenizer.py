"""The tokenizer of a Hugging Face folder, without padding or truncation of its own."""

import os
import pathlib
import shutil
from typing import TYPE_CHECKING

from peftjax.models._hub import model_folder

if TYPE_CHECKING:
    import tokenizers


_FILES = (
    'tokenizer*',
    'vocab.*',
    'merges.txt',
    'special_tokens_map.json',
    'added_tokens.json',
    'chat_template*',
    'generation_config.json',
)


def copy_tokenizer(source: str | os.PathLike[str], target: pathlib.Path) -> None:
    """Carries what goes with a model, but for its config and weights, from folder to folder.

    Args:
      source: a model's folder.
      target: another.
    """
    for pattern in _FILES:
        for path in pathlib.Path(source).glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def load_tokenizer(path_or_hub_name: str | os.PathLike[str]) -> 'tokenizers.Tokenizer':
    """Loads a tokenizer that neither pads nor truncates, whatever its file bakes in.

    Args:
      path_or_hub_name: a folder, or `owner/name` on the hub. `tokenizer.json` is read directly;
        folders that hold only vocabulary files go through transformers.

    Returns:
      A `tokenizers.Tokenizer`; `encode(text).ids` are the token ids with special tokens.

    Raises:
      FileNotFoundError: no such folder.
      ConnectionError: the hub does not give the model.
      ValueError: the folder holds no tokenizer that can be read.

    Example:
      >>> load_tokenizer(default_model_path()).encode('hello').ids  # doctest: +SKIP
      [101, 7592, 102]
    """
    folder = model_folder(path_or_hub_name)
    file = folder / 'tokenizer.json'
    try:
        if file.is_file():
            import tokenizers

            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        else:
            import transformers

            fast = transformers.AutoTokenizer.from_pretrained(str(folder), use_fast=True)
            tokenizer = fast.backend_tokenizer
    except Exception as error:  # both libraries raise bare Exceptions
        raise ValueError(
            f'{folder} must hold a tokenizer.json, or vocabulary files that transformers reads: '
            f'{error}.'
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
