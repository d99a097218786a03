"""Concurrent calls for one text encode it once: threads, event loops, forked children."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tokenizers import processors

import tokcache
from tests.text.implementations import implementation
from tests.text.tokenizers_made import MADE, TEXTS, fast
from tokcache.errors import InvalidConfig, InvalidScope, InvalidText
from tokcache.text.tokenizer import CachedTokenizer, WrappedTokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding

N = 100


class CountingEngine:
    """Encodes a character as its code point; records its calls; waits while `gate` is cleared."""

    reason: str | None = None

    def layout(self, _n_texts: int, _add_special_tokens: bool) -> None: ...

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        self.calls.append(list(texts))
        self.entered.set()
        self.gate.wait(20)
        if "bad" in texts:
            raise ValueError("bad text")
        for text in texts:
            text.encode()  # raises for a lone surrogate, as tokenizers does
        return [[ord(c) + add_special_tokens for c in text] for text in texts]

    def encodings(self, texts: Sequence[str], add_special_tokens: bool) -> list[Encoding]:
        raise NotImplementedError(texts, add_special_tokens)


class Wrapped(WrappedTokenizer):
    def __init__(self, engine: CountingEngine) -> None:
        self._tokcache = CachedTokenizer(None, lambda: engine)
        self._tokcache_scope = None


@pytest.fixture(params=["reference", "native"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CountingEngine:
    chosen = implementation(request.param)
    chosen.use(monkeypatch)
    return CountingEngine()


@pytest.fixture
def tok(engine: CountingEngine) -> Wrapped:
    return Wrapped(engine)


def ids(text: str) -> list[int]:
    return [ord(c) + 1 for c in text]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def pool_of_threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(N) as pool:
        yield pool


def test_a_hit_does_not_encode(tok: Wrapped, engine: CountingEngine) -> None:
    assert [tok.token_ids("one").tolist() for _ in range(3)] == [ids("one")] * 3
    assert engine.calls == [["one"]]
    stats = tok.cache_stats()
    assert (stats.l0.hits, stats.l0.misses, stats.encoded_texts, stats.encoded_tokens) == (
        2,
        1,
        1,
        3,
    )


def test_a_batch_encodes_its_misses_once_and_in_one_call(
    tok: Wrapped, engine: CountingEngine
) -> None:
    tok.token_ids("b")
    got = tok.token_ids_batch(["a", "b", "c", "a", "c"])
    assert [one.tolist() for one in got] == [ids(c) for c in "abcac"]
    assert engine.calls == [["b"], ["a", "c"]]
    assert tok.token_ids_batch([]) == []
    assert tok.token_ids_batch(("a", "b")) == got[:2]
    assert len(engine.calls) == 2


def test_each_scope_encodes_a_text_once(tok: Wrapped, engine: CountingEngine) -> None:
    for scope in (None, "a", "b", ""):
        for _ in range(2):
            tok.token_ids("x", scope=scope)
            tok.token_ids_batch(["x"], scope=scope)
            asyncio.run(tok.atoken_ids("x", scope=scope))
    assert engine.calls == [["x"]] * 4


def test_a_hundred_threads_share_one_encoding(
    tok: Wrapped, engine: CountingEngine, pool_of_threads: ThreadPoolExecutor
) -> None:
    engine.gate.clear()
    answers = [pool_of_threads.submit(tok.token_ids, "same") for _ in range(N)]
    wait_until(lambda: tok.cache_stats().shared == N - 1)
    engine.gate.set()
    assert [one.result().tolist() for one in answers] == [ids("same")] * N
    assert engine.calls == [["same"]]
    assert tok.cache_stats().l0.misses == N


def test_a_hundred_coroutines_share_one_encoding(tok: Wrapped, engine: CountingEngine) -> None:
    async def ask() -> list[Any]:
        return await asyncio.gather(*(tok.atoken_ids("same") for _ in range(N)))

    assert [one.tolist() for one in asyncio.run(ask())] == [ids("same")] * N
    assert engine.calls == [["same"]]


def test_threads_coroutines_and_batches_share_one_encoding(
    tok: Wrapped, engine: CountingEngine, pool_of_threads: ThreadPoolExecutor
) -> None:
    engine.gate.clear()
    batch = pool_of_threads.submit(tok.token_ids_batch, ["x", "y"])
    engine.entered.wait(20)
    single = pool_of_threads.submit(tok.token_ids, "x")
    other = pool_of_threads.submit(tok.token_ids_batch, ["y", "z"])
    wait_until(lambda: tok.cache_stats().shared == 2)
    later = pool_of_threads.submit(lambda: asyncio.run(tok.atoken_ids("z")))
    wait_until(lambda: tok.cache_stats().shared == 3)
    engine.gate.set()
    assert single.result() == batch.result()[0]
    assert other.result() == [batch.result()[1], later.result()]
    assert engine.calls == [["x", "y"], ["z"]]


def test_cancelling_one_caller_does_not_fail_the_others(
    tok: Wrapped, engine: CountingEngine
) -> None:
    async def ask() -> list[Any]:
        engine.gate.clear()
        tasks = [asyncio.create_task(tok.atoken_ids("same")) for _ in range(5)]
        await asyncio.to_thread(engine.entered.wait, 20)
        tasks[0].cancel()  # the one that started the encoding
        tasks[3].cancel()
        await asyncio.sleep(0)
        engine.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    got = asyncio.run(ask())
    assert [isinstance(one, asyncio.CancelledError) for one in got] == [1, 0, 0, 1, 0]
    assert got[1].tolist() == got[2].tolist() == got[4].tolist() == ids("same")
    assert engine.calls == [["same"]]


def test_a_miss_does_not_block_the_event_loop(tok: Wrapped, engine: CountingEngine) -> None:
    async def ask() -> None:
        engine.gate.clear()
        task = asyncio.create_task(tok.atoken_ids("slow"))
        await asyncio.to_thread(engine.entered.wait, 20)
        for _ in range(10):
            await asyncio.sleep(0.001)
        assert not task.done()
        engine.gate.set()
        assert (await task).tolist() == ids("slow")

    asyncio.run(ask())


def test_an_error_reaches_all_callers_and_is_not_cached(
    tok: Wrapped, engine: CountingEngine, pool_of_threads: ThreadPoolExecutor
) -> None:
    engine.gate.clear()
    answers = [pool_of_threads.submit(tok.token_ids, "bad") for _ in range(10)]
    answers += [
        pool_of_threads.submit(lambda: asyncio.run(tok.atoken_ids("bad"))) for _ in range(10)
    ]
    wait_until(lambda: tok.cache_stats().shared == 19)
    engine.gate.set()
    assert [str(one.exception()) for one in answers] == ["bad text"] * 20
    assert engine.calls == [["bad"]]
    with pytest.raises(ValueError, match="bad text"):
        tok.token_ids("bad")
    assert engine.calls == [["bad"], ["bad"]]
    assert tok.cache_stats().l0.n_entries == 0
    assert tok.token_ids("good").tolist() == ids("good")


def test_an_error_for_one_text_of_a_batch_does_not_fail_callers_of_its_other_texts(
    tok: Wrapped, engine: CountingEngine, pool_of_threads: ThreadPoolExecutor
) -> None:
    engine.gate.clear()
    batch = pool_of_threads.submit(tok.token_ids_batch, ["good", "bad"])
    engine.entered.wait(20)
    single = pool_of_threads.submit(tok.token_ids, "good")
    loop = pool_of_threads.submit(lambda: asyncio.run(tok.atoken_ids("good")))
    other = pool_of_threads.submit(tok.token_ids_batch, ["good", "fine"])
    wait_until(lambda: tok.cache_stats().shared == 3)
    engine.gate.set()
    assert str(batch.exception()) == "bad text"
    assert single.result().tolist() == loop.result().tolist() == ids("good")
    assert [one.tolist() for one in other.result()] == [ids("good"), ids("fine")]


def test_a_lone_surrogate_fails_only_the_calls_that_contain_it(
    tok: Wrapped, engine: CountingEngine, pool_of_threads: ThreadPoolExecutor
) -> None:
    engine.gate.clear()
    lone = pool_of_threads.submit(tok.token_ids, "a\ud800")
    batch = pool_of_threads.submit(tok.token_ids_batch, ["good", "b\udfff"])
    wait_until(lambda: len(engine.calls) == 2)
    good = [pool_of_threads.submit(tok.token_ids, "good")]
    good += [pool_of_threads.submit(lambda: asyncio.run(tok.atoken_ids("good")))]
    again = pool_of_threads.submit(lambda: asyncio.run(tok.atoken_ids("a\ud800")))
    both = pool_of_threads.submit(tok.token_ids_batch, ["x", "y", "a\ud800"])
    wait_until(lambda: tok.cache_stats().shared == 4)
    engine.gate.set()
    assert [one.result().tolist() for one in good] == [ids("good")] * 2
    for asked, place in ((lone, "text"), (again, "text"), (batch, "texts[1]"), (both, "texts[2]")):
        error = asked.exception()
        assert isinstance(error, InvalidText)
        assert str(error).startswith(f"{place} has a lone surrogate, U+D")
        assert "at character 1 of 2" in str(error)
    assert tok.token_ids("x").tolist() == ids("x")


def test_errors_for_invalid_texts_name_the_index(tok: Wrapped, engine: CountingEngine) -> None:
    bad: Any
    for bad in (b"x", None, 3, ["x"]):
        with pytest.raises(
            InvalidText, match=rf"texts\[1\] must be a str, not {type(bad).__name__}"
        ):
            tok.token_ids_batch(["x", bad])
    for bad in (None, 3, "x", b"x"):
        with pytest.raises(InvalidText, match="must be a list of str"):
            tok.token_ids_batch(bad)
    assert engine.calls == []
    words: Any = np.array(["x", "yz"])
    assert [one.tolist() for one in tok.token_ids_batch(words)] == [ids("x"), ids("yz")]
    assert tok.token_ids(words[1]).tolist() == ids("yz")
    assert [one.tolist() for one in tok.token_ids_batch(text for text in "xy")] == [  # type: ignore[arg-type]
        ids("x"),
        ids("y"),
    ]
    assert all(type(key) is str for key, *_ in tok._tokcache._generation.l0.held())


def test_ids_encoded_before_an_invalidation_are_not_cached(
    tok: Wrapped, engine: CountingEngine, pool_of_threads: ThreadPoolExecutor
) -> None:
    engine.gate.clear()
    early = pool_of_threads.submit(tok.token_ids, "x")
    engine.entered.wait(20)
    tok._tokcache.invalidate()
    engine.gate.set()
    assert early.result().tolist() == ids("x")
    assert tok.cache_stats().l0.n_entries == 0
    tok.token_ids("x")
    assert engine.calls == [["x"], ["x"]]
    tok._tokcache.invalidate()
    assert asyncio.run(tok.atoken_ids("x")).tolist() == ids("x")
    assert engine.calls == [["x"]] * 3
    assert tok.cache_stats().invalidations == 2


def test_an_engine_that_must_not_be_cached_is_called_each_time(
    tok: Wrapped, engine: CountingEngine
) -> None:
    engine.reason = "by chance"
    tok.token_ids("x")
    tok.token_ids("x")
    tok.token_ids_batch(["x", "x"])
    asyncio.run(tok.atoken_ids("x"))
    assert engine.calls == [["x"]] * 4
    assert tok.cache_stats().l0.n_entries == 0


def test_scope_and_add_special_tokens_are_keyword_only_and_checked(
    tok: Wrapped, engine: CountingEngine
) -> None:
    calls: list[Callable[..., Any]] = [
        tok.token_ids,
        lambda text, *args, **kwargs: tok.token_ids_batch([text], *args, **kwargs),
        lambda _text, **kwargs: tok.token_ids_batch([], **kwargs),
        lambda text, *args, **kwargs: asyncio.run(tok.atoken_ids(text, *args, **kwargs)),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="positional"):
            call("secret", "tenant-a")
        for flag in ("tenant-a", 1, None):
            with pytest.raises(InvalidConfig, match="add_special_tokens must be True or False"):
                call("secret", add_special_tokens=flag)
    assert engine.calls == []
    for method in (tok.token_ids, tok.token_ids_batch, tok.atoken_ids):
        first, *others = inspect.signature(method).parameters.values()
        assert first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert [(one.name, one.kind, one.default) for one in others] == [
            ("add_special_tokens", inspect.Parameter.KEYWORD_ONLY, True),
            ("scope", inspect.Parameter.KEYWORD_ONLY, None),
        ]


def test_invalid_texts_and_scopes_are_refused(tok: Wrapped, engine: CountingEngine) -> None:
    class Text(str):
        __slots__ = ()
        __hash__ = None  # type: ignore[assignment]

    bad: Any
    for bad in (b"x", None, 3, ["x"]):
        with pytest.raises(InvalidText):
            tok.token_ids(bad)
        with pytest.raises(InvalidText):
            tok.token_ids_batch([bad])
        with pytest.raises(InvalidText):
            asyncio.run(tok.atoken_ids(bad))
    for bad in ("x", b"x"):
        with pytest.raises(InvalidText):
            tok.token_ids_batch(bad)
    for call in (
        tok.token_ids,
        tok.token_ids_batch,
        lambda *a, **k: asyncio.run(tok.atoken_ids(*a, **k)),
    ):
        with pytest.raises(InvalidScope):
            call("x", scope=b"a")  # type: ignore[arg-type]
    assert engine.calls == []
    assert tok.token_ids(Text("x")) == tok.token_ids("x")
    assert tok.token_ids_batch([Text("x"), Text("y")]) == tok.token_ids_batch(["x", "y"])
    assert engine.calls == [["x"], ["y"]]


def in_child(check: Callable[[], bool]) -> bool:
    """Return the result of `check` in a forked child; False if the child hangs or raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this test forks while threads run
        child = os.fork()
    if child == 0:
        os._exit(0 if check() else 1)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def test_a_forked_child_does_not_wait_for_threads_of_its_parent(
    tok: Wrapped, engine: CountingEngine, pool_of_threads: ThreadPoolExecutor
) -> None:
    tok.token_ids("kept")
    asyncio.run(tok.atoken_ids("started the threads"))
    engine.gate.clear()
    engine.entered.clear()
    encoding = pool_of_threads.submit(tok.token_ids, "x")  # the child does not have this thread
    engine.entered.wait(20)

    def check() -> bool:
        engine.gate.set()
        n_calls = len(engine.calls)
        answers = [tok.token_ids("kept"), tok.token_ids("x"), asyncio.run(tok.atoken_ids("y"))]
        return [one.tolist() for one in answers] == [ids("kept"), ids("x"), ids("y")] and (
            engine.calls[n_calls:] == [["x"], ["y"]]
        )

    with tok._tokcache._lock, tok._tokcache.plain_lock, tok._tokcache.guard_lock:
        assert in_child(check)
    engine.gate.set()
    assert encoding.result().tolist() == ids("x")


