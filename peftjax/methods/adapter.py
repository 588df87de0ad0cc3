"""Bottleneck adapters: Parameter-Efficient Transfer Learning for NLP (Houlsby et al. 2019)."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from peftjax import _paths
from peftjax._factor import along
from peftjax._fields import number, positive, settle
from peftjax._method import At, Method, OutputRule, float32, site_key
from peftjax._sites import Site
from peftjax._standin import StandIn
from peftjax._types import Array, Path, Phi

ACTIVATIONS = {
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'gelu_tanh': jax.nn.gelu,
    'identity': lambda x: x,
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
    'tanh': jnp.tanh,
}
INITIAL = ('identity', 'bert', 'houlsby')
NORMS = ('', 'before', 'after', 'both')
SCALES = ('learned', 'channel')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter(Method):
    """Adds a small two-layer network to an output: `y + scale * up(activation(down(z)))`.

    `y` is the output of a layer after its own bias, or a named value; `z` is `y` itself, or
    another value that the model names (`source`).

    Attributes:
      target: regex, or several, searched in paths of sites; `@name` for named values.
      source: the named value that the adapter reads, the nearest in the same scope before or after
        the target; empty for the target itself. A later one is what the base makes of the target.
      reduction: width of the bottleneck is the number of outputs divided by this, at least 1.
      reductions: other reductions for some paths, `((pattern, reduction), …)`.
      activation: one of `gelu`, `gelu_tanh`, `identity`, `relu`, `silu`, `tanh`.
      scale: a number, `learned` (one number) or `channel` (one for each output).
      norm: a layer norm `before` the network, `after` it over the sum with `y`, `both`, or none.
      gate: multiply by `sigmoid(z @ gate + bias)`, averaged over the tokens of each example, which
        are the dimensions of `z` between the first and the outputs.
      initial: `identity` (`up = 0`, uniform `down`: He et al. 2022), `bert` (all weights
        N(0, 0.02)), `houlsby` (normal of deviation 0.01, cut at two deviations).
      dtype: of phi.

    Shapes: `down: (*stack, *out, width)`, `down_bias: (*stack, width)`, `up: (*stack, width,
    *out)`, `up_bias: (*stack, *out)`; norms `(*stack, *out)`. With `initial='identity'` and no norm
    after, the model at init equals the base bit for bit.

    Raises:
      ValueError: a field is out of range; from `attach`: a target finds nothing, a source is not in
        scope; from `merge`: always.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {'up': {'kernel': jnp.ones((3, 8)), 'bias': jnp.ones(8)}}
      >>> peft = pj.attach(
      ...     pj.Adapter(target='kernel', reduction=4),
      ...     lambda p, x: x @ p['up']['kernel'] + p['up']['bias'], params, jnp.ones((5, 3)))
      >>> jax.tree.map(jnp.shape, peft.init(jax.random.key(0), params)['up/kernel'])
      {'down': (8, 2), 'down_bias': (2,), 'up': (2, 8), 'up_bias': (8,)}

    Reference: Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247;
    He et al. 2022, arXiv:2110.04366 (parallel placement and scaling).
    """

    source: str = ''
    reduction: float = 16
    reductions: tuple[tuple[str, float], ...] = ()
    activation: str = 'relu'
    scale: float | str = 1.0
    norm: str = ''
    gate: bool = False
    initial: str = 'identity'
    dtype: str = 'float32'

    kinds: ClassVar[tuple[str, ...]] = ('linear', 'expert', 'embedding', 'convolution', 'named')
    seam: ClassVar[str] = 'output'
    mergeable: ClassVar[bool] = False
    patterned: ClassVar[tuple[str, ...]] = ('reductions',)

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = (
            ('activation', self.activation, tuple(ACTIVATIONS)),
            ('norm', self.norm, NORMS),
            ('initial', self.initial, INITIAL),
        )
        for field, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f'Adapter: {field} must be one of {allowed}; got {value!r}')
        if isinstance(self.scale, str) and self.scale not in SCALES:
            raise ValueError(
                f'Adapter: scale must be a number or one of {SCALES}; got {self.scale!r}'
            )
        if not isinstance(self.scale, str):
            settle(self, scale=number('Adapter', 'scale', self.scale))
        each = lambda value: positive('Adapter', 'a reduction', value)
        reductions = tuple((pattern, each(value)) for pattern, value in self.reductions)
        settle(self, reduction=each(self.reduction), reductions=reductions)
        if self.source and not self.source.startswith('@'):
            raise ValueError(f'Adapter: source must be a named value, @name; got {self.source!r}')

    @property
    def identity(self) -> str:
        """How the model at init compares with the base."""
        return 'exact' if self.initial == 'identity' and self.norm in ('', 'before') else 'no'

    def reduction_at(self, site: Site) -> float:
        """What the width is divided by at a site."""
        found = (r for pattern, r in self.reductions if _paths.matches(pattern, site.path))
        return next(found, self.reduction)

    def width(self, site: Site) -> int:
        """Width of the bottleneck at a site."""
        return max(1, int(site.fan_out // self.reduction_at(site)))

    def init(self, key: Array, sites: tuple[Site, ...], params: Mapping[Path, Any]) -> Phi:
        """See `Method`; the weights are not looked at."""
        del params
        return {site.path: self._fresh(site_key(key, site.path), site) for site in sites}

    def _fresh(self, key: Array, site: Site) -> dict[str, Array]:
        stack, out, width = site.sizes(site.stack), site.sizes(site.outputs), self.width(site)
        first, second, third = jax.random.split(key, 3)
        zeros, ones = (lambda *s: jnp.zeros(s, self.dtype)), (lambda *s: jnp.ones(s, self.dtype))
        phi = {
            'down': self._weights(first, (*stack, *out, width), site.fan_out),
            'down_bias': zeros(*stack, width),
            'up': self._weights(second, (*stack, width, *out), 0),
            'up_bias': zeros(*stack, *out),
        }
        if self.scale == 'learned':
            phi['scale'] = ones(*stack)
        if self.scale == 'channel':
            phi['scale'] = ones(*stack, *out)
        for side in ('before', 'after'):
            if self.norm in (side, 'both'):
                phi |= {f'{side}_scale': ones(*stack, *out), f'{side}_bias': zeros(*stack, *out)}
        if self.gate:
            phi |= {
                'gate': self._weights(third, (*stack, *out, 1), site.fan_out),
                'gate_bias': zeros(*stack, 1),
            }
        return phi

    def _weights(self, key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
        """Weights of one layer; those that the paper starts at zero have no `fan_in`."""
        if self.initial == 'bert':
            return 0.02 * jax.random.normal(key, shape, self.dtype)
        if self.initial == 'houlsby':
            return 0.01 * jax.random.truncated_normal(key, -2, 2, shape, self.dtype)
        bound = fan_in**-0.5 if fan_in else 0.0
        return jax.random.uniform(key, shape, self.dtype, -bound, bound)

    def axes(self, site: Site) -> Mapping[str, tuple[int | None, ...]]:
        """See `Method`."""
        whole = (*site.stack, *site.outputs)
        norms = (f'{side}_{part}' for side in ('before', 'after') for part in ('scale', 'bias'))
        return {
            **dict.fromkeys(('up_bias', *norms), whole),
            **dict.fromkeys(('down', 'gate'), (*whole, None)),
            **dict.fromkeys(('down_bias', 'gate_bias'), (*site.stack, None)),
            'up': (*site.stack, None, *site.outputs),
            'scale': whole if self.scale == 'channel' else site.stack,
        }

    def bind(self, site: Site, w: Any, phi: Phi, key: Array | None) -> StandIn:
        """See `Method`."""
        del key
        return StandIn.over(site, w, *along(phi, self.axes(site), site.rank), Bottleneck(self))

    def merge(self, site: Site, leaves: Mapping[Path, Array], phi: Phi) -> Mapping[Path, Array]:
        """See `Method`: refuses."""
        del leaves, phi
        raise ValueError(
            f'an adapter is not linear: it cannot be folded into the weight before it '
            f'({site.path!r}). Keep phi, or use Lora'
        )


@dataclasses.dataclass(frozen=True)
class Bottleneck(OutputRule):
    """The network at the output."""

    method: Adapter

    def fits(self, at: At) -> bool:
        """The network covers the outputs whole."""
        return at.produced('down')

    def post(self, at: At, x: Array, y: Array) -> Array:
        """Adds the network's output."""
        del x
        method, z = self.method, self._input(at, y)
        inner = _normalized(at, z, 'before') if method.norm in ('before', 'both') else z
        h = at.read(inner, 'down')
        h = _activated(h, at.on_hidden(h, 'down_bias'), method.activation)
        u = at.write(h, 'up')
        u = u + at.on_output(u, 'up_bias')
        if isinstance(method.scale, str):
            u = u * at.on_output(u, 'scale')
        elif method.scale != 1:
            u = u * method.scale
        if method.gate:
            u = u * self._opening(at, z)
        out = lax.add(y, lax.convert_element_type(u, y.dtype))
        return _normalized(at, out, 'after') if method.norm in ('after', 'both') else out

    def _input(self, at: At, y: Array) -> Array:
        """What the network reads."""
        if not self.method.source:
            return y
        z = at.source(self.method.source[1:])
        if z.shape != y.shape:
            raise ValueError(
                f'an adapter reads a value of the shape of its target; {self.method.source} has '
                f'{z.shape}, {at.view.path!r} {y.shape}. Choose another source'
            )
        return z.astype(y.dtype)

    def _opening(self, at: At, z: Array) -> Array:
        """The gate: one number for each example, or for each of its rows at an expert."""
        g = at.read(z, 'gate')
        g = at.use.spread(jax.nn.sigmoid(g + at.on_hidden(g, 'gate_bias')), z)
        others = [axis for axis in range(z.ndim) if axis not in at.use.outputs(z)]
        return jnp.mean(g, others[len(at.use.batch) + 1 :], keepdims=True)


