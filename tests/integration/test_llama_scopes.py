"""One Llama for many tenants: a request's scope, in the context, the cache and the tokenizer.

The attack: tenant b sends tenant a's prompt. Only the public prefix may be reused.
"""

from __future__ import annotations

import inspect
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer

import tokcache
from tests.integration.models import BLOCK, GREEDY, llama, llama_cpp, store, text
from tokcache import samples
from tokcache.errors import InvalidScope
from tokcache.llama import Reuse
from tokcache.llama.scopes import ScopedItems

if TYPE_CHECKING:
    from collections.abc import Callable

RNG = random.Random(3)
PUBLIC, SECRET, OTHER = (RNG.choices(range(3, 500), k=n) for n in (70, 130, 50))
PROMPT = PUBLIC + SECRET
SCOPES = [None, "", "a", "b"]
MEMORIES = ["llama", "gemma3", "mamba", "lfm2", "falcon-h1"]
LONG: dict[str, Any] = {**GREEDY, "max_tokens": 12}
USER = [{"role": "user", "content": "The import system of Python: " * 12}]


def model(memory: str = "llama", cache: Any = None, **settings: Any) -> Any:
    cache = store() if cache is None else cache
    return llama(cache, model=samples.tiny_model(architecture=memory), **settings)


def reuse(llm: Any) -> tuple[int, int]:
    return llm.last_reuse.n_in_context, llm.last_reuse.n_restored


WAYS: dict[str, Callable[..., Any]] = {
    "create_completion": lambda llm, prompt, **scope: text(
        llm.create_completion(prompt, **LONG, **scope)
    ),
    "call": lambda llm, prompt, **scope: text(llm(prompt, **LONG, **scope)),
    "stream": lambda llm, prompt, **scope: "".join(
        text(part) for part in llm.create_completion(prompt, stream=True, **LONG, **scope)
    ),
    "generate": lambda llm, prompt, **scope: [
        token for _, token in zip(range(12), llm.generate(prompt, temp=0.0, **scope), strict=False)
    ],
}


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    found = {}
    for memory in MEMORIES:
        uncached = llama(model=samples.tiny_model(architecture=memory), reproducible=True)
        found[memory] = WAYS["create_completion"](uncached, PROMPT)
        uncached.close()
    return found


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("public", [[], PUBLIC])
@pytest.mark.parametrize("memory", MEMORIES)
def test_another_tenant_finds_nothing_but_the_public_prefix(
    memory: str, public: list[int], reproducible: bool, expected: dict[str, str]
) -> None:
    llm = model(memory, public_prefix=public, reproducible=reproducible)
    ask = WAYS["create_completion"]
    answers = []
    for scope in SCOPES:
        answers.append(ask(llm, PROMPT, scope=scope))
        n_reused = sum(reuse(llm))
        assert n_reused <= len(public)
        if scope is None:
            assert n_reused == 0
        elif public and memory in {"llama", "gemma3"}:
            assert n_reused >= len(public) // BLOCK * BLOCK
    # Each of them finds its own again.
    for scope in SCOPES:
        answers.append(ask(llm, PROMPT, scope=scope))
        assert sum(reuse(llm)) >= len(PROMPT) // BLOCK * BLOCK
        assert llm.last_reuse.n_restored > 0
    if reproducible:
        assert set(answers) == {expected[memory]}
    assert llm.prefix_cache.stats().refusals == {}
    llm.prefix_cache._check()
    llm.close()


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_method_takes_a_scope(way: str, reproducible: bool) -> None:
    llm = model(reproducible=reproducible)
    ask = WAYS[way]
    first = ask(llm, PROMPT, scope="a")
    for scope in ("b", None):
        other = ask(llm, PROMPT, scope=scope)
        assert reuse(llm) == (0, 0)
        if reproducible:
            assert other == first
    assert ask(llm, PROMPT, scope="a") == first or not reproducible
    assert llm.last_reuse.n_restored > 0
    llm.close()


@pytest.mark.parametrize("stream", [False, True])
def test_chats_take_a_scope(stream: bool) -> None:
    llm = model()

    def ask(scope: str) -> None:
        answer = llm.create_chat_completion(USER, stream=stream, scope=scope, **LONG)
        if stream:
            assert list(answer)

    ask("a")
    ask("b")
    assert reuse(llm) == (0, 0)
    ask("a")
    assert llm.last_reuse.n_restored > 0
    llm.close()


