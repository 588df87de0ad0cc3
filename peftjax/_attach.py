"""`attach`: a method and a model become a `Peft`, three pure functions with one static plan."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from peftjax import _paths
from peftjax._call import split
from peftjax._chain import Chain
from peftjax._discover import grown, sites
from peftjax._method import Method
from peftjax._peft import Notes, Peft, Served
from peftjax._shapes import shapes_of
from peftjax._sites import Site, Sites
from peftjax._types import ApplyFn, Array, Path, Phi, PyTree


def attach(
    method: Method | Chain, apply_fn: ApplyFn, params: PyTree, /, *args: Any, **kwargs: Any
) -> Peft:
    """Attaches a method to the sites of one model.

    Args:
      method: such as `pj.Lora(rank=8, target='q_proj|v_proj')`, or a `pj.chain` of several.
      apply_fn: `apply_fn(params, *args, **kwargs)`, any pure function.
      params: pytree of arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes are read. Leaves
        may be quantized (`pj.quantize`).
      *args: as for a call; arrays may be `jax.ShapeDtypeStruct`s, all else is static.
      **kwargs: likewise, of any name but `dropout_key`, which is the forward's own.

    Returns:
      A static, hashable plan with the pure functions `init`, `wrap` and `merge`.

    Raises:
      ValueError: a target finds nothing, or something that the method cannot adapt.
      TypeError: a leaf of `params` is not an array, `method` is no method, or there is an argument
        `dropout_key`.

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
    _check_arguments(method, kwargs)
    base = sites(apply_fn, params, *args, **kwargs)
    parts = [part for _, part in method.parts]
    room = [part.virtual for part in parts]
    chosen = []
    for i, part in enumerate(parts):
        mine, found, later = room[i], base, 0
        if mine is not None:
            found = grown(base, mine, apply_fn, params, args, kwargs)
            later = sum(r.length for r in room[i + 1 :] if r and r.side == mine.side)
        chosen.append(tuple(dataclasses.replace(s, offset=later) for s in part.select(found)))
    _check_order(parts, chosen)
    passed = tuple(_passed(part, base, mine) for part, mine in zip(parts, chosen, strict=True))
    names = Counter(s.path[1:].partition('/')[0] for s in base if s.kind == 'named')
    peft = Peft(method, tuple(chosen), shapes_of(params), passed=passed, names=(*names.items(),))
    phi = jax.eval_shape(lambda p: peft._fresh(jax.random.key(0), p), params)
    peft = dataclasses.replace(peft, phi=shapes_of(phi))
    notes = _dry_run(peft, apply_fn, params, phi, args, kwargs)
    return dataclasses.replace(peft, served=_flat(notes.served), early=_flat(notes.early))


def _check_arguments(method: Any, kwargs: Mapping[str, Any]) -> None:
    if not isinstance(method, Method | Chain):
        given = f'the class {method.__name__}' if isinstance(method, type) else repr(method)
        raise TypeError(
            f'a method with its fields is attached, or a pj.chain of several; got {given}. Make '
            "one: pj.Lora(target='kernel')"
        )
    if 'dropout_key' in kwargs:
        raise TypeError(
            'dropout_key is a keyword of the forward, which switches the dropout of the method on; '
            'the function cannot be given it. Leave it out here; rename it where the function has '
            'one of its own, or close over it'
        )


def _passed(part: Method, found: Sites, chosen: Sequence[Site]) -> tuple[tuple[Path, str], ...]:
    """Paths that a target finds and the method does not adapt, with the kind of each."""
    taken = {site.path for site in chosen}
    kinds = {path: 'unused' for path in found.unused} | {site.path: site.kind for site in found}
    patterns = _paths.patterns(part.target)
    return tuple(
        (path, kind)
        for path, kind in kinds.items()
        if path not in taken and any(_paths.matches(pattern, path) for pattern in patterns)
    )


def _dry_run(peft: Peft, fn: ApplyFn, params: PyTree, phi: Phi, args: Any, kwargs: Any) -> Notes:
    """Traces the wrapped function once: errors come now, and each use says how it is served."""
    notes = Notes()
    arrays, fill = split((args, kwargs))

    def run(params: PyTree, phi: Phi, arrays: Sequence[Array]) -> PyTree:
        full = fill(arrays)
        return peft._call(fn, notes, params, phi, None, *full)

    jax.eval_shape(run, params, phi, arrays)
    for (_, part), chosen in zip(peft.method.parts, peft.sites, strict=True):
        for site in chosen:
            if part.seam != 'leaf' and site.path not in notes.served:
                raise ValueError(
                    f'every target must be adapted; {type(part).__name__} does not reach '
                    f'{site.path!r} ({site.dense or site.kind}). Leave it out of the target'
                )
    return notes


def _flat(noted: Served) -> tuple[tuple[Path, tuple[str, ...]], ...]:
    return tuple((path, tuple(ways)) for path, ways in noted.items())


def _check_order(parts: Sequence[Method], chosen: Sequence[tuple[Site, ...]]) -> None:
    """On one leaf: what replaces it, then what adapts the weight, then what adapts the output."""
    order = ('leaf', 'weight', 'output')
    last: dict[Path, Method] = {}
    for part, mine in zip(parts, chosen, strict=True):
        # what is merged into a layer's output is merged into its bias too
        both = part.seam == 'output' and part.mergeable
        for path in {p: None for s in mine for p in (s.path, *(s.bias if both else ()))}:
            before = last.get(path)
            clash = before is not None and (
                order.index(part.seam) < order.index(before.seam) or part.seam == 'leaf'
            )
            if clash:
                raise ValueError(
                    f'on one weight a chain goes from leaf to weight to output; on {path!r} '
                    f'{type(before).__name__} comes before {type(part).__name__}. '
                    'Swap them, or give them different targets'
                )
            last[path] = part
