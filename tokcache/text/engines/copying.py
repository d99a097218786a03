"""What encodes the texts that no cache holds.

The cache never encodes through a tokenizer that others can change: truncation and padding stay
switched on in it after a call that asked for them. `HuggingFaceEngine` is a private copy, proven
equal; it shares the model, so there is no second vocabulary. Where no such copy can be proven, or
where a text has more than one encoding, `PlainEngine` asks the tokenizer itself and says why; its
answers are not stored.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece

from tokcache.errors import CopyError
from tokcache.text.engines.layout import Layout, learn

# The components that decide ids; the decoder is copied too, but none of the proof rests on it.
ENCODING_PARTS = ("normalizer", "pre_tokenizer", "post_processor")

_MODELS = (BPE, Unigram, WordPiece, WordLevel)

# Every attribute of a model that can be changed in place; `train` is the only other way.
_MODEL_SETTINGS = (
    "alpha",
    "byte_fallback",
    "continuing_subword_prefix",
    "dropout",
    "end_of_word_suffix",
    "fuse_unk",
    "ignore_merges",
    "max_input_chars_per_word",
    "nbest_size",
    "unk_token",
)

_PROBES = (
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "CamelCase snake_case it's we'll 3.14159 1,234",
    "two\n\nlines\r\n\tand a tab",
    "Ünïcödé, e\u0301, ﬁ, 東京, русский, שלום, 👩‍👩‍👧 \u200b",
)
_MAX_PROBED_TOKENS = 64


class Engine(Protocol):
    """Encodes texts whole: no truncation, no padding.

    `reason` is None where a text has one encoding that may be kept, else why it may not.
    """

    reason: str | None

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Return the ids of every text."""

    def layout(self, n_texts: int, add_special_tokens: bool) -> Layout | None:
        """Return what stands around the ids of one or two texts, None if that is not known."""


class HuggingFaceEngine:
    """A private copy of a tokenizer.

    Errors: CopyError where no copy can be proven equal.
    Threads: safe; nothing changes it, and a batch is encoded without the interpreter lock. As many
             copies as were ever lent at once are kept; they share the model.
    """

    reason: str | None = None

    def __init__(self, source: Tokenizer, encode_special_tokens: bool) -> None:
        own = copy_tokenizer(source)
        own.no_truncation()
        own.no_padding()
        own.encode_special_tokens = encode_special_tokens
        self._tokenizer = own
        self._layouts: dict[tuple[int, bool], Layout | None] = {}
        self._spares: list[Tokenizer] = []

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Return the ids of every text."""
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]

    def layout(self, n_texts: int, add_special_tokens: bool) -> Layout | None:
        """Return what stands around the ids of one or two texts, None if that is not known."""
        key = n_texts, add_special_tokens
        if key not in self._layouts:
            self._layouts[key] = _learn(self._tokenizer, n_texts, add_special_tokens)
        return self._layouts[key]

    def encodings(
        self,
        inputs: Sequence[Any],
        add_special_tokens: bool,
        truncation: dict[str, Any] | None,
        padding: dict[str, Any] | None,
    ) -> list[Encoding]:
        """Return the Encoding objects of texts or pairs, truncated and padded."""
        with self.borrowed() as own:
            if truncation is not None:
                own.enable_truncation(**truncation)
            if padding is not None:
                own.enable_padding(**padding)
            return own.encode_batch(inputs, add_special_tokens=add_special_tokens)

    @contextmanager
    def borrowed(self) -> Iterator[Tokenizer]:
        """Lend a copy whose settings may be changed: nobody else has it meanwhile."""
        own = self._spares.pop() if self._spares else copy_tokenizer(self._tokenizer)
        try:
            yield own
        finally:
            own.no_truncation()
            own.no_padding()
            own.encode_special_tokens = self._tokenizer.encode_special_tokens
            self._spares.append(own)

    @property
    def tokenizer(self) -> Tokenizer:
        """The private copy; to be looked at, never changed."""
        return self._tokenizer


class PartEncoder:
    """Encodes parts of texts with the components of one variant, many in one call.

    Parts may be joined by an added token of our own, `between`, which nobody can guess: what
    stands between two of them is encoded by itself, and its ids are those between two `separator`.

    Threads: safe; nothing changes it, and a batch is encoded without the interpreter lock.
    """

    def __init__(self, source: Tokenizer, normalizer: str, pre_tokenizer: str) -> None:
        own = _same_model(source, normalizer=normalizer, pre_tokenizer=pre_tokenizer)
        own.no_truncation()
        own.no_padding()
        self.between = _add_separator(own)
        self.separator: int = own.token_to_id(self.between)  # type: ignore[assignment]  # was added
        self._tokenizer = own

    @property
    def tokenizer(self) -> Tokenizer:
        """What encodes, with the separator among its added tokens; never changed."""
        return self._tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of every text."""
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]


