"""`peftjax inspect`: a model's sites, or what an adapter folder holds."""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp

import peftjax as pj
from peftjax import checkpoint, models
from peftjax.cli._run_folder import find
from peftjax.cli._terminal import say


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    what = options.what or models.default_model_path()
    folder = find(pathlib.Path(what))
    if (folder / checkpoint.ADAPTER).exists():
        _adapter(folder)
    elif folder.is_dir() and not (folder / 'config.json').exists():
        raise FileNotFoundError(
            f'{folder} is neither a model, which has a config.json, nor an adapter, which has an '
            f'{checkpoint.ADAPTER}'
        )
    else:
        _model(what)
    return 0


def _adapter(folder: pathlib.Path) -> None:
    loaded = checkpoint.load(folder)
    for keys, method in loaded.peft.method.parts:
        say(f'{"/".join(keys) or "method"}: {method}')
    say(str(loaded.peft))
    say(json.dumps(loaded.metadata, indent=2, ensure_ascii=False))


def _model(name: str) -> None:
    loaded = models.load_encoder(name)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    say(str(pj.sites(loaded.model.apply_fn, loaded.params, ids, attention_mask=ids)))
