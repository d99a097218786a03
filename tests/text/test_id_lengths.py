"""The byte length of each id's text: correct for every text, or no table is built."""

from __future__ import annotations

import json
import random
import unicodedata
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import ByteLevel

import tokcache
from tests.text.fuzz_texts import random_text
from tests.text.implementations import REFERENCE
from tests.text.tokenizers_synthetic import SYNTHETIC, plain
from tokcache.config import CacheConfig
from tokcache.text.cuts.planner import plan_cuts
from tokcache.text.engines.components import BYTE_NAMES, MARKER
from tokcache.text.engines.copying import SegmentEncoder
from tokcache.text.engines.fast import agreed_code_points
from tokcache.text.segments import id_lengths as module
from tokcache.text.segments.id_lengths import id_lengths

WITH_LENGTHS = {"gpt2", "qwen2", "llama3", "o200k", "deepseek_v3", "falcon", "starcoder", "llama2"}
WITH_LENGTHS |= {"phi3", "gemma", "mistral"}


@pytest.fixture(params=["tokenizers", "gigatoken"])
def engine(request: pytest.FixtureRequest) -> str:
    """Return the name of an installed engine."""
    if request.param != "tokenizers":
        pytest.importorskip(request.param)
    return str(request.param)


def _encoders_and_lengths(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Any, Any]]:
    REFERENCE.use(monkeypatch)
    made = []
    for one in plan_cuts(tokenizer).variants:
        own = SegmentEncoder(tokenizer, one.normalizer, one.pre_tokenizer)
        made.append((own, id_lengths(own.tokenizer, one, {})))
    return made


