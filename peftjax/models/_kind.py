"""Which kind of model a folder holds."""

from typing import Literal, get_args

from peftjax.models._checkpoint import read_json
from peftjax.models._config import ModelType
from peftjax.models._families import FAMILIES
from peftjax.models._hub import model_folder


def model_kind(path_or_hub_name: str) -> Literal['encoder', 'decoder']:
    """Tells an encoder from a decoder language model, by `model_type` in its `config.json`.

    Args:
      path_or_hub_name: a folder, or `owner/name` on the hub.

    Returns:
      Which of `load_encoder` and `load_decoder` loads it.

    Raises:
      FileNotFoundError: no such folder, or no config.json in it.
      ConnectionError: the hub does not give the model.
      ValueError: a model of another type.

    Example:
      >>> from peftjax.models import default_model_path
      >>> model_kind(default_model_path())  # doctest: +SKIP
      'encoder'
    """
    folder = model_folder(path_or_hub_name)
    found = read_json(folder / 'config.json').get('model_type')
    if found in FAMILIES:
        return 'decoder'
    if found in get_args(ModelType):
        return 'encoder'
    raise ValueError(
        f'{folder / "config.json"}: model_type must be one of {sorted(FAMILIES)} for language '
        f'models or of {sorted(get_args(ModelType))} for encoders, got {found!r}'
    )
