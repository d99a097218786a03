"""SequenceStates in a loop that drives llama.cpp itself, with several sequences of one context."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.integration.models import BLOCK, llama, llama_cpp, store
from tests.integration.test_llama_memories import (
    MEMORIES,
    TOLERANCE,
    every_memory,
    fresh,
)
from tokcache import samples
from tokcache.errors import InvalidConfig, InvalidScope, InvalidTokens, MissingFile, StateError
from tokcache.llama import SequenceStates, state_fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

FINGERPRINT = b"this model, these settings"
N_SEQUENCES = 3


class Loop:
    """A context of llama.cpp, and decodes of one sequence's tokens."""

    def __init__(self, memory: str, n_seq_max: int = N_SEQUENCES + 1, **settings: Any) -> None:
        architecture, swa_full = MEMORIES[memory]
        self.path = samples.tiny_model(architecture=architecture)
        self.model_params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(
            str(self.path).encode(), self.model_params
        )
        params = self.params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 2048, 512, 1, 1
        params.n_seq_max, params.kv_unified, params.swa_full = n_seq_max, True, swa_full
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        for name, value in settings.items():
            setattr(params, name, value)
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def decode(self, tokens: list[int], seq_id: int, first: int) -> NDArray[np.float32]:
        """Return f32[n_tokens, n_vocab], the logits at every position."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, first + i, 1
            batch.seq_id[i][0], batch.logits[i] = seq_id, True
        try:
            code = llama_cpp.llama_decode(self.ctx, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        assert code == 0, f"llama_decode returned {code}"
        rows = llama_cpp.llama_get_logits(self.ctx)
        return np.ctypeslib.as_array(rows, (len(tokens), self.n_vocab)).copy()

    def end(self, seq_id: int) -> int:
        return int(llama_cpp.llama_memory_seq_pos_max(self.memory, seq_id)) + 1

    def close(self) -> None:
        llama_cpp.llama_free(self.ctx)
        llama_cpp.llama_model_free(self.model)


@pytest.fixture
def loops() -> Iterator[list[Loop]]:
    made: list[Loop] = []
    yield made
    for loop in made:
        loop.close()


def run(
    loop: Loop, sequences: SequenceStates, prompt: list[int], seq_id: int, *, keep: int = 0
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Decode a prompt stop by stop; yield (first position, logits) of each piece."""
    n_past = keep or sequences.restore(prompt, seq_id)
    for stop in sequences.stops(n_past, len(prompt)):
        logits = loop.decode(prompt[n_past:stop], seq_id, n_past)
        sequences.save(prompt[:stop], seq_id)
        yield n_past, logits
        n_past = stop


def uncached(loop: Loop, prompt: list[int]) -> NDArray[np.float32]:
    """Return the logits of all positions, decoded stop by stop in an empty context."""
    llama_cpp.llama_memory_clear(loop.memory, False)
    nothing = SequenceStates(loop.ctx, prefix_cache=store(), fingerprint=b"nothing")
    return np.concatenate([logits for _, logits in run(loop, nothing, prompt, 0)])


@every_memory
def test_interleaved_sequences_are_those_of_each_alone(memory: str, loops: list[Loop]) -> None:
    loop, alone = Loop(memory), Loop(memory)
    loops += [loop, alone]
    cache = store()
    sequences = SequenceStates(loop.ctx, prefix_cache=cache, fingerprint=FINGERPRINT)
    assert sequences.n_sequences == N_SEQUENCES
    rng = random.Random(1)
    shared = fresh(rng, 3 * BLOCK)
    prompts = [shared + fresh(rng, n) for n in (2 * BLOCK + 9, 20, BLOCK)]
    n_decoded, n_prompt = [], 0
    for turn in range(3):
        n_prompt += sum(map(len, prompts))
        runs = [run(loop, sequences, p, (i + turn) % 3) for i, p in enumerate(prompts)]
        pieces: list[list[tuple[int, Any]]] = [[], [], []]
        while any(pieces[i][-1:] != [None] for i in range(3)):  # round robin, piece by piece
            for got, one in zip(pieces, runs, strict=True):
                if got[-1:] != [None]:
                    got.append(next(one, None))  # type: ignore[arg-type]
        for prompt, got in zip(prompts, pieces, strict=True):
            first = got[0][0]
            logits = np.concatenate([piece for _, piece in got[:-1]])
            n_decoded.append(len(logits))
            worst = np.abs(logits - uncached(alone, prompt)[first:]).max()
            assert worst <= TOLERANCE
        prompts = [prompt + fresh(rng, 6) if turn else prompt for prompt in prompts]
    # The second turn has the same prompts: one token each. The third has six more in each.
    assert n_decoded[3:6] == [1, 1, 1]
    assert n_decoded[6:] == [6, 6, 6]
    stats = cache.stats()
    assert stats.refusals == {}
    assert stats.prompt_tokens == n_prompt
    assert (stats.context_tokens, stats.restored_tokens) == (0, n_prompt - sum(n_decoded))
    cache.count_prompt(7, context_tokens=6)  # one that continued in place: the caller counts it
    assert (cache.stats().prompt_tokens, cache.stats().context_tokens) == (n_prompt + 7, 6)
    assert loop.end(N_SEQUENCES) == 0
    cache._check()


