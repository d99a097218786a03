"""Tokenizers and texts for which segments once gave other ids than the tokenizer."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken as Added
from tokenizers import Regex, Tokenizer, models
from tokenizers import normalizers as norm
from tokenizers import pre_tokenizers as pre

import tokcache
from tests.text.tokenizers_synthetic import PATTERNS, SYNTHETIC
from tokcache.text.cuts.planner import plan_cuts

WORDS = ["[UNK]", *"ab=1, \u2260\u2581\u0120`'\"", "new", "york", "cafe", "au", "lait", "foo"]


def words(normalizer: Any, pre_tokenizer: Any, *tokens: Added) -> Tokenizer:
    """Return a tokenizer of whole words, so that the ids show every wrong boundary."""
    ids = {word: index for index, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))  # noqa: S106 (no password)
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizer
    made.add_tokens(list(tokens))
    return made


def single_characters(*tokens: Added, normalizer: Any = None) -> Tokenizer:
    """Return BPE of single characters, without a pre-tokenizer and without merges."""
    ids = {word: index for index, word in enumerate(dict.fromkeys("".join(WORDS)))}
    made = Tokenizer(models.BPE(vocab=ids, merges=[]))
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_tokens(list(tokens))
    return made


def merging(*merges: tuple[str, str], normalizer: Any = None, without: str = "") -> Tokenizer:
    """Return BPE over visible ASCII and a few other letters, with these merges only."""
    letters = [*map(chr, range(0x20, 0x7F)), "\n", "\xe9", "\u2260", *BYTES]
    tokens = [one for one in letters if one != without]
    tokens += [left + right for left, right in merges]
    made = Tokenizer(
        models.BPE({one: at for at, one in enumerate(tokens)}, list(merges), byte_fallback=True)
    )
    if normalizer is not None:
        made.normalizer = normalizer
    return made


def two_tokens_with_one_id() -> Tokenizer:
    """Return BPE in which `!` has the id of `a`, so that it merges as `a` does."""
    ids = {chr(point): point for point in range(0x20, 0x7F)} | {"a_": 200}
    return Tokenizer(models.BPE(ids | {"!": ids["a"]}, [("a", "_")]))


def deepseek_alone() -> Tokenizer:
    """Return byte-level BPE with DeepSeek's last Split but without its Splits before that."""
    made = SYNTHETIC["deepseek_v3"]()
    made.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(PATTERNS["deepseek_v3"]), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return made


def special_before() -> Tokenizer:
    """Return a tokenizer that re-adds a special token as an ordinary one, which is ignored."""
    made = gpt2()
    made.encode_special_tokens = True
    made.add_special_tokens([f"<{at}>" for at in range(200)])
    made.add_tokens([Added("<1>", normalized=False)])
    return made


def with_gaps(*tokens: Added) -> Tokenizer:
    """Return a tokenizer of whole words, one of which has the id of the next added token."""
    n_ids = len(WORDS) + 1 + len(tokens)
    ids = {word: at for at, word in enumerate(WORDS)} | {"lot": n_ids}
    made = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))  # noqa: S106 (no password)
    made.pre_tokenizer = pre.Whitespace()
    made.add_tokens(list(tokens))
    return made


def spaced_and_stripped() -> Tokenizer:
    """Return a tokenizer that pads Chinese letters with spaces and then strips the text."""
    ids = {one: at for at, one in enumerate(["?", "a", "\u2581", "\u2581a", "\u2581\u4f60"])}
    made = Tokenizer(models.WordLevel(ids, unk_token="?"))  # noqa: S106 (no password)
    made.normalizer = norm.Sequence([norm.BertNormalizer(), norm.Strip()])
    made.pre_tokenizer = pre.Metaspace(prepend_scheme="first")
    return made


def raw(content: str, **flags: bool) -> Added:
    return Added(content, normalized=False, **flags)


def gpt2(*tokens: Added) -> Tokenizer:
    return words(None, pre.ByteLevel(add_prefix_space=False), *tokens)


BERT = norm.BertNormalizer(), pre.BertPreTokenizer()
BYTES_THEN_WHITESPACE = pre.Sequence(
    [pre.ByteLevel(add_prefix_space=False, use_regex=False), pre.WhitespaceSplit()]
)
NEWLINE_TOKEN = raw("\n", lstrip=True, rstrip=True)
TWO_QUOTES_BECOME_ONE = norm.Sequence([norm.Replace("``", '"'), norm.Replace("''", '"')])
RUNS_BECOME_MARKERS = norm.Replace(Regex(" {2,}"), "\u2581")

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
RUNS_BECOME_ONE_SPACE = norm.Replace(Regex(" {2,}"), " ")

