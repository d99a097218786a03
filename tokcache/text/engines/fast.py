"""Faster encoders for uncached text, and the proof that one is equal to the tokenizer.

gigatoken and fastokens read the same tokenizer.json as tokenizers and are many times faster. But
they refuse some tokenizers, and their Unicode tables are of another version. So a fast encoder
encodes a text only if three conditions hold; otherwise tokenizers does.

1. The encoder can be built for the tokenizer (`build`).
2. It gives the tokenizer's ids for texts that are made for that tokenizer (`prove`, `probe_texts`).
3. Both libraries treat every character of the text alike (`agreed_code_points`).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain, product
from typing import TYPE_CHECKING, Any, Protocol
from unicodedata import normalize

from tokenizers.models import BPE

from tokcache.errors import FastEncoderUnavailable
from tokcache.text.engines.components import BYTE_NAME, has_all_bytes
from tokcache.text.engines.copying import added_tokens, result_or_error

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from tokenizers import Tokenizer

    Ids = memoryview | npt.NDArray[np.uint32]

# gigatoken 0.10 keeps every word that it has met, without a bound. It is built again after this
# many characters, so that the words it keeps take about as much memory as the text itself.
GIGATOKEN_MAX_CHARS = 32_000_000

# Code points whose category and combining class have not changed since Unicode 3.2, so that no
# release of either library can class, order or compose them differently. Left out are the long s,
# which folds to the s of contractions, and most control characters.
_UNCHANGED = (
    (0x0009, 0x000D), (0x001B, 0x001B), (0x0020, 0x007E),
    # Latin, its marks, Greek, Cyrillic, Armenian, Hebrew, Arabic
    (0x00A0, 0x00A6), (0x00A8, 0x00A9), (0x00AB, 0x00AC), (0x00AE, 0x00B5), (0x00B7, 0x00B9),
    (0x00BB, 0x017E), (0x0180, 0x0220), (0x0222, 0x0233), (0x0250, 0x0293), (0x0295, 0x02AD),
    (0x02B0, 0x02B8), (0x02BB, 0x02C5), (0x02D0, 0x02EB), (0x0300, 0x034E), (0x0384, 0x038A),
    (0x038C, 0x038C), (0x038E, 0x03A1), (0x03A3, 0x03CE), (0x0400, 0x0486), (0x0488, 0x04CE),
    (0x04D0, 0x04F5), (0x04F8, 0x04F9), (0x0531, 0x0556), (0x0559, 0x055F), (0x0561, 0x0587),
    (0x0591, 0x05A1), (0x05A3, 0x05B9), (0x05BB, 0x05BD), (0x05BF, 0x05C4), (0x05D0, 0x05EA),
    (0x05F0, 0x05F4), (0x060C, 0x060C), (0x061B, 0x061B), (0x061F, 0x061F), (0x0621, 0x063A),
    (0x0640, 0x0655), (0x0660, 0x06DC), (0x06DF, 0x06ED), (0x06F0, 0x06FE),
    # Devanagari, Bengali, Tamil, Telugu, Thai
    (0x0901, 0x0903), (0x0905, 0x0939), (0x093C, 0x094D), (0x0950, 0x0954), (0x0958, 0x0970),
    (0x0981, 0x0983), (0x0985, 0x098C), (0x098F, 0x0990), (0x0993, 0x09A8), (0x09AA, 0x09B0),
    (0x09B2, 0x09B2), (0x09B6, 0x09B9), (0x09BC, 0x09BC), (0x09BE, 0x09C4), (0x09C7, 0x09C8),
    (0x09CB, 0x09CD), (0x09D7, 0x09D7), (0x09DC, 0x09DD), (0x09DF, 0x09E3), (0x09E6, 0x09FA),
    (0x0B82, 0x0B83), (0x0B85, 0x0B8A), (0x0B8E, 0x0B90), (0x0B92, 0x0B95), (0x0B99, 0x0B9A),
    (0x0B9C, 0x0B9C), (0x0B9E, 0x0B9F), (0x0BA3, 0x0BA4), (0x0BA8, 0x0BAA), (0x0BAE, 0x0BB5),
    (0x0BB7, 0x0BB9), (0x0BBE, 0x0BC2), (0x0BC6, 0x0BC8), (0x0BCA, 0x0BCD), (0x0BD7, 0x0BD7),
    (0x0BE7, 0x0BF2), (0x0C01, 0x0C03), (0x0C05, 0x0C0C), (0x0C0E, 0x0C10), (0x0C12, 0x0C28),
    (0x0C2A, 0x0C33), (0x0C35, 0x0C39), (0x0C3E, 0x0C44), (0x0C46, 0x0C48), (0x0C4A, 0x0C4D),
    (0x0C55, 0x0C56), (0x0C60, 0x0C61), (0x0C66, 0x0C6F), (0x0E01, 0x0E3A), (0x0E3F, 0x0E5B),
    # Latin with two marks (Vietnamese), punctuation, symbols, arrows, mathematics, boxes, dingbats
    (0x1E00, 0x1E9B), (0x1EA0, 0x1EF9), (0x2000, 0x200A), (0x200C, 0x200D), (0x2010, 0x2027),
    (0x202F, 0x2052), (0x2070, 0x2070), (0x2074, 0x207E), (0x2080, 0x208E), (0x20A0, 0x20B1),
    (0x2100, 0x2117), (0x2119, 0x2129), (0x212B, 0x2131), (0x2133, 0x213A), (0x2153, 0x2182),
    (0x2190, 0x2307), (0x230C, 0x23B3), (0x2460, 0x24FE), (0x2500, 0x25FF), (0x2761, 0x2775),
    (0x27D0, 0x27EB), (0x27F0, 0x27FF), (0x2900, 0x2AFF),
    # Chinese, Japanese, Korean, full and half width forms
    (0x3000, 0x3029), (0x3030, 0x303F), (0x3041, 0x3096), (0x3099, 0x30FA), (0x30FC, 0x30FF),
    (0x3105, 0x312C), (0x3131, 0x318E), (0x3400, 0x4DB5), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3),
    (0xFE00, 0xFE0F), (0xFE30, 0xFE46), (0xFF01, 0xFF64), (0xFF66, 0xFF9F), (0xFFE0, 0xFFE6),
    (0xFFFD, 0xFFFD),
)  # fmt: skip

# Code points that are common in chats and unchanged since Unicode 10 (2017): symbols and ordinals
# of Latin-1, the katakana middle dot, and emoji.
_SETTLED = (
    (0x00A7, 0x00A7), (0x00AA, 0x00AA), (0x00B6, 0x00B6), (0x00BA, 0x00BA), (0x2600, 0x2760),
    (0x2776, 0x27BF), (0x2B1B, 0x2B1C), (0x2B50, 0x2B50), (0x2B55, 0x2B55), (0x30FB, 0x30FB),
    (0x1F1E6, 0x1F1FF), (0x1F300, 0x1F320), (0x1F330, 0x1F335), (0x1F337, 0x1F37C),
    (0x1F380, 0x1F393),
    (0x1F3A0, 0x1F3C4), (0x1F3C6, 0x1F3CA), (0x1F3E0, 0x1F3F0), (0x1F3FB, 0x1F43E),
    (0x1F440, 0x1F440), (0x1F442, 0x1F4F7), (0x1F4F9, 0x1F4FC), (0x1F500, 0x1F53D),
    (0x1F550, 0x1F567), (0x1F5FB, 0x1F640), (0x1F645, 0x1F64F), (0x1F680, 0x1F6C5),
    (0x1F910, 0x1F93A), (0x1F940, 0x1F945), (0x1F950, 0x1F96B), (0x1F980, 0x1F997),
    (0x1F9D0, 0x1F9E6),
)  # fmt: skip

_AGREED = tuple(sorted(_UNCHANGED + _SETTLED))
_FIRSTS = [first for first, _ in _AGREED]

_SAMPLES = (
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    " \n \n",
    "\t\tif x:\r\n\r\n  return\n",
    "a  b   c    d     e",
    "a\t b \t c\n d \n e\r f \r g\x0b h\x0c",
    "   leading, trailing   ",
    "no\u00a0break\u00a0 \u00a0thin\u2009space\u3000wide \u202f",
    "it's IT'S we'll WE'LL I'd I'D you've YOU'VE they're THEY'RE I'm I'M don't DON'T",
    "it\u2019s 's 'S 'll'LL 'x 'sam 'Re'v '' '''s",
    "1 12 123 1234 12345 1234567 3.14159 1,234,567 0x1F a1b22c333 1st 2\u00ba 1\u00bd \u00b2\u00b3",
    "\u0663\u0664\u0665 \u0967\u0968\u0969 \uff11\uff12\uff13 \u216b \u2460\u2461",
    "CamelCase HTTPServer snake_case kebab-case SCREAMING_CASE iPhone McDonald aB Ab AB ab",
    "def f(a, b=None):\n    return {'a': a[0], \"b\": b or 1e-9}  # ok\n",
    "if (a != b && c >= d) { x->y++; } else { *p = &q; } // done\n\n\n",
    '{"id": 17, "tags": ["a", "b"], "nested": {"x": null, "y": true}}\n',
    '<div class="a b">&amp; text</div>\n<!-- c -->',
    "https://example.com/a/b.html?q=1&r=%20#top user@example.com ../x/y.py C:\\temp\\z",
    "!!! ??? ... --- === *** ### ~~~ ``` ;;; $$$ %%% ^^^ ((( ))) [[]] {{}} !? .\n ,\r\n ;\n\n",
    "...\n\n\nNext. Line\n!\n \n?  \n",
    "\u00dcn\u00efc\u00f6d\u00e9 \u00c5ngstr\u00f6m \u0141\u00f3d\u017a \u0130stanbul stra\u00dfe",
    "e\u0301 u\u0308 a\u0323\u0302 a\u0302\u0323 \u1ead o\u031b\u0301 \u212b \u2126 c\u0327\u0301",
    "\u0395\u03bb\u03bb\u03ac\u03b4\u03b1 \u0391\u0301 \u03c2\u03c3",
    "\u0441\u044a\u0435\u0448\u044c \u0415\u0449\u0451 \u0438\u0306",
    "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u05d0\u05d1",
    "\u0645\u064e\u0631\u0652\u062d\u064e\u0628\u064b\u0627\u060c \u0627\u0653",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0958 \u0995\u09cb \u0995\u09c7\u09be",
    "\u0ba8\u0bcb \u0bc6\u0bbe \u0c15\u0c4d\u0c37",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e04\u0e48\u0e30",
    "\u6771\u4eac\u306f\u3001\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002\u30ab\u3099\u30ac A",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01123\u4e2a abc\u4e2d\u6587 \ud55c\uad6d\uc5b4\ub97c",
    "\U0001f600\U0001f680 \u2705\u274c \u26a0\ufe0f \U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea!\U0001f600a\U0001f6001",
    "\u201cquoted\u201d \u2018it\u2019s\u2019 \u2014 \u2026 \u20ac5 \u00a7 1 \u2192 \u2264",
    "\u2581 \u2588\u2581a \u2581\u2581 \ufffd",
    "a" * 70,
    "=" * 70 + " " * 70 + "\n" * 9,
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
)
_DENSE = [*map(chr, range(0x21, 0x7F)), *[" "] * 8, "  ", "\n", "\n\n", "\t", "\r\n", "\u3000"]
_DENSE += ["\u0301", "\u0338", "\xe9", "\u4f60", "\u2026", "\u2260", "\u0434"]
_N_DENSE = 150
_N_PIECES = 64
_N_ADDED = 12


class FastEncoder(Protocol):
    """Encodes whole texts, without special tokens around them, truncation and padding.

    Added tokens in a text are recognised as tokenizers does, special ones included.
    `holds_lock` says that no other thread runs Python while the encoder works.
    `is_fork_safe` says that the child of a fork may use the encoder, even if another thread was
    encoding as the process forked.
    """

    name: str
    holds_lock: bool
    is_fork_safe: bool

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of every text.

        Shapes: uint32[n_tokens] each, contiguous, owned by the caller.
        Errors: the library's own; TypeError or UnicodeEncodeError for lone surrogates.
        """

    def vocabulary(self) -> dict[int, bytes]:
        """Return the bytes of the tokens by id, or {} where the library has no fast way."""


