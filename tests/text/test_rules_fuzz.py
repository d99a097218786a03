"""Fuzz of the rules in `fuzz_rules`, and its controls: a rule that is weakened is found by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers

import tokcache
from tests.text.fuzz_rules import Focus, Found, compare, merging
from tests.text.tokenizers_synthetic import SYNTHETIC
from tokcache.text.cuts import affixes, planner, second_phase, vocabulary

N_COMPARISONS = 12_000
MAX_DRAWS = 400

_unsafe_pairs = second_phase.unsafe_pairs
Weaken = Callable[[pytest.MonkeyPatch], None]


def test_random_tokenizers_give_correct_ids() -> None:
    found, at = Found(), 0
    while found.n_comparisons < N_COMPARISONS:
        compare(f"suite {at}", found)
        at += 1
    assert found.wrong == []
    assert found.n_with_cuts > found.n_tokenizers // 2
    assert found.n_second_phase > found.n_tokenizers // 4


def test_a_fast_engine_is_not_used_for_tokens_in_normalised_text() -> None:
    """Both fast ones find the `K` of the raw text, which NFC joins to the mark after it."""
    made = SYNTHETIC["gpt2"]()
    made.normalizer = normalizers.NFC()
    made.add_tokens([AddedToken("K", normalized=True)])
    wrapped: Any = tokcache.wrap(made)
    for text in ("aK\u0301b", "K K\u0301 b " * 30):
        assert list(wrapped.token_ids(text)) == made.encode(text).ids
    assert wrapped._tokcache.l1.engine == "tokenizers"


# ---- controls


def _without_flag(flag: str) -> Weaken:
    """Make the planner believe that no token of the second phase has this flag."""

    def unsafe_pairs(tokens: list[Any], *more: Any) -> Any:
        flags = ("lstrip", "rstrip", "single_word")
        seen = [
            SimpleNamespace(**{name: name != flag and getattr(one, name) for name in flags})
            for one in tokens
        ]
        return _unsafe_pairs(seen, *more)

    return lambda patch: patch.setattr(planner, "unsafe_pairs", unsafe_pairs)


def _without_pairs(patch: pytest.MonkeyPatch) -> None:
    """Make the planner believe that every token of the second phase is one character."""

    def unsafe_pairs(tokens: list[Any], contents: list[str], reading: Any) -> Any:
        ends = [(token, one[at]) for token, one in zip(tokens, contents, strict=True) if one
                for at in (0, -1)]  # fmt: skip
        return _unsafe_pairs([token for token, _ in ends], [char for _, char in ends], reading)

    patch.setattr(planner, "unsafe_pairs", unsafe_pairs)


def _read_as(**facts: Any) -> Weaken:
    """Make the planner read the normalizer with other facts where it judges added tokens."""
    return lambda patch: patch.setattr(
        planner,
        "unsafe_pairs",
        lambda tokens, contents, reading: _unsafe_pairs(
            tokens, contents, replace(reading, **facts)
        ),
    )


def _nothing(name: str, value: Any) -> Weaken:
    return lambda patch: patch.setattr(planner, name, lambda *_, **__: value)


def _is(*parts: Any) -> Callable[[Any], list[Any]]:
    """Return a draw of the same components each time."""
    return lambda _: list(parts)


def _unsplit(scheme: str) -> Callable[[Any], list[Any]]:
    return lambda _: [pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)]


_BERT = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
_UNACCENTED = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
_BYTES = _is(pre_tokenizers.ByteLevel(add_prefix_space=False))
_WORDS = _is(pre_tokenizers.BertPreTokenizer())

CONTROLS: dict[str, tuple[Weaken, Focus]] = {
    "a token holds the pair": (_without_pairs, Focus(contents=("a b",))),
    "lstrip": (_without_flag("lstrip"), Focus(flags=("lstrip",))),
    "rstrip": (_without_flag("rstrip"), Focus(flags=("rstrip",))),
    "single_word": (_without_flag("single_word"), Focus(flags=("single_word",))),
    "a letter and its mark": (
        _read_as(composes=False),
        Focus(normalizers=(_is(normalizers.NFC()),), stages=(_BYTES, _WORDS), contents=(".\xe9",)),
    ),
    "an accent that is removed": (
        _read_as(keeps_non_ascii=True),
        Focus(
            normalizers=(_is(_UNACCENTED),),
            stages=(_is(pre_tokenizers.WhitespaceSplit()),),
            contents=("e b", "e "),
        ),
    ),
    "a line end that becomes a space": (
        _read_as(keeps_lines=True),
        Focus(normalizers=(_is(normalizers.Nmt()),), stages=(_WORDS,), contents=("a b", " a")),
    ),
    "a quotation mark made of two": (
        _read_as(replaced=()),
        Focus(
            normalizers=(_is(normalizers.Replace("''", '"')),),
            stages=(_WORDS,),
            contents=('"a', '"1'),
        ),
    ),
    "spaces put around a character": (
        _read_as(pads_non_ascii=False),
        Focus(
            normalizers=(_is(_BERT),),
            stages=(_is(pre_tokenizers.Metaspace(prepend_scheme="first")),),
            contents=("a",),
            flags=("lstrip",),
        ),
    ),
    "a normalizer that begins each text": (
        _nothing("why_no_cut_inside", None),
        Focus(normalizers=(_is(normalizers.Prepend("a")),), stages=(_BYTES,)),
    ),
    "a pre-tokenizer that begins each piece": (
        _nothing("why_no_cut_inside", None),
        Focus(
            normalizers=(_is(normalizers.NFC()),),
            stages=(_is(pre_tokenizers.ByteLevel(add_prefix_space=True)),),
        ),
    ),
    "a replaced string": (
        _nothing("rewritten_pairs", set()),
        Focus(normalizers=(_is(normalizers.Replace(" .", "x")),), stages=(_BYTES, _WORDS)),
    ),
    "a newline that a replacement joins": (
        _nothing("rewritten_pairs", set()),
        Focus(normalizers=(_is(normalizers.Replace("a", "")),), stages=(_BYTES,)),
    ),
    "a token of the vocabulary across the cut": (
        lambda patch: patch.setattr(vocabulary, "pairs_in", lambda _: iter(())),
        Focus(models=(merging,), normalizers=(_is(),), stages=(_unsplit("first"),)),
    ),
    "Metaspace before each piece": (
        lambda patch: patch.setattr(affixes, "_without_prefix_space", lambda state: state),
        Focus(models=(merging,), normalizers=(_is(),), stages=(_unsplit("always"),)),
    ),
    "Metaspace before the first piece": (
        lambda patch: patch.setattr(affixes, "_never_first", lambda state: state),
        Focus(models=(merging,), normalizers=(_is(),), stages=(_unsplit("first"),)),
    ),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_the_fuzz_finds_wrong_ids_if_a_rule_is_weakened(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weaken, focus = CONTROLS[name]
    found = Found()
    for at in range(10):
        compare(f"{name} {at}", found, focus)
    assert found.wrong == []
    weaken(monkeypatch)
    for at in range(MAX_DRAWS):
        compare(f"{name} {at}", found, focus)
        if found.wrong:
            return
    pytest.fail(f"nothing wrong in {found.n_comparisons:,} comparisons")
