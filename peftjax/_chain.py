"""Several methods on one model."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from peftjax._method import Method, site_key
from peftjax._sites import Site
from peftjax._types import Array


@dataclasses.dataclass(frozen=True)
class Chain:
    """Several methods, the first listed closest to the weights; made by `chain`.

    Attributes:
      methods: the methods with the names of their phi.
    """

    methods: 'tuple[tuple[str, Method | Chain], ...]'

    @property
    def parts(self) -> tuple[tuple[tuple[str, ...], Method], ...]:
        """The methods, each with the keys of its phi."""
        return tuple(
            ((name, *keys), part) for name, method in self.methods for keys, part in method.parts
        )

    def folded(self) -> 'Chain':
        """The same with every method folded."""
        return Chain(tuple((name, method.folded()) for name, method in self.methods))


def chain(*methods: Method | Chain, **named: Method | Chain) -> Chain:
    """Uses several methods at once: phi is `{method name: phi of that method}`.

    On one weight the first method listed stands closest to it, in `wrap` and in `merge`.

    Args:
      *methods: named after their classes (`lora`, `bit_fit`, a second `lora` is `lora_2`).
      **named: methods with names of the user's choice.

    Returns:
      A method for `attach`.

    Raises:
      ValueError: there is no method, or two of one name, or a name is no identifier.
      TypeError: an argument is not a method.

    Example:
      >>> import peftjax as pj
      >>> both = pj.chain(pj.Lora(rank=4, target='query'), head=pj.Trainable(target='classifier'))
      >>> [name for name, _ in both.methods]
      ['lora', 'head']
    """
    found: list[tuple[str, Method | Chain]] = []
    for method in methods:
        name = _snake(type(method).__name__)
        again = sum(re.fullmatch(rf'{name}(_\d+)?', other) is not None for other, _ in found)
        found.append((f'{name}_{again + 1}' if again else name, method))
    found += named.items()
    names = [name for name, _ in found]
    if not names or len(set(names)) < len(names) or not all(map(str.isidentifier, names)):
        raise ValueError(
            f'a chain needs methods, each with an identifier of its own as its name; got {names}'
        )
    for name, method in found:
        if not isinstance(method, Method | Chain):
            raise TypeError(f'a chain is made of methods; {name!r} is {method!r}')
    return Chain(tuple(found))


def replaced(
    method: Method | Chain, new: Mapping[tuple[str, ...], Method], keys: tuple[str, ...] = ()
) -> Method | Chain:
    """The same chain of other methods.

    Args:
      method: a chain, or one method.
      new: a method for each of its parts, by the keys of its phi.
      keys: of this chain.
    """
    if isinstance(method, Method):
        return new[keys]
    return Chain(
        tuple((name, replaced(inner, new, (*keys, name))) for name, inner in method.methods)
    )


def part_keys(
    key: Array, parts: Sequence[Method], chosen: Sequence[tuple[Site, ...]]
) -> Iterator[Array]:
    """A key for each part of a chain, which does not depend on the parts beside it.

    Where an earlier part of the same kind adapts the same paths, it is another one.
    """
    taken: Counter[tuple[str, str]] = Counter()
    for part, mine in zip(parts, chosen, strict=True):
        kind = type(part).__name__
        places = {(kind, site.path) for site in mine}
        again = max((taken[place] for place in places), default=0)
        taken.update(places)
        yield site_key(key, f'{kind}/{again}')


def _snake(name: str) -> str:
    return re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', name).lower()
