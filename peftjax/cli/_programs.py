"""A function compiled ahead, once for each shape of batch."""

import time
from typing import Any

import jax


class Programs:
    """The programs of one function, whose last argument is the batch.

    Attributes:
      seconds: of compilation so far.
    """

    def __init__(self, jitted: Any):
        self._jitted = jitted
        self._made: dict[tuple, jax.stages.Compiled] = {}
        self.seconds = 0.0

    def prepare(self, *args: Any) -> jax.stages.Compiled:
        """The program for these arguments, compiled if it is new."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(args[-1]))
        if shapes not in self._made:
            began = time.perf_counter()
            self._made[shapes] = self._jitted.lower(*args).compile()
            self.seconds += time.perf_counter() - began
        return self._made[shapes]

    def __call__(self, *args: Any) -> Any:
        """What the function gives."""
        return self.prepare(*args)(*args)

    @property
    def peak_bytes(self) -> int:
        """Bytes that the largest program holds at most; 0 where the backend does not tell."""
        return max(map(_peak, self._made.values()), default=0)


def _peak(compiled: jax.stages.Compiled) -> int:
    """Bytes of arguments, temporaries and results that are not written over arguments."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
