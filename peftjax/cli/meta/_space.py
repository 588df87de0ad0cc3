"""One method over the encoder: features of texts, a head for each task, and its loss.

The head of a task begins as the prototypes of its support (Proto-MAML, Triantafillou et al.,
Meta-Dataset, 2020, arXiv:1903.03096, section 3): kernel `2 s c` and bias `-s |c|^2`, of class
means `c` and sharpness `s`, are the softmax over `-s` times squared distances. So before the first
step every method is the nearest prototype in its own features, and no luck of a drawn head is in
the way.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from peftjax import Chain, Method, Peft, attach, chain, data, meta
from peftjax.cli.meta._ground import Ground, embed

BODY, HEAD = 'body', 'head'
"""The parts of a phi: what a method adds to the encoder, and the classifier of a task."""


@dataclasses.dataclass(frozen=True)
class Space:
    """A method attached to the encoder.

    Attributes:
      peft: its plan; its phi is `{'body': …}`.
      forward: the encoder with it.
      ways: classes of a task.

    Theta is that of `Ground`, with the `sharpness` of the softmax that heads begin as.
    """

    peft: Peft
    forward: Callable[..., jax.Array]
    ways: int

    def embed(self, theta: Any, phi: Any, index: Any, key: Any = None) -> jax.Array:
        """Features of texts at positions, `(rows, width)`."""
        del key  # nothing is drawn
        own = {BODY: phi[BODY]}
        apply = lambda params, ids, **mask: self.forward(params, own, ids, **mask)
        return embed(apply, theta, index)

    def begin(self, theta: Any, phi: Any, support: data.Shots, key: Any = None) -> dict[str, Any]:
        """The head that a task begins with."""
        features, labels = self.embed(theta, phi, support.inputs), jnp.asarray(support.labels)
        return {HEAD: head(meta.prototypes(features, labels, self.ways), theta['sharpness'])}

    def logits(self, theta: Any, phi: Any, index: Any) -> jax.Array:
        """`(rows, ways)`."""
        return self.embed(theta, phi, index) @ phi[HEAD]['kernel'] + phi[HEAD]['bias'][None]

    def loss(self, theta: Any, phi: Any, shots: data.Shots, key: Any) -> jax.Array:
        """The mean cross-entropy of a support or a query."""
        del key
        said = self.logits(theta, phi, shots.inputs)
        return optax.softmax_cross_entropy_with_integer_labels(said, shots.labels).mean()

    def accuracy(self, theta: Any, phi: Any, shots: data.Shots) -> jax.Array:
        """The part that gets the right label, in percent."""
        right = self.logits(theta, phi, shots.inputs).argmax(-1) == shots.labels
        return 100 * right.astype(jnp.float32).mean()


def head(means: jax.Array, sharpness: jax.Array) -> dict[str, jax.Array]:
    """The classifier that is nearest to prototypes `(ways, width)`."""
    return {'kernel': 2 * sharpness * means.T, 'bias': -sharpness * jnp.square(means).sum(-1)}


def attached(ground: Ground, method: Method) -> tuple[Peft, Callable[..., jax.Array]]:
    """A method's plan over the encoder, and the encoder with it."""
    shape = jax.ShapeDtypeStruct((1, ground.length), jnp.int32)
    whole: Chain = chain(**{BODY: method})
    peft = attach(whole, ground.apply, ground.theta['params'], shape, attention_mask=shape)
    return peft, peft.wrap(ground.apply)
