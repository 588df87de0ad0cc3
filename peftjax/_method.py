"""What a fine-tuning method is: where it acts, what it trains, what it does at the use."""

import abc
import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from peftjax import _paths
from peftjax._factor import Factor
from peftjax._fields import dtype_name, pairs, settle
from peftjax._sites import Site, Sites
from peftjax._standin import StandIn
from peftjax._types import Array, Path, Phi, Target
from peftjax._uses import Use
from peftjax._virtual import Virtual


@dataclasses.dataclass(frozen=True)
class At:
    """The place where a rule acts: one use, with the factors at hand.

    Attributes:
      use: the equation, as geometry.
      view: the stand-in that arrived there.
      source: finds the value of a named value near this place.
      bias: the biases already added to the output.
    """

    use: Use
    view: StandIn
    source: Callable[[str], Array]
    bias: tuple[StandIn, ...] = ()

    def _factor(self, name: str, like: Array) -> Factor:
        return self.view.factor(name).astype(like.dtype)

    def summed(self, name: str) -> bool:
        """Whether a factor lies along the input of the use."""
        return self.use.summed(self.view.full(name))

    def produced(self, name: str) -> bool:
        """Whether a factor lies along the output of the use."""
        return self.use.produced(self.view.full(name))

    def down(self, x: Array, name: str, dtype: Any = None) -> Array:
        """Input to hidden."""
        factor = self.view.factor(name).astype(dtype or x.dtype)
        return self.use.down(x, factor)

    def up(self, h: Array, name: str) -> Array:
        """Hidden to output, in weight space."""
        return self.use.up(h, self._factor(name, h))

    def read(self, y: Array, name: str) -> Array:
        """Output to hidden."""
        return self.use.read(y, self._factor(name, y))

    def write(self, h: Array, name: str) -> Array:
        """Hidden to output, after `read`."""
        return self.use.write(h, self._factor(name, h))

    def on_output(self, y: Array, name: str) -> Array:
        """A factor that broadcasts against the output."""
        return self.use.on_output(y, self._factor(name, y))

    def on_input(self, x: Array, name: str) -> Array:
        """A factor that broadcasts against the input."""
        return self.use.on_input(x, self._factor(name, x))

    def on_hidden(self, h: Array, name: str) -> Array:
        """A factor that broadcasts against the hidden tensor."""
        return self.use.on_hidden(h, self._factor(name, h))


class Rule(abc.ABC):
    """What a method does where the weight is used. Static: hashable and comparable."""

    deferred: ClassVar[bool] = False
    """Whether `post` waits until the layer's own bias is added (the output seam)."""
    noted: ClassVar[bool] = True
    """Whether the plan tells how the uses of its weight are served."""

    def holds(self, view: StandIn) -> bool:
        """Whether the factors still say what the rule needs, after they were moved."""
        del view
        return True

    def fits(self, at: At) -> bool:
        """Whether `pre` and `post` can serve this use; otherwise it gets `dense`."""
        del at
        return True

    def pre(self, at: At, x: Array) -> Array:
        """Changes the input."""
        del at
        return x

    def run(self, at: At, x: Any, below: Callable[[Any], Any]) -> Any:
        """What the use yields before `post`: that of the weight below, unless there is none.

        Args:
          at: where.
          x: the input, after `pre`.
          below: the same use of what stands below.
        """
        del at
        return below(x)

    def post(self, at: At, x: Array, y: Array) -> Array:
        """Changes the output; `x` is the input before `pre`."""
        del at, x
        return y

    def scaled(self, number: float | None) -> 'Rule':
        """The rule where the output is multiplied with a number at once; `None`: with another."""
        del number
        return self

    @abc.abstractmethod
    def dense(self, view: StandIn, w: Array) -> Array:
        """The adapted weight, from the weight below."""


