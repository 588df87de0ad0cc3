"""The ways of adapting an encoder that the commands know.

Their learning rates are those of `benchmarks/results/tune_rates.jsonl` that did best on training
messages held back.
"""

import argparse
import dataclasses
from collections.abc import Callable

from peftjax import (
    HOULSBY,
    PARALLEL,
    PFEIFFER,
    BitFit,
    Chain,
    Dora,
    Ia3,
    Lora,
    Method,
    NormTuning,
    PrefixTuning,
    PromptTuning,
    Trainable,
    chain,
)
from peftjax.cli import _method_options

HEAD = Trainable(target='^classifier/')
BODY = '^(?!classifier/)'
ATTENTION = r'attention/self/(query|value)/kernel'
IA3 = ('attention/self/(key|value)/kernel', 'intermediate/dense/kernel')


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way of adapting an encoder and its fresh classifier.

    Attributes:
      name: on the command line.
      about: one line of help.
      build: the method beside the head; `None` for the head alone.
      rate: learning rate of the method.
      head_rate: learning rate of the classifier.
      probe: whether the head is fitted to frozen features instead of trained by steps.
    """

    name: str
    about: str
    build: Callable[[], Method] | None
    rate: float = 0.0
    head_rate: float = 1e-2
    probe: bool = False

    def method(self) -> Method | Chain:
        """The method with the head."""
        if self.build is None:
            return chain(head=HEAD)
        return chain(body=self.build(), head=HEAD)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe('frozen', 'logistic regression on the frozen encoder', None, head_rate=0.0,
               probe=True),
        Recipe('prompt', 'prompt tuning, 10 virtual tokens',
               lambda: PromptTuning(length=10, side='back'), 3e-2),
        Recipe('prefix', 'prefix tuning, 10 virtual tokens, direct',
               lambda: PrefixTuning(length=10, side='back', deviation=0.5), 1e-1),
        Recipe('bitfit', 'biases only', lambda: BitFit(target=BODY), 3e-3),
        Recipe('norms', 'norms only', lambda: NormTuning(target=BODY), 1e-2),
        Recipe('ia3', 'rescaled keys, values and MLP', lambda: Ia3(target=IA3), 3e-2),
        Recipe('lora', 'LoRA, rank 8, on query and value',
               lambda: Lora(target=ATTENTION, rank=8, alpha=16), 2e-3),
        Recipe('dora', 'DoRA, rank 8, on query and value',
               lambda: Dora(target=ATTENTION, rank=8, alpha=16), 2e-3),
        Recipe('adapter', 'bottleneck adapters after attention and MLP (Houlsby)',
               lambda: HOULSBY, 1e-3),
        Recipe('pfeiffer', 'bottleneck adapters after the MLP', lambda: PFEIFFER, 1e-3),
        Recipe('parallel', 'bottleneck adapters beside the MLP', lambda: PARALLEL, 3e-4),
        Recipe('full', 'full fine-tuning', lambda: Trainable(target=BODY), 1e-4, 3e-3),
    )
}  # fmt: skip
"""All recipes by name."""

DEFAULT = (
    'frozen', 'prompt', 'prefix', 'bitfit', 'ia3', 'lora', 'dora', 'adapter', 'full',
)  # fmt: skip
"""What `peftjax compare` runs unless told otherwise."""


def settled(options: argparse.Namespace, recipe: Recipe) -> Recipe:
    """A recipe with the numbers that options ask for; fills in those that they leave open.

    Args:
      options: as parsed; changed.
      recipe: as chosen.

    Returns:
      The recipe.

    Raises:
      ValueError: an option that the method does not take, or a value that it refuses.
    """
    methods = {one.name: one.build and one.build() for one in RECIPES.values()}
    if recipe.probe and options.rate is not None:
        takers = [one.name for one in RECIPES.values() if not one.probe]
        raise _method_options.not_for('rate', recipe.name, takers)
    if not recipe.probe and options.rate is None:
        options.rate = recipe.rate
    method = _method_options.settle(options, recipe.name, methods)
    return recipe if method is None else dataclasses.replace(recipe, build=lambda: method)


def chosen(names: str | None) -> tuple[Recipe, ...]:
    """The recipes of a comma-separated list.

    Raises:
      ValueError: a name is unknown, or given twice.
    """
    wanted = DEFAULT if names is None else tuple(name.strip() for name in names.split(','))
    unknown = [name for name in wanted if name not in RECIPES]
    if unknown or len(set(wanted)) < len(wanted):
        what = f'unknown method {unknown[0]!r}' if unknown else f'a method twice in {names!r}'
        raise ValueError(f'{what}. Methods: {", ".join(RECIPES)}')
    return tuple(RECIPES[name] for name in wanted)
