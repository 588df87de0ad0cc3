"""Methods of the leaf seam: phi holds the new values of chosen leaves."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from peftjax import _paths
from peftjax._method import Method, float32
from peftjax._sites import Site, Sites, trainable
from peftjax._types import Array, Path, Phi


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafMethod(Method):
    """Trains leaves themselves; a method of this kind only says which."""

    seam: ClassVar[str] = 'leaf'
    identity: ClassVar[str] = 'exact'
    mergeable: ClassVar[bool] = True

    def select(self, sites: Sites) -> tuple[Site, ...]:
        """See `Method`; whole numbers and keys, which the model counts or draws by, stay."""
        chosen = super().select(sites)
        for pattern in _paths.patterns(self.target):
            found = [site for site in chosen if _paths.matches(pattern, site.path)]
            if not any(trainable(site.dtype) for site in found):
                what = ', '.join(f'{site.path!r} ({site.dtype})' for site in found[:5])
                raise ValueError(
                    f'{type(self).__name__} trains leaves of floating dtype; target={pattern!r} '
                    f'finds only {what}. Choose other paths, or convert the leaf first'
                )
        return tuple(site for site in chosen if trainable(site.dtype))

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
