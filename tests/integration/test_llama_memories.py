"""Every memory type of llama.cpp: a restored state is that of an uncached run.

Logits are compared at all positions that are decoded after a restore. In reproducible mode they
must be equal bit for bit. So must those of recurrent memories and hybrids in the default mode, to
a run that decodes everything in the batches in which the cached run, or the one that saved the
state, decoded it; the others may differ in the last bits there.

`TOKCACHE_MEMORIES=1` runs every combination of memory, flash attention, K/V type and batch size;
by default each memory runs in one of them, the commonest in two.
"""

from __future__ import annotations

import logging
import os
import random
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import tokcache.llama.memory_type
from tests.integration.models import (
    BLOCK,
    GREEDY,
    keep_logits,
    llama,
    llama_cpp,
    random_prompts,
    store,
    text,
)
from tokcache import samples
from tokcache.llama.keeper import Keeper, Restored
from tokcache.llama.sequence import Sequence

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

F16, Q8_0 = 1, 8
N_CTX = 1024
# Of the default mode, where held and stored positions were decoded in different batches, or a
# window's cells come to lie elsewhere. A wrong state differs by 0.2 to 9.
TOLERANCE = 0.05

# name: architecture, whether its window forgets nothing (swa_full)
MEMORIES = {
    "attention": ("llama", False),
    "several positions": ("qwen2vl", False),
    "window": ("gemma3", False),
    "window, full": ("gemma3", True),
    "mamba": ("mamba", False),
    "mamba2": ("mamba2", False),
    "lfm2": ("lfm2", False),
    "granitehybrid": ("granitehybrid", False),
    "falcon-h1": ("falcon-h1", False),
    "hybrid with a window": ("lfm2-windowed", False),
}
RECURRENT = {"mamba", "mamba2", "lfm2", "granitehybrid", "falcon-h1", "hybrid with a window"}
WINDOWED = {"window", "window, full", "hybrid with a window"}
# Refusals that a small memory, a full queue and evictions may cause.
ALLOWED = {"tail_without_blocks", "save_failed", "entries_in_use", "disk: queue_full"}
IS_ALL = os.environ.get("TOKCACHE_MEMORIES") == "1"
# flash attention, type of K and V, tokens a micro-batch
SETTINGS = [(flash, kind, n) for flash in (True, False) for kind in (F16, Q8_0) for n in (64, 512)]
FEW = {"attention", "window", "mamba", "lfm2"}
COMBINATIONS = [
    pytest.param(memory, *setting, id=f"{memory}-{'-'.join(map(str, setting))}")
    for memory in MEMORIES
    for setting in SETTINGS
    if IS_ALL or setting == (True, F16, 64) or (memory in FEW and setting == (False, Q8_0, 512))
]
COMBINATIONS_WITH_FLASH = [each for each in COMBINATIONS if each.values[1]]

every_memory = pytest.mark.parametrize("memory", MEMORIES)
every_combination = pytest.mark.parametrize(("memory", "flash", "kind", "n_ubatch"), COMBINATIONS)


def model(memory: str, cache: Any = None, **settings: Any) -> Any:
    """Return a Llama of this memory that keeps the logits of all that it decodes."""
    architecture, swa_full = MEMORIES[memory]
    path = samples.tiny_model(architecture=architecture)
    llm = llama(cache, **{"model": path, "swa_full": swa_full, "n_ctx": N_CTX, **settings})
    keep_logits(llm)
    return llm


def combined(flash: bool, kind: int, n_ubatch: int) -> dict[str, Any]:
    """Return the settings of a context; V can't be quantized without flash attention."""
    return {
        "flash_attn": flash,
        "type_k": kind,
        "type_v": kind if flash else F16,
        "n_ubatch": n_ubatch,
    }


def answer(llm: Any, prompt: list[int], n: int = 4) -> list[int]:
    steps = llm.generate(prompt, temp=0.0)
    tokens = [token for _, token in zip(range(n), steps, strict=False)]
    steps.close()
    return tokens


def fresh(rng: random.Random, n: int) -> list[int]:
    return rng.choices(range(3, 2000), k=n)


def conversations(ask: Callable[[list[int], int], list[int]], seed: int = 0) -> None:
    """Ask prompts that alternate, grow by answers, diverge in a block, and come again."""
    rng = random.Random(seed)
    a, b = fresh(rng, 5 * BLOCK + 7), fresh(rng, 3 * BLOCK)
    for _ in range(2):
        a += ask(a, 6) + fresh(rng, 11)
        b += ask(b, BLOCK + 3) + fresh(rng, 2 * BLOCK - 5)
    ask(a, 3)
    ask(a, 3)  # the context holds it
    ask(b, 3)
    ask(a, 3)  # the context does not hold it
    ask(a[: 2 * BLOCK + 9] + fresh(rng, 20), 5)  # another way, from the middle of a block
    ask(a[: 3 * BLOCK] + fresh(rng, 1), 2)
    ask(b[: 4 * BLOCK], 2)  # ends with a block
    ask(b[: 4 * BLOCK - 1], 2)
    for n in (1, 2, 3):
        ask(fresh(rng, n), 2)
    far = a + fresh(rng, (18 if IS_ALL else 4) * BLOCK)  # windows have forgotten the first cells
    ask(far, 2)
    ask(b + fresh(rng, 5), 2)
    ask(far + fresh(rng, 5), 2 * BLOCK)
    ask(a, 2)
    ask(far + fresh(rng, 50), 2)


