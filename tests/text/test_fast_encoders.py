"""The fast encoders: each is proven equal to tokenizers on the agreed characters, or refused."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import unicodedata
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

import tokcache
from tests.text.tokenizers_made import MADE
from tests.text.tokenizers_synthetic import SYNTHETIC, plain
from tokcache.config import CacheConfig
from tokcache.errors import FastEncoderUnavailable
from tokcache.text.engines import fast as fast_encoders
from tokcache.text.engines.fast import (
    FastEncoder,
    agreed_code_points,
    build,
    installed,
    is_agreed,
    probe_texts,
    prove,
)

NAMES = ("gigatoken", "fastokens")
SUPPORTED = ("gpt2", "minimind", "phi-3-mini", "qwen2.5")
UNSUPPORTED = ("bert-base-uncased", "t5-small")
SEPARATOR = "\U000f0000" + "5eba7a70c0ffee42"
FLAGS = ("lstrip", "rstrip", "normalized")


def require_installed(name: str) -> None:
    if name not in installed():
        pytest.skip(f"{name} is not installed")


@cache
def load_real(path: Path) -> Tokenizer:
    made = Tokenizer.from_file(str(path / "tokenizer.json"))
    made.no_truncation()
    made.no_padding()
    made.add_special_tokens([AddedToken(SEPARATOR, normalized=False)])
    return made


@cache
def build_real(name: str, path: Path) -> FastEncoder:
    return build(name, load_real(path).to_str())


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


class FixedEncoder:
    """An encoder whose ids a given function returns."""

    name = "fixed"
    holds_lock = True
    is_fork_safe = True

    def __init__(self, answer: Callable[[str], list[int]]) -> None:
        self._answer = answer

    def encode(self, texts: Sequence[str]) -> list[Any]:
        return [memoryview(array("I", self._answer(text))) for text in texts]

    def vocabulary(self) -> dict[int, bytes]:
        return {}


@pytest.mark.parametrize("tokenizer", SUPPORTED)
@pytest.mark.parametrize("name", NAMES)
def test_a_supported_real_tokenizer_passes_the_proof(
    name: str, tokenizer: str, shared_data: Path
) -> None:
    require_installed(name)
    path = shared_data / "tokenizers" / tokenizer
    reference = load_real(path)
    assert prove(build_real(name, path), reference, probe_texts(reference)) is None


@pytest.mark.parametrize("tokenizer", SUPPORTED)
@pytest.mark.parametrize("name", NAMES)
def test_random_texts_of_agreed_characters_encode_alike(
    name: str, tokenizer: str, shared_data: Path
) -> None:
    require_installed(name)
    path = shared_data / "tokenizers" / tokenizer
    reference, encoder = load_real(path), build_real(name, path)
    for text in random_texts(reference, n_texts=1500):
        assert encoder.encode([text])[0].tolist() == plain_ids(reference, text), ascii(text)


def random_texts(tokenizer: Tokenizer, n_texts: int) -> list[str]:
    chance = random.Random(6)
    ranges = agreed_code_points()
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    fixed = [" ", " ", "\n", "\r\n", "\t", "'s", "'LL", "e\u0301", "12345", "--", "Word", " word"]

    def piece() -> str:
        kind = chance.random()
        if kind < 0.1:
            return chance.choice([*added, SEPARATOR])
        if kind < 0.5:
            return chance.choice(fixed)
        return "".join(chr(chance.randint(*chance.choice(ranges))) for _ in range(3))

    return ["".join(piece() for _ in range(chance.randint(1, 9))) for _ in range(n_texts)]


@pytest.mark.parametrize("tokenizer", UNSUPPORTED)
@pytest.mark.parametrize("name", NAMES)
def test_an_unsupported_tokenizer_is_refused(name: str, tokenizer: str, shared_data: Path) -> None:
    require_installed(name)
    with pytest.raises(FastEncoderUnavailable, match=f"^{name} can't .*nsupported") as caught:
        build(name, load_real(shared_data / "tokenizers" / tokenizer).to_str())
    assert "\n" not in caught.value.reason


@pytest.mark.parametrize("name", NAMES)
def test_an_invalid_tokenizer_json_is_refused(name: str) -> None:
    require_installed(name)
    for text in ("", "{", "{}", "[]", '{"model": {"type": "BPE"}}'):
        with pytest.raises(FastEncoderUnavailable):
            build(name, text)


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(FastEncoderUnavailable, match="known are gigatoken, fastokens"):
        build("slowtoken", "{}")


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_that_is_not_installed_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_module_not_found(module: str) -> Any:
        raise ModuleNotFoundError(module)

    monkeypatch.setattr(importlib, "import_module", raise_module_not_found)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert installed() == []
    with pytest.raises(FastEncoderUnavailable, match="not installed"):
        build(name, "{}")


def test_installed_lists_the_fastest_encoder_first() -> None:
    assert installed() == [name for name in NAMES if name in installed()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", list(MADE))
def test_unsupported_components_are_refused_by_build_or_by_the_proof(name: str, kind: str) -> None:
    require_installed(name)
    reference = MADE[kind]()
    try:
        encoder = build(name, reference.to_str())
    except FastEncoderUnavailable:
        return
    assert prove(encoder, reference, probe_texts(reference)) is not None


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_with_another_pre_tokenizer_fails_the_proof(name: str) -> None:
    require_installed(name)
    reference = without_single_words(MADE["byte_level_bpe"]())
    encoder = build(name, reference.to_str())
    state = json.loads(reference.to_str())
    split = {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated"}
    parts = [{**split, "invert": False}, {**state["pre_tokenizer"], "use_regex": False}]
    for use_regex, reason in ((True, "splits again"), (False, " in tokenizers")):
        parts[1]["use_regex"] = use_regex
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
        other = Tokenizer.from_str(json.dumps(state))
        assert reason in (prove(encoder, other, probe_texts(other)) or "")


@pytest.mark.parametrize("name", NAMES)
def test_a_pattern_that_is_not_known_is_left_to_tokenizers(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    # fastokens passes the proof with this pattern, and gives other ids for "1ésa.".
    require_installed(name)
    tokenizer = SYNTHETIC["qwen2"]()
    tokenizer.normalizer = None
    pattern = r"\p{N}+(?:(?:\s){2}?[\p{L}&&[^\p{Han}]]{2,}\B)"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "merged_with_previous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    wrapped = tokcache.wrap(tokenizer, CacheConfig(engine=name))
    assert wrapped.token_ids("1\xe9sa.").tolist() == tokenizer.encode("1\xe9sa.").ids
    assert "is not a known one; use tokenizers" in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_encoders_add_no_special_tokens_and_do_not_truncate_or_pad(name: str) -> None:
    require_installed(name)
    reference = without_single_words(MADE["byte_level_bpe"]())
    assert reference.post_processor is not None
    cut = Tokenizer.from_str(reference.to_str())
    cut.enable_truncation(2)
    cut.enable_padding(length=50)
    encoder = build(name, cut.to_str())
    for text in ("", "hello world, a longer text than two tokens"):
        assert encoder.encode([text])[0].tolist() == plain_ids(reference, text)


def without_single_words(tokenizer: Tokenizer) -> Tokenizer:
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["single_word"]]
    return Tokenizer.from_str(json.dumps(state))


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_a_contiguous_buffer_of_uint32(name: str) -> None:
    require_installed(name)
    reference = without_single_words(MADE["byte_level_bpe"]())
    ids = memoryview(build(name, reference.to_str()).encode(["hello world"])[0])  # type: ignore[arg-type]
    assert (ids.format, ids.itemsize, ids.ndim, ids.contiguous) == ("I", 4, 1, True)


def test_gigatoken_is_rebuilt_after_much_text_to_bound_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_installed("gigatoken")
    monkeypatch.setattr(fast_encoders, "GIGATOKEN_MAX_CHARS", 100)
    reference = without_single_words(MADE["byte_level_bpe"]())
    encoder = build("gigatoken", reference.to_str())
    texts = [f"hello world {i}" for i in range(30)]
    first = encoder._encode  # type: ignore[attr-defined]
    found = [ids.tolist() for ids in encoder.encode(texts)]
    assert found == [plain_ids(reference, text) for text in texts]
    assert encoder._encode.__self__ is not first.__self__  # type: ignore[attr-defined]


def test_a_fork_safe_encoder_works_in_a_child() -> None:
    require_installed("gigatoken")
    reference = without_single_words(MADE["byte_level_bpe"]())
    encoder = build("gigatoken", reference.to_str())
    assert encoder.is_fork_safe
    wanted = encoder.encode(["hello world"])[0].tolist()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if encoder.encode(["hello world"])[0].tolist() == wanted else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_proof_reports_the_first_difference() -> None:
    reference = MADE["word_level"]()
    wrong = FixedEncoder(lambda text: [7] if text == "world" else plain_ids(reference, text))
    assert prove(wrong, reference, ["hello", ""]) is None
    found = prove(wrong, reference, ["hello", "world", "hello world"])
    assert found == "'world' is [7] in fixed, [2] in tokenizers"


def test_the_proof_reports_a_panic_and_passes_an_interrupt_on() -> None:
    class PanicError(BaseException):
        pass

    def fail(error: BaseException) -> Callable[[str], list[int]]:
        def answer(_text: str) -> list[int]:
            raise error

        return answer

    reference = MADE["word_level"]()
    found = prove(FixedEncoder(fail(PanicError("index out of bounds"))), reference, ["hello"])
    assert found == "'hello' is an error (index out of bounds) in fixed, [1] in tokenizers"
    with pytest.raises(KeyboardInterrupt):
        prove(FixedEncoder(fail(KeyboardInterrupt())), reference, ["hello"])


@pytest.mark.parametrize(
    ("content", "text"), [("\u2260", "=\u0338"), ("\u03a9", "\u2126"), ("\u212b", "A\u030a")]
)
def test_an_added_token_that_nfc_can_produce_fails_the_proof(content: str, text: str) -> None:
    tokenizer = plain(SYNTHETIC["qwen2"])
    assert b"NFC" in tokenizer.normalizer.__getstate__()
    reason = "a normalizer may make an added token of other characters"
    fixed = FixedEncoder(lambda _text: [])
    assert prove(fixed, tokenizer, []) is None
    tokenizer.add_tokens([AddedToken(content, normalized=False, special=False)])
    assert prove(fixed, tokenizer, []) == reason
    wrapped = tokcache.wrap(tokenizer, CacheConfig(engine="auto"))
    assert wrapped.token_ids(f"a {text} b").tolist() == tokenizer.encode(f"a {text} b").ids


@pytest.mark.parametrize("kind", list(MADE))
def test_probe_texts_are_short_and_contain_every_kind_of_added_token(kind: str) -> None:
    tokenizer = MADE[kind]()
    tokenizer.add_special_tokens([AddedToken(SEPARATOR, normalized=False)])
    texts = probe_texts(tokenizer)
    assert 50 < len(texts) < 550
    assert max(map(len, texts)) < 1000
    assert sum(not is_agreed(text.replace(SEPARATOR.upper(), "")) for text in texts) < 40
    added = tokenizer.get_added_tokens_decoder().values()
    for flag in FLAGS:
        of_kind = [token.content for token in added if getattr(token, flag)]
        assert not of_kind or any(f"a{content}b" in text for text in texts for content in of_kind)
    assert any(SEPARATOR in text for text in texts)


def test_all_sample_texts_consist_of_agreed_characters() -> None:
    assert [text for text in fast_encoders._SAMPLES if not is_agreed(text)] == []


def test_agreed_ranges_are_sorted_and_disjoint() -> None:
    ranges = agreed_code_points()
    assert all(first <= last for first, last in ranges)
    assert all(last < first for (_, last), (first, _) in pairwise(ranges))


def test_unchanged_code_points_have_equal_properties_in_old_and_new_unicode() -> None:
    old = unicodedata.ucd_3_2_0
    for first, last in fast_encoders._UNCHANGED:
        for char in map(chr, range(first, last + 1)):
            assert unicodedata.category(char) == old.category(char) != "Cn", ascii(char)
            assert unicodedata.combining(char) == old.combining(char), ascii(char)


def test_settled_code_points_are_symbols_numbers_or_uncombining_letters() -> None:
    for first, last in fast_encoders._SETTLED:
        for char in map(chr, range(first, last + 1)):
            assert unicodedata.category(char) in {"So", "Sk", "Sm", "No", "Po", "Lo"}, ascii(char)
            assert unicodedata.combining(char) == 0, ascii(char)
            assert unicodedata.is_normalized("NFC", char), ascii(char)


def test_characters_that_differ_between_unicode_versions_are_not_agreed() -> None:
    for text in (
        "\u0614\u1dfa",
        "\u08d1\u094d",
        "\u0cdc<E",
        "\ud800",
        "\u180e",
        "\u200b",
        "\u017f",
    ):
        assert not is_agreed(text), ascii(text)
    assert is_agreed("")
    assert is_agreed("It\u2019s 5 \u20ac \u2014 \u6771\u4eac \u2705\r\n\t")
