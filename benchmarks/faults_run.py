"""A small training that `faults.py` kills; as a program it runs in a folder and goes on there.

    python benchmarks/faults_run.py FOLDER '{"steps": 60, "every": 5}'

It says `ready STEP` before its first step and `ended` with a digest of its last state.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import peftjax as pj
from peftjax import data, losses
from peftjax.cli._metrics import Metrics

VOCABULARY, LENGTH = 20, 4


@dataclasses.dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
      steps: in all.
      every: steps between checkpoints.
      pause: seconds that a step takes at least.
      waited: whether each checkpoint is waited for; else it is written beside the next steps.
      width: of the model.
      rank: of LoRA; phi is `2 * width * rank` numbers.
      examples: in batches of two.
      accumulate: parts of a batch.
      hold: steps whose updates one optimizer step takes together (`optax.MultiSteps`).
    """

    steps: int = 60
    every: int = 5
    pause: float = 0.0
    waited: bool = False
    width: int = 8
    rank: int = 2
    examples: int = 7
    accumulate: int = 1
    hold: int = 1

    @functools.cached_property
    def params(self) -> dict[str, jax.Array]:
        """Theta, small numbers that no seed draws."""
        shapes = {'embed': (VOCABULARY, self.width), 'kernel': (self.width, self.width)}
        shapes['head'] = (self.width, VOCABULARY)
        draw = np.random.default_rng(0)
        make = lambda shape: jnp.asarray(draw.normal(size=shape) / self.width**0.5, jnp.float32)
        return {name: make(shape) for name, shape in shapes.items()}

    @functools.cached_property
    def peft(self) -> pj.Peft:
        """LoRA on the kernel."""
        method = pj.Lora(rank=self.rank, target='^kernel$')
        return pj.attach(method, model, self.params, jnp.zeros((2, LENGTH), jnp.int32))

    @functools.cached_property
    def tx(self) -> Any:
        """AdamW with a rate of its own at each step."""
        tx = optax.adamw(optax.linear_schedule(0.03, 0.001, self.steps))
        return optax.MultiSteps(tx, self.hold) if self.hold > 1 else tx

    @functools.cached_property
    def step(self) -> pj.train.Step:
        """With noise from the state's key, as dropout draws it."""
        return pj.train_step(self.loss, self.tx, accumulate=self.accumulate)

    def loss(self, params: Any, phi: Any, batch: data.LanguageBatch, key: Any) -> Any:
        """A mean over tokens that are not padding."""
        logits = self.peft.wrap(model)(params, phi, batch.input_ids)
        logits = logits + 0.1 * jax.random.normal(key, logits.shape)
        targets = jnp.maximum(batch.targets, 0)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        learned = batch.targets >= 0
        return losses.Loss((each * learned).sum(), learned.sum().astype(jnp.float32))

    def fresh(self) -> pj.TrainState:
        """The state before the first step."""
        phi = self.peft.init(jax.random.key(0), self.params)
        return pj.start(self.tx, phi, jax.random.key(1))

    def rows(self) -> data.Rows:
        """One example a row."""
        learned = np.ones(LENGTH, bool)
        ids = [np.arange(i, i + LENGTH, dtype=np.int32) % VOCABULARY for i in range(self.examples)]
        return data.one_per_row([data.Sample(one, learned) for one in ids], LENGTH)

    def stream(self, size: int = 2, seed: int | None = 0) -> Any:
        """Shuffled anew in every epoch, whose last batch is not full."""
        rows = self.rows()
        epochs = -(-self.steps // -(-len(rows) // size))
        batches = data.Batches(rows, size, seed=seed, epochs=epochs)
        return batches if self.accumulate == 1 else Parted(batches, self.accumulate)

    def checkpoints(self, folder: pathlib.Path, **options: Any) -> pj.Checkpoints:
        """In a folder."""
        kind = Waited if self.waited else pj.Checkpoints
        return kind(folder, self.peft, self.params, **{'settings': {'seed': 0}, **options})


def model(params: Any, ids: Any) -> Any:
    """A layer over an embedding."""
    x = jnp.take(params['embed'], ids, axis=0, mode='clip')
    return (x + jnp.tanh(x @ params['kernel'])) @ params['head']


class Waited(pj.Checkpoints):
    """Checkpoints that are on disk before the next step begins."""

    def save(self, state: pj.TrainState, data: Any = None, **how: Any) -> None:
        """Writes a state."""
        super().save(state, data, **how)
        self.wait()


class Parted:
    """Batches in parts, `(parts, rows, length)`."""

    def __init__(self, batches: data.Batches, parts: int):
        self._batches, self._parts = batches, parts
        self.state, self.restore = batches.state, batches.restore

    def __iter__(self) -> 'Parted':
        return self

    def __next__(self) -> Any:
        cut = lambda x: x.reshape(self._parts, -1, *x.shape[1:])
        return jax.tree.map(cut, next(self._batches))


def bits(tree: Any) -> list[bytes]:
    """All that a tree of arrays holds."""
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return [np.asarray(raw(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def digest(tree: Any) -> str:
    """All of it in 64 characters."""
    found = hashlib.sha256()
    for leaf in bits(tree):
        found.update(leaf)
    return found.hexdigest()


def logged(folder: pathlib.Path) -> list[tuple[int, float]]:
    """The log of losses, up to a line that was cut off."""
    file, found = folder / 'metrics.jsonl', []
    for line in file.read_text().splitlines() if file.exists() else ():
        if not line.endswith('}'):
            break
        row = json.loads(line)
        found.append((row['step'], row['loss']))
    return found


def main() -> None:
    folder, run = pathlib.Path(sys.argv[1]), Run(**json.loads(sys.argv[2]))
    print('begun', flush=True)
    with run.checkpoints(folder / 'checkpoints') as checkpoints:
        run.step(run.params, run.fresh(), next(run.stream()))  # compiled
        batches = run.stream()
        state = checkpoints.resume(run.fresh(), batches)
        after = int(state.step)
        with Metrics(folder, None, after or None) as metrics:
            print(f'ready {after}', flush=True)
            state = pj.fit(
                run.step, run.params, state, batches,
                steps=run.steps,
                on_loss=lambda step, loss: metrics.add(step, {'loss': loss}),
                events=[pj.Every(1, lambda step, state: time.sleep(run.pause))],
                checkpoints=checkpoints,
                save_every=run.every,
            )  # fmt: skip
    print(f'ended {digest(state)}', flush=True)


if __name__ == '__main__':
    main()
