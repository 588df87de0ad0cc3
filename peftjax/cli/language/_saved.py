"""The folder of a run on a language model, and the adapter in it."""

import argparse
import dataclasses
import pathlib
from typing import Any

import peftjax as pj
from peftjax import models
from peftjax.cli import _run_folder, _saved
from peftjax.cli._saved import LANGUAGE
from peftjax.cli.language._fit import Fitted, Settings
from peftjax.cli.language._recipes import Recipe
from peftjax.cli.language._task import Task


def save(
    out: pathlib.Path,
    task: Task,
    peft: pj.Peft,
    fitted: Fitted,
    recipe: Recipe,
    settings: Settings,
    seed: int,
) -> pathlib.Path:
    """Writes the adapter into the folder of the run, whole or not at all; returns where.

    One of an earlier run is replaced.
    """
    metadata = {
        'task': LANGUAGE,
        'model': _saved.lasting(task.model),
        'max_tokens': settings.length,
        'method': recipe.name,
        'seed': seed,
        'settings': dataclasses.asdict(settings),
    }
    where = out / _run_folder.ADAPTER
    how = {'params': task.params, 'metadata': metadata, 'overwrite': True}
    return pj.save(where, peft, fitted.phi, **how)


def load(options: argparse.Namespace, adapter: str) -> tuple[pj.Loaded, dict[str, Any]]:
    """Reads an adapter; what the options leave open of its base is as it was trained.

    Args:
      options: as parsed; changed.
      adapter: the folder of a run or of an adapter.

    Returns:
      The adapter, and what is known of its task.

    Raises:
      ValueError: an adapter of something else.
    """
    loaded, about = _saved.load(adapter, LANGUAGE)
    options.model = options.model or about['model']
    options.dtype = options.dtype or about.get('settings', {}).get('dtype', 'float32')
    scheme, embeddings = rounding(about, options.model)
    options.quantize = options.quantize or scheme
    options.embeddings = embeddings if options.embeddings is None else options.embeddings
    return loaded, about


def rounding(about: dict[str, Any], model: str) -> tuple[str | None, bool]:
    """How the base of an adapter was quantized while it was loaded: scheme, and embeddings too.

    Args:
      about: what is known of the adapter's task.
      model: folder or hub name of the base; one that is quantized already is taken as it is.
    """
    settings = about.get('settings', {})
    scheme = settings.get('quantize')
    if scheme is None or models.is_quantized(model):
        return None, False
    return scheme, settings.get('embeddings', False)
