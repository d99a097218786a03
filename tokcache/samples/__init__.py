"""Tiny tokenizers, models and LoRA adapters, made on demand: real formats, random weights.

The demo, the tests and the benchmarks need a model that loads in a second and whose output shows
every difference, and a tokenizer that needs no network. Files are kept in the user's cache folder;
each name contains a digest of everything that the file was made from.
"""

from tokcache.samples.files import cache_folder
from tokcache.samples.models import ARCHITECTURES, tiny_lora, tiny_model
from tokcache.samples.tokenizer import CHAT_TEMPLATE, tiny_tokenizer

__all__ = [
    "ARCHITECTURES",
    "CHAT_TEMPLATE",
    "cache_folder",
    "tiny_lora",
    "tiny_model",
    "tiny_tokenizer",
]
