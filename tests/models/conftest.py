import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

GOLDEN = pathlib.Path(__file__).parent / 'golden'


class Golden(NamedTuple):
    """A tiny model of transformers' PyTorch with what it computed."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    def write(self, folder: pathlib.Path, weights=None, **changes) -> str:
        """Writes a Hugging Face folder, with other tensors or config fields where given."""
        folder.mkdir(exist_ok=True)
        (folder / 'config.json').write_text(json.dumps(self.config | changes))
        tensors = self.weights if weights is None else weights
        tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        save_file(tensors, folder / 'model.safetensors')
        return str(folder)


def read_golden(family: str) -> Golden:
    with np.load(GOLDEN / f'{family}.npz') as file:
        part = lambda prefix: {
            k.removeprefix(prefix): file[k] for k in file if k.startswith(prefix)
        }
        outputs = {k: file[k] for k in ('hidden', 'logits', 'pooled', 'mean') if k in file}
        config = json.loads(str(file['config']))
        return Golden(config, part('weights/'), part('in/'), outputs)


@pytest.fixture
def bert() -> Golden:
    return read_golden('bert')


@pytest.fixture
def roberta() -> Golden:
    return read_golden('roberta')
