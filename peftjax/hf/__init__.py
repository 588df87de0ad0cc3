"""Adapters of other libraries: Hugging Face PEFT's folders in and out, AdapterHub's in."""

from peftjax.hf._load import LoadedAdapter as LoadedAdapter
from peftjax.hf._load import load_adapter as load_adapter
from peftjax.hf._names import hugging_face_name as hugging_face_name
from peftjax.hf._save import save_adapter as save_adapter
