"""`save_adapter`: a plan and its phi as a folder that PEFT or AdapterHub loads."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peftjax import _arrays, _folder, _manifest, _names, _paths
from peftjax._peft import Peft
from peftjax._types import Phi, PyTree
from peftjax._version import __version__
from peftjax.hf._config import NAME
from peftjax.hf._hub_writing import About, about_hub
from peftjax.hf._names import Naming, hugging_face_name
from peftjax.hf._stored import HUB_FILE, HUB_HEAD, HUB_HEAD_CONFIG, PEFT_FILE
from peftjax.hf._to_hub import to_hub
from peftjax.hf._to_peft import to_peft
from peftjax.hf._writing import Writing

FORMATS = ('peft', 'adapterhub')
CLASSIFIED = ('SEQ_CLS', 'TOKEN_CLS')
TASKS = (*CLASSIFIED, 'CAUSAL_LM', 'FEATURE_EXTRACTION', 'QUESTION_ANS', 'SEQ_2_SEQ_LM')
"""What PEFT calls the tasks that it knows; it loads no adapter of another."""

CLASSIFIER, CLASSIFIER_CONFIG = 'classifier.safetensors', 'classifier.json'
"""A classifier that no class of theirs has; they do not look at it."""

OURS = frozenset(
    {
        NAME,
        PEFT_FILE,
        HUB_FILE,
        HUB_HEAD,
        HUB_HEAD_CONFIG,
        CLASSIFIER,
        CLASSIFIER_CONFIG,
        _manifest.MANIFEST,
    }
)


class Content(NamedTuple):
    """What goes into a folder.

    Attributes:
      configs: by file.
      tensors: by file.
      notes: what the user should know.
    """

    configs: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, np.ndarray]]
    notes: list[str]


def save_adapter(
    directory: str | os.PathLike[str],
    peft: Peft,
    phi: Phi,
    *,
    format: str = 'peft',
    base_model: str | None = None,
    task_type: str | None = None,
    model_type: str | None = None,
    head: Mapping[str, Any] | None = None,
    params: PyTree | None = None,
    name: str | None = None,
    names: Naming = hugging_face_name,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> Path:
    """Saves a plan and its phi as an adapter of another library, whole or not at all.

    `adapter_config.json` and tensors in safetensors as Hugging Face PEFT 0.21 or AdapterHub's
    `adapters` 1.3 write them, and a manifest with their digests, which they do not look at.
    `PeftModel.from_pretrained(base, folder)` reads the one, `model.load_adapter(folder,
    use_safetensors=True)` the other.

    Args:
      directory: the folder to make, or with `name` the one to make it in.
      peft: as from `attach`; for PEFT, a prefix that is trained through a network is folded.
      phi: of it.
      format: `peft` or `adapterhub`.
      base_model: what they call `base_model_name_or_path` or `model_name`.
      task_type: one of those that PEFT knows, `CAUSAL_LM`, `SEQ_CLS`, `TOKEN_CLS`,
        `SEQ_2_SEQ_LM`, `QUESTION_ANS` or `FEATURE_EXTRACTION`; it needs one for prompts and
        prefixes.
      model_type: as in the base's `config.json`; AdapterHub needs it, since it has places of its
        own in each kind of model.
      head: of a prediction head trained as `heads/…`, what AdapterHub calls its configuration; as
        in `LoadedAdapter.head`.
      params: the base, for what stands in relation to its values: `Dora` in AdapterHub.
      name: a plain name for the folder, never a way out of `directory`. The folder's name is the
        adapter's name in AdapterHub.
      names: as of `load_adapter`.
      overwrite: whether to replace an adapter that was saved so.
      allow_nonfinite: whether NaN and Inf may be saved.

    Returns:
      The folder, as an absolute path.

    Raises:
      ValueError: the format has no counterpart, or an argument or a value of phi is refused;
        nothing was written.
      TypeError: `peft` is no plan.
      FileExistsError: there is something already.
      OSError: the disk is full or read-only; what was there before is as it was.

    Warns:
      UserWarning: not every version of the library loads what is written, or a prefix is written
        without its network.

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
    content = made(
        target,
        peft,
        phi,
        format=format,
        base_model=base_model,
        task_type=task_type,
        model_type=model_type,
        head=head,
        params=params,
        names=names,
        allow_nonfinite=allow_nonfinite,
    )
    for note in content.notes:
        warnings.warn(note, stacklevel=2)
    write(target, content, overwrite)
    return target


