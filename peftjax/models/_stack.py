"""A stack of equal blocks: scanned or unrolled, with or without recomputation."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from peftjax.models._compute import Compute


def stack(
    block: type[nn.Module],
    config: Any,
    compute: Compute,
    length: int,
    shared: int,
    name: str,
    static: tuple[int, ...] = (),
    policy: Callable[..., Any] | None = None,
) -> Callable[..., tuple[Any, None]]:
    """The blocks as one module.

    Args:
      block: a module of the fields `config` and `compute`, called as
        `block(carry, layer, *shared) -> (carry, None)`.
      config: of each block.
      compute: `scan_layers` and `save`, and for each block.
      length: number of blocks.
      shared: number of arguments that all blocks share.
      name: of the module.
      static: which of the shared arguments are Python values.
      policy: what a gradient keeps where `compute.save` is not None; by default what that names.

    Returns:
      A module called as a block is; `layer` is then a tree of arrays with a leading layer axis.
    """
    if compute.save is not None:
        policy = policy or jax.checkpoint_policies.save_only_these_names(*compute.save)
        # The scan is a barrier of its own; without one, merging of equal subexpressions
        # would undo the recomputation.
        block = nn.remat(
            block,
            policy=policy,
            static_argnums=tuple(3 + i for i in static),
            prevent_cse=not compute.scan_layers,
        )
    if not compute.scan_layers:
        return _Unrolled(block, config, compute, length, name=name)
    return nn.scan(
        block,
        variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=(0, *[nn.broadcast] * shared),  # pyright: ignore[reportArgumentType]
        length=length,
    )(config, compute, name=name)


class _Unrolled(nn.Module):
    """The blocks `0`, `1`, … one after the other."""

    block: type[nn.Module]
    config: Any
    compute: Compute
    length: int

    @nn.compact
    def __call__(self, carry, layers, *shared):
        for index in range(self.length):
            layer = jax.tree.map(lambda x, i=index: x[i], layers)
            block = self.block(self.config, self.compute, name=str(index))
            carry, _ = block(carry, layer, *shared)
        return carry, None
