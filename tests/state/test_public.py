"""Prompts with a public beginning: all scopes share that, and none finds another's rest."""

from __future__ import annotations

import random
from array import array
from typing import TYPE_CHECKING, Any

import pytest

from tests.state.engine import Engine, restored
from tests.state.test_disk import int32
from tokcache.errors import InvalidConfig, InvalidTokens
from tokcache.state.cache import PrefixStateCache

if TYPE_CHECKING:
    from tests.state.media import Medium

BLOCK = 8
PUBLIC, REST, OTHER = list(range(100, 120)), list(range(7001, 7021)), list(range(8001, 8021))
PROMPT = PUBLIC + REST
N_PUBLIC = len(PUBLIC)


def made(**settings: Any) -> PrefixStateCache:
    return PrefixStateCache(**{"block_tokens": BLOCK, "max_entries": 1000, **settings})


def save(
    cache: PrefixStateCache, tokens: list[int], scope: str | None, n_public: int, **key: Any
) -> int:
    return Engine().save(cache, tokens, scope=scope, public_tokens=n_public, **key)


def found(
    cache: PrefixStateCache, tokens: list[int], scope: str | None, n_public: int, **key: Any
) -> int:
    ns = cache.namespace(b"m", scope=scope, public_prefix=tokens[:n_public], **key)
    with ns.plan(tokens) as plan:
        assert restored(plan, tokens) == plan.n_tokens  # fails if a position is wrong
        return plan.n_tokens


def held(state: Any) -> bytes:
    """Return the bytes of a state: of a file, or of all fields of a hash."""
    return state if isinstance(state, bytes) else b"".join(state.values())


def look_ups(cache: PrefixStateCache) -> dict[str, int]:
    """Ask for the prompts of tenant a, as that tenant and in every other way."""
    return {
        "a": found(cache, PROMPT, "a", N_PUBLIC),
        "b": found(cache, PROMPT, "b", N_PUBLIC),
        "nobody": found(cache, PROMPT, None, 0),
        "b, all public": found(cache, PROMPT, "b", len(PROMPT)),
        "b, less public": found(cache, PROMPT, "b", N_PUBLIC - 3),
        "b, nothing public": found(cache, PROMPT, "b", 0),
        "a, nothing public": found(cache, PROMPT, "a", 0),
        "a, less public": found(cache, PROMPT, "a", N_PUBLIC - 3),
        "a, another rest": found(cache, PUBLIC + OTHER, "a", N_PUBLIC),
        "a, another beginning": found(cache, [1, *PROMPT[1:]], "a", N_PUBLIC),
    }


EXPECTED = {
    "a": 40,
    "b": 20,
    "nobody": 20,
    "b, all public": 20,
    "b, less public": 17,
    "b, nothing public": 0,
    "a, nothing public": 0,
    "a, less public": 17,
    "a, another rest": 20,
    "a, another beginning": 0,
}


def test_the_public_beginning_is_shared_and_the_rest_is_not(medium: Medium) -> None:
    cache = medium.cache()
    assert save(cache, PROMPT, "a", N_PUBLIC) == 40
    assert look_ups(cache) == EXPECTED
    cache._check()
    assert save(cache, PUBLIC + OTHER, "b", N_PUBLIC) == 20  # the public beginning was there
    assert found(cache, PUBLIC + OTHER, "b", N_PUBLIC) == 40
    assert look_ups(cache) == EXPECTED
    cache._check()
    cache.close()


def test_the_same_holds_below_memory(medium: Medium) -> None:
    first = medium.cache()
    save(first, PROMPT, "a", N_PUBLIC)
    first.close()
    for name, n_tokens in EXPECTED.items():
        cache = medium.cache()  # with empty memory
        assert look_ups(cache)[name] == n_tokens
        cache._check()
        cache.close()
    second = medium.cache()
    assert save(second, PUBLIC + OTHER, "b", N_PUBLIC) == 20
    second.close()
    scope_name = medium.tier().codec.scope
    for tokens, scope in ((PUBLIC[:8], None), (REST[:8], "a"), (OTHER[:8], "b")):
        (name,) = (n for n, state in medium.states().items() if int32(tokens) in held(state))
        assert scope_name(scope).hex() in name


