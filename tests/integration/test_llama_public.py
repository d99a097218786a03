"""All tenants share the states of the system prompt, and none of those that follow it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.models import BLOCK, GREEDY, llama, store, text
from tokcache import samples
from tokcache.errors import InvalidTokens

RNG = random.Random(8)
PUBLIC, REST, OTHER = (RNG.choices(range(3, 500), k=n) for n in (100, 77, 40))


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("has_disk", [False, True])
def test_tenants_share_the_system_prompt_and_nothing_else(
    tmp_path: Path, reproducible: bool, has_disk: bool
) -> None:
    caches: list[Any] = [store(disk=tmp_path if has_disk else None)]

    def asked(prompt: list[int], scope: str | None, public: Any = PUBLIC) -> tuple[int, str]:
        llm = llama(caches[-1], scope=scope, public_prefix=public, reproducible=reproducible)
        answer = text(llm.create_completion(prompt, **GREEDY))
        llm.close()
        return llm.last_reuse.n_restored, answer

    def whole(n_tokens: int) -> int:
        return n_tokens // BLOCK * BLOCK if reproducible else n_tokens

    uncached = llama(reproducible=True)
    expected = text(uncached.create_completion(PUBLIC + REST, **GREEDY))
    assert asked(PUBLIC + REST, "a")[0] == 0
    if has_disk:
        caches[-1].close()
        caches.append(store(disk=tmp_path))
    n_all = len(PUBLIC + REST)
    found = {
        "b": asked(PUBLIC + REST, "b"),
        "a": asked(PUBLIC + REST, "a"),
        "c, no public prefix": asked(PUBLIC + REST, "c", ()),
        "d, half of it": asked(PUBLIC[:50] + OTHER, "d"),
        "e, the whole prompt": asked(PUBLIC + REST, "e", PUBLIC + REST),
    }
    assert {name: n_restored for name, (n_restored, _) in found.items()} == {
        "b": whole(100),
        "a": whole(n_all - 1),
        "c, no public prefix": 0,
        "d, half of it": whole(50),
        "e, the whole prompt": whole(100),
    }
    if reproducible:
        assert {name: answer for name, (_, answer) in found.items() if "d" not in name} == (
            dict.fromkeys(("b", "a", "c, no public prefix", "e, the whole prompt"), expected)
        )
    assert caches[-1].stats().refusals == {}
    caches[-1]._check()
    caches[-1].close()
    uncached.close()


def test_the_public_prefix_is_given_in_ids() -> None:
    llm = llama(store(), public_prefix=np.array(PUBLIC, np.int32))
    assert llm.public_prefix.tolist() == PUBLIC
    assert llm.__getstate__()["public_prefix"].tolist() == PUBLIC
    llm.close()
    llm = llama(store(), public_prefix=np.array(PUBLIC, np.int64))
    assert llm.public_prefix.tolist() == PUBLIC
    llm.close()
    for wrong, words in (
        ("You are a helpful assistant.", "not str; encode a text first"),
        (["You", "are"], "at position 0 there is a str"),
        (None, "not NoneType"),
        ([1, 2**40], "at position 1 there is"),
    ):
        with pytest.raises(InvalidTokens, match=words):
            llama(store(), public_prefix=wrong)


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("architecture", ["gemma3", "mamba", "lfm2"])
def test_other_memories_share_the_system_prompt_up_to_a_position_that_they_can_restore(
    architecture: str, reproducible: bool
) -> None:
    cache, model = store(), samples.tiny_model(architecture=architecture)

    def asked(scope: str | None, public: Any = PUBLIC, **key: Any) -> tuple[int, str]:
        llm = llama(
            cache, model=model, scope=scope, public_prefix=public, reproducible=reproducible, **key
        )
        answer = text(llm.create_completion(PUBLIC + REST, **GREEDY))
        llm.close()
        return llm.last_reuse.n_restored, answer

    uncached = llama(model=model, reproducible=True)
    expected = text(uncached.create_completion(PUBLIC + REST, **GREEDY))
    uncached.close()
    found = {"first": asked("a"), "b": asked("b"), "a": asked("a"), "without": asked("c", ())}
    n_shared = 100 if architecture == "gemma3" and not reproducible else 100 // BLOCK * BLOCK
    n_restored = {name: n for name, (n, _) in found.items()}
    assert (n_restored["first"], n_restored["b"], n_restored["without"]) == (0, n_shared, 0)
    assert n_restored["a"] > n_shared
    if reproducible:
        assert {answer for _, answer in found.values()} == {expected}
    assert cache.stats().refusals == {}
    cache._check()
