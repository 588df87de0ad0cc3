"""Which leaves of a decoder are the products of its blocks, and which are of its vocabulary."""

import re
from collections.abc import Iterable

from peftjax.models._decoder_config import DecoderConfig


def linears(config: DecoderConfig, parts: Iterable[str] | None = None) -> str:
    """A regular expression that finds the kernels of linear layers, of experts too.

    Embedding, head and the router of experts are left out.

    Args:
      config: of the decoder.
      parts: which: fields of `config.names`, such as `('query', 'value')`. Those that the decoder
        has in one product with others find that product. None is all.

    Returns:
      A target, for `pj.Lora(target=...)` or `pj.quantize(..., target=...)`.

    Raises:
      ValueError: a part that is none of them.

    Example:
      >>> from peftjax.models import read_decoder_config
      >>> config = read_decoder_config({'model_type': 'llama', 'vocab_size': 64, 'hidden_size': 16,
      ...     'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 24})
      >>> linears(config, ('query', 'down'))
      '/layers/.*(self_attn/q_proj|mlp/down_proj)/kernel$'
    """
    names = config.names
    home: dict[str, str] = dict.fromkeys(_ATTENTION, names.attention)
    home |= dict.fromkeys(_MLP, names.mlp if names.router is None else names.experts)
    fused: dict[str, str | None] = dict.fromkeys(_ATTENTION[:3], names.query_key_value)
    fused |= dict.fromkeys(_MLP[:2], names.gate_up)
    found: dict[str, None] = {}
    for part in home if parts is None else parts:
        if part not in home:
            raise ValueError(f'parts must be among {[*home]}, got {part!r}.')
        name = fused.get(part) or getattr(names, part)
        if name is not None:
            found[f'{home[part]}/{re.escape(name)}'] = None
    return f'/{names.layers}/.*({"|".join(found)})/kernel$'


def embeddings(config: DecoderConfig) -> str:
    """A regular expression that finds the token embedding, and the head where it is not tied.

    Args:
      config: of the decoder.

    Returns:
      A target, for `pj.quantize(..., target=...)`; together with `linears`, nearly all weights.

    Example:
      >>> from peftjax.models import read_decoder_config
      >>> config = read_decoder_config({'model_type': 'llama', 'vocab_size': 64, 'hidden_size': 16,
      ...     'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 24})
      >>> embeddings(config)
      '^(model/embed_tokens/embedding|lm_head/kernel)$'
    """
    names = config.names
    found = [f'{names.body}/{names.embedding}/embedding']
    found += [] if config.tied else [f'{names.head}/kernel']
    return f'^({"|".join(map(re.escape, found))})$'


_ATTENTION = ('query', 'key', 'value', 'output')
_MLP = ('gate', 'up', 'down')
