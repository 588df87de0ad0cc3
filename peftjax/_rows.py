"""Virtual tokens at one place: the first or last rows of an output are overwritten."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from peftjax._factor import Factor
from peftjax._method import At, OutputRule
from peftjax._sites import Site
from peftjax._standin import StandIn, place
from peftjax._types import Array


@dataclasses.dataclass(frozen=True)
class Rows(OutputRule):
    """Overwrites rows of an output along its dimension of tokens.

    Attributes:
      behind: how many dimensions lie behind it: a call may have other ones in front of it than the
        one that was traced, of batches.
      side: `front` or `back`.
      offset: rows of other methods between these and the edge.
    """

    behind: int
    side: str
    offset: int

    def fits(self, at: At) -> bool:
        """The rows cover the outputs whole."""
        return at.produced('rows')

    def post(self, at: At, x: Array, y: Array) -> Array:
        """Overwrites."""
        del x
        axis = self._axis(at, y)
        factor = at.view.factors['rows'].astype(y.dtype)
        rows = jax.vmap(lambda f: at.use.on_output(y, Factor.formed(f)), in_axes=-1)(factor)
        rows = jnp.moveaxis(jnp.squeeze(rows, axis + 1), 0, axis)
        count = rows.shape[axis]
        shape = [count if d == axis else n for d, n in enumerate(y.shape)]
        start = self.offset if self.side == 'front' else y.shape[axis] - count - self.offset
        rows = jnp.broadcast_to(rows, shape)
        return lax.dynamic_update_slice_in_dim(y, rows, start, axis)

    def _axis(self, at: At, y: Array) -> int:
        """The dimension of tokens."""
        axis = y.ndim - 1 - self.behind
        if axis < 0 or axis in at.use.outputs(y):
            raise ValueError(
                f'virtual tokens lie along the dimension with {self.behind} behind it, as in the '
                f'call that was traced; the output of {at.view.path!r} is of shape {y.shape} now, '
                'without tokens there. Attach to arguments that lie as in this call'
            )
        return axis


def rows_view(site: Site, w: Any, rows: Array, side: str) -> StandIn:
    """A stand-in that overwrites rows: `(*stack, count, *out)`."""
    rows = jnp.moveaxis(rows, len(site.stack), -1)
    axes = (*site.stack, *site.outputs)
    assert site.tokens is not None
    rule = Rows(len(site.output) - 1 - site.tokens, side, site.offset)
    return StandIn.over(
        site, w, {'rows': place(rows, axes, site.rank)}, {'rows': frozenset(axes)}, rule
    )


def need_tokens(site: Site, who: str) -> None:
    """Refuses a site whose output does not grow with the tokens.

    Raises:
      ValueError: it does not.
    """
    if site.tokens is None:
        raise ValueError(
            f'{who} acts where tokens are; the output of {site.path!r}, {site.output}, does not '
            'grow with the token argument. Leave it out of the target, or set tokens'
        )


def check_virtual(method: Any) -> None:
    """Refuses fields out of range."""
    name = type(method).__name__
    length = method.length
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f'{name}: length must be a positive integer; got {length!r}')
    if method.side not in ('front', 'back'):
        raise ValueError(f"{name}: side must be 'front' or 'back'; got {method.side!r}")
