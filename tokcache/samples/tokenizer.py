"""A small byte-level BPE tokenizer with ChatML special tokens, trained from Python's own manual."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tokcache.errors import TokcacheError
from tokcache.samples.files import cache_folder, digest, write_once

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen2's pattern: llama.cpp calls it "qwen2", and most chat models use it or a similar one.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_VOCAB_SIZE = 2048


def tiny_tokenizer(folder: str | os.PathLike[str] | None = None) -> Path:
    """Return the path of a tokenizer.json with 2,048 tokens, trained at the first call.

    A tokenizer_config.json is next to it, so that transformers can load the folder.
    The same versions of Python and tokenizers give the same bytes.
    """
    from tokenizers import __version__  # noqa: PLC0415 (only to make samples)

    try:
        from pydoc_data.topics import topics  # noqa: PLC0415 (half a megabyte)
    except ImportError:
        raise TokcacheError(
            "this Python lacks pydoc_data.topics, the text that the tiny tokenizer is trained on;"
            " pass your own tokenizer.json"
        ) from None
    texts = [topics[key] for key in sorted(topics)]
    name = f"tiny-tokenizer-{digest(texts, __version__)}"
    home = cache_folder(folder) / name
    # tokenizer.json is written last: if it exists, the folder is complete.
    write_once(home / "tokenizer_config.json", _write_config)
    return write_once(home / "tokenizer.json", lambda path: _train(texts).save(str(path)))


def _train(texts: list[str]) -> Tokenizer:
    from tokenizers import (  # noqa: PLC0415 (only to make samples)
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _write_config(path: Path) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