def test_a_chat_handler_that_asks_late_asks_for_the_requests_scope() -> None:
    """Some of llama_cpp's handlers are generators: they run after the call has returned."""
    llm = model()
    seen: list[str | None] = []

    def late(*, llama: Any, stream: bool, **_: Any) -> Any:
        assert stream
        seen.append(llama._scopes.current())
        for part in llama.create_completion(PROMPT, stream=True, **LONG):
            seen.append(llama._scopes.current())
            yield part

    llm._chat_handlers["late"], llm.chat_format = late, "late"

    def ask(scope: str) -> None:
        answer = llm.create_chat_completion(USER, stream=True, scope=scope)
        assert isinstance(answer, ScopedItems)
        assert llm._scopes.current() is None
        for _ in answer:
            assert llm._scopes.current() is None
        answer.close()

    ask("a")
    assert set(seen) == {"a"}
    ask("b")
    assert reuse(llm) == (0, 0)
    ask("a")
    assert llm.last_reuse.n_restored > 0
    llm.close()


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("memory", MEMORIES)
def test_interleaved_streams_of_two_scopes_keep_theirs(
    memory: str, reproducible: bool, expected: dict[str, str]
) -> None:
    llm = model(memory, reproducible=reproducible)
    scopes = ["a", "b", "a"]
    reused = []
    streams = [llm.create_completion(PROMPT, stream=True, scope=scope, **LONG) for scope in scopes]
    parts = ["", "", ""]
    for i in range(20):
        for k, stream in enumerate(streams):
            part = next(stream, None)
            if part is not None:
                parts[k] += text(part)
                assert llm._record.scope == scopes[k]
            if i == 0:
                reused.append(sum(reuse(llm)))
    assert reused[:2] == [0, 0]
    if memory != "mamba":  # it saves at the end of an answer, and no answer has ended
        assert reused[2] > 0
    if reproducible:
        assert set(parts) == {expected[memory]}
    # Each saved to its own scope: scopes that no stream had find nothing.
    for unknown in ("c", None):
        llm.create_completion(PROMPT, scope=unknown, **LONG)
        assert reuse(llm) == (0, 0)
    llm.prefix_cache._check()
    llm.close()


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_stream_that_another_request_ends_is_saved_for_its_own_scope(memory: str) -> None:
    cache = store()
    llm = model(memory, cache)
    stream = llm.create_completion(PROMPT, stream=True, scope="a", **LONG)
    next(stream)
    del stream
    llm.create_completion(OTHER, scope="b", **LONG)  # saves a's
    llm.close()
    after = model(memory, cache)
    for scope, is_found in (("b", False), (None, False), ("a", True)):
        after.create_completion(PROMPT, scope=scope, **LONG)
        assert (sum(reuse(after)) > 0) == is_found
    after.close()


def test_a_scope_of_none_is_the_shared_one_also_if_the_object_has_another() -> None:
    llm = model(scope="own")
    for scope in ({}, {"scope": "own"}, {"scope": None}, {"scope": None}):
        llm.create_completion(PROMPT, **LONG, **scope)
        llm.create_completion(OTHER, **LONG, **scope)
    assert llm.last_reuse.n_restored > 0
    found = {}
    for name, scope in (("default", {}), ("own", {"scope": "own"}), ("shared", {"scope": None})):
        llm.reset()
        llm.create_completion(PROMPT, **LONG, **scope)
        found[name] = llm.last_reuse.n_restored
    assert found == dict.fromkeys(found, len(PROMPT) - 1)
    assert llm.prefix_cache.clear(scope="own") > 0
    for asked, n_restored in ((None, len(PROMPT) - 1), ("own", 0)):
        llm.reset()
        llm.create_completion(PROMPT, scope=asked, **LONG)
        assert reuse(llm) == (0, n_restored)
    llm.close()


def test_without_a_cache_the_context_is_kept_apart_too() -> None:
    llm = llama(public_prefix=PUBLIC)
    llm.create_completion(PROMPT, scope="a", **LONG)
    llm.create_completion(PROMPT, scope="b", **LONG)
    assert reuse(llm) == (len(PUBLIC), 0)
    llm.create_completion(PROMPT, scope="b", **LONG)
    assert reuse(llm) == (len(PROMPT) - 1, 0)
    # A prompt that is all public is reused by any scope.
    llm.create_completion(PUBLIC, scope="c", **LONG)
    assert reuse(llm) == (len(PUBLIC) - 1, 0)
    llm.close()


