"""Cache files: another cache loads the dumped entries; no file can cause a wrong answer."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors

import tokcache
from tests.text.implementations import both, implementation
from tests.text.test_l0 import TRICKY
from tests.text.tokenizers_made import MADE, TEXTS, fast
from tests.text.tokenizers_synthetic import RANDOM, SYNTHETIC
from tokcache.errors import (
    Damaged,
    InvalidCacheFile,
    InvalidConfig,
    InvalidScope,
    MissingFile,
    NothingCached,
    TokenizerChanged,
)
from tokcache.text import cache_file as warm
from tokcache.text.cache_file import format as warm_file
from tokcache.text.cache_file.format import Entry, Header, Kind
from tokcache.text.engines.copying import HuggingFaceEngine, SegmentEncoder

KEY = b"sixteen bytes or more of it"
CONFIG = tokcache.CacheConfig(engine="tokenizers")
LINE = "The quick brown fox jumps over the lazy dog, and the dog doesn't mind; it's fine.\n"
MESSAGES = [f"<s>user {at} says:\n" + LINE * 4 + f"That was number {at}.</s>" for at in range(6)]
LONG = ["".join(MESSAGES[:at]) for at in range(1, 7)]
REAL = ("qwen2.5", "gpt2", "phi-3-mini", "bert-base-uncased", "t5-small", "minimind")

Wrapped = Any
on_both = pytest.mark.usefixtures("implementation_used")


@pytest.fixture(params=["reference", "native"])
def implementation_used(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test once with the reference implementation and once with the native one."""
    return use_implementation(request.param, monkeypatch)


