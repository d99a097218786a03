"""Branches of one trunk: decoded once, held in the same cells, exact, and refused where not."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tests.integration.models import BLOCK, store
from tests.integration.test_llama_memories import (
    FEW,
    IS_ALL,
    MEMORIES,
    RECURRENT,
    TOLERANCE,
    every_memory,
    fresh,
)
from tests.integration.test_sequence_states import FINGERPRINT, Loop, loops, run, uncached
from tokcache.errors import InvalidConfig, StateError
from tokcache.llama import SequenceStates

__all__ = ["loops"]  # a fixture

N_BRANCHES = 16
few_memories = pytest.mark.parametrize(
    "memory", sorted(MEMORIES) if IS_ALL else sorted({*FEW, "hybrid with a window"})
)


def sequences_of(loop: Loop, cache: Any = None, **settings: Any) -> SequenceStates:
    cache = cache or store()
    return SequenceStates(loop.ctx, prefix_cache=cache, fingerprint=FINGERPRINT, **settings)


@few_memories
def test_sixteen_branches_of_a_trunk_prefill_it_once(memory: str, loops: list[Loop]) -> None:
    rng = random.Random(1)
    trunk = fresh(rng, 2000)
    tails = [fresh(rng, 10) for _ in range(N_BRANCHES)]
    n_unique = len(trunk) + sum(map(len, tails))
    n_ctx = -(-int(1.1 * n_unique) // 256) * 256  # llama.cpp rounds up to multiples of 256
    settings = {"n_seq_max": N_BRANCHES + 1, "n_ctx": n_ctx, "n_batch": 2048}
    loop, alone = Loop(memory, **settings), Loop(memory, **settings)
    loops += [loop, alone]
    cache = store()
    sequences = sequences_of(loop, cache)
    n_decoded = sum(len(logits) for _, logits in run(loop, sequences, trunk, 0))
    assert sequences.fork(0, range(1, N_BRANCHES)) == len(trunk)
    for seq_id, tail in enumerate(tails):
        logits = loop.decode(tail, seq_id, len(trunk))
        n_decoded += len(logits)
        assert loop.end(seq_id) == len(trunk) + len(tail)
        if seq_id in (0, 1, N_BRANCHES - 1):
            # The same batches, in an empty context.
            expected = uncached(alone, trunk)
            expected = alone.decode(tail, 0, len(trunk))
            worst = np.abs(logits - expected).max()
            # Cells lie elsewhere where branches before it were decoded, which is no other state.
            assert worst == 0 if memory in ("mamba", "mamba2") else worst <= TOLERANCE
    assert n_decoded == n_unique
    assert cache.stats().refusals == {}
    cache._check()


@every_memory
def test_a_branch_is_bit_for_bit_that_of_a_prefill_into_the_same_cells(
    memory: str, loops: list[Loop]
) -> None:
    """Each branch is removed before the next is decoded, so that all lie in the same cells."""
    loop, alone = Loop(memory), Loop(memory)
    loops += [loop, alone]
    sequences = sequences_of(loop)
    rng = random.Random(2)
    trunk = fresh(rng, 4 * BLOCK + 7)
    for _ in run(loop, sequences, trunk, 0):
        pass
    for _ in range(3):
        tail = fresh(rng, 20)
        assert sequences.fork(0, [1]) == len(trunk)
        ours = loop.decode(tail, 1, len(trunk))
        uncached(alone, trunk)
        assert np.array_equal(ours, alone.decode(tail, 0, len(trunk)))
        assert sequences.restore([], 1) == loop.end(1) == 0


@few_memories
def test_a_fork_of_fewer_tokens_is_exact_or_refused_and_changes_nothing(
    memory: str, loops: list[Loop]
) -> None:
    loop, alone = Loop(memory, n_batch=2048), Loop(memory, n_batch=2048)
    loops += [loop, alone]
    cache = store()
    sequences = sequences_of(loop, cache)
    rng = random.Random(3)
    prompt = fresh(rng, 1200)  # far beyond a window of 32 and its cells
    for _ in run(loop, sequences, prompt, 0):
        pass
    loop.decode(prompt[:40], 1, 0)
    reason = {"window": "fork_outside_window"}.get(memory)
    reason = "fork_of_the_past" if memory in RECURRENT else reason
    n_held = sequences.fork(0, [1, 2], 300)
    if reason is None:
        assert n_held == loop.end(1) == loop.end(2) == 300
        tail = fresh(rng, 10)
        ours = loop.decode(tail, 2, 300)
        assert np.abs(ours - uncached(alone, prompt[:300] + tail)[300:]).max() <= TOLERANCE
        assert cache.stats().refusals == {}
    else:
        assert n_held == 0
        assert (loop.end(1), loop.end(2)) == (40, 0)
        assert cache.stats().refusals == {reason: 1}
    assert loop.end(0) == len(prompt)
    assert sequences.fork(0, [2]) == len(prompt) == loop.end(2)


def test_branches_of_the_past_are_really_wrong_without_the_refusal(
    monkeypatch: pytest.MonkeyPatch, loops: list[Loop]
) -> None:
    """The control: what `fork` refuses gives other logits."""
    monkeypatch.setattr(SequenceStates, "_why_not_forked", lambda *_: None)
    for memory in ("window", "lfm2"):
        loop, alone = Loop(memory, n_batch=2048), Loop(memory, n_batch=2048)
        loops += [loop, alone]
        sequences = sequences_of(loop)
        rng = random.Random(4)
        prompt, tail = fresh(rng, 1200), fresh(rng, 10)
        for _ in run(loop, sequences, prompt, 0):
            pass
        try:
            sequences.fork(0, [1], 300)
            ours = loop.decode(tail, 1, 300)
        except (StateError, AssertionError):
            continue  # llama.cpp itself refuses the fork or the decode
        assert np.abs(ours - uncached(alone, prompt[:300] + tail)[300:]).max() > TOLERANCE


@pytest.mark.parametrize("memory", ["attention", "window", "mamba", "lfm2"])
def test_branches_serve_the_scope_of_their_trunk(memory: str, loops: list[Loop]) -> None:
    loop, cache = Loop(memory), store()
    loops.append(loop)
    sequences = sequences_of(loop, cache)
    rng = random.Random(5)
    trunk, tail = fresh(rng, 3 * BLOCK), fresh(rng, BLOCK)
    n_past = sequences.restore(trunk, 0, scope="a")
    for stop in sequences.stops(n_past, len(trunk)):
        loop.decode(trunk[n_past:stop], 0, n_past)
        sequences.save(trunk[:stop], 0)
        n_past = stop
    sequences.reset(1, scope="b")
    loop.decode(trunk, 1, 0)
    sequences.save_later(trunk, 1)
    assert sequences.fork(0, [1]) == len(trunk)
    assert sequences.take_pending() == 0  # its positions were replaced
    loop.decode(tail, 1, len(trunk))
    assert sequences.save(trunk + tail, 1) > 0
    whole = [*trunk, *tail, 5]
    assert sequences.restore(whole, 2, scope="b") == 0
    assert sequences.restore(whole, 2, scope="a") == len(trunk) + len(tail)
    assert cache.stats().refusals == {"pending_save_overtaken": 1}


def test_wrong_targets_change_nothing(loops: list[Loop]) -> None:
    loop, cache = Loop("attention"), store()
    loops.append(loop)
    sequences = sequences_of(loop, cache)
    loop.decode([5] * 40, 0, 0)
    loop.decode([6] * 30, 1, 0)
    for targets in ([1, 3], [1, 1], [0], [-1], [1, None], [10**6]):
        with pytest.raises(InvalidConfig, match="target"):
            sequences.fork(0, targets)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="n_tokens"):
        sequences.fork(0, [1], 0)
    assert (loop.end(0), loop.end(1), loop.end(2)) == (40, 30, 0)
    assert sequences.fork(0, []) == 0
    assert sequences.fork(2, [1]) == 0  # an empty source
    assert sequences.fork(0, [1], 41) == 0
    assert loop.end(1) == 30
    assert cache.stats().refusals == {"sequence_is_elsewhere": 2}


# Reproducible mode and public prefixes


@every_memory
def test_reproducible_prompts_are_bit_for_bit_those_of_an_empty_cache(
    memory: str, loops: list[Loop]
) -> None:
    loop, alone = Loop(memory, n_seq_max=2), Loop(memory, n_seq_max=2)
    loops += [loop, alone]
    cache, rng = store(), random.Random(6)
    try:
        sequences = sequences_of(loop, cache, reproducible=True)
    except StateError as error:
        assert memory in ("hybrid with a window", "window", "window, full")
        assert "reproducible" in str(error)  # noqa: PT017 (the message is the point)
        return
    shared = fresh(rng, 5 * BLOCK + 3)
    n_restored = 0
    for n in (30, 2 * BLOCK, 7, 30):
        prompt = shared + fresh(rng, n)
        pieces = list(run(loop, sequences, prompt, 0))
        n_restored += pieces[0][0]
        assert pieces[0][0] % BLOCK == 0
        nothing = sequences_of(alone, reproducible=True)
        expected = np.concatenate([logits for _, logits in run(alone, nothing, prompt, 0)])
        ours = np.concatenate([logits for _, logits in pieces])
        assert np.array_equal(ours, expected[pieces[0][0] :])
        for at in range(20):  # generated tokens, which are decoded one by one
            loop.decode([5 + at], 0, len(prompt) + at)
        answer = [*prompt, *range(5, 25)]
        assert sequences.save(answer, 0) == 0
        sequences.save_later(answer, 0)
        assert sequences.take_pending() == 0
    assert n_restored == 3 * 5 * BLOCK
    default = sequences_of(loop, cache)
    assert default.restore([*shared, 5], 0) == 0  # the two modes never meet
    assert cache.stats().refusals == {}


def test_a_reproducible_fork_ends_at_a_block(loops: list[Loop]) -> None:
    loop, cache = Loop("attention"), store()
    loops.append(loop)
    sequences = sequences_of(loop, cache, reproducible=True)
    prompt = fresh(random.Random(7), 3 * BLOCK + 5)
    for _ in run(loop, sequences, prompt, 0):
        pass
    assert sequences.fork(0, [1]) == loop.end(1) == 3 * BLOCK
    assert sequences.fork(0, [1], BLOCK - 1) == 0


def test_a_public_prefix_is_found_by_every_scope_and_the_rest_by_none(loops: list[Loop]) -> None:
    loop, cache = Loop("attention"), store()
    loops.append(loop)
    rng = random.Random(8)
    public, rest = fresh(rng, 2 * BLOCK), fresh(rng, 2 * BLOCK)
    sequences = sequences_of(loop, cache, public_prefix=public)
    prompt = public + rest
    n_past = sequences.restore(prompt, 0, scope="a")
    for stop in sequences.stops(n_past, len(prompt)):
        loop.decode(prompt[n_past:stop], 0, n_past)
        sequences.save(prompt[:stop], 0)
        n_past = stop
    assert sequences.restore([*prompt, 5], 1, scope="b") == len(public)
    assert sequences.restore([*prompt, 5], 1, scope="a") == len(prompt)


def test_wrong_settings_are_named(loops: list[Loop]) -> None:
    loop = Loop("attention")
    loops.append(loop)
    with pytest.raises(InvalidConfig, match="reproducible"):
        sequences_of(loop, reproducible=1)
