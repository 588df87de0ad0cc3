"""Virtual tokens as they are stored: one array for all layers."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from peftjax._sites import Site
from peftjax._types import Array, Path
from peftjax.hf._layout import Layout, Slot
from peftjax.hf._names import LISTS
from peftjax.methods.prefix import SHARED

STORED = 'prompt_embeddings'
INDEX = re.compile(rf'(?:^|/)(?:{"|".join(one for one in LISTS if one != "experts")})/(\d+)/')
KEY_VALUE = ('@key', '@value')


def prompt_layout(site: Site, shape: tuple[int, ...]) -> Layout:
    """A prompt: `(tokens, width)`, as the table yields its rows.

    Args:
      site: the table, or a named value.
      shape: of the array.

    Raises:
      ValueError: as of `prompt_scale`.
    """
    scale = prompt_scale(site)
    return Layout((Slot(STORED, shape, lambda t: t / scale, lambda p: p * scale),))


def prompt_scale(site: Site) -> float:
    """What rows of ours are multiplied with before they are what Hugging Face's table yields.

    Gemma's table multiplies what it looks up; ours holds rows, and the model multiplies them.

    Raises:
      ValueError: it is not known.
    """
    if site.kind == 'named':
        return 1.0
    if site.scale is None:
        raise ValueError(
            f'a prompt is stored as the table yields its rows: what is looked up in {site.path!r} '
            'must be multiplied with one number that is known when the function is traced, or with '
            'none. Attach the method once more if the plan was saved by an older version'
        )
    return site.scale


def scale_note(sites: Iterable[Site]) -> list[str]:
    """What the user should know where a prompt is scaled."""
    return [
        f'what is looked up in {site.path!r} is multiplied with {site.scale:g}: the prompt is '
        'stored multiplied, as Gemma has it since transformers 5.4; before, Gemma 1 and 2 '
        'multiplied outside of the table'
        for site in sites
        if site.kind == 'embedding' and site.scale not in (None, 1)
    ]


def prefix_layout(path: Path, name: str, shape: tuple[int, ...], sites: tuple[Site, ...]) -> Layout:
    """A prefix at one key or value: part of `(tokens, layers * 2 * heads * width)`.

    Args:
      path: of the site, or where phi keeps what all layers share.
      name: of the array.
      shape: of the array.
      sites: all that the method adapts.
    """
    layers = count_layers(sites)
    if path == SHARED:
        return _network(name, shape)
    which, indices = _where(path, layers)
    stacked = any(site.stack for site in sites if site.path == path)
    one = shape[1:] if stacked else shape
    make = {'prefix': _direct, 'up': _up, 'up_bias': _up_bias}[name]
    slots = tuple(make(layers, index, which, one) for index in indices)
    return Layout(slots, (0,), (layers,)) if stacked else Layout(slots)


def count_layers(sites: tuple[Site, ...]) -> int:
    """How many layers the keys and values of a method come from."""
    return sum(math.prod(s.sizes(s.stack)) for s in sites if s.path.startswith('@key'))


def check_layers(sites: tuple[Site, ...], paths: Iterable[Path]) -> None:
    """Refuses a prefix that some layers are without.

    Args:
      sites: all that the method adapts.
      paths: of the parameters of the base, which say how many layers it has, unless they are in a
        scan.

    Raises:
      ValueError: there are such layers.
    """
    layers = count_layers(sites)
    mine = {index for site in sites for index in _where(site.path, layers)[1]}
    all_of_them = {int(found) for path in paths for found in INDEX.findall(path)} or mine
    if mine != all_of_them:
        raise ValueError(
            f'a prefix has all layers; this one has {sorted(mine)} of {len(all_of_them)}. Use save'
        )


def store_prefix(sites: tuple[Site, ...], phi: Mapping[Path, Any]) -> np.ndarray:
    """All keys and values as the one array that is stored, `(tokens, layers * 2 * out)`."""
    return np.concatenate([one.reshape(len(one), -1) for one in _each(sites, phi, 'prefix')], 1)


def store_network(sites: tuple[Site, ...], phi: Mapping[Path, Any]) -> dict[str, np.ndarray]:
    """The network of a prefix as AdapterHub stores it."""
    up, bias = _each(sites, phi, 'up'), _each(sites, phi, 'up_bias')
    shared = {name: np.asarray(array) for name, array in phi[SHARED].items()}
    return {
        'wte.weight': shared['tokens'],
        'control_trans.0.weight': shared['down'].T,
        'control_trans.0.bias': shared['down_bias'],
        'control_trans.2.weight': np.concatenate([one.reshape(len(one), -1).T for one in up]),
        'control_trans.2.bias': np.concatenate([one.reshape(-1) for one in bias]),
    }


def _each(sites: tuple[Site, ...], phi: Mapping[Path, Any], name: str) -> list[np.ndarray]:
    """An array of every layer's key, then value, in order."""
    layers = count_layers(sites)
    found: dict[tuple[int, int], np.ndarray] = {}
    for site in sites:
        which, indices = _where(site.path, layers)
        array = np.asarray(phi[site.path][name])
        each = array if site.stack else array[None]
        found |= {(index, which): one for index, one in zip(indices, each, strict=True)}
    return [found[index, which] for index in range(layers) for which in (0, 1)]


def _where(path: Path, layers: int) -> tuple[int, list[int]]:
    """Key or value, and the layers."""
    name, _, index = path.partition('/')
    return KEY_VALUE.index(name), [int(index)] if index else list(range(layers))


def _direct(layers: int, index: int, which: int, shape: tuple[int, ...]) -> Slot:
    stored = (shape[0], layers * 2 * math.prod(shape[1:]))
    load = lambda t: t.reshape(shape[0], layers, 2, *shape[1:])[:, index, which]
    return Slot(STORED, stored, load, _one_way)


def _up(layers: int, index: int, which: int, shape: tuple[int, ...]) -> Slot:
    """`(hidden, *out)`: a part of the last layer of AdapterHub's network, `(outputs, hidden)`."""
    hidden, *out = shape
    stored = (layers * 2 * math.prod(out), hidden)
    load = lambda t: jnp.moveaxis(t.reshape(layers, 2, *out, hidden)[index, which], -1, 0)
    return Slot('prefix.control_trans.2.weight', stored, load, _one_way)


def _up_bias(layers: int, index: int, which: int, shape: tuple[int, ...]) -> Slot:
    stored = (layers * 2 * math.prod(shape),)
    load = lambda t: t.reshape(layers, 2, *shape)[index, which]
    return Slot('prefix.control_trans.2.bias', stored, load, _one_way)


def _network(name: str, shape: tuple[int, ...]) -> Layout:
    if name == 'down':
        slot = Slot('prefix.control_trans.0.weight', shape[::-1], lambda t: t.T, _one_way)
    else:
        stored = {'tokens': 'prefix.wte.weight', 'down_bias': 'prefix.control_trans.0.bias'}[name]
        slot = Slot(stored, shape, lambda t: t, _one_way)
    return Layout((slot,))


def _one_way(array: Array) -> Array:
    del array
    raise ValueError('a prefix is stored as a whole')
