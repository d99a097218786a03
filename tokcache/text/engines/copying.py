"""The engines that encode uncached text with the tokenizers library: private copies.

The cache never encodes with a tokenizer that others can change: truncation and padding stay on in
it after a call that asked for them. `HuggingFaceEngine` holds a private copy that is proven equal.
The copy shares the model, so there is no second vocabulary. Where no copy can be proven equal, or
where a text has more than one encoding, `PlainEngine` encodes with the tokenizer itself; its
answers are not cached, and it has the reason.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, ParamSpec, Protocol, TypeVar

from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece

from tokcache.errors import CopyError
from tokcache.text.engines.components import stages_of
from tokcache.text.engines.layout import Layout, learn

P = ParamSpec("P")
T = TypeVar("T")

# The components that decide ids. The decoder is copied too, but it is not part of the proof.
ENCODING_PARTS = ("normalizer", "pre_tokenizer", "post_processor")

_MODELS = (BPE, Unigram, WordPiece, WordLevel)

# Every attribute of a model that can be changed in place; only `train` changes anything else.
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
_FLAGS = attrgetter("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_MAX_PROBED_TOKENS = 64
_MAX_PROBED_CONTENTS = 1024


class Engine(Protocol):
    """Encodes whole texts, without truncation and padding.

    `reason` is None if a text has one encoding, which may be cached; else it says why not.
    """

    reason: str | None

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Return the ids of every text."""

    def layout(self, n_texts: int, add_special_tokens: bool) -> Layout | None:
        """Return the layout of encodings of one or two texts, None if it is not known."""


class HuggingFaceEngine:
    """A private copy of a tokenizer; `own` is that copy if it was made and proven already.

    Errors: CopyError where no copy can be proven equal.
    Threads: safe; nothing changes it, and a batch is encoded without the interpreter lock. Each
             concurrent borrower gets a further copy, which is kept; all copies share the model.
    """

    reason: str | None = None

    def __init__(
        self, source: Tokenizer, encode_special_tokens: bool, own: Tokenizer | None = None
    ) -> None:
        own = own or copy_tokenizer(source)
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
        """Return the layout of encodings of one or two texts, None if it is not known."""
        key = n_texts, add_special_tokens
        if key not in self._layouts:
            found = result_or_error(learn, self._tokenizer, n_texts, add_special_tokens)
            self._layouts[key] = None if isinstance(found, BaseException) else found
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
        """Lend a copy whose settings may be changed, because no other call uses it meanwhile."""
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
        """The private copy, which must not be changed."""
        return self._tokenizer


class SegmentEncoder:
    """Encodes segments of texts with the components of one variant, many in one call.

    Segments may be joined to one text by `between`, an added token with a random name that no
    text can hold: it has the `secret`. Each segment is then encoded by itself, and its ids stand
    between two ids that are `separator`.

    Threads: safe; nothing changes it, and a batch is encoded without the interpreter lock.
    """

    def __init__(self, source: Tokenizer, normalizer: str, pre_tokenizer: str) -> None:
        added = source.get_added_tokens_decoder()
        tokens = [token for _, token in sorted(added.items())]

        # The separator's id must be one that no token of the model has. The library gives the next
        # free id; the model may have some of the ids after it, and then several names are added.
        edge = free_edge(tokens)
        first = max(max(added, default=-1) + 1, _n_model_tokens(source))
        n_taken = 0
        while source.model.id_to_token(first + n_taken) is not None:
            n_taken += 1
        self.secret = secrets.token_hex(8)
        names = [f"{edge}{self.secret}{number:x}{edge}" for number in range(n_taken + 1)]
        # All in one call: after each call the library prepares its search for every added token.
        tokens += [AddedToken(name, normalized=False, special=False) for name in names]
        own = _same_model(source, tokens, normalizer=normalizer, pre_tokenizer=pre_tokenizer)
        own.no_truncation()
        own.no_padding()
        self.between = names[-1]
        self.separator: int = own.token_to_id(self.between)  # type: ignore[assignment]  # was added
        self._tokenizer = own

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, with the separator among its added tokens; it must not be changed."""
        return self._tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of every text."""
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]