CASES: dict[str, tuple[Tokenizer, list[str]]] = {
    "other whitespace": (words(*BERT, Added("new york")), ["new\nyork", "a new\tyork b"]),
    "an accent": (words(*BERT, Added("cafe au")), ["caf\u00e9 au lait"]),
    "a composed letter": (words(norm.NFC(), pre.Digits(), Added("1\u00e9")), ["1e\u0301", "1e"]),
    "composed punctuation": (words(norm.NFC(), pre.Punctuation()), ["a=\u0338b", "a=b"]),
    "composed punctuation, Bert": (
        words(norm.NFKC(), pre.BertPreTokenizer()),
        ["a=\u0338b", "a=b"],
    ),
    "lstrip next to a token that ends with a space": (
        gpt2(Added("foo "), raw("<mask>", lstrip=True)),
        ["foo <mask>", "a foo <mask> b"],
    ),
    "rstrip next to a token that begins with a space": (
        gpt2(Added(" foo"), raw("<x>", rstrip=True)),
        ["<x> foo", "a<x> foo b"],
    ),
    "whitespace hidden by ByteLevel": (words(None, BYTES_THEN_WHITESPACE), ["a b, 1", "a  b"]),
    "a run of spaces that becomes a marker": (
        words(RUNS_BECOME_MARKERS, pre.WhitespaceSplit()),
        ["a  b", "a b"],
    ),
    "two characters that become one": (
        single_characters(normalizer=TWO_QUOTES_BECOME_ONE),
        ["a``b''a", "a`b'a"],
    ),
    "a newline token that strips newlines": (gpt2(NEWLINE_TOKEN), ["a\n\nb", "a\n\n\nb"]),
    "rstrip before a token of whitespace": (
        gpt2(raw("<sep>", rstrip=True), raw("\n\n", lstrip=True)),
        ["<sep>\n\na", "a<sep>\n\nb"],
    ),
    "single_word next to another added token": (
        gpt2(Added("ab"), Added("tt", single_word=True)),
        ["abtt", "foo abtt a", "ttab"],
    ),
    "single_word that is a newline": (
        words(None, pre.WhitespaceSplit(), Added("\n", single_word=True)),
        ["a  \nnew york", "a \n a"],
    ),
    "a run of spaces that becomes one space": (
        merging(normalizer=RUNS_BECOME_ONE_SPACE),
        ["a  b", "a   b"],
    ),
    "composed punctuation that merges": (
        merging(("'", "\u2260"), normalizer=norm.NFC()),
        ["a'=\u0338b", "a'=b"],
    ),
    "a composed letter that merges": (
        merging((".", "\xe9"), normalizer=norm.NFKC()),
        ["a.e\u0301b", ".e"],
    ),
    "a byte token that merges": (merging(("a", "<0x5F>"), without="_"), ["a_b", "xa_"]),
    "two tokens with one id": (two_tokens_with_one_id(), ["b!_b", "a_"]),
    "a word that begins with a digit": (deepseek_alone(), ["12abc", "x 1world 2the", "1the"]),
    "a token that was special before": (special_before(), ["a<1>b", "<1>"]),
    "a token that contains the first character of a separator": (
        with_gaps(raw(",\x1c")),
        ["a, lot b, a"],
    ),
    "tokens that contain each first character of a separator": (
        with_gaps(*(raw(f"a{edge}") for edge in "\x1c\x1d\x1e\x1f")),
        ["a, lot b, a", "a\x1c lot, a"],
    ),
    "a space that is added after a letter and stripped": (
        spaced_and_stripped(),
        ["a \u4f60 \u4f60 a", "\u4f60 a"],
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("before", ["", "a b ", "foo, 1 = 1 " * 60])
def test_each_case_gets_the_ids_of_the_tokenizer(case: str, before: str) -> None:
    tokenizer, texts = CASES[case]
    cached = tokcache.wrap(tokenizer, tokcache.CacheConfig(engine="tokenizers"))
    for text in texts:
        for whole in (before + text, before + text + " foo"):
            for _ in range(2):
                assert (
                    cached.token_ids(whole, add_special_tokens=False)
                    == tokenizer.encode(whole, add_special_tokens=False).ids
                )


def test_a_tokenizer_that_panics_on_a_probe_text_can_be_wrapped() -> None:
    tokenizer = gpt2(raw("ab", rstrip=True), raw(" ", lstrip=True))
    cached = tokcache.wrap(tokenizer)
    assert (
        cached.token_ids("foo", add_special_tokens=False)
        == tokenizer.encode("foo", add_special_tokens=False).ids
    )


def test_a_very_long_added_token_turns_l1_off() -> None:
    tokenizer = gpt2(raw("a" * 5000 + "b"))
    cached = tokcache.wrap(tokenizer)
    assert (
        cached.token_ids("a" * 9000, add_special_tokens=False) == tokenizer.encode("a" * 9000).ids
    )
    l1 = cached._tokcache.l1
    assert l1 is not None
    assert l1.off == "long_added_token"


def test_added_tokens_that_are_equal_after_normalization_get_correct_ids() -> None:
    """The order of a hash map decides, per copy of the tokenizer, which of the two is found."""
    for _ in range(12):
        tokenizer = words(norm.Lowercase(), pre.WhitespaceSplit(), Added("Ba"), Added("BA"))
        cached = tokcache.wrap(tokenizer, tokcache.CacheConfig(engine="tokenizers"))
        assert (
            cached.token_ids("a ba 1", add_special_tokens=False) == tokenizer.encode("a ba 1").ids
        )


def test_a_character_map_that_turns_whitespace_into_letters_allows_no_wrong_cut(
    shared_data: Path,
) -> None:
    file = shared_data / "tokenizers" / "t5-small" / "tokenizer.json"
    charsmap = base64.b64decode(json.loads(file.read_text())["normalizer"]["precompiled_charsmap"])
    charsmap = charsmap.replace(b"\0 \0", b"\0x\0")  # the string that tabs and newlines become
    state = json.loads(words(None, pre.WhitespaceSplit()).to_str())
    state["normalizer"] = {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(charsmap).decode(),
    }
    tokenizer = Tokenizer.from_str(json.dumps(state))
    cached = tokcache.wrap(tokenizer, tokcache.CacheConfig(engine="tokenizers"))
    assert tokenizer.normalizer.normalize_str("a\tb") == "axb"
    for text in ("a\tb", "a\nb 1", "new\tyork"):
        assert cached.token_ids(text, add_special_tokens=False) == tokenizer.encode(text).ids


ASCII = {chr(point): point for point in range(128)}

FAST: dict[str, tuple[Tokenizer, list[str]]] = {
    "dropped unknown characters": (
        Tokenizer(models.BPE(ASCII | {"_=": 128}, [("_", "=")], fuse_unk=True)),
        ["_\xa0=", "a _\u4f60= ab", "_="],
    ),
    "a byte token that merges": (
        merging(("a", "<0x5F>"), ("<0x5F>", "b"), ("\n", "<0x5F>"), without="_"),
        ["a_b", "xa_ b_b", "_b a\n_"],
    ),
}


@pytest.mark.parametrize("engine", ["gigatoken", "fastokens"])
@pytest.mark.parametrize("case", FAST)
def test_fast_encoders_that_fail_the_proof_are_not_used(case: str, engine: Any) -> None:
    pytest.importorskip(engine, reason=f"{engine} is not installed")
    tokenizer, texts = FAST[case]
    cached = tokcache.wrap(tokenizer, tokcache.CacheConfig(engine=engine, l0_max_entries=1))
    for text in texts:
        for whole in (text, "b a " * 90 + text):
            assert cached.token_ids(whole, add_special_tokens=False) == tokenizer.encode(whole).ids
    l1 = cached._tokcache.l1
    assert l1 is not None
    assert l1.engine == "tokenizers"


def test_a_separator_is_found_for_a_vocabulary_with_gaps() -> None:
    cached = tokcache.wrap(with_gaps(), tokcache.CacheConfig(engine="tokenizers"))
    assert len(cached.token_ids("a lot, b foo " * 90, add_special_tokens=False)) == 450
    assert "segments_differ" not in cached.cache_stats().l1.refusals


@pytest.mark.parametrize(
    "contents",
    [
        {"".join(chr(97 + (at >> bit & 1)) for bit in range(14)) for at in range(4000)},
        {f"{at}{'x' * 240}" for at in range(1000)},
        {"x" * at for at in range(1, 257)},
    ],
    ids=["alike", "long", "nested"],
)
def test_planning_with_many_added_tokens_is_fast(contents: set[str]) -> None:
    one_phase = gpt2(*map(raw, contents))
    both = gpt2(*(Added(one, normalized=at % 2 == 0) for at, one in enumerate(contents)))
    start = time.process_time()
    plan_cuts(one_phase)
    plan_cuts(both)
    assert time.process_time() - start < 3  # comparing all pairs takes several times as long
