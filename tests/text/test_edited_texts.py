"""A long text with a sentence inserted is encoded again only where it changed.

The tokenizers are those whose cuts are proven by their vocabulary, or although added tokens are
searched for in the normalised text: real ones from a folder of shared data, and synthetic ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

import tokcache
from tests.text.fuzz_texts import histories
from tests.text.tokenizers_made import fast
from tests.text.tokenizers_synthetic import SYNTHETIC
from tokcache import CacheConfig

CONFIG = CacheConfig(engine="tokenizers", l0_max_entries=1)
MAX_SHARE = 0.05
SENTENCE = (
    "The quick brown fox jumps over 42 lazy dogs, don't ask why; e.g. (see below) left: it's 3.14!"
)


def _long_text() -> str:
    words = SENTENCE.split()
    rng, lines = random.Random(1), [""]
    while sum(map(len, lines)) < 8000:
        lines.append(" ".join(rng.choices(words, k=rng.randint(20, 60))) + ".\n")
    return "".join(lines)[:8000]


TEXT = _long_text()
AT = TEXT.index(" ", 4000)
EDITED = f"{TEXT[:AT]} Here is a sentence that was not there before.{TEXT[AT:]}"


def share_encoded_again(tokenizer: Any, right: Callable[[str], list[int]]) -> float:
    """Return the share of the edited text that the engine encodes; its ids are right."""
    wrapped: Any = tokcache.wrap(tokenizer, CONFIG)
    assert list(wrapped.token_ids(TEXT)) == right(TEXT)
    before = wrapped.cache_stats().l1.engine_chars
    assert list(wrapped.token_ids(EDITED)) == right(EDITED)
    n_chars: int = wrapped.cache_stats().l1.engine_chars - before
    return n_chars / len(EDITED)


def _of_file(tokenizer: Tokenizer) -> float:
    tokenizer.no_truncation()
    return share_encoded_again(tokenizer, lambda text: tokenizer.encode(text).ids)


# ---- real tokenizers


@pytest.mark.parametrize("name", ["phi-3-mini", "deepseek-v3", "olmo-1"])
def test_a_real_tokenizer_of_a_file(name: str, shared_data: Path) -> None:
    path = shared_data / "tokenizers" / name / "tokenizer.json"
    assert _of_file(Tokenizer.from_file(str(path))) <= MAX_SHARE


@pytest.mark.parametrize("name", ["phi-3-mini", "deepseek-v3"])
def test_a_real_tokenizer_by_auto_tokenizer(name: str, shared_data: Path) -> None:
    plain = _auto_tokenizer(shared_data / "tokenizers" / name)
    assert share_encoded_again(plain, lambda text: plain(text)["input_ids"]) <= MAX_SHARE


def _auto_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415 (seconds to import)

    load: Any = AutoTokenizer
    return load.from_pretrained(str(folder), local_files_only=True)


# ---- synthetic tokenizers


def _normalized(base: str, *parts: Any) -> Tokenizer:
    made = SYNTHETIC[base]()
    made.normalizer = normalizers.Sequence(list(parts))
    tokens = [AddedToken("<|tool|>"), AddedToken("  "), AddedToken("|||MAIL_ADDRESS|||")]
    made.add_tokens(tokens)  # normalized, as tokens are by default
    return made


def _marked(scheme: str) -> Tokenizer:
    made = SYNTHETIC["mistral"]()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return made


SYNTHETIC_ONES: dict[str, Callable[[], Tokenizer]] = {
    "like_deepseek_v3": lambda: _normalized("deepseek_v3"),
    "like_olmo_1": lambda: _normalized("gpt2", normalizers.NFC()),
    "lowercase": lambda: _normalized("qwen2", normalizers.Lowercase(), normalizers.NFC()),
    "nmt": lambda: _normalized("qwen2", normalizers.Nmt()),
    "bloom": SYNTHETIC["bloom"],
    "metaspace_first": SYNTHETIC["mistral"],
    "metaspace_always": lambda: _marked("always"),
    "metaspace_never": lambda: _marked("never"),
}


@pytest.mark.parametrize("name", SYNTHETIC_ONES)
def test_a_synthetic_tokenizer(name: str) -> None:
    assert _of_file(SYNTHETIC_ONES[name]()) <= MAX_SHARE


# ---- built by transformers


def _saved_llama(folder: Path, class_name: str, **settings: Any) -> Path:
    """Save a tokenizer as Llama's are: Prepend and Replace in the file, a class in the config."""
    SYNTHETIC["llama2"]().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": class_name, "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"unk_token": "<unk>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        ("first", {"legacy": False}),
        ("always", {"legacy": True}),
        ("never", {"legacy": False, "add_prefix_space": False}),
    ],
    ids=["first", "always", "never"],
)
def test_llama_2_as_transformers_builds_it(
    scheme: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    plain = _auto_tokenizer(_saved_llama(tmp_path, "LlamaTokenizer", **settings))
    stage = json.loads(plain.backend_tokenizer.to_str())["pre_tokenizer"]
    assert (stage["type"], stage["prepend_scheme"], stage["split"]) == ("Metaspace", scheme, False)
    assert share_encoded_again(plain, lambda text: plain(text)["input_ids"]) <= MAX_SHARE
    plain.add_tokens(["<tool>"])
    wrapped: Any = tokcache.wrap(plain, CONFIG)
    for text in histories(random.Random(1), ["<s>", "<tool>"], max_chars=1500, n_steps=20):
        assert wrapped(text)["input_ids"] == plain(text)["input_ids"]


def test_the_ids_of_code_llama_depend_on_the_calls_before(tmp_path: Path) -> None:
    """So its answers are not cached: a prompt with a gap to fill leaves another normalizer."""
    plain = _auto_tokenizer(_saved_llama(tmp_path, "CodeLlamaTokenizer"))
    wrapped: Any = tokcache.wrap(plain, CONFIG)
    before = plain(" hello")["input_ids"]
    assert wrapped(" hello")["input_ids"] == before
    gap = "def f(<FILL_ME>):"
    assert wrapped(gap)["input_ids"] == plain(gap)["input_ids"]
    after = plain(" hello")["input_ids"]
    assert after != before
    assert wrapped(" hello")["input_ids"] == after
    assert wrapped.cache_stats().bypasses["own_encode_plus"] >= 3


def test_a_fast_tokenizer_with_a_user_token_is_cut() -> None:
    plain = fast(SYNTHETIC_ONES["like_olmo_1"]())
    assert share_encoded_again(plain, lambda text: plain(text)["input_ids"]) <= MAX_SHARE


# ---- bad input


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["raw", "normalized"])
def test_thousands_of_added_tokens(normalizer: Any) -> None:
    made = SYNTHETIC["gpt2"]()
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_tokens([AddedToken(f"<|user_{at}|>", normalized=True) for at in range(4000)])
    assert _of_file(made) <= MAX_SHARE


@pytest.mark.parametrize("base", ["empty", "nothing"])
def test_an_empty_vocabulary_gives_the_ids_of_the_plain_tokenizer(base: str) -> None:
    from tokenizers.models import BPE, WordLevel  # noqa: PLC0415 (beside its only use)

    made = Tokenizer(BPE() if base == "empty" else WordLevel({}, unk_token="?"))  # noqa: S106
    made.normalizer = normalizers.NFC()
    made.add_tokens([AddedToken("a b"), AddedToken("x", single_word=True)])
    wrapped: Any = tokcache.wrap(made, CONFIG)
    for text in ("", "a b", "xa bx x", "x\na b"):
        try:
            right: Any = made.encode(text).ids
        except Exception as error:  # noqa: BLE001 (the library raises Exception)
            with pytest.raises(type(error)):
                wrapped.token_ids(text)
            continue
        assert list(wrapped.token_ids(text)) == right
