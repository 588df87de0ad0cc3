"""Prefix tuning: Optimizing Continuous Prompts for Generation (Li and Liang 2021)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from peftjax._fields import number, settle
from peftjax._method import Method, site_key
from peftjax._rows import check_virtual, need_tokens, rows_view
from peftjax._sites import Site, Sites
from peftjax._standin import StandIn
from peftjax._types import Array, Path, Phi, Target
from peftjax._virtual import Virtual

SHARED = 'reparametrization'
"""Where phi keeps what all layers share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Trains keys and values of virtual tokens in every attention layer.

    The token argument of every call is padded with `length` dummy ids; in each layer their keys
    and values are overwritten with phi, and their places are cut from the results.

    Attributes:
      target: the keys and the values: `@name`s where the model names them (after norms and
        rotations, which they are exact for), else the paths of their layers.
      length: the number of virtual tokens.
      projection: hidden width of the reparametrizing network
        `tanh(tokens @ down + bias) @ up + bias`; 0 trains the prefix directly. `peft.fold(phi)`
        turns a trained network into a direct prefix.
      side: `front`, or `back` for bidirectional models whose real tokens should keep their
        places; a causal model would never look back at them there.
      tokens: regex for the argument with token ids: a position (`'0'`), a keyword, or a path into
        one (`'0/input_ids'`).
      dummy: the id that holds the places; not the padding id where positions are counted from ids.
      fill: what other arguments that go with the tokens get at the virtual places, by name; usual
        names (`attention_mask`, `token_type_ids`, …) are known. `None` leaves an argument as it is.
      shift: whether real tokens count those in front in an argument of positions; none are in front
        of them where the virtual tokens lie at the back.
      deviation: of the normal distribution that a direct prefix starts from.
      dtype: of phi.

    Shapes: `prefix: (*stack, length, *out)` for each key and value; with a projection
    `up: (*stack, projection, *out)` and `up_bias: (*stack, *out)` for each, and once
    `tokens: (length, width)`, `down: (width, projection)`, `down_bias: (projection,)`, where width
    is that of a key. The model at init is not the base.

    Raises:
      ValueError: a field is out of range; from `attach`: a target finds nothing, or a value that
        does not grow with the tokens; from `merge`: always.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {n: {'kernel': jnp.ones((4, 4))} for n in ('embed', 'query', 'key', 'value')}
      >>> def model(params, ids):
      ...     x = params['embed']['kernel'][ids]
      ...     q, k, v = (x @ params[n]['kernel'] for n in ('query', 'key', 'value'))
      ...     return jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v
      >>> ids = jnp.zeros((2, 3), jnp.int32)
      >>> peft = pj.attach(pj.PrefixTuning(target=('key', 'value/'), length=5), model, params, ids)
      >>> phi = peft.init(jax.random.key(0), params)
      >>> jax.tree.map(jnp.shape, phi)
      {'key/kernel': {'prefix': (5, 4)}, 'value/kernel': {'prefix': (5, 4)}}
      >>> peft.wrap(model)(params, phi, ids).shape
      (2, 3, 4)

    Reference: Li and Liang 2021, arXiv:2101.00190, sections 4.2 and 4.3.
    """

    target: Target = ('@key', '@value')
    length: int = 30
    projection: int = 0
    side: str = 'front'
    tokens: str = '0'
    dummy: int = 0
    fill: tuple[tuple[str, int | float | None], ...] = ()
    shift: bool = True
    deviation: float = 1.0
    dtype: str = 'float32'

    kinds: ClassVar[tuple[str, ...]] = ('linear', 'named')
    seam: ClassVar[str] = 'output'
    identity: ClassVar[str] = 'no'
    mergeable: ClassVar[bool] = False
    named: ClassVar[tuple[str, ...]] = ('fill',)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_virtual(self)
        settle(self, deviation=number('PrefixTuning', 'deviation', self.deviation))
        if type(self.projection) is not int or self.projection < 0:
            raise ValueError(
                f'PrefixTuning: projection must be 0 or a width; got {self.projection!r}'
            )

    @property
    def virtual(self) -> Virtual:
        """See `Method`."""
        return Virtual(self.length, self.side, self.tokens, self.dummy, self.fill, self.shift)

    def select(self, sites: Sites) -> tuple[Site, ...]:
        """See `Method`."""
        chosen = super().select(sites)
        for site in chosen:
            need_tokens(site, 'PrefixTuning')
        return tuple(_whole_token(site) if site.kind == 'named' else site for site in chosen)

    def init(self, key: Array, sites: tuple[Site, ...], params: Mapping[Path, Any]) -> Phi:
        """See `Method`; the weights are not looked at."""
        del params
        if self.projection:
            return self._network(key, sites)
        phi = {}
        for site in sites:
            shape = (*site.sizes(site.stack), self.length, *site.sizes(site.outputs))
            fresh = jax.random.normal(site_key(key, site.path), shape, self.dtype)
            phi[site.path] = {'prefix': self.deviation * fresh}
        return phi

    def _network(self, key: Array, sites: tuple[Site, ...]) -> Phi:
        """The reparametrizing network, layers drawn uniformly in ±1/sqrt(inputs)."""
        width = math.prod(sites[0].sizes(sites[0].outputs))
        first, second = jax.random.split(site_key(key, SHARED))
        phi: dict[str, Any] = {
            SHARED: {
                'tokens': jax.random.normal(first, (self.length, width), self.dtype),
                'down': self._uniform(second, (width, self.projection), width),
                'down_bias': jnp.zeros(self.projection, self.dtype),
            }
        }
        for site in sites:
            stack, out = site.sizes(site.stack), site.sizes(site.outputs)
            shape = (*stack, self.projection, *out)
            phi[site.path] = {
                'up': self._uniform(site_key(key, site.path), shape, self.projection),
                'up_bias': jnp.zeros((*stack, *out), self.dtype),
            }
        return phi

    def _uniform(self, key: Array, shape: tuple[int, ...], inputs: int) -> Array:
        bound = inputs**-0.5
        return jax.random.uniform(key, shape, self.dtype, -bound, bound)

    def expand(self, sites: tuple[Site, ...], phi: Phi) -> Phi:
        """See `Method`: the prefix of each site, where a network makes it."""
        if not self.projection:
            return phi
        shared = phi[SHARED]
        hidden = jnp.tanh(shared['tokens'] @ shared['down'] + shared['down_bias'][None])
        return {site.path: {'prefix': _project(hidden, phi[site.path], site)} for site in sites}

    def folded(self) -> 'PrefixTuning':
        """See `Method`: the prefix trained directly."""
        return dataclasses.replace(self, projection=0)

    def axes(self, site: Site) -> Mapping[str, tuple[int | None, ...]]:
        """See `Method`; what all layers share goes along no leaf."""
        across = (*site.stack, None, *site.outputs)
        return {'prefix': across, 'up': across, 'up_bias': (*site.stack, *site.outputs)}

    def bind(self, site: Site, w: Any, phi: Phi, key: Array | None) -> StandIn:
        """See `Method`."""
        del key
        return rows_view(site, w, phi['prefix'], self.side)

    def merge(self, site: Site, leaves: Mapping[Path, Array], phi: Phi) -> Mapping[Path, Array]:
        """See `Method`: refuses."""
        del leaves, phi
        raise ValueError(
            'prefix tuning lives in keys and values, not in the weights: there is nothing to merge '
            f'({site.path!r}). Keep phi'
        )


def _project(hidden: Array, phi: Phi, site: Site) -> Array:
    """`(length, hidden)` to `(*stack, length, *out)`."""
    stack = len(site.stack)
    up = jnp.tensordot(hidden, phi['up'], ((1,), (stack,)))
    return jnp.moveaxis(up, 0, stack) + jnp.expand_dims(phi['up_bias'], stack)


def _whole_token(site: Site) -> Site:
    """A named value as all the numbers of one token, not only its last dimension."""
    assert site.tokens is not None
    token = site.output[site.tokens + 1 :]
    layers = site.sizes(site.stack)
    outputs = tuple(range(len(layers), len(layers) + len(token)))
    return dataclasses.replace(site, shape=(*layers, *token), outputs=outputs)
