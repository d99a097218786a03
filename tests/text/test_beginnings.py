"""Known beginnings of texts: one compare and one copy instead of one a chunk, with the same ids."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.text.fuzz_texts import random_text
from tests.text.test_segment_cache import CacheWithEncoders, numbered, texts_with_shared_passages

EMOJI = "\U0001f600"


def remembered(one: CacheWithEncoders) -> int:
    n: int = one.cache._n_beginnings
    return n


def chat(n_turns: int, seed: int = 0) -> list[str]:
    """Return the prompts of a chat; each begins with the one before."""
    rng = random.Random(seed)
    text, prompts = numbered(20, first=1000 * seed), []
    for turn in range(n_turns):
        text += f"<s>user {turn}\n" + numbered(rng.randrange(1, 8), first=rng.randrange(10_000))
        prompts.append(text)
    return prompts


def test_a_repeated_chat_has_one_beginning_that_grows_with_it() -> None:
    one = CacheWithEncoders("native")
    prompts = chat(12)
    for prompt in prompts:
        assert one.ids(prompt) == one.expected(prompt)
    assert remembered(one) == 0, "a text that is new at its end leaves nothing"
    before = one.cache.stats()
    for prompt in prompts * 2:  # the second time, all are known by the beginning of the last one
        assert one.ids(prompt) == one.expected(prompt)
        assert remembered(one) == 1
        one.check()
    after = one.cache.stats()
    assert after.misses == before.misses
    assert after.hits == before.hits + 2 * len(prompts)
    assert after.lookup_chars - before.lookup_chars == 2 * sum(map(len, prompts))
    assert after.chunk_misses == before.chunk_misses


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama2", "bert_uncased"])
def test_texts_that_leave_a_beginning_anywhere_get_their_ids(kind: str, special: bool) -> None:
    one = CacheWithEncoders("native", kind)
    text = chat(4, seed=3)[-1]
    for _ in range(3):
        assert one.ids(text, special) == one.expected(text, special)
    assert remembered(one) == 1
    rng = random.Random(5)
    for stop in [len(text), *rng.sample(range(2000, len(text)), 40)]:
        for end in ("", "x", " x", "\n", "\n\nx", "<s>", "\u0301", EMOJI):
            other = text[:stop] + end
            assert one.ids(other, special) == one.expected(other, special), (stop, end)
    one.check()


@pytest.mark.parametrize("n_edits", [1, 3])
def test_a_branch_gets_a_beginning_of_its_own_if_it_is_long(n_edits: int) -> None:
    one = CacheWithEncoders("native", max_bytes=1 << 22)
    base = numbered(80)
    lines = base.splitlines(keepends=True)
    for edit in range(n_edits):
        lines[len(lines) // 4 * (edit + 1)] = f"An edit, {edit}.\n"
    branch = "".join(lines)
    for _ in range(3):
        for text in (base, branch):
            assert one.ids(text) == one.expected(text)
            one.check()
    assert remembered(one) == 2


@pytest.mark.parametrize("wide", ["\u0438", EMOJI])
def test_a_beginning_is_found_only_in_strings_of_its_character_width(wide: str) -> None:
    one = CacheWithEncoders("native")
    narrow = numbered(40)
    for text in (narrow, narrow, narrow + wide, narrow + wide, wide + narrow, narrow):
        assert one.ids(text) == one.expected(text)
        one.check()


def test_scopes_share_no_beginning_and_lose_only_their_own() -> None:
    one = CacheWithEncoders("native", max_bytes=1 << 22)
    text = numbered(60)
    for scope in (0, 7, 9):
        for _ in range(2):
            assert one.ids(text, scope=scope) == one.expected(text)
    assert remembered(one) == 3
    one.cache.clear(7)
    one.check()
    assert remembered(one) == 2
    before = one.cache.stats().misses
    assert one.ids(text, scope=7) == one.expected(text)
    assert one.cache.stats().misses == before + 1
    one.cache.clear()
    assert remembered(one) == 0
    one.check()


def test_a_look_up_whose_scope_was_cleared_leaves_no_beginning() -> None:
    one = CacheWithEncoders("native")
    text = numbered(60)
    one.ids(text)
    since = one.cache.n_clears
    one.cache.clear(0)
    one.ids(text)
    assert one.cache.look(text, False, 0, since).tolist() == one.expected(text)
    assert remembered(one) == 0


def test_a_walk_keeps_the_ids_of_a_beginning_that_is_evicted_or_grows() -> None:
    one = CacheWithEncoders("native", max_bytes=1 << 20)
    prompts = chat(6, seed=1)
    for prompt in prompts[:3] * 2:
        one.ids(prompt)
    assert remembered(one) == 1
    walk = one.cache.look(prompts[3] + "A new end.", False, 0)
    for prompt in prompts * 2:  # the beginning grows past the walk's
        one.ids(prompt)
    second = one.cache.look(prompts[4] + "Another end.", False, 0)
    one.cache.clear()
    assert remembered(one) == 0
    assert one.complete(walk) == one.expected(prompts[3] + "A new end.")
    assert one.complete(second) == one.expected(prompts[4] + "Another end.")
    one.check()


@pytest.mark.parametrize("max_bytes", [100_000, 600_000, 1 << 20])
def test_beginnings_stay_within_their_share_of_the_budget(max_bytes: int) -> None:
    one = CacheWithEncoders("native", max_bytes=max_bytes)
    for seed in range(30):
        for prompt in chat(3, seed) * 2:
            assert one.ids(prompt) == one.expected(prompt)
            one.check()
    assert (remembered(one) > 0) == (max_bytes > 1 << 19)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "llama2", "unigram_first_split"])
@pytest.mark.parametrize("max_bytes", [600_000, 1 << 22])
def test_ids_are_those_of_the_tokenizer_whatever_happens_in_between(
    kind: str, max_bytes: int
) -> None:
    rng = random.Random(f"{kind} {max_bytes}")
    one = CacheWithEncoders("native", kind, max_bytes)
    texts = texts_with_shared_passages(rng, 14, n_chars=3000)
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    walks: list[tuple[Any, str]] = []
    for _ in range(150):
        text = rng.choice(texts)
        deed = rng.randrange(12)
        if deed == 0:
            text = text[: rng.randrange(len(text))] + random_text(rng, ["<s>"], n_chars=300)
            texts[rng.randrange(len(texts))] = text.encode("utf-8", "replace").decode()
        elif deed == 1:
            one.cache.clear(rng.choice([None, 0, 7]))
        elif deed < 4 and walks:
            walk, own = walks.pop(rng.randrange(len(walks)))
            assert one.complete(walk) == one.expected(own)
        else:
            found = one.cache.look(text, False, rng.choice([0, 7]))
            if found is None:
                continue
            if hasattr(found, "finish") and rng.random() < 0.3:
                walks.append((found, text))
            else:
                ids = one.complete(found) if hasattr(found, "finish") else found.tolist()
                assert ids == one.expected(text)
        one.check()
