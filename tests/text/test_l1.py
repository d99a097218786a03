"""L1 of a wrapped tokenizer: hostile texts, settings, verification, failing encoders, chats."""

from __future__ import annotations

import logging
import os
import pickle
import signal
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

import tokcache
from tests.text.implementations import both, implementation, native
from tests.text.tokenizers_synthetic import SYNTHETIC, TRAINING, plain
from tokcache import CacheConfig
from tokcache.config import ADMIT_ONE_IN, LONG_CHARS
from tokcache.errors import InvalidConfig, InvalidText
from tokcache.text.segments.cache import CHARS_AT_ONCE, L1
from tokcache.text.segments.choice import Chosen

if TYPE_CHECKING:
    from tokcache.text.engines.copying import SegmentEncoder

LINE = "The quick brown fox jumps over the lazy dog, and the dog doesn't mind; it's fine.\n"
WITHOUT_FAST_ENCODER = CacheConfig(engine="tokenizers", l0_max_entries=1)


def _plain_ids(tokenizer: Tokenizer, text: str, special: bool = True) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=special).ids
    return ids


def _cached_ids(wrapped: Any, text: str) -> list[int]:
    ids: list[int] = wrapped.token_ids(text).tolist()
    return ids


def _l1(wrapped: Any) -> L1:
    core = wrapped._tokcache
    core.engine(core.fresh())
    l1 = core.fresh().l1
    assert isinstance(l1, L1)
    return l1


# ---- hostile texts

HOSTILE = {
    "no_cut_ascii": "a" * 1_000_000,
    "no_cut_chinese": "\u4e00" * 300_000,
    "spaces": " " * 1_000_000,
    "newlines": "\n" * 200_000,
    "mixed_whitespace": " \n\t\r\n" * 40_000,
    "every_character_a_cut": "a 1." * 50_000,
    "every_character_a_token": "<s>" * 50_000,
    "almost_a_token": "<s" * 100_000,
    "empty": "",
    "one_character": "x",
}
BUDGET = 1 << 19


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_get_correct_ids_in_bounded_memory(name: str) -> None:
    text = HOSTILE[name]
    wrapped = tokcache.wrap(
        SYNTHETIC["gpt2"](), CacheConfig(engine="tokenizers", l1_max_bytes=BUDGET)
    )
    right = _plain_ids(plain(SYNTHETIC["gpt2"]), text)
    n_times = 1 if len(text) > 250_000 else 3
    for _ in range(n_times):
        assert _cached_ids(wrapped, text) == right
        wrapped.token_ids("another")
        assert wrapped.cache_stats().l1.n_bytes <= BUDGET
    assert wrapped.cache_stats().l1.lookup_chars >= len(text)


@pytest.mark.parametrize("kind", ["gpt2", "llama2", "unigram_first_split"])
@pytest.mark.parametrize("content", [" ", "  ", "\n", "a", "\u2581"])
def test_an_added_token_at_almost_every_position_gives_correct_ids(kind: str, content: str) -> None:
    tokenizer = SYNTHETIC[kind]()
    tokenizer.add_tokens([AddedToken(content, normalized=False)])
    wrapped = tokcache.wrap(tokenizer, WITHOUT_FAST_ENCODER)
    for text in (LINE * 20, LINE * 21, content * 3000, "x" + content * 1000 + LINE, content):
        assert _cached_ids(wrapped, text) == _plain_ids(tokenizer, text)
    assert wrapped.cache_stats().l1.hits + wrapped.cache_stats().l1.misses == 5


@pytest.mark.parametrize("kind", ["gpt2", "bert_uncased", "llama2"])
def test_an_empty_added_token_is_ignored(kind: str) -> None:
    tokenizer = SYNTHETIC[kind]()
    assert tokenizer.add_tokens([AddedToken("", normalized=False)]) == 0
    wrapped = tokcache.wrap(tokenizer, WITHOUT_FAST_ENCODER)
    for text in ("", LINE * 20, LINE * 21):
        assert _cached_ids(wrapped, text) == _plain_ids(tokenizer, text)
    assert wrapped.cache_stats().l1.chunk_hits > 0


