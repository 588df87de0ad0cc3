"""AdapterHub's names: where its adapters lie in the models that it knows."""

import dataclasses
import re
from typing import Any

from peftjax.methods.adapter import ACTIVATIONS

VERSION = 'adapters.1.3.0'
"""Of the format that is written."""

UNSCALED = re.compile(r'adapters\.(0\.|1\.0(\.|$)|1\.1\.0\.dev)')
"""Versions that left `alpha / r` out of LoRA, whatever `alpha` they wrote; adapter-transformers,
whose versions have no name in front, did not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model.

    Attributes:
      stem: of its classes: `Bert` of `BertModel`.
      body: the attribute that holds everything below the head.
      layers: the list of layers.
      attention: in a layer, the module with a prefix.
      prefix: what the prefix is called there.
      places: in a layer, where the adapters after attention and MLP lie.
      roles: in a layer, the linear layers that LoRA and IA3 adapt, by their names in a
        configuration: `q`, `k`, `v`, `intermediate_lora`, `output_lora`.
      norm: in a layer, a norm as wide as the model.
      bidirectional: whether virtual tokens may lie at the back, where real ones keep their places.
      prompts: whether it has prompt tuning.
    """

    stem: str
    body: str
    layers: str = 'encoder.layer'
    attention: str = 'attention.self'
    prefix: str = 'self_prefix'
    places: tuple[tuple[str, str], ...] = (('attention', 'attention.output'), ('mlp', 'output'))
    roles: tuple[tuple[str, str], ...] = (
        ('q', 'attention.self.query'),
        ('k', 'attention.self.key'),
        ('v', 'attention.self.value'),
        ('intermediate_lora', 'intermediate.dense'),
        ('output_lora', 'output.dense'),
    )
    norm: str = 'output.LayerNorm'
    bidirectional: bool = True
    prompts: bool = True


BESIDE = (('attention', 'attention_adapters'), ('mlp', 'output_adapters'))

# The names of the two parts of the MLP are the other way round there.
LLAMA = Family(
    stem='Llama',
    body='model',
    layers='layers',
    attention='self_attn',
    places=BESIDE,
    roles=(
        ('q', 'self_attn.q_proj'),
        ('k', 'self_attn.k_proj'),
        ('v', 'self_attn.v_proj'),
        ('intermediate_lora', 'mlp.down_proj'),
        ('output_lora', 'mlp.up_proj'),
    ),
    norm='input_layernorm',
    bidirectional=False,
    prompts=False,
)

FAMILIES = {
    'bert': Family(stem='Bert', body='bert'),
    'roberta': Family(stem='Roberta', body='roberta'),
    'xlm-roberta': Family(stem='XLMRoberta', body='roberta'),
    'electra': Family(stem='Electra', body='electra'),
    'distilbert': Family(
        stem='DistilBert',
        body='distilbert',
        layers='transformer.layer',
        attention='attention',
        prefix='self',
        places=BESIDE,
        roles=(
            ('q', 'attention.q_lin'),
            ('k', 'attention.k_lin'),
            ('v', 'attention.v_lin'),
            ('intermediate_lora', 'ffn.lin1'),
            ('output_lora', 'ffn.lin2'),
        ),
        norm='sa_layer_norm',
    ),
    'gpt2': Family(
        stem='GPT2',
        body='transformer',
        layers='h',
        attention='attn',
        places=BESIDE,
        roles=(
            ('qkv', 'attn.c_attn'),
            ('intermediate_lora', 'mlp.c_fc'),
            ('output_lora', 'mlp.c_proj'),
        ),
        norm='ln_1',
        bidirectional=False,
        prompts=False,
    ),
    'llama': LLAMA,
    'mistral': dataclasses.replace(LLAMA, stem='Mistral'),
}
"""By `model_type`."""

ACTIVATION = {'swish': 'silu', 'gelu_new': 'gelu_tanh', 'linear': 'identity'}
"""AdapterHub's names of activations, where they are not ours."""

STARTS = {'bert': 'bert', 'mam_adapter': 'identity', 'houlsby': 'houlsby'}
"""What bottleneck adapters start from."""

BOTTLENECK: dict[str, Any] = {
    'cross_adapter': False,
    'dropout': 0.0,
    'factorized_phm_W': True,
    'factorized_phm_rule': False,
    'hypercomplex_nonlinearity': 'glorot-uniform',
    'init_weights_seed': None,
    'inv_adapter': None,
    'inv_adapter_reduction_factor': None,
    'learn_phm': True,
    'original_ln_after': True,
    'phm_bias': True,
    'phm_c_init': 'normal',
    'phm_dim': 4,
    'phm_init_range': 0.0001,
    'phm_layer': False,
    'phm_rank': 1,
    'residual_before_ln': True,
    'shared_W_phm': False,
    'shared_phm_rule': True,
    'stochastic_depth': 0.0,
}
"""What a configuration says of what is not there."""


def activation(name: str) -> str:
    """Our name of an activation of AdapterHub; empty where there is none."""
    found = ACTIVATION.get(name, name)
    return found if found in ACTIVATIONS else ''


def activation_there(name: str) -> str:
    """AdapterHub's name of one of ours."""
    return next((theirs for theirs, ours in ACTIVATION.items() if ours == name), name)
