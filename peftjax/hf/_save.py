"""`save_adapter`: a plan and its phi as a folder that Hugging Face PEFT loads."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from peftjax import _arrays, _folder, _manifest, _names
from peftjax._peft import Peft
from peftjax._types import Phi
from peftjax._version import __version__
from peftjax.hf._config import NAME
from peftjax.hf._names import Naming, hugging_face_name
from peftjax.hf._stored import PEFT_FILE
from peftjax.hf._to_peft import to_peft
from peftjax.hf._writing import Writing

OURS = frozenset({NAME, PEFT_FILE, _manifest.MANIFEST})


def save_adapter(
    directory: str | os.PathLike[str],
    peft: Peft,
    phi: Phi,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    name: str | None = None,
    names: Naming = hugging_face_name,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> Path:
    """Saves a plan and its phi as an adapter of Hugging Face PEFT, whole or not at all.

    `adapter_config.json` and `adapter_model.safetensors`, as PEFT 0.21 writes them, and a manifest
    with their digests, which PEFT does not look at.

    Args:
      directory: the folder to make, or with `name` the one to make it in.
      peft: as from `attach`; a prefix that is trained through a network is folded.
      phi: of it.
      base_model: what PEFT calls `base_model_name_or_path`.
      task_type: `CAUSAL_LM`, `SEQ_CLS`, …; PEFT needs it for prompts and prefixes.
      name: a plain name for the folder, never a way out of `directory`.
      names: as of `load_adapter`.
      overwrite: whether to replace an adapter that was saved so.
      allow_nonfinite: whether NaN and Inf may be saved.

    Returns:
      The folder, as an absolute path.

    Raises:
      ValueError: PEFT has no counterpart, or `name` or a value of phi is refused; nothing was
        written.
      TypeError: `peft` is no plan.
      FileExistsError: there is something already.
      OSError: the disk is full or read-only; what was there before is as it was.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj, tempfile
      >>> params = {'up': {'kernel': jnp.ones((3, 4))}}
      >>> model = lambda p, x: x @ p['up']['kernel']
      >>> peft = pj.attach(pj.Lora(rank=2, target='up'), model, params, jnp.ones((5, 3)))
      >>> phi = peft.init(jax.random.key(0), params)
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     folder = pj.hf.save_adapter(directory, peft, phi, name='tiny')
      ...     loaded = pj.hf.load_adapter(folder, model, params, jnp.ones((5, 3)))
      >>> loaded.kind, bool((loaded.phi['up/kernel']['a'] == phi['up/kernel']['a']).all())
      ('LORA', True)
    """
    target = _names.place(directory, name)
    if not isinstance(peft, Peft):
        raise TypeError(f'save_adapter takes a Peft, as from attach; got {peft!r:.80}')
    peft, phi = peft.fold(phi)
    arrays = _arrays.host(phi)
    if not allow_nonfinite:
        _arrays.check_finite(arrays, 'phi')
    export = to_peft(peft, phi, names)
    prompted = export.config['peft_type'] in ('PROMPT_TUNING', 'PREFIX_TUNING')
    if prompted and task_type is None:
        raise ValueError(
            "PEFT needs the task of virtual tokens: task_type='CAUSAL_LM', for example"
        )
    _check_head(task_type, export)
    config = {
        'base_model_name_or_path': base_model,
        'task_type': task_type,
        'inference_mode': True,
        **export.config,
    }
    for note in export.notes:
        warnings.warn(note, stacklevel=2)
    _write(target, config, export.tensors, overwrite)
    return target


def _check_head(task_type: str | None, export: Writing) -> None:
    """PEFT takes it for granted that a classifier is trained with its adapter."""
    if task_type not in ('SEQ_CLS', 'TOKEN_CLS'):
        return
    saved = export.config.get('modules_to_save', [])
    heads = {path.partition('/')[0] for path in export.paths} & {'classifier', 'score'}
    if missing := sorted(heads - {name.partition('.')[0] for name in saved}):
        raise ValueError(
            f'with task_type={task_type!r} PEFT wants {missing[0]!r} trained in full beside the '
            'adapter: add pj.Trainable for it to the chain, or pass no task_type'
        )


def _write(
    target: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], overwrite: bool
) -> None:
    from safetensors.numpy import save_file

    text = json.dumps(config, indent=2, sort_keys=True) + '\n'
    tensors = {n: np.ascontiguousarray(t, dtype=np.float32) for n, t in sorted(tensors.items())}
    size = len(text) + sum(tensor.nbytes for tensor in tensors.values())
    with _folder.whole(target, ours=OURS, overwrite=overwrite, size=size) as folder:
        (folder / NAME).write_text(text, encoding='utf-8')
        save_file(tensors, folder / PEFT_FILE, metadata={'format': 'pt'})
        _manifest.seal(folder, f'peftjax {__version__}')
