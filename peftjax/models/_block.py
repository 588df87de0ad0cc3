"""One post-norm transformer block and the stack of them, with Hugging Face's module names."""

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from peftjax.models._activations import ACTIVATIONS
from peftjax.models._attention import attention, plain_attention
from peftjax.models._compute import Compute
from peftjax.models._config import EncoderConfig
from peftjax.models._dropout import Dropout, keep
from peftjax.models._layers import LayerNorm, linear
from peftjax.models._split import split_rows
from peftjax.models._stack import stack


class _SelfAttention(nn.Module):
    config: EncoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x, mask, deterministic):
        config = self.config
        heads = (config.num_attention_heads, config.head_dim)

        def project(name):
            y = linear(config.hidden_size, config.initializer_range, self.compute, name)(x)
            return checkpoint_name(y.reshape(*x.shape[:-1], *heads), name)

        query, key, value = project('query'), project('key'), project('value')
        attend = attention if self.compute.fused else plain_attention
        rate = 0.0 if deterministic else config.attention_probs_dropout_prob
        kept = None
        if rate:
            pairs = (x.shape[0], config.num_attention_heads, x.shape[1], x.shape[1])
            kept = keep(self.make_rng('dropout'), rate, pairs)
        return attend(query, key, value, mask, kept, rate).reshape(x.shape)


class _Output(nn.Module):
    """Dense, dropout, residual add, layer norm; both halves of a block end with it."""

    config: EncoderConfig
    compute: Compute
    output_name: str
    residual_name: str

    @nn.compact
    def __call__(self, x, residual, deterministic):
        config = self.config
        y = linear(config.hidden_size, config.initializer_range, self.compute, 'dense')(x)
        y = Dropout(config.hidden_dropout_prob)(y, deterministic)
        y = checkpoint_name(y, self.output_name)
        y = LayerNorm(config.layer_norm_eps, self.compute, name='LayerNorm')(y + residual)
        return checkpoint_name(y, self.residual_name)


class _Attention(nn.Module):
    config: EncoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x, mask, deterministic):
        mixed = _SelfAttention(self.config, self.compute, name='self')(x, mask, deterministic)
        names = ('attention_output', 'attention_residual')
        output = _Output(self.config, self.compute, *names, name='output')
        return output(mixed, x, deterministic)


class _Intermediate(nn.Module):
    config: EncoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x):
        config = self.config
        y = linear(config.intermediate_size, config.initializer_range, self.compute, 'dense')(x)
        return ACTIVATIONS[config.hidden_act](checkpoint_name(y, 'up'))


class Block(nn.Module):
    """Self-attention and feed-forward layer, each followed by residual add and layer norm.

    Attributes:
      config: shape.
      compute: dtypes and the form of attention.
    """

    config: EncoderConfig
    compute: Compute

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: None, mask: jax.Array | None, deterministic: bool
    ) -> tuple[jax.Array, None]:
        """Applies the block.

        Args:
          x: `(batch, tokens, hidden_size)`.
          layer: nothing; layers of an encoder differ in their parameters alone.
          mask: bool `(batch, tokens)`, True at the tokens to attend to, or None.
          deterministic: False drops out.

        Returns:
          The new residual stream and None, the pair that a scan's body returns.
        """
        del layer
        config, compute = self.config, self.compute
        x = _Attention(config, compute, name='attention')(x, mask, deterministic)
        inner = _Intermediate(config, compute, name='intermediate')(x)
        names = ('mlp_output', 'mlp_residual')
        output = _Output(config, compute, *names, name='output')
        return split_rows(output(inner, x, deterministic)), None


class Stack(nn.Module):
    """All blocks, scanned or unrolled.

    Attributes:
      config: shape.
      compute: `scan_layers`, `save`, dtypes and the form of attention.
    """

    config: EncoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, deterministic: bool) -> jax.Array:
        """Applies the blocks.

        Args:
          x: `(batch, tokens, hidden_size)`.
          mask: bool `(batch, tokens)` or None.
          deterministic: False drops out.

        Returns:
          Hidden states of the last block, of the shape of `x`.
        """
        config, compute = self.config, self.compute
        length = config.num_hidden_layers
        layers = stack(Block, config, compute, length, shared=2, name='layer', static=(1,))
        return layers(x, None, mask, deterministic)[0]
