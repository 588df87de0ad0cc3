"""A tiny encoder in a Hugging Face folder, and few messages that one word decides."""

import contextlib
import io
import json
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import pytest
import tokenizers
from commands import call
from safetensors.numpy import save_file
from talker import write_colors, write_decoder
from tokenizers import models, pre_tokenizers, processors

GOLDEN = pathlib.Path(__file__).parents[1] / 'models' / 'golden' / 'bert.npz'
POSITIONS = 'bert.embeddings.position_embeddings.weight'
SPECIAL = ['[PAD]', '[UNK]', '[CLS]', '[SEP]']
THINGS = ['train', 'room', 'card', 'parcel', 'phone', 'garden']
PATTERNS = {'ask': 'where is the {}', 'leave': 'please cancel my {}', 'praise': 'such a good {}'}


class Here(NamedTuple):
    """What the commands are given, and where they leave things."""

    folder: pathlib.Path
    model: str
    train: str
    test: str

    @property
    def inputs(self) -> list[str]:
        """Options of compare and tune."""
        return ['--model', self.model, '--train', self.train, '--test', self.test]


def write_model(folder: pathlib.Path) -> str:
    """Writes a BERT of two layers with a tokenizer of whole words."""
    folder.mkdir()
    with np.load(GOLDEN) as golden:
        weights = {
            k.removeprefix('weights/'): golden[k] for k in golden if k.startswith('weights/')
        }
        config = json.loads(str(golden['config'])) | {'max_position_embeddings': 40}
    position, norms = np.random.default_rng(0).normal(size=(40, 12)), 'LayerNorm.weight'
    weights[POSITIONS] = position.astype(np.float32) * 0.1
    weights |= {name: np.ones_like(w) for name, w in weights.items() if name.endswith(norms)}
    save_file(jax.tree.map(np.ascontiguousarray, weights), folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps(config))
    words = {word for text in PATTERNS.values() for word in text.split()} - {'{}'}
    vocabulary = [*SPECIAL, *sorted(words), *THINGS]
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(ids, unk_token='[UNK]'))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, ids[name]) for name in ('[CLS]', '[SEP]')]
    tokenizer.post_processor = processors.TemplateProcessing('[CLS] $A [SEP]', None, ends)
    tokenizer.save(str(folder / 'tokenizer.json'))
    return str(folder)


def write_messages(path: pathlib.Path, things: list[str]) -> str:
    """Writes a message of each label for each thing."""
    rows = [
        {'text': text.format(thing), 'label': label}
        for label, text in PATTERNS.items()
        for thing in things
    ]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


@pytest.fixture(scope='session')
def here(tmp_path_factory) -> Here:
    folder = tmp_path_factory.mktemp('cli')
    return Here(
        folder,
        write_model(folder / 'model'),
        write_messages(folder / 'train.jsonl', THINGS[:4]),
        write_messages(folder / 'test.jsonl', THINGS[4:]),
    )


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def peftjax(capsys):
    """Runs a command in this process: `peftjax('tune', '--out', folder)`."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        try:
            code = call(*arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture(scope='session')
def compared(here) -> pathlib.Path:
    """The folder of one comparison."""
    out = here.folder / 'compared'
    some = ('--methods', 'frozen,lora,prompt', '--epochs', 1, '--seeds', 3, '--shots', 2)
    assert call('compare', *here.inputs, *some, '--batch', 4, '--out', out) == 0
    return out


class Tuned(NamedTuple):
    """One adapter, trained until it knows the labels, and what the command said."""

    folder: pathlib.Path
    said: str


@pytest.fixture(scope='session')
def tuned_once(here) -> Tuned:
    out, said = here.folder / 'tuned', io.StringIO()
    some = ('--epochs', 150, '--batch', 12, '--rate', 0.02, '--seed', 1)
    with contextlib.redirect_stdout(said):
        assert call('tune', *here.inputs, *some, '--out', out) == 0
    return Tuned(out, said.getvalue())


@pytest.fixture
def tuned(tuned_once) -> pathlib.Path:
    return tuned_once.folder


class Talk(NamedTuple):
    """A language model, its data, and a run on them."""

    model: str
    data: str
    run: pathlib.Path
    said: str


@pytest.fixture(scope='session')
def talk(here) -> Talk:
    """A language model that has learned some colors."""
    model = write_decoder(here.folder / 'talker')
    rows = write_colors(here.folder / 'colors.jsonl')
    run, said = here.folder / 'talk', io.StringIO()
    some = ('--answer-only', '--steps', 60, '--batch', 4, '--length', 20, '--rate', 0.03)
    held = ('--eval-data', rows, '--evaluations', 2)
    with contextlib.redirect_stdout(said):
        assert call('tune', '--model', model, '--data', rows, *some, *held, '--out', run) == 0
    return Talk(model, rows, run, said.getvalue())
