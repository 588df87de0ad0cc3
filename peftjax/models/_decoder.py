"""Decoder language models: embedding, blocks, head."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from peftjax.models._cache import Cache, InitCache, Store
from peftjax.models._compute import Compute
from peftjax.models._decoder_block import Block, Layer, norm
from peftjax.models._decoder_config import DecoderConfig
from peftjax.models._kernel import keep
from peftjax.models._layers import Embedding, linear
from peftjax.models._sight import (
    Sight,
    count_positions,
    find_lengths,
    find_places,
    find_sights,
)
from peftjax.models._split import gathered_head, split_rows
from peftjax.models._stack import stack

Array = jax.Array


class _Body(nn.Module):
    """Everything below the head."""

    config: DecoderConfig
    compute: Compute

    def setup(self):
        config, compute, names = self.config, self.compute, self.config.names

        def table(rows: int, name: str) -> Embedding:
            width, deviation = config.hidden_size, config.initializer_range
            return Embedding(rows, width, deviation, compute, name=name)

        self.embed = table(config.vocab_size, names.embedding)
        if names.positions is not None:
            self.place = table(config.positions, names.positions)
        length = config.num_hidden_layers
        self.blocks = stack(
            Block,
            config,
            compute,
            length,
            shared=1,
            name=names.layers,
            policy=keep(config.attention, compute),
        )
        self.last = norm(config, compute, names.norm)

    def __call__(
        self, input_ids: Array, position_ids: Array, sights: Sight, store: Store | None
    ) -> tuple[Array, Store | None]:
        config = self.config
        x = self.embed(input_ids)
        if config.embedding_scale != 1:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        if config.names.positions is not None:
            x = x + self.place(position_ids)
        x = split_rows(checkpoint_name(x, 'embeddings'))
        indices = jnp.arange(config.num_hidden_layers, dtype=jnp.int32)
        layers = Layer(indices, jnp.asarray(config.layers, jnp.int32))
        (x, store), _ = self.blocks((x, store), layers, sights)
        return self.last(x), store


class HeadWeight(NamedTuple):
    """The head as an array, for losses that are fused with it.

    Attributes:
      weight: `(hidden_size, vocab_size)`.
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`; None leaves them.
    """

    weight: Array
    soft_cap: float | None


class Decoder(nn.Module):
    """A decoder language model; parameters as Hugging Face names them.

    Attributes:
      config: what is computed.
      compute: scanned or unrolled, dtypes, form of attention, what a gradient keeps.

    Example:
      >>> from peftjax.models import DecoderConfig, read_decoder_config
      >>> config = read_decoder_config({'model_type': 'llama', 'vocab_size': 64, 'hidden_size': 16,
      ...     'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 24})
      >>> model, ids = Decoder(config), jnp.ones((1, 5), jnp.int32)
      >>> params = model.init(jax.random.key(0), ids)['params']
      >>> model.apply_fn(params, ids).shape
      (1, 5, 64)
      >>> params['model']['layers']['self_attn']['q_proj']['kernel'].shape
      (2, 16, 16)
      >>> cache = model.init_cache(batch=1, slots=8)
      >>> logits, cache = model.apply_fn(params, ids, cache=cache)
      >>> logits, cache = model.apply_fn(params, ids[:, :1], cache=cache)
      >>> logits.shape, int(cache.index)
      ((1, 1, 64), 6)

    Reference: Touvron et al., LLaMA, 2023, arXiv:2302.13971; Radford et al., Language Models are
    Unsupervised Multitask Learners, 2019; Gemma Team, 2024, arXiv:2408.00118.
    """

    config: DecoderConfig
    compute: Compute = Compute()

    def setup(self):
        """Names the parts as Hugging Face does."""
        config, compute, names = self.config, self.compute, self.config.names
        self.body = _Body(config, compute, name=names.body)
        if not config.tied:
            deviation = config.initializer_range
            self.head = linear(
                config.vocab_size, deviation, compute, names.head, bias=False, wide=True
            )

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        segment_ids: Array | None = None,
        cache: Cache | None = None,
    ) -> Array | tuple[Array, Cache]:
        """Logits of the next token, at every token.

        Args:
          input_ids: int `(batch, tokens)`.
          attention_mask: `(batch, tokens)`, nonzero at real tokens, padding on either side; None is
            all. What comes out at padding means nothing.
          position_ids: int `(batch, tokens)`; None counts the real tokens before, of the same
            segment, those in the cache included.
          segment_ids: int `(batch, tokens)` of rows in which several texts are packed: a token sees
            its own text only.
          cache: keys and values of the tokens before these, as the call before returned it, or an
            empty one. The call reads `tokens` more; where there is no room for them all, NaN comes
            out.

        Returns:
          float32 `(batch, tokens, vocab_size)`; with a cache, a pair of it and the new cache.

        Raises:
          ValueError: more tokens than learned positions or than slots, or segments with a cache.
        """
        out = self.hidden(input_ids, attention_mask, position_ids, segment_ids, cache)
        if isinstance(out, tuple):
            return self.logits(out[0]), out[1]
        return self.logits(out)

    def hidden(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        segment_ids: Array | None = None,
        cache: Cache | None = None,
    ) -> Array | tuple[Array, Cache]:
        """Hidden states after the last norm, which the head is applied to.

        Args:
          input_ids: as `__call__`.
          attention_mask: as `__call__`.
          position_ids: as `__call__`.
          segment_ids: as `__call__`.
          cache: as `__call__`.

        Returns:
          `(batch, tokens, hidden_size)`; with a cache, a pair of it and the new cache.

        Raises:
          ValueError: as `__call__`.
        """
        config, shape = self.config, input_ids.shape
        if config.positions and shape[1] > config.positions:
            raise ValueError(
                f'input_ids must have at most {config.positions} tokens, one for each learned '
                f'position, got {shape[1]}. Truncate the text.'
            )
        places, reading = find_places(shape, attention_mask, segment_ids, cache)
        if position_ids is None:
            position_ids = count_positions(places)
        length, reading = find_lengths(config.kinds, places, position_ids, reading)
        sights = find_sights(config.kinds, places, position_ids, length)
        store = None if cache is None else Store(cache.key, cache.value, cache.index)
        x, store = self.body(input_ids, position_ids, sights, store)
        if reading is None or store is None:
            return x
        # Beyond its end a cache would be overwritten; NaN does not go unnoticed.
        beyond = reading.index > reading.mask.shape[1]
        x = jnp.where(beyond, jnp.asarray(jnp.nan, x.dtype), x)
        return x, reading._replace(key=store.key, value=store.value)

    def logits(self, hidden: Array) -> Array:
        """Applies the head.

        Args:
          hidden: `(..., hidden_size)`, as `hidden` returns it.

        Returns:
          float32 `(..., vocab_size)`.
        """
        hidden = hidden.astype(self.compute.dtype)
        logits = self.body.embed.scores(hidden) if self.config.tied else self.head(hidden)
        cap = self.config.soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    @nn.nowrap
    def apply_fn(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model as a function of bare parameters.

        Args:
          params: the tree under `'params'`.
          *args: as `__call__`.
          **kwargs: as `__call__`; and `method='hidden'` or `method='logits'`.

        Returns:
          What the called method returns.
        """
        return self.apply({'params': params}, *args, **kwargs)

    @nn.nowrap
    def head_weight(self, params: Mapping[str, Any]) -> HeadWeight:
        """The head as an array; `logits` is `hidden @ weight`, capped.

        On a mesh set by `jax.set_mesh`, whose axis `fsdp` splits the head, it is gathered along it.

        Args:
          params: the tree under `'params'`.

        Returns:
          Weight and cap; of a tied head, the transposed embedding.
        """
        config, names = self.config, self.config.names
        if config.tied:
            weight = params[names.body][names.embedding]['embedding'].T
        else:
            weight = params[names.head]['kernel']
        return HeadWeight(gathered_head(weight), config.soft_cap)

    @property
    def init_cache(self) -> InitCache:
        """`init_cache(batch, slots)` is an empty cache, for so many rows and tokens of each."""
        return InitCache(self.config, self.compute.dtype)