@partial(jax.jit, static_argnums=2, inline=True)
def _activated(h: Array, bias: Array, activation: str) -> Array:
    """The hidden layer; traced once for all of one shape."""
    return ACTIVATIONS[activation](h + bias)


def _normalized(at: At, x: Array, side: str, epsilon: float = 1e-5) -> Array:
    """Layer norm over the outputs."""
    axes = at.use.outputs(x)
    wide = float32(x)
    mean = wide.mean(axes, keepdims=True)
    variance = jnp.square(wide - mean).mean(axes, keepdims=True)
    normal = ((wide - mean) * jax.lax.rsqrt(variance + epsilon)).astype(x.dtype)
    return normal * at.on_output(x, f'{side}_scale') + at.on_output(x, f'{side}_bias')


HOULSBY = Adapter(target=('@attention_output', '@mlp_output'), activation='silu', initial='bert')
"""After attention and after the MLP (Houlsby et al. 2019), on models that name these values."""

PFEIFFER = Adapter(target='@mlp_output', source='@mlp_residual', initial='bert')
"""After the MLP only, reading the norm's output (Pfeiffer et al. 2020); for post-norm models."""

PARALLEL = Adapter(target='@mlp_output', source='@attention_residual', reduction=2, scale=4.0)
"""Beside the MLP, reading the MLP's input stream (He et al. 2022)."""

SCALED_PARALLEL = dataclasses.replace(PARALLEL, scale='learned')
"""The same with a learned scale."""
