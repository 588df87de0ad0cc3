"""Meta-learning over phi: what to begin with, so that a few steps on a few examples suffice.

A task is a pair of batches, `(support, query)`: one to adapt on, one to be judged on. Tasks are
such a pair whose leaves have one more axis in front. Every algorithm gives a `Learner`, whose loss
over tasks is one for `pj.train_step`: optimizers, accumulation, checkpoints and `pj.fit` are those
of any training.
"""

from peftjax.meta._inner import adapter as adapter
from peftjax.meta._learner import Learner as Learner
from peftjax.meta.imaml import imaml as imaml
from peftjax.meta.maml import maml as maml
from peftjax.meta.meta_sgd import meta_sgd as meta_sgd
from peftjax.meta.prototypes import Prototypical as Prototypical
from peftjax.meta.prototypes import logits as logits
from peftjax.meta.prototypes import prototypes as prototypes
from peftjax.meta.prototypes import prototypical as prototypical
from peftjax.meta.reptile import reptile as reptile
