"""One post-norm transformer block and the stack of them, with Hugging Face's module names."""

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from peftjax.models._activations import ACTIVATIONS
from peftjax.models._attention import attention, plain_attention
from peftjax.models._config import Compute, EncoderConfig
from peftjax.models._dropout import Dropout, keep
from peftjax.models._layers import LayerNorm, linear


class _SelfAttention(nn.Module):
    config: EncoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x, mask, deterministic):
        config = self.config
        heads = (config.num_attention_heads, config.head_dim)

        def project(name):
            y = linear(config.hidden_size, config, self.compute, name)(x)
            return checkpoint_name(y.reshape(*x.shape[:-1], *heads), name)

        query, key, value = project('query'), project('key'), project('value')
        attend = plain_attention if self.compute.attention == 'plain' else attention
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
        y = linear(config.hidden_size, config, self.compute, 'dense')(x)
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
        y = linear(config.intermediate_size, config, self.compute, 'dense')(x)
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
        self, x: jax.Array, mask: jax.Array | None, deterministic: bool
    ) -> tuple[jax.Array, None]:
        """Applies the block.

        Args:
          x: `(batch, tokens, hidden_size)`.
          mask: bool `(batch, tokens)`, True at the tokens to attend to, or None.
          deterministic: False drops out.

        Returns:
          The new residual stream and None, the pair that a scan's body returns.
        """
        config, compute = self.config, self.compute
        x = _Attention(config, compute, name='attention')(x, mask, deterministic)
        inner = _Intermediate(config, compute, name='intermediate')(x)
        names = ('mlp_output', 'mlp_residual')
        output = _Output(config, compute, *names, name='output')
        return output(inner, x, deterministic), None


class _Unrolled(nn.Module):
    """The blocks `0`, `1`, … one after the other."""

    block: type[nn.Module]
    config: EncoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, x, mask, deterministic):
        for index in range(self.config.num_hidden_layers):
            block = self.block(self.config, self.compute, name=str(index))
            x, _ = block(x, mask, deterministic)
        return x, None


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
        block = Block
        if compute.save is not None:
            policy = jax.checkpoint_policies.save_only_these_names(*compute.save)
            # The scan is a barrier of its own; without one, merging of equal subexpressions
            # would undo the recomputation.
            block = nn.remat(
                Block, policy=policy, static_argnums=(3,), prevent_cse=not compute.scan_layers
            )
        if compute.scan_layers:
            layer = nn.scan(
                block,
                variable_axes={'params': 0},
                split_rngs={'params': True, 'dropout': True},
                in_axes=(nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=config.num_hidden_layers,
            )(config, compute, name='layer')
        else:
            layer = _Unrolled(block, config, compute, name='layer')
        return layer(x, mask, deterministic)[0]
