"""The front door: one call from an apply function to a jitted forward and a fresh phi."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from peftjax._attach import attach
from peftjax._chain import Chain
from peftjax._method import Method
from peftjax._peft import PeftForward
from peftjax._types import ApplyFn, Array, Phi, PyTree
from peftjax.methods.adapter import Adapter
from peftjax.methods.lora import Lora
from peftjax.methods.prefix import PrefixTuning
from peftjax.methods.prompt import PromptTuning


class Forward:
    """A jitted `forward(params, phi, *args, dropout_key=None, **kwargs)`.

    Arrays are traced; whatever else is passed (`train=False`, numbers, strings, functions) is
    static: it must be hashable, and another value compiles again.

    Attributes:
      peft: the plan behind it, for `merge`, `pj.save` or wrapping other functions.
      continued: the forward of what follows a beginning that was read through a cache.
    """

    def __init__(self, wrapped: PeftForward):
        self.peft, self._wrapped = wrapped.peft, wrapped

        @functools.partial(jax.jit, static_argnums=0)
        def run(static: Any, params: PyTree, phi: Phi, arrays: Sequence[Array]) -> PyTree:
            structure, rest = static
            filled = iter(arrays)
            leaves = [next(filled) if kind is _ARRAY else _said(kind, leaf) for kind, leaf in rest]
            args, kwargs = jax.tree.unflatten(structure, leaves)
            return wrapped(params, phi, *args, **kwargs)

        self._run = run

    @functools.cached_property
    def continued(self) -> 'Forward':
        """The same for tokens that follow others, where virtual tokens were read before them."""
        return Forward(self._wrapped.continued)

    def __call__(self, params: PyTree, phi: Phi, *args: Any, **kwargs: Any) -> PyTree:
        """Calls the wrapped function."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        arrays = [leaf for leaf in leaves if _traced(leaf)]
        rest = tuple((_ARRAY, None) if _traced(leaf) else _static(leaf) for leaf in leaves)
        return self._run((structure, rest), params, phi, arrays)


_ARRAY = object()