def use_implementation(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    one = implementation(name)
    one.use(monkeypatch)
    return name


@pytest.fixture
def engine_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls of `encode` on both engine classes."""
    calls: Counter[str] = Counter()
    for kind, method in (
        (HuggingFaceEngine, "encode"),
        (SegmentEncoder, "encode"),
    ):
        plain = getattr(kind, method)

        def counting(self: Any, *args: Any, plain: Any = plain, method: str = method) -> Any:
            calls[method] += 1
            return plain(self, *args)

        monkeypatch.setattr(kind, method, counting)
    return calls


def wrapped(kind: str = "byte_level_bpe", **settings: Any) -> Wrapped:
    build = MADE.get(kind) or SYNTHETIC[kind]
    return tokcache.wrap(build(), replace(CONFIG, **settings))


def filled(kind: str = "byte_level_bpe", texts: Any = (*TEXTS, *LONG), **settings: Any) -> Wrapped:
    tok = wrapped(kind, **settings)
    for text in texts:
        for special in (True, False):
            tok.token_ids(text, add_special_tokens=special)
    return tok


def cache_contents(tok: Wrapped) -> Any:
    """Return the texts and segments of a cache, and its counters."""
    core = tok._tokcache
    l1 = core.l1
    parts = (l1.cache.held_chunks(), l1.cache.held_segments(), l1.cache.cut_seed) if l1 else None
    return core._generation.l0.held(), parts, core.stats()


def dump_small_cache(path: Path, key: bytes | None = None) -> bytes:
    tok = filled(texts=["hello world", "naïve 東京"])
    tok.token_ids("hello", scope="tenant")
    tok.cache_dump(path, key=key)
    return path.read_bytes()


# ---- dump and load


@pytest.mark.parametrize(
    "kind", [*MADE, "gpt2", "qwen2", "bert_uncased", "llama2", "phi3", "unigram_first_split"]
)
def test_a_loaded_cache_answers_without_the_engine(
    implementation_used: str, kind: str, tmp_path: Path, engine_calls: Counter[str]
) -> None:
    tok = filled(kind)
    dumped = tok.cache_dump(tmp_path / "cache")
    new = wrapped(kind)
    loaded = new.cache_load(tmp_path / "cache")
    assert dumped.n_texts == loaded.n_texts == len(tok._tokcache._generation.l0) > 0
    assert dumped.n_chunks == loaded.n_chunks
    assert dumped.n_bytes == loaded.n_bytes == (tmp_path / "cache").stat().st_size
    assert dumped.left_out == {}
    assert set(loaded.left_out) <= {"no_room"}  # a set of the segment table may be full
    assert implementation_used == "native" or loaded == dumped
    engine_calls.clear()
    for text in (*TEXTS, *LONG):
        for special in (True, False):
            ids = new.token_ids(text, add_special_tokens=special)
            assert ids == tok.token_ids(text, add_special_tokens=special)
            assert ids.tolist() == new.encode(text, add_special_tokens=special).ids
    assert engine_calls == {}
    stats = new.cache_stats()
    assert stats.l0.hits == stats.l0.n_entries
    new._tokcache._generation.l0._check()
    if new._tokcache.l1 is not None:
        new._tokcache.l1.cache._check()


@on_both
@pytest.mark.parametrize("kind", ["byte_level_bpe", "gpt2", "qwen2", "llama2", "phi3"])
def test_loaded_chunks_in_another_order_need_no_engine(
    kind: str, tmp_path: Path, engine_calls: Counter[str]
) -> None:
    tok = filled(kind, [*LONG, "".join(MESSAGES[::-1])])
    others = ["".join(MESSAGES[::2]), "".join(MESSAGES[1:5]), "".join(MESSAGES[::-2])]
    for text in others:  # their chunks are cached, the texts are not
        tok.token_ids(text)
    tok._tokcache._generation.l0.clear()
    tok.cache_dump(tmp_path / "cache")
    new = wrapped(kind)
    report = new.cache_load(tmp_path / "cache")
    assert report.n_texts == 0
    assert report.n_chunks > 0
    engine_calls.clear()
    for text in others:
        assert new.token_ids(text).tolist() == new.encode(text).ids
    assert engine_calls == {}
    assert new.cache_stats().l1.chunk_misses == 0


@on_both
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_answer_from_a_loaded_cache(
    shared_data: Path, name: str, tmp_path: Path, engine_calls: Counter[str]
) -> None:
    file = str(shared_data / "tokenizers" / name / "tokenizer.json")
    tok = tokcache.wrap(Tokenizer.from_file(file), CONFIG)
    texts = [*TEXTS, *LONG]
    right = [tok.token_ids(text, scope="a") for text in texts]
    report = tok.cache_dump(tmp_path / "cache")
    new = tokcache.wrap(Tokenizer.from_file(file), CONFIG)
    assert new.cache_load(tmp_path / "cache").n_texts == report.n_texts > 0
    engine_calls.clear()
    assert [new.token_ids(text, scope="a") for text in texts] == right
    assert engine_calls == {}


def test_a_transformers_tokenizer_loads_only_with_equal_settings(
    tmp_path: Path, engine_calls: Counter[str]
) -> None:
    def made(**settings: Any) -> Wrapped:
        return tokcache.wrap(fast(MADE["byte_level_bpe"](), **settings), CONFIG)

    tok = made()
    right = [tok(text).data for text in (*TEXTS, *LONG)]
    tok.cache_dump(tmp_path / "cache")
    new = made()
    new.cache_load(tmp_path / "cache")
    engine_calls.clear()
    assert [new(text).data for text in (*TEXTS, *LONG)] == right
    assert engine_calls == {}
    other = made(split_special_tokens=True)
    with pytest.raises(InvalidCacheFile, match="other settings"):
        other.cache_load(tmp_path / "cache")
    new.split_special_tokens = True
    with pytest.raises(InvalidCacheFile, match="other settings"):
        new.cache_load(tmp_path / "cache")


@both
def test_every_kind_of_string_survives_dump_and_load(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_implementation(name, monkeypatch)
    monkeypatch.setattr(warm, "_verify", lambda *_: None)  # no tokenizer encodes a lone surrogate
    tok, new = wrapped("word_level"), wrapped("word_level")
    for number, text in enumerate(TRICKY):
        tok._tokcache._generation.l0.put(
            text, [number % 4], add_special_tokens=number % 2 == 0, scope="\ud800 scope"
        )
    assert tok.cache_dump(tmp_path / "cache").n_texts == len(TRICKY)
    assert new.cache_load(tmp_path / "cache").n_texts == len(TRICKY)
    for number, text in enumerate(TRICKY):
        assert new._tokcache.get(text, number % 2 == 0, "\ud800 scope") == [number % 4]
    assert new._tokcache._generation.l0.held() == tok._tokcache._generation.l0.held()


@on_both
def test_dumping_and_loading_an_empty_cache(tmp_path: Path) -> None:
    report = wrapped().cache_dump(tmp_path / "cache")
    assert (report.n_texts, report.n_chunks, report.n_segments, report.left_out) == (0, 0, 0, {})
    new = filled()
    before = cache_contents(new)
    assert new.cache_load(tmp_path / "cache") == report
    assert cache_contents(new) == before


@on_both
def test_loading_twice_changes_nothing(tmp_path: Path) -> None:
    tok = filled()
    report = tok.cache_dump(tmp_path / "cache")
    before = cache_contents(tok)
    again = tok.cache_load(tmp_path / "cache")
    assert cache_contents(tok) == before
    assert again.left_out == {"held": report.n_texts + report.n_chunks + report.n_segments}


@on_both
def test_loading_keeps_the_order_of_use(tmp_path: Path) -> None:
    tok = filled()
    tok.token_ids(TEXTS[2])
    tok.cache_dump(tmp_path / "cache")
    new = wrapped()
    new.cache_load(tmp_path / "cache")
    texts, (chunks, _, seed), _ = cache_contents(tok)
    new_texts, (new_chunks, _, new_seed), _ = cache_contents(new)
    assert new_texts == texts
    assert texts[0][0] == TEXTS[2]
    assert sorted(new_chunks) == sorted(chunks)
    assert new_seed == seed


@pytest.mark.parametrize("kind", [*MADE, *(k for k in SYNTHETIC if "without_unk" not in k)])
def test_verification_accepts_every_correct_segment(kind: str) -> None:
    tok = filled(kind, [*LONG, *TEXTS[:5], *(f"{a} <x> {b}" for a in TEXTS for b in LONG[:1])])
    l1 = tok._tokcache.l1
    if l1 is None or l1.off is not None:
        pytest.skip(f"L1 is off: {l1 and l1.off}")
    rows = [*l1.cache.held_chunks(), *l1.cache.held_segments()]
    for text, ids, _, variant, *_ in rows:
        assert l1.encode_chunk(text, variant) in (ids.tolist(), None), text
    assert any(l1.encode_chunk(text, variant) is not None for text, _, _, variant, *_ in rows)


# ---- files that are refused


def assert_refused(
    tok: Wrapped, path: Path, match: str = "nothing was loaded", key: bytes | None = None
) -> None:
    before = cache_contents(tok)
    with pytest.raises(InvalidCacheFile, match=match):
        tok.cache_load(path, key=key)
    assert cache_contents(tok) == before


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("flipped", [0xFF, 1])
def test_every_flipped_byte_is_refused(tmp_path: Path, key: bytes | None, flipped: int) -> None:
    path = tmp_path / "cache"
    good = dump_small_cache(path, key)
    new = filled(texts=["something else"])
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ flipped]) + good[at + 1 :])
        assert_refused(new, path, str(path), key)
    path.write_bytes(good)
    assert new.cache_load(path, key=key).n_texts > 0


def test_truncated_and_extended_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    good = dump_small_cache(path)
    new = wrapped()
    for n_bytes in range(len(good)):
        path.write_bytes(good[:n_bytes])
        assert_refused(new, path)
    for more in (b"\0", good, b"x" * 5000):
        path.write_bytes(good + more)
        assert_refused(new, path, "bytes that belong to no entry")
    path.write_bytes(b"")
    assert_refused(new, path, "too short")
    path.write_bytes(b"#!/usr/bin/env python3\n" * 99)
    assert_refused(new, path, "is not a cache file")


def retokenized(change: Callable[[Tokenizer], Any]) -> Tokenizer:
    made = MADE["byte_level_bpe"]()
    change(made)
    return made


def _swap_merges(made: Tokenizer) -> None:
    state = json.loads(made.to_str())
    merges = state["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]
    made.model = Tokenizer.from_str(json.dumps(state)).model


def _drop_last_merge(made: Tokenizer) -> None:
    state = json.loads(made.to_str())
    state["model"]["merges"].pop()
    made.model = Tokenizer.from_str(json.dumps(state)).model


CHANGES: dict[str, Callable[[Tokenizer], Any]] = {
    "an added token": lambda made: made.add_tokens(["another"]),
    "an added special token": lambda made: made.add_special_tokens(["another"]),
    "flags of a token": lambda made: made.add_special_tokens([AddedToken("<mask>", rstrip=True)]),
    "a normalizer": lambda made: setattr(made, "normalizer", normalizers.Lowercase()),
    "a pre-tokenizer": lambda made: setattr(
        made, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "a post-processor": lambda made: setattr(
        made, "post_processor", processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    ),
    "encode_special_tokens": lambda made: setattr(made, "encode_special_tokens", True),
    "the order of merges": _swap_merges,
    "a missing merge": _drop_last_merge,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_of_another_tokenizer_is_refused(
    tmp_path: Path, change: Callable[[Tokenizer], Any]
) -> None:
    dump_small_cache(tmp_path / "cache")
    other = tokcache.wrap(retokenized(change), CONFIG)
    other.token_ids("hello")
    assert_refused(other, tmp_path / "cache", "another tokenizer")
    changed = filled(texts=["hello"])
    changed.cache_load(tmp_path / "cache")
    change(changed)
    assert_refused(changed, tmp_path / "cache", "another tokenizer")


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind != "byte_level_bpe"])
def test_a_file_of_another_kind_of_tokenizer_is_refused(tmp_path: Path, kind: str) -> None:
    dump_small_cache(tmp_path / "cache")
    assert_refused(filled(kind), tmp_path / "cache", "another tokenizer")


def test_truncation_and_padding_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    dump_small_cache(tmp_path / "cache")
    new = wrapped()
    new.enable_truncation(3)
    new.enable_padding(length=10)
    assert new.cache_load(tmp_path / "cache").n_texts > 0
    assert (
        new.token_ids("hello world").tolist() == MADE["byte_level_bpe"]().encode("hello world").ids
    )


def test_a_fingerprint_is_the_same_in_another_process() -> None:
    for kind in MADE:
        made = MADE[kind]()
        code = (
            "import sys; from tokenizers import Tokenizer; from tokcache.text.cache_file import *\n"
            "print(fingerprint(Tokenizer.from_str(sys.stdin.read())).hex())"
        )
        done = subprocess.run(  # noqa: S603 (our own code)
            [sys.executable, "-c", code],
            input=made.to_str(), capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == warm.fingerprint(made).hex()


def test_a_file_of_another_tokenizers_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump_small_cache(tmp_path / "cache")
    monkeypatch.setattr("tokenizers.__version__", "0.1.0")
    assert_refused(wrapped(), tmp_path / "cache", "another version of tokenizers")


# ---- forged files


def forge(
    tok: Wrapped,
    path: Path,
    *entries: tuple[Entry, bytes, bytes],
    scopes: Any = ("tenant",),
    key: bytes | None = None,
    **header: Any,
) -> Path:
    """Write a cache file with these entries and a correct checksum; the entries may be false."""
    core = tok._tokcache
    tokenizer, generation = warm._current(core)
    own = {
        "fingerprint": warm.fingerprint(tokenizer),
        "plan": warm._plan_digest(generation.l1),
        "cut_seed": generation.l1.cache.cut_seed,
        "n_entries": len(entries),
    }
    warm_file.write(path, Header(**(own | header)), scopes, entries, key)
    return path


def entry(text: str | bytes, ids: list[int], **fields: Any) -> tuple[Entry, bytes, bytes]:
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    own = {
        "kind": Kind.TEXT, "scope": 0, "flag": False, "variant": 0, "end_class": 1,
        "n_bytes": len(raw), "n_ids": len(ids),
    }  # fmt: skip
    raw_ids = b"".join((index % 2**32).to_bytes(4, "little") for index in ids)
    return Entry(**(own | fields)), raw, raw_ids


def right_ids(text: str) -> list[int]:
    ids: list[int] = MADE["byte_level_bpe"]().encode(text, add_special_tokens=False).ids
    return ids


HELLO = right_ids("hello")
FALSE_ENTRIES: dict[str, tuple[tuple[Entry, bytes, bytes], str]] = {
    "a text longer than the file": (entry("hello", HELLO, n_bytes=1 << 62), "ends within"),
    "more ids than the file has": (entry("hello", HELLO, n_ids=0xFFFFFFFF), "ends within"),
    "fewer ids than the file has": (entry("hello", HELLO, n_ids=0), "belong to no entry"),
    "a scope without a name": (entry("hello", HELLO, scope=2), "an unknown kind"),
    "an unknown kind": (entry("hello", HELLO, kind=3), "an unknown kind"),
    "an unknown flag": (entry("hello", HELLO, flag=2), "an unknown kind"),
    "an id outside the vocabulary": (entry("hello", [5000]), "the token id 5,000"),
    "the largest id": (entry("hello", [2**31 - 1]), "the token id 2,147,483,647"),
    "a negative id": (entry("hello", [-1]), "the token id 4,294,967,295"),
    "other ids": (entry("hello", [*HELLO, 7]), "other ids for a text"),
    "no ids": (entry("hello", []), "other ids for a text"),
    "a lone surrogate": (entry("\ud800", [7]), "other ids for a text"),
    "invalid UTF-8": (entry(b"\xff\xfe", [7]), "not UTF-8"),
    "overlong UTF-8": (entry(b"\xc0\x80", [7]), "not UTF-8"),
    "a chunk with a lone surrogate": (entry("\ud800", [7], kind=Kind.CHUNK), "not UTF-8"),
    "an empty chunk": (entry("", [7], kind=Kind.CHUNK), "into which no text is cut"),
    "an unknown variant": (
        entry("hello", HELLO, kind=Kind.CHUNK, variant=9), "into which no text is cut"
    ),
    "an unknown end class": (
        entry("hello", HELLO, kind=Kind.CHUNK, end_class=16), "into which no text is cut"
    ),
    "other ids of a chunk": (entry("hello", [7], kind=Kind.CHUNK), "other ids for a segment"),
    "other ids of a segment": (entry("hello", [7], kind=Kind.SEGMENT), "other ids for a segment"),
}  # fmt: skip


@pytest.mark.parametrize(("false_entry", "match"), FALSE_ENTRIES.values(), ids=FALSE_ENTRIES)
def test_a_false_entry_with_a_correct_checksum_is_refused(
    tmp_path: Path, false_entry: tuple[Entry, bytes, bytes], match: str
) -> None:
    tok = filled(texts=["something"])
    assert_refused(tok, forge(tok, tmp_path / "cache", false_entry), match)
    good = entry("hello", HELLO)
    assert wrapped().cache_load(forge(tok, tmp_path / "cache", good)).n_texts == 1


def test_false_headers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tok, path, good = wrapped(), tmp_path / "cache", entry("hello", HELLO)
    for n_entries in (0, 2, 2**64 - 1):
        forge(tok, path, good, n_entries=n_entries)
        assert_refused(tok, path)
    monkeypatch.setattr(warm_file, "_VERSION", 2)
    forge(tok, path, good)
    monkeypatch.undo()
    assert_refused(tok, path, "version 2 of the format, this tokcache reads 1")
    chunk = entry("hello", HELLO, kind=Kind.CHUNK)
    assert_refused(tok, forge(tok, path, chunk, good), "wrong order")
    forge(tok, path, good, scopes=["\xff" * 40])
    monkeypatch.setattr(warm_file, "MAX_SCOPE_BYTES", 30)
    assert_refused(tok, path, "scopes of more than 30 bytes")
    monkeypatch.setattr(warm_file, "MAX_SCOPES", 0)
    assert_refused(tok, path, "names 1 scopes, at most 0")


def test_a_scope_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    tok = wrapped()
    path = forge(tok, tmp_path / "cache", entry("hello", HELLO), scopes=["marker-of-a-scope"])
    raw = path.read_bytes()
    at = raw.index(b"marker-of-a-scope") - 4
    for length in (1000, 0x7FFFFFFF, 0xFFFFFFFF):
        path.write_bytes(raw[:at] + length.to_bytes(4, "little") + raw[at + 4 :])
        assert_refused(tok, path)


def test_chunks_are_left_out_if_the_cut_seed_has_another_length(tmp_path: Path) -> None:
    tok = wrapped()
    chunk = entry(LINE, right_ids(LINE), kind=Kind.CHUNK)
    for seed in (b"", b"abc", bytes(255)):
        report = tok.cache_load(forge(tok, tmp_path / "cache", chunk, cut_seed=seed))
        assert (report.n_chunks, report.left_out) == (0, {"cuts": 1})
    assert tok.cache_load(forge(tok, tmp_path / "cache", chunk)).n_chunks == 1


def test_entries_over_the_budget_are_skipped_without_reading_them_into_memory(
    tmp_path: Path,
) -> None:
    n_large = 64 << 20
    tok = wrapped(l0_max_bytes=1 << 20, l1_max_bytes=1 << 20)
    large = [
        entry(b"a" * n_large, HELLO, kind=kind, n_bytes=n_large)
        for kind in (Kind.TEXT, Kind.CHUNK, Kind.SEGMENT)
    ]
    path = forge(tok, tmp_path / "cache", entry("hello", HELLO), *large)
    warm.fingerprint(tok._tokcache._generation.engine.tokenizer)
    del large
    tracemalloc.start()
    try:
        report = tok.cache_load(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (report.n_texts, report.left_out) == (1, {"no_room": 3})
    assert peak < 32 << 20  # 16 MiB of it is the table of the ids seen so far


def test_memory_for_many_small_entries_is_bounded(tmp_path: Path) -> None:
    tok = wrapped(l0_max_bytes=1 << 20, l1_max_bytes=1 << 20)
    many = [entry(f"{at:07d}", [7]) for at in range(100_000)]
    path = forge(tok, tmp_path / "cache", *many)
    n_all = len(many)
    del many
    tracemalloc.start()
    try:
        with pytest.raises(InvalidCacheFile, match="other ids"):
            tok.cache_load(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert n_all * 200 > peak - (16 << 20)
    assert peak < 24 << 20


# ---- keys


def test_a_file_with_a_key_needs_the_key(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    dump_small_cache(path, KEY)
    new = wrapped()
    assert_refused(new, path, "written with a key; pass it", None)
    assert_refused(new, path, "another key", KEY + b"x")
    assert new.cache_load(path, key=KEY).n_texts > 0


def test_a_file_without_a_key_is_refused_if_a_key_is_given(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    raw = dump_small_cache(path)
    assert_refused(wrapped(), path, "written without a key", KEY)
    path.write_bytes(raw[:10] + b"\x01" + raw[11:])  # the flag "has a key"
    assert_refused(wrapped(), path, "wrong checksum", KEY)


@pytest.mark.parametrize("key", ["a text that is long enough", b"", b"short", 5, bytearray(32)])
def test_invalid_keys_are_refused(tmp_path: Path, key: Any) -> None:
    dump_small_cache(tmp_path / "cache")
    tok = wrapped()
    for method in (tok.cache_dump, tok.cache_load):
        with pytest.raises(InvalidConfig, match="key must be"):
            method(tmp_path / "cache", key=key)


# ---- scopes


def filled_by_tenants(**settings: Any) -> Wrapped:
    tok = wrapped(**settings)
    for scope in (None, "a", "b"):
        for text in LONG:
            tok.token_ids(f"{scope}: {text}", scope=scope)
    return tok


def n_entries_of_scope(tok: Wrapped, scope: str | None) -> tuple[int, int]:
    """Return the number of texts of a scope, and the number of its segments."""
    l0, l1 = tok._tokcache._generation.l0, tok._tokcache.l1
    parts = [*l1.cache.held_chunks(), *l1.cache.held_segments()]
    return (
        sum(row[3] == scope for row in l0.held()),
        sum(row[2] == l1.tag(scope) for row in parts),
    )


@on_both
def test_loaded_entries_stay_in_their_scope(tmp_path: Path, engine_calls: Counter[str]) -> None:
    tok, new = filled_by_tenants(), wrapped()
    tok.cache_dump(tmp_path / "cache")
    new.cache_load(tmp_path / "cache")
    for scope in (None, "a", "b"):
        n_texts, n_parts = n_entries_of_scope(new, scope)
        assert n_texts == len(LONG)
        assert n_parts > 0
        engine_calls.clear()
        for text in LONG:
            new.token_ids(f"{scope}: {text}", scope=scope)
        assert engine_calls == {}
        other = "b" if scope == "a" else "a"
        assert new._tokcache.get(f"{scope}: {LONG[0]}", True, other) is None
        before = new.cache_stats().l1.engine_chars
        new.token_ids(f"{scope}: {LONG[0]}", scope=f"another {scope}")
        assert new.cache_stats().l1.engine_chars > before
    assert n_entries_of_scope(new, "c") == (0, 0)


@on_both
@pytest.mark.parametrize("scopes", [["a"], [None], ["a", None], ("b",), {"another"}, []])
def test_only_the_given_scopes_are_dumped_or_loaded(tmp_path: Path, scopes: Any) -> None:
    tok = filled_by_tenants()
    whole = tok.cache_dump(tmp_path / "whole")
    some = tok.cache_dump(tmp_path / "some", scopes=scopes)
    assert some.n_texts == len(LONG) * len(set(scopes) & {None, "a", "b"})
    assert (some.left_out == {}) == (whole.n_texts == some.n_texts)
    assert some.left_out["scope"] + some.n_texts + some.n_chunks + some.n_segments == (
        whole.n_texts + whole.n_chunks + whole.n_segments
    )
    for new, file, asked in ((wrapped(), "some", None), (wrapped(), "whole", scopes)):
        new.cache_load(tmp_path / file, scopes=asked)
        for scope in (None, "a", "b"):
            n_texts, n_parts = n_entries_of_scope(new, scope)
            assert n_texts == len(LONG) * (scope in scopes)
            assert (n_parts > 0) == (scope in scopes)
    raw = (tmp_path / "some").read_bytes()
    for scope in (None, "a", "b"):
        assert (f"{scope}: <s>user".encode() in raw) == (scope in scopes)


def test_a_scoped_tokenizer_dumps_and_loads_its_own_scope(tmp_path: Path) -> None:
    tok = filled_by_tenants()
    report = tok.scoped("a").cache_dump(tmp_path / "a")
    assert report.n_texts == len(LONG)
    assert b"b: <s>user" not in (tmp_path / "a").read_bytes()
    tok.cache_dump(tmp_path / "all")
    new = wrapped()
    new.scoped("b").cache_load(tmp_path / "all")
    assert [n_entries_of_scope(new, scope)[0] for scope in (None, "a", "b")] == [0, 0, len(LONG)]
    new.scoped("b").cache_load(tmp_path / "all", scopes=["a"])
    assert [n_entries_of_scope(new, scope)[0] for scope in (None, "a", "b")] == [
        0,
        len(LONG),
        len(LONG),
    ]


@pytest.mark.parametrize("scopes", ["tenant-a", b"a", 5, [5], [b"a"], iter(["a"])])
def test_invalid_scopes_are_refused(tmp_path: Path, scopes: Any) -> None:
    dump_small_cache(tmp_path / "cache")
    tok = wrapped()
    for method in (tok.cache_dump, tok.cache_load):
        with pytest.raises(InvalidScope, match="scope"):
            method(tmp_path / "cache", scopes=scopes)


@on_both
def test_segments_whose_scope_name_is_gone_are_left_out(tmp_path: Path) -> None:
    tok = filled_by_tenants()
    tok._tokcache._generation.l0.clear()
    tok._tokcache.l1._tags.clear()
    report = tok.cache_dump(tmp_path / "cache")
    assert report.left_out["no_name"] > 0
    new = wrapped()
    new.cache_load(tmp_path / "cache")
    assert n_entries_of_scope(new, None)[1] > 0
    assert [n_entries_of_scope(new, scope) for scope in ("a", "b")] == [(0, 0), (0, 0)]


def test_a_file_holds_at_most_max_scopes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "MAX_SCOPES", 1)
    report = filled_by_tenants().cache_dump(tmp_path / "cache")
    assert report.left_out["scopes"] > 0
    new = wrapped()
    new.cache_load(tmp_path / "cache")
    assert sorted(n_entries_of_scope(new, scope)[0] for scope in ("a", "b")) == [0, len(LONG)]
    assert n_entries_of_scope(new, None)[0] == len(LONG)


# ---- budgets


@on_both
def test_the_most_recently_used_texts_are_loaded_first(tmp_path: Path) -> None:
    tok = filled(texts=[])
    for at in range(100):
        tok.token_ids(f"text {at}")
    tok.token_ids("text 3")
    tok.cache_dump(tmp_path / "cache")
    new = wrapped(l0_max_entries=10)
    new.token_ids("text 98")
    new.token_ids("own")
    report = new.cache_load(tmp_path / "cache")
    assert report.n_texts == 8
    assert report.left_out["no_room"] + report.left_out["held"] >= 92
    texts = [row[0] for row in new._tokcache._generation.l0.held()]
    assert texts == [
        "own",
        "text 98",
        "text 3",
        *(f"text {at}" for at in (99, 97, 96, 95, 94, 93, 92)),
    ]
    assert new.cache_stats().l0.evictions == 0


@on_both
@pytest.mark.parametrize("max_bytes", [1, 5_000, 60_000])
def test_loading_keeps_the_byte_budgets_and_evicts_nothing(tmp_path: Path, max_bytes: int) -> None:
    filled(texts=[*LONG, *(LINE * 30 + f"{at}" for at in range(40))]).cache_dump(tmp_path / "cache")
    new = wrapped(l0_max_bytes=max_bytes, l1_max_bytes=max_bytes)
    new.token_ids("own text")
    own = new.cache_stats()
    report = new.cache_load(tmp_path / "cache")
    stats = new.cache_stats()
    assert stats.l0.n_bytes <= max_bytes
    assert stats.l1.n_bytes <= max_bytes
    assert stats.l0.evictions == own.l0.evictions
    assert stats.l1.evictions == own.l1.evictions
    assert stats.l0.n_entries == own.l0.n_entries + report.n_texts
    assert report.left_out["no_room"] > 0
    assert max_bytes == 5_000 or (report.n_texts > 0) == (max_bytes == 60_000)
    new._tokcache._generation.l0._check()
    new._tokcache.l1.cache._check()
    for text in (*LONG, LINE * 30 + "7"):
        assert new.token_ids(text).tolist() == new.encode(text).ids


@both
def test_l0_fill_inserts_entries_as_older_than_its_own(name: str) -> None:
    rows = [(f"text {at}", True, [at], None if at % 3 else "s") for at in range(8)]
    for n_own in range(6):
        cache = implementation(name).l0_cache(max_entries=10, sample_size=200)
        for at in range(n_own):
            cache.put(f"own {at}", [at])
        assert cache.fill([*rows, rows[0]]) == (min(8, 10 - n_own), 1)
        cache._check()
        assert [row[0] for row in cache.held()] == [
            *(f"own {at}" for at in reversed(range(n_own))),
            *(row[0] for row in rows[: 10 - n_own]),
        ]
        for at in range(3):  # they evict the file's oldest entries first
            cache.put(f"new {at}", [at])
        cache._check()
        kept = [row[0] for row in cache.held() if row[0].startswith("text")]
        assert kept == [row[0] for row in rows[: len(kept)]]
        assert [row[0] for row in cache.held() if row[0].startswith("own")] == [
            f"own {at}" for at in reversed(range(n_own))
        ]


@both
def test_l0_lists_its_entries_from_newest_to_oldest(name: str) -> None:
    rng, cache = random.Random(4), implementation(name).l0_cache(max_entries=60)
    model: dict[Any, Any] = {}
    for step in range(2000):
        text = rng.choice(TRICKY) + str(rng.randrange(9))
        key = (text, rng.random() < 0.5, rng.choice([None, "a", "\ud800"]))
        cache.put(key[0], [step], add_special_tokens=key[1], scope=key[2])
        model[key] = [step]
    found = cache.held()
    assert len(found) == len(cache) == 60
    assert all(model[text, special, scope] == ids for text, special, ids, scope in found)
    assert [ids[0] for _, _, ids, _ in found] == sorted((row[2][0] for row in found), reverse=True)
    other = implementation(name).l0_cache()
    assert other.fill(found) == (60, 0)
    other._check()
    assert other.held() == found


def test_impossible_segments_are_refused_by_the_segment_cache() -> None:
    one, plan = implementation("native"), wrapped()._tokcache.l1.plan
    parts, ids = one.l1.SegmentCache(plan, 1 << 20), one.token_ids([1])
    with pytest.raises(ValueError, match="end class 16"):
        parts.fill_chunks([("hello", ids, 0, 0, 16, False)])
    with pytest.raises(ValueError, match="variant 9"):
        parts.fill_chunks([("hello", ids, 0, 9, 0, False)])
    with pytest.raises(ValueError, match="variant 9"):
        parts.fill_segments([("hello", ids, 0, 9)])
    for name in ("native", "reference"):
        other = implementation(name).l1.SegmentCache(plan, 1 << 20)
        with pytest.raises(ValueError, match="a cut seed has"):
            other.cut_seed = b"abc"


# ---- chunks cut with another seed or plan


def test_chunks_of_another_cut_seed_are_loaded_if_they_outnumber_the_own(
    tmp_path: Path, engine_calls: Counter[str]
) -> None:
    """The ends of chunks depend on the seed, and a cache has one seed only."""
    tok = filled()
    tok.cache_dump(tmp_path / "cache")
    few = filled(texts=["hello there"])
    report = few.cache_load(tmp_path / "cache")
    assert report.n_chunks > 0
    assert few._tokcache.l1.cache.cut_seed == tok._tokcache.l1.cache.cut_seed
    engine_calls.clear()
    few._tokcache._generation.l0.clear()
    for text in LONG:
        few.token_ids(text)
    assert engine_calls == {}
    many = filled(texts=[f"{LINE}{at} of it. " * 20 for at in range(60)])
    seed = many._tokcache.l1.cache.cut_seed
    report = many.cache_load(tmp_path / "cache")
    assert report.n_chunks == 0
    assert report.left_out["cuts"] > 0
    assert many._tokcache.l1.cache.cut_seed == seed
    assert report.n_texts > 0


@pytest.mark.parametrize(("one", "other"), [("native", "reference"), ("reference", "native")])
def test_each_implementation_reads_files_of_the_other(
    one: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks are left out, because the cut seeds of the implementations differ in length."""
    use_implementation(one, monkeypatch)
    tok = filled()
    dumped = tok.cache_dump(tmp_path / "cache")
    use_implementation(other, monkeypatch)
    new = wrapped()
    report = new.cache_load(tmp_path / "cache")
    assert report.n_texts == dumped.n_texts
    assert report.n_segments > 0
    assert report.left_out["cuts"] == dumped.n_chunks > 0
    for text in (*TEXTS, *LONG):
        assert new.token_ids(text).tolist() == new.encode(text).ids


def test_a_cache_without_l1_loads_and_dumps_texts_alone(tmp_path: Path) -> None:
    tok = filled()
    dumped = tok.cache_dump(tmp_path / "cache")
    new = wrapped(l1=False)
    report = new.cache_load(tmp_path / "cache")
    assert report.n_texts == dumped.n_texts
    assert report.left_out == {"l1_off": dumped.n_chunks + dumped.n_segments}
    only_texts = new.cache_dump(tmp_path / "texts")
    assert (only_texts.n_texts, only_texts.n_chunks) == (dumped.n_texts, 0)
    assert wrapped().cache_load(tmp_path / "texts").n_texts == dumped.n_texts


def test_chunks_of_another_cut_plan_are_left_out(tmp_path: Path) -> None:
    tok = filled()
    part = entry(LINE, right_ids(LINE), kind=Kind.CHUNK)
    report = tok.cache_load(forge(tok, tmp_path / "cache", part, plan=bytes(32)))
    assert (report.n_chunks, report.left_out) == (0, {"cuts": 1})


def test_segments_are_not_dumped_after_l1_was_turned_off(tmp_path: Path) -> None:
    tok = filled()
    tok._tokcache.l1.off = "difference"
    report = tok.cache_dump(tmp_path / "cache")
    assert report.n_texts > 0
    assert report.n_chunks == report.n_segments == 0


@pytest.mark.parametrize("kind", ["gigatoken", "fastokens"])
def test_a_fast_encoder_dumps_chunks_and_loads_no_segments(
    shared_data: Path, kind: str, tmp_path: Path, engine_calls: Counter[str]
) -> None:
    """A fast encoder is quicker than the look-up of segments, so they are not used with it."""
    pytest.importorskip(kind, reason=f"{kind} is not installed")
    file = str(shared_data / "tokenizers" / "qwen2.5" / "tokenizer.json")
    fast_one = tokcache.wrap(Tokenizer.from_file(file), tokcache.CacheConfig(engine=kind))
    for text in LONG:
        fast_one.token_ids(text)
    fast_one._tokcache._generation.l0.clear()
    fast_one.cache_dump(tmp_path / "cache")
    sure = tokcache.wrap(Tokenizer.from_file(file), CONFIG)
    assert sure.cache_load(tmp_path / "cache").n_chunks > 0
    engine_calls.clear()
    for text in LONG:
        sure.token_ids(text)
    assert engine_calls == {}
    sure.token_ids("and some short ones")
    sure.cache_dump(tmp_path / "cache")
    again = tokcache.wrap(Tokenizer.from_file(file), tokcache.CacheConfig(engine=kind))
    report = again.cache_load(tmp_path / "cache")
    assert report.left_out["l1_off"] > 0
    assert report.n_segments == 0


# ---- tokenizers that are never cached, or that change


def test_a_tokenizer_that_is_never_cached_can_not_dump_or_load(tmp_path: Path) -> None:
    tok = tokcache.wrap(RANDOM["dropout_half"](), CONFIG)
    for method in (tok.cache_dump, tok.cache_load):
        with pytest.raises(NothingCached, match="bpe_dropout"):
            method(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["add_tokens", "handed_out", "cache_clear"])
def test_a_change_of_the_tokenizer_during_a_load_stops_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    dump_small_cache(tmp_path / "cache")
    new = wrapped()
    component = new.pre_tokenizer
    verify = warm._verify

    def changing(*args: Any) -> None:
        verify(*args)
        if change == "add_tokens":
            new.add_tokens(["hello"])
        elif change == "cache_clear":
            new.cache_clear()
        else:
            component.add_prefix_space = True

    monkeypatch.setattr(warm, "_verify", changing)
    with pytest.raises(TokenizerChanged, match="was changed while"):
        new.cache_load(tmp_path / "cache")
    assert new.cache_stats().l0.n_entries == 0
    assert new.token_ids("hello world").tolist() == new.encode("hello world").ids


def test_a_file_belongs_to_the_tokenizer_as_it_was_when_dumped(tmp_path: Path) -> None:
    tok = filled(texts=["hello world"])
    tok.add_tokens(["lo wo"])
    right = tok.token_ids("hello world")
    tok.cache_dump(tmp_path / "cache")
    assert_refused(wrapped(), tmp_path / "cache", "another tokenizer")
    new = wrapped()
    new.add_tokens(["lo wo"])
    new.cache_load(tmp_path / "cache")
    assert new._tokcache.get("hello world", True, None) == right


def test_other_threads_may_encode_during_dump_and_load(tmp_path: Path) -> None:
    filled().cache_dump(tmp_path / "cache")
    tok = wrapped(l0_max_entries=30, l1_max_bytes=40_000)
    right = {text: tok.encode(text).ids for text in (*TEXTS, *LONG)}
    wrong: list[str] = []
    stop = threading.Event()

    def ask(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            text = rng.choice(list(right))
            wrong.extend([text] * (tok.token_ids(text).tolist() != right[text]))

    askers = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    for one in askers:
        one.start()
    for at in range(10):
        tok.cache_load(tmp_path / "cache")
        tok.cache_dump(tmp_path / f"other {at % 2}")
    stop.set()
    for one in askers:
        one.join()
    assert wrong == []
    tok._tokcache._generation.l0._check()
    tok._tokcache.l1.cache._check()
    assert wrapped().cache_load(tmp_path / "other 1").n_texts > 0


FORKING = """
import os, sys, tokcache
from tokenizers import Tokenizer
raw = Tokenizer.from_str(sys.stdin.read())
tok = tokcache.wrap(raw, tokcache.CacheConfig(engine="tokenizers"))
report = tok.cache_load(sys.argv[1])
assert report.n_texts and report.n_chunks
if sys.argv[2] == "batch":
    raw.encode_batch(["one", "two"])
if os.fork():
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
tok.token_ids_batch([f"something new {at}" for at in range(1000)])
print(len(os.listdir("/proc/self/task")), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("before", ["load", "batch"])
def test_loading_before_a_fork_leaves_children_parallel(tmp_path: Path, before: str) -> None:
    """A batch that tokenizers encodes in parallel before a fork makes the children serial."""
    filled("gpt2").cache_dump(tmp_path / "cache")
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", FORKING, str(tmp_path / "cache"), before],
        input=SYNTHETIC["gpt2"]().to_str(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    is_serial = int(done.stdout) == 1
    assert is_serial == (before == "batch")


# ---- files


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Return a folder; afterwards it may hold only the files `cache` and `kept`."""
    yield tmp_path
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "kept"}


def test_only_the_owner_may_read_a_cache_file(folder: Path) -> None:
    path = folder / "cache"
    path.write_bytes(b"old")
    path.chmod(0o666)
    old = os.umask(0)
    try:
        filled(texts=["hello"]).cache_dump(path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_link_is_replaced_not_followed(folder: Path) -> None:
    (folder / "kept").write_bytes(b"kept")
    (folder / "cache").symlink_to(folder / "kept")
    filled(texts=["hello"]).cache_dump(str(folder / "cache"))
    assert not (folder / "cache").is_symlink()
    assert (folder / "kept").read_bytes() == b"kept"


def test_folders_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    tok = wrapped()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        assert_refused(tok, path, "not a regular file")
    with pytest.raises(MissingFile, match="nothing does not exist"):
        tok.cache_load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        tok.cache_load(str(tmp_path / "nothing"))


def test_dumping_to_an_unusable_path_raises_a_clear_error(folder: Path) -> None:
    tok = filled(texts=["hello"])
    (folder / "kept").write_bytes(b"kept")
    (folder / "cache").mkdir()
    missing = re.escape(f"the folder {folder / 'no such folder'}, in which cache is to be written")
    with pytest.raises(MissingFile, match=missing):
        tok.cache_dump(folder / "no such folder" / "cache")
    with pytest.raises(NotADirectoryError) as caught:
        tok.cache_dump(folder / "kept" / "cache")
    assert caught.value.filename == str(folder / "kept")
    with pytest.raises(IsADirectoryError, match="pass the name of a file") as caught_folder:
        tok.cache_dump(folder / "cache")
    assert caught_folder.value.filename == str(folder / "cache")
    assert {one.name for one in folder.iterdir()} == {"kept", "cache"}
    assert (folder / "kept").read_bytes() == b"kept"


def test_dumping_to_a_folder_without_permission_raises(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tok = filled(texts=["hello"])
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError) as caught:
            tok.cache_dump(tmp_path / "cache")
        assert caught.value.filename == str(tmp_path)
        assert list(tmp_path.iterdir()) == []
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_keeps_the_previous_file(folder: Path) -> None:
    path = folder / "cache"
    old = dump_small_cache(path)
    tok = filled(texts=[LINE * at for at in range(60)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            tok.cache_dump(path)
        assert caught.value.filename == str(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old
    tok.cache_dump(path)
    assert path.stat().st_size > 20_000


def test_a_failing_sync_keeps_the_previous_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "cache"
    old = dump_small_cache(path)

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        filled().cache_dump(path)
    assert path.read_bytes() == old


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    raw = dump_small_cache(path)

    class Shrinking(warm_file.Reader):
        def __init__(self, file: Any, key: bytes | None) -> None:
            super().__init__(file, key)
            os.truncate(path, len(raw) - 50)

    with path.open("rb") as file, pytest.raises(Damaged, match="became shorter"):
        Shrinking(file, None).header()


def test_importing_tokcache_does_not_import_the_cache_file_module() -> None:
    code = "import sys, tokcache; print('tokcache.text.cache_file' in sys.modules)"
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]