def test_clearing_a_scope_removes_its_rest_and_keeps_the_public_beginning(medium: Medium) -> None:
    cache = medium.cache()
    save(cache, PROMPT, "a", N_PUBLIC)
    save(cache, PUBLIC + OTHER, "b", N_PUBLIC)
    cache.flush()
    assert int32(REST[:8]) in medium.all_bytes()
    assert cache.clear(scope="a") > 0
    assert int32(REST[:8]) not in medium.all_bytes()
    for each in (cache, medium.cache()):
        assert found(each, PROMPT, "a", N_PUBLIC) == N_PUBLIC
        assert found(each, PUBLIC + OTHER, "b", N_PUBLIC) == 40
        each._check()
    assert cache.clear() > 0  # the shared scope, and all blocks that follow it
    assert medium.states() == {}
    assert save(cache, PUBLIC, None, 0) == N_PUBLIC
    assert found(cache, PUBLIC + OTHER, "b", N_PUBLIC) == N_PUBLIC
    cache.close()


def test_an_aligned_public_beginning_ends_with_a_whole_block(medium: Medium) -> None:
    cache = medium.cache()
    assert save(cache, PROMPT, "a", N_PUBLIC, aligned=True) == 40
    assert found(cache, PROMPT, "a", N_PUBLIC, aligned=True) == 40
    assert found(cache, PROMPT, "b", N_PUBLIC, aligned=True) == 16
    assert found(cache, PROMPT, "a", N_PUBLIC) == 0
    assert save(cache, PROMPT, "c", 7, aligned=True) == 40  # no whole block is public
    assert found(cache, PROMPT, "d", 7, aligned=True) == 0
    cache._check()
    cache.close()
    again = medium.cache()
    assert found(again, PROMPT, "a", N_PUBLIC, aligned=True) == 40
    again.close()


def test_for_the_shared_scope_all_is_public() -> None:
    cache = made()
    save(cache, PROMPT, None, N_PUBLIC)
    assert [found(cache, PROMPT, None, n) for n in (0, 5, 40)] == [40, 40, 40]
    assert found(cache, PROMPT, "a", 30) == 30


@pytest.mark.parametrize("is_planned", [False, True])
def test_a_public_beginning_is_evicted_after_the_blocks_that_follow_it(is_planned: bool) -> None:
    cache = made(ram_bytes=12_000)
    save(cache, PROMPT, "a", N_PUBLIC)
    if is_planned:
        assert found(cache, PROMPT, "a", N_PUBLIC) == 40
    seen = []
    for n in range(12):
        save(cache, [9000 + n], None, 0)
        held = {node.tokens for node in cache._store.memory.index.nodes()}
        public = [int32(PUBLIC[at : at + BLOCK]) in held for at in (0, 8, 16)]
        rest = [int32(REST[at : at + BLOCK]) in held for at in (0, 8, 16)]
        assert all(public) or not any(rest)
        seen.append((all(public), any(rest)))
    assert seen[0] == (True, True)
    assert (True, False) in seen
    assert seen[-1] == (False, False)


def test_the_same_rest_after_another_beginning_is_another_state(medium: Medium) -> None:
    cache, beginning = medium.cache(), list(range(200, 220))
    save(cache, PROMPT, "a", N_PUBLIC)
    save(cache, beginning, None, 0)
    cache.flush()
    for each in (cache, medium.cache()):
        assert found(each, beginning + REST, "a", N_PUBLIC) == N_PUBLIC
        assert found(each, PROMPT, "a", N_PUBLIC) == 40
        each.close()


def test_a_public_beginning_outlives_the_blocks_that_follow_it() -> None:
    cache = made(ram_bytes=30_000, max_entries=1000)
    rng = random.Random(3)
    for n in range(60):
        tokens = PUBLIC + rng.choices(range(9000, 9999), k=30)
        save(cache, tokens, f"tenant {n % 7}", N_PUBLIC)
        assert found(cache, tokens, f"tenant {n % 7}", N_PUBLIC) == len(tokens)
        assert found(cache, PUBLIC, None, 0) == N_PUBLIC or n == 0
        cache._check()
    assert cache.stats().evictions > 50
    assert cache.stats().refusals == {}


def test_a_rest_is_not_saved_if_its_beginning_has_no_room() -> None:
    cache = made(ram_bytes=4000)
    assert save(cache, list(range(900)), "a", 860) == 0
    assert len(cache) == 0
    assert cache.stats().refusals == {"over_budget": 1}