@every_memory
def test_a_restore_leaves_the_other_sequences_alone(memory: str, loops: list[Loop]) -> None:
    loop, alone = Loop(memory), Loop(memory)
    loops += [loop, alone]
    sequences = SequenceStates(loop.ctx, prefix_cache=store(), fingerprint=FINGERPRINT)
    rng = random.Random(2)
    a, b = fresh(rng, 4 * BLOCK + 3), fresh(rng, 3 * BLOCK + 5)
    for _ in run(loop, sequences, a, 0):
        pass
    for _ in run(loop, sequences, b, 1):
        pass
    assert sequences.restore(a, 1) == len(a) - 1
    assert sequences.restore(fresh(rng, 50), 2) == 0
    longer = a + fresh(rng, 30)
    ours = loop.decode(longer[len(a) :], 0, len(a))  # sequence 0 continues
    uncached(alone, a)
    theirs = alone.decode(longer[len(a) :], 0, len(a))
    assert np.abs(ours - theirs).max() <= TOLERANCE


@every_memory
def test_control_a_state_of_another_sequence_is_seen(memory: str, loops: list[Loop]) -> None:
    loop, alone = Loop(memory), Loop(memory)
    loops += [loop, alone]
    sequences = SequenceStates(loop.ctx, prefix_cache=store(), fingerprint=FINGERPRINT)
    rng = random.Random(3)
    a, b = fresh(rng, 4 * BLOCK), fresh(rng, 4 * BLOCK)
    for _ in run(loop, sequences, a, 0):
        pass
    n_past = sequences.restore(a, 1)
    wrong = loop.decode([*b[n_past:], 5], 1, n_past)
    assert np.abs(wrong[:1] - uncached(alone, b)[n_past:]).max() > TOLERANCE


@pytest.mark.parametrize("memory", ["attention", "mamba", "lfm2", "window"])
@pytest.mark.parametrize("settings", [{"kv_unified": False}, {"n_seq_max": 1}])
def test_a_context_in_which_llama_cpp_would_abort_is_refused(
    memory: str, settings: dict[str, Any], loops: list[Loop]
) -> None:
    loops.append(Loop(memory, **settings))
    with pytest.raises(StateError, match="kv_unified=True"):
        SequenceStates(loops[0].ctx, prefix_cache=store(), fingerprint=FINGERPRINT)


# Pending saves


@pytest.mark.parametrize("memory", ["attention", "window", "mamba", "lfm2"])
def test_a_pending_save_is_taken_only_if_its_sequence_is_unchanged(
    memory: str, loops: list[Loop]
) -> None:
    loop = Loop(memory)
    loops.append(loop)
    cache = store()
    sequences = SequenceStates(loop.ctx, prefix_cache=cache, fingerprint=FINGERPRINT)
    rng = random.Random(4)
    prompts = [fresh(rng, BLOCK - 5) for _ in range(5)]

    def fill(tokens: list[int], seq_id: int) -> None:
        llama_cpp.llama_memory_seq_rm(loop.memory, seq_id, -1, -1)
        loop.decode(tokens, seq_id, 0)

    def overtaken() -> int:
        return cache.stats().refusals.get("pending_save_overtaken", 0)

    fill(prompts[0], 0)
    sequences.save_later(prompts[0], 0)
    fill(prompts[4], 2)  # another sequence
    assert sequences.take_pending() == len(prompts[0])
    assert (overtaken(), sequences.take_pending()) == (0, 0)

    fill(prompts[1], 1)
    sequences.save_later(prompts[1], 1)
    loop.decode([7], 1, len(prompts[1]))  # it was decoded further
    assert (sequences.take_pending(), overtaken()) == (0, 1)

    fill(prompts[2], 1)
    sequences.save_later(prompts[2], 1)
    sequences.reset(1)
    assert (sequences.take_pending(), overtaken()) == (0, 2)

    fill(prompts[3], 1)
    sequences.save_later(prompts[3], 1)
    sequences.restore(prompts[0], 1)
    assert (sequences.take_pending(), overtaken()) == (0, 3)

    fill(prompts[3], 1)
    sequences.save_later(prompts[3], 1)
    fill(prompts[2], 1)  # as many other tokens, without a call of reset
    assert (sequences.take_pending(), overtaken()) == (0, 4)

    for prompt, expected in zip(prompts, (1, 0, 0, 0, 0), strict=True):
        assert bool(sequences.restore([*prompt, 5], 1)) == expected