@pytest.mark.parametrize("kind", SYNTHETIC)
def test_the_lengths_of_all_ids_add_up_to_the_bytes_of_the_text(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = plain(SYNTHETIC[kind])
    rng = random.Random(11)
    texts = [random_text(rng, ["<s>", "</s>"], n_chars=60) for _ in range(150)]
    texts += ["<0x41>", "\u2581", "a\u2581b", "e\u0301", "\u0439", "\uac00", "\u1100\u1161"]
    n_checked = 0
    for own, sizes in _encoders_and_lengths(tokenizer, monkeypatch):
        if sizes is None:
            continue
        for text in texts:
            if any("\ud800" <= char <= "\udfff" for char in text) or not sizes.encoded_bytes(text):
                continue
            (ids,) = own.encode([text])
            lengths = [sizes.of_id(index) for index in ids]
            if 0 in lengths:
                continue  # an added token that strips whitespace; no segment contains one
            if "<0x" in text and sum(lengths) < len(text.encode()):
                continue  # text that spells a byte token: the sum is too small, which is detected
            assert sum(lengths) == len(text.encode()), ascii(text)
            n_checked += 1
    assert n_checked > 50 or kind not in WITH_LENGTHS


def test_common_kinds_have_a_length_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert WITH_LENGTHS - set(SYNTHETIC) == set()
    for kind in WITH_LENGTHS:
        made = _encoders_and_lengths(plain(SYNTHETIC[kind]), monkeypatch)
        assert made[-1][1] is not None, kind


@pytest.mark.parametrize("has_marker", [True, False])
def test_without_a_token_for_the_marker_there_is_no_length_table(has_marker: bool) -> None:
    names = [f"<0x{byte:02X}>" for byte in range(256)] + ["a", "b", *["\u2581"] * has_marker]
    model = BPE({name: index for index, name in enumerate(names)}, [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = Replace(" ", "\u2581")
    (one,) = plan_cuts(tokenizer).variants
    own = SegmentEncoder(tokenizer, one.normalizer, one.pre_tokenizer).tokenizer
    assert (id_lengths(own, one, {}) is not None) == has_marker
    wrapped = tokcache.wrap(tokenizer, CacheConfig(engine="tokenizers"))
    for text in ("a b", " a b a", "\u2581a b", "b a " * 100):
        assert wrapped.token_ids(text).tolist() == tokenizer.encode(text).ids
    assert "segments_differ" not in wrapped.cache_stats().l1.refusals


def test_a_token_found_in_normalised_text_has_not_the_length_of_its_content(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`\u2581ab` stands for " ab", two bytes less."""
    tokenizer = _with_marked_token()
    own, sizes = _encoders_and_lengths(tokenizer, monkeypatch)[-1]
    index = tokenizer.token_to_id("\u2581ab")
    assert own.encode(["x ab"])[0][-1] == index
    assert sizes.of_id(index) == 0


def test_tokens_found_in_normalised_text_leave_the_segments_of_a_text_in_use() -> None:
    """With wrong lengths, the ids would not fit the segments: each text would be encoded whole."""
    tokenizer = _with_marked_token()
    wrapped = tokcache.wrap(tokenizer, CacheConfig(engine="tokenizers", l0_max_entries=1))
    for n in range(20):
        text = f"The dog {n} ab is late ab. " * 9
        assert wrapped.token_ids(text).tolist() == tokenizer.encode(text).ids
    assert "segments_differ" not in wrapped.cache_stats().l1.refusals
    assert wrapped.cache_stats().l1.segment_hits > 0


def _with_marked_token() -> Tokenizer:
    tokenizer: Tokenizer = SYNTHETIC["llama2"]()
    tokenizer.normalizer = Replace(" ", "\u2581")
    tokenizer.add_tokens([AddedToken("\u2581ab", normalized=True)])
    return tokenizer


@pytest.mark.parametrize("has_all_merges", [True, False])
def test_merges_that_spell_a_byte_token_allow_no_length_table(has_all_merges: bool) -> None:
    names = [f"<0x{byte:02X}>" for byte in range(256)] + [*"<0x41>ab", "\u2581"]
    merges, made = [], "<"
    for char in "0x41>"[: 5 if has_all_merges else 4]:
        merges.append((made, char))
        made += char
        names.append(made)
    names = list(dict.fromkeys(names))
    model = BPE({name: index for index, name in enumerate(names)}, merges, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = Replace(" ", "\u2581")
    spelled = tokenizer.token_to_id("<0x41>")
    assert (tokenizer.encode("<0x41>").ids == [spelled]) == has_all_merges
    (one,) = plan_cuts(tokenizer).variants
    own = SegmentEncoder(tokenizer, one.normalizer, one.pre_tokenizer).tokenizer
    assert id_lengths(own, one, {}) is None
    wrapped = tokcache.wrap(tokenizer, CacheConfig(engine="tokenizers", l0_max_entries=1))
    for n in range(40):
        text = f"{'a ' * n}<0x41> b{' <0x41>' * n} ab{' b' * n}"
        assert wrapped.token_ids(text).tolist() == tokenizer.encode(text).ids
    assert "segments_differ" not in wrapped.cache_stats().l1.refusals


def test_ids_are_correct_if_a_byte_token_takes_part_in_merges() -> None:
    names = [*BYTE_NAMES, "a", "b", MARKER, "a<0x5F>", "<0x5F>b"]
    merges = [("a", "<0x5F>"), ("<0x5F>", "b")]
    model = BPE({name: index for index, name in enumerate(names)}, merges, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = Replace(" ", MARKER)
    assert tokenizer.encode("a_").tokens == ["a<0x5F>"]
    wrapped = tokcache.wrap(tokenizer, CacheConfig(engine="tokenizers", l0_max_entries=1))
    for n in range(40):
        text = f"{'a ' * n}a_  b{' _b' * n} ab{' b' * n}a_ "
        assert wrapped.token_ids(text).tolist() == tokenizer.encode(text).ids
    assert "segments_differ" not in wrapped.cache_stats().l1.refusals


def test_ids_are_correct_if_two_tokens_share_an_id(engine: str) -> None:
    bytes_of_gpt2 = {char: index for index, char in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary = bytes_of_gpt2 | {"bc": bytes_of_gpt2["x"], "gg": bytes_of_gpt2["z"]}
    for _ in range(40):  # in each model, a random one of the two tokens has the id
        tokenizer = Tokenizer(BPE(vocabulary, [("b", "c"), ("g", "g")]))
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        wrapped = tokcache.wrap(tokenizer, CacheConfig(engine=engine, l0_max_entries=1))
        for text in ("gg x", " x k", "bc z", " z gg", "x bc gg z", " gg x k"):
            assert wrapped.token_ids(text).tolist() == tokenizer.encode(text).ids
        assert "segments_differ" not in wrapped.cache_stats().l1.refusals


def test_a_vocabulary_with_large_gaps_keeps_the_engine(engine: str) -> None:
    vocabulary = {char: index for index, char in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocabulary | {"ab": 5000}, [("a", "b")]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    wrapped: Any = tokcache.wrap(tokenizer, CacheConfig(engine=engine, l0_max_entries=1))
    engine = wrapped._tokcache.l1.engine
    for text in ("ab cd ab ef", "ab cd " * 300, "ef ab" * 100):
        assert wrapped.token_ids(text).tolist() == tokenizer.encode(text).ids
    assert wrapped.cache_stats().l1.refusals == {}
    assert wrapped._tokcache.l1.engine == engine


def test_the_engines_vocabulary_is_used_if_a_sample_of_it_is_correct(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    REFERENCE.use(monkeypatch)
    tokenizer = plain(SYNTHETIC["gpt2"])
    (one,) = plan_cuts(tokenizer).variants
    own = SegmentEncoder(tokenizer, one.normalizer, one.pre_tokenizer).tokenizer
    alphabet = {char: bytes([byte]) for byte, char in _byte_names().items()}
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.get_added_tokens_decoder()
    known = {
        index: name.encode() if index in added else b"".join(alphabet[char] for char in name)
        for index, name in names.items()
    }
    sizes: Any = id_lengths(own, one, known)
    asked: Any = id_lengths(own, one, {})
    assert sizes._known == {index: asked.of_id(index) for index in range(max(known) + 1)}
    wrong: Any = id_lengths(own, one, {index: name + b"x" for index, name in known.items()})
    assert wrong._known == {}


def _byte_names() -> dict[int, str]:
    """Return the character that represents each byte in GPT-2's vocabulary."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    names = {byte: chr(byte) for byte in visible}
    others = [byte for byte in range(256) if byte not in names]
    return names | {byte: chr(0x100 + place) for place, byte in enumerate(others)}


def test_characters_marked_unchanged_by_nfc_are_unchanged() -> None:
    seconds = {
        int(found.split()[1], 16)
        for point in range(0x110000)
        if (found := unicodedata.decomposition(chr(point)))
        and found[0] != "<"
        and len(found.split()) == 2
    }
    seconds |= {*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}
    unchanged = module._unchanged_by_nfc(REFERENCE.l1.CodePoints)
    assert unchanged.cover("".join(map(chr, range(256))))
    points = {point for point in range(256, 0x110000) if unchanged.cover(chr(point))}
    agreed = {p for first, last in agreed_code_points() for p in range(first, last + 1)}
    assert points <= agreed
    assert not points & seconds
    assert all(unicodedata.is_normalized("NFC", chr(point)) for point in points)
    assert not any(unicodedata.combining(chr(point)) for point in points)
    assert {0x439, 0x4E00, 0xAC00, 0x1F600, 0x2026} <= points


def test_very_long_tokens_keep_the_engine(engine: str) -> None:
    tokenizer = plain(SYNTHETIC["gpt2"])
    state = json.loads(tokenizer.to_str())
    model, length = state["model"], 1
    dash = "-"
    while length < 2**17:  # a token of dashes for every power of two
        model["vocab"].setdefault(dash * 2 * length, len(model["vocab"]))
        model["merges"].append([dash * length, dash * length])
        length *= 2
    for one in state["added_tokens"]:
        one["id"] += 10_000
    tokenizer = Tokenizer.from_str(json.dumps(state))
    wrapped: Any = tokcache.wrap(tokenizer, CacheConfig(engine=engine, l0_max_entries=1))
    assert wrapped._tokcache.l1.engine == engine
    rng = random.Random(4)
    for n in range(12):
        runs = [dash * rng.choice([1, 300, 1024, 2**16 + 9, 2**17 + 9]) for _ in range(3)]
        text = f"alpha {runs[0]} beta {n} gamma {runs[1]} delta <s> epsilon {runs[2]} zeta {n}"
        assert wrapped.token_ids(text).tolist() == tokenizer.encode(text).ids
    words = "".join(f"line {n:06d} of many\n" for n in range(10_000))  # several texts in one call
    text = f"alpha{dash * (2**16 + 9)} beta {words}"
    assert wrapped.token_ids(text).tolist() == tokenizer.encode(text).ids
    assert wrapped.cache_stats().l1.refusals.keys() <= {"no_cut"}
    assert wrapped._tokcache.l1.engine == engine
