"""Compiles fast, and operations as they are written: what XLA fuses may round in another way.

The options are part of what `jax.jit` caches by; a configuration flag is not.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

WISHES = {
    'xla_backend_optimization_level': 0,
    'xla_cpu_parallel_codegen_split_count': 1,
    'xla_cpu_use_fusion_emitters': False,
}


def _known(wish: str, value: Any) -> bool:
    """Whether the compiler of this version knows an option."""
    try:
        jax.jit(jnp.sin, compiler_options={wish: value}).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@functools.cache
def _options() -> dict[str, Any]:
    return {wish: value for wish, value in WISHES.items() if _known(wish, value)}


def jit(fn: Any, **how: Any) -> Any:
    """`jax.jit`, quick to compile."""
    return jax.jit(fn, compiler_options=_options(), **how)
