"""How long the users of one Llama wait for each other, and when a Llama is freed.

Waiting is measured in calls of llama_decode, not in seconds: `Decodes` stops one decode until the
other threads are in the queue, then counts the decodes that start before they are served.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.models import GREEDY, llama, plain, store, text
from tokcache import samples
from tokcache.errors import ModelClosed
from tokcache.llama import gate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONG: dict[str, Any] = {**GREEDY, "max_tokens": 24}
PROMPTS = [[5 + i, *range(7, 300)] for i in range(4)]  # more than four batches of 64
N_BATCH = 64
WAIT_S = 60


class Decodes:
    """Counts a model's decodes and stops the one numbered `stop_at` until `go_on`."""

    def __init__(self, llm: Any, stop_at: int) -> None:
        self.n, self._stop_at = 0, stop_at
        self._stopped, self._may_go_on = threading.Event(), threading.Event()
        self._decode = llm._ctx.decode
        llm._ctx.decode = self

    def __call__(self, batch: Any) -> None:
        self.n += 1
        if self.n == self._stop_at:
            self._stopped.set()
            assert self._may_go_on.wait(WAIT_S)
        self._decode(batch)

    def wait(self) -> None:
        assert self._stopped.wait(WAIT_S)

    def go_on(self) -> None:
        self._may_go_on.set()