def _add_separator(own: Tokenizer) -> str:
    """Add a token that no text of others can hold, with an id that no token of the model has."""
    edge = free_edge(added_tokens(own))
    first = max(max(own.get_added_tokens_decoder(), default=-1) + 1, _n_model_tokens(own))
    n_taken = 0  # ids with gaps: the model has some of those that come next
    while own.model.id_to_token(first + n_taken) is not None:
        n_taken += 1
    names = [f"{edge}{secrets.token_hex(8)}{edge}" for _ in range(n_taken + 1)]
    own.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])
    return names[-1]


def free_edge(added: list[Any]) -> str | None:
    """Return a character that no added token has: none can take the edge of a separator."""
    contents = [token.content for token in added]
    return next((edge for edge in _EDGES if not any(edge in one for one in contents)), None)


_EDGES = "\x1c\x1d\x1e\x1f"  # neither a word's nor white space to the library


class PlainEngine:
    """The tokenizer itself, through `call`; what it returns is not stored, for `reason`."""

    def __init__(self, reason: str, call: Callable[[Sequence[str], bool], list[list[int]]]) -> None:
        self.reason: str | None = reason
        self.encode = call

    def layout(self, _n_texts: int, _add_special_tokens: bool) -> None:
        """Return None: nothing is known of what others may change."""


def why_random(model: Any) -> str | None:
    """Return why one text has more than one encoding, or None if it has one."""
    if type(model) not in _MODELS:
        return "python_model"
    if getattr(model, "dropout", None):
        return "bpe_dropout"
    if getattr(model, "alpha", None):
        return "unigram_sampling"
    return None


def _n_model_tokens(tokenizer: Tokenizer) -> int:
    return tokenizer.get_vocab_size(with_added_tokens=False)


def signature(tokenizer: Tokenizer, part: str) -> object:
    """Return a value that differs after any change in place of that component, or of "model"."""
    if part == "model":
        model = tokenizer.model
        n_tokens = _n_model_tokens(tokenizer)  # trained behind a handle
        settings = (getattr(model, name, None) for name in _MODEL_SETTINGS)
        return (type(model), n_tokens, *settings)
    return component_state(getattr(tokenizer, part))


def component_state(component: Any) -> bytes:
    """Return the JSON of a component; CopyError if it, or a part of it, is written in Python."""
    if component is None:
        return b"null"
    try:
        state = component.__getstate__()
    except Exception as error:  # the library raises no narrower class
        raise CopyError("python_component") from error
    if not isinstance(state, bytes):
        raise CopyError("python_component")
    return state


def copy_tokenizer(source: Tokenizer) -> Tokenizer:
    """Return a tokenizer that encodes as `source` does and shares nothing but the model.

    Errors: CopyError if a component is written in Python or the copy encodes differently.
    Cost:   about a millisecond, no memory for the vocabulary; the fallback reads it all anew.
    """
    own = _same_model(source)
    if any(own.normalizer.normalize_str(content) == "" for content in _normalized_contents(own)):
        raise CopyError("empty_added_token")  # a blank may keep the library busy for ever
    if not _is_equal(own, source):
        own = Tokenizer.from_str(source.to_str())
        own.encode_special_tokens = source.encode_special_tokens
        if not _is_equal(own, source):
            raise CopyError("copy_differs")
    return own


