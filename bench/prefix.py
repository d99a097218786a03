"""Time to the first token of a second request that shares 2,000 tokens with the first.

Systems: llama_cpp.Llama, the same with its LlamaRAMCache, and tokcache in both modes. All have the
same model of 4 layers x 384, one thread (two threads on a busy machine wait for each other) and
n_batch 256, so that an uncached prefill has the decode boundaries of reproducible mode and texts
can be compared before times. There are two cases: with another request in between, after which the
context no longer holds the prefix, and without. Every round has new texts; systems take turns in
random order; figures are medians. Reproducible mode decodes the tokens after the last multiple of
256 again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from time import perf_counter
from typing import Any

import llama_cpp

import tokcache
from bench._report import Report, progress
from bench.restore import big_model
from tokcache import samples
from tokcache.llama import Llama
from tokcache.state.cache import PrefixStateCache

PACKAGES = ("llama-cpp-python", "numpy")
UNIT = "ms to the first token"
BAR = "none; answers are compared first"
IN_ALL = ("--rounds", "1")
N_SHARED, N_CTX, N_BATCH = 2000, 4096, 256
N_ANSWER = 8
# Systems that must give the answers of an uncached run with the same decode boundaries.
MUST_BE_EQUAL = ("llama_cpp.Llama", "tokcache, reproducible")


def systems(n_threads: int) -> dict[str, Any]:
    """Return the systems under test, one model each."""
    model = big_model(n_layers=4, n_embd=384, n_heads=6, n_kv_heads=2, n_ff=1024)
    common: dict[str, Any] = {
        "n_ctx": N_CTX,
        "n_batch": N_BATCH,
        "n_ubatch": N_BATCH,
        "verbose": False,
    }
    common |= {"n_threads": n_threads, "n_threads_batch": n_threads}
    tokenizer = tokcache.wrap(_tokenizer())
    ram = llama_cpp.Llama(model, **common)
    ram.set_cache(llama_cpp.LlamaRAMCache())

    def ours(**settings: Any) -> Any:
        # The default capacity of the peer.
        cache = PrefixStateCache(ram_bytes=2 << 30, max_entries=1000, block_tokens=N_BATCH)
        llm = Llama(model, tokenizer=tokenizer, prefix_cache=cache, **settings, **common)
        llm.wait_for_fingerprint()
        return llm

    return {
        "llama_cpp.Llama": llama_cpp.Llama(model, **common),
        "LlamaRAMCache": ram,
        "tokcache": ours(),
        "tokcache, reproducible": ours(reproducible=True),
        "expected": Llama(model, reproducible=True, **common),
    }


def _tokenizer() -> Any:
    from tokenizers import Tokenizer  # noqa: PLC0415 (the core dependency, used here alone)

    return Tokenizer.from_file(str(samples.tiny_tokenizer()))


def texts(llm: Any, seed: int) -> tuple[str, str, str]:
    """Return two prompts that share at least `N_SHARED` tokens, and an unrelated one."""
    rng = random.Random(seed)
    words = ["import", "module", "the", "finder", "returns", "a", "loader", "for", "this", "name"]

    def some(n_tokens: int) -> str:
        made = f"{rng.random()}"
        while len(llm.tokenize(made.encode())) < n_tokens:
            made += "".join(f" {rng.choice(words)} {rng.randrange(1000)}" for _ in range(20))
        return made

    shared, other = some(N_SHARED + 20), some(600)
    first, second = f"{shared}\nquestion one?", f"{shared}\nand another question, longer?"
    ids = [llm.tokenize(text.encode()) for text in (first, second)]
    assert llama_cpp.Llama.longest_token_prefix(*ids) >= N_SHARED
    return first, other, second


def ask(llm: Any, prompt: str) -> tuple[float, list[int]]:
    """Return the seconds to the first token, and the answer's tokens."""
    first: list[float] = []
    began = perf_counter()

    def note(_ids: Any, _logits: Any) -> bool:
        first.append(perf_counter())
        return False

    criteria = llama_cpp.StoppingCriteriaList([note])
    llm.create_completion(prompt, max_tokens=N_ANSWER, temperature=0.0, stopping_criteria=criteria)
    n_prompt = len(llm.tokenize(prompt.encode()))
    return first[0] - began, llm.input_ids[n_prompt : llm.n_tokens].tolist()


Answers = dict[str, list[list[int]]]


def play(
    named: dict[str, Any], rounds: int, *, is_interrupted: bool, seed: int
) -> tuple[dict[str, list[float]], Answers]:
    """Run every system in every round; return seconds of the second request, and all answers."""
    rng = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in named}
    answers: Answers = {name: [] for name in named}
    for number in range(rounds):
        first, other, second = texts(named["llama_cpp.Llama"], seed * 1000 + number)
        order = list(named)
        rng.shuffle(order)
        for name in order:
            llm = named[name]
            if name == "expected":
                llm.reset()
            else:
                ask(llm, first)
                if is_interrupted:
                    ask(llm, other)
            taken, answer = ask(llm, second)
            seconds[name].append(taken)
            answers[name].append(answer)
    return seconds, answers


def equal_share(answers: Answers) -> dict[str, float]:
    """Return the share of each system's answers that equal the expected ones."""
    expected = answers["expected"]
    return {
        name: sum(map(list.__eq__, given, expected)) / len(expected)
        for name, given in answers.items()
        if name != "expected"
    }


def is_right(equal: dict[str, float], *, is_interrupted: bool) -> bool:
    """Return whether the systems that must give the expected answers did."""
    # Without a request in between, llama_cpp.Llama continues in its context, whose decodes do not
    # end at multiples of 256.
    must: Callable[[str], bool] = lambda name: is_interrupted or "tokcache" in name  # noqa: E731
    return all(equal[name] == 1.0 for name in MUST_BE_EQUAL if must(name))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)


def run(options: argparse.Namespace, report: Report) -> None:
    """Compare, then measure both cases."""
    named = systems(options.threads)
    _, checked = play(named, 1, is_interrupted=True, seed=1)  # results first, and a warm-up
    shares = equal_share(checked)
    is_good = is_right(shares, is_interrupted=True)
    report.check("answers before the clock starts", is_right=is_good, found=shares)
    if not is_good:
        return
    with progress() as shown:
        for case, is_interrupted, seed in shown.track(
            (("another request in between", True, 2), ("none in between", False, 3)),
            description="asking",
        ):
            seconds, answers = play(named, options.rounds, is_interrupted=is_interrupted, seed=seed)
            equal = equal_share(answers)
            ms = {name: [1000 * s for s in seconds[name]] for name in equal}
            notes = {name: f"{share:.0%} of answers equal" for name, share in equal.items()}
            title = f"time to the first token, {case}"
            report.table(title, "ms", ms, base="llama_cpp.Llama", notes=notes)
            is_good = is_right(equal, is_interrupted=is_interrupted)
            report.check(f"{case}: answers", is_right=is_good)
