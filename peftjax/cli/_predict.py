"""`peftjax predict`: an adapter folder applied to new text."""

import argparse
import json
from collections.abc import Sequence

import jax
import numpy as np

from peftjax.cli import _input, _saved
from peftjax.cli._task import Task, call, load_task
from peftjax.cli._terminal import say


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    loaded, about = _saved.load(options.adapter, _saved.TASK)
    texts = _input.texts(options.text, options.file, 'text to label')
    task = _task(options.model or about['model'], about['labels'], about['max_tokens'])
    loaded.check(task.params, allow_other_base=options.any_base)
    forward = loaded.peft.wrap(task.apply)
    predict = jax.jit(lambda p, phi, batch: call(task, forward, batch, None, p, phi))
    logits = task.each(lambda batch: predict(task.params, loaded.phi, batch), task.encode(texts))
    _check(texts, logits, options.adapter)
    for text, row in zip(texts, logits, strict=True):
        say(_line(text, row, task.names))
    return 0


def _task(model: str, names: list[str], max_tokens: int) -> Task:
    try:
        return load_task(model, tuple(names), max_tokens)
    except OSError as error:
        raise OSError(f'{error} {_saved.MOVED}') from error


def _check(texts: Sequence[str], logits: np.ndarray, adapter: str) -> None:
    """Refuses predictions that are no numbers.

    Raises:
      ValueError: a logit is not finite.
    """
    finite = np.isfinite(logits).all(-1)
    if not finite.all():
        text = texts[int(finite.argmin())]
        raise ValueError(
            f'what an adapter makes of a text must be finite; {adapter} makes NaN or infinity '
            f'of {text!r:.80} ({(~finite).sum()} of {len(texts)} texts). Train it anew at a lower '
            'learning rate'
        )


def _line(text: str, logits: np.ndarray, names: tuple[str, ...]) -> str:
    """One prediction as a line of JSON."""
    chances = np.exp(logits - logits.max())
    chances /= chances.sum()
    best = int(chances.argmax())
    found = {'text': text, 'label': names[best], 'probability': round(float(chances[best]), 4)}
    return json.dumps(found, ensure_ascii=False)
