"""Names for the things that every file speaks of."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Path: TypeAlias = str
"""Where a leaf lies, e.g. `encoder/layer/attention/self/query/kernel`, or a named value, `@key`."""

Phi: TypeAlias = Mapping[str, Any]
"""The trained parameters: `{path: {name: array}}`, under `chain` `{method: {path: {...}}}`."""

ApplyFn: TypeAlias = Callable[..., PyTree]
"""The user's own `apply_fn(params, *args, **kwargs)`."""

Forward: TypeAlias = Callable[..., PyTree]
"""`forward(params, phi, *args, dropout_key=None, **kwargs)`."""

Target: TypeAlias = str | tuple[str, ...] | list[str]
"""A regular expression searched in paths, or several of which each must match something."""