class OutputRule(Rule):
    """A rule of the output seam: it leaves the weight alone."""

    deferred: ClassVar[bool] = True

    def dense(self, view: StandIn, w: Array) -> Array:
        """The weight below: what acts on outputs acts where the leaf is used as a layer."""
        del view
        return w


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """A fine-tuning method: its fields are its configuration.

    Attributes:
      target: a regular expression searched in the paths of sites, or several, each of which
        must find something; stored as a tuple.
    """

    target: Target

    kinds: ClassVar[tuple[str, ...]]
    """The kinds of site that it can adapt."""
    seam: ClassVar[str]
    """`weight`, `output` or `leaf`."""
    mergeable: ClassVar[bool]
    """Whether phi can become part of ordinary parameters."""
    patterned: ClassVar[tuple[str, ...]] = ()
    """Fields of the form `((pattern, value), …)`, for settings of some sites."""
    named: ClassVar[tuple[str, ...]] = ()
    """Fields of the form `((name, value), …)`, for settings of some arguments."""

    def __post_init__(self) -> None:
        """Brings the fields that methods share into the form in which they are stored.

        A method with a check of its own calls this first.
        """
        name = type(self).__name__
        if isinstance(self.target, list):
            settle(self, target=tuple(self.target))
        for field in (*self.patterned, *self.named):
            settle(self, **{field: pairs(name, field, getattr(self, field))})
        if 'dtype' in vars(self):
            settle(self, dtype=dtype_name(name, vars(self)['dtype']))

    def select(self, sites: Sites) -> tuple[Site, ...]:
        """The sites that this method will adapt."""
        chosen = sites.select(self.target, self.kinds, type(self).__name__)
        unique: dict[Path, Site] = {}
        for site in chosen:
            if self.seam == 'output' and site.path in unique:
                raise ValueError(
                    f'{type(self).__name__} acts on the output of a layer; {site.path!r} is used '
                    f'in two ways ({unique[site.path].kind} and {site.kind}) with different '
                    'outputs. Leave it out of the target'
                )
            unique.setdefault(site.path, site)
        for field in self.patterned:
            for pattern, _ in getattr(self, field):
                _check_found(f'{type(self).__name__}.{field}', pattern, list(unique))
        return tuple(unique.values())

    @abc.abstractmethod
    def init(self, key: Array, sites: tuple[Site, ...], params: Mapping[Path, Any]) -> Phi:
        """A fresh phi; `params` holds the leaves by path."""

    @abc.abstractmethod
    def bind(self, site: Site, w: Any, phi: Phi, key: Array | None) -> Any:
        """What stands where the weight stood: a stand-in, or an array in place of the leaf.

        Args:
          site: where.
          w: the leaf, or the stand-in of the method below; `None` at a named value.
          phi: the arrays of this site.
          key: for dropout; `None` switches it off.
        """

    def axes(self, site: Site) -> Mapping[str, tuple[int | None, ...]]:
        """For arrays of phi at a site, the leaf axis that each dimension goes along, or `None`.

        Where the leaf is spread over a mesh, so are these arrays along the same axes; an array
        that is not told of lies whole on every device.
        """
        del site
        return {}

    def expand(self, sites: tuple[Site, ...], phi: Phi) -> Phi:
        """Phi with one entry for each site, where it is kept in another form."""
        del sites
        return phi

    def folded(self) -> 'Method':
        """The method whose phi is what `expand` returns."""
        return self

    def merge(self, site: Site, leaves: Mapping[Path, Array], phi: Phi) -> Mapping[Path, Array]:
        """The new leaves after merging one site, in float32 or wider.

        Raises:
          ValueError: this method has no place in the parameters.
        """
        adapted = self.bind(site, leaves[site.path], phi, None)
        return {site.path: adapted.dense() if isinstance(adapted, StandIn) else adapted}

    @property
    @abc.abstractmethod
    def identity(self) -> str:
        """How the model at init compares with the base: `exact`, `rounding` or `no`."""

    @property
    def virtual(self) -> Virtual | None:
        """The virtual tokens that it needs, if any."""
        return None

    @property
    def parts(self) -> tuple[tuple[tuple[str, ...], 'Method'], ...]:
        """The methods that this one is made of, each with the keys of its phi."""
        return (((), self),)


def _check_found(field: str, pattern: str, paths: list[Path]) -> None:
    """Refuses a pattern that finds none of the chosen sites."""
    if not any(_paths.matches(pattern, path) for path in paths):
        close = ', '.join(map(repr, _paths.nearest(pattern, paths)))
        raise ValueError(
            f'{field}: {pattern!r} matches none of the {len(paths)} sites of the target. '
            f'Nearest: {close}'
        )


def typed_key(key: Any) -> Array:
    """A key, checked.

    Raises:
      TypeError: it is not one typed PRNG key.
    """
    dtype, shape = getattr(key, 'dtype', None), getattr(key, 'shape', ())
    if dtype is None or shape or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        got = repr(key) if dtype is None else f'{dtype} of shape {shape}'
        raise TypeError(
            f'randomness comes from one typed PRNG key, jax.random.key(seed); got {got}. Of the '
            'data of a raw one jax.random.wrap_key_data(key) makes it'
        )
    return key


def site_key(key: Array, path: Path) -> Array:
    """A key for one path, the same whatever else is adapted."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def stacked_keys(key: Array, site: Site) -> Array:
    """One key for each stacked layer or expert of a site: shape `sizes(stack)`."""
    return jax.random.split(site_key(key, site.path), site.sizes(site.stack))


def float32(w: Any) -> Array:
    """An array wide enough to compute with."""
    w = jnp.asarray(w)
    wide = jnp.issubdtype(w.dtype, jnp.inexact) and jnp.finfo(w.dtype).bits >= 32
    return w if wide else w.astype(jnp.float32)
