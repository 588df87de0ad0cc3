"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, arXiv:2106.09685)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from peftjax._lowrank import LowRankMethod
from peftjax._sites import Site
from peftjax._standin import StandIn
from peftjax._types import Array, Path, Phi


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(LowRankMethod):
    """Adds a low-rank product to chosen weights: `w + scale * a @ b`.

    Attributes:
      target: regex, or several, searched in paths such as `encoder/layer/0/query/kernel`.
      rank: inner width of the product.
      alpha: the product is scaled by `alpha / rank`; `None` stands for `rank`, hence 1.
      rank_stabilized: scale by `alpha / sqrt(rank)` instead (Kalajdzievski 2023, arXiv:2312.03732).
      dropout: probability with which the input of the low-rank path is dropped, where the
        forward is given a `dropout_key`; all uses of a leaf in a call draw alike. Lookups, and uses
        that the plan calls dense, have no such input and know no dropout.
      ranks: other ranks for some paths, `((pattern, rank), …)` or a dict; the first that
        matches counts.
      alphas: other alphas for some paths, likewise.
      dtype: of phi, whatever the dtype of the weights.

    Shapes: a weight with axes `(*stack, *in, *out)`, in whatever order, gets
    `a: (*stack, *in, rank)` and `b: (*stack, rank, *out)`; stack are scanned layers and experts.
    At init `a ~ U(-1/sqrt(in), 1/sqrt(in))` and `b = 0` (lookups: `a = 0`, `b ~ N(0, 1)`), hence
    `forward == apply_fn`.

    A weight that is used twice (tied embedding and head) is adapted once, for both uses.

    Raises:
      ValueError: `rank` or `alpha` is not positive, or `dropout` not in `[0, 1)`; from `attach`: a
        target finds nothing, or a rank exceeds what the shape of a weight allows.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {'up': {'kernel': jnp.ones((3, 4))}}
      >>> peft = pj.attach(
      ...     pj.Lora(rank=2, target='kernel'),
      ...     lambda p, x: x @ p['up']['kernel'], params, jnp.ones((5, 3)))
      >>> jax.tree.map(jnp.shape, peft.init(jax.random.key(0), params))
      {'up/kernel': {'a': (3, 2), 'b': (2, 4)}}

    Reference: Hu et al. 2021, section 4.1, equation 3.
    """

    identity: ClassVar[str] = 'exact'

    def init(self, key: Array, sites: tuple[Site, ...], params: Mapping[Path, Any]) -> Phi:
        """See `Method`; the weights are not looked at."""
        del params
        return {site.path: self.pair(key, site) for site in sites}

    def bind(self, site: Site, w: Any, phi: Phi, key: Array | None) -> StandIn:
        """See `Method`."""
        factors, spans, rule = self.low_rank(site, phi, key)
        return StandIn.over(site, w, factors, spans, rule)
