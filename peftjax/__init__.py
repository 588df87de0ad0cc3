"""Parameter-efficient fine-tuning for any JAX function."""

from peftjax._attach import Peft as Peft
from peftjax._attach import attach as attach
from peftjax._attach import sites as sites
from peftjax._chain import Chain as Chain
from peftjax._chain import chain as chain
from peftjax._method import Method as Method
from peftjax._sites import Site as Site
from peftjax._sites import Sites as Sites
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
from peftjax.optim import masked_optimizer as masked_optimizer
from peftjax.train import TrainState as TrainState
from peftjax.train import start as start
from peftjax.train import train_step as train_step
from peftjax.wrap import Forward as Forward
from peftjax.wrap import Wrapped as Wrapped
from peftjax.wrap import adapter_wrap as adapter_wrap
from peftjax.wrap import lora_wrap as lora_wrap
from peftjax.wrap import method_wrap as method_wrap
from peftjax.wrap import prefix_wrap as prefix_wrap
from peftjax.wrap import prompt_prepend as prompt_prepend

__version__ = '0.1.0'
