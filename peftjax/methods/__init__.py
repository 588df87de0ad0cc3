"""The methods, one file each, named after the paper that brought it."""

from peftjax.methods.adapter import HOULSBY as HOULSBY
from peftjax.methods.adapter import PARALLEL as PARALLEL
from peftjax.methods.adapter import PFEIFFER as PFEIFFER
from peftjax.methods.adapter import SCALED_PARALLEL as SCALED_PARALLEL
from peftjax.methods.adapter import Adapter as Adapter
from peftjax.methods.bitfit import BitFit as BitFit
from peftjax.methods.dora import Dora as Dora
from peftjax.methods.ia3 import Ia3 as Ia3
from peftjax.methods.lora import Lora as Lora
from peftjax.methods.norm_tuning import NormTuning as NormTuning
from peftjax.methods.prefix import PrefixTuning as PrefixTuning
from peftjax.methods.prompt import PromptTuning as PromptTuning
from peftjax.methods.trainable import Trainable as Trainable
from peftjax.methods.trainable_tokens import TrainableTokens as TrainableTokens