def test_a_forked_child_encodes_with_a_real_tokenizer() -> None:
    plain = MADE["byte_level_bpe"]()
    wrapped = tokcache.wrap(plain)
    wrapped.token_ids_batch(TEXTS)
    expected = plain.encode("another hello").ids
    assert in_child(lambda: wrapped.token_ids("another hello").tolist() == expected)


def test_a_child_forked_during_uncached_calls_does_not_wait_for_them() -> None:
    wrapped = tokcache.wrap(fast(MADE["byte_level_bpe"]()))
    expected = fast(MADE["byte_level_bpe"]())("hello world")["input_ids"]
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            wrapped(TEXTS * 50, return_offsets_mapping=True)

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        for _ in range(8):
            assert in_child(lambda: wrapped("hello world")["input_ids"] == expected)
    finally:
        is_over.set()
        asker.join()


@pytest.mark.parametrize("kind", ["transformers", "tokenizers"])
def test_a_short_uncached_call_does_not_wait_for_a_long_one(kind: str) -> None:
    plain = MADE["byte_level_bpe"]()
    wrapped: Any = tokcache.wrap(plain if kind == "tokenizers" else fast(plain))

    def ask(text: str) -> object:
        if kind == "tokenizers":
            return wrapped.encode_batch([text])[0].offsets
        return wrapped([text], return_offsets_mapping=True)["offset_mapping"][0]

    right = ask("hello world")
    long = " ".join(f"w{number}" for number in range(300_000))
    asker = threading.Thread(target=ask, args=(long,))
    asker.start()
    while asker.is_alive() and not _is_taken(wrapped):
        time.sleep(0.001)
    assert ask("hello world") == right
    assert _is_taken(wrapped)
    asker.join()


