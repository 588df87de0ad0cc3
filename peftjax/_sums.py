"""One adapter of several: each part of their methods is summed in its own way."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peftjax import _paths
from peftjax._chain import replaced
from peftjax._joins import Join, Pair
from peftjax._method import Method, site_key
from peftjax._mixing import Mixing
from peftjax._one_pass import wide
from peftjax._peft import nested
from peftjax._quantized import Arrays
from peftjax._shapes import shapes_of
from peftjax._sites import Site
from peftjax._summable import Adapter, Adapters, checked
from peftjax._types import Array, Path, Phi, PyTree
from peftjax.methods.lora import Lora


def combine(
    adapters: Adapters,
    weights: Sequence[float],
    mixing: Mixing,
    join: Join,
    *,
    key: Array | None = None,
    params: PyTree | None = None,
) -> Adapter:
    """One adapter of several: pairs by `join`, all else by `mixing`."""
    pairs, weighted = checked(adapters, weights)
    peft = pairs[0][0]
    if params is not None:
        peft._check_params(params)
    leaves = _Base(params)
    each = [peft._parts(phi) for peft, phi in pairs]
    methods, phis = {}, []
    for index, ((keys, part), chosen) in enumerate(zip(peft.method.parts, peft.sites, strict=True)):
        mine = [(parts[index][0], parts[index][2]) for parts in each]
        own = None if key is None else jax.random.fold_in(key, index)
        with jax.default_matmul_precision('highest'):  # it stays: what is rounded here is for good
            if isinstance(part, Lora):
                phi = _pairs(chosen, mine, weighted, join, own)
                part = part.of_ranks({path: own['a'].shape[-1] for path, own in phi.items()})
                if dtypes := [own['a'].dtype for own in phi.values()]:
                    part = dataclasses.replace(part, dtype=str(_widest(dtypes)))
            else:
                phi = _changes(part, chosen, mine, weighted, mixing, own, leaves)
        methods[keys] = part
        phis.append((keys, phi))
    phi = nested(phis)
    method = replaced(peft.method, methods)
    return dataclasses.replace(peft, method=method, phi=shapes_of(phi)), phi


def _pairs(
    chosen: Sequence[Site],
    mine: Sequence[tuple[Any, Phi]],
    weights: Array,
    join: Join,
    key: Array | None,
) -> Phi:
    """The pairs of all sites of a `Lora`."""
    found = {}
    for site in chosen:
        layers, outer = math.prod(site.sizes(site.stack)), site.sizes(site.stack)
        pairs, dtype = [], _wide([x for _, phi in mine for x in phi[site.path].values()])
        for part, phi in mine:
            a, b = (phi[site.path][name].astype(dtype) for name in 'ab')
            a = a.reshape(layers, -1, a.shape[-1])
            b = b.reshape(layers, a.shape[-1], -1)
            pairs.append(Pair(a, b, part.scale_at(site)))
        own = None if key is None else site_key(key, site.path)
        a, b = join(site.path, pairs, weights.astype(dtype), own)
        a = a.reshape(*outer, *site.sizes(site.inputs), -1)
        b = b.reshape(*outer, a.shape[-1], *site.sizes(site.outputs))
        dtype = _widest(phi[site.path]['a'].dtype for _, phi in mine)
        found[site.path] = {'a': a.astype(dtype), 'b': b.astype(dtype)}
    return found


def _changes(
    part: Method,
    chosen: tuple[Site, ...],
    mine: Sequence[tuple[Any, Phi]],
    weights: Array,
    mixing: Mixing,
    key: Array | None,
    leaves: Mapping[Path, Array],
) -> Phi:
    """Arrays that stand for what is there already: their changes are mixed."""
    origin = part.init(jax.random.key(0), chosen, leaves)  # these methods draw nothing
    found: dict[Path, dict[str, Array]] = {}
    for site in chosen:
        own = None if key is None else site_key(key, site.path)
        found[site.path] = {}
        for name, start in origin[site.path].items():
            arrays = [phi[site.path][name] for _, phi in mine]
            dtype = _wide([start, *arrays])
            start = start.astype(dtype)
            layers = _Layers.of(start, part.axes(site)[name], site)
            changes = [layers.apart(array.astype(dtype) - start) for array in arrays]
            whole = start + layers.together(mixing(changes, weights.astype(dtype), own))
            dtype = _widest(array.dtype for array in arrays)
            found[site.path][name] = whole.astype(dtype)
    return found


def _wide(arrays: Iterable[Array]) -> Any:
    """The dtype to compute with: float32, or the widest of all."""
    return _widest(wide(array.dtype) for array in arrays)


def _widest(dtypes: Iterable[Any]) -> Any:
    """The dtype that holds all: the order of adapters is not to say it."""
    with jax.numpy_dtype_promotion('standard'):
        return functools.reduce(jnp.promote_types, dtypes)


@dataclasses.dataclass(frozen=True)
class _Layers:
    """Where the stacked layers of an array lie.

    Attributes:
      shape: of the array, its stacked layers in front.
      lead: their dimensions in the array.
    """

    shape: tuple[int, ...]
    lead: tuple[int, ...]

    @classmethod
    def of(cls, array: Array, axes: Sequence[int | None], site: Site) -> '_Layers':
        lead = tuple(d for d, axis in enumerate(axes) if axis in site.stack)
        return cls(jnp.moveaxis(array, lead, range(len(lead))).shape, lead)

    def apart(self, array: Array) -> Array:
        """`(layers, …)`."""
        layers = math.prod(self.shape[: len(self.lead)])
        return jnp.moveaxis(array, self.lead, range(len(self.lead))).reshape(layers, -1)

    def together(self, array: Array) -> Array:
        """The array again."""
        return jnp.moveaxis(array.reshape(self.shape), range(len(self.lead)), self.lead)


class _Base(Mapping[Path, Array]):
    """The leaves of theta, for methods that look at them."""

    def __init__(self, params: PyTree | None):
        self._leaves = None if params is None else Arrays(_paths.leaves(params))

    def __getitem__(self, path: Path) -> Array:
        if self._leaves is None:
            raise ValueError(
                f'phi holds new values of {path!r}; what changed needs those of theta. Give params'
            )
        return self._leaves[path]

    def __iter__(self) -> Any:
        return iter(self._leaves or ())

    def __len__(self) -> int:
        return len(self._leaves or ())