@pytest.mark.parametrize("text", ["\ud800", LINE * 40 + "\udfff", "\ud83d\ude00" + LINE * 40])
def test_a_lone_surrogate_raises_and_leaves_the_cache_usable(text: str) -> None:
    tokenizer = SYNTHETIC["gpt2"]()
    wrapped = tokcache.wrap(tokenizer, WITHOUT_FAST_ENCODER)
    place = next(at for at, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    with pytest.raises(InvalidText, match=f"at character {place:,} of"):
        wrapped.token_ids(text)
    assert wrapped.cache_stats().l1.refusals["surrogate"] >= 1
    assert _cached_ids(wrapped, LINE) == _plain_ids(tokenizer, LINE)


# ---- the native look-up


def test_the_native_token_ids_counts_and_stores_as_the_python_one_does() -> None:
    native()
    texts = [LINE * n + str(n) for n in (1, 3, 40, 90)] * 3 + ["", "\U0001f600" + LINE * 30] * 2
    chosen = [(text, special) for text in texts for special in (True, False)]
    asks: list[Callable[[Any, str, bool], Any]] = [
        lambda wrapped, text, special: wrapped.token_ids(text, add_special_tokens=special),
        lambda wrapped, text, special: wrapped._tokcache.find(
            wrapped._tokcache.fresh(), text, special, None
        ),
    ]
    found = []
    for ask in asks:
        wrapped = tokcache.wrap(
            plain(SYNTHETIC["gpt2"]), CacheConfig(engine="tokenizers", l0_max_entries=3)
        )
        _l1(wrapped).cache.cut_seed = bytes(range(48))
        ids = [ask(wrapped, *one).tolist() for one in chosen]
        assert ids == [_plain_ids(plain(SYNTHETIC["gpt2"]), *one) for one in chosen]
        stats = wrapped.cache_stats()
        l0, l1 = stats.l0, replace(stats.l1, n_bytes=0)
        found.append((l0.insertions, l0.hits, l0.misses, l1, stats.encoded_texts))
    assert found[0] == found[1]
    assert found[0][3].hits > 4


# ---- settings


def test_sizes_take_a_unit_and_counts_take_numpys_integers() -> None:
    given: Any = {
        "l0_max_entries": np.int64(7),
        "l0_max_bytes": "64M",
        "l0_sample_size": np.int32(3),
        "l1_max_bytes": "1.5GiB",
    }
    config = CacheConfig(**given)
    sizes = (config.l0_max_entries, config.l0_max_bytes, config.l0_sample_size, config.l1_max_bytes)
    assert sizes == (7, 64 << 20, 3, 3 << 29)
    assert {type(size) for size in sizes} == {int}
    assert config == CacheConfig(
        l0_max_entries=7, l0_max_bytes=64 << 20, l0_sample_size=3, l1_max_bytes=3 << 29
    )
    assert hash(config) == hash(replace(config, l0_max_bytes=64 << 20))
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301 (our own)
    wrapped = tokcache.wrap(
        SYNTHETIC["gpt2"](), CacheConfig(engine="tokenizers", l1_max_bytes="1M")
    )
    assert _cached_ids(wrapped, TEXT) == _plain_ids(SYNTHETIC["gpt2"](), TEXT)
    with pytest.raises(InvalidConfig, match=r'l1_max_bytes must be .* such as "64M"'):
        CacheConfig(l1_max_bytes="64MB")


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("verify_rate", [-0.1, 1.1, "1", None, True, float("nan")]),
        ("engine", ["", "Auto", "rust", None, 1, True]),
        ("l1_max_bytes", [0, -1, 1.5, "7x", "0", None, True, 2**62 + 1]),
        ("l1", [1, 0, None, "yes"]),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidConfig, match=f"^{setting} must be "):
            CacheConfig(**{setting: value})


def test_settings_at_their_limits_work() -> None:
    for rate in (0, 0.0, 1, 1.0):
        config = CacheConfig(engine="tokenizers", verify_rate=rate, l1_max_bytes=1)
        wrapped = tokcache.wrap(SYNTHETIC["gpt2"](), config)
        for _ in range(2):
            assert _cached_ids(wrapped, LINE * 50) == _plain_ids(SYNTHETIC["gpt2"](), LINE * 50)
        assert wrapped.cache_stats().l1.n_bytes == 0
    off = tokcache.wrap(SYNTHETIC["gpt2"](), CacheConfig(l1=False))
    off.token_ids(LINE * 50)
    assert off.cache_stats().l1.lookup_chars == 0


# ---- encoders that return wrong ids


