"""Adapters of different ranks as members of one stack."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from peftjax import _paths
from peftjax._chain import replaced
from peftjax._lowrank import LowRankMethod
from peftjax._method import Method
from peftjax._one_pass import wide
from peftjax._peft import Peft
from peftjax._types import Array, Path, Phi
from peftjax.many import size, stack, unstack


def pad_ranks(pefts: Sequence[Peft]) -> 'Padded':
    """Makes plans of different ranks and scales members of one.

    Args:
      pefts: one plan for each member, of one model and the same sites, whose low-rank methods
        (`Lora`, `Dora`) differ in nothing but ranks and scales.

    Returns:
      The plan of all, with what turns each one's phi into that of a member and back.

    Raises:
      ValueError: the plans differ in more.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params, x = {'kernel': jnp.ones((6, 5))}, jnp.ones((2, 6))
      >>> model = lambda params, x: x @ params['kernel']
      >>> of = lambda rank: pj.attach(
      ...     pj.Lora(rank=rank, alpha=8, target='kernel'), model, params, x)
      >>> padded = pj.pad_ranks([of(2), of(4)])
      >>> phis = padded.pad([p.init(jax.random.key(0), params) for p in padded.members])
      >>> jax.tree.map(jnp.shape, phis), padded.scales['kernel'].tolist()
      ({'kernel': {'a': (2, 6, 4), 'b': (2, 4, 5)}}, [4.0, 2.0])
      >>> forward = lambda scale, phi: padded.peft.wrap(model)(params, padded.scaled(phi, scale), x)
      >>> jax.vmap(forward)(padded.scales, phis).shape
      (2, 2, 5)
    """
    if not pefts:
        raise ValueError('there must be a plan at least; got none')
    for number, other in enumerate(pefts):
        if wrong := _difference(pefts[0], other):
            raise ValueError(
                'plans that differ in ranks and scales alone can be padded to one; plan '
                f'{number} {wrong}'
            )
    return Padded(_widest(pefts), tuple(pefts))


@dataclasses.dataclass(frozen=True)
class Padded:
    """Plans of different ranks as one, of the largest rank at each site and of scale 1.

    What is padded is zero in `a` and in `b`, hence so are its gradients, and it stays zero under
    every optimizer that treats each entry by itself, with weight decay and with clipping by the
    norm of all: SGD, Adam, AdamW, Lion. Adafactor, whose statistics are means over rows and
    columns, sees the padding. The scale of a member is frozen as theta is, and stands beside it:

        def loss_fn(frozen, phi, batch, key):
            params, scale = frozen
            return loss(forward(params, padded.scaled(phi, scale), batch))

        step = jax.vmap(pj.train_step(loss_fn, tx), in_axes=((None, 0), 0, None))
        states, losses = step((params, padded.scales), states, batch)

    Attributes:
      peft: the plan of all, to wrap with.
      members: the plan of each.
    """

    peft: Peft
    members: tuple[Peft, ...]

    @property
    def scales(self) -> dict[Path, Array]:
        """The scale of each low-rank product, by its place in phi: `(members,)`.

        In float32, or the dtype of `b` where that is wider.
        """
        each = [dict(_scales(member)) for member in self.members]
        dtypes = {path: wide(dtype) for path, _, dtype in self.peft.phi}
        return {
            place: jnp.array([own[place] for own in each], dtypes[f'{place}/b'])
            for place in each[0]
        }

    def pad(self, phis: Sequence[Phi]) -> Phi:
        """The stack of one phi for each member, all of them padded by zeros.

        Args:
          phis: as from `init` of each member's plan.

        Raises:
          ValueError: there are not as many as members, or one is not of its plan.
        """
        self._check_count(len(phis))
        shapes = {path: shape for path, shape, _ in self.peft.phi}
        for member, phi in zip(self.members, phis, strict=True):
            member._check_phi(phi)
        return stack([_paths.mapped(lambda path, x: _filled(x, shapes[path]), phi) for phi in phis])

    def cut(self, stacked: Phi) -> list[Phi]:
        """The phi of each member, without the padding.

        Args:
          stacked: as from `pad`.

        Raises:
          ValueError: it does not hold as many as there are members, or not padded ones.
        """
        self._check_count(size(stacked))
        phis = unstack(stacked)
        self.peft._check_phi(phis[0])
        found = []
        for member, phi in zip(self.members, phis, strict=True):
            shapes = {path: shape for path, shape, _ in member.phi}
            cut = lambda path, x, shapes=shapes: x[tuple(map(slice, shapes[path]))]
            found.append(_paths.mapped(cut, phi))
        return found

    def scaled(self, phi: Phi, scale: Mapping[Path, Array]) -> Phi:
        """The phi of a member as `peft` takes it, with its own scale in `b`.

        Args:
          phi: of one member, padded; of several under `jax.vmap`.
          scale: its entries of `scales`: one scalar each.

        Returns:
          Phi whose `b` have the dtypes of their scales: rounded to a narrow one, they would not be
          those of the member.

        Raises:
          ValueError: a place of a low-rank product has no scale, another has one, or it is not one
            scalar.
        """
        places = {place for place, _ in _scales(self.peft)}
        shapes = {place: jnp.shape(value) for place, value in scale.items()}
        if odd := sorted(places ^ set(scale)) or sorted(p for p in places if shapes[p]):
            said = f'shape {shapes[odd[0]]}' if odd[0] in shapes else 'none'
            raise ValueError(
                f'a member has one scalar for each low-rank product; got {said} at {odd[0]!r}. '
                'Give its entries of padded.scales, under jax.vmap those of all'
            )
        own = {f'{place}/b': value for place, value in scale.items()}
        scaled = lambda path, x: x.astype(own[path].dtype) * own[path] if path in own else x
        return _paths.mapped(scaled, phi)

    def _check_count(self, count: int) -> None:
        if count != len(self.members):
            raise ValueError(f'there must be a phi for each of {len(self.members)}; got {count}')


def _scales(peft: Peft) -> Iterator[tuple[Path, float]]:
    for (keys, part), chosen in zip(peft.method.parts, peft.sites, strict=True):
        if isinstance(part, LowRankMethod):
            for site in chosen:
                yield '/'.join((*keys, site.path)), part.scale_at(site)


def _widest(pefts: Sequence[Peft]) -> Peft:
    """The plan with the largest rank of all at each site."""
    first, methods = pefts[0], {}
    for index, ((keys, part), chosen) in enumerate(
        zip(first.method.parts, first.sites, strict=True)
    ):
        own: Any = [peft.method.parts[index][1] for peft in pefts]
        if isinstance(part, LowRankMethod):
            part = part.of_ranks({s.path: max(one.rank_at(s) for one in own) for s in chosen})
        methods[keys] = part
    shapes = [
        (each[0][0], tuple(map(max, *(shape for _, shape, _ in each), each[0][1])), each[0][2])
        for each in zip(*(peft.phi for peft in pefts), strict=True)
    ]
    return dataclasses.replace(first, method=replaced(first.method, methods), phi=tuple(shapes))


def _filled(array: Array, shape: tuple[int, ...]) -> Array:
    return jnp.pad(array, [(0, to - n) for n, to in zip(array.shape, shape, strict=True)])


def _difference(first: Peft, other: Peft) -> str:
    """How a plan differs from the first in more than ranks and scales."""
    if first.leaves != other.leaves:
        return 'is of another model: paths, shapes or dtypes of the parameters differ'
    if [keys for keys, _ in first.method.parts] != [keys for keys, _ in other.method.parts]:
        return f'is {other.method!r}, the first {first.method!r}'
    for (_, one), (_, own), mine, theirs in zip(
        first.method.parts, other.method.parts, first.sites, other.sites, strict=True
    ):
        if odd := sorted({s.path for s in mine} ^ {s.path for s in theirs}):
            return f'has not the same sites: {", ".join(map(repr, odd[:5]))}'
        if mine != theirs:
            return 'was attached with other arguments: sites have other shapes'
        if _bare(one) != _bare(own):
            return f'is {own!r}, the first {one!r}'
    return ''


def _bare(method: Method) -> Method:
    """The method without its ranks and scales; the sites say what its target finds."""
    if isinstance(method, LowRankMethod):
        method = method.of_ranks({'': 1})
    return dataclasses.replace(method, target='.')
