"""Stored adapters of other libraries: Hugging Face PEFT, AdapterHub `adapters`.

A case is a folder with `adapter_config.json`, the adapter's tensors, `io.npz` (inputs and outputs),
gradients of mean(out**2), and its base model in `base/`, there or in a folder above. The package
reads it; gradients are taken with respect to the tensors as they are stored.
"""

import dataclasses
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
from safetensors.numpy import load_file, save_file

import peftjax as pj
from peftjax.hf import _load, _stored
from peftjax.models import load_decoder, load_encoder

Tensors = dict[str, Any]

# While it trains, PEFT names tensors otherwise than in a file.
TRAINING = (
    (r'\.(default|modules_to_save)(?=\.|$)', ''),
    (r'^prompt_encoder\.embedding\.weight$', 'prompt_embeddings'),
)


class Outcome(NamedTuple):
    """What a case comes to."""

    out: Any
    loss: Any
    gradients: Tensors


@dataclasses.dataclass(frozen=True)
class Case:
    """A stored adapter over its base; tensors and gradients by names in the package's spelling."""

    opened: _load.Opened
    peft: pj.Peft
    apply_fn: Any
    params: Any
    inputs: dict[str, Any]
    grads: Tensors
    merged: Tensors
    io: Tensors

    @property
    def tensors(self) -> Tensors:
        """The tensors that hold something new."""
        idle = self.opened.plan.idle
        return {name: t for name, t in self.opened.stored.tensors.items() if name not in idle}

    def phi(self, tensors: Tensors | None = None) -> Any:
        """Phi of stored tensors, or of others of the same names."""
        return self.opened.phi(self.tensors if tensors is None else tensors)

    def attached(self, method: Any) -> 'Case':
        """The same with another method."""
        attach = lambda params, *a, **k: pj.attach(method, self.apply_fn, params, *a, **k)
        return dataclasses.replace(self, peft=self._call(attach, self.params))

    def base(self, params: Any = None) -> Any:
        """Output of the model, with other parameters where given."""
        return self._call(self.apply_fn, self.params if params is None else params)

    def forward(self, phi: Any = None, params: Any = None) -> Any:
        """Output of the wrapped model, with another phi or base where given."""
        phi = self.phi() if phi is None else phi
        params = self.params if params is None else params
        return self._call(self.peft.wrap(self.apply_fn), params, phi)

    def outcome(self) -> 'Outcome':
        """Output, loss mean(out**2), and its gradients with respect to the stored tensors."""

        def inside(params: Any, *args: Any, **kwargs: Any) -> Any:
            out = self.apply_fn(params, *args, **kwargs)
            return jnp.mean(jnp.square(out)), out

        def loss(tensors: Tensors) -> Any:
            whole, out = self._call(self.peft.wrap(inside), self.params, self.phi(tensors))
            return whole if self.returns_virtual_tokens else jnp.mean(jnp.square(out)), out

        # Not jitted: these models are so small that compiling them takes longer.
        tensors = {name: jnp.asarray(tensor) for name, tensor in self.tensors.items()}
        (value, out), gradients = jax.value_and_grad(loss, has_aux=True)(tensors)
        return Outcome(out, value, gradients)

    @property
    def returns_virtual_tokens(self) -> bool:
        """Whether the stored outputs have virtual tokens in front; ours have not."""
        out = self.io['out_adapted']
        return out.ndim == 3 and out.shape[1] > self.io['input_ids'].shape[1]

    @property
    def out_adapted(self) -> Any:
        """The stored output of the real tokens."""
        out = self.io['out_adapted']
        return out[:, -self.io['input_ids'].shape[1] :] if self.returns_virtual_tokens else out

    def _call(self, fn: Any, params: Any, *phi: Any) -> Any:
        return call(fn, self.inputs, params, *phi)


def call(fn: Any, inputs: Mapping[str, Any], *first: Any) -> Any:
    """A function of token ids, with what goes with them as keywords."""
    inputs = dict(inputs)
    return fn(*first, inputs.pop('input_ids'), **inputs)


def load(folder: pathlib.Path, *, scan_layers: bool = False, **options: Any) -> Case:
    """Reads a case.

    Args:
      folder: with an adapter; `base` and `io.npz` there or above.
      scan_layers: as of `load_encoder`.
      **options: as of `load_adapter`.

    Raises:
      ValueError: a configuration without counterpart.
    """
    stored = _stored.read_stored(folder, allow_nonfinite=False)
    apply_fn, params = base_of(_above(folder, 'base'), stored.config, scan_layers)
    with np.load(_above(folder, 'io.npz')) as file:
        io = dict(file)
    inputs = {name: io[name] for name in ('input_ids', 'attention_mask') if name in io}
    inputs = {name: v.astype(np.int32) for name, v in inputs.items()} or {'input_ids': io['x']}
    if 'input_ids' in io:  # said, since these libraries count padding too
        ids = inputs['input_ids']
        inputs['position_ids'] = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    opened = call(
        lambda *a, **k: _load.open_adapter(stored, apply_fn, params, *a, **options, **k), inputs
    )
    return Case(
        opened=opened,
        peft=opened.peft,
        apply_fn=apply_fn,
        params=params,
        inputs=inputs,
        grads=_tensors(folder, stored.config, 'grads.safetensors'),
        merged=_tensors(folder, stored.config, 'merged_weights.safetensors'),
        io=io,
    )


