"""From the configuration of another library to a method: Hugging Face PEFT, AdapterHub."""

from collections.abc import Mapping
from typing import Any

import peftjax as pj

ATTENTION = {'q': 'query', 'k': 'key', 'v': 'value'}
ACTIVATION = {'swish': 'silu'}
NORM = {(0, 0): '', (1, 0): 'before', (0, 1): 'after', (1, 1): 'both'}


def from_hugging_face(config: Mapping[str, Any], modules: tuple[str, ...]) -> Any:
    """The method of a `PeftConfig`.

    Args:
      config: content of `adapter_config.json`.
      modules: the top modules of the model; names of others in `modules_to_save` have no effect.

    Raises:
      ValueError: a configuration without counterpart.
    """
    kind = config['peft_type']
    if kind == 'LORA':
        method = _lora(config)
    elif kind == 'IA3':
        forward = '|'.join(_kernels(config['feedforward_modules']))
        method = pj.Ia3(target=_kernels(config['target_modules']), feedforward=forward)
    elif kind == 'PROMPT_TUNING':
        method = pj.PromptTuning(length=config['num_virtual_tokens'])
    else:
        raise ValueError(f'no method for {kind}')
    wanted = dict.fromkeys(config['modules_to_save'] or ())
    saved = tuple(f'^{name}/' for name in wanted if name in modules)
    return pj.chain(method, saved=pj.Trainable(target=saved)) if saved else method


def _lora(config: Mapping[str, Any]) -> pj.Lora | pj.Dora:
    def patterns(field: str) -> tuple[tuple[str, Any], ...]:
        return tuple(zip(_kernels(config[field]), config[field].values(), strict=True))

    return (pj.Dora if config['use_dora'] else pj.Lora)(
        target=_kernels(config['target_modules']),
        rank=config['r'],
        alpha=config['lora_alpha'],
        rank_stabilized=config['use_rslora'],
        ranks=patterns('rank_pattern'),
        alphas=patterns('alpha_pattern'),
    )


def _kernels(names: Any) -> tuple[str, ...]:
    """Patterns for modules: a name stands for every path that ends with it."""
    return tuple(f'(^|/)({name})/kernel$'.replace('\\.', '/') for name in names)


def from_adapter_hub(config: Mapping[str, Any]) -> Any:
    """The method of an `AdapterConfig`, with the head where the model has one.

    Args:
      config: content of `adapter_config.json`.

    Raises:
      ValueError: a configuration without counterpart.
    """
    inner = config['config']
    several = inner['configs'] if inner.get('architecture') == 'union' else [inner]
    methods = [method for one in several for method in _one(one)]
    if config['model_class'] == 'BertAdapterModel':
        methods.append(pj.Trainable(target='^heads/'))
    return pj.chain(*methods) if len(methods) > 1 else methods[0]


def _one(config: Mapping[str, Any]) -> list[Any]:
    kind = config.get('architecture', 'bottleneck')
    if config.get('leave_out') or (kind != 'bottleneck' and config.get('use_gating')):
        raise ValueError(f'no method for {config}')
    if kind == 'bottleneck':
        places = {'attention': config['mh_adapter'], 'mlp': config['output_adapter']}
        return [_bottleneck(config, place) for place, used in places.items() if used]
    if kind == 'lora':
        return _adapter_hub_lora(config)
    if kind == 'prefix_tuning':
        width = 0 if config['flat'] else config['bottleneck_size']
        return [pj.PrefixTuning(length=config['prefix_length'], projection=width, side='back')]
    if kind == 'prompt_tuning' and config['combine'] == 'prefix':
        fields = {'length': config['prompt_length'], 'shift': False, 'initial': 'random'}
        return [pj.PromptTuning(target='@embeddings', **fields)]
    raise ValueError(f'no method for {config}')


def _adapter_hub_lora(config: Mapping[str, Any]) -> list[Any]:
    names = [f'/self/{ATTENTION[m]}/' for m in config['attn_matrices'] if config['selfattn_lora']]
    names += ['/intermediate/dense/'] * config['intermediate_lora']
    names += [r'/layer(/\d+)?/output/dense/'] * config['output_lora']
    target = tuple(f'{name}kernel$' for name in names)
    if config['composition_mode'] == 'scale':
        return [pj.Ia3(target=target)]
    if not config['use_dora']:
        return [pj.Lora(target=target, rank=config['r'], alpha=config['alpha'])]
    # Its DoRA scales the bias too: a trained bias, in our terms.
    biases = pj.Trainable(target=tuple(f'{name}bias$' for name in names))
    return [pj.Dora(target=target, rank=config['r'], alpha=config['alpha']), biases]


def _bottleneck(config: Mapping[str, Any], place: str) -> pj.Adapter:
    """The adapter after one half of a block."""
    if config['ln_after'] and not config['adapter_residual_before_ln']:
        raise ValueError('no adapter whose own norm stands before its residual')
    if not config['residual_before_ln'] or (config['is_parallel'] and place == 'attention'):
        raise ValueError(f'no value to read for {config}')
    factors = config['reduction_factor']
    factors = dict(factors) if isinstance(factors, dict) else {'default': factors}
    source = f'@{place}_residual' if config['original_ln_before'] else ''
    return pj.Adapter(
        target=f'@{place}_output',
        source='@attention_residual' if config['is_parallel'] else source,
        reduction=factors.pop('default'),
        reductions=tuple((f'@{place}_output/{i}', factor) for i, factor in factors.items()),
        activation=ACTIVATION.get(config['non_linearity'], config['non_linearity']),
        scale=config['scaling'],
        norm=NORM[config['ln_before'], config['ln_after']],
        gate=config['use_gating'],
    )
