"""Clearing a scope removes its entries, and only its entries, from L0 and L1."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import tokcache
from tests.machines import assert_fails, effort
from tests.text.implementations import both, implementation
from tests.text.test_rendered_chats import chat_of, check_tree, plain_tokenizer
from tests.text.test_segment_cache import CacheWithEncoders, numbered, texts_with_shared_passages
from tests.text.test_wrap_flight import CountingEngine, Wrapped, engine, ids, tok, wait_until
from tests.text.tokenizers_synthetic import SYNTHETIC
from tokcache.errors import InvalidScope
from tokcache.text.chat import running

__all__ = ["engine", "tok"]  # fixtures

SCOPES = [None, "", "a", "b", "\ud800"]


@pytest.fixture
def pool_of_threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


# ---- L0


@both
def test_l0_clears_the_entries_of_one_scope_only(name: str) -> None:
    cache = implementation(name).l0_cache(max_entries=100_000)
    rng = random.Random(1)
    rows = [(f"{n}" + "x" * rng.choice([0, 600]), n % 3 == 0, SCOPES[n % 5]) for n in range(4000)]
    for number, (text, flag, scope) in enumerate(rows):
        assert cache.put(text, [number], add_special_tokens=flag, scope=scope)
    for gone, scope in enumerate(SCOPES[1:], 1):
        before = cache.stats()
        cache.clear(scope=scope)
        cache._check()
        after = cache.stats()
        assert after.n_entries == 800 * (5 - gone)
        assert after.n_bytes < before.n_bytes
        assert (after.insertions, after.evictions, after.hits) == (4000, 0, before.hits)
        for number, (text, flag, other) in enumerate(rows[:500]):
            is_gone = other in SCOPES[1 : gone + 1]
            found = cache.get(text, add_special_tokens=flag, scope=other)
            assert found == (None if is_gone else [number])
    cache.clear()
    assert cache.memory_usage() == len(cache) == cache.stats().insertions == 0


@both
def test_l0_reuses_the_room_of_cleared_entries(name: str) -> None:
    cache = implementation(name).l0_cache(max_entries=10, max_bytes=20_000)
    for n in range(10):
        cache.put(f"{n}", range(100), scope="a")
    cache.clear(scope="a")
    for n in range(10):
        cache.put(f"{n}", range(100), scope="b")
    assert cache.stats().evictions == 0
    assert all(cache.get(f"{n}", scope="a") is None for n in range(10))
    assert all(cache.get(f"{n}", scope="b") == list(range(100)) for n in range(10))
    cache._check()


@both
def test_l0_clear_refuses_invalid_scopes_and_ignores_unknown_ones(name: str) -> None:
    class Named(str):
        __slots__ = ()

    cache = implementation(name).l0_cache()
    cache.put("text", [1], scope="a")
    for wrong in (5, b"a", True):
        with pytest.raises(InvalidScope):
            cache.clear(scope=wrong)
    cache.clear(scope="unknown")
    assert len(cache) == 1
    cache.clear(scope=Named("a"))
    assert len(cache) == 0


@both
def test_l0_does_not_store_ids_from_before_its_scope_was_cleared(name: str) -> None:
    cache, some = implementation(name).l0_cache(), implementation(name).token_ids([1])
    since = cache._n_clears
    cache.clear(scope="a")
    assert cache._put("text", True, some, "a", since) is False
    assert cache._put("text", True, some, "b", since) is True
    assert cache._put("text", True, some, None, since) is True
    assert cache._put("later", True, some, "a", cache._n_clears) is True
    assert cache.stats().refusals == {"cleared": 1}
    since = cache._n_clears
    for n in range(3000):  # more than the cache remembers individually
        cache.clear(scope=f"tenant {n}")
    for scope in ("tenant 0", "tenant 2000", "tenant 2999"):
        assert cache._put("text", True, some, scope, since) is False
    cache.clear()
    assert cache._put("text", True, some, None, since) is False
    cache._check()


# ---- L1


@both
@pytest.mark.parametrize("kind", ["gpt2", "llama2", "bert_uncased"])
def test_l1_clears_the_chunks_and_segments_of_one_scope_only(name: str, kind: str) -> None:
    one = CacheWithEncoders(name, kind)
    texts = [numbered(30), *texts_with_shared_passages(random.Random(5), 3)]
    for text in texts:
        for scope in (0, 1, 2):
            one.ids(text, scope=scope)
    before = one.cache.stats()
    one.cache.clear(scope=1)
    one.check()
    after = one.cache.stats()
    assert after.n_bytes < before.n_bytes
    assert (after.insertions, after.evictions, after.hits) == (
        before.insertions,
        before.evictions,
        before.hits,
    )
    for scope, is_known in ((0, True), (2, True), (1, False)):
        before = one.cache.stats()
        assert one.ids(texts[0], scope=scope) == one.expected(texts[0])
        assert (one.cache.stats().engine_chars == before.engine_chars) is is_known
    one.check()
    for scope in (0, 1, 2):
        one.cache.clear(scope=scope)
    assert one.cache.stats().n_chunks == one.cache.stats().n_segments == 0
    assert one.cache.memory_usage() == 0
    assert one.ids(texts[0]) == one.expected(texts[0])
    one.check()


@both
def test_l1_does_not_store_walks_from_before_their_scope_was_cleared(name: str) -> None:
    one, text = CacheWithEncoders(name), numbered(20) + "a short end"
    walks = {scope: one.cache.look(text, False, scope, 0) for scope in (0, 1, 2)}
    one.cache.clear(scope=1)
    late = one.cache.look("another " + text, False, 1, 0)  # `since=0`: before the clear
    for walk in (*walks.values(), late):
        assert one.complete(walk) in (one.expected(text), one.expected("another " + text))
        one.check()
    assert {scope for _, _, scope, *_ in one.cache.held_chunks()} == {0, 2}
    assert {scope for _, _, scope, _ in one.cache.held_segments()} == {0, 2}
    assert one.cache.stats().refusals == {"cleared": 2}
    one.cache.clear(scope=0)
    one.cache.clear(scope=2)
    assert one.cache.memory_usage() == 0


class _Machine(RuleBasedStateMachine):
    """L1, with scopes cleared between and during walks, against the tokenizer itself."""

    name: str

    @initialize(
        max_bytes=st.sampled_from([30_000, 200_000, 1 << 20]),
        cuts_fine=st.booleans(),
        seed=st.integers(0, 5),
    )
    def make(self, max_bytes: int, cuts_fine: bool, seed: int) -> None:
        self.one = CacheWithEncoders(self.name, max_bytes=max_bytes, cuts_fine=cuts_fine)
        texts = texts_with_shared_passages(random.Random(seed), 5, n_chars=600)
        self.texts = [text.encode("utf-8", "replace").decode() for text in texts]
        self.walks: list[tuple[int, str, Any]] = []
        self.empty: set[int] = {0, 1, 2}  # scopes without a look-up since their clear

    @rule(at=st.integers(0, 4), scope=st.integers(0, 2))
    def ask(self, at: int, scope: int) -> None:
        before = self.one.cache.stats()
        found = self.one.ids(self.texts[at], scope=scope)
        after = self.one.cache.stats()
        assert found in (None, self.one.expected(self.texts[at]))
        if scope in self.empty and found is not None:
            assert after.chunk_hits == before.chunk_hits
        self.empty.discard(scope)

    @rule(at=st.integers(0, 4), scope=st.integers(0, 2))
    def begin(self, at: int, scope: int) -> None:
        walk = self.one.cache.look(self.texts[at], False, scope)
        if hasattr(walk, "finish"):
            self.walks.append((scope, self.texts[at], walk))

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.walks:
            at = data.draw(st.integers(0, len(self.walks) - 1))
            scope, text, walk = self.walks.pop(at)
            assert self.one.complete(walk) == self.one.expected(text)
            if id(walk) in self.cleared_since:
                self.cleared_since.discard(id(walk))  # a later walk may get its id
                held = [*self.one.cache.held_chunks(), *self.one.cache.held_segments()]
                assert scope not in self.empty or scope not in {row[2] for row in held}
            else:
                self.empty.discard(scope)

    @rule(scope=st.integers(0, 2))
    def clear_scope(self, scope: int) -> None:
        self.one.cache.clear(scope=scope)
        self.empty.add(scope)
        self.cleared_since.update(
            id(walk) for walk_scope, _, walk in self.walks if walk_scope == scope
        )
        held = [*self.one.cache.held_chunks(), *self.one.cache.held_segments()]
        assert scope not in {row[2] for row in held}

    @rule()
    def clear(self) -> None:
        self.one.cache.clear()
        self.empty = {0, 1, 2}
        self.cleared_since.update(id(walk) for _, _, walk in self.walks)
        assert self.one.cache.memory_usage() == 0

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "one"):
            self.one.check()

    def __init__(self) -> None:
        super().__init__()
        self.cleared_since: set[int] = set()


class NativeMachine(_Machine):
    name = "native"


class ReferenceMachine(_Machine):
    name = "reference"


TestNativeMachine = NativeMachine.TestCase
TestNativeMachine.settings = effort(20, 25)
TestReferenceMachine = ReferenceMachine.TestCase
TestReferenceMachine.settings = effort(6, 25)


def test_walks_of_a_cleared_scope_that_are_stored_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = implementation("reference").l1.SegmentCache
    clear = cache.clear

    def unnoticed(self: Any, scope: int | None = None, n_clears: int | None = None) -> None:
        clear(self, scope, n_clears)
        if scope is not None:
            self._cleared.clear()

    monkeypatch.setattr(cache, "clear", unnoticed)
    assert_fails(ReferenceMachine, n_examples=60)


# ---- a wrapped tokenizer


def _call(tok: Wrapped, how: str, text: str, scope: str | None) -> Callable[[], list[int]]:
    if how == "single":
        return lambda: tok.token_ids(text, scope=scope).tolist()
    if how == "batch":
        return lambda: [one.tolist() for one in tok.token_ids_batch(["other", text], scope=scope)][
            1
        ]
    return lambda: asyncio.run(tok.atoken_ids(text, scope=scope)).tolist()


@pytest.mark.parametrize("how", ["single", "batch", "async"])
def test_an_encoding_from_before_the_clear_is_not_cached(
    tok: Wrapped, engine: CountingEngine, pool_of_threads: ThreadPoolExecutor, how: str
) -> None:
    if how == "async":  # a thread for each encoding; by default there is one for each core
        tok._tokcache._pool = ThreadPoolExecutor(3)
    engine.gate.clear()
    early = [pool_of_threads.submit(_call(tok, how, "x", scope)) for scope in ("a", "b")]
    wait_until(lambda: len(engine.calls) == 2)
    tok.cache_clear(scope="a")
    late = pool_of_threads.submit(
        _call(tok, how, "x", "a")
    )  # does not wait for the encoding from before the clear
    wait_until(lambda: len(engine.calls) == 3)
    engine.gate.set()
    assert [one.result() for one in [*early, late]] == [ids("x")] * 3
    n_calls = len(engine.calls)
    assert tok.cache_stats().l0.refusals["cleared"] == (2 if how == "batch" else 1)
    for scope in ("b", "a"):
        assert tok.token_ids("x", scope=scope).tolist() == ids("x")
    assert len(engine.calls) == n_calls


def test_a_call_that_waited_for_a_thread_during_the_clear_is_not_cached(
    tok: Wrapped, engine: CountingEngine
) -> None:
    async def ask() -> list[int]:
        threads = tok._tokcache._threads()
        held = threading.Event()
        busy = [threads.submit(held.wait, 20) for _ in range(threads._max_workers)]
        later = asyncio.create_task(tok.atoken_ids("x", scope="a"))
        await asyncio.sleep(0.01)
        tok.cache_clear(scope="a")
        held.set()
        assert all(one.result() for one in busy)
        return (await later).tolist()

    assert asyncio.run(ask()) == ids("x")
    assert engine.calls == [["x"]]
    tok.token_ids("x", scope="a")
    assert engine.calls == [["x"], ["x"]]


@pytest.mark.parametrize("name", ["reference", "native"])
def test_cache_clear_of_a_scope_clears_both_layers_of_that_scope_only(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    implementation(name).use(monkeypatch)
    plain = SYNTHETIC["gpt2"]()
    wrapped = tokcache.wrap(plain, tokcache.CacheConfig(engine="tokenizers"))
    texts = [numbered(30), "a secret"]
    for scope in (None, "a", "b"):
        for text in texts:
            wrapped.token_ids(text, scope=scope)
    before = wrapped.cache_stats()
    wrapped.scoped("a").cache_clear()
    after = wrapped.cache_stats()
    assert (after.encoded_texts, after.l0.misses) == (before.encoded_texts, before.l0.misses)
    assert after.l0.n_bytes < before.l0.n_bytes
    assert after.l1.n_bytes < before.l1.n_bytes
    for scope, is_known in ((None, True), ("b", True), ("a", False)):
        for text in texts:
            n_encoded = wrapped.cache_stats().encoded_texts
            assert wrapped.token_ids(text, scope=scope).tolist() == plain.encode(text).ids
            n_new = wrapped.cache_stats().encoded_texts - n_encoded
            assert n_new == (0 if is_known else 1)
    wrapped.cache_clear(scope="b")
    wrapped.cache_clear(scope="a")
    held = wrapped._tokcache._generation.l0.held()
    assert {scope for *_, scope in held} == {None}
    assert "a" not in wrapped._tokcache.l1._tags  # type: ignore[union-attr]
    with pytest.raises(InvalidScope):
        wrapped.cache_clear(scope=5)  # type: ignore[arg-type]
    wrapped.cache_clear()
    stats = wrapped.cache_stats()
    assert stats.l0.n_entries == stats.l1.n_chunks == stats.encoded_texts == 0


@pytest.mark.parametrize("template", ["", "{{ messages[-1].content }}"])
@pytest.mark.parametrize("has_new_root", [False, True])
def test_a_chat_whose_scope_is_cleared_while_it_is_rendered_is_not_cached(
    template: str, has_new_root: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    template += "{% for m in messages %}{{ m.content }};{% endfor %}"
    wrapped = tokcache.wrap(plain_tokenizer(template))
    run_rest = running.run_rest
    waiting: list[Any] = []

    def render(*contents: str, scope: str) -> str:
        chat = chat_of(*contents)
        found: str = wrapped.scoped(scope).apply_chat_template(chat, tokenize=False)
        assert found == wrapped.unwrap().apply_chat_template(chat, tokenize=False)
        return found

    def run_rest_after_a_clear(*args: Any) -> Any:
        while waiting:
            waiting.pop()
            wrapped.cache_clear(scope="a")
            if has_new_root:
                render("x", "y", scope="a")
        return run_rest(*args)

    monkeypatch.setattr(running, "run_rest", run_rest_after_a_clear)
    for _ in range(5):
        render("a", "b", scope="b")
    for contents in (("a secret",), ("a secret", "b")):
        waiting.append(None)
        render(*contents, scope="a")
        check_tree(wrapped)
        tree = wrapped._tokcache.rendered._tree
        nodes: list[Any] = [root for root in tree.roots.values() if root.scope == "a"]
        assert len(nodes) == has_new_root
        for node in nodes:
            nodes += node.children.values()
            assert b"a secret" not in node.stretch.keys
    assert wrapped.cache_stats().render.refusals["cleared"] == 2
    wrapped.cache_clear(scope="a")
    wrapped.cache_clear(scope="b")
    check_tree(wrapped)
    assert tree.n_bytes == tree.n_entries == 0


def test_clearing_during_concurrent_calls_leaves_no_entry_of_the_scope() -> None:
    plain = SYNTHETIC["gpt2"]()
    wrapped = tokcache.wrap(plain, tokcache.CacheConfig(engine="tokenizers"))
    wrapped.token_ids("warm", scope="b")
    is_over = threading.Event()
    texts = [numbered(2, first=100 * n) for n in range(20)]

    def ask() -> int:
        rng, n_asked = random.Random(), 0
        while not is_over.is_set():
            wrapped.token_ids(rng.choice(texts), scope="a")
            n_asked += 1
        return n_asked

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        for _ in range(50):
            wrapped.cache_clear(scope="a")
        is_over.set()
        assert sum(one.result() for one in asking) > 0
    wrapped.cache_clear(scope="a")
    core = wrapped._tokcache
    assert {scope for *_, scope in core._generation.l0.held()} == {"b"}
    l1 = core.l1
    assert l1 is not None
    assert {scope for _, _, scope, *_ in l1.cache.held_chunks()} == {l1.tag("b")}
    core._generation.l0._check()
    l1.cache._check()
