"""`peftjax inspect`: a model's sites, or what an adapter folder holds."""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp

import peftjax as pj
from peftjax import models


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    folder = pathlib.Path(options.what or models.default_model_path())
    if folder.is_dir() and not (folder / 'config.json').exists():
        adapter(folder)
    else:
        model(str(folder))
    return 0


def adapter(folder: pathlib.Path) -> None:
    """Prints what an adapter folder holds."""
    loaded = pj.load(folder)
    print(loaded.peft.method)
    print(loaded.peft)
    print(json.dumps(loaded.metadata, indent=2, ensure_ascii=False))


def model(name: str) -> None:
    """Prints the sites of an encoder."""
    loaded = models.load_encoder(name)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    print(pj.sites(loaded.model.apply_fn, loaded.params, ids, attention_mask=ids))
