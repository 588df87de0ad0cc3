"""Families of decoders: from the fields of a `config.json` to a `DecoderConfig`."""

import dataclasses
import json
from collections.abc import Callable, Sequence

from peftjax.models._decoder_config import Attention, DecoderConfig, LayerKind, Mlp, Names, Norm
from peftjax.models._family_fields import DEFAULTS, NEEDED, SETTINGS, SIZES
from peftjax.models._fields import Fields, check_settings, check_sizes, size
from peftjax.models._rope_fields import read_rope, rename_scaling


def read_decoder_config(fields: Fields) -> DecoderConfig:
    """Reads a `DecoderConfig` from the content of a Hugging Face `config.json`.

    Args:
      fields: the parsed file, of any version of transformers.

    Returns:
      The decoder's configuration; absent fields take Hugging Face's defaults for the family.
      Dropout is not computed.

    Raises:
      ValueError: another model type, a missing size, or a setting that is not computed.

    Example:
      >>> config = read_decoder_config({'model_type': 'qwen3', 'vocab_size': 64, 'hidden_size': 16,
      ...     'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 24})
      >>> config.attention.head_dim, config.names.query_norm
      (128, 'q_norm')
    """
    family = fields.get('model_type')
    if family not in FAMILIES:
        raise ValueError(
            f'model_type must be one of {sorted(FAMILIES)}, got {family!r}. Other families have no '
            'decoder here.'
        )
    check_settings(fields, SETTINGS, 'decoder')
    whole = DEFAULTS.get(family, {}) | dict(fields)
    check_sizes(whole, NEEDED.get(family, SIZES))
    config = FAMILIES[family]({k: value for k, value in whole.items() if value is not None})
    return dataclasses.replace(config, source=json.dumps(dict(fields), sort_keys=True))