def free_edge(added: Iterable[Any]) -> str | None:
    """Return a character that no added token has, with which a separator begins and ends.

    So no added token can overlap a separator. None if there is no such character.
    """
    contents = [token.content for token in added]
    return next((edge for edge in _EDGES if not any(edge in one for one in contents)), None)


_EDGES = "\x1c\x1d\x1e\x1f"  # to the library neither a word's characters nor whitespace


class PlainEngine:
    """Encodes with the tokenizer itself, by `call`; its answers are not cached, for `reason`."""

    def __init__(self, reason: str, call: Callable[[Sequence[str], bool], list[list[int]]]) -> None:
        self.reason: str | None = reason
        self.encode = call

    def layout(self, _n_texts: int, _add_special_tokens: bool) -> None:
        """Return None: others may change the tokenizer, and with it the layout."""


def why_random(model: Any) -> str | None:
    """Return why a text may have more than one encoding, None if it has one."""
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
    """Return a value that any change in place of a component changes; `part` may be "model"."""
    if part == "model":
        model = tokenizer.model
        n_tokens = _n_model_tokens(tokenizer)  # training changes it
        settings = (getattr(model, name, None) for name in _MODEL_SETTINGS)
        return (type(model), n_tokens, *settings)
    return component_state(getattr(tokenizer, part))


def component_state(component: Any) -> bytes:
    """Return the JSON of a component.

    Errors: CopyError if the component, or one inside it, is written in Python.
    """
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
    """Return a tokenizer that encodes as `source` does and shares only the model with it.

    Errors: CopyError if a component is written in Python or the copy encodes differently.
    Cost:   about a millisecond, and no memory for the vocabulary; if that copy is not equal, the
            whole tokenizer is serialised and read.
    """
    return copies_of(source, 1)[0]


def copies_of(source: Tokenizer, n_copies: int) -> list[Tokenizer]:
    """Return copies as `copy_tokenizer` does; each one after the first costs no proof of its own.

    The others are made of the same parts in the same way as the first, which is proven.

    Errors: CopyError, as in `copy_tokenizer`.
    """
    added = source.get_added_tokens_decoder()
    tokens = [token for _, token in sorted(added.items())]
    own = _same_model(source, tokens)
    forms = normalized_forms(own.normalizer, _normalized_contents(own, tokens))
    if not all(forms):
        raise CopyError("empty_added_token")  # the library may search for it without end
    # Of two tokens that are alike once normalised, a copy finds one by chance.
    is_repeatable = len(set(forms)) == len(forms)
    if not _is_equal(own, source, added):
        is_repeatable = False
        own = Tokenizer.from_str(source.to_str())
        own.encode_special_tokens = source.encode_special_tokens
        if not _is_equal(own, source, added):
            raise CopyError("copy_differs")
    if is_repeatable:
        return [own, *(_same_model(own, tokens) for _ in range(n_copies - 1))]
    return [own, *(copy_tokenizer(own) for _ in range(n_copies - 1))]


def _same_model(source: Tokenizer, tokens: list[AddedToken], **instead: str) -> Tokenizer:
    """Return a tokenizer with the model of `source` and its components, or those given as JSON.

    `tokens` are its added tokens.
    """
    # Components are copied as JSON, because some can't be unpickled (Precompiled).
    states = {part: component_state(getattr(source, part)).decode() for part in ENCODING_PARTS}
    states |= instead
    try:
        states["decoder"] = component_state(source.decoder).decode()
    except CopyError:
        states["decoder"] = "null"
    own = with_components(**states)
    own.model = source.model
    if own.decoder is None and source.decoder is not None:
        own.decoder = source.decoder  # written in Python: ids don't depend on it
    own.add_tokens(tokens)
    own.encode_special_tokens = source.encode_special_tokens
    if source.truncation is not None:
        own.enable_truncation(**source.truncation)
    if source.padding is not None:
        own.enable_padding(**source.padding)
    return own


def with_components(**states: str) -> Tokenizer:
    """Return a tokenizer with a vocabulary of one token and components given as JSON."""
    states = {**dict.fromkeys((*ENCODING_PARTS, "decoder"), "null"), **states}
    parts = "".join(f'"{name}":{state},' for name, state in states.items())
    return Tokenizer.from_str(
        '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],'
        f"{parts}"
        '"model":{"type":"WordLevel","vocab":{"?":0},"unk_token":"?"}}'
    )


