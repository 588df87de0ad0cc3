"""Adapters of other libraries: folders of Hugging Face PEFT and AdapterHub, in and out."""

from peftjax.hf._load import LoadedAdapter as LoadedAdapter
from peftjax.hf._load import load_adapter as load_adapter
from peftjax.hf._names import hugging_face_name as hugging_face_name
from peftjax.hf._save import save_adapter as save_adapter
