"""BERT and RoBERTa encoders and their sequence classifiers."""

from collections.abc import Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from peftjax.models._block import Stack
from peftjax.models._compute import Compute
from peftjax.models._config import EncoderConfig
from peftjax.models._dropout import Dropout
from peftjax.models._layers import Embedding, LayerNorm, linear
from peftjax.models._split import split_rows


class Embeddings(nn.Module):
    """Sum of token, token type and position vectors, then layer norm and dropout.

    Attributes:
      config: shape.
      compute: dtypes.
    """

    config: EncoderConfig
    compute: Compute

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        token_type_ids: jax.Array | None,
        position_ids: jax.Array | None,
        deterministic: bool,
    ) -> jax.Array:
        """Embeds tokens.

        Args:
          input_ids: int `(batch, tokens)`.
          token_type_ids: int `(batch, tokens)`; None is all zeros.
          position_ids: int `(batch, tokens)`; None counts them as the family does.
          deterministic: False drops out.

        Returns:
          `(batch, tokens, hidden_size)`.
        """
        config, compute = self.config, self.compute
        if token_type_ids is None:
            token_type_ids = jnp.zeros(input_ids.shape, jnp.int32)
        if position_ids is None:
            position_ids = count_positions(config, input_ids)

        def look_up(name, rows, ids):
            width, deviation = config.hidden_size, config.initializer_range
            return Embedding(rows, width, deviation, compute, name=name)(ids)

        x = look_up('word_embeddings', config.vocab_size, input_ids)
        x = x + look_up('token_type_embeddings', config.type_vocab_size, token_type_ids)
        x = x + look_up('position_embeddings', config.max_position_embeddings, position_ids)
        x = LayerNorm(config.layer_norm_eps, compute, name='LayerNorm')(x)
        x = Dropout(config.hidden_dropout_prob)(x, deterministic)
        return checkpoint_name(x, 'embeddings')


