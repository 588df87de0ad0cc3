"""One loader of adapters that other libraries wrote: Hugging Face PEFT, AdapterHub `adapters`.

A case is a folder with `adapter_config.json`, the adapter's tensors, `io.npz` (inputs and outputs),
gradients of mean(out**2), and its base model in `base/`, there or in a folder above. The method is
made from the configuration. Phi is made from the tensors by a differentiable function, almost
always a permutation, so that gradients are compared tensor by tensor as they were stored.
"""

import dataclasses
import functools
import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from interop_methods import from_adapter_hub, from_hugging_face
from safetensors.numpy import load_file, save_file

import peftjax as pj
from peftjax.models import load_encoder

Tensors = dict[str, Any]

# From stored names to one spelling: path of the module, then what it is there. The name of the
# adapter, wrappers and the model's prefix go; what is stored several times gets one name.
SPELLING = (
    (r'^(base_model\.)?(model\.)?(bert\.)?', ''),
    (r'\.(default|modules_to_save)(?=\.|$)', ''),
    (r'\b(adapters|loras|prefix_tunings|prompt_tunings)\.[^.]+\.', ''),
    (r'^heads\.[^.]+\.', 'heads.'),
    (r'^encoder\.layer\.\d+\.attention\.self\.prefix_tuning\.pool\.', 'prefix_tuning.'),
    (r'^prefix_tuning\.self_prefix\.', 'prefix.'),
    (r'^(prompt_embeddings|prompt(_encoder|_tuning)\.(prompt_)?embedding\.weight)$', 'prompt'),
    (r'\.(lora_A|lora_B|lora_magnitude_vector|m)\.weight$', r'.\1'),
    (r'\.lora_magnitude_vector$', '.m'),
)

# How an array of phi is called in its module.
STORED = {
    'a': 'lora_A',
    'b': 'lora_B',
    'm': 'm',
    'l': 'ia3_l',
    'down': 'adapter_down.weight',
    'down_bias': 'adapter_down.bias',
    'up': 'adapter_up.weight',
    'up_bias': 'adapter_up.bias',
    'before_scale': 'adapter_norm_before.weight',
    'before_bias': 'adapter_norm_before.bias',
    'after_scale': 'adapter_norm_after.weight',
    'after_bias': 'adapter_norm_after.bias',
    'gate': 'gate.weight',
    'gate_bias': 'gate.bias',
    'prompt': 'prompt',
}
TRANSPOSED = ('a', 'b', 'down', 'up', 'gate', 'kernel')
LEAF = {'kernel': 'weight', 'bias': 'bias'}
NAMED = {
    'attention_output': 'attention/output',
    'mlp_output': 'output',
    'key': 'attention/self/key',
    'value': 'attention/self/value',
}


class Outcome(NamedTuple):
    """What a case comes to."""

    out: Any
    loss: Any
    gradients: Tensors


@dataclasses.dataclass(frozen=True)
class Case:
    """A stored adapter in our terms; `tensors`, `grads`, `merged` by names after `SPELLING`."""

    peft: pj.Peft
    apply_fn: Any
    params: Any
    layers: int
    inputs: dict[str, Any]
    adapter_hub: bool
    tensors: Tensors
    grads: Tensors
    merged: Tensors
    io: Tensors

    def phi(self, tensors: Tensors | None = None) -> Any:
        """Phi of stored tensors; to leave one of them unused is an error."""
        filling = _Filling(self, self.tensors if tensors is None else tensors)
        shapes = jax.eval_shape(self.peft.init, jax.random.key(0), self.params)
        phi: Any = {}
        for keys, part in self.peft.method.parts:
            filled = {
                path: {name: filling.array(part, path, name, a.shape) for name, a in arrays.items()}
                for path, arrays in functools.reduce(lambda tree, k: tree[k], keys, shapes).items()
            }
            phi = phi | {keys[0]: filled} if keys else filled
        left = set(filling.tensors) - filling.used
        assert not left, f'tensors of the adapter that phi has no place for: {sorted(left)}'
        return phi

    def attached(self, method: Any) -> 'Case':
        """The same with another method."""
        attach = lambda params, *a, **k: pj.attach(method, self.apply_fn, params, *a, **k)
        return dataclasses.replace(self, peft=self._call(attach, self.params))

    def base(self, params: Any = None) -> Any:
        """Output of the model, with other parameters where given."""
        return self._call(self.apply_fn, self.params if params is None else params)

    def forward(self, phi: Any = None) -> Any:
        """Output of the wrapped model, with another phi where given."""
        phi = self.phi() if phi is None else phi
        return self._call(self.peft.wrap(self.apply_fn), self.params, phi)

    def outcome(self) -> 'Outcome':
        """Output, loss mean(out**2), and its gradients with respect to the stored tensors."""

        def inside(params: Any, *args: Any, **kwargs: Any) -> Any:
            out = self.apply_fn(params, *args, **kwargs)
            return jnp.mean(jnp.square(out)), out

        def loss(tensors: Tensors) -> Any:
            whole, out = self._call(self.peft.wrap(inside), self.params, self.phi(tensors))
            return whole if self.returns_virtual_tokens else jnp.mean(jnp.square(out)), out

        # Not jitted: these models are so small that compiling them takes longer.
        (value, out), gradients = jax.value_and_grad(loss, has_aux=True)(self.tensors)
        return Outcome(out, value, gradients)

    @property
    def returns_virtual_tokens(self) -> bool:
        """Whether the stored outputs have virtual tokens in front; ours have not."""
        out = self.io['out_adapted']
        return out.ndim == 3 and out.shape[1] > self.inputs['input_ids'].shape[1]

    @property
    def out_adapted(self) -> Any:
        """The stored output of the real tokens."""
        out = self.io['out_adapted']
        return out[:, -self.inputs['input_ids'].shape[1] :] if out.ndim == 3 else out

    def _call(self, fn: Any, params: Any, *phi: Any) -> Any:
        inputs = dict(self.inputs)
        return fn(params, *phi, inputs.pop('input_ids'), **inputs)


