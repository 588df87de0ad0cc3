"""The devices that a command computes on, and what of a batch each of them gets."""

import argparse
import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from peftjax import _processes, sharding
from peftjax._mesh_axes import AXES, ROWS
from peftjax.cli import _distributed
from peftjax.cli._numbers import count

ABOUT = (
    'devices by axis, as data=4,model=2: data splits batches, model splits products, fsdp splits '
    'batches and keeps a part of each weight (one device)'
)


def axes(text: str) -> dict[str, int]:
    """Names and sizes of axes, as typed.

    Raises:
      argparse.ArgumentTypeError: it says something else.
    """
    found: dict[str, int] = {}
    for part in text.split(','):
        name, _, size = part.strip().partition('=')
        if name not in AXES or name in found:
            raise argparse.ArgumentTypeError(
                f'must be axes among data, fsdp and model, as data=4,model=2; got {text!r}'
            )
        found[name] = count(size)
    return found


def checked(text: str) -> str:
    """The same text, if it names axes."""
    axes(text)
    return text


def mesh(sizes: dict[str, int]) -> Mesh | None:
    """A mesh of the first devices; where JAX has not begun, a CPU is made as many as it takes.

    Args:
      sizes: by axis; none for no mesh.

    Raises:
      ValueError: there are not so many devices, or more, but in several processes.
    """
    if not sizes:
        return None
    wanted = math.prod(sizes.values())
    with contextlib.suppress(RuntimeError):  # JAX runs already, with as many as it has
        jax.config.update('jax_num_cpu_devices', wanted)
    if jax.device_count() < wanted:
        raise ValueError(
            f'a mesh of {wanted} devices is wanted; JAX runs with {jax.device_count()}. Name '
            'smaller axes, or start JAX with more devices'
        )
    if _processes.several() and jax.device_count() > wanted:
        raise ValueError(
            f'several processes compute on all their devices, {jax.device_count()}; the mesh names '
            f'{wanted}'
        )
    kinds = (AxisType.Auto,) * len(sizes)
    devices = jax.devices()[:wanted]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


@contextlib.contextmanager
def entered(options: argparse.Namespace) -> Iterator[Mesh | None]:
    """The mesh that options name, as the one that models compute on.

    Args:
      options: with `mesh`, `batch`, `accumulate`, and what `_distributed` adds.

    Yields:
      The mesh; None where none is named.

    Raises:
      ValueError: there are not so many devices, or a part of a batch has rows left over.
    """
    sizes = axes(options.mesh) if options.mesh else {}
    with _distributed.joined(options, math.prod(sizes.values()) if sizes else 0):
        found = mesh(sizes)
        if found is None:
            yield None
            return
        _check(options, rows_of(found))
        with jax.set_mesh(found):
            yield found


def _check(options: argparse.Namespace, rows: int) -> None:
    if (options.batch // options.accumulate) % rows:
        parts = f' in {options.accumulate} parts' if options.accumulate > 1 else ''
        raise ValueError(
            f'--batch {options.batch}{parts} must be dealt out over {rows} devices of '
            f'--mesh {options.mesh}: choose a multiple'
        )


def rows_of(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are dealt out."""
    return math.prod(mesh.shape[axis] for axis in ROWS if axis in mesh.axis_names)


def dealt(batch: Any, mesh: Mesh | None, parts: int = 1) -> Any:
    """A batch with its rows on the devices that compute them.

    Args:
      batch: arrays `(rows, …)`, or `(parts, rows, …)` of several parts.
      mesh: of the devices; None leaves the batch.
      parts: of the batch.
    """
    if mesh is None:
        return batch
    rows = sharding.batch_sharding(mesh)
    where = rows if parts == 1 else NamedSharding(mesh, PartitionSpec(None, *rows.spec))
    return jax.tree.map(lambda array: _processes.put(array, where), batch)
