"""From a plan and its phi to a configuration and tensors of Hugging Face PEFT."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from peftjax._leaf import LeafMethod
from peftjax._lowrank import LowRankMethod
from peftjax._peft import Peft
from peftjax._types import Phi
from peftjax.hf._draft import DELTA
from peftjax.hf._experts import is_expert
from peftjax.hf._from_peft import STARTS
from peftjax.hf._layout import layout
from peftjax.hf._names import Naming, is_saved
from peftjax.hf._prefix import (
    STORED,
    check_layers,
    count_layers,
    prompt_layout,
    scale_note,
    store_prefix,
)
from peftjax.hf._suffix import together
from peftjax.hf._to_lora import write_lora
from peftjax.hf._writing import Part, Writing
from peftjax.methods import Adapter, Ia3, PrefixTuning, PromptTuning, TrainableTokens


def to_peft(peft: Peft, phi: Phi, naming: Naming) -> Writing:
    """What is written in PEFT's format.

    Args:
      peft: as from `attach`, folded.
      phi: of it.
      naming: from paths to names.

    Raises:
      ValueError: the format has no place for it.
    """
    out = Writing(peft, phi, naming)
    main = [one for one in out.parts if not isinstance(one.method, LeafMethod | TrainableTokens)]
    tokens = [one for one in out.parts if isinstance(one.method, TrainableTokens)]
    if not main and len(tokens) == 1:
        main, tokens = tokens, []
    if len(main) != 1:
        raise ValueError(
            'an adapter of PEFT is one method, beside parameters trained in full; this chain has '
            f'{[type(part.method).__name__ for part in main]}. Save them one by one'
        )
    adapted = _main(out, main[0])
    _tokens(out, tokens)
    _saved(out, [one for one in out.parts if isinstance(one.method, LeafMethod)], adapted)
    return out


def _main(out: Writing, part: Part) -> tuple[str, ...]:
    """Adds the method itself; returns the modules whose biases PEFT can train beside it."""
    for kind, writer in WRITERS.items():
        if isinstance(part.method, kind):
            return writer(out, part) or ()
    there = "format='adapterhub', " if isinstance(part.method, Adapter) else ''
    raise ValueError(
        f'PEFT has no counterpart of {type(part.method).__name__}. Use {there}save, or another '
        'method'
    )


def _ia3(out: Writing, part: Part) -> None:
    method = part.method
    assert isinstance(method, Ia3)
    inputs = out.modules(site for site in part.sites if method.feeds(site))
    outputs = out.modules(site for site in part.sites if not method.feeds(site))
    if experts := [n for names in (inputs | outputs).values() for n in names if is_expert(n)]:
        raise ValueError(
            f'{experts[0]!r} is a parameter in transformers 5, which PEFT adapts by plain LoRA '
            'alone; its Ia3 would be left out when it is loaded. Leave it out of the target'
        )
    forward, rest = out.ends(inputs), out.ends(outputs)
    out.config |= {
        'peft_type': 'IA3',
        'target_modules': sorted({*forward, *rest}),
        'feedforward_modules': forward,
        'fan_in_fan_out': False,
        'init_ia3_weights': True,
    }
    _add(out, out.stored(part))


def _prompt(out: Writing, part: Part) -> None:
    assert isinstance(part.method, PromptTuning)
    [site] = part.sites
    rows = np.asarray(part.phi[site.path]['prompt'])
    if site.kind == 'named':
        raise ValueError('PEFT puts a prompt before position embeddings: target the table')
    _virtual(out, part.method, 'PROMPT_TUNING', rows.shape[1])
    starts = [start for start, initial in STARTS.items() if initial == part.method.initial]
    out.config['prompt_tuning_init'] = starts[0] if starts else 'RANDOM'
    out.tensors |= prompt_layout(site, rows.shape).store(rows)
    out.notes += scale_note(part.sites)


def _prefix(out: Writing, part: Part) -> None:
    sites = part.sites
    if not all(site.kind == 'named' for site in sites):
        raise ValueError('PEFT puts a prefix after rotations: target the names @key and @value')
    check_layers(sites, out.paths)
    heads, width = sites[0].sizes(sites[0].outputs)
    _virtual(out, part.method, 'PREFIX_TUNING', heads * width)
    out.config |= {
        'num_layers': count_layers(sites),
        'num_attention_heads': heads,
        'encoder_hidden_size': heads * width,
        'prefix_projection': False,
    }
    out.tensors[STORED] = store_prefix(sites, part.phi)


def _virtual(out: Writing, method: Any, kind: str, width: int) -> None:
    if method.side != 'front' or not method.shift:
        raise ValueError(
            f'PEFT puts virtual tokens in front and shifts the real ones; got side='
            f'{method.side!r}, shift={method.shift}. Use save, or train them so'
        )
    out.config |= {
        'peft_type': kind,
        'num_virtual_tokens': method.length,
        'num_transformer_submodules': 1,
        'token_dim': width,
    }


def _only_tokens(out: Writing, part: Part) -> None:
    assert isinstance(part.method, TrainableTokens)
    out.config |= {
        'peft_type': 'TRAINABLE_TOKENS',
        'token_indices': list(part.method.ids),
        'target_modules': out.ends(out.modules(part.sites)),
        'init_weights': True,
    }
    tensors = out.stored(part)
    for site in (site for site in part.sites if site.shared):
        [table] = out.table.modules(site.path)
        tensors[f'{out.head_of(site)[0]}{DELTA}'] = tensors[f'{table}{DELTA}']
    _add(out, tensors)


def _tokens(out: Writing, parts: Iterable[Part]) -> None:
    """Rows of embeddings beside LoRA."""
    for part in parts:
        assert isinstance(part.method, TrainableTokens)
        if out.config['peft_type'] != 'LORA':
            raise ValueError('PEFT has trainable tokens alone, or beside LoRA')
        known = out.config.setdefault('trainable_token_indices', {})
        for end in out.ends(out.modules(part.sites)):
            known[end] = list(part.method.ids)
        inside = lambda name: name.replace('.trainable_tokens', '.token_adapter.trainable_tokens')
        _add(out, {inside(name): tensor for name, tensor in out.stored(part).items()})


def _saved(out: Writing, parts: Iterable[Part], adapted: tuple[str, ...]) -> None:
    """Parameters that are trained in full: whole modules, biases."""
    values: dict[str, np.ndarray] = {}
    listed: list[str] = []
    for part in parts:
        for site in part.sites:
            one = layout(part.method, site, out.table, 'value', site.shape)
            stored = one.store(np.asarray(part.phi[site.path]['value']))
            if site.shared:
                (head, names), [table] = out.head_of(site), stored.values()
                out.config['ensure_weight_tying'] = True
                _add(out, {f'{head}.weight': table})
                listed += names
            values |= stored
    if not values:
        return
    modules = _whole_modules(out, values, adapted)
    left = {n for n in values if n.rpartition('.')[0] not in modules}
    _write_modules(out, modules, {n: t for n, t in values.items() if n not in left})
    if listed:
        out.config['modules_to_save'] = sorted({*out.config.get('modules_to_save', []), *listed})
    if left:
        _write_biases(out, {name: values[name] for name in left}, set(values) - left, adapted)


def _whole_modules(out: Writing, values: Mapping[str, Any], adapted: Iterable[str]) -> set[str]:
    """The modules of which every parameter is trained."""
    kinds: dict[str, set[str]] = {}
    for path in out.paths:
        kind, _, leaf = together(out.naming(path)).rpartition('.')
        kinds.setdefault(kind, set()).add(leaf)
    found = set()
    for owner in {name.rpartition('.')[0] for name in values} - set(adapted):
        leaves = kinds.get(together(f'{owner}.')[:-1])
        if leaves is None:
            raise ValueError(
                f'{owner!r} reads like a list of layers and is none: pass names, which say what '
                'the modules are called in the Hugging Face model'
            )
        if all(f'{owner}.{leaf}' in values for leaf in leaves):
            found.add(owner)
    return found


def _write_modules(out: Writing, modules: set[str], values: Mapping[str, np.ndarray]) -> None:
    prompted = out.config['peft_type'] in ('PROMPT_TUNING', 'PREFIX_TUNING')
    start = 'base_model.' if prompted else 'base_model.model.'
    if modules:
        _check_ends(out, modules)
        out.config['modules_to_save'] = sorted(modules)
    out.tensors |= {f'{start}{name}': tensor for name, tensor in values.items()}


def _check_ends(out: Writing, modules: set[str]) -> None:
    """PEFT saves every module whose name ends like one of those to save, within a word too."""
    mine = {together(f'{module}.')[:-1] for module in modules}
    for path in out.paths:
        other = together(out.naming(path)).rpartition('.')[0]
        if other not in mine and is_saved(other, modules):
            raise ValueError(
                f'PEFT would train {other!r} too: its name ends like one of {sorted(modules)[:5]}, '
                'which are trained in full. Train both, or pass names that end otherwise'
            )


def _write_biases(
    out: Writing, values: Mapping[str, np.ndarray], saved: Iterable[str], adapted: tuple[str, ...]
) -> None:
    """The biases of the adapted modules, or all that there are."""
    every = [name for path in out.paths if (name := out.naming(path)).endswith('.bias')]
    kinds = set(map(together, every))
    own = {name for m in adapted if together(name := f'{m}.bias') in kinds}
    trained = {*values, *saved}
    stacks = set(map(together, trained))
    all_of_them = all(n in trained or ('{}' in n and together(n) in stacks) for n in every)
    which = 'lora_only' if set(values) == own else 'all' if all_of_them else None
    if out.config['peft_type'] != 'LORA' or which is None:
        raise ValueError(
            'PEFT trains whole modules, and beside LoRA the biases of the adapted modules or all '
            f'biases; here {sorted(values)[:3]} ({len(values)}) are trained'
        )
    out.config['bias'] = which
    for name, tensor in values.items():
        owner = name.removesuffix('.bias')
        middle = '.base_layer' if owner in adapted else ''
        out.tensors[f'base_model.model.{owner}{middle}.bias'] = tensor


def _add(out: Writing, tensors: Mapping[str, np.ndarray]) -> None:
    out.tensors |= {f'base_model.model.{name}': tensor for name, tensor in tensors.items()}


WRITERS = {
    LowRankMethod: write_lora,
    Ia3: _ia3,
    PromptTuning: _prompt,
    PrefixTuning: _prefix,
    TrainableTokens: _only_tokens,
}
