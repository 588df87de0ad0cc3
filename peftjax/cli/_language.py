"""Methods for decoder language models, by name."""

from collections.abc import Callable

from peftjax import (
    HOULSBY,
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
)
from peftjax.models import DecoderConfig, linears

METHODS: dict[str, Callable[[str, str, int], Method | Chain]] = {
    'lora': lambda target, _, rank: Lora(target=target, rank=rank, alpha=2 * rank),
    'dora': lambda target, _, rank: Dora(target=target, rank=rank, alpha=2 * rank),
    'ia3': lambda target, down, _: Ia3(target=target, feedforward=down),
    'adapter': lambda *_: HOULSBY,
    'prompt': lambda *_: PromptTuning(length=20),
    'prefix': lambda *_: PrefixTuning(length=20),
    'bitfit': lambda *_: BitFit(),
    'norms': lambda *_: NormTuning(),
    'full': lambda *_: Trainable(target='.'),
}
"""From targets (what to adapt; the product back from the inner width) and a rank to a method."""


def method_for(name: str, config: DecoderConfig, rank: int, target: str | None) -> Method | Chain:
    """A method for a decoder.

    Args:
      name: one of `METHODS`.
      config: of the decoder.
      rank: of LoRA and DoRA.
      target: of LoRA, DoRA and IA3; by default all linear layers (IA3: key, value and down).

    Returns:
      The method.

    Raises:
      ValueError: an unknown name.
    """
    if name not in METHODS:
        raise ValueError(f'unknown method {name!r}. Methods: {", ".join(METHODS)}')
    down = linears(config, ('down',))
    usual = linears(config, ('key', 'value', 'down')) if name == 'ia3' else linears(config)
    return METHODS[name](target or usual, down if target is None else '', rank)
