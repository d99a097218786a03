"""Fuzz: a wrapped tokenizer returns the plain one's ids for texts that share passages.

A history is a sequence of texts, each of which shares passages with earlier ones.
`TOKCACHE_FUZZ_SECONDS` is the total time for histories, with a new seed in each run;
`TOKCACHE_FUZZ_SEED` repeats a run. The seed and the number of comparisons are printed.
`TOKCACHE_FUZZ_ENGINE` sets the engine of every cache.
"""

from __future__ import annotations

import dataclasses
import os
import random
import secrets
import time
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

import tokcache
from tests.text import fuzz_texts
from tests.text.fuzz_texts import corpus_of, dense_text, histories, random_text
from tests.text.tokenizers_combined import combination
from tests.text.tokenizers_made import MADE
from tests.text.tokenizers_synthetic import (
    PRECOMPILED,
    RANDOM,
    SYNTHETIC,
    added_contents,
    plain,
    precompiled,
)
from tokcache import CacheConfig
from tokcache._prefix import n_common

Build = Callable[[], Tokenizer]

REAL = ("gpt2", "qwen2.5", "phi-3-mini", "t5-small", "bert-base-uncased", "minimind")
KINDS: dict[str, Build] = {f"made_{name}": build for name, build in MADE.items()} | SYNTHETIC

SECONDS = float(os.environ.get("TOKCACHE_FUZZ_SECONDS", "0"))
SEED = int(os.environ.get("TOKCACHE_FUZZ_SEED") or (secrets.randbits(32) if SECONDS else 1))
N_TARGETS = len(KINDS) + len(PRECOMPILED) + len(REAL)
SECONDS_TO_SHRINK = 20
ENGINE = os.environ.get("TOKCACHE_FUZZ_ENGINE")
COMBINATION_GROUPS = range(8)  # each group of combinations is a test of its own
MIN_COMBINATIONS = 25  # in a group
COMBINATIONS_SHARE = 0.4  # of the total time

# ---- settings


def configs() -> list[CacheConfig]:
    """Return configurations that use the segment cache differently.

    L0 has one entry only, so that a repeated text reaches the segment cache again.
    """
    names = {field.name for field in dataclasses.fields(CacheConfig)}
    wanted: list[dict[str, Any]] = [
        {"l0_max_entries": 1, "engine": "tokenizers"},
        {"l0_max_entries": 1},
        {"l0_max_entries": 1, "engine": "tokenizers", "l1_max_bytes": 48 << 10},
        {"l1": False},
    ]
    if ENGINE is not None:
        wanted = [one | {"engine": ENGINE} for one in wanted]
    known = [{key: one[key] for key in one if key in names} for one in wanted]
    return [CacheConfig(**one) for at, one in enumerate(known) if one not in known[:at]]


CONFIGS = configs()

# ---- comparisons


class Failure(NamedTuple):
    """The error of a tokenizer for a text that it can't encode."""

    kind: str
    message: str


Outcome = list[int] | Failure


class Panic(Exception):
    """Raised if the tokenizers library panics over a text; there are no ids to compare with."""


def outcome_of(ask: Callable[[], Any]) -> Outcome:
    try:
        return list(ask())
    except Exception as error:  # noqa: BLE001 (a tokenizer may raise any exception)
        if isinstance(error, TypeError):  # the library's TypeError, or InvalidText: equal here
            return Failure("TypeError", "")
        return Failure(type(error).__name__, str(error))
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise Panic from error