class Worker(threading.Thread):
    """A thread that returns its result or raises its error in `result`."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work, self._result = work, None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:  # noqa: BLE001 (it is raised in `result`)
            self._error = error

    def result(self) -> Any:
        self.join(WAIT_S)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error
        return self._result


def wait_for(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def queued(llm: Any, work: Callable[[], Any]) -> Worker:
    """Start `work` in a thread and return once it waits for the context."""
    n_waiting = len(llm._gate._waiting)
    worker = Worker(work)
    wait_for(lambda: len(llm._gate._waiting) > n_waiting)
    return worker


def model(**settings: Any) -> Any:
    settings = {"n_batch": N_BATCH, **settings}
    cache = settings.pop("cache", None) or store()
    return llama(cache, **settings)


@pytest.fixture(scope="module", params=["llama", "gemma3", "mamba", "lfm2"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def answer(llm: Any, prompt: list[int], **settings: Any) -> str:
    return text(llm.create_completion(prompt, **{**LONG, **settings}))


def streamed(llm: Any, prompt: list[int]) -> str:
    return "".join(text(part) for part in llm.create_completion(prompt, stream=True, **LONG))


@pytest.fixture(scope="module")
def expected(architecture: str) -> list[str]:
    llm = model(model=samples.tiny_model(architecture=architecture), reproducible=True)
    answers = [answer(llm, prompt) for prompt in PROMPTS]
    llm.close()
    return answers


# How long others wait


def change_cache(llm: Any) -> None:
    llm.prefix_cache = store()


SHORT_CALLS: dict[str, Callable[[Any], Any]] = {
    "reset": lambda llm: llm.reset(),
    "save_state": lambda llm: llm.save_state(),
    "prefix_cache": change_cache,
    "reproducible": lambda llm: setattr(llm, "reproducible", llm.reproducible),
    "eval": lambda llm: llm.eval([9, 8, 7]),
}
STOP_AT = {"in the prompt": 2, "in the answer": 12}


@pytest.mark.parametrize("stop_at", STOP_AT.values(), ids=STOP_AT)
@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("call", SHORT_CALLS)
def test_a_call_waits_only_for_the_decode_in_progress(
    architecture: str, expected: list[str], call: str, is_stream: bool, stop_at: int
) -> None:
    llm = model(model=samples.tiny_model(architecture=architecture), reproducible=True)
    decodes = Decodes(llm, stop_at)
    ask = streamed if is_stream else answer
    generation = Worker(lambda: ask(llm, PROMPTS[0]))
    decodes.wait()
    n_decodes: list[int] = []
    own = int(call == "eval")

    def work() -> None:
        SHORT_CALLS[call](llm)
        n_decodes.append(decodes.n - stop_at - own)

    waiting = queued(llm, work)
    decodes.go_on()
    waiting.result()
    # The generation may start its next decode before this thread reads the counter.
    assert n_decodes[0] <= 1
    # The generation is not disturbed.
    assert generation.result() == expected[0]
    assert answer(llm, PROMPTS[0]) == expected[0]
    assert llm.prefix_cache.stats().refusals == {}
    llm.prefix_cache._check()
    llm.close()


@pytest.mark.parametrize("stop_at", STOP_AT.values(), ids=STOP_AT)
def test_another_thread_closes_a_stream_in_the_middle_of_a_step(
    architecture: str, expected: list[str], stop_at: int
) -> None:
    llm = model(model=samples.tiny_model(architecture=architecture), reproducible=True)
    decodes = Decodes(llm, stop_at)
    stream = llm.create_completion(PROMPTS[0], stream=True, **LONG)
    consumer = Worker(lambda: sum(1 for _ in stream))
    decodes.wait()
    closing = queued(llm, stream.close)
    decodes.go_on()
    closing.result()
    assert consumer.result() < LONG["max_tokens"]  # no error: it ended like an exhausted stream
    assert decodes.n == stop_at
    assert next(stream, None) is None
    n_saved = llm.prefix_cache.stats().saved_tokens
    assert answer(llm, PROMPTS[1]) == expected[1]
    assert answer(llm, PROMPTS[0]) == expected[0]
    assert llm.last_reuse.n_restored >= n_saved > 0
    llm.close()


@pytest.mark.parametrize("stop_at", STOP_AT.values(), ids=STOP_AT)
@pytest.mark.parametrize("kind", ["stream", "whole", "eval", "generate", "chat"])
def test_closing_waits_only_for_the_decode_in_progress(
    architecture: str, expected: list[str], kind: str, stop_at: int
) -> None:
    cache = store()
    llm = model(cache=cache, model=samples.tiny_model(architecture=architecture), reproducible=True)
    decodes = Decodes(llm, stop_at)
    user = [{"role": "user", "content": "The import system of Python: " * 20}]
    kinds: dict[str, Callable[[], Any]] = {
        "stream": lambda: streamed(llm, PROMPTS[0]),
        "whole": lambda: answer(llm, PROMPTS[0]),
        "eval": lambda: llm.eval(list(range(5, 5 + 64 * 14))),
        "generate": lambda: list(zip(range(24), llm.generate(PROMPTS[0], temp=0.0), strict=False)),
        "chat": lambda: llm.create_chat_completion(user, **LONG),
    }
    generation = Worker(kinds[kind])
    decodes.wait()
    closing = queued(llm, llm.close)
    decodes.go_on()
    closing.result()
    assert decodes.n == stop_at
    with pytest.raises(ModelClosed):
        generation.result()
    # No wrong state was saved.
    cache._check()
    after = model(
        cache=cache, model=samples.tiny_model(architecture=architecture), reproducible=True
    )
    assert [answer(after, prompt) for prompt in PROMPTS] == expected
    after.close()


def test_a_model_can_close_while_it_embeds_many_texts() -> None:
    llm = model(embedding=True)
    decodes = Decodes(llm, 2)
    texts = ["The import system of Python: " * 9] * 40
    embedding = Worker(lambda: llm.embed(texts))
    decodes.wait()
    closing = queued(llm, llm.close)
    decodes.go_on()
    closing.result()
    assert decodes.n == 2
    with pytest.raises(ModelClosed):
        embedding.result()


def test_waiters_are_served_in_the_order_of_arrival() -> None:
    llm = model(reproducible=True)
    uncached = model(reproducible=True)
    expected = [answer(uncached, prompt) for prompt in PROMPTS]
    decodes = Decodes(llm, 3)
    served: list[str] = []

    def noted(name: str, work: Callable[[], Any]) -> Callable[[], Any]:
        def do() -> Any:
            result = work()
            served.append(name)
            return result

        return do

    first = Worker(noted("first", lambda: answer(llm, PROMPTS[0])))
    decodes.wait()
    works: list[tuple[str, Callable[[], Any]]] = [
        ("answer 1", lambda: answer(llm, PROMPTS[1])),
        ("reset", llm.reset),
        ("answer 2", lambda: streamed(llm, PROMPTS[2])),
        ("setting", lambda: change_cache(llm)),
        ("answer 3", lambda: answer(llm, PROMPTS[3])),
        ("state", llm.save_state),
    ]
    waiting = [queued(llm, noted(name, work)) for name, work in works]
    decodes.go_on()
    answers = [first.result(), *(worker.result() for worker in waiting)]
    assert served == [
        "reset", "setting", "state", "first", "answer 1", "answer 2", "answer 3"
    ]  # fmt: skip
    assert [found for found in answers if isinstance(found, str)] == expected
    llm.close()


def test_two_streams_of_one_thread_do_not_starve_a_third() -> None:
    """Neither of them is ever idle for long: the third enters when the two alternate."""
    llm = model(reproducible=True)
    expected = [answer(llm, prompt) for prompt in PROMPTS[:3]]
    streams = [llm.create_completion(prompt, stream=True, **LONG) for prompt in PROMPTS[:2]]
    parts = [text(next(stream)) for stream in streams]
    third = queued(llm, lambda: answer(llm, PROMPTS[2]))
    for i, stream in enumerate(streams):
        parts[i] += text(next(stream))
    assert third.result() == expected[2]
    for i, stream in enumerate(streams):
        parts[i] += "".join(text(part) for part in stream)
    assert parts == expected[:2]
    llm.close()


def test_a_stream_that_is_read_at_once_does_not_starve_another_generation() -> None:
    """Streams one after the other, without a pause: the waiting answer comes after the first."""
    llm = model(reproducible=True)
    expected = answer(llm, PROMPTS[1])
    decodes = Decodes(llm, 2)
    served: list[str] = []

    def reader() -> None:
        for _ in range(3):
            streamed(llm, PROMPTS[0])
            served.append("stream")

    reading = Worker(reader)
    decodes.wait()

    def other() -> str:
        found = answer(llm, PROMPTS[1])
        served.append("answer")
        return found

    waiting = queued(llm, other)
    decodes.go_on()
    assert waiting.result() == expected
    reading.result()
    assert served.index("answer") <= 1
    llm.close()


def test_an_interrupted_waiter_leaves_the_queue() -> None:
    llm = model()
    tickets = llm._gate
    with tickets.turn():
        ticket = gate._Ticket(gate._Kind.CALL, 7)

        class Interrupted(threading.Condition):
            def wait(self, timeout: float | None = None) -> bool:  # noqa: ARG002
                raise KeyboardInterrupt

        ticket.called = Interrupted(tickets._mutex)
        with pytest.raises(KeyboardInterrupt):
            tickets._enter(ticket)
    assert tickets._waiting == []
    llm.reset()
    llm.close()


class Interrupting(threading.Condition):
    """A condition whose `wait` raises KeyboardInterrupt as soon as another thread is inside."""

    inside = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:  # noqa: ARG002 (the base's)
        while not super().wait(0.01):
            if self.inside.is_set():
                self.inside.clear()
                raise KeyboardInterrupt
        return True


def test_an_interrupt_of_a_paused_generation_is_raised_after_it_takes_the_gate_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = model(reproducible=True)
    expected = answer(llm, PROMPTS[0])
    llm.prefix_cache = store()
    decodes = Decodes(llm, 2)
    seen: list[Any] = []

    def hold() -> None:
        with llm._gate.turn():
            Interrupting.inside.set()
            wait_for(lambda: not Interrupting.inside.is_set())
            seen.extend((llm._gate._inside, len(llm._gate._waiting)))

    generation = Worker(lambda: answer(llm, PROMPTS[0]))
    decodes.wait()
    holder = queued(llm, hold)
    monkeypatch.setattr("tokcache.llama.gate.threading.Condition", Interrupting)
    decodes.go_on()
    with pytest.raises(KeyboardInterrupt):
        generation.result()
    holder.result()
    assert seen == [holder.ident, 1]
    assert llm._gate._inside is None
    monkeypatch.undo()
    assert answer(llm, PROMPTS[0]) == expected
    llm.close()


# Which references keep a model alive


@contextmanager
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def started(stream: Any) -> Any:
    next(stream)
    return stream


def failed(stream: Any) -> Any:
    next(stream)
    with pytest.raises(KeyError):
        stream.throw(KeyError("consumer"))
    return stream


def read(stream: Any) -> Any:
    list(stream)
    return stream


def interleaved(llm: Any) -> Any:
    streams = [llm.create_completion(p, stream=True, **LONG) for p in PROMPTS[:2]]
    for stream in (*streams, *streams):
        next(stream)
    return streams


def dropped_in_a_thread(llm: Any) -> None:
    box = [started(llm.create_completion(PROMPTS[0], stream=True, **LONG))]
    Worker(box.clear).result()


USER = [{"role": "user", "content": "Hello"}]
KEPT: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda _: None,
    "a whole answer": lambda llm: llm.create_completion(PROMPTS[0], **LONG),
    "a stream": lambda llm: started(llm.create_completion(PROMPTS[0], stream=True, **LONG)),
    "a stream never started": lambda llm: llm.create_completion(PROMPTS[0], stream=True),
    "a finished stream": lambda llm: read(llm.create_completion(PROMPTS[0], stream=True, **LONG)),
    "a failed stream": lambda llm: failed(llm.create_completion(PROMPTS[0], stream=True, **LONG)),
    "a chat": lambda llm: started(llm.create_chat_completion(USER, stream=True, **LONG)),
    "a finished chat": lambda llm: read(llm.create_chat_completion(USER, stream=True, **LONG)),
    "generate": lambda llm: started(llm.generate(PROMPTS[0], temp=0.0)),
    "generate never started": lambda llm: llm.generate(PROMPTS[0], temp=0.0),
    "interleaved streams": interleaved,
    "dropped in another thread": dropped_in_a_thread,
}


def is_freed(llm_made: Callable[[], Any], use: Callable[[Any], Any], *, first: str) -> list[bool]:
    """Drop the model and its result; return after each drop whether the model was freed."""
    llm = llm_made()
    freed: list[int] = []
    llm._stack.callback(freed.append, 1)
    kept = use(llm)
    model, dead = weakref.ref(llm._model), weakref.ref(llm)
    seen = []
    if first == "model":
        del llm
        seen.append(bool(freed))
        del kept
    else:
        del kept
        seen.append(bool(freed))
        del llm
    seen.append(bool(freed) and dead() is None and model() is None)
    return seen


@pytest.mark.parametrize("first", ["model", "stream"])
@pytest.mark.parametrize("kept", KEPT)
def test_a_model_is_freed_as_soon_as_a_plain_one(kept: str, first: str) -> None:
    with no_collection():
        ours, theirs = (
            is_freed(made, KEPT[kept], first=first)
            for made in (lambda: llama(store(), reproducible=True), plain)
        )
    assert theirs[-1]
    assert ours == theirs


def test_an_abandoned_stream_is_saved_at_the_next_request() -> None:
    llm = model()
    with no_collection():
        started(llm.create_completion(PROMPTS[0], stream=True, **LONG))
        n_saved = llm.prefix_cache.stats().saved_tokens
        answer(llm, PROMPTS[1])
    assert llm.prefix_cache.stats().saved_tokens > n_saved + len(PROMPTS[0]) - N_BATCH
    llm.close()


@pytest.mark.parametrize("lock", ["cache", "gate", "step of another thread"])
def test_a_garbage_collection_never_waits_for_a_lock(lock: str) -> None:
    """Collecting a user's generator that delegates to a stream closes the stream."""
    llm = model()
    stream = llm.create_completion(PROMPTS[0], stream=True, **LONG)

    def delegating(box: list[Any]) -> Iterator[Any]:
        yield from stream
        box.clear()

    box: list[Any] = []  # a cycle: only a collection ends it
    box.append(delegating(box))
    next(box[0])
    del box
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with llm._gate.turn():
            inside.set()
            leave.wait(WAIT_S)

    holder = Worker(hold) if lock.startswith("step") else None
    if holder is not None:
        assert inside.wait(WAIT_S)
    locks = {"cache": llm.prefix_cache._store.lock, "gate": llm._gate._mutex}
    collecting = Worker(lambda: _collected_under(locks.get(lock, threading.Lock())))
    collecting.join(10)
    is_stuck = collecting.is_alive()
    leave.set()
    assert not is_stuck
    assert next(stream, None) is None  # it was closed
    answer(llm, PROMPTS[1])
    llm.close()


def _collected_under(lock: threading.Lock) -> None:
    with lock:
        gc.collect()