class Gigatoken:
    """gigatoken's encoder.

    Threads: safe; a text is encoded with the interpreter lock held. The library's batch methods
             release the lock and then refuse a second caller, so they are not used.
    """

    name = "gigatoken"
    holds_lock = True
    is_fork_safe = True  # it has no threads, and no fork happens while a text is encoded

    def __init__(self, tokenizer_json: str) -> None:
        self._json = tokenizer_json
        self._renew()

    def _renew(self) -> None:
        made = importlib.import_module("gigatoken").Tokenizer.from_json(self._json)
        self._backend: Any = made.backend
        self._encode: Callable[[str], npt.NDArray[np.uint32]] = made.backend.encode
        self._encode("")  # the first text is slow: it imports numpy
        self._n_chars_left = GIGATOKEN_MAX_CHARS

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of every text."""
        self._n_chars_left -= sum(map(len, texts))
        if self._n_chars_left < 0:
            self._renew()
        return [*map(self._encode, texts)]

    def vocabulary(self) -> dict[int, bytes]:
        """Return the bytes of all tokens by id."""
        found: dict[int, bytes] = self._backend.vocab
        return found


class Fastokens:
    """fastokens' encoder.

    Threads: safe; the interpreter lock is released. The library's locks and threads don't survive
             a fork.
    """

    name = "fastokens"
    holds_lock = False
    is_fork_safe = False

    def __init__(self, tokenizer_json: str) -> None:
        made = importlib.import_module("fastokens").Tokenizer.from_json_str(tokenizer_json)
        made.no_truncation()
        made.no_padding()
        self._encode_flat: Callable[[list[str]], tuple[bytes, bytes]] = made.encode_batch_flat
        self._encode_flat([" "])  # the first text is slow: it fills tables

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of every text."""
        return [memoryview(self._encode_flat([text])[0]).cast("I") for text in texts]

    def vocabulary(self) -> dict[int, bytes]:
        """Return {}: the library does not hand out its tokens."""
        return {}


