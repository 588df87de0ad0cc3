"""One decoder block, with the options of `DecoderConfig`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from peftjax.models._activations import ACTIVATIONS
from peftjax.models._cache import Store
from peftjax.models._compute import Compute
from peftjax.models._decoder_attention import SelfAttention
from peftjax.models._decoder_config import DecoderConfig
from peftjax.models._experts import Experts
from peftjax.models._layers import LayerNorm, RmsNorm, linear
from peftjax.models._sight import Sight, sight_of
from peftjax.models._split import split_rows

KEPT = ('query', 'key', 'value', 'context', 'attention_residual', 'gate', 'up')
"""What a gradient keeps of a block, where it is not to keep everything nor to compute all again."""


class Layer(NamedTuple):
    """What is particular about one layer.

    Attributes:
      index: int scalar, which layer.
      kind: int scalar, which of the config's kinds.
    """

    index: jax.Array
    kind: jax.Array


def norm(config: DecoderConfig, compute: Compute, name: str) -> nn.Module:
    """A norm over the residual stream.

    Args:
      config: which norm.
      compute: dtypes.
      name: of the module.

    Returns:
      A linen module.
    """
    if config.norm.kind == 'layer':
        return LayerNorm(config.norm.epsilon, compute, name=name)
    return RmsNorm(config.norm.epsilon, compute, config.norm.offset, name=name)


class FeedForward(nn.Module):
    """The feed-forward layer: gated or not, in one product or two.

    Attributes:
      config: shape and names.
      compute: dtypes.
    """

    config: DecoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer.

        Args:
          x: `(batch, tokens, hidden_size)`.

        Returns:
          Array of the shape of `x`.
        """
        config, names, mlp = self.config, self.config.names, self.config.mlp
        activate = ACTIVATIONS[mlp.activation]

        def product(width: int, name: str) -> nn.Dense:
            return linear(width, config.initializer_range, self.compute, name, bias=mlp.bias)

        if names.gate_up is not None:
            gate, up = jnp.split(product(2 * mlp.width, names.gate_up)(x), 2, axis=-1)
        else:
            gate = None if names.gate is None else product(mlp.width, names.gate)(x)
            up = product(mlp.width, names.up)(x)
        up = checkpoint_name(up, 'up')
        inner = activate(up) if gate is None else activate(checkpoint_name(gate, 'gate')) * up
        return product(config.hidden_size, names.down)(inner)


class Block(nn.Module):
    """Attention and feed-forward layer, each between the norms that have a name, each added.

    Attributes:
      config: shape and names.
      compute: dtypes and the form of attention.
    """

    config: DecoderConfig
    compute: Compute

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Store | None], layer: Layer, sights: Sight
    ) -> tuple[tuple[jax.Array, Store | None], None]:
        """Applies the block.

        Args:
          carry: the residual stream `(batch, tokens, hidden_size)`, and the keys and values of
            all layers in a cache, or None.
          layer: which layer.
          sights: of all kinds of layers.

        Returns:
          The new carry and None, the pair that a scan's body returns.
        """
        config, compute, names = self.config, self.compute, self.config.names
        x, store = carry
        sight = sight_of(sights, config.kinds, layer.kind)
        attention = SelfAttention(config, compute, name=names.attention)
        y, store = attention(self._norm(names.before_attention, x), sight, store, layer.index)
        y = self._norm(names.after_attention, checkpoint_name(y, 'attention_output'))
        x = checkpoint_name(x + y, 'attention_residual')
        mlp = FeedForward if names.router is None else Experts
        y = mlp(config, compute, name=names.mlp)(self._norm(names.before_mlp, x))
        y = self._norm(names.after_mlp, checkpoint_name(y, 'mlp_output'))
        return (split_rows(checkpoint_name(x + y, 'mlp_residual')), store), None

    def _norm(self, name: str | None, x: jax.Array) -> jax.Array:
        return x if name is None else norm(self.config, self.compute, name)(x)
