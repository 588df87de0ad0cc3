"""An adapter on its way into a folder."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from peftjax._method import Method
from peftjax._peft import Peft
from peftjax._sites import Site
from peftjax._types import Path, Phi
from peftjax.hf._layout import layout
from peftjax.hf._names import Naming, Table
from peftjax.hf._suffix import suffixes, together

HEAD = 'lm_head/kernel'
"""The path of a head, were it not tied."""


class Part(NamedTuple):
    """A method, its sites and its phi."""

    method: Method
    sites: tuple[Site, ...]
    phi: Any


class Writing:
    """What is written: a configuration, and tensors by the names of the file.

    Args:
      peft: as from `attach`.
      phi: of it.
      naming: from paths to names.

    Attributes:
      parts: the methods.
      paths: of all parameters of the base.
      shapes: of them, by their names, layers of a scan together.
      table: the names of those that are adapted.
      config: so far.
      tensors: so far.
      notes: what the user should know.
    """

    def __init__(self, peft: Peft, phi: Phi, naming: Naming):
        self.naming = naming
        self.paths = [path for path, _, _ in peft.leaves]
        self.shapes = {naming(path): shape for path, shape, _ in peft.leaves}
        self.config: dict[str, Any] = {}
        self.tensors: dict[str, np.ndarray] = {}
        self.notes: list[str] = []
        self.parts = [
            Part(part, chosen, _at(phi, keys))
            for (keys, part), chosen in zip(peft.method.parts, peft.sites, strict=True)
        ]
        sites = {site.path: site for part in self.parts for site in part.sites}
        self.table = Table(sites.values(), naming)

    def has(self, name: str) -> bool:
        """Whether the base has a parameter of this name."""
        return together(name) in set(map(together, self.shapes))

    def modules(self, sites: Iterable[Site]) -> dict[Path, tuple[str, ...]]:
        """The names of the modules that sites are the weights of."""
        return {site.path: self.table.modules(site.path) for site in sites}

    def ends(self, chosen: Mapping[Path, tuple[str, ...]]) -> list[str]:
        """The shortest names that tell some modules from all others."""
        weights = [path for path in self.paths if self.naming(path).endswith('.weight')]
        return suffixes(chosen, weights, self.naming)

    def head_of(self, site: Site) -> tuple[str, list[str]]:
        """The module of the head that a table is tied to: PEFT keeps what is trained for both.

        Returns:
          Its name, and the names that must be listed beside the table's: PEFT ties where a name
          that it knows is listed, `embed_tokens` or `lm_head`.

        Raises:
          ValueError: the parameter that has several uses is no table.
        """
        if site.kind != 'embedding':
            raise ValueError(
                f'PEFT ties a table and a head alone; {site.path!r} ({site.kind}) has several '
                'uses. Give each use a parameter of its own'
            )
        head, [table] = self.naming(HEAD).removesuffix('.weight'), self.table.modules(site.path)
        return head, [] if table.rpartition('.')[2] == 'embed_tokens' else [head]

    def stored(self, part: Part) -> dict[str, np.ndarray]:
        """The tensors of a method by their names in the one spelling."""
        found: dict[str, np.ndarray] = {}
        for site in part.sites:
            for name, array in part.phi[site.path].items():
                array = np.asarray(array)
                where = layout(part.method, site, self.table, name, array.shape)
                found |= where.store(array)
        return found


def _at(phi: Phi, keys: tuple[str, ...]) -> Any:
    for key in keys:
        phi = phi[key]
    return phi
