"""An adapter on its way into a folder of AdapterHub's."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from peftjax._leaf import LeafMethod
from peftjax._types import PyTree
from peftjax.hf._hub import FAMILIES, VERSION, Family
from peftjax.hf._layout import layout
from peftjax.hf._writing import Writing


@dataclasses.dataclass(frozen=True)
class About:
    """What is said of an adapter beside what it computes.

    Attributes:
      name: of the adapter, which is part of the names of its tensors.
      family: the kind of model.
      model_type: of the base's `config.json`.
      model_name: of the base.
      head: what AdapterHub calls the configuration of a prediction head.
      params: of the base, for what is stored in relation to them.
    """

    name: str
    family: Family
    model_type: str
    model_name: str
    head: Mapping[str, Any] | None = None
    params: PyTree | None = None


def about_hub(
    name: str,
    model_type: str | None,
    model_name: str | None,
    head: Mapping[str, Any] | None,
    params: PyTree | None,
) -> About:
    """What is said of an adapter, checked; see `About`.

    Raises:
      ValueError: a name with a dot, or a kind of model that AdapterHub does not know.
    """
    if '.' in name:
        raise ValueError(
            f'the name of an adapter is part of the names of its tensors in AdapterHub, and has no '
            f'dot; got {name!r}. Choose another name for the folder'
        )
    if model_type not in FAMILIES:
        raise ValueError(
            f'AdapterHub has places of its own in each kind of model: model_type, as in the '
            f"base's config.json, must be one of {', '.join(FAMILIES)}; got {model_type!r}"
        )
    return About(name, FAMILIES[model_type], model_type, model_name or '', head, params)


class Hub:
    """What is written: configurations, and tensors by the names of the files.

    Args:
      out: the plan, its phi and names.
      about: what is said beside.

    Attributes:
      tensors: of the adapter, so far.
      saved: parameters that are trained in full, by name.
    """

    def __init__(self, out: Writing, about: About):
        self.out, self.about = out, about
        self.tensors: dict[str, np.ndarray] = {}
        self.saved = _saved(out)
        names = [out.naming(path).removeprefix(f'{about.family.body}.') for path in out.paths]
        within = re.compile(rf'{re.escape(about.family.layers)}\.(\d+)\.')
        self._layers = {int(found[1]) for name in names if (found := within.match(name))}

    @property
    def heads(self) -> dict[str, np.ndarray]:
        """The prediction head, if it is trained."""
        name = f'heads.{self.about.name}.'
        return {n.replace('heads.', name, 1): t for n, t in self.saved.items() if _is_head(n)}

    @property
    def start(self) -> str:
        """What all names of an adapter begin with: a model with a head has a body."""
        return f'{self.about.family.body}.' if self.heads else ''

    def layer(self, module: str) -> tuple[int, str]:
        """The index of the layer of a module, and what it is called in there.

        Raises:
          ValueError: it is in no layer.
        """
        family = self.about.family
        name = module.removeprefix(f'{family.body}.')
        found = re.fullmatch(rf'{re.escape(family.layers)}\.(\d+)\.(.+)', name)
        if found is None:
            raise ValueError(
                f'AdapterHub adapts what is in the layers of {family.stem}, '
                f'{family.layers}.0 and so on; {module!r} is not. Leave it out of the target, or '
                'pass names, which say what the modules are called in the Hugging Face model'
            )
        return int(found[1]), found[2]

    def put(self, module: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Adds tensors of a module below the model's body."""
        self.tensors |= {f'{self.start}{module}.{name}': t for name, t in tensors.items()}

    def left_out(self, layers: Iterable[int]) -> list[int]:
        """The layers without an adapter."""
        return sorted(self._layers - set(layers))

    def width(self) -> int | None:
        """The width of the model, where its norm is found."""
        end = f'.{self.about.family.norm}.weight'
        shapes = (shape for name, shape in self.out.shapes.items() if name.endswith(end))
        return next((shape[-1] for shape in shapes), None)

    def full(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration as it stands in a file."""
        stem, kind = self.about.family.stem, 'AdapterModel' if self.heads else 'Model'
        return {
            'config': dict(config),
            'hidden_size': self.width(),
            'model_class': f'{stem}{kind}',
            'model_name': self.about.model_name,
            'model_type': self.about.model_type,
            'name': self.about.name,
            'version': VERSION,
        }

    def check_saved(self) -> None:
        """Refuses parameters trained in full that have no place.

        Raises:
          ValueError: there are some, or a head of which it is not said what it computes.
        """
        if left := [name for name in self.saved if not _is_head(name)]:
            raise ValueError(
                f'AdapterHub trains no parameters of the base in full; {left[:3]} ({len(left)}) '
                'are. Leave them out of the chain'
            )
        if self.heads and self.about.head is None:
            raise ValueError(
                f'a prediction head is trained, {list(self.heads)[:2]}: pass head, what '
                'AdapterHub calls its configuration, which says what it computes: '
                "{'head_type': 'classification', 'layers': 2, …}"
            )
        if self.about.head is not None and not self.heads:
            raise ValueError('head describes a prediction head, and none is trained. Leave it out')


def _saved(out: Writing) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for part in out.parts:
        for site in part.sites if isinstance(part.method, LeafMethod) else ():
            one = layout(part.method, site, out.table, 'value', site.shape)
            found |= one.store(np.asarray(part.phi[site.path]['value']))
    return found


def _is_head(name: str) -> bool:
    return name.startswith('heads.')
