"""A stored adapter as it lies in its folder: configuration and tensors, names in one spelling."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peftjax import _safetensors
from peftjax._arrays import check_finite
from peftjax._manifest import CheckpointError
from peftjax.hf._config import NAME, Fields, read_config

Tensors = Mapping[str, Any]
"""Tensors by name."""

PEFT_FILE = 'adapter_model.safetensors'
HUB_FILE = 'adapter.safetensors'
HUB_HEAD, HUB_HEAD_CONFIG = 'model_head.safetensors', 'head_config.json'
PICKLES = ('.bin', '.pt', '.pth', '.pkl', '.pickle', '.ckpt', '.npz', '.npy', '.h5')

PEFT_SPELLING = (
    (r'^base_model\.(model\.)?', ''),
    (r'\.base_layer\.(weight|bias)$', r'.\1'),
    (r'\.modules_to_save(?=\.)', ''),
    (r'\.(lora_magnitude_vector|lora_embedding_[AB])\.weight$', r'.\1'),
    (r'\.token_adapter\.(?=trainable_tokens_delta$)', '.'),
)
"""From the names of PEFT: wrappers go."""

DOWN = '.adapter_down.'
INSIDE = r'(?=adapter_|gate|scaling)'

HUB_SPELLING = (
    (r'\.(adapters|loras|prefix_tunings|prompt_tunings)\.[^.]+\.', '.'),
    (r'^heads\.[^.]+\.', 'heads.'),
    (r'^(.*\.)?prefix_tuning\.(pool\.)?self(_prefix)?\.', 'prefix.'),
    (r'^(.*\.)?prompt_tuning\.prompt_embedding\.weight$', 'prompt_embeddings'),
    (r'\.lora_([AB])$', r'.lora_\1.weight'),
    (r'\.m\.weight$', '.lora_magnitude_vector'),
    (rf'^.*?\.(\d+)\.(attention\.output|attention_adapters)\.{INSIDE}', r'@attention_output.\1.'),
    (rf'^.*?\.(\d+)\.(output|output_adapters)\.{INSIDE}', r'@mlp_output.\1.'),
)
"""From the names of AdapterHub: the adapter's own name goes, places get the names of our zoo."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """What a folder holds.

    Attributes:
      folder: where.
      config: its configuration.
      tensors: by name, in one spelling.
      names: that spelling to the name in the file.
      hub: whether AdapterHub wrote it, otherwise PEFT.
      head: what AdapterHub says of a prediction head.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: dict[str, np.ndarray]
    names: dict[str, str]
    hub: bool
    head: dict[str, Any] | None = None

    @property
    def where(self) -> str:
        """The file of the configuration, for messages."""
        return repr(str(self.folder / NAME))


def read_stored(
    folder: Path, *, allow_nonfinite: bool, check: Callable[[Fields], None] = lambda fields: None
) -> Stored:
    """Reads a folder; nothing is unpickled, and no code is taken from it.

    Args:
      folder: of the adapter.
      allow_nonfinite: take NaN and Inf.
      check: looks at the configuration before a tensor is read, and raises where those of its kind
        cannot be represented, whatever they are.

    Raises:
      FileNotFoundError: there is no configuration, or no safetensors file.
      CheckpointError: a file is damaged, or holds what no adapter holds.
      ValueError: a value is not finite.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f'an adapter is a folder; there is none at {str(folder)!r}')
    config = read_config(folder)
    check(Fields(config, repr(str(folder / NAME))))
    hub = 'peft_type' not in config and 'config' in config
    first = folder / (HUB_FILE if hub else PEFT_FILE)
    if not first.is_file():
        raise FileNotFoundError(_absent(first))
    files = [first, *([folder / HUB_HEAD] if hub and _has(folder, HUB_HEAD) else [])]
    said = read_config(folder, HUB_HEAD_CONFIG) if hub and _has(folder, HUB_HEAD_CONFIG) else {}
    raw: dict[str, np.ndarray] = {}
    for file in files:
        raw |= {name: _float32(file, name, t) for name, t in _safetensors.read(file).items()}
    if not allow_nonfinite:
        check_finite(raw, f'the adapter in {str(folder)!r}')
    tensors, names = spelled(raw, config)
    return Stored(folder, config, tensors, names, hub, said.get('config'))


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def spelled(
    raw: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors in one spelling, and the file's name for each.

    Raises:
      CheckpointError: two different tensors come to one name.
    """
    peft = 'peft_type' in config
    tensors: dict[str, np.ndarray] = {}
    names: dict[str, str] = {}
    for name, tensor in raw.items():
        new = name if peft else _inside_hub(name, raw)
        for pattern, text in PEFT_SPELLING if peft else HUB_SPELLING:
            new = re.sub(pattern, text, new)
        if new in tensors and not np.array_equal(tensors[new], tensor, equal_nan=True):
            raise CheckpointError(
                f'an adapter must hold each tensor once; {names[new]!r} and {name!r} are the same '
                'in different values. Take another copy'
            )
        if new not in tensors:
            tensors[new], names[new] = tensor, name
    return tensors, names


def _inside_hub(name: str, raw: Mapping[str, Any]) -> str:
    """A name of AdapterHub's, what it means said by the tensors beside it."""
    if '.adapter_down.0.' in name:  # A norm before `down` is its first module too.
        norm = name.replace('.adapter_down.0.', '.adapter_down.1.') in raw
        return name.replace('.adapter_down.0.', '.adapter_norm_before.' if norm else DOWN)
    if name.endswith('.lora_B') and f'{name[:-1]}A' not in raw:  # IA3 is a LoRA without `lora_A`.
        return f'{name.removesuffix(".lora_B")}.ia3_l'
    return name.replace('.adapter_down.1.', DOWN)


def _float32(file: Path, name: str, tensor: np.ndarray) -> np.ndarray:
    """A tensor in the dtype of phi, which holds every value of the narrower ones."""
    if str(tensor.dtype) not in ('float32', 'float16', 'bfloat16'):
        raise CheckpointError(
            f'an adapter must hold float32, float16 or bfloat16; {name!r} in {str(file)!r} is '
            f'{tensor.dtype}. Convert it'
        )
    return np.asarray(tensor, np.float32)


def _absent(path: Path) -> str:
    pickles = sorted(p.name for p in path.parent.iterdir() if p.suffix in PICKLES)
    law = f'an adapter must hold {path.name}; {str(path.parent)!r} does not'
    if not pickles:
        return f'{law}. Name the folder with the adapter itself'
    return (
        f'{law}. It holds {pickles[:5]}, which may hold pickled objects: they are never opened, '
        'since unpickling runs code. Convert to safetensors with the library that wrote it '
        '(PEFT: save_pretrained(folder, safe_serialization=True); AdapterHub: '
        'save_adapter(folder, name, use_safetensors=True))'
    )