@pytest.mark.parametrize("seed", range(3))
def test_random_prompts_against_a_plain_model(medium: Medium, seed: int) -> None:
    rng, cache = random.Random(seed), medium.cache()
    public: set[tuple[int, ...]] = set()
    private: dict[tuple[str, tuple[int, ...]], set[tuple[int, ...]]] = {}

    def expected(tokens: list[int], scope: str | None, n_public: int) -> int:
        n = n_public if scope is not None else len(tokens)
        held = max((k for k in range(n + 1) if tuple(tokens[:k]) in public), default=0)
        if scope is None or held < n:
            return held
        rest = private.get((scope, tuple(tokens[:n])), set())
        return max((k for k in range(n, len(tokens) + 1) if tuple(tokens[:k]) in rest), default=n)

    for step in range(100):
        tokens = [rng.randrange(2) for _ in range(rng.randint(1, 30))]
        scope = rng.choice([None, "a", "b"])
        n_public = rng.randint(0, len(tokens))
        assert found(cache, tokens, scope, n_public) == expected(tokens, scope, n_public)
        if rng.random() < 0.5:
            save(cache, tokens, scope, n_public)
            n = n_public if scope is not None else len(tokens)
            public.update(tuple(tokens[:k]) for k in range(1, n + 1))
            if scope is not None:
                rest = private.setdefault((scope, tuple(tokens[:n])), set())
                rest.update(tuple(tokens[:k]) for k in range(n, len(tokens) + 1))
        cache._check()
        if step == 60:
            cache.close()
            cache = medium.cache()
    cache.close()


def test_snapshots(medium: Medium) -> None:
    cache = medium.cache()
    ns = cache.namespace(b"m", scope="a", public_prefix=PUBLIC)
    assert ns.store(PUBLIC, b"shared")
    assert ns.store(PROMPT, b"of a")

    def state(
        cache: PrefixStateCache, tokens: list[int], scope: str | None, public: list[int] = PUBLIC
    ) -> bytes:
        ns = cache.namespace(b"m", scope=scope, public_prefix=public)
        with ns.find(tokens) or memoryview(b"") as handle:
            return bytes(handle if isinstance(handle, memoryview) else handle.state)

    cache.flush()
    for each in (cache, medium.cache()):
        assert state(each, [*PROMPT, 1], "a") == b"of a"
        assert state(each, [*PROMPT, 1], "b") == b"shared"
        assert state(each, PROMPT, "b", PROMPT) == b"shared"
        assert state(each, PROMPT, None) == b"shared"
        assert state(each, PROMPT, "b", []) == b""
        assert state(each, PROMPT, "b", PUBLIC[:-1]) == b""
    assert cache.clear(scope="a") == 1
    assert state(cache, PROMPT, "a") == b"shared"
    assert len(medium.states()) == 1
    cache.close()


@pytest.mark.parametrize("prefix", ["text", 1, [1.0], [2**31], None])
def test_a_public_prefix_must_be_token_ids(prefix: Any) -> None:
    with pytest.raises(InvalidTokens):
        made().namespace(b"m", scope="a", public_prefix=prefix)


def test_a_prompt_is_public_up_to_where_it_diverges_from_the_prefix() -> None:
    cache = made()
    ns = cache.namespace(b"m", scope="a", public_prefix=PUBLIC)
    left = PUBLIC[:11] + REST
    ns.save(left, lambda *_: None, lambda start, stop: stop - start)
    for scope, n_found in (("a", len(left)), ("b", 11), (None, 11)):
        with ns.replace(scope=scope).plan(left) as plan:
            assert plan.n_tokens == n_found


def test_a_namespace_keeps_its_public_prefix() -> None:
    prefix = array("i", PUBLIC)
    ns = made().namespace(b"m", scope="a", public_prefix=prefix)
    prefix[0] = 1
    other = ns.replace(fingerprint=b"n", aligned=True)
    assert list(ns.public_prefix) == list(other.public_prefix) == PUBLIC
    assert (other.fingerprint, other.scope, other.aligned, ns.aligned) == (b"n", "a", True, False)
    assert repr(other) == f"<Namespace 6e, scope 'a', {N_PUBLIC} public tokens, aligned>"


@pytest.mark.parametrize("aligned", [1, None, "yes"])
def test_aligned_is_a_bool(aligned: Any) -> None:
    with pytest.raises(InvalidConfig, match="aligned"):
        made().namespace(b"m", aligned=aligned)
