"""`Peft`: a method with its sites, and the pure functions that come of them."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.core import Tracer

from peftjax import _beside, _paths, _processes, _virtual
from peftjax._call import Call, result_shapes, takes
from peftjax._chain import Chain, part_keys
from peftjax._dequantize import stand
from peftjax._interpret import evaluate
from peftjax._method import Method, float32, typed_key
from peftjax._pending import Companion
from peftjax._printed import printed
from peftjax._quantized import Arrays, is_quantized
from peftjax._run import Plan, Run
from peftjax._shapes import Shape, differences, shapes_of
from peftjax._sites import Site, trainable
from peftjax._standin import StandIn, bare
from peftjax._types import ApplyFn, Array, Path, Phi, PyTree

Served = dict[Path, dict[str, None]]


@dataclasses.dataclass(frozen=True)
class Notes:
    """What one evaluation notes, by path.

    Attributes:
      served: how the uses of an adapted weight are served.
      early: why a quantized leaf is dequantized before its use.
    """

    served: Served = dataclasses.field(default_factory=dict)
    early: Served = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Peft:
    """A method attached to the sites of one model: static, hashable, printable.

    Attributes:
      method: the method, or chain of methods.
      sites: for each part of the method, the sites that it adapts.
      leaves: path, shape and dtype of each leaf of the model's parameters.
      phi: path, shape and dtype of each array of phi.
      served: for each adapted path, how its uses are served: `efficient`, or why dense.
      passed: for each part, the paths that its target finds and it does not adapt, and their kind.
      early: the quantized leaves that are dequantized as a whole before their use, and why.
      names: how often each name occurs in the function.
    """

    method: Method | Chain
    sites: tuple[tuple[Site, ...], ...]
    leaves: tuple[Shape, ...]
    phi: tuple[Shape, ...] = ()
    served: tuple[tuple[Path, tuple[str, ...]], ...] = ()
    passed: tuple[tuple[tuple[Path, str], ...], ...] = ()
    early: tuple[tuple[Path, tuple[str, ...]], ...] = ()
    names: tuple[tuple[str, int], ...] = ()

    def init(self, key: Array, params: PyTree) -> Phi:
        """Makes a fresh phi.

        Args:
          key: typed PRNG key, `jax.random.key(seed)`; each path draws from a key of its own.
          params: the model's parameters.

        Returns:
          `{path: {name: array}}`, under a chain `{method: {path: {name: array}}}`; where the
          parameters lie on a mesh, as `shardings` says. Values do not depend on the mesh.

        Raises:
          ValueError: `params` is not the tree that the method was attached to.
          TypeError: `key` is not one typed key.
        """
        self._check_params(params)
        phi = self._fresh(key, params)
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(phi)):
            return phi  # whoever traces says where results lie
        where = self._shardings(params, phi)
        return phi if where is None else jax.tree.map(_processes.put, phi, where)

    def shardings(self, params: PyTree) -> PyTree | None:
        """Where phi lies on the mesh of the parameters: along the weights that it changes.

        An axis of an array that goes along an axis of a weight, such as that of LoRA's `a` along
        the weight's inputs, is split as that one is; all others, and what changes a named value,
        lie whole on every device.

        Args:
          params: the model's parameters, or their shapes with shardings.

        Returns:
          A tree like phi of `NamedSharding`s, for `jax.jit(peft.init, out_shardings=...)`,
          `jax.device_put` and their like; None where no parameter has a `NamedSharding`.

        Raises:
          ValueError: `params` is not the tree that the method was attached to.

        Example:
          >>> import jax, jax.numpy as jnp, peftjax as pj
          >>> from jax.sharding import NamedSharding, PartitionSpec
          >>> mesh = jax.make_mesh((1,), ('model',))
          >>> where = NamedSharding(mesh, PartitionSpec(None, 'model'))
          >>> params = {'kernel': jax.device_put(jnp.ones((3, 4)), where)}
          >>> peft = pj.attach(pj.Lora(rank=2, target='kernel'),
          ...     lambda p, x: x @ p['kernel'], params, jnp.ones((5, 3)))
          >>> {name: tuple(s.spec) for name, s in peft.shardings(params)['kernel'].items()}
          {'a': (), 'b': (None, 'model')}
        """
        self._check_params(params)
        if not _beside.on_a_mesh(_paths.leaves(params).values()):
            return None  # nothing is traced for those who have one device
        fresh = lambda p: self._fresh(jax.random.key(0), p)
        return self._shardings(params, jax.eval_shape(fresh, params))

    def wrap(self, fn: ApplyFn) -> 'PeftForward':
        """Turns `fn(params, *args, **kwargs)` into `forward(params, phi, *args, **kwargs)`.

        Args:
          fn: the apply function, or any other that uses the same parameters: a loss, a decode step.

        Returns:
          A pure function, not yet jitted, equal to another of the same plan and `fn`. Its keyword
          `dropout_key` switches dropout on. Its attribute `continued` is the forward of what
          follows in a sequence whose beginning was read through a cache.

        Raises (when traced):
          ValueError: `params` or `phi` is not of this model and method.

        Raises (at once):
          TypeError: `fn` has a keyword `dropout_key` of its own, which the forward would take.
        """
        if takes(fn, 'dropout_key'):
            raise TypeError(
                'dropout_key is a keyword of the forward, which switches the dropout of the method '
                f'on; {getattr(fn, "__name__", fn)} has one of its own. Rename that, or close over '
                'it: lambda params, *args: fn(params, *args, dropout_key=key)'
            )
        return PeftForward(self, fn)

    def merge(self, params: PyTree, phi: Phi) -> PyTree:
        """Folds phi into the parameters, for the untouched apply function.

        Computed in float32 (or wider) and cast to the dtype of each leaf.

        Args:
          params: the model's parameters.
          phi: as from `init`.

        Returns:
          Parameters of the same structure, shapes and dtypes.

        Raises:
          ValueError: a method has no place in the parameters, or a leaf to change is quantized or
            of whole numbers.
        """
        self._check_params(params)
        self._check_phi(phi)
        leaves = _paths.leaves(params)
        self._check_mergeable(leaves)
        merged: dict[Path, Array] = {}
        for part, chosen, mine in self._parts(phi):
            for site in chosen:
                wide = {
                    path: merged.get(path, leaves[path])
                    for path in (site.path, *site.bias)
                    if path in leaves
                }
                wide = {path: float32(leaf) for path, leaf in wide.items()}
                with jax.default_matmul_precision('highest'):  # what is rounded here is for good
                    merged.update(part.merge(site, wide, mine.get(site.path, {})))
        self._check_wide([path for path in merged if not trainable(leaves[path].dtype)])
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
        plain = nested(
            (keys, part.expand(chosen, _at(phi, keys)))
            for (keys, part), chosen in zip(self.method.parts, self.sites, strict=True)
        )
        method = self.method.folded()
        return dataclasses.replace(self, method=method, phi=shapes_of(plain)), plain

    def count(self) -> int:
        """The number of trained parameters."""
        return sum(math.prod(shape) for _, shape, _ in self.phi)

    def _parts(self, phi: Phi) -> list[tuple[Method, tuple[Site, ...], Any]]:
        """Each method with its sites and its phi, one entry for each site."""
        return [
            (part, chosen, part.expand(chosen, _at(phi, keys)))
            for (keys, part), chosen in zip(self.method.parts, self.sites, strict=True)
        ]

    def _shardings(self, params: PyTree, phi: Phi) -> PyTree | None:
        return _beside.shardings(self.method, self.sites, _paths.leaves(params), phi)

    def _fresh(self, key: Array, params: PyTree) -> Phi:
        """`init` without a check."""
        leaves = Arrays(_paths.leaves(params))
        return nested(
            (keys, part.init(mine, chosen, leaves))
            for (keys, part), chosen, mine in zip(
                self.method.parts, self.sites, self._keys(key), strict=True
            )
        )

    def _keys(self, key: Array) -> Iterator[Array]:
        return part_keys(typed_key(key), [part for _, part in self.method.parts], self.sites)

    def _call(
        self,
        fn: ApplyFn,
        notes: Notes,
        params: PyTree,
        phi: Phi,
        key: Array | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        begins: bool = True,
    ) -> PyTree:
        self._check_params(params)
        self._check_phi(phi)
        rooms = [part.virtual for _, part in self.method.parts if part.virtual and begins]
        shapes = []
        for room in rooms:
            shapes.append(result_shapes(fn, params, args, kwargs))
            args, kwargs = room.extend(args, kwargs)
        call = Call(fn, params, args, kwargs)
        leaves, named = self._bound(call.leaves, phi, key, begins)
        run = Run(named, notes.served, plan=self._known, early=notes.early)
        outs = evaluate(call.flat, leaves, call.inputs, run)
        self._check_reached(notes.served)
        result = jax.tree.unflatten(call.out, outs)
        for room, shape in zip(rooms[::-1], shapes[::-1], strict=True):
            result = _virtual.shorten(room, shape, result)
        return result

    @functools.cached_property
    def _known(self) -> Plan:
        """What evaluating another function needs to know of the one that was attached to."""
        parts = zip(self.method.parts, self.sites, strict=True)
        mine = [site for (_, part), chosen in parts for site in chosen if part.seam == 'output']
        return Plan(
            dict(self.names),
            {site.path: site.bias for site in mine},
            {site.path: site.kind for site in mine if not site.shared},
        )

    def _bound(
        self, leaves: Mapping[Path, Array], phi: Phi, key: Array | None, begins: bool
    ) -> tuple[list[Any], dict[Path, StandIn]]:
        """What stands where each leaf stood, and at named values."""
        bound: dict[Path, Any] = {path: stand(path, leaf) for path, leaf in leaves.items()}
        named: dict[Path, Any] = {}
        parts = self._parts(phi)
        own = self._keys(key) if key is not None else [None] * len(parts)
        for (part, chosen, mine), key in zip(parts, own, strict=True):
            for site in chosen if begins or part.virtual is None else ():
                home = named if site.kind == 'named' else bound
                home[site.path] = part.bind(site, home.get(site.path), mine[site.path], key)
        for part, chosen, _ in parts:
            for path in {p for site in chosen if part.seam == 'output' for p in site.bias}:
                if not isinstance(bound[path], StandIn):
                    bound[path] = bare(path, bound[path], Companion())
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

    def _check_mergeable(self, leaves: Mapping[Path, Any]) -> None:
        """Refuses to round a merged weight without being asked."""
        found = [
            path
            for (_, part), chosen in zip(self.method.parts, self.sites, strict=True)
            for site in chosen
            for path in (site.path, *site.bias)
            if part.mergeable and is_quantized(leaves.get(path))
        ]
        if found:
            raise ValueError(
                f'a merged weight is an ordinary array; {found[0]!r} is quantized '
                f'({len(set(found))} such leaves). Merge into pj.dequantize(params); '
                'pj.requantize(merged, like=params) rounds it again and tells the error'
            )

    def _check_wide(self, whole: Sequence[Path]) -> None:
        """Refuses to cut a merged weight to whole numbers."""
        if whole:
            dtypes = {path: dtype for path, _, dtype in self.leaves}
            raise ValueError(
                f'a merged weight needs a floating dtype; {whole[0]!r} is {dtypes[whole[0]]} '
                f'({len(whole)} such leaves). Convert them first: leaf.astype(jnp.float32)'
            )

    def _check_params(self, params: PyTree) -> None:
        _compare('params', self.leaves, shapes_of(params))

    def _check_phi(self, phi: Phi) -> None:
        _compare('phi', self.phi, shapes_of(phi))

    def __str__(self) -> str:
        return printed(self)


@dataclasses.dataclass(frozen=True)
class PeftForward:
    """`forward(params, phi, *args, dropout_key=None, **kwargs)`, as `Peft.wrap` makes it.

    Attributes:
      peft: the plan.
      fn: the function that it wraps.
      begins: whether the tokens of a call are the first of their sequences.
    """

    peft: Peft
    fn: ApplyFn
    begins: bool = True

    @property
    def continued(self) -> 'PeftForward':
        """The same for tokens that follow others: virtual tokens were read before them."""
        return dataclasses.replace(self, begins=False)

    def __call__(
        self, params: PyTree, phi: Phi, *args: Any, dropout_key: Array | None = None, **kwargs: Any
    ) -> PyTree:
        """The wrapped function with the method in place."""
        call = self.peft._call
        return call(self.fn, Notes(), params, phi, dropout_key, args, kwargs, self.begins)


def _at(phi: Phi, keys: Sequence[str]) -> Any:
    """The phi of one part of a chain."""
    return functools.reduce(lambda tree, key: tree[key], keys, phi)


def nested(parts: Iterable[tuple[Sequence[str], Phi]]) -> Phi:
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


def _compare(what: str, expected: Sequence[Shape], found: Sequence[Shape]) -> None:
    """Refuses a tree of other paths or shapes."""
    want, have = ({path: shape for path, shape, _ in side} for side in (expected, found))
    if wrong := differences(want, have, 'shape '):
        raise ValueError(
            f'{what} must be of the model that the method was attached to ({len(want)} arrays): '
            f'{wrong}'
        )