def _is_taken(wrapped: Any) -> bool:
    lock = wrapped._tokcache.plain_lock
    if not lock.acquire(blocking=False):
        return True
    lock.release()
    return False


def test_threads_with_different_arguments_get_correct_answers() -> None:
    plain = fast(MADE["byte_level_bpe"](), pad_token="</s>")  # noqa: S106 (no password)
    wrapped = tokcache.wrap(plain)
    texts = [f"{text} {n} hello world" for n in range(3) for text in TEXTS]
    asks: list[dict[str, Any]] = [
        {},
        {"add_special_tokens": False},
        {"truncation": True, "max_length": 3},
        {"truncation": True, "max_length": 6, "padding": "max_length"},
        {"padding": "max_length", "max_length": 40},
        {"split_special_tokens": True},
    ]
    expected = {(text, n): plain(text, **asks[n]).data for text in texts for n in range(len(asks))}

    def work(seed: int) -> int:
        wrong = 0
        for step in range(60 * len(asks)):
            text, n = texts[(seed * 7 + step) % len(texts)], (seed + step) % len(asks)
            wrong += wrapped(text, **asks[n]).data != expected[text, n]
            wrong += wrapped.encode(text, **asks[n]) != expected[text, n]["input_ids"]
            wrong += wrapped.token_ids(text).tolist() != expected[text, 0]["input_ids"]
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 0
    assert wrapped.cache_stats().l0.hits > 0