def added_tokens(tokenizer: Tokenizer) -> list[Any]:
    """Return the added tokens in the order of their ids."""
    return [token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]


def normalized_forms(normalizer: Any, texts: Iterable[str]) -> list[str]:
    """Return texts as a normalizer makes them; without one, as they are.

    Cost: a call of the library for each text, but none for ASCII if the normalizer is NFC.
    """
    # No ASCII character has a decomposition or composes with another one, in any Unicode version.
    stages = stages_of(json.loads(component_state(normalizer)))
    keeps_ascii = all(stage["type"] == "NFC" for stage in stages)
    if normalizer is None:
        return list(texts)
    normalized = normalizer.normalize_str
    return [one if keeps_ascii and one.isascii() else normalized(one) for one in texts]


def has_normalized_tokens(tokenizer: Tokenizer) -> bool:
    """Return whether added tokens are searched for in a text that a normalizer may have changed."""
    normalizer = json.loads(component_state(tokenizer.normalizer))
    is_searched = any(token.normalized for token in added_tokens(tokenizer))
    return is_searched and bool(stages_of(normalizer))


def _is_equal(own: Tokenizer, source: Tokenizer, right_added: dict[int, Any]) -> bool:
    """Return whether two tokenizers have equal components and encode the probes alike.

    `right_added` are the added tokens of `source`.
    """
    added = own.get_added_tokens_decoder()
    # The number of special tokens around a text: truncation leaves room for them, and a template
    # that was changed in place reports the number of before.
    around, right_around = (
        [one.num_special_tokens_to_add(is_pair) for is_pair in (False, True)]
        for one in (own, source)
    )
    if (
        added.keys() != right_added.keys()
        or any(_FLAGS(added[index]) != _FLAGS(token) for index, token in right_added.items())
        or around != right_around
        or own.get_vocab_size() != source.get_vocab_size()
        or any(signature(own, part) != signature(source, part) for part in ENCODING_PARTS)
    ):
        return False
    if why_random(source.model) is not None:
        return True  # the encodings can't be compared, and they are not cached

    tokens = [token for _, token in sorted(right_added.items())]
    step = max(1, len(tokens) // _MAX_PROBED_TOKENS)
    contents = _normalized_contents(source, tokens)
    size = 1 + len(contents) // _MAX_PROBED_CONTENTS  # of many, several make one probe
    groups = ["\n".join(contents[at : at + size]) for at in range(0, len(contents), size)]
    probes = [*_PROBES]
    probes += [f"a{t.content}b {t.content.lower()} \n{t.content}" for t in tokens[::step]]
    if source.encode_special_tokens:
        # All added tokens: one that was special once is skipped as long as special ones are.
        probes.append(" ".join(token.content for token in tokens))

    def outcome(tokenizer: Tokenizer, text: str, special: bool) -> object:
        # A batch would start threads, after which the children of a fork encode without threads.
        found = result_or_error(tokenizer.encode, text, add_special_tokens=special)
        return str(found) if isinstance(found, BaseException) else (found.ids, found.type_ids)

    # The special tokens around a text don't depend on the added tokens that are found in it.
    texts = [(text, special) for text in probes for special in (True, False)]
    texts += [(text, False) for text in groups]
    return all(outcome(own, *one) == outcome(source, *one) for one in texts)


def result_or_error(
    call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> T | BaseException:
    """Return the result of a call into an encoder's library, or the error that the library raised.

    The libraries raise bare Exception, such as tokenizers without an unknown token, and a panic in
    Rust is a BaseException.
    """
    try:
        return call(*args, **kwargs)
    except BaseException as error:
        if not is_of_library(error):
            raise
        return error


def is_of_library(error: BaseException) -> bool:
    """Return whether an encoder raised this error itself; a panic in Rust is not an Exception."""
    return not isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError)


def _normalized_contents(tokenizer: Tokenizer, tokens: Iterable[Any]) -> list[str]:
    """Return the contents of those of its added tokens that are searched for in normalised text.

    Encoding them as texts shows whether the library still searches for the forms that they had
    before the normalizer was changed in place.
    """
    if tokenizer.normalizer is None:
        return []
    return [token.content for token in tokens if token.normalized]