def _above(folder: pathlib.Path, name: str) -> pathlib.Path:
    return next(up / name for up in (folder, *folder.parents) if (up / name).exists())


def _tensors(folder: pathlib.Path, config: Mapping[str, Any], name: str) -> Tensors:
    """The tensors of a file in the package's spelling."""
    if not (folder / name).exists():
        return {}
    tensors = load_file(folder / name)
    for pattern, new in TRAINING:
        tensors = {re.sub(pattern, new, name): tensor for name, tensor in tensors.items()}
    return _stored.spelled(tensors, config)[0]


# Base models -------------------------------------------------------------------------------------


def base_of(folder: pathlib.Path, config: Mapping[str, Any], scan_layers: bool) -> tuple[Any, Any]:
    """An apply function and its parameters."""
    model = json.loads((folder / 'config.json').read_text())
    tensors = load_file(folder / 'model.safetensors')
    if model.get('custom') == 'MoEWrap':
        return experts, nested(tensors)
    # A second reference to the word embeddings, which AdapterHub stores.
    tensors = {n: t for n, t in tensors.items() if 'base_model_embeddings' not in n}
    hub = 'config' in config
    with tempfile.TemporaryDirectory() as copy:
        shutil.copy(folder / 'config.json', copy)
        if model['model_type'] != 'bert':
            return _decoder(copy, tensors, model, hub, scan_layers)
        save_file(tensors, pathlib.Path(copy) / 'model.safetensors')
        loaded = load_encoder(copy, None if hub else 'classifier', scan_layers=scan_layers)
    apply_fn, params = loaded.model.apply_fn, loaded.params
    if not hub or config['model_class'] == 'BertModel':
        return apply_fn, params
    zeros = lambda i, o: {'kernel': jnp.zeros((i, o)), 'bias': jnp.zeros(o)}
    width = loaded.config.hidden_size
    heads = {'1': zeros(width, width), '4': zeros(width, 3)}
    return _two_layer_head(apply_fn), {'bert': params, 'heads': heads}


def _decoder(
    copy: str, tensors: Tensors, model: dict[str, Any], hub: bool, scan_layers: bool
) -> tuple[Any, Any]:
    """A language model; AdapterHub's cases have no head, and return hidden states."""
    if hub and not model.get('tie_word_embeddings', True):
        shape = model['vocab_size'], model['hidden_size']
        tensors['lm_head.weight'] = np.zeros(shape, np.float32)
    save_file(tensors, pathlib.Path(copy) / 'model.safetensors')
    loaded = load_decoder(copy, scan_layers=scan_layers)
    method = 'hidden' if hub else '__call__'

    def decoder(params: Any, *args: Any, **kwargs: Any) -> Any:
        return loaded.model.apply({'params': params}, *args, method=method, **kwargs)

    return decoder, loaded.params


def _two_layer_head(encoder: Any) -> Any:
    """AdapterHub's classification head: two linear layers over the first token."""

    def apply_fn(params: Any, *args: Any, **kwargs: Any) -> Any:
        x = encoder(params['bert'], *args, **kwargs)[:, 0]
        first, second = params['heads']['1'], params['heads']['4']
        x = jnp.tanh(x @ first['kernel'] + first['bias'][None])
        return x @ second['kernel'] + second['bias'][None]

    return apply_fn


def experts(params: Any, x: Any) -> Any:
    """A layer of experts that are parameters of one module, all of them weighted by a router."""
    own = params['experts']
    weights = jax.nn.softmax(x @ own['router']['weight'].T + own['router']['bias'][None])
    each = jnp.broadcast_to(x[None], (len(own['w1']), *x.shape))
    inner = jax.nn.relu(jnp.einsum('ebd,edf->ebf', each, own['w1']))
    y = jnp.einsum('ebd,be->bd', jnp.einsum('ebf,efd->ebd', inner, own['w2']), weights)
    return y @ own['lin']['weight'].T + own['lin']['bias'][None]


def nested(tensors: Tensors) -> Any:
    """Parameters as PyTorch keeps them, in nested dicts."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *owners, leaf = name.split('.')
        home = tree
        for owner in owners:
            home = home.setdefault(owner, {})
        home[leaf] = jnp.asarray(tensor)
    return tree
