"""Helpers of vLLM, SGLang, Triton's OpenAI frontend and NeMo, written from their behaviour.

None of these can be installed without its GPU stack; each helper here does the same operations on
a tokenizer, in the same order, as the original.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.ecosystem.cases.copies import answers
from tests.ecosystem.given import TEXTS, Given, case


def _with_cached_properties(tokenizer: Any) -> Any:
    """Return a copy with another class, as vLLM does: properties are computed once."""
    made = copy.copy(tokenizer)
    special_ids, special_tokens = tokenizer.all_special_ids, tokenizer.all_special_tokens
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    size = len(tokenizer)

    class Cached(tokenizer.__class__):  # type: ignore[misc]
        @property
        def all_special_ids(self) -> Any:
            return special_ids

        @property
        def all_special_tokens(self) -> Any:
            return special_tokens

        @property
        def max_token_id(self) -> int:
            return max(vocabulary.values())

        def get_vocab(self) -> Any:
            return vocabulary

        def __len__(self) -> int:
            return size

        def __reduce__(self) -> Any:
            return _with_cached_properties, (tokenizer,)

    Cached.__name__ = f"Cached{tokenizer.__class__.__name__}"
    made.__class__ = Cached
    return made


@case("vLLM", "its tokenizer with cached properties: copy, subclass, class assigned, pickled")
def vllm_cached(given: Given) -> Any:
    made = _with_cached_properties(given.load())
    again = pickle.loads(pickle.dumps(made))
    deep = copy.deepcopy(made)
    extra = made.max_token_id, made.all_special_ids, len(made), type(made).__name__
    return extra, answers(made), answers(again), answers(deep), type(again).__name__


def _pooled(tokenizer: Any, n_copies: int = 2) -> Any:
    """Change the tokenizer's class in place, so that calls go to a pool of deep copies."""
    original = copy.copy(tokenizer)
    pool: queue.Queue[Any] = queue.Queue()
    for _ in range(n_copies):
        pool.put(copy.deepcopy(original))

    @contextlib.contextmanager
    def borrowed() -> Iterator[Any]:
        one = pool.get()
        try:
            yield one
        finally:
            pool.put(one)

    class Pooled(tokenizer.__class__):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with borrowed() as one:
                return one(*args, **kwargs)

        def encode(self, *args: Any, **kwargs: Any) -> Any:
            with borrowed() as one:
                return one.encode(*args, **kwargs)

        def decode(self, *args: Any, **kwargs: Any) -> Any:
            with borrowed() as one:
                return one.decode(*args, **kwargs)

        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            with borrowed() as one:
                return one.apply_chat_template(*args, **kwargs)

        def __reduce__(self) -> Any:
            return _pooled, (original, n_copies)

    tokenizer.__class__ = Pooled
    return tokenizer


@case("vLLM", "its pool of deep copies, with a class assigned in place, used by eight threads")
def vllm_pool(given: Given) -> Any:
    made = _pooled(given.load())
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(made.encode, TEXTS * 8))
        batches = list(threads.map(lambda text: made([text, text], padding=True), TEXTS * 4))
    return found, batches, answers(made), answers(pickle.loads(pickle.dumps(made)))