def load(folder: pathlib.Path, *, scan_layers: bool = False) -> Case:
    """Reads a case.

    Args:
      folder: with an adapter; `base` and `io.npz` there or above.
      scan_layers: as of `load_encoder`.

    Raises:
      ValueError: a configuration without counterpart.
    """
    config = json.loads((folder / 'adapter_config.json').read_text())
    apply_fn, params, layers = _base(_above(folder, 'base'), config, scan_layers)
    hub = 'config' in config
    method = from_adapter_hub(config) if hub else from_hugging_face(config, tuple(params))
    with np.load(_above(folder, 'io.npz')) as file:
        io = dict(file)
    inputs = {name: io[name].astype(np.int32) for name in ('input_ids', 'attention_mask')}
    if hub:  # real tokens keep their positions: they are said, for the method not to shift them
        ids = inputs['input_ids']
        inputs['position_ids'] = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    files = ('adapter_model.safetensors', 'adapter.safetensors', 'model_head.safetensors')
    case = Case(
        peft=None,  # pyright: ignore[reportArgumentType]
        apply_fn=apply_fn,
        params=params,
        layers=layers,
        inputs=inputs,
        adapter_hub=hub,
        tensors=_tensors(folder, config, *files),
        grads=_tensors(folder, config, 'grads.safetensors'),
        merged=_tensors(folder, config, 'merged_weights.safetensors'),
        io=io,
    )
    return case.attached(method)


def _above(folder: pathlib.Path, name: str) -> pathlib.Path:
    return next(up / name for up in (folder, *folder.parents) if (up / name).exists())


def _tensors(folder: pathlib.Path, config: Mapping[str, Any], *names: str) -> Tensors:
    """The tensors of some files by their names after `SPELLING`."""
    files = [folder / name for name in names if (folder / name).exists()]
    inner = config.get('config', {})
    spelling = list(SPELLING)
    if inner.get('ln_before'):  # the norm is stored a second time, as the first module of `down`
        spelling += [(r'\.adapter_down\.0\.', '.adapter_norm_before.'), (r'_down\.1\.', '_down.')]
    spelling += [(r'\.adapter_down\.0\.', '.adapter_down.')]
    if inner.get('composition_mode') == 'scale':
        spelling += [(r'\.lora_B$', '.ia3_l')]
    found: Tensors = {}
    for name, tensor in (item for file in files for item in load_file(file).items()):
        for pattern, new in spelling:
            name = re.sub(pattern, new, name)
        if name in found:
            np.testing.assert_array_equal(tensor, found[name], f'two different tensors {name!r}')
        found[name] = tensor
    return found


# Base models -------------------------------------------------------------------------------------


def _base(
    folder: pathlib.Path, config: Mapping[str, Any], scan_layers: bool
) -> tuple[Any, Any, int]:
    """An apply function, its parameters, and how many layers it has."""
    head = None if 'config' in config else 'classifier'
    with tempfile.TemporaryDirectory() as copy:
        shutil.copy(folder / 'config.json', copy)
        tensors = load_file(folder / 'model.safetensors')
        # A second reference to the word embeddings, which AdapterHub stores.
        tensors.pop('bert.prompt_tuning.base_model_embeddings.weight', None)
        save_file(tensors, pathlib.Path(copy) / 'model.safetensors')
        loaded = load_encoder(copy, head, scan_layers=scan_layers)
    apply_fn, params, layers = loaded.model.apply_fn, loaded.params, loaded.config.num_hidden_layers
    if config.get('config') is None or config['model_class'] == 'BertModel':
        return apply_fn, params, layers
    zeros = lambda i, o: {'kernel': jnp.zeros((i, o)), 'bias': jnp.zeros(o)}
    width = loaded.config.hidden_size
    heads = {'1': zeros(width, width), '4': zeros(width, 3)}
    return _two_layer_head(apply_fn), {'bert': params, 'heads': heads}, layers


