"""Finds the learning rate of each recipe on held-back training data.

    python benchmarks/tune_rates.py [--data trec.jsonl] [--methods lora,full] [--seeds 100,101]
        [--rates 1e-4,2e-4] [--head-rates 1e-3,1e-2]

Trains on 10 examples of each label and validates on other *training* examples; the test set
is not looked at. One JSON line per method, seed and rates goes to standard output.
"""

import argparse
import itertools
import json

import numpy as np

from peftjax import data
from peftjax.cli._fit import Fitter, Settings, step_count
from peftjax.cli._recipes import RECIPES
from peftjax.cli._task import load_task
from peftjax.cli._terminal import progress
from peftjax.cli._watch import Watch

GRID = {
    'prompt': (3e-3, 1e-2, 3e-2, 1e-1),
    'prefix': (1e-2, 3e-2, 1e-1, 3e-1),
    'bitfit': (1e-3, 3e-3, 1e-2),
    'norms': (1e-3, 3e-3, 1e-2, 3e-2),
    'ia3': (3e-3, 1e-2, 3e-2, 1e-1),
    'lora': (1e-3, 2e-3, 4e-3),
    'dora': (1e-3, 2e-3, 4e-3),
    'adapter': (1e-3, 2e-3, 4e-3),
    'pfeiffer': (1e-3, 2e-3, 4e-3),
    'parallel': (1e-4, 3e-4, 1e-3, 3e-3),
    'full': (5e-5, 1e-4, 2e-4, 4e-4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--data', help='jsonl of labeled training text; default: the shipped set')
    parser.add_argument('--methods', default=','.join(GRID))
    parser.add_argument('--rates', help='instead of the grid')
    parser.add_argument('--head-rates', default='1e-2', help='of the classifier')
    parser.add_argument('--held', type=int, default=400, help='examples to validate on, at most')
    parser.add_argument('--seeds', default='100')
    parser.add_argument('--shots', type=int, default=10)
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--batch', type=int, default=8)
    options = parser.parse_args()
    train = data.load_labelled(options.data) if options.data else data.default_messages()[0]
    rates = tuple(map(float, options.rates.split(','))) if options.rates else ()
    head_rates = tuple(map(float, options.head_rates.split(',')))
    task = load_task('', train.names, 64)
    splits = {seed: split(train, options, seed) for seed in map(int, options.seeds.split(','))}
    tokens = {seed: [task.encode(part.texts) for part in parts] for seed, parts in splits.items()}
    longest = max(few.input_ids.shape[1] for few, _ in tokens.values())
    steps = step_count(len(splits[min(splits)][0]), Settings(options.epochs, options.batch))
    for name in options.methods.split(','):
        for rate, head_rate in itertools.product(rates or GRID[name], head_rates):
            settings = Settings(options.epochs, options.batch, rate=rate, head_rate=head_rate)
            fitter = Fitter(task, RECIPES[name], settings, longest, steps)
            for seed, (few, held) in splits.items():
                few_tokens, held_tokens = tokens[seed]
                batches = fitter.batches(few_tokens, few.labels, seed)
                watch = Watch(name, fitter.rates, progress(steps))
                fitted = fitter.fit((few_tokens, few.labels), fitter.start(seed), batches, watch)
                accuracy = fitter.accuracy(fitted.phi, held_tokens, held.labels)
                row = {'method': name, 'rate': rate, 'head_rate': head_rate, 'seed': seed}
                row |= {'epochs': options.epochs, 'batch': options.batch}
                row |= {'accuracy': round(accuracy, 2), 'data': options.data or ''}
                print(json.dumps(row), flush=True)


def split(
    train: data.Examples, options: argparse.Namespace, seed: int
) -> tuple[data.Examples, data.Examples]:
    """A few examples of each label, and others to validate on."""
    picked = data.shot_indices(train, options.shots, seed)
    rest = np.setdiff1d(np.arange(len(train)), picked)
    held = np.random.default_rng(seed).permutation(rest)[: options.held]
    return train.take(picked), train.take(held)


if __name__ == '__main__':
    main()