def _traced(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _static(leaf: Any) -> tuple[type, Any]:
    """An argument that is not traced, with its type: `1`, `1.0` and `True` are equal.

    Raises:
      TypeError: it cannot be compared with that of another call.
    """
    if getattr(leaf, '__hash__', None) is None:
        raise TypeError(
            f'an argument that is not an array must be hashable; got {leaf!r}. Close over it, or '
            'make arrays of it'
        )
    # by its bits: 0.0 equals -0.0, and nan nothing
    return type(leaf), leaf.hex() if type(leaf) is float else leaf


def _said(kind: type, kept: Any) -> Any:
    """The argument that `_static` was given."""
    return float.fromhex(kept) if kind is float else kept


class Wrapped(NamedTuple):
    """What the front door returns: `forward, phi = …`."""

    forward: Forward
    phi: Phi


def method_wrap(
    method: Method | Chain,
    apply_fn: ApplyFn,
    params: PyTree,
    *args: Any,
    key: Array,
    kwargs: Mapping[str, Any] | None = None,
) -> Wrapped:
    """Attaches any method, makes a fresh phi and a jitted forward.

    Args:
      method: such as `pj.Ia3(target='key|value')`, or a `pj.chain`.
      apply_fn: `apply_fn(params, *args, **kwargs)`, any pure function.
      params: the model's parameters.
      *args: an example of the other arguments.
      key: typed PRNG key, for the fresh phi.
      kwargs: an example of the keyword arguments.

    Returns:
      `(forward, phi)`; `forward.peft` is the plan behind them.

    Raises:
      ValueError: as `attach`.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params, x = {'kernel': jnp.ones((3, 4))}, jnp.ones((2, 3))
      >>> model = lambda params, x: x @ params['kernel']
      >>> forward, phi = pj.method_wrap(
      ...     pj.Ia3(target='kernel'), model, params, x, key=jax.random.key(0))
      >>> bool((forward(params, phi, x) == model(params, x)).all())
      True
    """
    peft = attach(method, apply_fn, params, *args, **(kwargs or {}))
    fresh = jax.jit(peft.init, out_shardings=peft.shardings(params))
    return Wrapped(Forward(peft.wrap(apply_fn)), fresh(key, params))


def lora_wrap(
    apply_fn: ApplyFn,
    params: PyTree,
    *args: Any,
    key: Array,
    kwargs: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Wrapped:
    """`method_wrap` with `pj.Lora(**fields)`.

    Args:
      apply_fn: `apply_fn(params, *args, **kwargs)`, any pure function.
      params: the model's parameters.
      *args: an example of the other arguments.
      key: typed PRNG key, for the fresh phi.
      kwargs: an example of the keyword arguments.
      **fields: of `pj.Lora`.

    Returns:
      `(forward, phi)`.

    Raises:
      ValueError: as `attach`.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params, x = {'kernel': jnp.ones((3, 4))}, jnp.ones((2, 3))
      >>> forward, phi = pj.lora_wrap(
      ...     lambda params, x: x @ params['kernel'], params, x,
      ...     key=jax.random.key(0), rank=2, target='kernel')
      >>> jax.tree.map(jnp.shape, phi)
      {'kernel': {'a': (3, 2), 'b': (2, 4)}}
    """
    return method_wrap(Lora(**fields), apply_fn, params, *args, key=key, kwargs=kwargs)


def adapter_wrap(
    apply_fn: ApplyFn,
    params: PyTree,
    *args: Any,
    key: Array,
    kwargs: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Wrapped:
    """`method_wrap` with `pj.Adapter(**fields)`.

    Args:
      apply_fn: `apply_fn(params, *args, **kwargs)`, any pure function.
      params: the model's parameters.
      *args: an example of the other arguments.
      key: typed PRNG key, for the fresh phi.
      kwargs: an example of the keyword arguments.
      **fields: of `pj.Adapter`.

    Returns:
      `(forward, phi)`.

    Raises:
      ValueError: as `attach`.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params, x = {'kernel': jnp.ones((3, 8))}, jnp.ones((2, 3))
      >>> forward, phi = pj.adapter_wrap(
      ...     lambda params, x: x @ params['kernel'], params, x,
      ...     key=jax.random.key(0), target='kernel', reduction=4)
      >>> phi['kernel']['down'].shape
      (8, 2)
    """
    return method_wrap(Adapter(**fields), apply_fn, params, *args, key=key, kwargs=kwargs)


def prompt_prepend(
    apply_fn: ApplyFn,
    params: PyTree,
    *args: Any,
    key: Array,
    kwargs: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Wrapped:
    """`method_wrap` with `pj.PromptTuning(**fields)`.

    Args:
      apply_fn: `apply_fn(params, *args, **kwargs)`, any pure function.
      params: the model's parameters.
      *args: an example of the other arguments.
      key: typed PRNG key, for the fresh phi.
      kwargs: an example of the keyword arguments.
      **fields: of `pj.PromptTuning`.

    Returns:
      `(forward, phi)`.

    Raises:
      ValueError: as `attach`.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params, ids = {'wte': {'embedding': jnp.ones((9, 4))}}, jnp.zeros((2, 3), jnp.int32)
      >>> forward, phi = pj.prompt_prepend(
      ...     lambda params, ids: params['wte']['embedding'][ids], params, ids,
      ...     key=jax.random.key(0), length=5)
      >>> forward(params, phi, ids).shape
      (2, 3, 4)
    """
    return method_wrap(PromptTuning(**fields), apply_fn, params, *args, key=key, kwargs=kwargs)


def prefix_wrap(
    apply_fn: ApplyFn,
    params: PyTree,
    *args: Any,
    key: Array,
    kwargs: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Wrapped:
    """`method_wrap` with `pj.PrefixTuning(**fields)`.

    Args:
      apply_fn: `apply_fn(params, *args, **kwargs)`, any pure function.
      params: the model's parameters.
      *args: an example of the other arguments.
      key: typed PRNG key, for the fresh phi.
      kwargs: an example of the keyword arguments.
      **fields: of `pj.PrefixTuning`.

    Returns:
      `(forward, phi)`.

    Raises:
      ValueError: as `attach`.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {n: {'kernel': jnp.ones((4, 4))} for n in ('embed', 'key', 'value')}
      >>> def model(params, ids):
      ...     x, k, v = (params[n]['kernel'] for n in ('embed', 'key', 'value'))
      ...     x = x[ids]
      ...     return jax.nn.softmax(x @ (x @ k).swapaxes(-1, -2)) @ (x @ v)
      >>> forward, phi = pj.prefix_wrap(
      ...     model, params, jnp.zeros((2, 3), jnp.int32),
      ...     key=jax.random.key(0), target=('key', 'value/'), length=5)
      >>> phi['key/kernel']['prefix'].shape
      (5, 4)
    """
    return method_wrap(PrefixTuning(**fields), apply_fn, params, *args, key=key, kwargs=kwargs)
