"""`peftjax merge`: an adapter folded into its decoder, as a Hugging Face folder."""

import argparse
from typing import Any

import jax
import jax.numpy as jnp

import peftjax as pj
from peftjax import _paths, models
from peftjax.cli import _adapters, _saved
from peftjax.cli._terminal import say
from peftjax.cli.language import _task
from peftjax.cli.language._saved import rounding


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    _adapters.check_absent(options.out)
    loaded = _adapters.open_adapter(options.adapter)
    if loaded.metadata['task'] != _saved.LANGUAGE:
        raise ValueError(
            f'{options.adapter} classifies by the mean of the tokens, which no model of '
            'transformers does; only adapters of decoders are merged into a folder. Use '
            'peft.merge(params, phi) in Python'
        )
    _check(loaded.peft, loaded.phi)
    folder = options.model or loaded.metadata['model']
    stored = _stored_dtype(folder)
    dtype = jnp.dtype(options.dtype or stored)
    # Read in fewer bits than it is written in, or the reverse, a weight is rounded twice.
    config, params = _base(loaded, folder, jnp.promote_types(stored, dtype), options)
    merged = jax.tree.map(lambda leaf: leaf.astype(dtype), loaded.peft.merge(params, loaded.phi))
    models.save_decoder(options.out, config, merged, tokenizer_of=models.model_folder(folder))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(merged))
    say(f'{loaded.metadata.get("method", "adapter")} merged into {folder}, {dtype.name}, '
        f'{size:,} bytes of weights; written to {options.out}')  # fmt: skip
    return 0


def _check(peft: pj.Peft, phi: object) -> None:
    """Refuses a method that does not merge before any weights are read."""
    shapes = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape, dtype in peft.leaves}
    jax.eval_shape(peft.merge, shapes, phi)


def _base(
    loaded: pj.Loaded, folder: str, dtype: jnp.dtype, options: argparse.Namespace
) -> tuple[models.DecoderConfig, Any]:
    """The decoder that was adapted, with ordinary weights of a dtype, or of the rounded ones'."""
    scheme, embeddings = (None, False) if options.any_base else rounding(loaded.metadata, folder)
    read = dtype if scheme is None else loaded.metadata['settings'].get('dtype', dtype)
    how = _task.rounding(folder, scheme, embeddings)
    scans = _adapters.scans(loaded.peft, folder)
    base = models.load_decoder(folder, dtype=read, scan_layers=scans, **how)
    params: Any = base.params
    loaded.check(params, allow_other_base=options.any_base)
    quantized = any(isinstance(leaf, pj.Quantized) for leaf in _paths.leaves(params).values())
    if quantized and not options.dequantize:
        raise ValueError(
            f'{options.adapter} was trained over quantized weights, and a merged weight is an '
            'ordinary one. Merge into the rounded weights with --dequantize, or into those that '
            'they were made of with --any-base (and --model, where these are elsewhere)'
        )
    return base.config, pj.dequantize(params)


def _stored_dtype(folder: str) -> jnp.dtype:
    try:
        return _adapters.stored_dtype(folder)
    except OSError as error:
        raise OSError(f'{error} {_saved.MOVED}') from error
