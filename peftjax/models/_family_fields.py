"""What the `config.json` of a family of decoders must say, and what it means where it is silent."""

from typing import Any

SETTINGS = {
    'quantization_config': None,
    'use_bidirectional_attention': False,
    'add_cross_attention': False,
    'scale_attn_weights': True,
    'scale_attn_by_inverse_layer_idx': False,
    'decoder_sparse_step': 1,
    'mlp_only_layers': [],
}
"""Settings of what these decoders do not compute, and what each must be."""

_SHAPE = ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads')
SIZES = (*_SHAPE, 'intermediate_size')
NEEDED: dict[str, tuple[str, ...]] = {
    'qwen3_moe': (*_SHAPE, 'moe_intermediate_size'),
    'gemma2': (*SIZES, 'sliding_window'),
    'gemma3_text': (*SIZES, 'sliding_window'),
    'gpt2': ('vocab_size', 'n_embd', 'n_layer', 'n_head', 'n_positions'),
}
"""Sizes that the files of a family must say, where they are not `SIZES`."""

DEFAULTS: dict[str, dict[str, Any]] = {
    'mistral': {'num_key_value_heads': 8, 'sliding_window': 4096},
    'mixtral': {'num_key_value_heads': 8, 'rope_theta': 1e6, 'rms_norm_eps': 1e-5},
    'qwen2': {'sliding_window': 4096},
    'qwen3': {'head_dim': 128, 'sliding_window': 4096},
    'qwen3_moe': {'num_key_value_heads': 4, 'sliding_window': 4096},
    'phi3': {
        'rms_norm_eps': 1e-5,
        'max_position_embeddings': 4096,
        'original_max_position_embeddings': 4096,
    },
    'gemma2': {
        'num_key_value_heads': 4,
        'head_dim': 256,
        'query_pre_attn_scalar': 256,
        'sliding_window': 4096,
        'attn_logit_softcapping': 50.0,
        'final_logit_softcapping': 30.0,
        'tie_word_embeddings': True,
    },
    'gemma3_text': {
        'num_key_value_heads': 4,
        'head_dim': 256,
        'query_pre_attn_scalar': 256,
        'sliding_window': 4096,
        'sliding_window_pattern': 6,
        'rope_theta': 1e6,
        'tie_word_embeddings': True,
    },
}
"""What Hugging Face takes for fields that a file does not have, where it is not the same for all.

A null is a field: it is not replaced, and means that there is none.
"""
