"""A wrapped tokenizer (L0, L1 and the engine) against the plain one, which is changed as it is.

L0 and L1 have room for a few texts only, scopes are cleared, and both tokenizers are changed by
their methods, by assignment and in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors

import tokcache
from tests.machines import assert_fails, effort
from tests.text.implementations import implementation
from tests.text.tokenizers_synthetic import SYNTHETIC
from tokcache.text.segments import cache as segment_cache
from tokcache.text.tokenizer import CachedTokenizer
from tokcache.text.wrappers.backend import Backend

Change = Callable[[Any], object]

PARTS = (
    "Hello world, the dog doesn't mind; it's fine.\n" * 9,
    "<s>user\n",
    "a  b   c \n\n",
    "XAB xab ",
    "wor world worlds",
    "\u6c49\u5b57 \U0001f600 \xe9",
    "line 12345\n" * 60,
    "",
)
TEXTS = st.lists(st.sampled_from(PARTS), max_size=4).map("".join)
SCOPES = st.sampled_from([None, "", "a", "b"])
KINDS = ("gpt2", "llama2", "bert_uncased")


def assign(name: str, make: Callable[[], Any]) -> Change:
    return lambda tok: setattr(tok, name, make())


def in_place(part: str, name: str, value: Any) -> Change:
    def change(tok: Any) -> None:
        found = getattr(tok, part)
        if hasattr(found, name):
            setattr(found, name, value)

    return change


CHANGES: tuple[Change, ...] = (
    lambda tok: tok.add_tokens(["wor", AddedToken("XAB", lstrip=True)]),
    lambda tok: tok.add_tokens([AddedToken("xab", normalized=True, single_word=True)]),
    lambda tok: tok.add_special_tokens(["world"]),
    assign("normalizer", normalizers.Lowercase),
    assign("normalizer", lambda: normalizers.Prepend("_")),
    assign("normalizer", lambda: None),
    assign("pre_tokenizer", lambda: pre_tokenizers.ByteLevel(use_regex=False)),
    assign("pre_tokenizer", pre_tokenizers.Whitespace),
    assign(
        "post_processor",
        lambda: processors.TemplateProcessing(single="$A <s>", special_tokens=[("<s>", 1)]),
    ),
    assign("post_processor", lambda: None),
    lambda tok: setattr(tok, "encode_special_tokens", True),
    lambda tok: setattr(tok, "encode_special_tokens", False),
    in_place("pre_tokenizer", "add_prefix_space", value=True),
    in_place("pre_tokenizer", "add_prefix_space", value=False),
    in_place("normalizer", "lowercase", value=False),
)


class TokenizerMachine(RuleBasedStateMachine):
    name = "native"

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        implementation(self.name).use(self.patch)

    @initialize(
        kind=st.sampled_from(KINDS),
        l0_max_entries=st.sampled_from([2, 1000]),
        l1_max_bytes=st.sampled_from([9_000, 60_000, 1 << 20]),
    )
    def make(self, kind: str, l0_max_entries: int, l1_max_bytes: int) -> None:
        self.config = tokcache.CacheConfig(
            l0_max_entries=l0_max_entries,
            l0_max_bytes=100_000,
            l1_max_bytes=l1_max_bytes,
            engine="tokenizers",
        )
        self.plain = SYNTHETIC[kind]()
        self.wrapped = tokcache.wrap(SYNTHETIC[kind](), self.config)
        self.n_calls = 0
        # Since the tokenizer, or the scope, was cleared or changed:
        self.asked: set[tuple[str, bool, str | None]] = set()
        self.asked_scopes: set[str | None] = set()

    def expected(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self.plain.encode(text, add_special_tokens=special).ids
        return ids

    @rule(text=TEXTS, special=st.booleans(), scope=SCOPES, is_by_view=st.booleans())
    def ask(self, text: str, special: bool, scope: str | None, is_by_view: bool) -> None:
        before = self.wrapped.cache_stats()
        asker = self.wrapped.scoped(scope) if is_by_view else self.wrapped
        given = None if is_by_view else scope
        found = asker.token_ids(text, add_special_tokens=special, scope=given)
        assert found.tolist() == self.expected(text, special)
        after = self.wrapped.cache_stats()
        self.n_calls += 1
        if (text, special, scope) not in self.asked:
            assert after.l0.hits == before.l0.hits
        if scope not in self.asked_scopes:
            assert after.l1.chunk_hits == before.l1.chunk_hits
        self.asked.add((text, special, scope))
        self.asked_scopes.add(scope)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        text, special, scope = data.draw(st.sampled_from(sorted(self.asked, key=repr)))
        found = self.wrapped.token_ids(text, add_special_tokens=special, scope=scope)
        assert found.tolist() == self.expected(text, special)
        self.n_calls += 1

    @rule(texts=st.lists(TEXTS, max_size=3, unique=True), special=st.booleans(), scope=SCOPES)
    def ask_for_many(self, texts: list[str], special: bool, scope: str | None) -> None:
        found = self.wrapped.token_ids_batch(texts, add_special_tokens=special, scope=scope)
        assert [one.tolist() for one in found] == [self.expected(text, special) for text in texts]
        self.n_calls += len(texts)
        self.asked.update((text, special, scope) for text in texts)
        self.asked_scopes.add(scope)

    @rule(change=st.sampled_from(CHANGES))
    def change(self, change: Change) -> None:
        n_before = self.wrapped.cache_stats().invalidations
        change(self.plain)
        change(self.wrapped)
        self.wrapped._tokcache.fresh()  # a look at the components that were changed in place
        # A change to the same value need not invalidate anything.
        if self.wrapped.cache_stats().invalidations > n_before:
            self.asked.clear()
            self.asked_scopes.clear()

    @rule(is_on=st.booleans())
    def truncate_and_pad(self, is_on: bool) -> None:
        """`token_ids` gives whole texts, whatever these settings are."""
        if is_on:
            self.wrapped.enable_truncation(3)
            self.wrapped.enable_padding(length=50)
        else:
            self.wrapped.no_truncation()
            self.wrapped.no_padding()

    @rule(scope=SCOPES.filter(lambda scope: scope is not None))
    def clear_scope(self, scope: str) -> None:
        self.wrapped.cache_clear(scope=scope)
        self.asked = {each for each in self.asked if each[2] != scope}
        self.asked_scopes.discard(scope)
        core = self.wrapped._tokcache
        assert scope not in {row[3] for row in core._generation.l0.held()}

    @rule()
    def clear(self) -> None:
        self.wrapped.cache_clear()
        self.asked.clear()
        self.asked_scopes.clear()
        self.n_calls = 0

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "wrapped"):
            return
        generation = self.wrapped._tokcache._generation
        generation.l0._check()
        if generation.l1 is not None:
            generation.l1.cache._check()
            assert generation.l1.off != "difference"
        stats = self.wrapped.cache_stats()
        assert stats.l0.n_bytes <= self.config.l0_max_bytes
        assert stats.l0.n_entries <= self.config.l0_max_entries
        assert stats.l1.n_bytes <= self.config.l1_max_bytes
        assert stats.l0.hits + stats.l0.misses == self.n_calls
        assert sum(stats.l0.misses_by_reason.values()) == stats.l0.misses
        assert stats.encoded_texts + sum(stats.bypasses.values()) <= stats.l0.misses

    def teardown(self) -> None:
        self.patch.undo()


class ReferenceMachine(TokenizerMachine):
    name = "reference"


TestNativeMachine = TokenizerMachine.TestCase
TestNativeMachine.settings = effort(30, 25)
TestReferenceMachine = ReferenceMachine.TestCase
TestReferenceMachine.settings = effort(10, 25)


# ---- planted faults


def test_a_change_that_empties_no_cache_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_invalidation(self: Backend, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(Tokenizer, method)(self.raw, *args, **kwargs)

    monkeypatch.setattr(Backend, "change", without_invalidation)
    assert_fails(TokenizerMachine, n_examples=150)


def test_scopes_that_share_segments_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_cache.L1, "tag", lambda *_: 0)
    assert_fails(TokenizerMachine, n_examples=150)


def test_a_clear_that_leaves_l1_as_it_is_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def clear(self: CachedTokenizer, scope: str | None = None) -> None:
        if scope is not None:
            self._generation.l0.clear(scope=scope)

    monkeypatch.setattr(CachedTokenizer, "clear", clear)
    assert_fails(TokenizerMachine, n_examples=150)
