"""`peftjax generate`: prompts continued by a language model, with an adapter or without."""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import peftjax as pj
from peftjax import data, models
from peftjax.cli import _adapters, _input, _saved
from peftjax.cli._opened import alike, is_adapter
from peftjax.cli._terminal import say
from peftjax.cli.language import _task
from peftjax.cli.language._saved import load

MULTIPLE = 16
"""Prompts are padded to a multiple of this: few programs serve all."""


@dataclasses.dataclass(frozen=True)
class Alone:
    """The forward of a decoder with no method; one of the same decoder is the same."""

    decoder: models.Decoder

    def __call__(self, params: Any, phi: Any, *args: Any, **kwargs: Any) -> Any:
        """The decoder, its parameters quantized or not."""
        del phi
        return pj.quantized_apply(self.decoder.apply_fn)(params, *args, **kwargs)


class Model(NamedTuple):
    """What generates.

    Attributes:
      task: the model.
      forward: under the method.
      phi: of the method.
      virtual: how many virtual tokens it puts in front.
    """

    task: _task.Task
    forward: Callable[..., Any]
    phi: Any
    virtual: int


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    adapter, words = _words(options)
    sampling = _sampling(options)
    texts = _input.texts(words, options.file, 'prompt to continue')
    model = _model(options, adapter)
    prompts = [data.encode_prompt(model.task.tokenizer, text, chat=options.chat) for text in texts]
    _check_room(model, max(map(len, prompts)), options)
    for text, ids in zip(texts, _continued(model, prompts, sampling, options), strict=True):
        said = model.task.tokenizer.decode(ids, skip_special_tokens=True)
        line = {'prompt': text, 'completion': said, 'tokens': len(ids)}
        say(said if options.plain else json.dumps(line, ensure_ascii=False))
    return 0


def _words(options: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The adapter, and the prompts; with a model the first word may be a prompt already.

    Raises:
      FileNotFoundError: an adapter is meant that is not there.
      ValueError: neither an adapter nor a model.
    """
    first, rest = options.adapter, list(options.prompt)
    if first is None and not options.model:
        raise ValueError('name the folder of an adapter, or a model with --model')
    if first is None:
        return None, rest
    folder = pathlib.Path(first).expanduser()
    if folder.is_dir():
        if (folder / 'config.json').exists() and not is_adapter(folder):
            raise ValueError(f'{first} is a model, not an adapter: name it with --model')
        return first, rest
    if not options.model:
        raise FileNotFoundError(
            f'no such adapter folder: {first!r:.80}.{alike(folder)} Name the folder of an adapter '
            'before the prompts, or a model with --model'
        )
    if not any(map(str.isspace, first)) and (os.sep in first or alike(folder)):
        raise FileNotFoundError(
            f'no such adapter folder: {first!r:.80}.{alike(folder)} A prompt that reads like a '
            'folder goes through --file or standard input'
        )
    if rest and not any(map(str.isspace, first)):
        print(f'no adapter is named {first!r}: it is taken as a prompt', file=sys.stderr)
    return None, [first, *rest]


def _sampling(options: argparse.Namespace) -> pj.Sampling | None:
    """How tokens are drawn; the likeliest where no option asks for more."""
    cut = options.top_k is not None or options.top_p is not None
    if options.temperature == 0 and cut:
        raise ValueError('--temperature 0 takes the likeliest token: leave --top-k and --top-p out')
    if not options.temperature and not cut:
        return None
    return pj.Sampling(
        temperature=1.0 if options.temperature is None else options.temperature,
        top_k=options.top_k,
        top_p=1.0 if options.top_p is None else options.top_p,
    )


def _model(options: argparse.Namespace, adapter: str | None) -> Model:
    """Loads what the options name.

    Raises:
      OSError: the base is not where it was.
      ValueError: an adapter of something else, or trained on another base.
    """
    if adapter is None:
        task = _load(options, True)
        return Model(task, Alone(task.decoder), {}, 0)
    loaded, _ = load(options, adapter)
    try:
        task = _load(options, _adapters.scans(loaded.peft, options.model))
    except OSError as error:
        raise OSError(f'{error} {_saved.MOVED}') from error
    loaded.check(task.params, allow_other_base=options.any_base)
    rooms = [part.virtual for _, part in loaded.peft.method.parts if part.virtual is not None]
    forward = loaded.peft.wrap(task.decoder.apply_fn)
    return Model(task, forward, loaded.phi, sum(room.length for room in rooms))


def _load(options: argparse.Namespace, scan_layers: bool) -> _task.Task:
    dtype, embeddings = options.dtype or 'float32', bool(options.embeddings)
    return _task.load(options.model, dtype, options.quantize, embeddings, scan_layers=scan_layers)


def _check_room(model: Model, longest: int, options: argparse.Namespace) -> None:
    """Refuses what would go beyond learned positions.

    Raises:
      ValueError: it would.
    """
    most, whole = model.task.config.positions, longest + model.virtual + options.max_tokens
    if most and whole > most:
        raise ValueError(
            f'the model has {most} positions; a prompt of {longest} tokens, {model.virtual} '
            f'virtual ones and --max-tokens {options.max_tokens} need {whole}. Lower --max-tokens'
        )


def _continued(
    model: Model,
    prompts: list[np.ndarray],
    sampling: pj.Sampling | None,
    options: argparse.Namespace,
) -> Iterator[np.ndarray]:
    """What follows each prompt, without the token that ended it."""
    task, size = model.task, min(options.batch, len(prompts))
    width = -(-max(map(len, prompts)) // MULTIPLE) * MULTIPLE
    key = jax.random.key(options.seed)
    for begin in range(0, len(prompts), size):
        some = prompts[begin : begin + size]
        ids, mask = _left(some + some[:1] * (size - len(some)), width, task.pad_id)
        out = pj.generate(
            model.forward, task.params, model.phi, ids, mask,
            init_cache=task.decoder.init_cache, length=options.max_tokens, sampling=sampling,
            key=None if sampling is None else jax.random.fold_in(key, begin),
            stop=task.stop, pad_id=task.pad_id,
        )  # fmt: skip
        for row in range(len(some)):
            kept = np.asarray(out.tokens[row, : int(out.lengths[row])])
            yield kept[:-1] if len(kept) and int(kept[-1]) in task.stop else kept


def _left(prompts: list[np.ndarray], width: int, pad_id: int) -> tuple[jax.Array, jax.Array]:
    """Prompts of one width, padding in front, and where they are."""
    ids = np.full((len(prompts), width), pad_id, np.int32)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return jnp.asarray(ids), jnp.asarray(mask)