_ENCODERS: dict[str, type[Gigatoken | Fastokens]] = {
    encoder.name: encoder for encoder in (Gigatoken, Fastokens)
}


def installed() -> list[str]:
    """Return the names of the encoders that can be imported, the fastest first."""
    return [name for name in _ENCODERS if importlib.util.find_spec(name) is not None]


def build(name: str, tokenizer_json: str) -> FastEncoder:
    """Return the encoder `name` for the tokenizer that this JSON describes.

    Errors: FastEncoderUnavailable if it is unknown, not installed or refuses the tokenizer.
    Cost:   the time and memory of loading the tokenizer once more; gigatoken holds the interpreter
            lock. Nothing is read from disk or network.
    """
    if name not in _ENCODERS:
        known = ", ".join(_ENCODERS)
        raise FastEncoderUnavailable(name, f"no such encoder, known are {known}")
    found = result_or_error(_ENCODERS[name], tokenizer_json)
    if isinstance(found, ImportError):
        raise FastEncoderUnavailable(name, f"not installed ({found})") from found
    if isinstance(found, BaseException):
        raise FastEncoderUnavailable(name, _first_line(found)) from found
    return found


def is_fork_safe(name: str) -> bool:
    """Return whether the child of a fork may build an encoder that its parent may have built."""
    return _ENCODERS[name].is_fork_safe


