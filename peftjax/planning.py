"""What tuning a model will take, from shapes alone."""

import collections
import contextlib
import dataclasses
import math
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import NamedSharding

from peftjax import _paths
from peftjax._collectives import collectives
from peftjax._counts import whole
from peftjax._flops import flops
from peftjax._peft import Peft
from peftjax._types import PyTree
from peftjax.sharding import state_shardings
from peftjax.train import LossFn, TrainState, start, train_step

CPU_OPTIONS: Mapping[str, Any] = {
    'xla_disable_hlo_passes': 'while-loop-invariant-code-motion',
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
}
"""A CPU computes in float32 what is bfloat16, and casts stacked weights as a whole, before the loop
over layers; accelerators hold no such copy. The machine code never runs: it need not be good."""

PARTITIONING = 'spmd-partitioning'
"""The pass of XLA that makes one device's program of that of all."""


class Held(NamedTuple):
    """Bytes of what lives from step to step.

    Attributes:
      params: of theta.
      phi: of phi.
      optimizer: of the optimizer's state.
    """

    params: int
    phi: int
    optimizer: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What tuning takes; `print` it.

    Attributes:
      params: number of parameters of the model.
      trained: number of trained parameters.
      whole: bytes, all devices together, each array once.
      device: bytes on each device.
      batch: bytes of a batch on each device.
      temporaries: bytes on each device of what a step holds besides: activations kept for the
        backward pass, gradients, and what is needed in passing.
      received: bytes that each device gets from collective operations in a step, by operation;
        of a gather all that it gives, of a sum its result.
      flops: of the products of one step, all devices together.
      tokens: of one step.
      devices: how many.
      platform: that the step was compiled for.
    """

    params: int
    trained: int
    whole: Held
    device: Held
    batch: int
    temporaries: int
    received: Mapping[str, int]
    flops: float
    tokens: int
    devices: int
    platform: str

    @property
    def peak(self) -> int:
        """Bytes on each device while a step runs."""
        return sum(self.device) + self.batch + self.temporaries

    def __str__(self) -> str:
        percent = 100 * self.trained / self.params
        rows = [
            ('parameters', f'{self.params:,}'),
            ('trained', f'{self.trained:,} ({percent:.3g} %)'),
            *((f'bytes of {name}', self._bytes(i)) for i, name in enumerate(_NAMES)),
            ('bytes of a batch', _size(self.batch) + self._each),
            ('temporaries of a step', _size(self.temporaries) + self._each),
            ('all of it', _size(self.peak) + self._each),
            *((f'received by {name}', _size(n) + self._each) for name, n in self.received.items()),
            ('tokens of a step', f'{self.tokens:,}'),
            ('FLOPs of a step', f'{self.flops:.4g}{self._share}'),
            ('FLOPs per token', f'{self.flops / self.tokens:.4g}'),
            ('compiled for', f'{self.devices} × {self.platform}'),
        ]
        width = max(len(name) for name, _ in rows)
        return '\n'.join(f'{name.ljust(width)}  {value}' for name, value in rows)

    @property
    def _each(self) -> str:
        return ' on each device' if self.devices > 1 else ''

    @property
    def _share(self) -> str:
        return f', {self.flops / self.devices:.4g} for each device' if self.devices > 1 else ''

    def _bytes(self, index: int) -> str:
        whole, device = _size(self.whole[index]), _size(self.device[index])
        return f'{whole}, {device} on each device' if self.devices > 1 else whole


_NAMES = ('theta', 'phi', 'optimizer state')


def plan(
    peft: Peft,
    loss_fn: LossFn,
    params: PyTree,
    batch: Any,
    *,
    tx: optax.GradientTransformation,
    tokens: int,
) -> Plan:
    """Plans the training of phi: the step of `pj.train_step` is compiled and never run.

    No weights are needed, nor room for them: `params` and `batch` may be
    `jax.ShapeDtypeStruct`s. Where these have a `NamedSharding`, phi and the optimizer's state are
    planned along them, as `Peft.shardings` says, and the step is compiled for that mesh.

    Temporaries are those that the compiler plans (`memory_analysis`), on whatever backend is there.
    On a CPU they are more than on an accelerator: attention scores are held for the layer at hand,
    which a fused kernel does not; one copy that a CPU alone would make is kept out (`CPU_OPTIONS`).

    FLOPs are those of products, two for a multiplication and an addition, found in the traced
    step, recomputation included: `cost_analysis` takes the body of a loop once, so that scanned
    layers would count as one. Kernels that hide their products (cuDNN's attention) count nothing.

    Args:
      peft: as from `attach`.
      loss_fn: `loss_fn(params, phi, batch, key)`, as of `train_step`.
      params: theta, or its shapes; leaves may be quantized.
      batch: of one step, or its shapes.
      tx: the optimizer.
      tokens: how many tokens (or examples) the batch has.

    Returns:
      The plan.

    Raises:
      ValueError: `params` is not the tree that the method was attached to, or `tokens` not at least
        one.
      TypeError: `tokens` is no integer.

    Example:
      >>> import jax, jax.numpy as jnp, optax, peftjax as pj
      >>> params = {'kernel': jax.ShapeDtypeStruct((256, 128), jnp.float32)}
      >>> x = jax.ShapeDtypeStruct((32, 256), jnp.float32)
      >>> model = lambda params, x: x @ params['kernel']
      >>> peft = pj.attach(pj.Lora(rank=2, target='kernel'), model, params, x)
      >>> forward = peft.wrap(model)
      >>> loss_fn = lambda params, phi, x, key: (forward(params, phi, x) ** 2).mean()
      >>> found = pj.plan(peft, loss_fn, params, x, tx=optax.adam(1e-3), tokens=32)
      >>> found.params, found.trained, found.whole.params
      (32768, 768, 131072)
    """
    tokens = whole('tokens', tokens)
    mesh = _mesh(params, batch)
    state = _state(peft, params, tx)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        traced = train_step(loss_fn, tx).trace(params, state, batch)  # pyright: ignore[reportFunctionMemberAccess]
    platform = (jax.devices() if mesh is None else mesh.devices.flat)[0].platform
    options = CPU_OPTIONS if platform == 'cpu' else {}
    compiled, text = _compiled(traced, dict(options))
    parts = (params, state.phi, state.opt_state)
    return Plan(
        params=sum(math.prod(leaf.shape) for leaf in _paths.leaves(params).values()),
        trained=peft.count(),
        whole=Held(*(sum(map(_nbytes, jax.tree.leaves(part))) for part in parts)),
        device=Held(*(sum(map(_local_nbytes, jax.tree.leaves(part))) for part in parts)),
        batch=sum(map(_local_nbytes, jax.tree.leaves(batch))),
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        received=_received(text),
        flops=flops(traced.jaxpr),
        tokens=tokens,
        devices=1 if mesh is None else mesh.size,
        platform=platform,
    )


def _mesh(*trees: Any) -> Any:
    """The mesh that arrays lie on, if they lie on one."""
    shardings = (getattr(leaf, 'sharding', None) for leaf in jax.tree.leaves(trees))
    return next((where.mesh for where in shardings if isinstance(where, NamedSharding)), None)


def _compiled(traced: Any, options: dict[str, Any]) -> tuple[Any, str]:
    """A step, and the text of its program after it was partitioned.

    What a CPU makes of it later computes, and sends, in float32 what is bfloat16.
    """
    with tempfile.TemporaryDirectory() as folder:
        options |= {'xla_dump_to': folder, 'xla_dump_hlo_pass_re': PARTITIONING}
        compiled = traced.lower().compile(compiler_options=options)
        found = sorted(pathlib.Path(folder).glob(f'*after_{PARTITIONING}*.txt'))
        return compiled, found[0].read_text() if found else compiled.as_text()


def _received(text: str) -> dict[str, int]:
    totals = collections.Counter[str]()
    for one in collectives(text):
        totals[one.operation] += one.nbytes
    return dict(sorted(totals.items()))


def _state(peft: Peft, params: PyTree, tx: optax.GradientTransformation) -> TrainState:
    """Shapes of the state of training, where it would lie."""
    phi = jax.eval_shape(peft.init, jax.random.key(0), params)
    phi = _placed(phi, peft.shardings(params))
    state = jax.eval_shape(lambda phi: start(tx, phi, jax.random.key(0)), phi)
    return _placed(state, state_shardings(tx, phi))


def _placed(tree: Any, where: Any) -> Any:
    """Shapes that lie somewhere."""
    if where is None:
        return tree
    at = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(at, tree, where)


def _nbytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize  # of keys too


def _local_nbytes(leaf: Any) -> int:
    where = getattr(leaf, 'sharding', None)
    shape = leaf.shape if where is None else where.shard_shape(tuple(leaf.shape))
    return math.prod(shape) * leaf.dtype.itemsize


def _size(count: int) -> str:
    """Bytes as people read them; decimal units."""
    for power, unit in ((9, 'GB'), (6, 'MB'), (3, 'kB')):
        if count >= 10**power:
            return f'{count / 10**power:.3g} {unit}'
    return f'{count} B'