def test_tokens_decoded_by_hand_after_those_of_another_scope_are_not_reused() -> None:
    llm = model()
    llm.create_completion(PROMPT, scope="a", **LONG)
    llm.eval(OTHER)  # for the object's own scope, after those of a
    held = llm.input_ids[: llm.n_tokens].tolist()
    n_saved = llm.prefix_cache.stats().saved_tokens
    for scope in ("a", None, "b"):
        llm.create_completion([*held, 7], scope=scope, **LONG)
        assert llm.last_reuse.n_in_context == 0
        assert scope == "a" or llm.last_reuse.n_restored == 0
        llm.reset()
        llm.eval(PROMPT)
        with llm.serving("z"):
            llm.eval(OTHER)
        held = llm.input_ids[: llm.n_tokens].tolist()
    assert llm.prefix_cache.stats().saved_tokens > n_saved
    llm.close()


def test_llama_cpps_own_cache_serves_the_objects_own_scope_alone() -> None:
    """It is keyed by tokens alone."""
    llm = model()
    llm.set_cache(llama_cpp.LlamaRAMCache())
    llm.create_completion(PROMPT, scope="a", **LONG)
    assert len(llm._llama_cpp_cache.cache_state) == 0
    llm.create_completion(PROMPT, **LONG)
    assert reuse(llm) == (0, 0)
    assert len(llm._llama_cpp_cache.cache_state) == 1
    llm.create_completion(OTHER, **LONG)
    llm.prefix_cache.clear()
    llm.create_completion(PROMPT, scope="b", **LONG)
    assert reuse(llm) == (0, 0)
    llm.create_completion(OTHER, **LONG)
    llm.create_completion(PROMPT, **LONG)
    assert llm.last_reuse.n_in_context == len(PROMPT) - 1
    llm.close()


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_the_tokenizers_entries_are_the_scopes(is_wrapped: bool) -> None:
    from tokenizers import Tokenizer  # noqa: PLC0415

    own = tokcache.wrap(Tokenizer.from_file(str(samples.tiny_tokenizer())))
    llm = model(tokenizer=own if is_wrapped else None)
    string = "The import system of Python"

    def n_hits() -> int:
        stats = own.cache_stats().l0 if is_wrapped else llm.tokenizer_._l0.stats()
        return int(stats.hits)

    for scope, is_hit in (("a", 0), ("b", 0), ("a", 1), (None, 0), ("b", 1)):
        before = n_hits()
        llm.create_completion(string, scope=scope, **LONG)
        assert n_hits() - before == is_hit, scope
        assert llm.tokenize(string.encode(), False, True, scope=scope)
        assert n_hits() - before == is_hit + 1
    assert llm.tokenizer_._recent[0] == "b"
    tokens = llm.tokenizer_._recent[1]
    assert llm.tokenizer_.int32_ids(
        tokens, scope="a"
    ).flags.writeable  # a copy: the list was that of another scope
    llm.close()


def test_embeddings_take_a_scope() -> None:
    llm = model(embedding=True)
    for scope, n_hits in (("a", 0), ("b", 0), ("a", 1)):
        llm.create_embedding("Hello", scope=scope)
        assert llm.tokenizer_._l0.stats().hits == n_hits
    llm.embed("Hello", scope="b")
    assert llm.tokenizer_._l0.stats().hits == 2
    llm.close()


