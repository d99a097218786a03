"""The counters of reuse: context, restored and decoded tokens add up to all prompt tokens."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import CollectorRegistry

from tests.integration.models import BLOCK, GREEDY, llama, store
from tokcache import samples
from tokcache.observe import prometheus
from tokcache.observe.prometheus import Collector

if TYPE_CHECKING:
    from tokcache.state.cache import PrefixStateCache

RNG = random.Random(13)
A, B = RNG.choices(range(3, 250), k=100), RNG.choices(range(250, 500), k=60)
N_ANSWER = 6


class Chat:
    """A Llama that is asked with ids; counts the tokens that llama.cpp is given to decode."""

    def __init__(
        self, cache: PrefixStateCache, architecture: str = "llama", **settings: Any
    ) -> None:
        self.llm = llama(cache, model=samples.tiny_model(architecture=architecture), **settings)
        self.n_prompt = self.n_decoded = self.n_answered = 0
        decode = self.llm._ctx.decode

        def counted(batch: Any) -> Any:
            self.n_decoded += batch.n_tokens()
            return decode(batch)

        self.llm._ctx.decode = counted

    def ask(self, prompt: list[int]) -> list[int]:
        """Return an answer of N_ANSWER tokens, of which all but the last are decoded."""
        stream = self.llm.generate(prompt, temp=0.0)
        answer = [token for _, token in zip(range(N_ANSWER), stream, strict=False)]
        stream.close()
        self.n_prompt += len(prompt)
        self.n_answered += N_ANSWER - 1
        return answer

    def converse(self) -> list[int]:
        """Ask as two users would; return how much of each prompt was decoded."""
        n_decoded = []

        def ask(prompt: list[int]) -> list[int]:
            answer = self.ask(prompt)
            n_decoded.append(self.llm.last_reuse.n_decoded)
            return answer

        grown = [*A, *ask(A), *range(10, 24)]
        second = [*grown, *ask(grown), *range(10, 20)]
        ask(B)
        ask(second)
        ask(second)
        return n_decoded


def shown_rate(cache: PrefixStateCache) -> float:
    """Return the rate that the dashboard shows for the samples of the collector."""
    registry = CollectorRegistry()
    Collector(registry).add("m", cache)
    text = (Path(prometheus.__file__).parent / "grafana_dashboard.json").read_text()
    (expression,) = (
        target["expr"]
        for panel in json.loads(text)["panels"]
        if panel["title"] == "Prompt tokens not decoded"
        for target in panel["targets"]
    )

    def sample(found: re.Match[str]) -> str:
        value = registry.get_sample_value(found[1], {"model": "m"})
        assert value is not None, found[1]
        return str(value)

    # All counters began at zero together: their rates are in the ratio of their values.
    rate = r'sum by \(model\) \(rate\((tokcache_\w+)\{model=~"\$model"\}\[\$__rate_interval\]\)\)'
    formula = re.sub(rate, sample, expression)
    assert re.fullmatch(r"[\d.+/() ]+", formula), formula
    return float(eval(formula, {"__builtins__": {}}))  # noqa: S307 (numbers, + and / alone)


def test_a_chat_with_known_numbers() -> None:
    cache = store()
    chat = Chat(cache)
    assert chat.converse() == [100, 15, 60, 11, 1]
    stats = cache.stats()
    assert (stats.prompt_tokens, stats.context_tokens, stats.restored_tokens) == (552, 240, 125)
    assert chat.n_decoded - chat.n_answered == 552 - 240 - 125 == 187
    assert stats.token_hit_rate == (240 + 125) / 552
    assert shown_rate(cache) == pytest.approx(365 / 552)
    chat.llm.close()


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mamba", "lfm2"])
def test_counters_add_up_to_the_prompts(architecture: str, reproducible: bool) -> None:
    cache = store()
    chat = Chat(cache, architecture, reproducible=reproducible)
    for seed in range(3):
        chat.converse()
        rng = random.Random(seed)
        kept = A[: rng.randrange(1, 100)]  # it diverges inside a stored block
        chat.ask(kept + rng.choices(range(3, 500), k=3 * BLOCK))
    stats = cache.stats()
    assert stats.prompt_tokens == chat.n_prompt
    n_reused = stats.context_tokens + stats.restored_tokens
    assert n_reused == chat.n_prompt - (chat.n_decoded - chat.n_answered)
    assert stats.restored_tokens > 0
    # Where all is recurrent, nothing before a state stays; in reproducible mode no answer's tokens.
    assert (stats.context_tokens > 0) == (architecture != "mamba" or not reproducible)
    assert shown_rate(cache) == pytest.approx(stats.token_hit_rate)
    chat.llm.close()


def test_a_chat_completion_is_counted() -> None:
    cache = store()
    chat = Chat(cache, n_ctx=2048)
    messages = [{"role": "user", "content": "hello world, is it late?"}]
    for _ in range(2):
        chat.llm.create_chat_completion(messages, **GREEDY)
    reuse, stats = chat.llm.last_reuse, cache.stats()
    assert reuse.n_in_context == reuse.n_prompt - 1
    assert (stats.prompt_tokens, stats.context_tokens) == (2 * reuse.n_prompt, reuse.n_prompt - 1)
    assert stats.restored_tokens == 0
    chat.llm.close()


def test_a_prompt_that_the_context_holds_whole_is_counted_without_a_look_up() -> None:
    cache = store()
    chat = Chat(cache)
    for _ in range(3):
        stream = chat.llm.generate(A, temp=0.0)
        next(stream)
        stream.close()
    stats = cache.stats()
    assert (stats.lookups, stats.prompt_tokens, stats.context_tokens) == (1, 300, 200)
    assert chat.n_decoded == 100
    assert shown_rate(cache) == pytest.approx(2 / 3)
    chat.llm.close()


def test_a_model_that_runs_uncached_counts_its_prompts() -> None:
    cache = store()
    chat = Chat(cache, logits_all=True)
    chat.ask(A)
    chat.ask(B)
    chat.ask(B)
    stats = cache.stats()
    assert stats.refusals == {"logits_all": 3}
    assert (stats.prompt_tokens, stats.context_tokens, stats.restored_tokens) == (220, 59, 0)
    assert chat.n_decoded - chat.n_answered == 220 - 59
    chat.llm.close()


def test_a_suspended_generation_is_one_prompt() -> None:
    """Tokens that are decoded or restored to resume a generation count for no prompt."""
    cache = store()
    for reproducible in (False, True):
        chat = Chat(cache, reproducible=reproducible)
        before = cache.stats().prompt_tokens
        stream = chat.llm.generate(A, temp=0.0)
        next(stream)
        chat.ask(B)
        next(stream)
        stream.close()
        assert cache.stats().prompt_tokens - before == len(A) + len(B)
        chat.llm.close()