def _two_layer_head(encoder: Any) -> Any:
    """AdapterHub's classification head: two linear layers over the first token."""

    def apply_fn(params: Any, *args: Any, **kwargs: Any) -> Any:
        x = encoder(params['bert'], *args, **kwargs)[:, 0]
        first, second = params['heads']['1'], params['heads']['4']
        x = jnp.tanh(x @ first['kernel'] + first['bias'][None])
        return x @ second['kernel'] + second['bias'][None]

    return apply_fn


# Phi ---------------------------------------------------------------------------------------------


class _Filling:
    """Arrays of phi from stored tensors, remembering which were used."""

    def __init__(self, case: Case, tensors: Tensors):
        self.case, self.tensors, self.used = case, tensors, set[str]()

    def read(self, name: str) -> Any:
        self.used.add(name)
        return jnp.asarray(self.tensors[name])

    def array(self, part: Any, path: str, name: str, shape: tuple[int, ...]) -> Any:
        """One array of phi; that of a scanned encoder is a stack."""
        place = path.removeprefix('bert/')
        if (found := re.fullmatch(r'@(\w+)(/\d+)?', path)) and found[1] in NAMED:
            place = f'encoder/layer{found[2] or ""}/{NAMED[found[1]]}/'
        inner = re.sub(r'^encoder/layer/(?!\d)', 'encoder/layer/{}/', place)
        if inner == place:
            return self._one(part, path, place, name, shape)
        each = [
            self._one(part, path, inner.format(i), name, shape[1:], i)
            for i in range(self.case.layers)
        ]
        return jnp.stack(each)

    def _one(self, part, path, place, name, shape, layer=None) -> Any:
        module, _, leaf = place.rpartition('/')
        module = module.replace('/', '.')
        if isinstance(part, pj.PrefixTuning):
            return self._prefix(module, name, shape)
        if self.case.adapter_hub and f'{module}.m' in self.tensors and name in ('m', 'value'):
            return self._adapter_hub_dora(path, module, layer)[name]
        name = leaf if name == 'value' else name
        stored = LEAF.get(name) or STORED[name]
        tensor = self.read(stored if stored == 'prompt' else f'{module}.{stored}')
        return (tensor.T if name in TRANSPOSED else tensor).reshape(shape)

    def _prefix(self, module: str, name: str, shape: tuple[int, ...]) -> Any:
        """Rows are ordered by layer, then key and value, then head and its width."""
        if not module:
            names = {'tokens': 'wte.weight', 'down': 'control_trans.0.weight'}
            tensor = self.read(f'prefix.{names.get(name, "control_trans.0.bias")}')
            return tensor.T if name == 'down' else tensor
        stored = {'prefix': '', 'up': '.2.weight', 'up_bias': '.2.bias'}[name]
        tensor = self.read(f'prefix.control_trans{stored}')
        _, _, layer, *_, which = module.split('.')
        heads = shape[-2:]
        rows = (self.case.layers, 2, *heads)
        pick = (int(layer), ('key', 'value').index(which))
        if name == 'prefix':
            return tensor.reshape(-1, *rows)[(slice(None), *pick)]
        return jnp.moveaxis(tensor.reshape(*rows, *tensor.shape[1:])[pick], (0, 1), (-2, -1))

    def _adapter_hub_dora(self, path: str, module: str, layer: int | None) -> Tensors:
        """AdapterHub computes `m / |w + ab| * (x w + bias + scale x ab)`; the paper (and PEFT)
        `m / |w + scale ab| * (x w + scale x ab) + bias`, the norm a constant. The one in terms of
        the other: a magnitude that holds the ratio of the norms, and a scaled bias.
        """
        dora = next(part for _, part in self.case.peft.method.parts if isinstance(part, pj.Dora))
        owner = functools.reduce(lambda t, k: t[k], path.split('/')[:-1], self.case.params)
        w, bias = (owner[k] if layer is None else owner[k][layer] for k in ('kernel', 'bias'))
        low = (self.read(f'{module}.lora_B') @ self.read(f'{module}.lora_A')).T
        gain = self.read(f'{module}.m')[:, 0] / jnp.linalg.norm(w + low, axis=0)
        norm = jnp.linalg.norm(w + dora.alpha / dora.rank * low, axis=0)
        return {'m': gain * jax.lax.stop_gradient(norm), 'value': gain * bias}
