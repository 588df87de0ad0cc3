"""`attach`: a method and a model become a `Peft`, three pure functions with one static plan."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from peftjax import _paths, _virtual
from peftjax._chain import Chain, part_keys
from peftjax._interpret import Run, evaluate
from peftjax._method import Method, float32
from peftjax._pending import Companion
from peftjax._record import Recorder, distinct
from peftjax._sites import Site, Sites, table
from peftjax._standin import StandIn
from peftjax._types import ApplyFn, Array, Forward, Path, Phi, PyTree

Served = dict[Path, dict[str, None]]
Shape = tuple[str, tuple[int, ...], str]


def sites(apply_fn: ApplyFn, params: PyTree, *args: Any, **kwargs: Any) -> Sites:
    """Finds where and how an apply function uses its parameters.

    The function is traced with abstract values: nothing is computed.

    Args:
      apply_fn: `apply_fn(params, *args, **kwargs)`, any pure function.
      params: pytree of arrays or `jax.ShapeDtypeStruct`s.
      *args: as for a call; arrays may be `jax.ShapeDtypeStruct`s, all else is static.
      **kwargs: likewise.

    Returns:
      The site table: iterable, and readable when printed.

    Raises:
      TypeError: a leaf of `params` is not an array.

    Example:
      >>> import jax.numpy as jnp, peftjax as pj
      >>> params = {'up': {'kernel': jnp.ones((3, 4)), 'bias': jnp.zeros(4)}}
      >>> def mlp(params, x):
      ...     return x @ params['up']['kernel'] + params['up']['bias']
      >>> print(pj.sites(mlp, params, jnp.ones((2, 3))))
      path       kind    shape  axes          bias     path taken
      up/bias    bias    4                             efficient
      up/kernel  linear  3×4    in[0] out[1]  up/bias  efficient
    """

    def record(params: PyTree, arrays: Sequence[Array]) -> None:
        call = _Call(apply_fn, params, *fill(arrays))
        views = [_view(path, w, recorder) for path, w in call.leaves.items()]
        evaluate(call.flat, views, call.inputs, Run({}, {}, recorder))

    leaves = _paths.leaves(_checked(params))
    recorder = Recorder(
        {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    )
    arrays, fill = _split((args, kwargs))
    jax.eval_shape(record, params, arrays)
    found = distinct(recorder)
    used = {site.path for site in found}
    return Sites(found, tuple(path for path in leaves if path not in used))


def attach(
    method: Method | Chain, apply_fn: ApplyFn, params: PyTree, *args: Any, **kwargs: Any
) -> 'Peft':
    """Attaches a method to the sites of one model.

    Args:
      method: such as `pj.Lora(rank=8, target='q_proj|v_proj')`, or a `pj.chain` of several.
      apply_fn: `apply_fn(params, *args, **kwargs)`, any pure function.
      params: pytree of arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes are read.
      *args: as for a call; arrays may be `jax.ShapeDtypeStruct`s, all else is static.
      **kwargs: likewise.

    Returns:
      A static, hashable plan with the pure functions `init`, `wrap` and `merge`.

    Raises:
      ValueError: a target finds nothing, or something that the method cannot adapt.
      TypeError: a leaf of `params` is not an array.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {'up': {'kernel': jnp.ones((3, 4))}}
      >>> def model(params, x):
      ...     return x @ params['up']['kernel']
      >>> x = jnp.ones((2, 3))
      >>> peft = pj.attach(pj.Lora(rank=2, target='kernel'), model, params, x)
      >>> phi = peft.init(jax.random.key(0), params)
      >>> jax.tree.map(jnp.shape, phi)
      {'up/kernel': {'a': (3, 2), 'b': (2, 4)}}
      >>> forward = jax.jit(peft.wrap(model))
      >>> bool((forward(params, phi, x) == model(params, x)).all())
      True
    """
    base = sites(apply_fn, params, *args, **kwargs)
    parts = [part for _, part in method.parts]
    room = [part.virtual for part in parts]
    chosen = []
    for i, part in enumerate(parts):
        mine, found, later = room[i], base, 0
        if mine is not None:
            found = _grown(base, mine, apply_fn, params, args, kwargs)
            later = sum(r.length for r in room[i + 1 :] if r and r.side == mine.side)
        chosen.append(tuple(dataclasses.replace(s, offset=later) for s in part.select(found)))
    _check_order(parts, chosen)
    leaves = [(path, leaf) for path, leaf in _paths.leaves(params).items()]
    peft = Peft(method, tuple(chosen), tuple(_shape(*pair) for pair in leaves))
    phi = jax.eval_shape(lambda p: peft._fresh(jax.random.key(0), p), params)
    peft = dataclasses.replace(peft, phi=_shapes(phi))
    return dataclasses.replace(peft, served=_dry_run(peft, apply_fn, params, phi, args, kwargs))


def _grown(
    base: Sites, room: _virtual.Virtual, apply_fn: ApplyFn, params: PyTree, args: Any, kwargs: Any
) -> Sites:
    """The sites with virtual tokens in place, knowing along which dimension tokens lie."""
    arrays, fill = _split((args, kwargs))
    refill: list[Callable[[Sequence[Any]], Any]] = []

    def stretch(arrays: Sequence[Any]) -> Sequence[Any]:
        longer, again = _split(room.extend(*fill(arrays)))
        refill.append(again)
        return longer

    longer = jax.eval_shape(stretch, arrays)
    args, kwargs = refill[-1](longer)
    try:
        wide = sites(apply_fn, params, *args, **kwargs)
    except Exception as error:
        shapes = {
            path: leaf.shape
            for path, leaf in _paths.leaves([args, kwargs]).items()
            if _is_array(leaf)
        }
        raise ValueError(
            f'with {room.length} virtual tokens the function cannot be traced. Perhaps an argument '
            f'sized by the tokens was not lengthened with them (fill=…), or a size is fixed inside '
            f'the function. Shapes now: {shapes}'
        ) from error
    found = []
    for before, after in zip(base, wide, strict=True):
        axes = _virtual.grown(before.output, after.output, room.length)
        found.append(dataclasses.replace(after, tokens=axes[0] if len(axes) == 1 else None))
    return Sites(tuple(found), wide.unused)


@dataclasses.dataclass(frozen=True)
class Peft:
    """A method attached to the sites of one model: static, hashable, printable.

    Attributes:
      method: the method, or chain of methods.
      sites: for each part of the method, the sites that it adapts.
      leaves: path, shape and dtype of each leaf of the model's parameters.
      phi: path, shape and dtype of each array of phi.
      served: for each adapted path, how its uses are served: `efficient`, or why dense.
    """

    method: Method | Chain
    sites: tuple[tuple[Site, ...], ...]
    leaves: tuple[Shape, ...]
    phi: tuple[Shape, ...] = ()
    served: tuple[tuple[Path, tuple[str, ...]], ...] = ()

    def init(self, key: Array, params: PyTree) -> Phi:
        """Makes a fresh phi.

        Args:
          key: typed PRNG key, `jax.random.key(seed)`; each path draws from a key of its own.
          params: the model's parameters.

        Returns:
          `{path: {name: array}}`, under a chain `{method: {path: {name: array}}}`.

        Raises:
          ValueError: `params` is not the tree that the method was attached to.
        """
        self._check_params(params)
        return self._fresh(key, params)

    def wrap(self, fn: ApplyFn) -> Forward:
        """Turns `fn(params, *args, **kwargs)` into `forward(params, phi, *args, **kwargs)`.

        Args:
          fn: the apply function, or any other that uses the same parameters: a loss, a decode step.

        Returns:
          A pure function, not yet jitted. Its keyword `dropout_key` switches dropout on.

        Raises (when traced):
          ValueError: `params` or `phi` is not of this model and method.
        """

        def forward(
            params: PyTree, phi: Phi, *args: Any, dropout_key: Array | None = None, **kwargs: Any
        ) -> PyTree:
            """The wrapped function with the method in place."""
            return self._call(fn, {}, params, phi, dropout_key, args, kwargs)

        return forward

    def merge(self, params: PyTree, phi: Phi) -> PyTree:
        """Folds phi into the parameters, for the untouched apply function.

        Computed in float32 (or wider) and cast to the dtype of each leaf.

        Args:
          params: the model's parameters.
          phi: as from `init`.

        Returns:
          Parameters of the same structure, shapes and dtypes.

        Raises:
          ValueError: a method has no place in the parameters.
        """
        self._check_params(params)
        self._check_phi(phi)
        leaves = _paths.leaves(params)
        merged: dict[Path, Array] = {}
        for part, chosen, mine in self._parts(phi):
            for site in chosen:
                wide = {
                    path: merged.get(path, leaves[path])
                    for path in (site.path, *site.bias)
                    if path in leaves
                }
                wide = {path: float32(leaf) for path, leaf in wide.items()}
                merged.update(part.merge(site, wide, mine.get(site.path, {})))
        cast = {path: leaf.astype(leaves[path].dtype) for path, leaf in merged.items()}
        return _paths.replace(params, cast)

    def fold(self, phi: Phi) -> 'tuple[Peft, Phi]':
        """Turns a phi that is kept in another form into the plain one.

        A prefix trained through a reparametrizing network becomes a direct prefix; what is plain
        already stays as it is.

        Args:
          phi: as from `init`.

        Returns:
          The plan and the phi without the other form; `wrap` gives the same forward for both.
        """
        self._check_phi(phi)
        plain = _nested(
            (keys, part.expand(chosen, _at(phi, keys)))
            for (keys, part), chosen in zip(self.method.parts, self.sites, strict=True)
        )
        method = self.method.folded()
        return dataclasses.replace(self, method=method, phi=_shapes(plain)), plain

    def count(self) -> int:
        """The number of trained parameters."""
        return sum(math.prod(shape) for _, shape, _ in self.phi)

    def _parts(self, phi: Phi) -> list[tuple[Method, tuple[Site, ...], Any]]:
        """Each method with its sites and its phi, one entry for each site."""
        return [
            (part, chosen, part.expand(chosen, _at(phi, keys)))
            for (keys, part), chosen in zip(self.method.parts, self.sites, strict=True)
        ]

    def _fresh(self, key: Array, params: PyTree) -> Phi:
        leaves = _paths.leaves(params)
        return _nested(
            (keys, part.init(mine, chosen, leaves))
            for (keys, part), chosen, mine in zip(
                self.method.parts, self.sites, self._keys(key), strict=True
            )
        )

    def _keys(self, key: Array) -> Iterator[Array]:
        return part_keys(key, [part for _, part in self.method.parts], self.sites)

    def _call(
        self,
        fn: ApplyFn,
        served: Served,
        params: PyTree,
        phi: Phi,
        key: Array | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> PyTree:
        self._check_params(params)
        self._check_phi(phi)
        rooms = [part.virtual for _, part in self.method.parts if part.virtual is not None]
        shapes = []
        for room in rooms:
            shapes.append(_result(fn, params, args, kwargs))
            args, kwargs = room.extend(args, kwargs)
        call = _Call(fn, params, args, kwargs)
        leaves, named = self._bound(call.leaves, phi, key)
        outs = evaluate(call.flat, leaves, call.inputs, Run(named, served))
        self._check_reached(served)
        result = jax.tree.unflatten(call.out, outs)
        for room, shape in zip(rooms[::-1], shapes[::-1], strict=True):
            result = _virtual.shorten(room, shape, result)
        return result

    def _bound(
        self, leaves: Mapping[Path, Array], phi: Phi, key: Array | None
    ) -> tuple[list[Any], dict[Path, StandIn]]:
        """What stands where each leaf stood, and at named values."""
        bound: dict[Path, Any] = dict(leaves)
        named: dict[Path, Any] = {}
        parts = self._parts(phi)
        own = self._keys(key) if key is not None else [None] * len(parts)
        for (part, chosen, mine), key in zip(parts, own, strict=True):
            for site in chosen:
                home = named if site.kind == 'named' else bound
                home[site.path] = part.bind(site, home.get(site.path), mine[site.path], key)
        for part, chosen, _ in parts:
            for path in {p for site in chosen if part.seam == 'output' for p in site.bias}:
                if not isinstance(bound[path], StandIn):
                    bound[path] = _view(path, bound[path], Companion())
        return list(bound.values()), named

    def _check_reached(self, served: Served) -> None:
        """Refuses a function in which a layer to adapt is there, but not as a layer."""
        for (_, part), chosen in zip(self.method.parts, self.sites, strict=True):
            for path in (site.path for site in chosen if part.seam == 'output'):
                if 'efficient' not in served.get(path, ('efficient',)):
                    raise ValueError(
                        f'{type(part).__name__} acts on the output of a layer, but {path!r} is '
                        f'used in a way that has no output of its own ({", ".join(served[path])}). '
                        'Leave the path out of the target'
                    )

    def _check_params(self, params: PyTree) -> None:
        found = tuple(_shape(*pair) for pair in _paths.leaves(params).items())
        _compare('params', self.leaves, found)

    def _check_phi(self, phi: Phi) -> None:
        _compare('phi', self.phi, _shapes(phi))

    def __str__(self) -> str:
        rows, served = [], dict(self.served)
        for (keys, part), chosen in zip(self.method.parts, self.sites, strict=True):
            for site in chosen:
                prefix = '/'.join((*keys, site.path)) + '/'
                mine = [s for s in self.phi if s[0].startswith(prefix)]
                shapes = ', '.join(f'{p[len(prefix) :]} {_text(shape)}' for p, shape, _ in mine)
                count = sum(math.prod(shape) for _, shape, _ in mine)
                taken = ', '.join(served.get(site.path, ('efficient',)))
                name = type(part).__name__
                rows.append(
                    (name, site.path, site.kind, _text(site.shape), shapes, f'{count:,}', taken)
                )
        head = ('method', 'path', 'kind', 'weight', 'phi', 'count', 'path taken')
        total = sum(math.prod(shape) for _, shape, _ in self.leaves)
        percent = 100 * self.count() / total
        return f'{table(head, rows)}\ntotal: {self.count():,} trained, {percent:.3g} % of {total:,}'


def _at(phi: Phi, keys: Sequence[str]) -> Any:
    """The phi of one part of a chain."""
    return functools.reduce(lambda tree, key: tree[key], keys, phi)


def _nested(parts: Iterable[tuple[Sequence[str], Phi]]) -> Phi:
    """The phi of a chain from the phi of its parts."""
    whole: dict[str, Any] = {}
    for keys, mine in parts:
        if not keys:
            return mine
        inner = whole
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = mine
    return whole


def _text(shape: Sequence[int]) -> str:
    return '×'.join(map(str, shape))


def _dry_run(
    peft: Peft, fn: ApplyFn, params: PyTree, phi: Phi, args: Any, kwargs: Any
) -> tuple[tuple[Path, tuple[str, ...]], ...]:
    """Traces the wrapped function once: errors come now, and each use says how it is served."""
    served: Served = {}
    arrays, fill = _split((args, kwargs))

    def run(params: PyTree, phi: Phi, arrays: Sequence[Array]) -> PyTree:
        full = fill(arrays)
        return peft._call(fn, served, params, phi, None, *full)

    jax.eval_shape(run, params, phi, arrays)
    for (_, part), chosen in zip(peft.method.parts, peft.sites, strict=True):
        for site in chosen:
            if part.seam != 'leaf' and site.path not in served:
                raise ValueError(
                    f'every target must be adapted; {type(part).__name__} does not reach '
                    f'{site.path!r} ({site.dense or site.kind}). Leave it out of the target'
                )
    return tuple((path, tuple(ways)) for path, ways in served.items())


def _check_order(parts: Sequence[Method], chosen: Sequence[tuple[Site, ...]]) -> None:
    """On one leaf: what replaces it, then what adapts the weight, then what adapts the output."""
    order = ('leaf', 'weight', 'output')
    last: dict[Path, Method] = {}
    for part, mine in zip(parts, chosen, strict=True):
        for site in mine:
            before = last.get(site.path)
            clash = before is not None and (
                order.index(part.seam) < order.index(before.seam) or part.seam == 'leaf'
            )
            if clash:
                raise ValueError(
                    f'on one weight a chain goes from leaf to weight to output; on {site.path!r} '
                    f'{type(before).__name__} comes before {type(part).__name__}. '
                    'Swap them, or give them different targets'
                )
            last[site.path] = part


# Calls --------------------------------------------------------------------------------------------


class _Call:
    """One call of an apply function, flat: leaves by path, arrays in, arrays out."""

    def __init__(self, fn: ApplyFn, params: PyTree, args: Sequence[Any], kwargs: Mapping[str, Any]):
        self.leaves = _paths.leaves(params)
        self.inputs, self._fill = _split((tuple(args), dict(kwargs)))
        self._fn, self._tree = fn, jax.tree.structure(params)
        self.out: Any = None

    def flat(self, *arrays: Array) -> list[Any]:
        """The function on flat arrays; leaves the structure of the result in `out`."""
        count = len(self.leaves)
        params = jax.tree.unflatten(self._tree, arrays[:count])
        args, kwargs = self._fill(arrays[count:])
        outs, self.out = jax.tree.flatten(self._fn(params, *args, **kwargs))
        return outs


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _split(tree: PyTree) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of a tree, and how to put others in their places; all else stays as it is."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]

    def fill(arrays: Sequence[Any]) -> Any:
        full = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            full[place] = array
        return jax.tree.unflatten(structure, full)

    return [leaves[i] for i in places], fill


def _result(fn: ApplyFn, params: PyTree, args: Any, kwargs: Any) -> PyTree:
    """Shapes of the result of a call."""
    arrays, fill = _split((tuple(args), dict(kwargs)))

    def run(params: PyTree, arrays: Sequence[Any]) -> PyTree:
        args, kwargs = fill(arrays)
        return fn(params, *args, **kwargs)

    return jax.eval_shape(run, params, arrays)


def _view(path: Path, w: Any, rule: Any) -> StandIn:
    """A stand-in without factors."""
    return StandIn(w, {}, tuple(frozenset({d}) for d in range(len(w.shape))), (), rule, path)


def _checked(params: PyTree) -> PyTree:
    for path, leaf in _paths.leaves(params).items():
        if not _is_array(leaf):
            raise TypeError(
                f'params must hold arrays only; {path!r} is {leaf!r}. Keep it out of params '
                '(equinox: eqx.partition(model, eqx.is_array))'
            )
    return params


def _shape(path: Path, leaf: Any) -> Shape:
    return path, tuple(leaf.shape), str(leaf.dtype)


def _shapes(phi: Phi) -> tuple[Shape, ...]:
    return tuple(_shape(*pair) for pair in _paths.leaves(phi).items())


def _compare(what: str, expected: Sequence[Shape], found: Sequence[Shape]) -> None:
    """Refuses a tree of other paths or shapes, naming the first ten."""
    want, have = ({path: shape for path, shape, _ in side} for side in (expected, found))
    wrong = [f'{p!r} is missing' for p in want if p not in have]
    wrong += [f'{p!r} is unknown' for p in have if p not in want]
    wrong += [
        f'{p!r} has shape {have[p]}, not {want[p]}'
        for p in want
        if p in have and have[p] != want[p]
    ]
    if wrong:
        more = f' and {len(wrong) - 10} more' if len(wrong) > 10 else ''
        raise ValueError(
            f'{what} must be of the model that the method was attached to ({len(want)} arrays): '
            f'{"; ".join(wrong[:10])}{more}'
        )