def prove(
    encoder: FastEncoder,
    reference: Tokenizer,
    probes: Sequence[str],
    pause: Callable[[], None] | None = None,
) -> str | None:
    """Return None if `encoder` is equal to `reference`, else why it is not or may not be.

    `reference` must be the tokenizer for which `encoder` was built, with all added tokens and
    without truncation. It encodes text by text: a batch would start threads, after which the
    children of a fork encode without threads. `pause` is called before each probe.

    Errors: those of `pause`.
    """
    # First the tokenizers whose differences show only in texts that are too rare for probes.
    added = added_tokens(reference)
    if any(token.single_word for token in added):
        return "an added token must be a whole word (single_word)"
    if reference.normalizer is not None:
        # No agreed character becomes an ASCII one.
        chars = {char for token in added for char in token.content if not char.isascii()}
        if any(normalize("NFD", char) != char or char in _made_of_others() for char in chars):
            return "a normalizer may make an added token of other characters"

    pre_tokenizer = reference.pre_tokenizer
    state = json.loads(pre_tokenizer.__getstate__()) if pre_tokenizer is not None else {}
    parts = state.get("pretokenizers", ())
    if any(one["type"] == "Split" for one in parts) and any(one.get("use_regex") for one in parts):
        return "a ByteLevel pre-tokenizer splits again the parts of another one"

    why = _why_never_model(reference)
    if why is not None:
        return why

    # Then the probes; an error counts as an answer.
    def right(text: str) -> list[int]:
        ids: list[int] = reference.encode(text, add_special_tokens=False).ids
        return ids

    def own(text: str) -> list[int]:
        ids: list[int] = encoder.encode([text])[0].tolist()
        return ids

    for text in probes:
        if pause is not None:
            pause()
        wanted, found = (
            f"an error ({_first_line(ids)})" if isinstance(ids, BaseException) else ids
            for ids in (result_or_error(right, text), result_or_error(own, text))
        )
        if found != wanted:
            return f"{text!r} is {found} in {encoder.name}, {wanted} in tokenizers"
    return None