def differences(cached: Any, expected: Any, first: int, stop: int | None = None) -> float:
    """Return the largest difference of the logits from position `first` on."""
    stop = cached.n_tokens if stop is None else stop
    ours, theirs = (llm.scores[first:stop] for llm in (cached, expected))
    if np.array_equal(ours.view(np.int32), theirs.view(np.int32)):
        return 0.0
    return float(np.abs(ours - theirs).max()) or float("inf")


# Reproducible mode


class Pair:
    """A cached model, and an uncached one that begins with an empty context; both reproducible."""

    def __init__(self, memory: str, cache: Any = None, **settings: Any) -> None:
        self.cached = model(memory, cache or store(), reproducible=True, **settings)
        self.uncached = model(memory, reproducible=True, **settings)
        self.n_compared = 0

    def ask(self, prompt: list[int], n: int = 4) -> list[int]:
        self.uncached.reset()
        answers = [answer(llm, prompt, n) for llm in (self.cached, self.uncached)]
        reuse = self.cached.last_reuse
        first = reuse.n_prompt - reuse.n_decoded
        assert answers[0] == answers[1]
        assert differences(self.cached, self.uncached, first) == 0.0
        self.n_compared += self.cached.n_tokens - first
        return answers[0]

    def restored(self) -> int:
        return int(self.cached.last_reuse.n_restored)

    def close(self) -> None:
        self.cached.close()
        self.uncached.close()


@every_combination
def test_reproducible_logits_are_equal_bit_for_bit(
    memory: str, flash: bool, kind: int, n_ubatch: int
) -> None:
    pair = Pair(memory, **combined(flash, kind, n_ubatch))
    conversations(pair.ask)
    stats = pair.cached.prefix_cache.stats()
    assert stats.refusals == {}
    assert stats.restored_tokens > 40 * BLOCK
    assert pair.n_compared > 1000
    pair.cached.prefix_cache._check()
    pair.close()


@every_memory
def test_completions_and_streams_give_the_uncached_text(memory: str) -> None:
    pair = Pair(memory)
    prompts = ["The import system of Python: " * 12, "Hello " * 40, "The import system " * 20]
    n_restored = 0
    for prompt in (*prompts, *prompts):
        pair.uncached.reset()
        texts = [
            text(llm.create_completion(prompt, **GREEDY)) for llm in (pair.cached, pair.uncached)
        ]
        n_restored += pair.restored()
        parts = pair.cached.create_completion(prompt, stream=True, **GREEDY)
        assert texts == ["".join(text(part) for part in parts)] * 2
    assert n_restored >= 3 * 2 * BLOCK
    pair.close()


# The default mode


class Recorded:
    """A cached model in the default mode, and one that repeats the batches of its state."""

    def __init__(self, memory: str, cache: Any = None, **settings: Any) -> None:
        self.memory = memory
        self.cached = model(memory, cache or store(), **settings)
        self.expected = model(memory, **settings)
        self.batches: list[tuple[list[int], int]] = []  # tokens of a batch, and how many stayed
        self.runs: list[tuple[list[int], list[tuple[list[int], int]]]] = []
        self.n_compared, self.worst = 0, 0.0
        decode_batch = self.cached._eval_batch

        def recorded(batch: Any) -> None:
            self.batches.append((list(batch), len(batch)))
            decode_batch(batch)
            self.runs.append(
                (self.cached.input_ids[: self.cached.n_tokens].tolist(), self.batches[:])
            )

        self.cached._eval_batch = recorded

    def ask(self, prompt: list[int], n: int = 4) -> list[int]:
        hold = self.cached._hold

        def held(tokens: Any) -> Any:
            ids, rest = hold(tokens)
            n_held = len(prompt) - len(rest)
            if self.cached.last_reuse.n_restored:
                self.batches = self.batches_of(prompt[:n_held])
            else:
                self.batches = cut(self.batches, n_held)
            return ids, rest

        self.cached._hold = held
        tokens = answer(self.cached, prompt, n)
        self.cached._hold = hold
        self.compare(len(prompt) - self.cached.last_reuse.n_decoded)
        return tokens

    def batches_of(self, prefix: list[int]) -> list[tuple[list[int], int]]:
        """Return the batches of the run that first held `prefix`, and could be saved there."""
        n = len(prefix)
        for ids, batches in self.runs:
            if ids[:n] == prefix and (len(ids) == n or self.memory not in RECURRENT):
                return cut(batches, n)
        raise AssertionError(f"a state of {n} tokens came from nowhere")

    def compare(self, first: int) -> None:
        """Compare all logits with those of a run that decodes the same batches."""
        llm, done = self.expected, 0
        llm.reset()
        for tokens, n_kept in self.batches:
            llama_cpp.Llama.eval(llm, tokens)
            done += n_kept
            if n_kept < len(tokens):
                assert llama_cpp.llama_memory_seq_rm(llm._sequence._memory, 0, done, -1)
                llm._record.trimmed(done)
        assert llm.n_tokens == self.cached.n_tokens
        self.worst = max(self.worst, differences(self.cached, llm, first))
        self.n_compared += self.cached.n_tokens - first

    def close(self) -> None:
        del self.cached._eval_batch
        self.cached.close()
        self.expected.close()


