"""IA3: Infused Adapter by Inhibiting and Amplifying Inner Activations (Liu et al. 2022)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp

from peftjax import _paths
from peftjax._factor import along
from peftjax._method import At, Method, OutputRule, Rule, float32
from peftjax._sites import Site, Sites
from peftjax._standin import StandIn, place
from peftjax._types import Array, Path, Phi


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ia3(Method):
    """Rescales activations: `l * (x @ w + bias)`, or `(l * x) @ w` where it feeds forward.

    Attributes:
      target: regex, or several, searched in paths: usually keys, values, the second dense layer of
        the MLP.
      feedforward: regex for those among them whose input is scaled instead of their output; empty
        for none.
      dtype: of phi.

    Shapes: `l: (*stack, *out)`, for inputs `(*stack, *in)`. At init `l = 1`: the model equals the
    base bit for bit.

    Raises:
      ValueError: from `attach`, a target finds nothing, or a convolution's input is to be scaled;
        from `merge`, a leaf or its bias is also used elsewhere.

    Example:
      >>> import jax, jax.numpy as jnp, peftjax as pj
      >>> params = {'up': {'kernel': jnp.ones((3, 4)), 'bias': jnp.ones(4)}}
      >>> peft = pj.attach(
      ...     pj.Ia3(target='kernel'),
      ...     lambda p, x: x @ p['up']['kernel'] + p['up']['bias'], params, jnp.ones((5, 3)))
      >>> jax.tree.map(jnp.shape, peft.init(jax.random.key(0), params))
      {'up/kernel': {'l': (4,)}}

    Reference: Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
    In-Context Learning, arXiv:2205.05638, section 3.3.
    """

    feedforward: str = ''
    dtype: str = 'float32'

    kinds: ClassVar[tuple[str, ...]] = ('linear', 'expert', 'convolution')
    seam: ClassVar[str] = 'output'
    identity: ClassVar[str] = 'exact'
    mergeable: ClassVar[bool] = True

    def select(self, sites: Sites) -> tuple[Site, ...]:
        """See `Method`."""
        chosen = super().select(sites)
        forward = [site for site in chosen if self.feeds(site)]
        if self.feedforward and not forward:
            raise ValueError(
                f'no site of target matches feedforward={self.feedforward!r}. Let the target find '
                "such a layer, or set feedforward to ''"
            )
        for site in forward:
            if site.kind == 'convolution':
                raise ValueError(
                    f'the input of a convolution cannot be scaled by a weight: {site.path!r}. '
                    'Leave it out of feedforward'
                )
        return chosen

    def init(self, key: Array, sites: tuple[Site, ...], params: Mapping[Path, Any]) -> Phi:
        """See `Method`; neither key nor weights are looked at."""
        del key, params
        return {
            site.path: {'l': jnp.ones(site.sizes(self._axes(site)), self.dtype)} for site in sites
        }

    def axes(self, site: Site) -> Mapping[str, tuple[int | None, ...]]:
        """See `Method`."""
        return {'l': self._axes(site)}

    def bind(self, site: Site, w: Any, phi: Phi, key: Array | None) -> StandIn:
        """See `Method`."""
        del key
        rule = ScaleInput() if self.feeds(site) else ScaleOutput()
        return StandIn.over(site, w, *along(phi, self.axes(site), site.rank), rule)

    def merge(self, site: Site, leaves: Mapping[Path, Array], phi: Phi) -> Mapping[Path, Array]:
        """See `Method`; the bias is scaled with the weight."""
        if site.shared:
            raise ValueError(
                f'{site.path!r} is used in several ways: scaling it for one would change the '
                'others. Keep phi'
            )
        scale = float32(phi['l'])
        scaled = leaves[site.path] * place(scale, self._axes(site), site.rank)
        if self.feeds(site):
            return {site.path: scaled}
        if site.bias_shared:
            raise ValueError(
                f'{site.bias_shared[0]!r}, the bias of {site.path!r}, is used by something else, '
                'too: scaling it with its layer would change that. Keep phi, or leave the layer '
                'out of the target'
            )
        biases = zip(site.bias, site.bias_axes, strict=True)
        return {site.path: scaled, **{p: _along(leaves[p], scale, axes) for p, axes in biases}}

    def feeds(self, site: Site) -> bool:
        """Whether the input of a site is scaled, not its output."""
        return bool(self.feedforward) and _paths.matches(self.feedforward, site.path)

    def _axes(self, site: Site) -> tuple[int, ...]:
        return (*site.stack, *(site.inputs if self.feeds(site) else site.outputs))


def _along(bias: Array, scale: Array, axes: tuple[int, ...]) -> Array:
    """A bias times the scale of its layer, whose numbers lie along these axes of it."""
    scale = jnp.reshape(scale, [bias.shape[axis] for axis in axes])
    return bias * place(scale, axes, bias.ndim)


@dataclasses.dataclass(frozen=True)
class ScaleOutput(OutputRule):
    """`l * y`, the bias being part of `y`."""

    def fits(self, at: At) -> bool:
        """The factor lies along the output."""
        return at.produced('l')

    def post(self, at: At, x: Array, y: Array) -> Array:
        """Scales the output."""
        del x
        return y * at.on_output(y, 'l')


@dataclasses.dataclass(frozen=True)
class ScaleInput(Rule):
    """`(l * x) @ w`."""

    def fits(self, at: At) -> bool:
        """The factor lies along the input."""
        return at.summed('l')

    def pre(self, at: At, x: Array) -> Array:
        """Scales the input."""
        return x * at.on_input(x, 'l')

    def dense(self, view: StandIn, w: Array) -> Array:
        """The weight with its rows scaled."""
        return w * view.factors['l'].astype(w.dtype)