@case("vLLM", "its fast detokenizer: DecodeStream on the Rust object, an attribute set there")
def vllm_detokenizer(given: Given) -> Any:
    from tokenizers.decoders import DecodeStream
    from transformers import PreTrainedTokenizerFast

    tokenizer = _with_cached_properties(given.load())
    rust = tokenizer._tokenizer
    if getattr(rust, "added_token_ids", None) is None:
        decoder = rust.get_added_tokens_decoder()
        rust.added_token_ids = {id_: token.content for id_, token in decoder.items()}
    found = [isinstance(tokenizer, PreTrainedTokenizerFast), rust.added_token_ids]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        stream = DecodeStream(ids=ids[: len(ids) // 2], skip_special_tokens=True)
        found.append([stream.step(rust, id_) for id_ in ids[len(ids) // 2 :]])
    # The detokenizer of the next request looks the attribute up again.
    return found, getattr(tokenizer._tokenizer, "added_token_ids", None) == rust.added_token_ids


@case("vLLM", "its slow detokenizer: convert_ids_to_tokens and convert_tokens_to_string")
def vllm_slow_detokenizer(given: Given) -> Any:
    tokenizer = _with_cached_properties(given.load())
    found: list[Any] = [tokenizer.is_fast, tokenizer.get_added_vocab()]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        found.append([tokenizer.decode([id_]) for id_ in ids[:20]])
        tokens = tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)
        found.append(tokenizer.convert_tokens_to_string(tokens))
    return found


@case("vLLM", "batches tokenized in a thread, several requests at once")
def vllm_batches(given: Given) -> Any:
    tokenizer = _with_cached_properties(given.load())
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(tokenizer, TEXTS, add_special_tokens=n % 2 == 0) for n in range(16)]
    return [dict(call.result()) for call in calls]


@case(
    "Triton server",
    "its OpenAI frontend's tokenizer: a class with cached properties assigned in place",
)
def triton_cached(given: Given) -> Any:
    tokenizer = given.load()
    special_ids, size = set(tokenizer.all_special_ids), len(tokenizer)

    class Cached(tokenizer.__class__):  # type: ignore[misc, name-defined]
        @property
        def all_special_ids(self) -> Any:
            return special_ids

        def __len__(self) -> int:
            return size

    Cached.__name__ = f"Cached{tokenizer.__class__.__name__}"
    tokenizer.__class__ = Cached
    return answers(tokenizer), len(tokenizer), sorted(tokenizer.all_special_ids)


@case("SGLang", "attributes set, class properties replaced, deep copies, batch_decode")
def sglang_attributes(given: Given) -> Any:
    tokenizer = given.load(clean_up_tokenization_spaces=False)
    vocabulary = tokenizer.get_added_vocab()
    tokenizer.additional_stop_token_ids = set(list(vocabulary.values())[:1]) or None
    before = answers(tokenizer)
    kind = type(tokenizer)
    original = kind.all_special_ids

    def cached(self: Any) -> Any:
        if getattr(self, "_cached_special_ids", None) is None:
            self._cached_special_ids = original.fget(self)
        return self._cached_special_ids

    kind.all_special_ids = property(cached)
    try:
        found = answers(tokenizer), tokenizer.all_special_ids
    finally:
        kind.all_special_ids = original
    again = pickle.loads(pickle.dumps(copy.deepcopy(tokenizer)))
    rows = [tokenizer.encode(text) for text in TEXTS]
    how = {"skip_special_tokens": True, "spaces_between_special_tokens": False}
    decoded = tokenizer.batch_decode(rows, **how)
    return before, found, answers(again), again.additional_stop_token_ids, decoded


@case("SGLang", "components restored on the backend, _tokenizer replaced, add_bos_token set")
def sglang_fixups(given: Given) -> Any:
    from tokenizers import Tokenizer, normalizers

    raw = Tokenizer.from_file(str(given.source / "tokenizer.json"))
    tokenizer = given.load()
    tokenizer.encode(TEXTS[0])
    tokenizer._tokenizer.pre_tokenizer = raw.pre_tokenizer
    tokenizer._tokenizer.decoder = raw.decoder
    first = answers(tokenizer)
    raw.normalizer = normalizers.Lowercase()
    tokenizer._tokenizer = raw
    second = answers(tokenizer)
    for name in ("add_bos_token", "add_eos_token"):
        with contextlib.suppress(ValueError):  # a tokenizer without that token
            setattr(tokenizer, name, True)
    return first, second, answers(tokenizer)


@case("SGLang", "a subclass assigned in place that encodes segments by backend.encode_batch")
def sglang_segments(given: Given) -> Any:
    tokenizer = given.load()
    base: Any = tokenizer.__class__

    class Segmented(base):  # type: ignore[misc]
        def encode(self, text: str, *args: Any, **rest: Any) -> Any:
            if len(text) < 500:
                return super().encode(text, *args, **rest)
            parts = [part + "." for part in text.split(".")]
            found = self.backend_tokenizer.encode_batch(parts, add_special_tokens=False)
            return [id_ for one in found for id_ in one.ids]

        def __call__(self, text: Any = None, text_pair: Any = None, *args: Any, **rest: Any) -> Any:
            return super().__call__(text, text_pair, *args, **rest)

    tokenizer.__class__ = Segmented
    return answers(tokenizer), [tokenizer.encode(text) for text in TEXTS]


class _Nemo:
    """A wrapper that adds special tokens and has an attribute for each."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.n_before = len(tokenizer)
        wanted = {"mask_token": "<mask>", "sep_token": "<sep>", "bos_token": "<BOS>"}
        tokenizer.add_special_tokens(wanted)
        for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
            setattr(self, name, getattr(tokenizer, name, None))

    def ids(self, text: str) -> Any:
        return self.tokenizer.convert_tokens_to_ids(self.tokenizer.tokenize(text))

    def text(self, ids: Any) -> Any:
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        kept = [token for token in tokens if token not in self.tokenizer.all_special_tokens]
        return self.tokenizer.convert_tokens_to_string(kept)


@case("NeMo", "its AutoTokenizer: special tokens added, tokens ↔ ids ↔ text, the vocabulary")
def nemo_tokenizer(given: Given) -> Any:
    made = _Nemo(given.load())
    texts = [*TEXTS, "a <mask> b <sep> c <BOS>"]
    rows = [made.ids(text) for text in texts]
    by_id = sorted((id_, token) for token, id_ in made.tokenizer.get_vocab().items())
    spaced = made.tokenizer.tokenize("x y") != [*made.tokenizer.tokenize("x"), "y"]
    again = pickle.loads(pickle.dumps(made))
    return {
        "sizes": [made.n_before, len(made.tokenizer)],
        "ids": rows,
        "texts": [made.text(row) for row in rows],
        "vocabulary": by_id,
        "spaced": spaced,
        "encode": [made.tokenizer.encode(text) for text in texts],
        "again": [again.ids(text) for text in texts],
        "name": type(made.tokenizer).__name__,
        "answers": answers(made.tokenizer),
    }
