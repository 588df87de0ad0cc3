"""The base model as a stored adapter sees it: names of parameters, and their values as stored."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import _paths
from peftjax._method import float32
from peftjax._quantized import Quantized, whole
from peftjax._sites import Sites
from peftjax._types import Array, Path, PyTree
from peftjax.hf._layout import Layout, Slot, layout
from peftjax.hf._names import Naming, Place, Table, paths_as_target
from peftjax.methods import Trainable


class Model:
    """A model with its names.

    Args:
      sites: of the model.
      params: its parameters, or their shapes.
      naming: from paths to names.
    """

    def __init__(self, sites: Sites, params: PyTree, naming: Naming):
        self.table = Table(sites, naming)
        self.every = [site.path for site in sites]
        self._leaves = _paths.leaves(params)

    def target(self, paths: Iterable[Path]) -> tuple[str, ...]:
        """Regular expressions for these paths and no other, in the order of the model."""
        chosen = set(paths)
        return paths_as_target((path for path in self.every if path in chosen), self.every)

    def value(self, name: str) -> Array:
        """A parameter in the shape and orientation in which it is stored, in float32.

        Raises:
          ValueError: there are shapes only.
        """
        place = self.table.places[self.table.own(name)]
        path = place.site.path
        leaf = self._leaves[path]
        held = leaf.codes if isinstance(leaf, Quantized) else leaf
        if not isinstance(held, jax.Array | np.ndarray):
            raise ValueError(
                f'this adapter stands in relation to the base: the values of {path!r} are needed. '
                'Pass params as arrays, not as shapes'
            )
        stored, slot = self._stored(place, name)
        layers = jnp.moveaxis(jnp.asarray(whole(leaf)), stored.axes, range(len(stored.axes)))
        return slot.store(float32(layers[place.index]))

    def rounded(self, name: str, stored: np.ndarray) -> Array:
        """A stored value as the base would hold it, were it its own: quantized where that is."""
        place = self.table.places[self.table.own(name)]
        leaf = self._leaves[place.site.path]
        _, slot = self._stored(place, name)
        if not isinstance(leaf, Quantized) or stored.shape != slot.shape:
            return jnp.asarray(stored)
        # Blocks lie along the last axis, so that a layer is quantized as its stack is.
        value = slot.load(jnp.asarray(stored)).astype(leaf.dtype)
        return slot.store(float32(leaf.scheme.quantize(value).dequantize()))

    def _stored(self, place: Place, name: str) -> tuple[Layout, Slot]:
        """How the leaf of a parameter is stored, and the parameter itself."""
        site = place.site
        found = layout(Trainable(target='.'), site, self.table, 'value', site.shape)
        return found, found.slots[self.table.parameters(site.path).index(name)]

    def place(self, name: str) -> Place | None:
        """Where a parameter of this stored name lies."""
        return self.table.places.get(self.table.own(name))
