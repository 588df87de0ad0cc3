"""The ways of adapting a decoder language model that the commands know.

Targets follow the names in the model's configuration, so that one recipe serves all families. The
learning rates are those of the papers and of common practice, to begin with; they were not tuned.
"""

import argparse
import dataclasses
from collections.abc import Callable

from peftjax import (
    HOULSBY,
    BitFit,
    Dora,
    Ia3,
    Lora,
    Method,
    NormTuning,
    PrefixTuning,
    PromptTuning,
    Trainable,
)
from peftjax.cli import _method_options
from peftjax.models import DecoderConfig, linears


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way of adapting a decoder.

    Attributes:
      name: on the command line.
      about: one line of help.
      build: the method for a model.
      rate: learning rate.
    """

    name: str
    about: str
    build: Callable[[DecoderConfig], Method]
    rate: float


def attention(config: DecoderConfig) -> str:
    """The layers that make queries and values; where one makes all three, that one."""
    names = config.names
    return _layers(names.attention, names.query_key_value or f'{names.query}|{names.value}')


def _layers(home: str, names: str) -> str:
    return rf'/{home}/({names})/kernel$'


def _ia3(config: DecoderConfig) -> Method:
    """Keys, values (with queries where one layer makes all) and what enters the last of the MLP."""
    names = config.names
    mlp = rf'{names.mlp}/{names.experts}' if names.router else names.mlp
    inner = _layers(mlp, names.down)
    mixing = _layers(names.attention, names.query_key_value or f'{names.key}|{names.value}')
    return Ia3(target=(mixing, inner), feedforward=inner)


def _bottleneck(config: DecoderConfig) -> Method:
    del config  # every decoder names its values alike
    return dataclasses.replace(HOULSBY, initial='identity')


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe('lora', 'LoRA, rank 8, on all linear layers',
               lambda config: Lora(target=linears(config), rank=8, alpha=16), 2e-4),
        Recipe('lora-attention', 'LoRA, rank 8, on query and value',
               lambda config: Lora(target=attention(config), rank=8, alpha=16), 5e-4),
        Recipe('dora', 'DoRA, rank 8, on all linear layers',
               lambda config: Dora(target=linears(config), rank=8, alpha=16), 2e-4),
        Recipe('ia3', 'rescaled keys, values and inner layer of the MLP', _ia3, 3e-3),
        Recipe('prompt', 'prompt tuning, 20 virtual tokens',
               lambda config: PromptTuning(length=20), 3e-2),
        Recipe('prefix', 'prefix tuning, 20 virtual tokens, direct',
               lambda config: PrefixTuning(length=20, deviation=0.1), 1e-2),
        Recipe('adapter', 'bottleneck adapters after attention and MLP (Houlsby)',
               _bottleneck, 3e-4),
        Recipe('bitfit', 'biases only, where the model has any', lambda config: BitFit(), 1e-3),
        Recipe('norms', 'norms only', lambda config: NormTuning(), 1e-3),
        Recipe('full', 'full fine-tuning', lambda config: Trainable(target='.'), 2e-5),
    )
}  # fmt: skip
"""All recipes by name."""


def settle(options: argparse.Namespace, config: DecoderConfig) -> Method:
    """The method that options ask for; fills in its numbers that they leave open.

    Args:
      options: as parsed, with the `method`; changed.
      config: of the model.

    Raises:
      ValueError: there is no such method, or it does not take an option that was given.
    """
    name = chosen(options.method).name
    methods = {recipe.name: recipe.build(config) for recipe in RECIPES.values()}
    return _method_options.settle(options, name, methods)


def chosen(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
      ValueError: there is none.
    """
    if ',' in name:
        raise ValueError(f'one method is taken at a time; got {name!r}')
    if name not in RECIPES:
        raise ValueError(
            f'unknown method {name!r}. Methods for language models: {", ".join(RECIPES)}'
        )
    return RECIPES[name]
