"""The page of running caches has their counters, and no text."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

import tokcache
from tokcache.errors import MissingExtra
from tokcache.observe.page import page
from tokcache.samples import tiny_tokenizer


def running() -> tuple[tokcache.CacheStats, tokcache.StateStats]:
    from tokenizers import Tokenizer  # noqa: PLC0415

    wrapped = tokcache.wrap(Tokenizer.from_file(str(tiny_tokenizer())))
    for _ in range(4):
        wrapped.token_ids("a secret word " * 50)
    wrapped.encode("a pair", "of secrets")
    states = tokcache.PrefixStateCache(ram_bytes=1 << 20, max_entries=8, block_tokens=4)
    own = states.namespace(b"model")
    own.save(np.arange(8, dtype=np.int32), lambda *_: None, lambda *_: 64)
    for tokens in (np.arange(8, dtype=np.int32), np.arange(100, 108, dtype=np.int32)):
        with own.plan(tokens):
            pass
    return wrapped.cache_stats(), states.stats()


def test_the_page_has_the_counters_and_no_text() -> None:
    texts, states = running()
    made = page(texts, states)
    assert "secret" not in made
    assert not re.search(r'(?:src|href)="(?!data:|#)', made)
    assert f"of {texts.l0.hits + texts.l0.misses:,} look-ups" in made
    assert "bypass: " in made
    assert "Missed prompt tokens, by reason" in made
    assert "texts (L0)" in made
    assert "states: memory" in made


def test_a_page_of_nothing_or_of_unused_caches_says_so() -> None:
    assert "No counters were given." in page()
    unused = tokcache.PrefixStateCache(ram_bytes=1 << 20).stats()
    assert "0% of 0 prompt tokens" in page(states=unused)


def test_without_its_libraries_the_page_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"tokcache\[replay\]"):
        page()
