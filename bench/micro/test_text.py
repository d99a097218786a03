"""The text caches: a hit and a put of L0, known and new prompts of L1, lists, chats."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer

import tokcache
from bench._disturb import fresh
from bench.workloads import chats, texts
from tokcache.samples import tiny_tokenizer

if TYPE_CHECKING:
    from tests.text.implementations import Implementation

N_IDS = 3000


@pytest.mark.parametrize("n_chars", [64, 1024, 8192, 32768])
def test_l0_hit(of: Implementation, rounds: Any, n_chars: int) -> None:
    cache, text = of.l0_cache(), texts.text("English", n_chars)
    ids = of.token_ids(range(n_chars // 4))
    cache.put(text, ids)
    assert rounds(cache.get, lambda: fresh(text)) == ids


def test_l0_put_that_evicts(of: Implementation, rounds: Any) -> None:
    cache, ids, serial = of.l0_cache(max_entries=1000), of.token_ids(range(12)), count()

    def put(text: str) -> None:
        cache.put(text, ids)

    for _ in range(1000):
        put(f"{next(serial):08d} what is the capital of this country?")
    rounds(put, lambda: f"{next(serial):08d} what is the capital of this country?")
    assert len(cache) == 1000


def test_tolist(of: Implementation, benchmark: Any) -> None:
    ids = of.token_ids(range(N_IDS))
    assert benchmark(ids.tolist) == list(range(N_IDS))


def wrapped() -> Any:
    """Return the tiny tokenizer with room for one whole prompt, so that L1 answers."""
    plain = Tokenizer.from_file(str(tiny_tokenizer()))
    return tokcache.wrap(plain, tokcache.CacheConfig(engine="tokenizers", l0_max_entries=1))


def test_l1_known_prompt(of: Implementation, rounds: Any) -> None:
    tok, prompts = wrapped(), [texts.text("English", 12_000, seed) for seed in (1, 2)]
    for prompt in prompts:
        tok.token_ids(prompt)
    turn = count()
    rounds(tok.token_ids, lambda: fresh(prompts[next(turn) % 2]), 50)
    assert isinstance(tok.token_ids(prompts[0]), of.token_ids)


def test_l1_prompt_that_is_new_at_its_end(of: Implementation, rounds: Any) -> None:
    tok, prompt, turn = wrapped(), texts.text("English", 12_000), count()
    tok.token_ids(prompt)
    rounds(tok.token_ids, lambda: f"{prompt} {texts.text('English', 450, next(turn) + 9)}", 50)
    assert isinstance(tok.token_ids(prompt), of.token_ids)


@pytest.mark.parametrize("step", ["rendering", "ids"])
def test_a_chat(benchmark: Any, step: str) -> None:
    transformers = pytest.importorskip("transformers")
    plain = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tiny_tokenizer()))
    plain.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    tok, chat = tokcache.wrap(plain), chats.made(1)[0]
    expected = plain.apply_chat_template(chat, tokenize=step == "ids", return_dict=False)
    given = benchmark(tok.apply_chat_template, chat, tokenize=step == "ids", return_dict=False)
    assert given == expected