def _same_model(source: Tokenizer, **instead: str) -> Tokenizer:
    """Return a tokenizer with the model of `source` and its components, or those given as JSON."""
    # Components are copied as JSON: not every one of them can be unpickled (Precompiled).
    states = {part: component_state(getattr(source, part)).decode() for part in ENCODING_PARTS}
    states |= instead
    own = Tokenizer.from_str(_without_model(states, _decoder_state(source)))
    own.model = source.model
    if own.decoder is None and source.decoder is not None:
        own.decoder = source.decoder  # written in Python: ids don't depend on it
    own.add_tokens(added_tokens(source))
    own.encode_special_tokens = source.encode_special_tokens
    if source.truncation is not None:
        own.enable_truncation(**source.truncation)
    if source.padding is not None:
        own.enable_padding(**source.padding)
    return own


def _decoder_state(source: Tokenizer) -> str:
    try:
        return component_state(source.decoder).decode()
    except CopyError:
        return "null"


def _without_model(states: dict[str, str], decoder: str) -> str:
    parts = "".join(f'"{name}":{state},' for name, state in states.items())
    return (
        '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],'
        f'{parts}"decoder":{decoder},'
        '"model":{"type":"WordLevel","vocab":{"?":0},"unk_token":"?"}}'
    )


def added_tokens(tokenizer: Tokenizer) -> list[Any]:
    """Return the added tokens in the order of their ids."""
    return [token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]


def _added_states(tokenizer: Tokenizer) -> dict[int, Any]:
    added = tokenizer.get_added_tokens_decoder()
    return {index: token.__getstate__() for index, token in added.items()}


def _is_equal(own: Tokenizer, source: Tokenizer) -> bool:
    return (
        _added_states(own) == _added_states(source)
        and own.get_vocab_size() == source.get_vocab_size()
        and all(signature(own, part) == signature(source, part) for part in ENCODING_PARTS)
        and _n_added(own) == _n_added(source)
        and _encodes_equal(own, source)
    )


def _n_added(tokenizer: Tokenizer) -> list[int]:
    """Return what truncation leaves room for: of a template changed in place, what it was."""
    return [tokenizer.num_special_tokens_to_add(is_pair) for is_pair in (False, True)]


def _encodes_equal(own: Tokenizer, source: Tokenizer) -> bool:
    if why_random(source.model) is not None:
        return True  # nothing to compare, and nothing of it will be stored
    return all(
        _outcome(own, text, add_special_tokens) == _outcome(source, text, add_special_tokens)
        for text in _probe_texts(source)
        for add_special_tokens in (True, False)
    )


def _outcome(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> object:
    # `encode`, not a batch: a batch starts threads, and after that forked children stay serial.
    try:
        found = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except BaseException as error:  # a tokenizer without unk raises bare Exception
        if not is_of_library(error):
            raise
        return str(error)
    return found.ids, found.type_ids


def is_of_library(error: BaseException) -> bool:
    """Return whether an encoder failed by itself; a panic in Rust is no Exception."""
    return not isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError)


def _probe_texts(tokenizer: Tokenizer) -> list[str]:
    added = added_tokens(tokenizer)
    step = max(1, len(added) // _MAX_PROBED_TOKENS)
    around = [f"a{t.content}b {t.content.lower()} \n{t.content}" for t in added[::step]]
    # All of them: one that was special once is skipped as long as special ones are.
    together = [" ".join(t.content for t in added)] if tokenizer.encode_special_tokens else []
    return [*_PROBES, *around, *together, *_normalized_contents(tokenizer)]


def _normalized_contents(tokenizer: Tokenizer) -> list[str]:
    """Return the added tokens that are looked for in normalised text, where there is such.

    As texts, they show a matcher made before the normalizer was changed in place.
    """
    if tokenizer.normalizer is None:
        return []
    return [token.content for token in added_tokens(tokenizer) if token.normalized]


def _learn(tokenizer: Tokenizer, n_texts: int, add_special_tokens: bool) -> Layout | None:
    try:
        return learn(tokenizer, n_texts, add_special_tokens)
    except BaseException as error:  # a tokenizer without unk raises bare Exception
        if not is_of_library(error):
            raise
        return None
