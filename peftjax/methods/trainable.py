"""Chosen leaves trained in full: heads, layers, or everything (full fine-tuning)."""

import dataclasses
from typing import ClassVar

from peftjax._leaf import LeafMethod
from peftjax._sites import KINDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainable(LeafMethod):
    """Trains chosen leaves in full; phi holds their new values.

    `Trainable(target='.')` is full fine-tuning, as one more method among the others.

    Attributes:
      target: regex, or several, searched in the paths of all leaves that the model uses.

    Shapes: `value`: as the leaf, in float32 or wider. At init it is the leaf: the model equals the
    base bit for bit.

    Raises:
      ValueError: from `attach`, a target finds nothing, or only whole numbers.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {'head': {'kernel': jnp.ones((3, 4))}}
      >>> peft = pj.attach(
      ...     pj.Trainable(target='head'),
      ...     lambda p, x: x @ p['head']['kernel'], params, jnp.ones((5, 3)))
      >>> jax.tree.map(jnp.shape, peft.init(jax.random.key(0), params))
      {'head/kernel': {'value': (3, 4)}}
    """

    kinds: ClassVar[tuple[str, ...]] = tuple(kind for kind in KINDS if kind != 'named')
