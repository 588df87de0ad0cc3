"""`peftjax compare`: which way of adapting this model is best on these examples?"""

import argparse
import dataclasses
import pathlib
import time
from typing import Any

import numpy as np

import peftjax as pj
from peftjax import data
from peftjax.cli import _report
from peftjax.cli._fit import Fitted, Fitter, Settings, step_count
from peftjax.cli._recipes import Recipe, chosen
from peftjax.cli._task import Task, load_task


@dataclasses.dataclass(frozen=True)
class Sample:
    """The examples of one seed."""

    seed: int
    tokens: data.Tokens
    labels: np.ndarray


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    recipes = chosen(options.methods)
    settings = Settings(epochs=options.epochs, batch=options.batch)
    train, test = read(options)
    out = new_folder(options.out, options.overwrite)
    task = load_task(options.model, train.names, options.max_tokens)
    samples = draw(task, train, options.shots, options.seeds)
    say(
        f'{len(train.names)} labels, {options.shots} examples of each, seeds {options.seeds}; '
        f'{len(test)} test messages; {count(task):,} parameters'
    )
    tokens, records = task.encode(test.texts), []
    total = sum(1 if r.probe else step_count(len(samples[0].labels), settings) for r in recipes)
    with progress(total * len(samples)) as bar:
        for recipe in recipes:
            bar.set_description(recipe.name)
            records.append(one(task, recipe, settings, samples, tokens, test.labels, out, bar))
            bar.write(_report.row(records[-1])[0].ljust(10) + _report.row(records[-1])[-1])
    text = _report.table(records)
    say('\n' + text)
    _report.write_json(out / 'results.json', {'options': options_of(options), 'methods': records})
    title = f'{options.shots} examples a label, {len(samples)} seeds'
    _report.picture(out / 'accuracy.png', records, title)
    (out / 'table.txt').write_text(text + '\n', encoding='utf-8')
    say(f'\nwritten to {out}: results.json, accuracy.png, table.txt, adapters/')
    return 0


def one(
    task: Task,
    recipe: Recipe,
    settings: Settings,
    samples: list[Sample],
    tokens: data.Tokens,
    labels: np.ndarray,
    out: pathlib.Path,
    bar: Any,
) -> dict[str, Any]:
    """One method over all seeds."""
    length = samples[0].tokens.input_ids.shape[1]
    steps = step_count(len(samples[0].labels), settings)
    fitter = Fitter(task, recipe, settings, length, steps)
    fits, accuracies, sizes = [], [], []
    for sample in samples:
        fitted = fitter.fit(sample.tokens, sample.labels, sample.seed, bar.update)
        began = time.perf_counter()
        right = fitter.logits(fitted.phi, tokens).argmax(-1) == labels
        accuracies.append(float(right.mean()))
        folder = out / 'adapters' / f'{recipe.name}-seed{sample.seed}'
        metadata = describe(task, recipe, settings, sample.seed)
        save(folder, fitted, task, metadata)
        sizes.append(sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()))
        fits.append((fitted, time.perf_counter() - began))
    return record(recipe, task, [fitted for fitted, _ in fits], accuracies, sizes)


def record(
    recipe: Recipe,
    task: Task,
    fits: list[Fitted],
    accuracies: list[float],
    sizes: list[int],
) -> dict[str, Any]:
    """What the table, the picture and the JSON file say of one method."""
    mean, spread = _report.summary(accuracies)
    trained = fits[0].peft.count()
    return {
        'method': recipe.name,
        'about': recipe.about,
        'learning_rate': recipe.rate or None,
        'trained_parameters': trained,
        'trained_percent': 100 * trained / count(task),
        'bytes_on_disk': int(np.mean(sizes)),
        'train_seconds': float(np.mean([fit.seconds for fit in fits])),
        'compile_seconds': max(fit.compile_seconds for fit in fits),
        'steps': fits[0].steps,
        'peak_bytes': max(fit.peak_bytes for fit in fits),
        'accuracy': [100 * a for a in accuracies],
        'accuracy_mean': mean,
        'accuracy_sd': spread,
    }


def save(folder: pathlib.Path, fitted: Fitted, task: Task, metadata: dict[str, Any]) -> None:
    """Writes an adapter folder."""
    pj.save(folder, fitted.peft, fitted.phi, params=task.params, metadata=metadata)


def describe(task: Task, recipe: Recipe, settings: Settings, seed: int) -> dict[str, Any]:
    """What `peftjax predict` needs beside phi, and how phi was made."""
    return {
        'task': 'classification',
        'model': task.model,
        'labels': list(task.names),
        'max_tokens': task.max_tokens,
        'method': recipe.name,
        'seed': seed,
        'settings': dataclasses.asdict(settings),
    }


def read(options: argparse.Namespace) -> tuple[data.Examples, data.Examples]:
    """The training and test examples."""
    if not options.train and not options.test:
        return data.default_messages()
    if not options.train or not options.test:
        missing = '--test' if options.train else '--train'
        raise ValueError(f'--train and --test go together; {missing} is missing')
    columns = {'text': options.text_column, 'label': options.label_column}
    train = data.load_labelled(options.train, **columns)
    return train, data.load_labelled(options.test, names=train.names, **columns)


def draw(task: Task, train: data.Examples, shots: int, seeds: list[int]) -> list[Sample]:
    """The examples of each seed, their tokens padded to one length."""
    few = [data.few_shot(train, shots, seed) for seed in seeds]
    everything = task.encode(tuple(text for examples in few for text in examples.texts))
    samples, begin = [], 0
    for seed, examples in zip(seeds, few, strict=True):
        rows = slice(begin, begin + len(examples))
        tokens = data.Tokens(everything.input_ids[rows], everything.attention_mask[rows])
        samples.append(Sample(seed, tokens, examples.labels))
        begin += len(examples)
    return samples


def new_folder(path: str, overwrite: bool) -> pathlib.Path:
    """A folder for results, refused where there is one with content."""
    out = pathlib.Path(path)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f'--out must be a folder; {out} is a file')
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(
            f'{out} exists and is not empty. Choose another --out, or --overwrite'
        )
    (out / 'adapters').mkdir(parents=True, exist_ok=True)
    return out


def options_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options of the run, as JSON."""
    return {name: value for name, value in vars(options).items() if name != 'run'}


def count(task: Task) -> int:
    """The number of parameters of the model."""
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(task.params))


def progress(total: int) -> Any:
    """A progress bar on a terminal; elsewhere only the lines that are written."""
    from tqdm import tqdm

    return tqdm(total=total, unit='step', dynamic_ncols=True, disable=None, leave=False)


def say(text: str) -> None:
    """Prints at once."""
    print(text, flush=True)
