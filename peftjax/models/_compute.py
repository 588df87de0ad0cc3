"""How a model is computed: dtypes, scanned or unrolled layers, what a gradient keeps."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

AttentionForm = Literal['auto', 'fused', 'plain']

SAVED = ('query', 'key', 'value', 'gate', 'up', 'attention_output', 'mlp_output')
"""What a gradient keeps of each block unless told otherwise: results of large products. What lies
between them is cheaper to compute again than to write to memory and read back."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How a model is computed; none of it changes what is computed.

    Attributes:
      scan_layers: True: one block under `jax.lax.scan`, leaves of the layers with a leading layer
        axis (`encoder/layer`, `model/layers`). False: unrolled blocks `encoder/layer/0`, ….
      dtype: dtype of activations and products. Softmax, norms and GELU are float32 inside.
      param_dtype: dtype of freshly initialized parameters.
      attention: `'plain'` is written as the formula is, for code that needs forward-mode
        derivatives (`jax.jvp`). `'fused'` is cuDNN's kernel where it serves a decoder, on an NVIDIA
        GPU in half precision, which has first derivatives alone, and elsewhere a form whose
        backward pass is written by hand. `'auto'` takes that form only where it was measured to be
        no slower than the plain one, which is on CPUs, and the plain one elsewhere.
      save: names of values; a gradient keeps only those of each block and computes the rest again.
        None keeps whatever the gradient needs.

    Raises:
      ValueError: `attention` is none of these.

    Example:
      >>> Compute(scan_layers=False).attention
      'auto'
    """

    scan_layers: bool = True
    dtype: jax.typing.DTypeLike = jnp.float32
    param_dtype: jax.typing.DTypeLike = jnp.float32
    attention: AttentionForm = 'auto'
    save: tuple[str, ...] | None = SAVED

    def __post_init__(self):
        if self.attention not in get_args(AttentionForm):
            raise ValueError(
                f'attention must be one of {get_args(AttentionForm)}, got {self.attention!r}.'
            )

    @property
    def fused(self) -> bool:
        """Whether attention that no kernel serves takes the hand-written backward pass."""
        measured = jax.default_backend() == 'cpu'
        return self.attention == 'fused' or (self.attention == 'auto' and measured)