class Encoder:
    """A fast encoder that encodes as tokenizers does, and passes the ids through `spoil`."""

    name = "spoilt"

    def __init__(
        self,
        sure: SegmentEncoder,
        spoil: Callable[[list[int]], list[int]] = list,
        *,
        is_fork_safe: bool = True,
        holds_lock: bool = False,
    ) -> None:
        self.holds_lock = holds_lock
        self.sure = sure
        self.spoil = spoil
        self.is_fork_safe = is_fork_safe
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str]) -> list[Any]:
        self.texts += texts
        return [memoryview(array("I", self.spoil(ids))) for ids in map(self._sure_ids, texts)]

    def _sure_ids(self, text: str) -> list[int]:
        ids: list[int] = self.sure.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def vocabulary(self) -> dict[int, bytes]:
        return {}


def _use(wrapped: Any, spoil: Callable[[list[int]], list[int]] = list, **how: Any) -> Encoder:
    """Make L1 encode with an `Encoder`, as if it had passed the proof; return it."""
    l1 = _l1(wrapped)
    encoders = [Encoder(sure, spoil, **how) for sure in l1._sure]
    l1._take(Chosen(dict(enumerate(encoders)), "proven"))
    return encoders[0]


def test_an_encoder_that_holds_the_gil_encodes_a_short_text_in_the_thread_that_asks() -> None:
    """No other thread can ask for the text meanwhile. For a long one it can, between the calls."""
    wrapped = _wrapped(0.0)
    l1 = _l1(wrapped)
    asked: list[str] = []

    def encode_once(_: Any, key: Any, complete: Callable[[], Any]) -> Any:
        asked.append(key[0])
        return complete()

    words = "".join(f"line {n:06d} of many\n" for n in range(10_000))
    texts = words[:500], words[: CHARS_AT_ONCE + 1]
    for holds_lock, wanted in ((True, [texts[1]]), (False, [*texts])):
        _use(wrapped, holds_lock=holds_lock)
        asked.clear()
        l1.clear(None, 0)
        for text in texts:
            ids, _ = l1.encode(text, False, None, 0, encode_once)
            assert ids is not None
            assert ids.tolist() == wrapped.encode(text, add_special_tokens=False).ids
        assert asked == wanted


def test_an_encoder_that_holds_the_gil_gets_a_long_text_in_several_calls() -> None:
    """Other threads can run between the calls."""
    wrapped = _wrapped(0.0)
    encoder = _use(wrapped, holds_lock=True)
    words = "".join(f"line {n:06d} of many\n" for n in range(30_000))
    for text in (words, words[:1000] + "x" * (CHARS_AT_ONCE + 1) + "\n" + words[-1000:]):
        assert wrapped.token_ids(text).tolist() == wrapped.encode(text).ids
    longest = max(map(len, encoder.texts))
    assert CHARS_AT_ONCE // 2 < longest < 2 * CHARS_AT_ONCE  # with the separators
    assert len(encoder.texts) > len(words) // CHARS_AT_ONCE
    assert "engine_dropped" not in wrapped.cache_stats().l1.refusals


def _with_a_wrong_first_id(ids: list[int]) -> list[int]:
    """Return the ids with the first one replaced by another token of the same byte length."""
    tokenizer = SYNTHETIC["gpt2"]()
    lengths = {index: len(token) for token, index in tokenizer.get_vocab().items()}
    other = next(
        index
        for index, length in sorted(lengths.items())
        if length == lengths[ids[0]] and index not in ids
    )
    return [other, *ids[1:]]


def _raises_overflow_error(_: list[int]) -> list[int]:
    raise OverflowError("too many words")


class Panic(BaseException):
    """Stands for the exception of a crash in Rust, which is a BaseException."""


def _panics(_: list[int]) -> list[int]:
    raise Panic("index out of bounds")


def _wrapped(verify_rate: float) -> Any:
    config = CacheConfig(engine="tokenizers", l0_max_entries=1, verify_rate=verify_rate)
    return tokcache.wrap(SYNTHETIC["gpt2"](), config)


