"""`peftjax predict`: an adapter folder applied to new text."""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator

import jax
import numpy as np

import peftjax as pj
from peftjax import data
from peftjax.cli._fit import EVALUATE
from peftjax.cli._task import call, load_task


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    loaded = pj.load(options.adapter)
    about = loaded.metadata
    if about.get('task') != 'classification':
        raise ValueError(f'{options.adapter} was not made by peftjax tune or compare: {about!r}')
    model = options.model or about['model']
    task = load_task(model, tuple(about['labels']), about['max_tokens'])
    loaded.check(task.params, allow_other_base=options.any_base)
    texts = tuple(read(options))
    tokens = task.encode(texts)
    forward = loaded.peft.wrap(task.apply)
    predict = jax.jit(lambda p, phi, batch: call(task, forward, batch, None, p, phi))
    none = np.zeros(len(texts), np.int32)
    for index in data.in_order(len(texts), EVALUATE):
        batch = task.batch(tokens, none, index, EVALUATE)
        logits = np.asarray(predict(task.params, loaded.phi, batch))[: len(index)]
        for i, row in zip(index, logits, strict=True):
            print(line(texts[i], row, task.names), flush=True)
    return 0


def line(text: str, logits: np.ndarray, names: tuple[str, ...]) -> str:
    """One prediction as a line of JSON."""
    chances = np.exp(logits - logits.max())
    chances /= chances.sum()
    best = int(chances.argmax())
    found = {'text': text, 'label': names[best], 'probability': round(float(chances[best]), 4)}
    return json.dumps(found, ensure_ascii=False)


def read(options: argparse.Namespace) -> Iterator[str]:
    """The texts: from the command line, a file with one a line, or standard input."""
    if options.text:
        yield from options.text
        return
    if options.file:
        lines = pathlib.Path(options.file).read_text(encoding='utf-8').splitlines()
    else:
        lines = sys.stdin.read().splitlines()
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise ValueError('there is no text to label: give texts, --file, or standard input')
    yield from texts
