"""Fuzz of the rules for normalizers with added tokens, and for SentencePiece's Metaspace.

`drawn(rng)` is a random tokenizer: components whose cuts can be proven, with added tokens that are
searched for in the normalised text. The models give another id to each boundary, or merge across
any pair of characters. `texts(rng, made)` are texts in which such tokens touch everything else. A
`Focus` draws fewer kinds, for the controls that weaken one rule.

    python -m tests.text.fuzz_rules --comparisons 100000 --seed 1

prints the number of comparisons, of tokenizers with cuts, and the first texts with wrong ids.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

import tokcache
from tests.text.tokenizers_combined import _marks_every_boundary, _numbered
from tests.text.tokenizers_synthetic import PATTERNS, SYNTHETIC
from tokcache import CacheConfig
from tokcache.text.engines.copying import added_tokens, is_of_library

MARKER = "\u2581"
CONFIG = CacheConfig(engine="tokenizers", l0_max_entries=1)
N_TEXTS = 40  # for each tokenizer

_BASE = [*"abeKs12._='\"`! \n", "\t", "\r\n", MARKER]
_BEYOND = ["\xe9", "\xc9", "\u2260", "\u4f60", "\u3002", "\u212a", "\u1ebf", "\uac01", "\uac00"]
_MARKS = ["\u0301", "\u0302", "\u0338", "\u11a8"]
_ALPHABET: list[str] = [*_BASE, *_BASE, *_BEYOND, *_MARKS]
_CONTENTS = (
    "e\u0301",
    "a b",
    " a",
    "a ",
    "  ",
    "\n",
    "a\nb",
    "ab",
    "AB",
    ".\xe9",
    "=b",
    "1a",
    "'s",
    '"a',
    "<x>",
)
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

Draw = Callable[[random.Random], Any]


@dataclass(frozen=True)
class Focus:
    """The choices of `drawn`: each is drawn from all kinds if it is empty.

    `share` is the share of the added tokens that are searched for in the normalised text.
    """

    models: tuple[Draw, ...] = ()
    normalizers: tuple[Draw, ...] = ()
    stages: tuple[Draw, ...] = ()
    contents: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    share: float = 0.8


_ALL = Focus()

# ---- models


def merging(rng: random.Random) -> Any:
    """Return BPE in which the pairs that merge are few, and of any two characters."""
    letters = [chr(code) for code in range(0x21, 0x7F)] + [MARKER, " ", "\n", "\t", *_BEYOND]
    if rng.random() < 0.3:
        letters = [one for one in letters if rng.random() < 0.97]
    has_bytes = rng.random() < 0.6
    parts = [*letters]
    merges: list[tuple[str, str]] = []
    for _ in range(rng.randint(0, 10)):
        pair = rng.choice(parts), rng.choice([MARKER, "a", "b", "1", ".", "K", "e", *parts])
        if pair not in merges:
            merges.append(pair)
            parts.append("".join(pair))
    tokens = ["?", *letters, *(_BYTES if has_bytes else []), *map("".join, merges)]
    return BPE(
        vocab=_numbered(tokens),
        merges=merges,
        unk_token=rng.choice(["?", None]),
        fuse_unk=rng.random() < 0.5,
        byte_fallback=has_bytes,
    )


def byte_level(_: random.Random) -> Any:
    """Return BPE over bytes, whose ids have known lengths."""
    return SYNTHETIC["gpt2"]().model


# ---- components


def _any_normalizer(rng: random.Random) -> Any:
    draws: list[Callable[[], Any]] = [
        normalizers.NFC,
        normalizers.NFC,
        normalizers.NFD,
        normalizers.NFKC,
        normalizers.NFKD,
        normalizers.Lowercase,
        normalizers.Lowercase,
        normalizers.StripAccents,
        normalizers.Nmt,
        lambda: normalizers.Strip(left=rng.random() < 0.5, right=rng.random() < 0.5),
        lambda: normalizers.Prepend(rng.choice([MARKER, "x", "a"])),
        lambda: normalizers.Replace(" ", MARKER),
        lambda: normalizers.Replace(Regex(" {2,}"), rng.choice([" ", MARKER])),
        lambda: normalizers.Replace(Regex(r"\s+"), " "),
        lambda: normalizers.Replace(*rng.choice([("``", '"'), ("''", '"')])),
        lambda: normalizers.Replace(
            rng.choice(["a", "1", "\n", "\t", " .", "ab", "=", "\xe9", "!", "b\n", "_"]),
            rng.choice(["", "x", " ", "<n>", "a b", "1", "\n", "K"]),
        ),
        lambda: normalizers.BertNormalizer(
            clean_text=rng.random() < 0.5,
            handle_chinese_chars=rng.random() < 0.5,
            strip_accents=rng.choice([None, True, False]),
            lowercase=rng.random() < 0.5,
        ),
    ]
    return rng.choice(draws)()


def _split(*names: str, removed: bool = False) -> list[Any]:
    how = {"behavior": "removed", "invert": True} if removed else {"behavior": "isolated"}
    return [pre_tokenizers.Split(Regex(PATTERNS[name]), **how) for name in names]


def _splitting(rng: random.Random) -> list[Any]:
    """Return stages of which cuts are known."""
    draws: list[Callable[[], list[Any]]] = [
        lambda: [pre_tokenizers.BertPreTokenizer()],
        lambda: [pre_tokenizers.Whitespace()],
        lambda: [pre_tokenizers.WhitespaceSplit()],
        lambda: [pre_tokenizers.Punctuation("isolated")],
        lambda: [pre_tokenizers.Digits(individual_digits=rng.random() < 0.5)],
        lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        lambda: [pre_tokenizers.ByteLevel(add_prefix_space=rng.random() < 0.5)],
        lambda: _split(rng.choice(["gpt2", "llama3", "qwen2", "o200k", "tekken", "qwen35"])),
        lambda: _split("qwen2", removed=True),
        lambda: _split("deepseek_v3_numbers", "deepseek_v3_cjk", "deepseek_v3"),
        lambda: [pre_tokenizers.Metaspace(prepend_scheme=_scheme(rng))],
        lambda: [pre_tokenizers.WhitespaceSplit(), _metaspace(rng)],
    ]
    return rng.choice(draws)()


def _scheme(rng: random.Random) -> str:
    return rng.choice(["always", "never", "first", "first"])


def _metaspace(rng: random.Random) -> Any:
    return pre_tokenizers.Metaspace(prepend_scheme=_scheme(rng), split=rng.random() < 0.3)


def _tokens(rng: random.Random, focus: Focus) -> list[AddedToken]:
    found = []
    for _ in range(rng.choice([1, 1, 2, 3] if focus.contents else [0, 1, 1, 2, 3, 6])):
        content = rng.choice(focus.contents or _CONTENTS)
        if not focus.contents and rng.random() < 0.6:
            content = "".join(rng.choices(_ALPHABET, k=rng.randint(1, 3)))
        flags = rng.sample(["lstrip", "rstrip", "single_word"], rng.choice([0, 0, 0, 1, 2]))
        settings = dict.fromkeys(focus.flags or flags, True)
        settings |= {"normalized": rng.random() < focus.share, "special": rng.random() < 0.2}
        found.append(AddedToken(content, **settings))
    return found


def _sequence(kind: Any, parts: list[Any]) -> Any:
    return kind(parts) if len(parts) > 1 else parts[0]


def _sentence_piece(rng: random.Random) -> tuple[Any, list[Any], list[Any]]:
    """Return a model, normalizers and stages without splits, or with few."""
    draw = rng.random()
    stages: list[Any] = [pre_tokenizers.Digits()] if draw < 0.2 else []
    stages = [pre_tokenizers.WhitespaceSplit()] if draw > 0.8 else stages
    unsplit = pre_tokenizers.Metaspace(prepend_scheme=_scheme(rng), split=False)
    parts = [_any_normalizer(rng)] if rng.random() < 0.3 else []
    return merging(rng), parts, [*stages, *([unsplit] if rng.random() < 0.8 else [])]


def _splitting_kind(rng: random.Random) -> tuple[Any, list[Any], list[Any]]:
    """Return a model, normalizers and stages that force cuts."""
    parts = [_any_normalizer(rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    if rng.random() < 0.15:
        return byte_level(rng), parts, [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return _marks_every_boundary(rng), parts, _splitting(rng)


def _draw_once(rng: random.Random, focus: Focus) -> Tokenizer:
    model, parts, stages = (_sentence_piece if rng.random() < 0.4 else _splitting_kind)(rng)
    if focus.models:
        model = rng.choice(focus.models)(rng)
    if focus.normalizers:
        parts = rng.choice(focus.normalizers)(rng)
    if focus.stages:
        stages = rng.choice(focus.stages)(rng)
    made = Tokenizer(model)
    if parts:
        made.normalizer = _sequence(normalizers.Sequence, parts)
    elif rng.random() < 0.3:
        made.normalizer = normalizers.Sequence([])
    if stages:
        made.pre_tokenizer = _sequence(pre_tokenizers.Sequence, stages)
    seen = {""}  # the library would search for an empty token forever
    for token in _tokens(rng, focus):
        is_normalized = token.normalized and made.normalizer is not None
        content = made.normalizer.normalize_str(token.content) if is_normalized else token.content
        # Of two tokens that are equal once normalised, which one is found is random.
        if content not in seen:
            seen.add(content)
            (made.add_special_tokens if token.special else made.add_tokens)([token])
    made.encode_special_tokens = rng.random() < 0.05
    return made


def drawn(rng: random.Random, focus: Focus = _ALL) -> Tokenizer:
    """Return a random tokenizer that the library can build and encode a short text with."""
    while True:
        try:
            made = _draw_once(rng, focus)
            made.encode("ab 1")
        except BaseException as error:  # the library panics over some combinations
            if not is_of_library(error):
                raise
            continue
        return made


# ---- texts


def texts(rng: random.Random, made: Tokenizer, n_texts: int = N_TEXTS) -> Iterator[str]:
    """Yield texts of the added tokens, their halves and other forms, and single characters."""
    contents = [token.content for token in added_tokens(made)] or [" "]
    for _ in range(n_texts):
        n_parts = rng.choice([2, 3, 4, 6, 8] if rng.random() < 0.9 else [12, 40, 400])
        yield "".join(_part(rng, contents) for _ in range(n_parts))


def _part(rng: random.Random, contents: list[str]) -> str:
    forms: list[Literal["NFC", "NFD", "NFKD"]] = ["NFC", "NFD", "NFKD"]
    draw = rng.random()
    if draw < 0.5:
        return rng.choice(_ALPHABET)
    content = rng.choice(contents)
    if draw < 0.65:
        return content
    if draw < 0.75:
        at = rng.randint(0, len(content))
        return rng.choice([content[:at], content[at:]])
    if draw < 0.85:
        return unicodedata.normalize(rng.choice(forms), content)
    if draw < 0.95:
        other = [content.upper(), content.lower(), content.replace(" ", "\n")]
        return rng.choice([*other, content.replace("e", "\xe9"), content.replace('"', "''")])
    return rng.choice(["the cat ", "x\n", "don't ", "1,000 ", " a", "b "])


# ---- comparisons


@dataclass
class Found:
    """What a run of the fuzz has compared; `wrong` are pairs (seed of a tokenizer, text)."""

    n_comparisons: int = 0
    n_tokenizers: int = 0
    n_with_cuts: int = 0
    n_second_phase: int = 0  # tokenizers with cuts, whose library finds tokens inside segments
    wrong: list[tuple[str, str]] = field(default_factory=list)
    off: Counter[str] = field(default_factory=Counter)


def compare(seed: str, found: Found, focus: Focus = _ALL, n_texts: int = N_TEXTS) -> None:
    """Compare the ids of some texts, cached and plain, for the tokenizer of one seed."""
    rng = random.Random(seed)
    made = drawn(rng, focus)
    wrapped: Any = tokcache.wrap(made, CONFIG)
    l1 = wrapped._tokcache.l1
    found.n_tokenizers += 1
    has_cuts = l1 is not None and l1.off is None and any(l1.plan.fine)
    found.n_with_cuts += has_cuts
    is_second = made.normalizer is not None and any(one.normalized for one in added_tokens(made))
    found.n_second_phase += has_cuts and is_second
    for text in texts(rng, made, n_texts):
        right = _outcome(lambda *of, **how: made.encode(*of, **how).ids, text)
        for _ in range(2):  # the second time from the cache
            fresh = "".join([text[:1], text[1:]])
            got = _outcome(wrapped.token_ids, fresh)
            found.n_comparisons += 1
            if got != right:
                found.wrong.append((seed, text))
    refusals = wrapped.cache_stats().l1.refusals
    if refusals.get("segments_differ"):  # the ids were right, but a cut was not
        found.wrong.append((seed, "segments_differ"))


def _outcome(encode: Callable[..., Any], text: str) -> Any:
    try:
        return list(encode(text, add_special_tokens=False))
    except BaseException as error:
        if not is_of_library(error):
            raise
        return type(error).__name__


def main() -> int:
    """Run the fuzz and print the result; exit code 1 if an id was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comparisons", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    found, start, at = Found(), time.monotonic(), 0
    while found.n_comparisons < asked.comparisons:
        compare(f"{asked.seed} {at}", found)
        at += 1
    summary = (
        f"{found.n_comparisons:,} comparisons, {len(found.wrong)} wrong; "
        f"{found.n_tokenizers:,} tokenizers, {found.n_with_cuts:,} with cuts, "
        f"{found.n_second_phase:,} of them with tokens in normalised text; "
        f"seed {asked.seed}, {time.monotonic() - start:.0f} s"
    )
    lines = [summary, *(f"  seed {seed!r}: {text!r}" for seed, text in found.wrong[:5])]
    sys.stdout.write("\n".join([*lines, ""]))
    return bool(found.wrong)


if __name__ == "__main__":
    raise SystemExit(main())
