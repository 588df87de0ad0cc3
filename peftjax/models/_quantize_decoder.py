"""From a Hugging Face folder to one with quantized weights, a layer at a time."""

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import _folder, _paths
from peftjax._quantized import Quantized, Scheme
from peftjax._types import Target
from peftjax.models import _quantized_folder
from peftjax.models._checkpoint import Checkpoint, read_json
from peftjax.models._decoder import Decoder
from peftjax.models._families import read_decoder_config
from peftjax.models._fill import Plan, as_stored, match, part
from peftjax.models._hub import model_folder
from peftjax.models._linears import linears
from peftjax.models._load_decoder import decoder_naming, decoder_shapes, refuse_quantized
from peftjax.models._rounding import rounded
from peftjax.models._tokenizer import copy_tokenizer


class QuantizedFolder(NamedTuple):
    """What `quantize_decoder` wrote.

    Attributes:
      folder: where.
      before: bytes of all parameters as they are stored in the checkpoint.
      sizes: bytes of each parameter as it is now, by path.
      errors: for each quantized path the norm of what rounding changed over that of the weight.
    """

    folder: pathlib.Path
    before: int
    sizes: Mapping[str, int]
    errors: Mapping[str, float]

    @property
    def after(self) -> int:
        """Bytes of all parameters as they are now."""
        return sum(self.sizes.values())


def quantize_decoder(
    path_or_hub_name: str,
    folder: str | os.PathLike[str],
    scheme: Scheme,
    *,
    target: Target | None = None,
    shard_bytes: int = 5 * 10**9,
) -> QuantizedFolder:
    """Writes a decoder with quantized weights, which `load_decoder` reads as such.

    A stack of layers is read, rounded and let go one layer at a time. Parameters that are not
    quantized keep the dtype that they are stored in, whatever config.json says of it. The folder is
    whole or absent.

    Args:
      path_or_hub_name: as of `load_decoder`.
      folder: to make.
      scheme: such as `pj.NF4`.
      target: regex, or several, searched in the paths of parameters; None is all linear layers
        (`linears`), and neither embedding nor head (`embeddings`).
      shard_bytes: about how many bytes a file holds.

    Returns:
      The folder, bytes before and of each parameter after, and the errors.

    Raises:
      FileNotFoundError: no such model.
      FileExistsError: there is something at `folder` already.
      ValueError: as of `load_decoder`, a model that is quantized already, or a pattern that finds
        nothing.
      OSError: the folder cannot be written.

    Example:
      >>> made = quantize_decoder('llama', 'llama-nf4', pj.NF4)  # doctest: +SKIP
      >>> llama = load_decoder('llama-nf4')  # doctest: +SKIP
      >>> forward = pj.quantized_apply(llama.model.apply_fn)  # doctest: +SKIP

    Reference: Dettmers et al. 2023, QLoRA, arXiv:2305.14314.
    """
    out = pathlib.Path(folder)
    if os.path.lexists(out):
        raise FileExistsError(f'there is something at {out} already. Choose another folder.')
    source = model_folder(path_or_hub_name)
    refuse_quantized(source)
    config = read_decoder_config(read_json(source / 'config.json'))
    shapes = decoder_shapes(Decoder(config))
    plan = match(shapes, Checkpoint(source), decoder_naming(config))
    shapes = as_stored(shapes, plan)
    chosen = _paths.selected(linears(config) if target is None else target, shapes)
    small = {path: scheme.quantize(shape, path) if path in chosen else shape
             for path, shape in shapes.items()}  # fmt: skip
    sizes = {path: sum(map(_nbytes, jax.tree.leaves(leaf))) for path, leaf in small.items()}
    errors: dict[str, float] = {}
    made = QuantizedFolder(out, sum(map(_nbytes, shapes.values())), sizes, errors)
    leaves = ((path, _leaf(plan, path, shape, scheme if path in chosen else None, errors))
              for path, shape in shapes.items())  # fmt: skip
    with _folder.whole(out, ours=frozenset(), overwrite=False, size=made.after) as fresh:
        _quantized_folder.write(fresh, leaves, shard_bytes)
        (fresh / 'config.json').write_bytes((source / 'config.json').read_bytes())
        copy_tokenizer(source, fresh)
        _quantized_folder.seal(fresh)
    return made


def _leaf(
    plan: Plan,
    path: str,
    shape: jax.ShapeDtypeStruct,
    scheme: Scheme | None,
    errors: dict[str, float],
) -> Any:
    """A parameter as it is stored; of a quantized one the error is noted."""
    if scheme is None:
        return part(plan, path, tuple(slice(0, size) for size in shape.shape), shape.dtype)
    sums = np.zeros(2)

    def add(w: np.ndarray, leaf: Quantized) -> None:
        sums[:] += np.asarray(_squares(w, leaf), np.float64)

    made = rounded(plan, path, shape, scheme, add)
    off, norm = sums
    errors[path] = float(np.sqrt(off / norm)) if norm else 0.0
    return made


@jax.jit
def _squares(w: jax.Array, leaf: Quantized) -> jax.Array:
    """The sums of squares of the error of a part and of itself."""
    exact = w.astype(jnp.float32)
    off = leaf.dequantize().astype(jnp.float32) - exact
    return jnp.stack([jnp.square(off).sum(), jnp.square(exact).sum()])


def _nbytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