def made(
    target: Path,
    peft: Peft,
    phi: Phi,
    *,
    format: str,
    base_model: str | None = None,
    task_type: str | None = None,
    model_type: str | None = None,
    head: Mapping[str, Any] | None = None,
    params: PyTree | None = None,
    names: Naming = hugging_face_name,
    allow_nonfinite: bool = False,
) -> Content:
    """What `save_adapter` writes to a folder; see there."""
    if not isinstance(peft, Peft):
        raise TypeError(f'save_adapter takes a Peft, as from attach; got {peft!r:.80}')
    _check_arguments(format, task_type=task_type, model_type=model_type, head=head, params=params)
    if not allow_nonfinite:
        _arrays.check_finite(_arrays.host(phi), 'phi')
    peft._check_phi(phi)
    if format == 'peft':
        return _peft(peft, phi, names, base_model, task_type)
    return _hub(peft, phi, names, about_hub(target.name, model_type, base_model, head, params))


def _check_arguments(format: str, **given: Any) -> None:
    """Refuses another format, and arguments that one has no use for."""
    if format not in FORMATS:
        raise ValueError(f'format must be one of {", ".join(FORMATS)}; got {format!r}')
    mine = ('task_type',) if format == 'peft' else ('model_type', 'head', 'params')
    if idle := [name for name, value in given.items() if value is not None and name not in mine]:
        raise ValueError(f'format={format!r} has no use for {", ".join(idle)}. Leave it out')


def _peft(
    peft: Peft, phi: Phi, names: Naming, base_model: str | None, task_type: str | None
) -> Content:
    """PEFT's folder."""
    if task_type not in (None, *TASKS):
        raise ValueError(
            f'task_type must be one of {", ".join(TASKS)}; got {task_type!r:.80}. Nearest: '
            f'{_paths.nearest(str(task_type).upper(), TASKS, 1)[0]!r}'
        )
    export = to_peft(*peft.fold(phi), names)
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
    return Content({NAME: config}, {PEFT_FILE: export.tensors}, export.notes)


def _hub(peft: Peft, phi: Phi, names: Naming, about: About) -> Content:
    """AdapterHub's folder."""
    hub, config = to_hub(peft, phi, names, about)
    content = Content({NAME: hub.full(config)}, {HUB_FILE: hub.tensors}, hub.out.notes)
    if about.head is not None:
        content.configs[HUB_HEAD_CONFIG] = hub.full(about.head)
        content.tensors[HUB_HEAD] = hub.heads
    return content


def _check_head(task_type: str | None, export: Writing) -> None:
    """PEFT takes it for granted that a classifier is trained with its adapter."""
    if task_type not in CLASSIFIED:
        return
    saved = export.config.get('modules_to_save', [])
    heads = {path.partition('/')[0] for path in export.paths} & {'classifier', 'score'}
    if missing := sorted(heads - {name.partition('.')[0] for name in saved}):
        raise ValueError(
            f'with task_type={task_type!r} PEFT wants {missing[0]!r} trained in full beside the '
            'adapter: add pj.Trainable for it to the chain, or pass no task_type'
        )


def write(target: Path, content: Content, overwrite: bool) -> None:
    """Makes the folder, whole or not at all; see `save_adapter`."""
    from safetensors.numpy import save_file

    texts = {
        file: json.dumps(config, indent=2, sort_keys=True) + '\n'
        for file, config in content.configs.items()
    }
    arrays = {
        file: {n: np.ascontiguousarray(t, dtype=np.float32) for n, t in sorted(tensors.items())}
        for file, tensors in content.tensors.items()
    }
    size = sum(map(len, texts.values()))
    size += sum(tensor.nbytes for tensors in arrays.values() for tensor in tensors.values())
    with _folder.whole(target, ours=OURS, overwrite=overwrite, size=size) as folder:
        for file, text in texts.items():
            (folder / file).write_text(text, encoding='utf-8')
        for file, tensors in arrays.items():
            save_file(tensors, folder / file, metadata={'format': 'pt'})
        _manifest.seal(folder, f'peftjax {__version__}')
