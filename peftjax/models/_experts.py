"""A feed-forward layer of experts, of which a router chooses some for each token."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from peftjax.models._activations import ACTIVATIONS
from peftjax.models._compute import Compute
from peftjax.models._decoder_config import DecoderConfig
from peftjax.models._layers import linear

Array = jax.Array


class _Expert(nn.Module):
    """One product of every expert; leaf `kernel (experts, in, out)`."""

    width: int
    config: DecoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, sizes: Array) -> Array:
        draw = nn.initializers.normal(self.config.initializer_range)
        shape = (self.config.mlp.experts, x.shape[-1], self.width)
        kernel = self.param('kernel', draw, shape, self.compute.param_dtype)
        return lax.ragged_dot(x, kernel.astype(self.compute.dtype), sizes)


class _Experts(nn.Module):
    """All experts, on tokens sorted by expert."""

    config: DecoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, sizes: Array) -> Array:
        config, names = self.config, self.config.names

        def product(width: int, name: str, x: Array) -> Array:
            return _Expert(width, config, self.compute, name=name)(x, sizes)

        assert names.gate is not None
        gate = checkpoint_name(product(config.mlp.width, names.gate, x), 'gate')
        up = checkpoint_name(product(config.mlp.width, names.up, x), 'up')
        return product(x.shape[-1], names.down, ACTIVATIONS[config.mlp.activation](gate) * up)


class Experts(nn.Module):
    """Router and experts: each token's output is the weighted sum of those chosen for it.

    Attributes:
      config: shape and names.
      compute: dtypes.

    Reference: Shazeer et al., Outrageously Large Neural Networks, 2017, arXiv:1701.06538; Jiang et
    al., Mixtral of Experts, 2024, arXiv:2401.04088, section 2.1.
    """

    config: DecoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the layer.

        Args:
          x: `(batch, tokens, hidden_size)`.

        Returns:
          Array of the shape of `x`.
        """
        config, names, mlp = self.config, self.config.names, self.config.mlp
        assert names.router is not None
        route = linear(
            mlp.experts, config.initializer_range, self.compute, names.router, bias=False
        )
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = lax.top_k(jax.nn.softmax(route(flat).astype(jnp.float32)), mlp.chosen)
        if mlp.normalized:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        # Each token stands once for each of its experts; equal experts lie together.
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=mlp.experts).astype(jnp.int32)
        experts = _Experts(config, self.compute, name=names.experts)
        out = experts(flat[order // mlp.chosen], sizes)[jnp.argsort(order)]
        out = out.reshape(*chosen.shape, -1).astype(jnp.float32) * weights[..., None]
        return out.sum(axis=1).astype(x.dtype).reshape(x.shape)
