"""From a plan and its phi to a configuration and tensors of Hugging Face PEFT."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from peftjax._leaf import LeafMethod
from peftjax._lowrank import LowRankMethod
from peftjax._method import Method
from peftjax._peft import Peft
from peftjax._sites import Site, Sites
from peftjax._types import Path, Phi
from peftjax.hf._layout import layout
from peftjax.hf._names import Naming, Table
from peftjax.hf._prefix import count_layers, store_prefix
from peftjax.hf._suffix import suffixes
from peftjax.methods import Dora, Ia3, PrefixTuning, PromptTuning, TrainableTokens

Part = tuple[Method, tuple[Site, ...], Any]
"""A method, its sites and its phi."""


class Export:
    """What is written: a configuration, and tensors by the names of the file.

    Args:
      peft: as from `attach`, folded.
      phi: of it.
      naming: from paths to names.

    Raises:
      ValueError: the format has no place for it.
    """

    def __init__(self, peft: Peft, phi: Phi, naming: Naming):
        self.naming = naming
        self.paths = [path for path, _, _ in peft.leaves]
        self.config: dict[str, Any] = {}
        self.tensors: dict[str, np.ndarray] = {}
        self.adapted: tuple[str, ...] = ()
        parts = [
            (part, chosen, _at(phi, keys))
            for (keys, part), chosen in zip(peft.method.parts, peft.sites, strict=True)
        ]
        every = Sites(tuple(site for _, chosen, _ in parts for site in chosen))
        self.table = Table(_once(every), naming)
        main = [one for one in parts if not isinstance(one[0], LeafMethod | TrainableTokens)]
        leaves = [one for one in parts if isinstance(one[0], LeafMethod)]
        tokens = [one for one in parts if isinstance(one[0], TrainableTokens)]
        if not main and len(tokens) == 1:
            main, tokens = tokens, []
        if len(main) != 1:
            raise ValueError(
                'an adapter of PEFT is one method, beside parameters trained in full; this chain '
                f'has {[type(part).__name__ for part, _, _ in main]}. Save them one by one'
            )
        self._main(main[0])
        self._tokens(tokens)
        self._saved(leaves)

    def _main(self, one: Part) -> None:
        part, sites, phi = one
        writers = {
            LowRankMethod: self._lora,
            Ia3: self._ia3,
            PromptTuning: self._prompt,
            PrefixTuning: self._prefix,
            TrainableTokens: self._only_tokens,
        }
        for kind, writer in writers.items():
            if isinstance(part, kind):
                return writer(part, sites, phi)
        raise ValueError(
            f'PEFT has no counterpart of {type(part).__name__}. Use save, or another method'
        )

    def _lora(self, part: LowRankMethod, sites: tuple[Site, ...], phi: Any) -> None:
        for site in sites:
            if site.shared or self.table.is_raw(site.path):
                raise ValueError(
                    f'PEFT has no safe counterpart of Lora at {site.path!r}: '
                    + ('a weight with several uses' if site.shared else 'not a module of its own')
                )
        chosen = self._modules(sites)
        ranks = {site.path: part.rank_at(site) for site in sites}
        alphas = {site.path: _alpha(part, site) for site in sites}
        rank, alpha = _most(ranks), _most(alphas)
        self.config |= {
            'peft_type': 'LORA',
            'r': rank,
            'lora_alpha': alpha,
            'lora_dropout': part.dropout,
            'use_rslora': part.rank_stabilized,
            'use_dora': isinstance(part, Dora),
            'target_modules': suffixes(chosen, self._weights(), self.naming),
            'rank_pattern': self._patterns(chosen, ranks, rank),
            'alpha_pattern': self._patterns(chosen, alphas, alpha),
            'bias': 'none',
            'fan_in_fan_out': False,
            'init_lora_weights': True,
        }
        self.adapted = tuple(name for names in chosen.values() for name in names)
        self._store(part, sites, phi)

    def _patterns(
        self, chosen: Mapping[Path, tuple[str, ...]], values: Mapping[Path, Any], default: Any
    ) -> dict[str, Any]:
        """Values that differ from the default, by regular expression."""
        found = {}
        for value in dict.fromkeys(values.values()):
            if value != default:
                mine = {path: names for path, names in chosen.items() if values[path] == value}
                for end in suffixes(mine, self._weights(), self.naming):
                    found[re.escape(end)] = value
        return found

    def _ia3(self, part: Ia3, sites: tuple[Site, ...], phi: Any) -> None:
        inputs = self._modules(site for site in sites if part.feeds(site))
        outputs = self._modules(site for site in sites if not part.feeds(site))
        forward, rest = (suffixes(c, self._weights(), self.naming) for c in (inputs, outputs))
        self.config |= {
            'peft_type': 'IA3',
            'target_modules': sorted({*forward, *rest}),
            'feedforward_modules': forward,
            'fan_in_fan_out': False,
            'init_ia3_weights': True,
        }
        self._store(part, sites, phi)

    def _prompt(self, part: PromptTuning, sites: tuple[Site, ...], phi: Any) -> None:
        rows = np.asarray(phi[sites[0].path]['prompt'])
        if sites[0].kind == 'named':
            raise ValueError('PEFT puts a prompt before position embeddings: target the table')
        self._virtual(part, 'PROMPT_TUNING', rows.shape[1])
        self.tensors['prompt_embeddings'] = rows

    def _prefix(self, part: PrefixTuning, sites: tuple[Site, ...], phi: Any) -> None:
        if not all(site.kind == 'named' for site in sites):
            raise ValueError('PEFT puts a prefix after rotations: target the names @key and @value')
        heads, width = sites[0].sizes(sites[0].outputs)
        self._virtual(part, 'PREFIX_TUNING', heads * width)
        self.config |= {
            'num_layers': count_layers(sites),
            'num_attention_heads': heads,
            'encoder_hidden_size': heads * width,
            'prefix_projection': False,
        }
        self.tensors |= store_prefix(sites, phi)

    def _virtual(self, part: Any, kind: str, width: int) -> None:
        if part.side != 'front' or not part.shift:
            raise ValueError(
                f'PEFT puts virtual tokens in front and shifts the real ones; got side='
                f'{part.side!r}, shift={part.shift}. Use save, or train them so'
            )
        self.config |= {
            'peft_type': kind,
            'num_virtual_tokens': part.length,
            'num_transformer_submodules': 1,
            'token_dim': width,
        }

    def _only_tokens(self, part: TrainableTokens, sites: tuple[Site, ...], phi: Any) -> None:
        self.config |= {
            'peft_type': 'TRAINABLE_TOKENS',
            'token_indices': list(part.ids),
            'target_modules': suffixes(self._modules(sites), self._weights(), self.naming),
            'init_weights': True,
        }
        self._store(part, sites, phi)

    def _tokens(self, parts: Iterable[Part]) -> None:
        """Rows of embeddings beside LoRA."""
        for part, sites, phi in parts:
            assert isinstance(part, TrainableTokens)
            if self.config['peft_type'] != 'LORA':
                raise ValueError('PEFT has trainable tokens alone, or beside LoRA')
            known = self.config.setdefault('trainable_token_indices', {})
            for end in suffixes(self._modules(sites), self._weights(), self.naming):
                known[end] = list(part.ids)
            self._store(part, sites, phi, 'token_adapter.')

    def _saved(self, parts: Iterable[Part]) -> None:
        """Parameters that are trained in full: whole modules, biases."""
        values: dict[str, np.ndarray] = {}
        for part, sites, phi in parts:
            for site in sites:
                if site.shared:
                    raise ValueError(f'PEFT has no safe counterpart of training {site.path!r}, '
                                     'which has several uses')  # fmt: skip
                one = layout(part, site, self.table, 'value', site.shape)
                values |= one.store(np.asarray(phi[site.path]['value']))
        if not values:
            return
        modules = self._whole_modules(values)
        left = {n for n in values if n.rpartition('.')[0] not in modules}
        self._write_modules(modules, {n: t for n, t in values.items() if n not in left})
        if left:
            self._write_biases({name: values[name] for name in left}, set(values) - left)

    def _whole_modules(self, values: Mapping[str, Any]) -> set[str]:
        """The modules of which every parameter is trained."""
        kinds: dict[str, set[str]] = {}
        for path in self.paths:
            kind, _, leaf = _layers(self.naming(path)).rpartition('.')
            kinds.setdefault(kind, set()).add(leaf)
        found = set()
        for owner in {name.rpartition('.')[0] for name in values} - set(self.adapted):
            leaves = kinds.get(_layers(f'{owner}.')[:-1])
            if leaves is None:
                raise ValueError(
                    f'{owner!r} reads like a list of layers and is none: pass names, which say '
                    'what the modules are called in the Hugging Face model'
                )
            if all(f'{owner}.{leaf}' in values for leaf in leaves):
                found.add(owner)
        return found

    def _write_modules(self, modules: set[str], values: Mapping[str, np.ndarray]) -> None:
        prompted = self.config['peft_type'] in ('PROMPT_TUNING', 'PREFIX_TUNING')
        start = 'base_model.' if prompted else 'base_model.model.'
        if modules:
            self.config['modules_to_save'] = sorted(modules)
        self.tensors |= {f'{start}{name}': tensor for name, tensor in values.items()}

    def _write_biases(self, values: Mapping[str, np.ndarray], saved: Iterable[str]) -> None:
        """The biases of the adapted modules, or all that there are."""
        every = [name for path in self.paths if (name := self.naming(path)).endswith('.bias')]
        kinds = set(map(_layers, every))
        own = {name for m in self.adapted if _layers(name := f'{m}.bias') in kinds}
        trained = {*values, *saved}
        stacks = set(map(_layers, trained))
        all_of_them = all(n in trained or ('{}' in n and _layers(n) in stacks) for n in every)
        which = 'lora_only' if set(values) == own else 'all' if all_of_them else None
        if self.config['peft_type'] != 'LORA' or which is None:
            raise ValueError(
                'PEFT trains whole modules, and beside LoRA the biases of the adapted modules or '
                f'all biases; here {sorted(values)[:3]} ({len(values)}) are trained'
            )
        self.config['bias'] = which
        for name, tensor in values.items():
            owner = name.removesuffix('.bias')
            middle = '.base_layer' if owner in self.adapted else ''
            self.tensors[f'base_model.model.{owner}{middle}.bias'] = tensor

    def _store(self, part: Method, sites: tuple[Site, ...], phi: Any, middle: str = '') -> None:
        for site in sites:
            for name, array in phi[site.path].items():
                array = np.asarray(array)
                for stored, one in (
                    layout(part, site, self.table, name, array.shape).store(array).items()
                ):
                    owner, _, last = stored.partition('.trainable_tokens')
                    stored = f'{owner}.{middle}trainable_tokens{last}' if last else stored
                    self.tensors[f'base_model.model.{stored}'] = one

    def _modules(self, sites: Iterable[Site]) -> dict[Path, tuple[str, ...]]:
        return {site.path: self.table.modules(site.path) for site in sites}

    def _weights(self) -> list[Path]:
        return [path for path in self.paths if self.naming(path).endswith('.weight')]


def _at(phi: Phi, keys: tuple[str, ...]) -> Any:
    for key in keys:
        phi = phi[key]
    return phi


def _once(sites: Iterable[Site]) -> list[Site]:
    return list({site.path: site for site in sites}.values())


def _layers(name: str) -> str:
    return re.sub(r'(?<=\.)(\d+|\{\})(?=\.)', '#', name)


def _alpha(part: LowRankMethod, site: Site) -> float:
    """The alpha that gives a site its scale; whole where it can be."""
    rank = part.rank_at(site)
    alpha = part.scale_at(site) * (rank**0.5 if part.rank_stabilized else rank)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * abs(alpha) else alpha


def _most(values: Mapping[Path, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]