def _why_never_model(reference: Tokenizer) -> str | None:
    """Return why the model's tokens may be merged differently, None if they can't."""
    model = reference.model
    if not isinstance(model, BPE):
        return None
    if model.end_of_word_suffix or model.continuing_subword_prefix:
        return "the model marks the beginning or end of a word"
    has_merged_bytes = model.byte_fallback and any(
        len(token) > len("<0x00>") and BYTE_NAME.search(token)
        for token in reference.get_vocab(with_added_tokens=False)
    )
    if has_merged_bytes:
        return "a byte's token may be merged with its neighbours"
    components = (reference.normalizer, reference.pre_tokenizer)
    is_byte_level = any(
        one is not None and b'"ByteLevel"' in one.__getstate__() for one in components
    )
    if model.unk_token is None and not (is_byte_level or has_all_bytes(model)):
        return "unknown characters are dropped, and their neighbours may be merged"
    return None


@cache
def _made_of_others() -> frozenset[str]:
    """Return the characters that NFC makes of a single other agreed character."""
    agreed = (chr(point) for first, last in _AGREED for point in range(first, last + 1))
    return frozenset(made for char in agreed if (made := normalize("NFC", char)) != char)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def agreed_code_points() -> tuple[tuple[int, int], ...]:
    """Return the code points that every encoder treats as tokenizers does, as inclusive ranges.

    The ranges are sorted and do not touch each other. A text with any other character is encoded
    by tokenizers. Lone surrogates are never among the agreed code points.
    """
    return _AGREED


def is_agreed(text: str) -> bool:
    """Return whether every character of `text` is an agreed one."""
    for code_point in map(ord, set(text)):
        at = bisect_right(_FIRSTS, code_point) - 1
        if at < 0 or code_point > _AGREED[at][1]:
            return False
    return True


def probe_texts(tokenizer: Tokenizer) -> list[str]:
    """Return a few hundred short texts on which an encoder for this tokenizer may differ from it.

    They are samples of the characters that patterns treat specially, tokens of the vocabulary
    joined as in no training text, and added tokens next to other text. All characters are agreed
    ones, except those of the added tokens.
    """
    # Tokens from the whole range of the vocabulary, joined in pairs and all together.
    n_tokens = tokenizer.get_vocab_size(with_added_tokens=False)
    step = max(1, n_tokens // _N_PIECES)
    pieces = [tokenizer.decode([index]) for index in range(step // 2, n_tokens, step)]
    pairs = list(zip(pieces, reversed(pieces), strict=True))
    joined = [
        *(a + b for a, b in pairs),
        *(f"{a} {b}\n{a.upper()}{b.title()} {a}{a}" for a, b in pairs),
        "".join(pieces),
        " ".join(pieces),
    ]
    # Random texts of few characters and tokens each, so that rare neighbours meet.
    rng = random.Random(0)  # noqa: S311 (the same texts every time)
    dense = []
    for _ in range(_N_DENSE):
        few = [*rng.sample(_DENSE, 6), *rng.sample(pieces, min(3, len(pieces)))]
        dense.append("".join(rng.choices(few, k=30)))
    # Some added tokens, at least one of each kind, next to other text and next to each other.
    added = added_tokens(tokenizer)
    step = max(1, len(added) // _N_ADDED)
    of_kinds = list({_kind(token): token.content for token in added}.values())
    around = []
    for content in dict.fromkeys([*(token.content for token in added[::step]), *of_kinds]):
        around += [
            f"a{content}b<0x41>",
            f"{content}<0x41>",  # the name of a byte's token is text
            f" {content} ",
            f"{content}{content} {content}",
            f"x \n{content}\n y\r\n{content}'s",
            f"{content.lower()} {content.upper()} {content[:-1]}{content[1:]}",
        ]
    for a, b in product(of_kinds, repeat=2):
        around += [f"{a}{b}", f"{a} {b}", f"{a}x{b}"]
    return [*filter(is_agreed, chain(_SAMPLES, joined, dense)), *around]


def _kind(token: Any) -> tuple[bool, ...]:
    is_space, is_word = token.content.isspace(), token.content[-1:].isalnum()
    return token.lstrip, token.rstrip, token.normalized, token.special, is_space, is_word