def _spoil_reference_encoder(wrapped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tokenizers itself return wrong ids, as if the text had been cut at wrong places."""
    for sure in _l1(wrapped)._sure:
        right = sure.encode
        monkeypatch.setattr(
            sure,
            "encode",
            lambda parts, right=right: [_with_a_wrong_first_id(ids) for ids in right(parts)],
        )


TEXT = LINE * 60
CHATS = [TEXT, TEXT + "Hello", "<s>" + TEXT, TEXT + "\n\n" + TEXT, TEXT]


@pytest.mark.parametrize("has_fast_encoder", [False, True])
def test_verification_finds_a_wrong_answer_and_turns_l1_off(
    has_fast_encoder: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped = _wrapped(verify_rate=1.0)
    _spoil_reference_encoder(wrapped, monkeypatch)
    if has_fast_encoder:
        _use(wrapped, _with_a_wrong_first_id)
    engine = _l1(wrapped).engine
    with caplog.at_level("ERROR", logger="tokcache"):
        assert _cached_ids(wrapped, TEXT) == _plain_ids(SYNTHETIC["gpt2"](), TEXT)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "first difference at token 0 of" in record.getMessage()
    assert f"engine {engine}" in record.getMessage()
    assert "quick brown fox" not in record.getMessage()
    stats = wrapped.cache_stats().l1
    assert stats.refusals["differences"] == stats.refusals["verified"] == 1
    assert stats.n_chunks == stats.n_segments == 0
    assert _l1(wrapped).off == "difference"
    for text in CHATS:
        assert _cached_ids(wrapped, text) == _plain_ids(SYNTHETIC["gpt2"](), text)
    assert wrapped.cache_stats().l1.lookup_chars == stats.lookup_chars  # L1 was not used again


@both
def test_verification_drops_the_fast_encoder_whose_answer_was_wrong(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    implementation(name).use(monkeypatch)
    wrapped = _wrapped(verify_rate=1.0)
    _use(wrapped, _with_a_wrong_first_id)
    secret = wrapped.scoped("a")
    with caplog.at_level("ERROR", logger="tokcache"):
        assert secret.token_ids(TEXT).tolist() == _plain_ids(SYNTHETIC["gpt2"](), TEXT)
    (record,) = caplog.records
    assert "engine spoilt is dropped" in record.getMessage()
    assert "first difference at token 0 of" in record.getMessage()
    assert "quick brown fox" not in record.getMessage()
    assert (_l1(wrapped).engine, _l1(wrapped).off) == ("tokenizers", None)
    stats = wrapped.cache_stats().l1
    assert stats.refusals == {"differences": 1, "verified": 1, "engine_dropped": 1}
    assert stats.n_chunks == stats.n_segments == 0
    for text in CHATS:
        assert _cached_ids(wrapped, text) == _plain_ids(SYNTHETIC["gpt2"](), text)
    assert wrapped.cache_stats().l1.hits > 0
    assert len(caplog.records) == 1


def test_verification_finds_a_wrong_answer_that_was_cached(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped = _wrapped(verify_rate=0.5)
    _l1(wrapped)._verify_rate = 0.0  # no text is verified yet
    _spoil_reference_encoder(wrapped, monkeypatch)
    right = _plain_ids(SYNTHETIC["gpt2"](), TEXT)
    assert _cached_ids(wrapped, TEXT) != right
    wrapped.token_ids("another")
    _l1(wrapped)._verify_rate = 0.5
    with caplog.at_level("ERROR", logger="tokcache"):
        for at in range(100):
            wrapped.token_ids(f"another {at}")
            if _l1(wrapped).off is not None:
                break
            wrapped.token_ids(TEXT)
    assert _l1(wrapped).off == "difference"
    assert len(caplog.records) == 1
    assert _cached_ids(wrapped, TEXT) == right


def test_without_verification_a_wrong_answer_is_not_found(caplog: pytest.LogCaptureFixture) -> None:
    wrapped = _wrapped(verify_rate=0.0)
    _use(wrapped, _with_a_wrong_first_id)
    right = _plain_ids(SYNTHETIC["gpt2"](), TEXT)
    for _ in range(3):
        assert _cached_ids(wrapped, TEXT) != right
        wrapped.token_ids("another")
    assert _l1(wrapped).off is None
    assert caplog.records == []
    assert "verified" not in wrapped.cache_stats().l1.refusals


def test_verification_of_correct_answers_only_counts(caplog: pytest.LogCaptureFixture) -> None:
    wrapped = _wrapped(verify_rate=1.0)
    for text in CHATS:
        assert _cached_ids(wrapped, text) == _plain_ids(SYNTHETIC["gpt2"](), text)
    assert wrapped.cache_stats().l1.refusals == {"verified": len(CHATS)}
    assert _l1(wrapped).off is None
    assert caplog.records == []


# ---- encoders that fail after the proof


def _drops_separators(sure: SegmentEncoder) -> Callable[[list[int]], list[int]]:
    return lambda ids: [index for index in ids if index != sure.separator]


def _adds_separators(sure: SegmentEncoder) -> Callable[[list[int]], list[int]]:
    return lambda ids: [*ids, sure.separator]


FAILURES: dict[str, Callable[[SegmentEncoder], Callable[[list[int]], list[int]]]] = {
    "raises": lambda _: _raises_overflow_error,
    "panics": lambda _: _panics,
    "drops_separators": _drops_separators,
    "adds_separators": _adds_separators,
}


@both
@pytest.mark.parametrize("how", FAILURES)
def test_an_encoder_that_fails_later_is_dropped_with_an_error_in_the_log(
    name: str, how: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    implementation(name).use(monkeypatch)
    wrapped = _wrapped(verify_rate=0.0)
    encoder = _use(wrapped)
    text = f"{TEXT}<s>Hello<s>{TEXT}"
    assert _cached_ids(wrapped, text) == _plain_ids(SYNTHETIC["gpt2"](), text)
    assert encoder.texts
    assert (_l1(wrapped).engine, caplog.records) == ("spoilt", [])
    encoder.spoil = FAILURES[how](encoder.sure)
    with caplog.at_level("ERROR", logger="tokcache"):
        for number in range(3):
            more = f"{text} New {number}<s>York {number}"
            assert _cached_ids(wrapped, more) == _plain_ids(SYNTHETIC["gpt2"](), more)
    (record,) = caplog.records
    assert "engine spoilt is dropped" in record.getMessage()
    assert _l1(wrapped).engine == "tokenizers"
    assert any("spoilt was dropped" in note for note in _l1(wrapped).notes)
    assert wrapped.cache_stats().l1.refusals == {"engine_dropped": 1}
    n_calls = len(encoder.texts)
    wrapped.token_ids("something new")
    assert len(encoder.texts) == n_calls


def test_an_encoder_used_by_two_variants_is_dropped_once(caplog: pytest.LogCaptureFixture) -> None:
    config = CacheConfig(engine="tokenizers", l0_max_entries=1)
    build = SYNTHETIC["gpt2_prefix_space"]
    wrapped = tokcache.wrap(build(), config)
    encoder = _use(wrapped)
    variants = _l1(wrapped)._variants
    assert [one.fast is not None for one in variants] == [True, True]
    assert _cached_ids(wrapped, TEXT) == _plain_ids(build(), TEXT)
    assert encoder.texts
    for one in variants:
        one.fast.spoil = _raises_overflow_error  # type: ignore[union-attr]
    with caplog.at_level("ERROR", logger="tokcache"):
        for text in ("New " + TEXT, "York " + TEXT):
            assert _cached_ids(wrapped, text) == _plain_ids(build(), text)
    (record,) = caplog.records
    assert "engine spoilt is dropped" in record.getMessage()
    assert wrapped.cache_stats().l1.refusals == {"engine_dropped": 1}


def test_an_interrupt_does_not_drop_the_encoder() -> None:
    """Ctrl-C says nothing about the encoder."""

    def interrupted(_: list[int]) -> list[int]:
        raise KeyboardInterrupt

    wrapped = _wrapped(verify_rate=0.0)
    encoder = _use(wrapped, interrupted)
    with pytest.raises(KeyboardInterrupt):
        wrapped.token_ids(TEXT)
    assert _l1(wrapped).engine == "spoilt"
    encoder.spoil = list
    assert _cached_ids(wrapped, TEXT) == _plain_ids(SYNTHETIC["gpt2"](), TEXT)


def test_characters_the_encoders_disagree_on_never_reach_a_fast_encoder() -> None:
    wrapped = _wrapped(verify_rate=0.0)
    encoder = _use(wrapped)
    text = TEXT + "<s>unknown \u0378 \U0001fae9<s>understood"
    assert _cached_ids(wrapped, text) == _plain_ids(SYNTHETIC["gpt2"](), text)
    seen = "".join(encoder.texts)
    assert "understood" in seen
    assert not {"\u0378", "\U0001fae9"} & set(seen)
    assert _l1(wrapped).engine == "spoilt"


# ---- after a fork


def _in_child(check: Callable[[], bool]) -> int:
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if check() else 1)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("is_fork_safe", [True, False])
def test_a_forked_child_answers_correctly(is_fork_safe: bool) -> None:
    wrapped = _wrapped(verify_rate=0.0)
    _use(wrapped, is_fork_safe=is_fork_safe)
    wrapped.token_ids(TEXT)
    right = {text: _plain_ids(SYNTHETIC["gpt2"](), text) for text in CHATS}
    engine = "spoilt" if is_fork_safe else "tokenizers"

    def answers() -> bool:
        ids = {text: _cached_ids(wrapped, text) for text in CHATS}
        return ids == right and _l1(wrapped).engine == engine

    assert _in_child(answers) == 0
    assert _l1(wrapped).engine == "spoilt"
    assert {text: _cached_ids(wrapped, text) for text in CHATS} == right


@both
def test_a_forked_child_uses_the_parents_cached_chunks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    implementation(name).use(monkeypatch)
    wrapped = _wrapped(verify_rate=0.0)
    wrapped.token_ids(TEXT)
    right = {text: _plain_ids(SYNTHETIC["gpt2"](), text) for text in CHATS}
    hits = wrapped.cache_stats().l1.chunk_hits

    def answers() -> bool:
        ids = {text: _cached_ids(wrapped, text) for text in CHATS}
        return ids == right and wrapped.cache_stats().l1.chunk_hits > hits

    assert _in_child(answers) == 0
    assert answers()


# ---- growing chats

CHAT_KINDS = (
    "gpt2", "llama3", "cl100k_removed", "cl100k_tiktoken", "bailing", "qwen2", "qwen35",
    "seed_coder", "o200k", "tekken", "deepseek_v3", "falcon", "starcoder", "bert_uncased",
    "whitespace", "xlm_roberta", "unigram_always_split", "unigram_never_split",
    "unigram_first_split", "bpe_always_split", "llama2", "phi3", "gemma", "literal_gpt2",
)  # fmt: skip


def _history(n_turns: int) -> Sequence[str]:
    """Return the prompts of a chat; each extends the previous one by a turn."""
    prompts = ["<s>system\n" + " ".join(TRAINING[:9]).replace("\u0130", "I") * 2]
    for at in range(n_turns):
        turn = f"</s><s>user\nQuestion {at}: {TRAINING[at % 9]}</s><s>assistant\n"
        prompts.append(prompts[-1] + turn + f"Answer {at}: {TRAINING[(at + 4) % 9]}")
    return prompts


@pytest.mark.parametrize(
    ("name", "kind"),
    [("native", kind) for kind in CHAT_KINDS]
    + [("reference", kind) for kind in ("gpt2", "bert_uncased", "llama2", "unigram_first_split")],
)
def test_a_growing_chat_is_composed_of_cached_chunks(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    implementation(name).use(monkeypatch)
    tokenizer = SYNTHETIC[kind]()
    wrapped = tokcache.wrap(tokenizer, WITHOUT_FAST_ENCODER)
    prompts = _history(12)
    for prompt in prompts:
        assert _cached_ids(wrapped, prompt) == _plain_ids(tokenizer, prompt)
    stats = wrapped.cache_stats().l1
    n_chars = sum(map(len, prompts))
    assert stats.lookup_chars == n_chars
    assert stats.chunk_hits > len(prompts)
    assert stats.engine_chars < n_chars / 4
    assert stats.char_hit_rate > 0.5
    assert stats.refusals == {}


@pytest.mark.parametrize("scope", [None, "a"])  # looked up in native code, and in Python
def test_one_in_eight_long_texts_of_cached_chunks_is_kept_whole(scope: str | None) -> None:
    wrapped: Any = tokcache.wrap(SYNTHETIC["gpt2"](), WITHOUT_FAST_ENCODER)
    passages = [
        "".join(f"Line {at} of passage {n} has {n * at} words.\n" for at in range(9, 13))
        for n in range(20)
    ]
    texts = ["".join(passages[at:] + passages[:at]) for at in range(20)]
    assert len(texts[0]) > LONG_CHARS
    for text in texts * 10:
        assert wrapped.token_ids(text, scope=scope).tolist() == wrapped.encode(text).ids
    stats = wrapped.cache_stats()
    assert stats.l1.hits > 2 * ADMIT_ONE_IN  # where chunks end is random, and so is their number
    n_encoded = stats.encoded_texts
    n_put_together = len(texts) * 10 - n_encoded
    assert stats.l0.insertions == n_encoded + n_put_together // ADMIT_ONE_IN