def test_threads_with_different_input_modes_get_correct_answers() -> None:
    class Modes(type(fast(MADE["unigram"]()))):  # type: ignore[misc]
        def _switch_to_input_mode(self) -> None:
            self._tokenizer.post_processor = template("<s> $A")

        def _switch_to_target_mode(self) -> None:
            self._tokenizer.post_processor = template("$A </s>")

    plain = Modes(tokenizer_object=MADE["byte_level_bpe"]())
    wrapped = tokcache.wrap(plain)
    text = "hello world " * 30
    asks = [{"text": text}, {"text_target": text}, {"text": text, "text_target": "fox"}]
    expected = [plain(**ask).data for ask in asks]

    def work(seed: int) -> int:
        turns = [(seed + step) % 3 for step in range(100)]
        return sum(wrapped(**asks[n]).data != expected[n] for n in turns)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 0


def template(single: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])


def test_ids_during_a_change_are_those_before_or_after_it() -> None:
    wrapped = tokcache.wrap(MADE["byte_level_bpe"]())
    text = "hello world, hello fox"
    before = wrapped.token_ids(text).tolist()
    plain = wrapped.unwrap()
    plain.pre_tokenizer.add_prefix_space = True
    after = plain.encode(text).ids
    stop = threading.Event()

    def ask() -> bool:
        ok = True
        while not stop.is_set():
            ok &= wrapped.token_ids(text).tolist() in (before, after)
        return ok

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask) for _ in range(4)]
        for n in range(60):
            wrapped.pre_tokenizer.add_prefix_space = n % 2 == 1
            assert wrapped.token_ids(text).tolist() == (after if n % 2 else before)
        stop.set()
        assert all(one.result() for one in answers)
