"""Text files to batches: labelled texts, and conversations or texts for language models; few-shot
episodes of anything that has labels.

Pure numpy. This wing imports nothing else of peftjax, and neither jax nor transformers; grain when
`Batches` is built.
"""

from peftjax.data._batches import Batch as Batch
from peftjax.data._batches import Tokens as Tokens
from peftjax.data._batches import encode as encode
from peftjax.data._batches import take as take
from peftjax.data._episodes import Episode as Episode
from peftjax.data._episodes import Episodes as Episodes
from peftjax.data._episodes import Shots as Shots
from peftjax.data._episodes import episode as episode
from peftjax.data._prompts import encode_prompt as encode_prompt
from peftjax.data._records import Record as Record
from peftjax.data._records import load_records as load_records
from peftjax.data._rows import LanguageBatch as LanguageBatch
from peftjax.data._rows import Rows as Rows
from peftjax.data._rows import one_per_row as one_per_row
from peftjax.data._rows import pack as pack
from peftjax.data._samples import Sample as Sample
from peftjax.data._samples import encode_records as encode_records
from peftjax.data._sampling import epochs as epochs
from peftjax.data._sampling import few_shot as few_shot
from peftjax.data._sampling import in_order as in_order
from peftjax.data._sampling import shot_indices as shot_indices
from peftjax.data._stream import Batches as Batches
from peftjax.data._text import Examples as Examples
from peftjax.data._text import default_messages as default_messages
from peftjax.data._text import load_labelled as load_labelled