def cut(batches: list[tuple[list[int], int]], n_tokens: int) -> list[tuple[list[int], int]]:
    """Return the batches that wrote the first positions."""
    kept: list[tuple[list[int], int]] = []
    left = n_tokens
    for tokens, n_kept in batches:
        if left <= 0:
            break
        kept.append((tokens, min(n_kept, left)))
        left -= n_kept
    return kept


@pytest.mark.parametrize(
    ("memory", "flash", "kind", "n_ubatch"), COMBINATIONS if IS_ALL else COMBINATIONS_WITH_FLASH
)
def test_default_logits_are_those_of_the_same_batches(
    memory: str, flash: bool, kind: int, n_ubatch: int
) -> None:
    recorded = Recorded(memory, **combined(flash, kind, n_ubatch))
    conversations(recorded.ask)
    stats = recorded.cached.prefix_cache.stats()
    assert stats.refusals == {}
    assert recorded.n_compared > 700
    print(f"{memory}: {recorded.worst:.4f} at {recorded.n_compared} positions")  # noqa: T201
    assert recorded.worst <= (0.0 if memory in RECURRENT - WINDOWED else TOLERANCE)
    recorded.cached.prefix_cache._check()
    recorded.close()


@pytest.mark.parametrize("memory", sorted(WINDOWED))
@pytest.mark.parametrize("n_ubatch", [512, 64])
def test_blocks_larger_than_a_window_are_kept_in_parts(memory: str, n_ubatch: int) -> None:
    cache = store(block_tokens=4 * BLOCK)
    recorded = Recorded(memory, cache, flash_attn=True, n_ubatch=n_ubatch)
    conversations(recorded.ask)
    stats = cache.stats()
    assert stats.refusals == {}
    assert stats.restored_tokens > 40 * BLOCK
    assert recorded.worst <= TOLERANCE
    lengths = {len(node.tokens) // 4 for node in cache._store.memory.index.nodes()}
    assert max(lengths) <= (4 * BLOCK if memory in RECURRENT else BLOCK)
    recorded.close()


# How much is decoded


@every_memory
def test_only_new_tokens_are_decoded(memory: str) -> None:
    llm = model(memory, store())
    rng = random.Random(1)
    a, b = fresh(rng, 2 * BLOCK + 6), fresh(rng, 3 * BLOCK + 17)
    n_decoded, n_restored = [], 0

    def ask(prompt: list[int]) -> list[int]:
        nonlocal n_restored
        tokens = answer(llm, prompt, 6)
        n_decoded.append(llm.last_reuse.n_decoded)
        n_restored += llm.last_reuse.n_restored
        return tokens

    first = ask(a)
    ask(b)
    ask(a)  # one token, for its logits
    ask(b)
    # Its last token was sampled, and never decoded.
    grown = a + first + fresh(rng, 9)
    second = ask(grown)
    ask(b)
    ask(grown + second + fresh(rng, 2 * BLOCK))
    assert n_decoded == [len(a), len(b), 1, 1, 1 + 9, 1, 1 + 2 * BLOCK]
    ask(b[: 2 * BLOCK + 9] + [7] * 5)  # it leaves b in the middle of a block
    assert n_decoded[-1] == 5 + 9 * (memory in RECURRENT)
    short = fresh(rng, 9)
    for prompt in (short, b, short):
        ask(prompt)
    assert n_decoded[-3:] == [9, 1, 1]
    stats = llm.prefix_cache.stats()
    assert stats.refusals == {}
    assert (stats.lookups, stats.hits, stats.restored_tokens) == (11, 8, n_restored)


# Going back in a hybrid's context

HYBRIDS = sorted(RECURRENT - {"mamba", "mamba2", "hybrid with a window"})


class Loaded:
    """Notes which blocks are loaded, and from which the context goes back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int, int]] = []
        for name in ("write_block", "go_back"):
            monkeypatch.setattr(Sequence, name, self._noted(name, getattr(Sequence, name)))

    def _noted(self, name: str, method: Any) -> Any:
        def noted(sequence: Sequence, start: int, stop: int, buffer: memoryview) -> None:
            self.calls.append((name, start, stop))
            method(sequence, start, stop, buffer)

        return noted


@every_memory
def test_the_part_that_is_not_full_attention_goes_back_with_a_cut(memory: str) -> None:
    """The finding on LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY that `go_back` relies on."""
    one, expected = model(memory), model(memory)
    rng = random.Random(16)
    prompt, more, tail = fresh(rng, 2 * BLOCK), fresh(rng, BLOCK), fresh(rng, 20)
    for llm in (one, expected):
        llm.eval(prompt)
    expected.eval(tail)
    part = one._sequence._read_part(0)
    n_bytes = one._sequence.block_bytes(0, 2 * BLOCK)
    is_whole = memory in {
        "attention",
        "several positions",
        "mamba",
        "mamba2",
    }  # of one kind of memory only
    assert (part.nbytes == n_bytes) == is_whole
    one.eval(more)
    one._sequence._write_part(part)
    assert llama_cpp.llama_memory_seq_rm(one._sequence._memory, 0, 2 * BLOCK, -1)
    one._states.record.trimmed(2 * BLOCK)
    one.eval(tail)
    assert differences(one, expected, 2 * BLOCK) <= TOLERANCE


@pytest.mark.parametrize("memory", HYBRIDS)
@pytest.mark.parametrize("reproducible", [True, False])
def test_going_back_loads_one_block(
    memory: str, reproducible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Loaded(monkeypatch)
    pair = Pair(memory) if reproducible else None
    cached = model(memory, store()) if pair is None else pair.cached
    ask = partial(answer, cached) if pair is None else pair.ask
    rng = random.Random(13)
    prompt = fresh(rng, 6 * BLOCK + 5)
    ask(prompt)
    branch = prompt[: 5 * BLOCK + 3] + fresh(rng, 2 * BLOCK)
    ask(branch)
    assert loaded.calls == [("go_back", 4 * BLOCK, 5 * BLOCK)]
    assert cached.last_reuse.n_in_context == 4 * BLOCK
    assert cached.last_reuse.n_restored == BLOCK
    other = fresh(rng, 3 * BLOCK)
    ask(other)
    loaded.calls.clear()
    ask(branch)  # the context has nothing of it
    assert {name for name, *_ in loaded.calls} == {"write_block"}
    # The context has its first block; the others follow from the cache.
    ask(branch[:BLOCK] + other)
    loaded.calls.clear()
    ask([*branch, 5])
    assert loaded.calls[:2] == [("go_back", 0, BLOCK), ("write_block", BLOCK, 2 * BLOCK)]
    if pair is None:
        assert loaded.calls[-1] == ("write_block", 7 * BLOCK, len(branch) - 1)  # a tail
        ask([*branch, 5, 6, 7])
        loaded.calls.clear()
        ask([*branch, 6])
        assert loaded.calls == [("go_back", 7 * BLOCK, len(branch))]
        assert cached.last_reuse.n_decoded == 1
    assert not cached.prefix_cache.stats().refusals


@pytest.mark.parametrize("memory", HYBRIDS)
def test_a_failure_to_go_back_loads_all_blocks(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(memory)
    prompt = fresh(random.Random(14), 6 * BLOCK + 5)
    pair.ask(prompt)
    loaded = Loaded(monkeypatch)
    monkeypatch.setattr(Sequence, "is_at", lambda own, n: own.end() == n and len(loaded.calls) > 1)
    pair.ask([*prompt[: 3 * BLOCK + 3], 7, 8])
    assert loaded.calls[0] == ("go_back", 2 * BLOCK, 3 * BLOCK)
    assert loaded.calls[1:] == [("write_block", at * BLOCK, (at + 1) * BLOCK) for at in range(3)]
    assert pair.restored() == 3 * BLOCK
    assert pair.cached.prefix_cache.stats().refusals == {"restore_failed": 1}


@pytest.mark.parametrize("memory", HYBRIDS)
def test_control_a_recurrent_state_that_does_not_go_back_is_found(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(memory)
    prompt = fresh(random.Random(15), 6 * BLOCK + 5)
    pair.ask(prompt)
    part = Sequence._read_part
    kept: list[memoryview] = []

    def of_the_end(sequence: Sequence, seq_id: int) -> memoryview:
        kept.append(part(sequence, seq_id))
        wrong = np.frombuffer(kept[-1], np.uint8).copy()
        wrong[-64:] = 0  # a part of the state of the last layer
        return wrong.data

    monkeypatch.setattr(Sequence, "_read_part", of_the_end)
    with pytest.raises(AssertionError):
        pair.ask([*prompt[: 3 * BLOCK + 3], 7, 8])
    assert len(kept) == 1
    assert pair.restored() == BLOCK


@every_memory
def test_a_restart_is_served_from_the_disk(memory: str, tmp_path: Path) -> None:
    rng = random.Random(2)
    prompts = [fresh(rng, n) for n in (3 * BLOCK + 5, 2 * BLOCK, BLOCK + 1)]
    n_decoded: list[list[int]] = []
    for _ in range(2):
        cache = store(disk=tmp_path)
        llm = model(memory, cache)
        for prompt in prompts:
            answer(llm, prompt)
        llm.reset()
        n_decoded.append([])
        for prompt in prompts:
            answer(llm, prompt)
            n_decoded[-1].append(llm.last_reuse.n_decoded)
        assert cache.stats().refusals == {}
        llm.close()
        cache.close()
    assert n_decoded == [[1, 1, 1]] * 2
    assert llm.last_reuse.n_restored == BLOCK


@every_memory
def test_logits_after_a_restart_are_equal(memory: str, tmp_path: Path) -> None:
    prompt = fresh(random.Random(3), 5 * BLOCK + 9)
    for n_restored in (0, 5 * BLOCK):
        cache = store(disk=tmp_path)
        pair = Pair(memory, cache, flash_attn=True)
        pair.ask(prompt)
        assert pair.restored() == n_restored
        pair.close()
        cache.close()


# Failures


@every_memory
@pytest.mark.parametrize("reproducible", [True, False])
def test_cancelled_and_failed_generations_leave_the_context_right(
    memory: str, reproducible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = model(memory, store(), reproducible=reproducible)
    uncached = model(memory, reproducible=True)
    rng = random.Random(4)
    prompts = [fresh(rng, n) for n in (4 * BLOCK + 3, 2 * BLOCK + 1, 5 * BLOCK)]
    decode = cached._ctx.decode
    for at in range(1, 5) if IS_ALL else (2, 3):
        calls: list[Any] = []

        def failing(batch: Any, calls: list[Any] = calls, at: int = at) -> None:
            calls.append(batch)
            if len(calls) == at and at % 2:
                raise RuntimeError("llama_decode returned -3")
            decode(batch)
            if len(calls) == at:
                raise RuntimeError("llama_decode returned -3")

        monkeypatch.setattr(cached._ctx, "decode", failing)
        with pytest.raises(RuntimeError, match="returned -3"):
            answer(cached, prompts[at % 3] + fresh(rng, 5 * BLOCK), 9)
        monkeypatch.setattr(cached._ctx, "decode", decode)
        assert cached._sequence.end() == cached.n_tokens
        cancelled = cached.generate(prompts[0] + fresh(rng, 40), temp=0.0)
        next(cancelled)
        cancelled.close()
        for prompt in prompts:
            uncached.reset()
            answers = [answer(llm, prompt) for llm in (cached, uncached)]
            assert answers[0] == answers[1] or not reproducible
            first = len(prompt) - cached.last_reuse.n_decoded
            worst = differences(cached, uncached, first, len(prompt))
            assert worst <= (0.0 if reproducible else TOLERANCE)
    cached.prefix_cache._check()


@pytest.mark.parametrize(
    ("memory", "has_cache", "is_exact"),
    [(memory, True, is_exact) for memory in MEMORIES for is_exact in (True, False)]
    + [(memory, False, True) for memory in sorted(WINDOWED)],
)
def test_interleaved_generations_are_those_of_each_alone(
    memory: str, has_cache: bool, is_exact: bool
) -> None:
    settings: dict[str, Any] = {"flash_attn": is_exact, "n_ubatch": 64, "reproducible": is_exact}
    cached = model(memory, store() if has_cache else None, **settings)
    alone = model(memory, **settings)
    rng = random.Random(5)
    prompts = [fresh(rng, n) for n in (9 * BLOCK + 3, 10 * BLOCK)]
    streams = [cached.generate(prompt, temp=0.0) for prompt in prompts]
    tokens: list[list[int]] = [[], []]
    for _ in range(4):
        for stream, taken in zip(streams, tokens, strict=True):
            taken += [next(stream) for _ in range(3)]
    for prompt, stream, taken in zip(prompts, streams, tokens, strict=True):
        taken.append(next(stream))
        alone.reset()
        alone.eval(prompt)
        for token in taken[:-1]:
            assert token == alone.sample(temp=0.0) or not is_exact
            alone.eval([token])
        assert differences(cached, alone, len(prompt) - 1) <= (0.0 if is_exact else TOLERANCE)
        stream.close()


@pytest.mark.parametrize("memory", sorted(WINDOWED))
@pytest.mark.parametrize("change", ["prefix_cache", "reproducible"])
def test_a_generation_that_is_suspended_after_a_change_of_settings_is_resumed(
    memory: str, change: str
) -> None:
    settings: dict[str, Any] = {"flash_attn": True, "n_ubatch": 64, "reproducible": True}
    cached, alone = model(memory, store(), **settings), model(memory, **settings)
    rng = random.Random(14)
    prompt, other = fresh(rng, 12 * BLOCK + 3), fresh(rng, 10 * BLOCK)
    stream = cached.generate(prompt, temp=0.0)
    tokens = [next(stream) for _ in range(3)]
    if change == "prefix_cache":
        cached.prefix_cache = store()
    else:
        cached.reproducible = False
        cached.reproducible = True
    answer(cached, other, 1)
    tokens += [next(stream) for _ in range(9)]
    stream.close()
    alone.eval(prompt)
    for token in tokens[:-1]:
        alone.eval([token])
    # It no longer knows its batches, so it goes back to a snapshot, which moves a window's cells.
    assert differences(cached, alone, len(prompt)) <= TOLERANCE
    assert cached._sequence.end() == cached.n_tokens


@every_memory
@pytest.mark.parametrize("reproducible", [True, False])
def test_restores_are_right_after_any_disturbance(
    memory: str, reproducible: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that branch anywhere, among failures, pauses, evictions and restarts."""
    n_prompts = 60 if IS_ALL else 8
    for seed in range(6 if IS_ALL else 1):
        rng = random.Random(seed)
        settings: dict[str, Any] = {"flash_attn": seed % 2 == 0, "n_ubatch": rng.choice([64, 512])}
        uncached = model(memory, reproducible=reproducible, **settings)

        def started(seed: int = seed, settings: dict[str, Any] = settings) -> Any:
            folder = tmp_path / str(seed)
            cache = store(ram_bytes=3_000_000, max_entries=12, disk=folder)
            return model(memory, cache, reproducible=reproducible, **settings)

        cached = started()
        for prompt in random_prompts(n_prompts, cached.n_vocab(), seed):
            event = rng.choice(("none", "none", "restart", "fail", "cancel", "pause", "by hand"))
            if event == "restart":
                cached.prefix_cache.flush()
                cached.close()
                cached.prefix_cache.close()
                cached = started()
            paused = disturb(cached, event, prompt, rng, monkeypatch)
            uncached.reset()
            answers = [answer(llm, prompt, 5) for llm in (cached, uncached)]
            first = len(prompt) - cached.last_reuse.n_decoded
            # The answers may differ, where two tokens are almost equally likely.
            stop = None if reproducible else len(prompt)
            worst = differences(cached, uncached, first, stop)
            assert worst <= (0.0 if reproducible else 3 * TOLERANCE), (seed, event)
            assert answers[0] == answers[1] or not reproducible
            for each in paused:
                next(each)
                each.close()
            cached.prefix_cache._check()
        assert set(cached.prefix_cache.stats().refusals) <= ALLOWED
        cached.close()


def disturb(
    llm: Any, event: str, prompt: list[int], rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> list[Any]:
    """Let something happen; return the generations that it leaves open."""
    decode = llm._ctx.decode
    if event == "fail":
        left = rng.randrange(1, 6)

        def failing(batch: Any) -> None:
            nonlocal left
            left -= 1
            if left >= 0 or rng.random() < 0.5:
                decode(batch)
            if left <= 0:
                raise RuntimeError("llama_decode returned -3")

        monkeypatch.setattr(llm._ctx, "decode", failing)
        with pytest.raises(RuntimeError, match="returned -3"):
            answer(llm, prompt[: rng.randint(1, len(prompt))] + fresh(rng, 9), 9)
        monkeypatch.setattr(llm._ctx, "decode", decode)
    if event in ("cancel", "pause"):
        steps = llm.generate(prompt[: rng.randint(1, len(prompt))] + fresh(rng, 9), temp=0.0)
        for _ in range(rng.randrange(1, 2 * BLOCK)):
            next(steps)
        if event == "pause":
            return [steps]
        steps.close()
    if event == "by hand":
        llm.reset()
        llm.eval(prompt[: len(prompt) // 2 + 1])
        llm.n_tokens = llm.n_tokens // 2
        if llm._states.memory.is_plain:
            llm.eval(fresh(rng, 20))
    return []


@every_memory
def test_positions_before_an_assigned_n_tokens_are_saved_where_they_are_intact(memory: str) -> None:
    llm = model(memory, store())
    rng = random.Random(6)
    ids, other = fresh(rng, 4 * BLOCK), fresh(rng, 2 * BLOCK)
    llm.eval(ids)
    llm.n_tokens = BLOCK + 3  # as llama_cpp does with drafts; it goes on with any state
    if memory in RECURRENT:
        assert llm._record.n_known == 0
        prompt = ids[: BLOCK + 3]
    else:
        llm.eval(other)
        prompt = ids[: BLOCK + 3] + other
        llm.end_generation()
        llm.reset()
    expected = model(memory)
    for one in (llm, expected):
        next(one.generate([*prompt, 5], temp=0.0))
    first = len(prompt) + 1 - llm.last_reuse.n_decoded
    assert differences(llm, expected, first) <= TOLERANCE
    assert llm.last_reuse.n_restored == (BLOCK if memory in RECURRENT else len(prompt))


# Negative controls: the same comparison finds a wrong restore


def test_control_covers_every_memory() -> None:
    assert {memory for memory in MEMORIES if memory not in RECURRENT} == {
        "attention",
        "several positions",
        "window",
        "window, full",
    }


@every_memory
def test_control_a_block_of_another_prompt_is_found(memory: str) -> None:
    pair = Pair(memory)
    rng = random.Random(7)
    prompts = [fresh(rng, 3 * BLOCK + 2) for _ in range(2)]
    for prompt in prompts:
        pair.ask(prompt)
    swap_last_blocks(pair.cached.prefix_cache, 2 * BLOCK)
    pair.cached.reset()
    with pytest.raises(AssertionError):
        pair.ask(prompts[0])
    assert pair.restored() == 3 * BLOCK


def swap_last_blocks(cache: Any, start: int) -> None:
    payloads = [
        np.frombuffer(payload, np.uint8)
        for node, payload in cache._store.memory.tier._held.items()
        if node.start == start
    ]
    assert len(payloads) == 2
    payloads[0][:], payloads[1][:] = payloads[1].copy(), payloads[0].copy()


@every_memory
def test_control_a_tail_of_another_prompt_is_found(memory: str) -> None:
    recorded = Recorded(memory)
    rng = random.Random(8)
    prompts = [fresh(rng, BLOCK + 2) for _ in range(2)]
    for prompt in prompts:
        recorded.ask(prompt, 1)
    if memory in RECURRENT:
        swap_tails(recorded.cached.prefix_cache)
    else:
        swap_last_blocks(recorded.cached.prefix_cache, BLOCK)
    recorded.cached.reset()
    recorded.ask(prompts[0], 1)
    assert recorded.cached.last_reuse.n_restored == BLOCK + 1
    assert recorded.worst > TOLERANCE


def swap_tails(cache: Any) -> None:
    payloads = [
        np.frombuffer(payload, np.uint8)
        for held, payload in cache._store.memory.tier._held.items()
        if getattr(held, "n_tokens", 0) == BLOCK + 1
    ]
    assert len(payloads) == 2
    payloads[0][:], payloads[1][:] = payloads[1].copy(), payloads[0].copy()


@pytest.mark.parametrize("memory", sorted(set(MEMORIES) - {"mamba", "mamba2"}))
def test_control_a_hole_that_no_position_shows_is_found(memory: str) -> None:
    pair = Pair(memory)
    prompt = fresh(random.Random(9), 4 * BLOCK + 9)
    pair.ask(prompt)
    pair.cached.reset()
    restore = pair.cached._states.keeper.restore

    def with_a_hole(*args: Any, **options: Any) -> Any:
        restored = restore(*args, **options)
        memory = pair.cached._sequence._memory
        # Of the last block: a model that has but windows would not miss an earlier one.
        llama_cpp.llama_memory_seq_rm(memory, 0, 3 * BLOCK, 4 * BLOCK - 8)
        assert pair.cached._sequence.end() == 4 * BLOCK
        return restored

    pair.cached._states.keeper.restore = with_a_hole
    with pytest.raises(AssertionError):
        pair.ask(prompt)
    assert pair.restored() == 4 * BLOCK


def test_control_a_wrong_cut_that_llama_cpp_accepts_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = Recorded("window", n_ubatch=64)
    prompt = fresh(random.Random(10), 20 * BLOCK)
    branch = prompt[: 6 * BLOCK] + [7] * 20
    recorded.ask(prompt)
    recorded.ask(branch)
    assert recorded.cached.last_reuse.n_in_context == 0  # it was restored, not cut
    assert recorded.worst <= TOLERANCE
    recorded.ask(prompt)
    monkeypatch.setattr(Sequence, "_has_before", lambda *_, **__: True)
    recorded.ask(prompt[: 6 * BLOCK] + [9] * 20)
    assert recorded.cached.last_reuse.n_in_context == 6 * BLOCK
    assert recorded.worst > TOLERANCE


@pytest.mark.parametrize("memory", sorted(RECURRENT - {"mamba", "mamba2"}))
def test_control_blocks_that_are_saved_too_late_are_found(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(memory)
    prompt = fresh(random.Random(11), 3 * BLOCK + 9)
    cached = pair.cached
    monkeypatch.setattr(cached._states, "save_as_reached", lambda: None)
    pair.ask(prompt)
    monkeypatch.setattr(Sequence, "_require_span", lambda *_: None)
    cached._states.save(2 * BLOCK)
    cached.reset()
    pair.ask(prompt)  # the state's position is not the blocks': it is found out
    assert cached.prefix_cache.stats().refusals == {"restore_incomplete": 1}
    monkeypatch.setattr(Keeper, "_checked", lambda _, __, start, stop, ___: Restored(start, stop))
    cached.reset()
    with pytest.raises((AssertionError, RuntimeError)):
        pair.ask(prompt)
    assert cached.prefix_cache.stats().saved_blocks == 2


# Refusals


@pytest.mark.parametrize(
    ("block_tokens", "reason"), [(48, "window_smaller_than_block"), (24, "window_not_aligned")]
)
def test_a_window_that_would_be_restored_to_other_cells_is_refused(
    block_tokens: int, reason: str
) -> None:
    architecture, _ = MEMORIES["window"]
    path = samples.tiny_model(architecture=architecture)
    for is_exact in (True, False):
        cache = store(block_tokens=block_tokens)
        settings: dict[str, Any] = {"swa_full": False, "n_ubatch": 64, "reproducible": is_exact}
        llm = tokcache.llama.Llama(
            path, prefix_cache=cache, n_ctx=N_CTX, n_threads=1, verbose=False, **settings
        )
        for _ in range(2):
            answer(llm, list(range(100, 300)))
            llm.reset()
        stats = cache.stats()
        assert stats.refusals == ({reason: 2} if is_exact else {})
        assert (stats.saved_blocks == 0) == is_exact
        assert llm.last_reuse.n_decoded == (200 if is_exact else 1)


def test_an_unknown_architecture_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tokcache")
    known = tokcache.llama.memory_type.ARCHITECTURES
    monkeypatch.setattr(tokcache.llama.memory_type, "ARCHITECTURES", known - {"lfm2"})
    llm = model("lfm2", store())
    for _ in range(2):
        answer(llm, list(range(100, 180)))
    stats = llm.prefix_cache.stats()
    assert stats.refusals == {"architecture: lfm2": 2}
    assert (stats.lookups, stats.saved_blocks) == (0, 0)
    assert [record.message for record in caplog.records if "architecture: lfm2" in record.message]


def test_a_memory_that_behaves_unlike_its_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    of = tokcache.llama.memory_type.MemoryType.of.__func__  # type: ignore[attr-defined]

    def mistaken(_: Any, ctx: Any, /, **settings: Any) -> Any:
        found = of(tokcache.llama.memory_type.MemoryType, ctx, **settings)
        return tokcache.llama.memory_type.MemoryType("attention", refusal=found.refusal)

    monkeypatch.setattr(tokcache.llama.memory_type.MemoryType, "of", classmethod(mistaken))
    for memory in ("mamba", "lfm2", "window"):
        llm = model(memory, store())
        answer(llm, list(range(100, 180)))
        stats = llm.prefix_cache.stats()
        assert stats.refusals == {"memory_of_unknown_behaviour": 1}
        assert stats.saved_blocks == 0


def test_a_tail_whose_blocks_are_gone_is_not_used() -> None:
    pair = model("lfm2", store())
    expected = model("lfm2", store())
    prompt = fresh(random.Random(12), 2 * BLOCK + 9)
    answer(pair, prompt)
    memory = pair.prefix_cache._store.memory
    for node in list(memory.index.nodes()):
        memory.remove(node)
    pair.reset()
    assert answer(pair, prompt) == answer(expected, prompt)
    assert pair.last_reuse.n_decoded == len(prompt)
    assert pair.prefix_cache.stats().refusals == {"tail_without_blocks": 1}


@pytest.mark.parametrize("memory", ["mamba", "lfm2"])
def test_a_damaged_tail_costs_a_decode_and_a_counter(memory: str) -> None:
    llm, expected = model(memory, store()), model(memory, store())
    prompt = fresh(random.Random(13), 2 * BLOCK + 9)
    first = answer(llm, prompt, 1)
    for held, payload in llm.prefix_cache._store.memory.tier._held.items():
        if getattr(held, "n_tokens", 0) == len(prompt) - 1:
            np.frombuffer(payload, np.uint8)[:8] = 255
    llm.reset()
    assert answer(llm, prompt, 1) == first == answer(expected, prompt, 1)
    assert llm.last_reuse.n_restored == 2 * BLOCK
    assert llm.prefix_cache.stats().refusals == {"restore_failed": 1}
