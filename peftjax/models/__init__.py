"""Flax encoders (BERT, RoBERTa) and decoder language models, loaded from Hugging Face checkpoints.

This wing knows nothing of fine-tuning: a model here is an ordinary linen module, and
`model.apply_fn(params, input_ids, ...)` an ordinary function of its parameters.
"""

from peftjax.models._attention import attention as attention
from peftjax.models._attention import plain_attention as plain_attention
from peftjax.models._cache import Cache as Cache
from peftjax.models._compute import SAVED as SAVED
from peftjax.models._compute import Compute as Compute
from peftjax.models._config import EncoderConfig as EncoderConfig
from peftjax.models._config import read_config as read_config
from peftjax.models._decoder import Decoder as Decoder
from peftjax.models._decoder import HeadWeight as HeadWeight
from peftjax.models._decoder_config import DecoderConfig as DecoderConfig
from peftjax.models._encoder import Encoder as Encoder
from peftjax.models._encoder import SequenceClassifier as SequenceClassifier
from peftjax.models._encoder import mean_pool as mean_pool
from peftjax.models._families import read_decoder_config as read_decoder_config
from peftjax.models._hub import default_model_path as default_model_path
from peftjax.models._hub import model_folder as model_folder
from peftjax.models._kind import model_kind as model_kind
from peftjax.models._linears import embeddings as embeddings
from peftjax.models._linears import linears as linears
from peftjax.models._load import Loaded as Loaded
from peftjax.models._load import load_encoder as load_encoder
from peftjax.models._load import parameter_shapes as parameter_shapes
from peftjax.models._load_decoder import LoadedDecoder as LoadedDecoder
from peftjax.models._load_decoder import abstract_decoder as abstract_decoder
from peftjax.models._load_decoder import decoder_config as decoder_config
from peftjax.models._load_decoder import is_quantized as is_quantized
from peftjax.models._load_decoder import load_decoder as load_decoder
from peftjax.models._placement import decoder_rules as decoder_rules
from peftjax.models._placement import decoder_sharding as decoder_sharding
from peftjax.models._placement import encoder_rules as encoder_rules
from peftjax.models._placement import encoder_sharding as encoder_sharding
from peftjax.models._quantize_decoder import QuantizedFolder as QuantizedFolder
from peftjax.models._quantize_decoder import quantize_decoder as quantize_decoder
from peftjax.models._save_decoder import save_decoder as save_decoder
from peftjax.models._tokenizer import load_tokenizer as load_tokenizer
