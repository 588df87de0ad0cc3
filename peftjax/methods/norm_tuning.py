"""Norm tuning: Tuning LayerNorm in Attention (Zhao et al. 2023)."""

import dataclasses
from typing import ClassVar

from peftjax import _paths
from peftjax._leaf import LeafMethod
from peftjax._sites import Site, Sites
from peftjax._types import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormTuning(LeafMethod):
    """Trains the scales and biases of norms only.

    What a norm's scale is, the trace says: a vector that activations are multiplied by, also as
    `1 + w`; its bias is one of the same module.

    Attributes:
      target: regex, or several, searched in paths; by default all norms.

    Shapes: `value`: as the leaf, in float32 or wider. At init it is the leaf: the model equals the
    base bit for bit.

    Raises:
      ValueError: from `attach`, a target finds no norm, or only whole numbers.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {'norm': {'scale': jnp.ones(4), 'bias': jnp.zeros(4)}, 'head': jnp.ones((4, 2))}
      >>> def model(params, x):
      ...     return (x * params['norm']['scale'] + params['norm']['bias']) @ params['head']
      >>> peft = pj.attach(pj.NormTuning(), model, params, jnp.ones((5, 4)))
      >>> sorted(peft.init(jax.random.key(0), params))
      ['norm/bias', 'norm/scale']

    Reference: Zhao et al. 2023, arXiv:2312.11420.
    """

    target: Target = '.'

    kinds: ClassVar[tuple[str, ...]] = ('scale', 'bias')

    def select(self, sites: Sites) -> tuple[Site, ...]:
        """See `Method`."""
        norms = {_paths.parent(s.path) for s in sites if s.kind == 'scale' and len(s.outputs) == 1}
        owned = {path for site in sites for path in site.bias}
        kept = tuple(
            site
            for site in sites
            if site.kind not in self.kinds
            or (_paths.parent(site.path) in norms and site.path not in owned)
        )
        return super().select(dataclasses.replace(sites, all=kept))
