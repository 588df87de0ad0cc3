"""`peftjax plan`: what tuning a decoder will take, from its config.json alone."""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import peftjax as pj
from peftjax import _paths, losses, models, sharding
from peftjax.cli import _mesh
from peftjax.cli._terminal import say
from peftjax.cli.language import _recipes
from peftjax.cli.language._task import SCHEMES, check_embeddings, quantized, rounding
from peftjax.models._checkpoint import read_json
from peftjax.models._load_decoder import saved_names

RATE = 1e-4  # Any will do: it changes neither bytes nor FLOPs.
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    'adamw': lambda: optax.adamw(RATE),
    'adafactor': lambda: optax.adafactor(RATE),
    'lion': lambda: optax.lion(RATE),
    'sgd': lambda: optax.sgd(RATE),
}


class Shapes(NamedTuple):
    """A decoder, and the shapes of its parameters and of a batch of tokens, where they lie."""

    model: models.Decoder
    params: Any
    ids: jax.ShapeDtypeStruct


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    check_embeddings(options.quantize, options.embeddings)
    config = models.read_decoder_config(_fields(pathlib.Path(options.model).expanduser()))
    jax.config.update('jax_platforms', 'cpu')  # nothing is put on the devices of a plan
    shapes = _shapes(config, options, _mesh.mesh(options.mesh))
    method = _recipes.settle(options, config)
    peft = pj.attach(method, shapes.model.apply_fn, shapes.params, shapes.ids)
    say(str(peft) + '\n')
    found = pj.plan(
        peft,
        _loss(peft, shapes.model),
        shapes.params,
        shapes.ids,
        tx=OPTIMIZERS[options.optimizer](),
        tokens=options.batch * options.length,
    )
    say(str(found))
    return 0


def _fields(path: pathlib.Path) -> dict[str, Any]:
    """The content of a config.json, given as such or by its folder."""
    if not path.exists():
        raise FileNotFoundError(f'no such folder or file: {path}. A plan needs a config.json')
    return read_json(path / 'config.json' if path.is_dir() else path)


def _shapes(
    config: models.DecoderConfig, options: argparse.Namespace, mesh: jax.sharding.Mesh | None
) -> Shapes:
    dtype = jnp.dtype(options.dtype)
    compute = models.Compute(dtype=dtype, param_dtype=dtype, save=saved_names(options.remat))
    model = models.Decoder(config, compute)
    ids = jax.ShapeDtypeStruct((options.batch, options.length), jnp.int32)
    params = _params(model, options, ids)
    if mesh is None:
        return Shapes(model, params, ids)
    rows = _mesh.rows_of(mesh)
    if options.batch % rows:
        raise ValueError(f'the batch must be a multiple of {rows}, as its rows are dealt out over '
                         f'so many devices; got {options.batch}')  # fmt: skip
    where = models.decoder_sharding(config, mesh)
    placed = {path: _at(leaf, where(path)) for path, leaf in _paths.leaves(params).items()}
    ids = _at(ids, sharding.batch_sharding(mesh))
    return Shapes(model, _paths.replace(params, placed), ids)


def _params(model: models.Decoder, options: argparse.Namespace, ids: Any) -> Any:
    """The shapes of theta; of a quantized folder those that it holds.

    Raises:
      ValueError: what is quantized is to be quantized.
    """
    folder = pathlib.Path(options.model).expanduser()
    if folder.is_dir() and models.is_quantized(folder):
        rounding(str(folder), options.quantize, options.embeddings)
        return models.abstract_decoder(str(folder), dtype=options.dtype).params
    params = jax.eval_shape(model.init, jax.random.key(0), ids)['params']
    if options.quantize is None:
        return params
    target = quantized(model.config, options.embeddings)
    return pj.quantize(params, SCHEMES[options.quantize], target=target)


def _at(leaf: Any, where: Any) -> Any:
    """A shape that lies somewhere; of a quantized leaf, its codes and scales."""
    if not isinstance(leaf, pj.Quantized):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.tree.map(_at, leaf, leaf.shardings(where))


def _loss(peft: pj.Peft, model: models.Decoder) -> Any:
    """The next-token loss on all tokens, fused with the head."""

    def mean(params: Any, input_ids: jax.Array, *, labels: jax.Array) -> jax.Array:
        hidden = model.apply_fn(params, input_ids, method='hidden')
        weight, soft_cap = model.head_weight(params)
        targets = losses.next_tokens(labels)
        return losses.next_token_loss(hidden, weight, targets, soft_cap=soft_cap).mean

    forward = peft.wrap(mean)

    def loss_fn(params: Any, phi: Any, ids: jax.Array, key: jax.Array) -> jax.Array:
        return forward(params, phi, ids, labels=ids, dropout_key=key)

    return loss_fn
