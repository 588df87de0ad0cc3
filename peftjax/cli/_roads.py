"""What `tune` takes for encoders and what for language models, and their defaults."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Road:
    """The options that one kind of model has for itself, or with a default of its own.

    Attributes:
      name: of the kind.
      defaults: by option; None where there is none.
    """

    name: str
    defaults: Mapping[str, Any]


BOTH = {
    'eval_data': None,
    'eval_part': 0.0,
    'evaluations': 10,
    'tensorboard': False,
    'save_every': 100,
    'resume': False,
}

ENCODER = Road(
    'an encoder',
    {
        'epochs': 8,
        'batch': 8,
        'accumulate': 1,
        'test': None,
        'shots': None,
        'text_column': 'text',
        'label_column': 'label',
        'max_tokens': 64,
        **BOTH,
    },
)
LANGUAGE = Road(
    'a language model',
    {
        'epochs': 3,
        'batch': 8,
        'accumulate': 1,
        'messages_column': 'messages',
        'prompt_column': 'prompt',
        'completion_column': 'completion',
        'text_column': 'text',
        'steps': None,
        'length': 512,
        'pack': None,
        'answer_only': False,
        'too_long': 'refuse',
        'warmup': 0.05,
        'decay': 'cosine',
        'weight_decay': 0.01,
        'dtype': 'float32',
        'quantize': None,
        'embeddings': False,
        'remat': 'names',
        **BOTH,
    },
)


def settle(options: argparse.Namespace, road: Road, other: Road) -> None:
    """Fills in the defaults of one kind of model.

    Args:
      options: as parsed, None where nothing was said; changed.
      road: of the kind that the model is.
      other: of the kind that it is not.

    Raises:
      ValueError: an option was given that only the other kind has.
    """
    for name in other.defaults:
        if name not in road.defaults and getattr(options, name) is not None:
            raise ValueError(
                f'--{name.replace("_", "-")} is for {other.name}; {options.model or "the default"} '
                f'is {road.name}. Leave it out, or choose another --model'
            )
    for name, default in road.defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