def count_positions(config: EncoderConfig, input_ids: jax.Array) -> jax.Array:
    """Positions of the tokens: 0, 1, … in BERT; in RoBERTa over the tokens that are not padding.

    Args:
      config: family, padding id and number of positions.
      input_ids: int `(batch, tokens)`.

    Returns:
      int `(batch, tokens)`.

    Raises:
      ValueError: more tokens than the model has positions.
    """
    tokens = input_ids.shape[1]
    most = config.max_position_embeddings - config.position_offset
    if tokens > most:
        raise ValueError(
            f'input_ids must have at most {most} tokens (max_position_embeddings='
            f'{config.max_position_embeddings}), got {tokens}. Truncate the text, or pass '
            'position_ids.'
        )
    if config.model_type == 'bert':
        return jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[None], input_ids.shape)
    real = (input_ids != config.pad_token_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + config.pad_token_id


def mean_pool(hidden: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Mean of the hidden states of a sentence's tokens.

    Args:
      hidden: `(batch, tokens, width)`.
      mask: `(batch, tokens)`, nonzero at the tokens that count. None counts all.

    Returns:
      `(batch, width)` of the dtype of `hidden`, summed in float32. A row without tokens is zero.

    Example:
      >>> mean_pool(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[1, 1, 0]]))
      Array([[2.]], dtype=float32)

    Reference: Reimers and Gurevych, Sentence-BERT, 2019, arXiv:1908.10084, section 3.
    """
    weight = jnp.ones(hidden.shape[:2]) if mask is None else (mask != 0).astype(jnp.float32)
    total = (hidden.astype(jnp.float32) * weight[..., None]).sum(axis=1)
    count = jnp.maximum(weight.sum(axis=1, keepdims=True), 1.0)
    return (total / count).astype(hidden.dtype)


class _Pooler(nn.Module):
    config: EncoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, hidden):
        dense = linear(
            self.config.hidden_size, self.config.initializer_range, self.compute, 'dense'
        )
        return jnp.tanh(dense(hidden[:, 0]))


def _apply_bare(
    module: nn.Module, params: Mapping[str, Any], *args: Any, **kwargs: Any
) -> jax.Array:
    return cast(jax.Array, module.apply({'params': params}, *args, **kwargs))


class Encoder(nn.Module):
    """BERT or RoBERTa without a head; parameters `embeddings`, `encoder`, `pooler`.

    Attributes:
      config: shape.
      compute: scanned or unrolled, dtypes, form of attention.

    Example:
      >>> config = EncoderConfig(model_type='bert', vocab_size=64, hidden_size=16,
      ...     num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
      >>> model, ids = Encoder(config), jnp.ones((1, 5), jnp.int32)
      >>> params = model.init(jax.random.key(0), ids)['params']
      >>> model.apply_fn(params, ids).shape
      (1, 5, 16)
      >>> params['encoder']['layer']['attention']['self']['query']['kernel'].shape
      (2, 16, 16)

    Reference: Devlin et al., BERT, 2018, arXiv:1810.04805; Liu et al., RoBERTa, 2019,
    arXiv:1907.11692.
    """

    config: EncoderConfig
    compute: Compute = Compute()

    def setup(self):
        """Names the parts as Hugging Face does; a part that is not called has no parameters."""
        self.embeddings = Embeddings(self.config, self.compute)
        self.encoder = Stack(self.config, self.compute)
        self.pooler = _Pooler(self.config, self.compute)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        pool_mask: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Hidden states of the last block.

        Args:
          input_ids: int `(batch, tokens)`.
          attention_mask: `(batch, tokens)`, nonzero at the tokens to attend to; None is all.
          token_type_ids: int `(batch, tokens)`; None is all zeros.
          position_ids: int `(batch, tokens)`; None counts them as the family does.
          pool_mask: not used here; taken so that all models have one signature.
          deterministic: False drops out, with the rng `'dropout'`.

        Returns:
          `(batch, tokens, hidden_size)`.

        Raises:
          ValueError: more tokens than positions.
        """
        del pool_mask  # nothing is pooled
        x = split_rows(self.embeddings(input_ids, token_type_ids, position_ids, deterministic))
        mask = None if attention_mask is None else attention_mask != 0
        return self.encoder(x, mask, deterministic)

    def pooled(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Tanh of a linear map of the first token's hidden state.

        Args:
          *args: as `__call__`.
          **kwargs: as `__call__`.

        Returns:
          `(batch, hidden_size)`.
        """
        return self.pooler(self(*args, **kwargs))

    @nn.nowrap
    def apply_fn(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> jax.Array:
        """The model as a function of bare parameters.

        Args:
          params: the tree under `'params'`.
          *args: as `__call__`.
          **kwargs: as `__call__`; and `method='pooled'`, `rngs={'dropout': key}`.

        Returns:
          What the called method returns.
        """
        return _apply_bare(self, params, *args, **kwargs)


class _RobertaHead(nn.Module):
    config: EncoderConfig
    compute: Compute

    @nn.compact
    def __call__(self, hidden, deterministic):
        config = self.config
        drop, deviation = Dropout(config.head_dropout), config.initializer_range
        first = drop(hidden[:, 0], deterministic)
        x = linear(config.hidden_size, deviation, self.compute, 'dense')(first)
        x = drop(jnp.tanh(x), deterministic)
        return linear(config.num_labels, deviation, self.compute, 'out_proj')(x)


class SequenceClassifier(nn.Module):
    """An encoder under its family's name (`bert` or `roberta`) and a `classifier`.

    Attributes:
      config: shape; `num_labels` is the classifier's width.
      compute: scanned or unrolled, dtypes, form of attention.
      head: `'classifier'` is the family's own: in BERT pooler, dropout, linear; in RoBERTa first
        token, dropout, dense, tanh, dropout, linear. `'mean'` is masked mean, dropout, linear.

    Example:
      >>> config = EncoderConfig(model_type='bert', vocab_size=64, hidden_size=16, num_labels=3,
      ...     num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
      >>> model, ids = SequenceClassifier(config, head='mean'), jnp.ones((1, 5), jnp.int32)
      >>> params = model.init(jax.random.key(0), ids)['params']
      >>> sorted(params), model.apply_fn(params, ids).shape
      (['bert', 'classifier'], (1, 3))
    """

    config: EncoderConfig
    compute: Compute = Compute()
    head: Literal['classifier', 'mean'] = 'classifier'

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        pool_mask: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits.

        Args:
          input_ids: int `(batch, tokens)`.
          attention_mask: `(batch, tokens)`, nonzero at the tokens to attend to; None is all.
          token_type_ids: int `(batch, tokens)`; None is all zeros.
          position_ids: int `(batch, tokens)`; None counts them as the family does.
          pool_mask: `(batch, tokens)`, nonzero at the tokens of the mean; None is
            `attention_mask`. Only the `'mean'` head looks at it.
          deterministic: False drops out, with the rng `'dropout'`.

        Returns:
          `(batch, num_labels)`.

        Raises:
          ValueError: more tokens than positions.
        """
        config, compute = self.config, self.compute
        encoder = Encoder(config, compute, name=config.model_type)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, None, deterministic)
        if self.head == 'classifier' and config.model_type == 'roberta':
            return _RobertaHead(config, compute, name='classifier')(encoder(*inputs), deterministic)
        if self.head == 'classifier':
            vector = encoder.pooled(*inputs)
        else:
            vector = mean_pool(encoder(*inputs), attention_mask if pool_mask is None else pool_mask)
        vector = Dropout(config.head_dropout)(vector, deterministic)
        return linear(config.num_labels, config.initializer_range, compute, 'classifier')(vector)

    @nn.nowrap
    def apply_fn(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> jax.Array:
        """The model as a function of bare parameters.

        Args:
          params: the tree under `'params'`.
          *args: as `__call__`.
          **kwargs: as `__call__`; and `rngs={'dropout': key}`.

        Returns:
          Logits `(batch, num_labels)`.
        """
        return _apply_bare(self, params, *args, **kwargs)
