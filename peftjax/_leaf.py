"""Methods of the leaf seam: phi holds the new values of chosen leaves."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from peftjax._method import Method, float32
from peftjax._sites import Site
from peftjax._types import Array, Path, Phi


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafMethod(Method):
    """Trains leaves themselves; a method of this kind only says which."""

    seam: ClassVar[str] = 'leaf'
    identity: ClassVar[str] = 'exact'
    mergeable: ClassVar[bool] = True

    def init(self, key: Array, sites: tuple[Site, ...], params: Mapping[Path, Any]) -> Phi:
        """See `Method`: copies of the leaves, in float32 or wider."""
        del key
        # a copy: phi is donated in training, theta must outlive it
        return {site.path: {'value': jnp.array(float32(params[site.path]))} for site in sites}

    def axes(self, site: Site) -> Mapping[str, tuple[int | None, ...]]:
        """See `Method`."""
        return {'value': tuple(range(site.rank))}

    def bind(self, site: Site, w: Any, phi: Phi, key: Array | None) -> Array:
        """See `Method`: the trained value, in the dtype of the leaf that it replaces."""
        del site, key
        return phi['value'].astype(w.dtype)