@pytest.mark.parametrize(("cleared", "n_saved"), [("tenant-a", 0), (None, 0), ("tenant-b", 40)])
def test_a_pending_save_of_a_scope_that_was_cleared_is_dropped(
    cleared: str | None, n_saved: int, loops: list[Loop]
) -> None:
    loop, cache, prompt = Loop("attention"), store(), fresh(random.Random(2), 40)
    loops.append(loop)
    sequences = SequenceStates(
        loop.ctx, prefix_cache=cache, fingerprint=FINGERPRINT, scope="tenant-a"
    )
    loop.decode(prompt, 0, 0)
    sequences.save_later(prompt, 0)
    cache.clear(scope=cleared)
    assert sequences.take_pending() == n_saved
    assert cache.stats().refusals == ({} if n_saved else {"cleared": 1})
    assert (len(cache) == 0) == (not n_saved)


# Bad input


def test_wrong_arguments_are_named(loops: list[Loop]) -> None:
    loop = Loop("attention")
    loops.append(loop)
    good: dict[str, Any] = {"prefix_cache": store(), "fingerprint": FINGERPRINT}
    wrongs: tuple[dict[str, Any], ...] = (
        {"prefix_cache": {}},
        {"fingerprint": "x"},
        {"fingerprint": b""},
        {"scope": 7},
    )
    for wrong in wrongs:
        error = InvalidScope if "scope" in wrong else InvalidConfig
        with pytest.raises(error, match=next(iter(wrong))):
            SequenceStates(loop.ctx, **{**good, **wrong})
    sequences = SequenceStates(loop.ctx, **good)
    for seq_id in (-1, N_SEQUENCES, 10**6, None):
        for use in (sequences.restore, sequences.save, sequences.save_later):
            with pytest.raises(InvalidConfig, match="seq_id"):
                use([5, 6], seq_id)  # type: ignore[arg-type]
    with pytest.raises(InvalidTokens):
        sequences.save([1 << 40], 0)
    with pytest.raises(InvalidConfig, match="n_tokens"):
        sequences.stops(5, 4)


def test_tokens_that_the_sequence_does_not_hold_are_refused_with_a_counter(
    loops: list[Loop],
) -> None:
    loop = Loop("attention")
    loops.append(loop)
    cache = store()
    sequences = SequenceStates(loop.ctx, prefix_cache=cache, fingerprint=FINGERPRINT)
    loop.decode([5] * 40, 0, 0)
    assert sequences.save([5] * 39, 0) == sequences.save([5] * 41, 0) == sequences.save([], 0) == 0
    sequences.save_later([5] * 41, 0)
    assert sequences.save([5, 10**6], 0) == sequences.restore([5, -1], 0) == 0
    assert cache.stats().refusals == {
        "sequence_is_elsewhere": 3,
        "tokens_outside_the_vocabulary": 2,
    }
    assert cache.stats().saved_blocks == 0


def test_fingerprints_and_scopes_never_meet(loops: list[Loop]) -> None:
    loop = Loop("lfm2")
    loops.append(loop)
    cache, prompt = store(), fresh(random.Random(5), 2 * BLOCK + 9)

    def n_restored(**other: Any) -> int:
        settings = {"fingerprint": FINGERPRINT, "scope": "a", **other}
        sequences = SequenceStates(loop.ctx, prefix_cache=cache, **settings)
        return sequences.restore(prompt, 0)

    sequences = SequenceStates(loop.ctx, prefix_cache=cache, fingerprint=FINGERPRINT, scope="a")
    for _ in run(loop, sequences, prompt, 0):
        pass
    assert n_restored() == len(prompt) - 1
    assert n_restored(scope=None) == n_restored(scope="b") == n_restored(fingerprint=b"x") == 0


