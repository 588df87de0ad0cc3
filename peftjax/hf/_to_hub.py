"""From a plan and its phi to a configuration and tensors of AdapterHub's `adapters`."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from peftjax._leaf import LeafMethod
from peftjax._lowrank import LowRankMethod
from peftjax._peft import Peft
from peftjax._sites import Site
from peftjax._types import Phi
from peftjax.hf._hub import BOTTLENECK, STARTS, activation_there
from peftjax.hf._hub_writing import About, Hub
from peftjax.hf._names import Naming
from peftjax.hf._prefix import check_layers, count_layers, store_network, store_prefix
from peftjax.hf._to_hub_lora import write_hub_ia3, write_hub_lora
from peftjax.hf._writing import Part, Writing
from peftjax.methods import Adapter, Ia3, PrefixTuning, PromptTuning
from peftjax.methods.prefix import SHARED

Config = dict[str, Any]

PLACES = {'attention': 'mh_adapter', 'mlp': 'output_adapter'}
"""Where bottleneck adapters lie, and what switches them on."""

SOURCES = {
    ('attention', ''): (False, False),
    ('attention', '@attention_residual'): (True, False),
    ('mlp', ''): (False, False),
    ('mlp', '@mlp_residual'): (True, False),
    ('mlp', '@attention_residual'): (False, True),
}
"""What an adapter at a place reads, as `original_ln_before` and `is_parallel`."""


def to_hub(peft: Peft, phi: Phi, naming: Naming, about: About) -> tuple[Hub, Config]:
    """What is written in AdapterHub's format.

    Args:
      peft: as from `attach`.
      phi: of it.
      naming: from paths to names.
      about: what is said beside.

    Returns:
      The tensors, and the configuration.

    Raises:
      ValueError: the format has no place for it.
    """
    hub = Hub(Writing(peft, phi, naming), about)
    if any(_of_other_width(part, hub.width()) for part in hub.out.parts):
        hub = Hub(Writing(*peft.fold(phi), naming), about)
        hub.out.notes.append(
            'the network of the prefix reads tokens of another width than in AdapterHub: the '
            'prefix that it makes is written, without the network'
        )
    _check_gates(hub.out.parts)
    configs = [
        config
        for part in hub.out.parts
        if not isinstance(part.method, LeafMethod)
        for config in _write(hub, part)
    ]
    hub.check_saved()
    merged = _merged(configs)
    if not merged:
        raise ValueError('an adapter of AdapterHub adapts something; this one trains a head alone')
    union = {'architecture': 'union', 'configs': merged}
    return hub, union if len(merged) > 1 else merged[0]


def _check_gates(parts: Iterable[Part]) -> None:
    """A gate is a mean over tokens, and a prefix has tokens here that it has not there."""
    methods = [part.method for part in parts]
    gated = any(isinstance(one, Adapter) and one.gate for one in methods)
    if gated and any(isinstance(one, PrefixTuning) for one in methods):
        raise ValueError(
            'the gate of an adapter is a mean over tokens, and those of a prefix are not among '
            'them in AdapterHub: gate=True beside PrefixTuning has no counterpart. Use save'
        )


def _write(hub: Hub, part: Part) -> list[Config]:
    """Adds the tensors of a method; returns its configurations."""
    for kind, writer in WRITERS.items():
        if isinstance(part.method, kind):
            return writer(hub, part)
    raise ValueError(
        f'AdapterHub has no counterpart of {type(part.method).__name__}. Use save, or another '
        'method'
    )


def _merged(configs: Iterable[Config]) -> list[Config]:
    """Bottleneck adapters that differ in their place alone have one configuration."""
    found: list[Config] = []
    for config in configs:
        same = [one for one in found if one.get('architecture') == config.get('architecture')]
        places = [flag for flag in PLACES.values() if config.get(flag)]
        if any(not places or any(one[flag] for flag in places) for one in same):
            raise ValueError(
                'AdapterHub keeps one adapter of a kind in a folder, and at a place one bottleneck '
                'adapter; this chain has several. Save them one by one'
            )
        rest = lambda one: {key: v for key, v in one.items() if key not in PLACES.values()}
        twin = next((one for one in same if rest(one) == rest(config)), None)
        if twin is None:
            found.append(config)
        else:
            twin |= dict.fromkeys(places, True)
    return found


# Bottleneck adapters -----------------------------------------------------------------------------


def _bottleneck(hub: Hub, part: Part) -> list[Config]:
    method = part.method
    assert isinstance(method, Adapter)
    at = {place: [s for s in part.sites if _is_at(s, place)] for place in PLACES}
    known = [site for sites in at.values() for site in sites]
    if other := [site.path for site in part.sites if site not in known]:
        raise ValueError(
            f'AdapterHub has adapters at @attention_output and @mlp_output; {other[0]!r} is '
            'elsewhere. Target these names'
        )
    configs = [_configured(hub, method, place, at[place]) for place in PLACES if at[place]]
    for name, tensor in hub.out.stored(part).items():
        place, layer, end = re.fullmatch(r'@(\w+)_output\.(\d+)\.(.+)', name).groups()  # type: ignore[union-attr]
        within = dict(hub.about.family.places)[place]
        module = f'{hub.about.family.layers}.{layer}.{within}.adapters.{hub.about.name}'
        hub.put(module, _inside(method, end, tensor))
    return configs


def _is_at(site: Site, place: str) -> bool:
    return site.path.partition('/')[0] == f'@{place}_output'


def _inside(method: Adapter, end: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
    """A tensor by its name in an adapter; the norm before `down` is its first module too."""
    before = method.norm in ('before', 'both')
    if end.startswith('adapter_norm_before.'):
        return {end: tensor, end.replace('norm_before', 'down.0'): tensor}
    return {end.replace('adapter_down.', f'adapter_down.{int(before)}.'): tensor}


def _configured(hub: Hub, method: Adapter, place: str, sites: Iterable[Site]) -> Config:
    """The configuration of the adapters at one place."""
    if (place, method.source) not in SOURCES:
        read = [source or 'its target' for at, source in SOURCES if at == place]
        raise ValueError(
            f'an adapter of AdapterHub at @{place}_output reads {" or ".join(read)}; this one '
            f'reads {method.source!r}. Use save'
        )
    before, parallel = SOURCES[place, method.source]
    after = method.norm in ('after', 'both')
    if parallel and after:
        raise ValueError(
            f'a parallel adapter of AdapterHub at @{place}_output has no norm over its sum with '
            f'the target; this one has norm={method.norm!r}. Use save'
        )
    starts = {ours: theirs for theirs, ours in STARTS.items()}
    factors = _factors(hub, method, sites)
    return BOTTLENECK | {
        **{flag: at == place for at, flag in PLACES.items()},
        'adapter_residual_before_ln': after,
        'init_weights': starts[method.initial],
        'is_parallel': parallel,
        'leave_out': hub.left_out(factors),
        'ln_after': after,
        'ln_before': method.norm in ('before', 'both'),
        'non_linearity': activation_there(method.activation),
        'original_ln_before': before,
        'reduction_factor': _together(method, factors),
        'scaling': method.scale if isinstance(method.scale, str) else float(method.scale),
        'use_gating': method.gate,
    }


def _factors(hub: Hub, method: Adapter, sites: Iterable[Site]) -> dict[int, float]:
    """What the width is divided by in each layer."""
    return {
        int(module.rpartition('.')[2]): method.reduction_at(site)
        for site in sites
        for module in hub.out.table.modules(site.path)
    }


def _together(method: Adapter, factors: Mapping[int, float]) -> Any:
    """One number, or one for each layer that has another."""
    if len(set(factors.values())) == 1:
        return next(iter(factors.values()))
    others = {str(layer): v for layer, v in sorted(factors.items()) if v != method.reduction}
    return {**others, 'default': method.reduction}


# Virtual tokens ----------------------------------------------------------------------------------


def _of_other_width(part: Part, width: int | None) -> bool:
    """Whether a prefix is made by a network that AdapterHub cannot hold."""
    method = part.method
    if not isinstance(method, PrefixTuning) or not method.projection:
        return False
    return part.phi[SHARED]['tokens'].shape[1] != width


def _prefix(hub: Hub, part: Part) -> list[Config]:
    method, family = part.method, hub.about.family
    assert isinstance(method, PrefixTuning)
    if not all(site.kind == 'named' for site in part.sites):
        raise ValueError(
            'AdapterHub puts a prefix after rotations: target the names @key and @value'
        )
    _check_side(hub, method)
    check_layers(part.sites, hub.out.paths)
    if method.projection:
        tensors = store_network(part.sites, part.phi)
    else:
        tensors = {'control_trans': store_prefix(part.sites, part.phi).reshape(-1)}
    own = f'prefix_tunings.{hub.about.name}.{family.prefix}'
    hub.put(f'prefix_tuning.{own}', tensors)
    for layer in range(count_layers(part.sites)):  # Their layers hold the whole of it, once more.
        hub.put(f'{family.layers}.{layer}.{family.attention}.prefix_tuning.pool.{own}', tensors)
    return [
        {
            'architecture': 'prefix_tuning',
            'bottleneck_size': method.projection or 512,
            'cross_prefix': True,
            'dropout': 0.0,
            'encoder_prefix': True,
            'flat': not method.projection,
            'init_weights_seed': None,
            'leave_out': [],
            'non_linearity': 'tanh',
            'prefix_length': method.length,
            'shared_gating': True,
            'use_gating': False,
        }
    ]


def _prompt(hub: Hub, part: Part) -> list[Config]:
    method, [site] = part.method, part.sites
    assert isinstance(method, PromptTuning)
    if site.kind != 'named':
        raise ValueError(
            f'AdapterHub puts a prompt after position embeddings and norm, PEFT before them; '
            f"{site.path!r} is before. Train one at a name, such as target='@embeddings'"
        )
    if not hub.about.family.prompts:
        raise ValueError(f'AdapterHub has no prompt tuning for {hub.about.model_type}. Use save')
    _check_side(hub, method)
    rows = np.asarray(part.phi[site.path]['prompt'])
    own = f'prompt_tuning.prompt_tunings.{hub.about.name}.prompt_embedding'
    hub.put(own, {'weight': rows})
    return [
        {
            'architecture': 'prompt_tuning',
            'combine': 'prefix',
            'init_weights_seed': None,
            'prompt_init': 'random_uniform',
            'prompt_init_text': None,
            'prompt_length': method.length,
        }
    ]


def _check_side(hub: Hub, method: PrefixTuning | PromptTuning) -> None:
    """Real tokens keep their places there; where all see all, it does not matter on which side."""
    front = method.side == 'front' and not method.shift
    if not front and not (method.side == 'back' and hub.about.family.bidirectional):
        back = "side='back', or " if hub.about.family.bidirectional else ''
        raise ValueError(
            f"AdapterHub's virtual tokens do not count in the positions of the real ones: train "
            f'them with {back}shift=False; got side={method.side!r}, shift={method.shift}'
        )


WRITERS = {
    Adapter: _bottleneck,
    LowRankMethod: write_hub_lora,
    Ia3: write_hub_ia3,
    PrefixTuning: _prefix,
    PromptTuning: _prompt,
}
