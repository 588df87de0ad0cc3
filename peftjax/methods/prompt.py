"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning (Lester et al. 2021)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from peftjax._method import Method, site_key
from peftjax._rows import check_virtual, need_tokens, rows_view
from peftjax._sites import Site, Sites
from peftjax._standin import StandIn
from peftjax._table import rows_of
from peftjax._types import Array, Path, Phi, Target
from peftjax._virtual import Virtual

EMBEDDINGS = r'(word_embeddings|embed_tokens|token_embed\w*|tok_embeddings|wte|shared)/'
"""The usual names of token embedding tables."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Trains the embeddings of virtual tokens put before (or after) the real ones.

    The token argument of every call is padded with `length` dummy ids, their embeddings are
    overwritten with phi, and their places are cut from the results.

    Attributes:
      target: the token embedding table, or `@name` of the embedded sequence.
      length: the number of virtual tokens.
      side: `front`, or `back` for bidirectional models whose real tokens should keep their
        places; a causal model would never look back at them there.
      tokens: regex for the argument with token ids: a position (`'0'` is the first after params), a
        keyword, or a path into one (`'0/input_ids'`).
      dummy: the id that holds the places; not the padding id where positions are counted from ids.
      fill: what other arguments that go with the tokens get at the virtual places, by name; usual
        names (`attention_mask`, `token_type_ids`, …) are known. `None` leaves an argument as it is.
      shift: whether real tokens count those in front in an argument of positions; none are in front
        of them where the virtual tokens lie at the back.
      initial: `vocabulary` (rows of the table drawn without replacement), `random` (normal, with
        the deviation of the table; uniform in ±0.5 at a named value), or token ids.
      dtype: of phi.

    Shapes: `prompt: (length, *out)`. The model at init is not the base.

    Raises:
      ValueError: a field is out of range; from `attach`: the target is not one embedding, an
        argument that goes with the tokens has no known fill; from `merge`: always.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {'wte': {'embedding': jnp.ones((9, 4))}}
      >>> def model(params, ids):
      ...     return params['wte']['embedding'][ids]
      >>> ids = jnp.zeros((2, 3), jnp.int32)
      >>> peft = pj.attach(pj.PromptTuning(length=5), model, params, ids)
      >>> phi = peft.init(jax.random.key(0), params)
      >>> jax.tree.map(jnp.shape, phi), peft.wrap(model)(params, phi, ids).shape
      ({'wte/embedding': {'prompt': (5, 4)}}, (2, 3, 4))

    Reference: Lester et al. 2021, arXiv:2104.08691.
    """

    target: Target = EMBEDDINGS
    length: int = 10
    side: str = 'front'
    tokens: str = '0'
    dummy: int = 0
    fill: tuple[tuple[str, int | float | None], ...] = ()
    shift: bool = True
    initial: str | tuple[int, ...] = 'vocabulary'
    dtype: str = 'float32'

    kinds: ClassVar[tuple[str, ...]] = ('embedding', 'named')
    seam: ClassVar[str] = 'output'
    identity: ClassVar[str] = 'no'
    mergeable: ClassVar[bool] = False
    named: ClassVar[tuple[str, ...]] = ('fill',)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_virtual(self)
        ids = self.initial if isinstance(self.initial, tuple) else ()
        known = self.initial in ('vocabulary', 'random')
        if not known and not (ids and all(type(i) is int for i in ids)):
            raise ValueError(
                "PromptTuning: initial must be 'vocabulary', 'random' or token ids; "
                f'got {self.initial!r}'
            )

    @property
    def virtual(self) -> Virtual:
        """See `Method`."""
        return Virtual(self.length, self.side, self.tokens, self.dummy, self.fill, self.shift)

    def select(self, sites: Sites) -> tuple[Site, ...]:
        """See `Method`."""
        chosen = super().select(sites)
        if len(chosen) != 1:
            found = ', '.join(repr(site.path) for site in chosen)
            raise ValueError(
                f'prompt tuning needs one embedding; target={self.target!r} finds {found}'
            )
        need_tokens(chosen[0], 'PromptTuning')
        return chosen

    def init(self, key: Array, sites: tuple[Site, ...], params: Mapping[Path, Any]) -> Phi:
        """See `Method`."""
        (site,) = sites
        key = site_key(key, site.path)
        table = params.get(site.path)
        return {site.path: {'prompt': self._fresh(key, site, table).astype(self.dtype)}}

    def _fresh(self, key: Array, site: Site, table: Array | None) -> Array:
        shape = (self.length, *site.sizes(site.outputs))
        if table is None:
            if self.initial != 'random':
                raise ValueError(
                    f"a named value has no vocabulary: at {site.path!r} set initial='random'"
                )
            return jax.random.uniform(key, shape, minval=-0.5, maxval=0.5)
        rows = jnp.moveaxis(table, site.inputs[0], 0)
        if self.initial == 'random':
            return jax.random.normal(key, shape) * jnp.std(rows)
        if self.initial == 'vocabulary':
            if self.length > rows.shape[0]:
                raise ValueError(
                    f'PromptTuning(length={self.length}) draws different rows of {site.path!r}, a '
                    f"vocabulary of {rows.shape[0]}. Shorten it, or set initial='random'"
                )
            picked = jax.random.choice(key, rows.shape[0], (self.length,), replace=False)
            return rows_of(rows, picked)
        given = tuple(int(i) for i in self.initial)
        ids = [given[i % len(given)] for i in range(self.length)]
        if not all(0 <= i < rows.shape[0] for i in ids):
            raise ValueError(f'initial holds ids outside the vocabulary of {rows.shape[0]}: {ids}')
        return rows_of(rows, ids)

    def axes(self, site: Site) -> Mapping[str, tuple[int | None, ...]]:
        """See `Method`."""
        return {'prompt': (*site.stack, None, *site.outputs)}

    def bind(self, site: Site, w: Any, phi: Phi, key: Array | None) -> StandIn:
        """See `Method`."""
        del key
        return rows_view(site, w, phi['prompt'], self.side)

    def merge(self, site: Site, leaves: Mapping[Path, Array], phi: Phi) -> Mapping[Path, Array]:
        """See `Method`: refuses."""
        del leaves, phi
        raise ValueError(
            'prompt tuning lives in the input, not in the weights: there is nothing to merge '
            f'({site.path!r}). Keep phi'
        )