@pytest.mark.parametrize("memory", ["attention", "window", "lfm2"])
def test_a_full_context_costs_a_decode_and_leaves_the_others(
    memory: str, loops: list[Loop]
) -> None:
    big, small = Loop(memory), Loop(memory, n_ctx=512)
    loops += [big, small]
    cache, rng = store(), random.Random(6)
    prompt, other = fresh(rng, 10 * BLOCK), fresh(rng, 11 * BLOCK)
    for _ in run(
        big, SequenceStates(big.ctx, prefix_cache=cache, fingerprint=FINGERPRINT), prompt, 0
    ):
        pass
    sequences = SequenceStates(small.ctx, prefix_cache=cache, fingerprint=FINGERPRINT)
    for _ in run(small, sequences, other, 0):
        pass
    # 160 positions are left for 320: restored blocks would take them from other sequences.
    assert sequences.restore(prompt, 1) == small.end(1) == 0
    assert cache.stats().refusals == {"restore_failed": 1}
    assert small.end(0) == len(other)
    assert small.end(N_SEQUENCES) == 0
    small.decode(other[:8], 0, len(other))
    assert sequences.restore(prompt, 0) == len(prompt) - 1  # there is room now


def test_state_fingerprint_covers_model_adapter_and_settings(loops: list[Loop]) -> None:
    loop = Loop("attention")
    loops.append(loop)
    made = state_fingerprint(loop.path, loop.params, loop.model_params)
    assert made == state_fingerprint(str(loop.path), loop.params, loop.model_params)
    other = samples.tiny_model(seed=1)
    assert made != state_fingerprint(other, loop.params, loop.model_params)
    lora = samples.tiny_lora(loop.path)
    with_lora = {
        state_fingerprint(loop.path, loop.params, loop.model_params, lora_path=lora, lora_scale=s)
        for s in (0.5, 1.0)
    }
    assert len({made, *with_lora}) == 3
    loop.params.rope_freq_base = 20_000.0
    assert made != state_fingerprint(loop.path, loop.params, loop.model_params)
    with pytest.raises(MissingFile, match=r"nothing\.gguf"):
        state_fingerprint("nothing.gguf", loop.params, loop.model_params)


def test_a_loop_restores_the_blocks_that_llama_saved(loops: list[Loop]) -> None:
    cache, prompt = store(), fresh(random.Random(7), 3 * BLOCK)
    llm = llama(cache, n_ctx=2048)
    next(llm.generate(prompt, temp=0.0))
    llm.close()
    loop, alone = Loop("attention", n_seq_max=2), Loop("attention")
    loops += [loop, alone]
    sequences = SequenceStates(loop.ctx, prefix_cache=cache, fingerprint=llm._states.fingerprint)
    n_past = sequences.restore(prompt, 0)
    assert n_past == len(prompt) - 1
    ours = loop.decode(prompt[n_past:], 0, n_past)
    assert np.abs(ours - uncached(alone, prompt)[n_past:]).max() <= TOLERANCE


@every_memory
def test_each_sequence_serves_the_scope_that_it_was_restored_for(
    memory: str, loops: list[Loop]
) -> None:
    loop = Loop(memory)
    loops.append(loop)
    sequences = SequenceStates(loop.ctx, prefix_cache=store(), fingerprint=FINGERPRINT, scope="own")
    prompt = fresh(random.Random(8), 2 * BLOCK + 5)

    def n_found(seq_id: int, **scope: Any) -> int:
        n_past = n_restored = sequences.restore(prompt, seq_id, **scope)
        for stop in sequences.stops(n_past, len(prompt)):
            loop.decode(prompt[n_past:stop], seq_id, n_past)
            sequences.save(prompt[:stop], seq_id)
            n_past = stop
        return n_restored

    scopes: list[dict[str, Any]] = [{"scope": "a"}, {"scope": None}, {}]
    for seq_id, scope in enumerate(scopes):
        assert n_found(seq_id, **scope) == 0
        assert n_found(seq_id, **scope) > 0
    assert n_found(0, scope="own") > 0
    # Positions that the caller decodes after a reset belong to the scope of the reset.
    other = fresh(random.Random(9), BLOCK)
    for found in ("b", "own"):
        sequences.restore(prompt, 0, scope="a")
        llama_cpp.llama_memory_seq_rm(loop.memory, 0, -1, -1)
        sequences.reset(0, **({"scope": "b"} if found == "b" else {}))
        loop.decode(other, 0, 0)
        sequences.save_later(other, 0)
        assert sequences.take_pending() > 0
        for asked in ("a", None, "b", "own"):
            assert (sequences.restore([*other, 7], 1, scope=asked) > 0) == (asked == found)
        sequences._cache.clear(scope=found)
    with pytest.raises(InvalidScope):
        sequences.restore(prompt, 0, scope=5)  # type: ignore[arg-type]
    with pytest.raises(InvalidScope):
        sequences.reset(0, scope=5)  # type: ignore[arg-type]
