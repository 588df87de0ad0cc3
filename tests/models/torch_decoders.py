"""Tiny random decoders of transformers' PyTorch, one for each family and variant."""

SIZES = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GEMMA = dict(head_dim=6, query_pre_attn_scalar=9, sliding_window=4, num_hidden_layers=3)
FACTORS = [1.0, 1.5]
STRETCHED = dict(factor=2.0, original_max_position_embeddings=16)

FAMILIES = {
    'llama': ('Llama', dict(attention_bias=True, mlp_bias=True)),
    'mistral': ('Mistral', dict(head_dim=6, sliding_window=4)),
    'qwen2': (
        'Qwen2',
        dict(
            use_sliding_window=True, sliding_window=4, max_window_layers=1, tie_word_embeddings=True
        ),
    ),
    'qwen3': ('Qwen3', dict(head_dim=6, tie_word_embeddings=True)),
    'gemma2': (
        'Gemma2',
        GEMMA | dict(attn_logit_softcapping=5.0, final_logit_softcapping=4.0),
    ),
    'gemma3_text': (
        'Gemma3',
        GEMMA
        | dict(
            layer_types=['sliding_attention', 'full_attention', 'sliding_attention'],
            rope_parameters={
                'full_attention': {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 1e6},
                'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
            },
        ),
    ),
    'phi3': ('Phi3', dict(sliding_window=5)),
    'gpt2': ('GPT2', {}),
    'qwen3_moe': (
        'Qwen3Moe',
        dict(head_dim=6, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12),
    ),
    'mixtral': ('Mixtral', dict(num_local_experts=3, num_experts_per_tok=2)),
}

ROTATIONS = {
    'linear': dict(rope_type='linear', factor=3.0),
    'dynamic': dict(rope_type='dynamic', factor=2.0),
    'llama3': dict(rope_type='llama3', **STRETCHED, low_freq_factor=1.0, high_freq_factor=4.0),
    'yarn': dict(rope_type='yarn', **STRETCHED, beta_fast=4.0, beta_slow=1.0),
    'longrope': dict(
        rope_type='longrope',
        short_factor=FACTORS,
        long_factor=[2.0, 4.0],
        original_max_position_embeddings=16,
    ),
}


def make_model(name, **changes):
    """A model of a family with weights that matter."""
    import torch
    import transformers

    family, options = FAMILIES[name]
    options = SIZES | options | changes
    if name == 'gpt2':
        config = transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=96, eos_token_id=2
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        kind = 'Gemma3Text' if family == 'Gemma3' else family
        # Scaled dot-product attention of PyTorch knows no soft cap.
        config = getattr(transformers, f'{kind}Config')(**options, attn_implementation='eager')
        model = getattr(transformers, f'{family}ForCausalLM')(config)
    wide = 0.3 if 'gemma' in name else 0.6  # such that generation does not settle on one token
    for parameter in model.parameters():
        vector = parameter.ndim == 1
        torch.nn.init.normal_(parameter, mean=float(vector), std=0.3 if vector else wide)
    return model.eval()


def make_inputs(tokens=9):
    """Three rows: full, padded at the end, padded at the front; with positions of real tokens."""
    import torch

    ids = torch.randint(3, SIZES['vocab_size'], (3, tokens))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    mask[2, :3] = 0
    ids = torch.where(mask == 1, ids, 0)
    return {
        'input_ids': ids,
        'attention_mask': mask,
        'position_ids': mask.cumsum(1) - mask,
    }
