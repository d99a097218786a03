"""Small tokenizers, one of each kind of model, trained here, and texts to encode."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer

TRAINING = [
    "The quick brown fox jumps over the lazy dog.",
    "def hello(name): return f'Hello, {name}!'",
    "A hello to the world, and a world of hellos: 1, 2, 3, 42.",
    "ünïcode, naïve café; русский текст, 東京",
] * 4

TEXTS = [
    "",
    " ",
    "hello world",
    "Hello  WORLD\n\n\tthe quick <s> fox</s>",
    "<mask>hello <mask> <x>y<x>",
    "naïve café 東京 \u200b \U0001f469\u200d\U0001f469",
    "a" * 300,
]


def byte_level_bpe() -> Tokenizer:
    """Return BPE over bytes that puts <s> before a text and </s> after it."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        TRAINING,
        BpeTrainer(
            vocab_size=330,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    made.add_tokens([AddedToken("<x>", rstrip=True), AddedToken("ello", single_word=True)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )
    return made


def word_piece() -> Tokenizer:
    """Return a tokenizer like BERT's: lower case, [CLS] and [SEP]."""
    made = Tokenizer(WordPiece(unk_token="[UNK]"))  # noqa: S106 (no password)
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]", "<s>", "<mask>"]
    trainer = WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    made.train_from_iterator(TRAINING, trainer)
    made.add_tokens([AddedToken("QUICK", normalized=True)])
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return made


def unigram() -> Tokenizer:
    """Return a tokenizer like SentencePiece's, with a marker before the first word only."""
    made = Tokenizer(Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.train_from_iterator(
        TRAINING,
        UnigramTrainer(
            vocab_size=120,
            special_tokens=["<unk>", "<s>", "</s>"],
            unk_token="<unk>",  # noqa: S106 (no password)
            show_progress=False,
        ),
    )
    made.add_special_tokens(["<mask>"])
    return made


def word_level() -> Tokenizer:
    """Return a tokenizer of whole words, with type ids other than 0."""
    vocabulary = {"?": 0, "hello": 1, "world": 2, "[A]": 3}
    made = Tokenizer(WordLevel(vocabulary, unk_token="?"))  # noqa: S106 (no password)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[A]:2 $A:1", special_tokens=[("[A]", 3)]
    )
    return made


@cache
def _serialised(make: Callable[[], Tokenizer]) -> str:
    return make().to_str()  # trained once, because the trainers break ties at random


def _from_serialised(make: Callable[[], Tokenizer]) -> Callable[[], Tokenizer]:
    return lambda: Tokenizer.from_str(_serialised(make))


KINDS = (byte_level_bpe, word_piece, unigram, word_level)
MADE: dict[str, Callable[[], Tokenizer]] = {kind.__name__: _from_serialised(kind) for kind in KINDS}


def fast(tokenizer: Tokenizer, **settings: Any) -> Any:
    """Return a fast transformers tokenizer whose backend is `tokenizer`."""
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 (seconds to import)

    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=tokenizer, **settings)
