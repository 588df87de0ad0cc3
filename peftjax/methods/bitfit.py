"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models."""

import dataclasses
from typing import ClassVar

from peftjax._leaf import LeafMethod
from peftjax._sites import Site, Sites
from peftjax._types import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(LeafMethod):
    """Trains biases only: leaves that are added to the outputs of layers and norms.

    What a bias is, the trace says, not its name: a vector that is added, or a leaf that is added
    to the output of a linear layer of the same module.

    Attributes:
      target: regex, or several, searched in paths; by default all biases.

    Shapes: `value`: as the leaf, in float32 or wider. At init it is the leaf: the model equals the
    base bit for bit.

    Raises:
      ValueError: from `attach`, a target finds no bias, or only whole numbers.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {'up': {'kernel': jnp.ones((3, 4)), 'bias': jnp.ones(4)}}
      >>> peft = pj.attach(
      ...     pj.BitFit(), lambda p, x: x @ p['up']['kernel'] + p['up']['bias'],
      ...     params, jnp.ones((5, 3)))
      >>> jax.tree.map(jnp.shape, peft.init(jax.random.key(0), params))
      {'up/bias': {'value': (4,)}}

    Reference: Ben Zaken et al. 2021, arXiv:2106.10199.
    """

    target: Target = '.'

    kinds: ClassVar[tuple[str, ...]] = ('bias',)

    def select(self, sites: Sites) -> tuple[Site, ...]:
        """See `Method`."""
        owned = {path for site in sites for path in site.bias}
        biases = tuple(
            site
            for site in sites
            if site.kind != 'bias' or site.path in owned or len(site.outputs) == 1
        )
        return super().select(dataclasses.replace(sites, all=biases))
