"""How a model is computed: dtypes, scanned or unrolled layers, what a gradient keeps."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

AttentionForm = Literal['fused', 'plain']

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
      attention: `'fused'`, or `'plain'` for code that needs forward-mode derivatives (`jax.jvp`);
        on an NVIDIA GPU in half precision, where cuDNN serves a decoder, also second ones.
      save: names of values; a gradient keeps only those of each block and computes the rest again.
        None keeps whatever the gradient needs.

    Raises:
      ValueError: `attention` is neither.

    Example:
      >>> Compute(scan_layers=False).attention
      'fused'
    """

    scan_layers: bool = True
    dtype: jax.typing.DTypeLike = jnp.float32
    param_dtype: jax.typing.DTypeLike = jnp.float32
    attention: AttentionForm = 'fused'
    save: tuple[str, ...] | None = SAVED

    def __post_init__(self):
        if self.attention not in get_args(AttentionForm):
            raise ValueError(
                f'attention must be one of {get_args(AttentionForm)}, got {self.attention!r}.'
            )
