"""`peftjax export`: an adapter in the format of Hugging Face PEFT or AdapterHub."""

import argparse
import dataclasses
import json
from typing import Any

import numpy as np

import peftjax as pj
from peftjax import _names, models
from peftjax.cli import _adapters, _saved
from peftjax.cli._terminal import say
from peftjax.hf import _save

HEAD, CLASSIFIER = 'head', 'classifier/'
"""The part of an encoder's chain that is its classifier, and where theta has it."""

READS = 'the mean of the last hidden states over the attention mask'
"""What the classifier of an encoder is applied to."""


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    _adapters.check_absent(options.out, options.overwrite)
    loaded = _adapters.open_adapter(options.adapter)
    about, peft, phi = loaded.metadata, loaded.peft, loaded.phi
    names, head = pj.hf.hugging_face_name, None
    if about['task'] == _saved.TASK:
        peft, phi, head = _apart(options.adapter, peft, phi)
        names = _below_family
    base = options.base_model or str(about['model'])
    if options.format == 'peft':
        said: dict[str, Any] = {'task_type': _adapters.TASKS[about['task']]}
    else:
        said = _of_base(about, peft)
    target = _names.place(options.out, None)
    content = _save.made(
        target, peft, phi, format=options.format, base_model=base, names=names, **said
    )
    if head is not None:
        content.tensors[_save.CLASSIFIER] = head
        content.configs[_save.CLASSIFIER_CONFIG] = {
            'labels': about['labels'],
            'max_tokens': about['max_tokens'],
            'reads': READS,
        }
    _save.write(target, content, options.overwrite)
    for note in content.notes:
        say(note)
    kind = content.configs['adapter_config.json'].get('peft_type', "AdapterHub's format")
    say(f'{kind} over {base or "the default model"}; written to {options.out}')
    if head is not None:
        say(f'its classifier reads {READS}, which no class of transformers does: it is in '
            f'{_save.CLASSIFIER}, beside an adapter of the encoder')  # fmt: skip
    return 0


def _apart(folder: str, peft: pj.Peft, phi: Any) -> tuple[pj.Peft, Any, dict[str, np.ndarray]]:
    """An encoder's adapter without the classifier, and the classifier as PyTorch has it.

    Raises:
      ValueError: there is nothing but a classifier.
    """
    method = peft.method
    assert isinstance(method, pj.Chain)
    kept = [i for i, (keys, _) in enumerate(method.parts) if keys[0] != HEAD]
    if not kept:
        raise ValueError(
            f'{folder} is a classifier over a frozen encoder, and adapts nothing: there is no '
            'adapter to export. peft.merge(params, phi) in Python gives its weights'
        )
    body = dataclasses.replace(
        peft,
        method=pj.chain(**{name: part for name, part in method.methods if name != HEAD}),
        sites=tuple(peft.sites[i] for i in kept),
        leaves=tuple(leaf for leaf in peft.leaves if not leaf[0].startswith(CLASSIFIER)),
        phi=tuple(array for array in peft.phi if not array[0].startswith(f'{HEAD}/')),
    )
    values = {name: np.asarray(phi[HEAD][f'{CLASSIFIER}{name}']['value'])
              for name in ('kernel', 'bias')}  # fmt: skip
    rest = {name: part for name, part in phi.items() if name != HEAD}
    return body, rest, {'weight': values['kernel'].T, 'bias': values['bias']}


def _below_family(path: str) -> str:
    """A name in the encoder itself, which lies under its family's name in a classifier."""
    return pj.hf.hugging_face_name(path).partition('.')[2]


def _of_base(about: dict[str, Any], peft: pj.Peft) -> dict[str, Any]:
    """What AdapterHub needs to know of the base."""
    if about['task'] == _saved.TASK:
        return {'model_type': peft.leaves[0][0].partition('/')[0]}
    try:
        config = models.decoder_config(str(about['model']))
    except OSError as error:
        raise OSError(f'{error} The base says which kind of model it is') from error
    said: dict[str, Any] = {'model_type': json.loads(config.source)['model_type']}
    if any(isinstance(part, pj.Dora) for _, part in peft.method.parts):
        model = str(about['model'])
        said['params'] = _adapters.load_base(model, _adapters.scans(peft, model)).params
    return said