def expected(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> Outcome:
    return outcome_of(lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


def cached(wrapped: Any, text: str, add_special_tokens: bool) -> Outcome:
    fresh = "".join([text[:1], text[1:]])  # a new object, as from a request
    return outcome_of(lambda: wrapped.token_ids(fresh, add_special_tokens=add_special_tokens))


class Tally:
    """Counts of comparisons, characters, tokenizers and panics."""

    def __init__(self) -> None:
        self.n_comparisons = 0
        self.n_chars = 0
        self.n_tokenizers = 0
        self.n_panics = 0

    def add(self, text: str) -> None:
        self.n_comparisons += 1
        self.n_chars += len(text)


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    counts = Tally()
    start = time.monotonic()
    yield counts
    plugins = request.config.pluginmanager
    terminal: Any = plugins.getplugin("terminalreporter")
    capture: Any = plugins.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():  # printed without -s, too
        terminal.write_line(
            f"\nL1 parity: {counts.n_comparisons:,} comparisons of {counts.n_chars:,} characters, "
            f"{counts.n_tokenizers} tokenizers, {counts.n_panics} panics in tokenizers, "
            f"{time.monotonic() - start:.0f} s, TOKCACHE_FUZZ_SEED={SEED}"
        )


@pytest.fixture(scope="module")
def corpus(request: pytest.FixtureRequest) -> list[str]:
    try:
        return corpus_of(request.getfixturevalue("shared_data"))
    except pytest.skip.Exception:
        return []  # then only the texts in fuzz_texts are used


class Histories:
    """Runs histories on one tokenizer with several configurations, compared with the plain one."""

    def __init__(self, build: Build, chosen: list[CacheConfig], tally: Tally) -> None:
        self.build = build
        self.tally = tally
        self.plain = plain(build)
        self.wrapped = [(config, tokcache.wrap(build(), config)) for config in chosen]
        self.added = added_contents(self.plain)
        self.asked: list[tuple[str, bool]] = []

    def run(self, rng: random.Random, texts: Iterator[str]) -> None:
        previous = ""
        for text in texts:
            for add_special_tokens in rng.sample([True, False], 2):
                self.compare(text, add_special_tokens)
            if rng.random() < 0.25:
                self.compare(previous, rng.random() < 0.5)
            if rng.random() < 0.15:
                self.compare_batch([text + " and", previous, "x" + text], rng.random() < 0.5)
            previous = text
        # A wrong cut may be detected from the ids; the cache then encodes the whole text and
        # counts this reason. The answer is correct, but the plan is not.
        for config, wrapped in self.wrapped:
            refusals = wrapped.cache_stats().l1.refusals
            assert "segments_differ" not in refusals, (config, SEED, self.asked[-3:])

    def compare(self, text: str, add_special_tokens: bool) -> None:
        self.asked.append((text, add_special_tokens))
        try:
            right = expected(self.plain, text, add_special_tokens)
            for config, wrapped in self.wrapped:
                self.tally.add(text)
                got = cached(wrapped, text, add_special_tokens)
                if got != right:
                    pytest.fail(self.report(config, got, right))
        except Panic:
            self.tally.n_panics += 1

    def compare_batch(self, texts: list[str], add_special_tokens: bool) -> None:
        self.asked += [(text, add_special_tokens) for text in texts]
        try:
            right = [expected(self.plain, text, add_special_tokens) for text in texts]
        except Panic:
            self.tally.n_panics += 1
            return
        if any(isinstance(one, Failure) for one in right):
            return
        for config, wrapped in self.wrapped:
            got = [
                list(ids)
                for ids in wrapped.token_ids_batch(texts, add_special_tokens=add_special_tokens)
            ]
            for text, one, other in zip(texts, got, right, strict=True):
                self.tally.add(text)
                if one != other:
                    pytest.fail(self.report(config, one, other))

    def report(self, config: CacheConfig, got: Outcome, right: Outcome) -> str:
        asked = _shrunk(self.build, config, self.asked)
        return "\n".join(
            [
                f"ids differ under {config} (TOKCACHE_FUZZ_SEED={SEED})",
                _difference(got, right),
                f"asked for, in this order, made smaller ({len(asked)} of {len(self.asked)}):",
                *(f"    {text!r}, {special}" for text, special in asked),
            ]
        )


def _difference(got: Outcome, right: Outcome) -> str:
    if isinstance(got, Failure) or isinstance(right, Failure):
        return f"got {str(got)[:200]}, expected {str(right)[:200]}"
    at = n_common(got, right)
    around = slice(max(0, at - 3), at + 5)
    return f"from token {at}: got …{got[around]}…, expected …{right[around]}…"


def _differs(build: Build, config: CacheConfig, asked: list[tuple[str, bool]]) -> bool:
    """Return whether a new cache, asked these texts in order, answers the last one wrongly."""
    wrapped = tokcache.wrap(build(), config)
    try:
        answers = [cached(wrapped, *one) for one in asked]
        return answers[-1] != expected(plain(build), *asked[-1])
    except Panic:
        return False


def _shrunk(
    build: Build, config: CacheConfig, asked: list[tuple[str, bool]]
) -> list[tuple[str, bool]]:
    """Return fewer and shorter texts whose last answer is still wrong."""
    until = time.monotonic() + SECONDS_TO_SHRINK
    if not _differs(build, config, asked):
        return asked[-1:]  # not reproducible from the texts alone
    few = [asked[-1:], *([one, asked[-1]] for one in reversed(asked[:-1]))]
    asked = next((one for one in few if _differs(build, config, one)), asked)
    for at in range(len(asked)):
        text, special = asked[at]
        size = len(text)
        while size and time.monotonic() < until:
            start = 0
            while start < len(text) and time.monotonic() < until:
                shorter = text[:start] + text[start + size :]
                trial = [*asked[:at], (shorter, special), *asked[at + 1 :]]
                if _differs(build, config, trial):
                    text, asked = shorter, trial
                else:
                    start += size
            size //= 2
    return asked


# ---- histories


def _run(name: str, build: Build, corpus: list[str], tally: Tally) -> None:
    """Run one history of a tokenizer, or with TOKCACHE_FUZZ_SECONDS as many as fit its share."""
    tally.n_tokenizers += 1
    until = time.monotonic() + (1 - COMBINATIONS_SHARE) * SECONDS / N_TARGETS
    for at in count():
        rng = random.Random(zlib.crc32(f"{SEED} {name} {at}".encode()))
        chosen = rng.sample(CONFIGS, min(2, len(CONFIGS)))
        one = Histories(build, chosen, tally)
        size = rng.choice([1500, 1500, 4000, 8000, 20_000])
        n_steps = 16 if SECONDS else 8
        texts = histories(rng, one.added, corpus, size, n_steps)
        one.run(rng, takewhile(lambda _: not SECONDS or time.monotonic() < until, texts))
        one.run(rng, (random_text(rng, one.added, corpus, n_chars=60) for _ in range(6)))
        if time.monotonic() >= until:
            return


@pytest.mark.parametrize("name", KINDS)
def test_histories_of_synthetic_tokenizers(name: str, corpus: list[str], tally: Tally) -> None:
    _run(name, KINDS[name], corpus, tally)


@cache
def _precompiled(shared: Path) -> dict[str, Build]:
    return precompiled(shared / "tokenizers" / "t5-small" / "tokenizer.json")


@pytest.mark.parametrize("name", PRECOMPILED)
def test_histories_of_tokenizers_with_a_character_map(
    name: str, shared_data: Path, corpus: list[str], tally: Tally
) -> None:
    _run(name, _precompiled(shared_data)[name], corpus, tally)


@pytest.mark.parametrize("name", REAL)
def test_histories_of_real_tokenizers(
    name: str, shared_data: Path, corpus: list[str], tally: Tally
) -> None:
    path = shared_data / "tokenizers" / name / "tokenizer.json"
    loaded = Tokenizer.from_file(str(path))  # loaded once: it takes a second
    _run(name, lambda: loaded, corpus, tally)


@pytest.mark.parametrize("group", COMBINATION_GROUPS)
def test_histories_of_combinations(group: int, tally: Tally) -> None:
    until = time.monotonic() + COMBINATIONS_SHARE * SECONDS / len(COMBINATION_GROUPS)
    for at in count():
        if at >= MIN_COMBINATIONS and time.monotonic() >= until:
            return
        seed = f"{SEED} {group} {at}"
        rng = random.Random(seed)
        tally.n_tokenizers += 1
        one = Histories(partial(_combined, seed), rng.sample(CONFIGS[:3], 1), tally)
        one.run(rng, _dense_history(rng, one.added))


def _combined(seed: str) -> Tokenizer:
    return combination(random.Random(seed))


def _dense_history(rng: random.Random, added: list[str]) -> Iterator[str]:
    """Yield texts that share beginnings, some long enough for several chunks."""
    base = ""
    for _ in range(12):
        text = base + dense_text(rng, added, rng.choice([2, 4, 8, 20, 60, 300]))
        yield text
        base = rng.choice(["", base, text])[-3000:]


def test_histories_with_lone_surrogates(tally: Tally) -> None:
    for name in ("gpt2", "bert_uncased", "llama2", "unigram_first_split"):
        one = Histories(KINDS[name], CONFIGS, tally)
        long = "the cat sat on the mat. " * 60
        for text in (long, long + "\ud800", "\ud800", "\udfff" + long, long, long + "\ud83d\ude00"):
            for add_special_tokens in (True, False):
                one.compare(text, add_special_tokens)


@pytest.mark.parametrize("name", RANDOM)
def test_ids_of_a_tokenizer_with_dropout_are_never_cached(name: str) -> None:
    text = "the quick brown fox jumps over the lazy dog and " * 40
    wrapped = tokcache.wrap(RANDOM[name](), CacheConfig())
    answers = {tuple(wrapped.token_ids(text, add_special_tokens=False)) for _ in range(40)}
    assert len(answers) > 1
    piece = plain(RANDOM[name]).decode(list(answers.pop()), skip_special_tokens=False)
    assert len(piece) >= len(text) - text.count(" ")


@pytest.mark.skipif(
    "verify_rate" not in {field.name for field in dataclasses.fields(CacheConfig)},
    reason="CacheConfig has no verify_rate",
)
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama2", "bert_uncased", "mistral"])
def test_verification_finds_no_difference(
    name: str, tally: Tally, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"l0_max_entries": 1, "verify_rate": 1.0}
    one = Histories(KINDS[name], [CacheConfig(**settings)], tally)
    rng = random.Random(SEED)
    with caplog.at_level("WARNING", logger="tokcache"):
        one.run(rng, histories(rng, one.added, max_chars=5000))
    assert [record.getMessage() for record in caplog.records] == []


# ---- texts for which the segment cache of the smg crate returns wrong ids after their prefix

LONG = "You are a helpful assistant. The cat sat on the mat, and it doesn't mind.\n" * 30


def _compare_after_prefix(build: Build, prefix: str, rest: str, tally: Tally) -> None:
    """Compare `prefix + rest` once `prefix`, `rest` and other prefixes of it are cached."""
    for before in ("", "The cat sat. ", LONG):
        one = Histories(build, CONFIGS[:1], tally)
        whole = before + prefix + rest
        for text in (before + prefix, rest, whole, before + prefix + rest[:1], whole + rest, whole):
            for add_special_tokens in (True, False):
                one.compare(text, add_special_tokens)


def _with(name: str, *tokens: AddedToken) -> Build:
    def build() -> Tokenizer:
        made = SYNTHETIC[name]()
        for token in tokens:
            made.add_special_tokens([token]) if token.special else made.add_tokens([token])
        return made

    return build


BASES = ("gpt2", "qwen2", "llama3", "bert_uncased", "unigram_first_split", "llama2", "mistral")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rest", [" hello there", "\n\nhello", "  \t x", "\u3000x", ""])
def test_smg_a_special_token_with_rstrip(base: str, rest: str, tally: Tally) -> None:
    token = AddedToken("<eot>", rstrip=True, special=True, normalized=False)
    _compare_after_prefix(_with(base, token), "All is said.<eot>", rest + LONG[:40], tally)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rest", ["x and more", "xy", "x", "<s>x", "y"])
def test_smg_a_special_token_that_is_a_prefix_of_another(
    base: str, rest: str, tally: Tally
) -> None:
    tokens = (AddedToken(one, special=True, normalized=False) for one in ("<s>", "<s>x", "<s>xy"))
    _compare_after_prefix(_with(base, *tokens), "All is said.<s>", rest, tally)


@pytest.mark.parametrize(
    "name", ["template_suffix", "template_both", "suffix_first", "both_llama2", "suffix_mistral"]
)
def test_smg_a_post_processor_that_adds_a_suffix(name: str, tally: Tally) -> None:
    _compare_after_prefix(SYNTHETIC[name], "All is said.</s>", " hello </s>x", tally)
    _compare_after_prefix(SYNTHETIC[name], "All is said.", " hello", tally)


@pytest.mark.parametrize(
    "base",
    ["unigram_first_split", "unigram_first_unsplit", "bpe_first_split", "bpe_first_unsplit"],
)
@pytest.mark.parametrize("rest", ["hello there", " hello there", "\u2581hello", "\n hello"])
def test_smg_a_marker_before_the_first_word_only(base: str, rest: str, tally: Tally) -> None:
    _compare_after_prefix(SYNTHETIC[base], "All is said.<s>", rest, tally)
    _compare_after_prefix(SYNTHETIC[base], "<s>", rest, tally)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rest", ["hello", " hello", "_x", "\xe9", "1", "\u4f60", ".", "<t>", "t"])
def test_smg_a_special_token_with_single_word(base: str, rest: str, tally: Tally) -> None:
    tokens = [
        AddedToken(one, single_word=True, special=True, normalized=False) for one in ("<t>", "t")
    ]
    _compare_after_prefix(_with(base, *tokens), "All is said <t>", rest + " and more", tally)
    _compare_after_prefix(_with(base, *tokens), "All is said t", rest + " and more", tally)


# ---- ids that depend on the whole text although no token crosses a cut


@pytest.mark.parametrize("name", ["unigram_unsplit_words", "unigram_alone"])
def test_unigram_scores_that_round_differently_give_correct_ids(name: str, tally: Tally) -> None:
    one = Histories(SYNTHETIC[name], CONFIGS[:1], tally)
    for seed in range(12):  # "\n" + "\n\n\n\n" and the reverse differ in the last bit of the score
        text = random_text(random.Random(seed), [], n_chars=20_000)
        one.compare(text, add_special_tokens=False)


@pytest.mark.parametrize("name", ["ignore_merges_unsplit", "ignore_merges_first"])
def test_words_that_are_tokens_only_as_a_whole_text_get_correct_ids(
    name: str, tally: Tally
) -> None:
    """With `ignore_merges`, a text that is a token gets its id even if no merges make it."""
    one = Histories(SYNTHETIC[name], CONFIGS, tally)
    for text in (LONG, "grumble", LONG + "<s>grumble", " grumble", LONG + " grumble grumble", LONG):
        one.compare(text, add_special_tokens=False)


# ---- texts drawn and shrunk by hypothesis

_FILLERS = (
    "the cat sat on the mat ",
    "Hello, world! ",
    "x = y + 1;\n",
    "    return 0\n\n",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "\u043f\u0440\u0438\u0432\u0435\u0442 ",
    "<|im_end|>\n<|im_start|>user\n",
    "a",
    " ",
    "\n",
)
_FRAGMENTS = [
    *fuzz_texts.WHITESPACE,
    *fuzz_texts.NEWLINES,
    *fuzz_texts.CONTRACTIONS,
    *fuzz_texts.PUNCTUATION,
    *fuzz_texts.MARKS,
    *fuzz_texts.FOLDED,
    *fuzz_texts.DIGITS,
    *fuzz_texts.EMOJI,
    *fuzz_texts.NEWER_UNICODE,
    *fuzz_texts.NOT_WHITESPACE,
    *fuzz_texts.WORDS["en"].split(" "),
    *fuzz_texts.WORDS["ru"].split(" "),
    *fuzz_texts.WORDS["zh"].split(" "),
]
_TOKENS = ["<s>", "</s>", "<|t|>", "<s>x", "<|im_start|>", "New York", "ab|cd", "cd|ef", "<mask>"]
_SIMPLE = ["a", " ", "the", "\n", "."]  # first in PART, so that hypothesis shrinks towards them

PART = st.one_of(
    st.sampled_from(_SIMPLE),
    st.sampled_from(_TOKENS),
    st.sampled_from(_FRAGMENTS),
    st.builds(lambda text, times: text * times, st.sampled_from(_FILLERS), st.integers(1, 60)),
    st.text(max_size=3),
)
TEXT = st.lists(PART, max_size=6).map("".join)


@settings(max_examples=120, deadline=None, derandomize=not SECONDS)
@given(
    name=st.sampled_from(sorted(KINDS)), before=TEXT, shared=TEXT, after=TEXT, special=st.booleans()
)
def test_texts_that_share_a_passage_get_correct_ids(
    name: str, before: str, shared: str, after: str, special: bool
) -> None:
    build = KINDS[name]
    reference = plain(build)
    wrapped = tokcache.wrap(build(), CONFIGS[0])
    for text in (before + shared, shared + after, shared, before + shared + after):
        try:
            right = expected(reference, text, special)
            assert cached(wrapped, text, special) == right, (name, text)
        except Panic:
            continue