def _llama(fields: Fields) -> DecoderConfig:
    """Llama, and what those after it share with it."""
    heads = fields['num_attention_heads']
    head_dim = fields.get('head_dim', fields['hidden_size'] // heads)
    bias = fields.get('attention_bias', False)
    return DecoderConfig(
        vocab_size=fields['vocab_size'],
        hidden_size=fields['hidden_size'],
        layers=(0,) * fields['num_hidden_layers'],
        kinds=(LayerKind(rope=read_rope(fields, head_dim)),),
        attention=Attention(
            heads=heads,
            kv_heads=fields.get('num_key_value_heads', heads),
            head_dim=head_dim,
            scale=fields.get('query_pre_attn_scalar', head_dim) ** -0.5,
            bias=bias,
            output_bias=bias,
            soft_cap=fields.get('attn_logit_softcapping'),
        ),
        mlp=Mlp(
            width=fields['intermediate_size'],
            activation=fields.get('hidden_activation', fields.get('hidden_act', 'silu')),
            bias=fields.get('mlp_bias', False),
        ),
        norm=Norm(epsilon=fields.get('rms_norm_eps', 1e-6)),
        tied=fields.get('tie_word_embeddings', False),
        soft_cap=fields.get('final_logit_softcapping'),
        initializer_range=fields.get('initializer_range', 0.02),
    )


def _mistral(fields: Fields) -> DecoderConfig:
    config = _llama(fields)
    [kind] = config.kinds
    window = fields.get('sliding_window')
    return dataclasses.replace(config, kinds=(dataclasses.replace(kind, window=window),))


def _qwen2(fields: Fields) -> DecoderConfig:
    config = _qwen(fields)
    attention = dataclasses.replace(config.attention, bias=True)
    return dataclasses.replace(config, attention=attention)


def _qwen3(fields: Fields) -> DecoderConfig:
    names = Names(query_norm='q_norm', key_norm='k_norm')
    return dataclasses.replace(_qwen(fields), names=names)


def _qwen(fields: Fields) -> DecoderConfig:
    """Llama, with a sliding window in the later layers where that is switched on."""
    config = _llama(fields)
    [full] = config.kinds
    window = fields.get('sliding_window') if fields.get('use_sliding_window') else None
    sliding = dataclasses.replace(full, window=window)
    types = _types(fields, lambda i: i >= fields.get('max_window_layers', 28))
    return _with_types(config, types, full, sliding)


def _qwen3_moe(fields: Fields) -> DecoderConfig:
    width = {'intermediate_size': fields['moe_intermediate_size']}  # every layer has experts
    fields = fields if fields.get('use_sliding_window') else _without(fields, 'sliding_window')
    config = _mistral({**fields, **width})
    mlp = dataclasses.replace(
        config.mlp,
        experts=fields.get('num_experts', fields.get('num_local_experts', 128)),
        chosen=fields.get('num_experts_per_tok', 8),
        normalized=fields.get('norm_topk_prob', False),
    )
    names = Names(query_norm='q_norm', key_norm='k_norm', router='gate')
    return dataclasses.replace(config, mlp=mlp, names=names)


def _mixtral(fields: Fields) -> DecoderConfig:
    config = _mistral(fields)
    mlp = dataclasses.replace(
        config.mlp,
        experts=fields.get('num_local_experts', 8),
        chosen=fields.get('num_experts_per_tok', 2),
    )
    names = Names(mlp='block_sparse_moe', router='gate', gate='w1', up='w3', down='w2')
    return dataclasses.replace(config, mlp=mlp, names=names)


def _phi3(fields: Fields) -> DecoderConfig:
    names = Names(query_key_value='qkv_proj', gate_up='gate_up_proj')
    fields = rename_scaling(fields, {'su': 'longrope', 'yarn': 'longrope'})
    return dataclasses.replace(_mistral(fields), names=names)


def _gemma2(fields: Fields) -> DecoderConfig:
    config = _gemma(fields)
    [full] = config.kinds
    sliding = dataclasses.replace(full, window=fields['sliding_window'])
    return _with_types(config, _types(fields, lambda i: i % 2 == 0), full, sliding)


def _gemma3(fields: Fields) -> DecoderConfig:
    full_rope = fields.get('rope_parameters', {}).get('full_attention') or {}
    scaling = {**full_rope, **fields.get('rope_scaling', {})}
    # Transformers reads a cap of the scores here, and does not compute it.
    config = _gemma({**_without(fields, 'attn_logit_softcapping'), 'rope_scaling': scaling})
    [full] = config.kinds
    local = {'rope_theta': fields.get('rope_local_base_freq', 10000.0)}
    rope = read_rope(
        {**fields, **local, 'rope_scaling': None},
        config.attention.head_dim,
        layers='sliding_attention',
    )
    sliding = LayerKind(window=fields['sliding_window'], rope=rope)
    slides = lambda i: (i + 1) % size(fields, 'sliding_window_pattern') != 0
    config = _with_types(config, _types(fields, slides), full, sliding)
    names = dataclasses.replace(config.names, query_norm='q_norm', key_norm='k_norm')
    return dataclasses.replace(config, names=names)


def _gemma(fields: Fields) -> DecoderConfig:
    """Llama, with norms on both sides, stored as offsets from one, and scaled embeddings."""
    config = _llama({'hidden_activation': 'gelu_pytorch_tanh', **fields})
    return dataclasses.replace(
        config,
        norm=dataclasses.replace(config.norm, offset=1.0),
        embedding_scale=config.hidden_size**0.5,
        names=Names(
            after_attention='post_attention_layernorm',
            before_mlp='pre_feedforward_layernorm',
            after_mlp='post_feedforward_layernorm',
        ),
    )


def _gpt2(fields: Fields) -> DecoderConfig:
    width, heads = fields['n_embd'], fields['n_head']
    head_dim = width // heads
    return DecoderConfig(
        vocab_size=fields['vocab_size'],
        hidden_size=width,
        layers=(0,) * fields['n_layer'],
        kinds=(LayerKind(),),
        attention=Attention(
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            bias=True,
            output_bias=True,
        ),
        mlp=Mlp(
            width=fields.get('n_inner', 4 * width),
            activation=fields.get('activation_function', 'gelu_new'),
            bias=True,
        ),
        norm=Norm(kind='layer', epsilon=fields.get('layer_norm_epsilon', 1e-5)),
        names=_GPT2_NAMES,
        tied=fields.get('tie_word_embeddings', True),
        positions=fields['n_positions'],
        initializer_range=fields.get('initializer_range', 0.02),
    )


_GPT2_NAMES = Names(
    body='transformer',
    embedding='wte',
    positions='wpe',
    layers='h',
    norm='ln_f',
    before_attention='ln_1',
    before_mlp='ln_2',
    attention='attn',
    query_key_value='c_attn',
    output='c_proj',
    gate=None,
    up='c_fc',
    down='c_proj',
)

FAMILIES: dict[str, Callable[[Fields], DecoderConfig]] = {
    'llama': _llama,
    'mistral': _mistral,
    'qwen2': _qwen2,
    'qwen3': _qwen3,
    'qwen3_moe': _qwen3_moe,
    'mixtral': _mixtral,
    'phi3': _phi3,
    'gemma2': _gemma2,
    'gemma3_text': _gemma3,
    'gpt2': _gpt2,
}
"""Hugging Face's `model_type` -> its reader."""


def _without(fields: Fields, name: str) -> Fields:
    return {key: value for key, value in fields.items() if key != name}


def _types(fields: Fields, slides: Callable[[int], bool]) -> Sequence[str]:
    """The kind of each layer: as the file says, else by the family's rule."""
    length = fields['num_hidden_layers']
    types = fields.get('layer_types')
    if types is None:
        types = ['sliding_attention' if slides(i) else 'full_attention' for i in range(length)]
    unknown = set(types) - {'sliding_attention', 'full_attention'}
    if unknown or len(types) != length:
        raise ValueError(
            f"config layer_types must name 'sliding_attention' or 'full_attention' for each of "
            f'{length} layers, got {types}.'
        )
    return types


def _with_types(
    config: DecoderConfig, types: Sequence[str], full: LayerKind, sliding: LayerKind
) -> DecoderConfig:
    of = [sliding if name == 'sliding_attention' else full for name in types]
    kinds = tuple(dict.fromkeys(of))
    return dataclasses.replace(config, kinds=kinds, layers=tuple(map(kinds.index, of)))
