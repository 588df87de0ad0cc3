"""Meshes: where theta, phi, the state of training and batches lie.

Theta lies where its user put it, by any `NamedSharding`. Phi lies along it (`Peft.shardings`;
`Peft.init` puts it there), the optimizer's state along phi (`start` does that), and the compiled
step keeps all of it where it is. Nothing here makes a mesh.

On a mesh with explicit axes a function must say how the results of ambiguous products lie. One that
does not, such as the models of `peftjax.models`, runs as it is under automatic axes:
`loss_fn = jax.sharding.auto_axes(loss_fn, out_sharding=PartitionSpec())`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from peftjax import _paths
from peftjax._beside import replicated
from peftjax._mesh_axes import ROWS
from peftjax._quantized import Quantized
from peftjax._rules import Rule as Rule
from peftjax._rules import parts, spec_of
from peftjax._types import Path, Phi, PyTree
from peftjax.train import TrainState, start


def by_path(rules: Sequence[Rule], mesh: Mesh, params: PyTree) -> PyTree:
    """Where the leaves of a model lie, by rules over their paths.

    Args:
      rules: `((pattern, spec), …)`: a regular expression, and the `PartitionSpec` of the last axes
        of the leaves that it finds (stacked layers lead). The first that finds a path counts; what
        none finds lies whole on every device.
      mesh: with the axes that the rules name.
      params: theta, or its shapes; leaves may be quantized.

    Returns:
      A tree like `params` of `NamedSharding`s, for `jax.device_put` and `jax.jit`.

    Raises:
      ValueError: a pattern finds nothing, a spec has more entries than a leaf has axes or names an
        axis that the mesh does not have, or the parts of an axis would not be equal.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> params = {'up': {'kernel': jnp.ones((3, 4))}, 'down': {'kernel': jnp.ones((4, 3))}}
      >>> rules = (('up/kernel', P(None, 'model')), ('down/kernel', P('model', None)))
      >>> where = by_path(rules, jax.make_mesh((1,), ('model',)), params)
      >>> tuple(where['up']['kernel'].spec), tuple(where['down']['kernel'].spec)
      ((None, 'model'), ('model', None))
    """
    leaves = _paths.leaves(params)
    for pattern, spec in rules:
        _paths.selected(pattern, leaves)
        for name in jax.tree.leaves(tuple(spec)):
            if name not in mesh.axis_names:
                raise ValueError(
                    f'rules name axes of the mesh, {mesh.axis_names}; that of {pattern!r} names '
                    f'{name!r}'
                )
    placed = {
        path: _placed(leaf, _even(path, leaf, spec_of(rules, path, leaf.shape), mesh))
        for path, leaf in leaves.items()
    }
    return _paths.replace(params, placed)


def batch_sharding(mesh: Mesh, axes: str | Sequence[str] | None = None) -> NamedSharding:
    """Splits the rows of a batch over axes of a mesh.

    Args:
      mesh: any.
      axes: of it, over which data is split; None for those of `data` and `fsdp` that it has.

    Returns:
      The sharding of arrays `(batch, ...)`, whole on every device where there are no axes. Placing
      an array on it fails where the axes do not divide its rows.

    Raises:
      ValueError: the mesh has no such axis.

    Example:
      >>> batch_sharding(jax.make_mesh((1, 1), ('data', 'model'))).spec[0]
      'data'
    """
    if axes is None:
        axes = [axis for axis in ROWS if axis in mesh.axis_names]
    found = (axes,) if isinstance(axes, str) else tuple(axes)
    if unknown := [axis for axis in found if axis not in mesh.axis_names]:
        raise ValueError(
            f'axes must be among those of the mesh, {mesh.axis_names}; got {unknown[0]!r}'
        )
    return NamedSharding(mesh, PartitionSpec(found or None))


def state_shardings(
    tx: optax.GradientTransformation, phi: Phi, *, keep_best: bool = False
) -> TrainState | None:
    """Where the state of training lies: what the optimizer keeps of an array, beside that array.

    Args:
      tx: the optimizer.
      phi: arrays, or shapes with shardings.
      keep_best: as of `start`.

    Returns:
      A `TrainState` of `NamedSharding`s, for `jax.jit` and `jax.device_put`; None where phi lies
      on no mesh. What has another shape than the array that it is kept of (Adafactor's rows and
      columns) lies whole on every device, and so do numbers and the key.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> where = NamedSharding(jax.make_mesh((1,), ('model',)), P('model'))
      >>> phi = {'kernel': {'a': jax.device_put(jnp.ones((4, 2)), where)}}
      >>> found = state_shardings(optax.adam(1e-3), phi)
      >>> tuple(found.opt_state[0].mu['kernel']['a'].spec)
      ('model',)
    """
    whole = replicated(leaf.sharding for leaf in jax.tree.leaves(phi) if hasattr(leaf, 'sharding'))
    if whole is None:
        return None
    fresh = lambda phi: start(tx, phi, jax.random.key(0), keep_best=keep_best)
    shapes = jax.eval_shape(fresh, phi)
    own: Any = jax.tree.map(lambda leaf: leaf.sharding, phi)
    tree: Any = jax.tree.map(lambda _: whole, shapes)
    best = tree.best and tree.best._replace(phi=own)
    return tree._replace(phi=own, opt_state=_along_phi(tx, shapes.opt_state, phi, whole), best=best)


def _along_phi(
    tx: optax.GradientTransformation, opt_state: PyTree, phi: Phi, whole: NamedSharding
) -> PyTree:
    is_masked = lambda leaf: isinstance(leaf, optax.MaskedNode)  # of another part of phi
    is_one = lambda kept: is_masked(kept) or isinstance(kept, list)  # several of one array: SM3

    def place(kept: Any, of: Any) -> Any:
        if isinstance(kept, list):
            return [whole for _ in kept]
        return kept if is_masked(kept) else of.sharding if kept.shape == of.shape else whole

    return optax.tree.map_params(
        tx, place, opt_state, phi, transform_non_params=lambda _: whole, is_leaf=is_one
    )


def _even(path: Path, leaf: Any, spec: PartitionSpec, mesh: Mesh) -> NamedSharding:
    for size, entry in zip(leaf.shape, spec, strict=True):
        if size % parts(entry, mesh):
            raise ValueError(
                f'the parts of an axis must be equal: {path!r} has shape {tuple(leaf.shape)}, and '
                f'{entry!r} splits {size} into {parts(entry, mesh)}. Let an earlier rule find it'
            )
    return NamedSharding(mesh, spec)


def _placed(leaf: Any, where: NamedSharding) -> Any:
    """The sharding of a leaf; of a quantized one, of its codes and scales."""
    return leaf.shardings(where) if isinstance(leaf, Quantized) else where
