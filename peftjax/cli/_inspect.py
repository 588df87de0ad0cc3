"""`peftjax inspect`: a model's sites, or what an adapter folder holds."""

import argparse
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import peftjax as pj
from peftjax import _paths, checkpoint, models
from peftjax.cli import _adapters, _method_options
from peftjax.cli._opened import kind
from peftjax.cli._run_folder import find
from peftjax.cli._terminal import say

Facts = dict[str, Any]


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    what = options.what or models.default_model_path()
    folder = find(pathlib.Path(what).expanduser())
    if (folder / checkpoint.ADAPTER).exists():
        _adapter(folder)
    elif folder.is_dir() and not (folder / 'config.json').exists():
        raise FileNotFoundError(
            f'{folder} is neither a model, which has a config.json, nor an adapter, which has an '
            f'{checkpoint.ADAPTER}. {kind(folder)}'
        )
    elif models.model_kind(what) == 'decoder':
        _decoder(what)
    else:
        _encoder(what)
    return 0


def _encoder(name: str) -> None:
    loaded = models.load_encoder(name)
    ids = _adapters.IDS
    say(str(pj.sites(loaded.model.apply_fn, loaded.params, ids, attention_mask=ids)))
    config = loaded.config
    kind = f'{config.model_type}, an encoder of {config.num_hidden_layers} layers'
    _show({'family': kind} | _sizes(_paths.leaves(loaded.params)))


def _decoder(name: str) -> None:
    """Shapes tell it all: no weights are read."""
    model, params, config = models.abstract_decoder(name)
    say(str(pj.sites(model.apply_fn, params, _adapters.IDS)))
    family = json.loads(config.source)['model_type']
    leaves = _paths.leaves(params)
    facts: Facts = {'family': f'{family}, a decoder of {config.num_hidden_layers} layers'}
    facts |= _sizes(leaves)
    small = [leaf for leaf in leaves.values() if isinstance(leaf, pj.Quantized)]
    if small:
        size, nbytes = (sum(leaf.size for leaf in small), sum(leaf.nbytes for leaf in small))
        codes = ', '.join(dict.fromkeys(leaf.scheme.code for leaf in small))
        facts['quantized'] = (
            f'{codes}: {size:,} weights in {len(small)} leaves, {nbytes / size:.3f} bytes a weight'
        )
    _show(facts)


def _sizes(leaves: Mapping[str, Any]) -> Facts:
    """Parameters, dtypes and bytes."""
    count = sum(math.prod(leaf.shape) for leaf in leaves.values())
    nbytes = sum(map(_nbytes, leaves.values()))
    return {
        'parameters': f'{count:,}',
        'dtype': ', '.join(sorted({jnp.dtype(leaf.dtype).name for leaf in leaves.values()})),
        'bytes': f'{nbytes:,}, {nbytes / count:.3g} a parameter',
    }


def _nbytes(leaf: Any) -> int:
    if isinstance(leaf, pj.Quantized):
        return leaf.nbytes
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize


def _adapter(folder: pathlib.Path) -> None:
    loaded = checkpoint.load(folder)
    for keys, method in loaded.peft.method.parts:
        say(f'{"/".join(keys) or "method"}: {method}')
    say(str(loaded.peft))
    arrays = jax.tree.leaves(loaded.phi)
    size, nbytes = (sum(a.size for a in arrays), sum(a.nbytes for a in arrays))
    facts: Facts = {'phi': f'{size:,} numbers in {len(arrays)} arrays, {nbytes:,} bytes'}
    for (keys, method), sites in zip(loaded.peft.method.parts, loaded.peft.sites, strict=True):
        facts |= {'/'.join((*keys, name)): value for name, value in _numbers(method, sites)}
    _show(facts | _base(loaded))
    say(json.dumps(loaded.metadata, indent=2, ensure_ascii=False))


def _numbers(method: pj.Method, sites: tuple[pj.Site, ...]) -> Iterator[tuple[str, Any]]:
    """What a method was told, and the layers that it adapts."""
    for option, field in _method_options.FIELDS.items():
        value = getattr(method, field, None)
        if field == 'rank' and value is not None:
            ranks = sorted({method.rank_at(site) for site in sites})  # pyright: ignore[reportAttributeAccessIssue]
            value = ', '.join(map(str, ranks))
        if field not in ('target', 'feedforward') and value is not None:
            yield option.replace('_', ' '), value
    yield 'targets', ', '.join(dict.fromkeys(_layer(site.path) for site in sites))


def _layer(path: str) -> str:
    """The layer that owns a leaf, or a named value."""
    return path if path.startswith('@') else _paths.parent(path).rpartition('/')[2] or path


def _base(loaded: pj.Loaded) -> Facts:
    """What the adapter was trained on."""
    leaves = loaded.peft.leaves
    size = sum(math.prod(shape) for _, shape, _ in leaves)
    about, seen = loaded.metadata, loaded.fingerprint
    return {
        'base': f'{about.get("model") or "the default model"}, {size:,} parameters',
        'fingerprint': 'not taken' if seen is None else f'{seen.digest}, of {len(leaves)} leaves',
    }


def _show(facts: Facts) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        say(f'{name.ljust(width)}  {value}')