def test_threads_of_many_scopes_never_meet(expected: dict[str, str]) -> None:
    llm = model(reproducible=True)
    hold, found = llm._hold, []

    def held(tokens: Any) -> Any:
        rest = hold(tokens)
        found.append((llm._scopes.current(), sum(reuse(llm))))
        return rest

    llm._hold = held
    answers: list[str] = []

    def work(scope: str) -> None:
        ways = ("create_completion", "stream", "call")
        answers.extend(WAYS[way](llm, PROMPT, scope=scope) for way in ways)

    threads = [threading.Thread(target=work, args=(scope,)) for scope in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert set(answers) == {expected["llama"]}
    for scope in "abcd":
        reused = [n for asked, n in found if asked == scope]
        assert reused[0] == 0
        assert all(reused[1:])
    llm.close()


def test_a_wrong_scope_is_refused_before_anything_happens() -> None:
    llm = model()
    llm.create_completion(PROMPT, **LONG)
    before, held = llm.last_reuse, llm.n_tokens
    uses: list[Callable[[Any], Any]] = [
        *(lambda scope, ask=ask: ask(llm, OTHER, scope=scope) for ask in WAYS.values()),
        lambda scope: llm.create_completion(OTHER, stream=True, scope=scope),
        lambda scope: llm.generate(OTHER, scope=scope),
        lambda scope: llm.create_chat_completion(USER, scope=scope),
        lambda scope: llm.create_embedding("x", scope=scope),
        lambda scope: llm.tokenize(b"x", scope=scope),
    ]
    for use in uses:
        for scope in (5, b"a", True, ["a"]):
            with pytest.raises(InvalidScope, match="scope must be a str or None"):
                use(scope)
    assert (llm.last_reuse, llm.n_tokens) == (before, held)
    assert isinstance(before, Reuse)
    llm.close()


def test_a_call_of_the_object_is_a_completion() -> None:
    """`llm(…)` and `create_completion` take the same arguments in the same order."""
    one, two = (
        inspect.signature(method).parameters
        for method in (llama_cpp.Llama.__call__, llama_cpp.Llama.create_completion)
    )
    assert list(one) == list(two)


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("memory", MEMORIES)
def test_held_positions_of_a_cleared_scope_are_neither_stored_nor_reused(
    memory: str, reproducible: bool
) -> None:
    cache = store()
    llm = model(memory, cache, public_prefix=PUBLIC, reproducible=reproducible)
    ask = WAYS["create_completion"]
    first = ask(llm, PROMPT, scope="a")
    ask(llm, PUBLIC + OTHER, scope="b")
    ask(llm, PROMPT, scope="a")
    cache.clear(scope="a")
    # The answer is saved when the next request comes: by then its scope was cleared.
    again = ask(llm, PROMPT, scope="a")
    assert sum(reuse(llm)) <= len(PUBLIC)
    if reproducible:
        assert again == first
    llm.close()
    other = model(memory, cache, public_prefix=PUBLIC, reproducible=reproducible)
    ask(other, PUBLIC + OTHER, scope="b")
    assert sum(reuse(other)) > 0
    other.close()


def test_a_stream_whose_scope_is_cleared_continues_and_is_not_stored() -> None:
    cache = store()
    llm = model(cache=cache)
    whole = WAYS["stream"](model(), PROMPT, scope="a")
    stream = llm.create_completion(PROMPT, stream=True, scope="a", **LONG)
    began = text(next(stream))
    cache.clear(scope="a")
    assert began + "".join(map(text, stream)) == whole
    llm.close()
    assert len(cache) == 0
    assert cache.stats().refusals["cleared"] >= 1


@pytest.mark.parametrize("kind", ["model", "wrapped"])
def test_cache_clear_removes_a_tenants_texts_and_tokens_in_the_context(kind: str) -> None:
    tokenizer = None if kind == "model" else samples.tiny_tokenizer()
    wrapped = None if tokenizer is None else tokcache.wrap(Tokenizer.from_file(str(tokenizer)))
    llm = llama(model=samples.tiny_model(tokenizer), tokenizer=wrapped)
    texts = llm.tokenizer_._l0 if wrapped is None else wrapped

    def n_entries() -> int:
        stats = texts.stats() if wrapped is None else texts.cache_stats().l0
        return int(stats.n_entries)

    for scope in ("a", "b", "a"):
        for prompt in ("The import system", "of Python"):
            llm.create_completion(prompt, scope=scope, **LONG)
    assert n_entries() == 4
    llm.create_completion("The import system", scope="a", **LONG)
    llm.cache_clear(scope="b")
    assert n_entries() == 2
    llm.create_completion("The import system", scope="a", **LONG)
    assert llm.last_reuse.n_in_context > 0
    llm.cache_clear(scope="a")
    assert n_entries() == 0
    llm.create_completion("The import system", scope="a", **LONG)
    assert reuse(llm) == (0, 0)
    llm.cache_clear()
    assert n_entries() == 0
    with pytest.raises(InvalidScope):
        llm.cache_clear(scope=5)
    llm.close()


def test_cache_clear_of_either_scope_empties_a_context_of_both() -> None:
    for scope in ("a", "b"):
        llm = llama()
        llm.create_completion(PROMPT, scope="a", **LONG)
        with llm.serving("b"):
            llm.eval(OTHER)
        llm.cache_clear(scope=scope)
        assert llm.n_tokens == 0
        llm.close()


def test_an_answer_to_a_public_prompt_of_another_scope_is_not_stored_after_a_clear() -> None:
    """The context holds exactly the prompt, from another scope, so nothing is decoded for it."""
    cache = store()
    llm = model(cache=cache, public_prefix=PUBLIC)
    first = llm.generate(PUBLIC, temp=0.0, scope="a")
    next(first)
    first.close()
    stream = llm.generate(PUBLIC, temp=0.0, scope="b")
    tokens = [next(stream) for _ in range(BLOCK + 8)]
    assert reuse(llm) == (len(PUBLIC), 0)
    cache.clear(scope="b")
    stream.close()
    llm.close()
    other = model(cache=cache, public_prefix=PUBLIC)
    other.create_completion([*PUBLIC, *tokens, 7], scope="b", **LONG)
    assert reuse(other) == (0, len(PUBLIC))
    other.close()
