"""Labelled text: files to examples, few-shot samples, padded batches. Pure numpy.

This wing imports nothing else of peftjax, and neither jax nor transformers.
"""

from peftjax.data._batches import Batch as Batch
from peftjax.data._batches import Tokens as Tokens
from peftjax.data._batches import encode as encode
from peftjax.data._batches import take as take
from peftjax.data._sampling import epochs as epochs
from peftjax.data._sampling import few_shot as few_shot
from peftjax.data._sampling import in_order as in_order
from peftjax.data._sampling import shot_indices as shot_indices
from peftjax.data._text import Examples as Examples
from peftjax.data._text import default_messages as default_messages
from peftjax.data._text import load_labelled as load_labelled
