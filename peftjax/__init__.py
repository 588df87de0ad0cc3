"""Parameter-efficient fine-tuning for any JAX function."""

from peftjax._attach import Peft as Peft
from peftjax._attach import attach as attach
from peftjax._attach import sites as sites
from peftjax._chain import Chain as Chain
from peftjax._chain import chain as chain
from peftjax.methods.lora import Lora as Lora

__version__ = '0.1.0'
