"""Cuts derived from patterns: parity with the library, refusals, the need for each condition."""

from __future__ import annotations

import random
import sys
import time
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

import tokcache
from tests.text import drawn_patterns, pattern_fuzz
from tests.text.pattern_fuzz import allowed, fuzz, pieces, tightness, unsafe_cuts
from tests.text.tokenizers_synthetic import PATTERNS, SYNTHETIC
from tokcache.errors import Unrecognised
from tokcache.text.cuts import pre_tokenizers as stages
from tokcache.text.cuts.char_classes import CharClass, class_of
from tokcache.text.cuts.patterns import KNOWN
from tokcache.text.cuts.planner import plan_cuts
from tokcache.text.cuts.regex import (
    alphabet,
    lookup,
    pattern_cuts,
    properties,
    safety,
    syntax,
)
from tokcache.text.cuts.regex.automaton import Program
from tokcache.text.cuts.regex.known import RESULTS
from tokcache.text.cuts.regex.lookup import cuts_of_pattern
from tokcache.text.cuts.regex.pattern_cuts import LEFTS, RIGHTS, PatternCuts, joins
from tokcache.text.cuts.regex.safety import cuts_of, derive, program_of
from tokcache.text.cuts.regex.syntax import parse

C = CharClass


def split_by(*patterns: str, behavior: str = "isolated", invert: bool = False) -> Tokenizer:
    tokenizer = SYNTHETIC["qwen2"]()
    splits = [pre_tokenizers.Split(Regex(one), behavior, invert=invert) for one in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return tokenizer


# ---- known patterns


@pytest.mark.parametrize("name", KNOWN)
def test_the_shipped_cuts_of_a_pattern_are_those_derived_from_it(name: str) -> None:
    """After a change of a pattern or of the derivation: `python tools/pattern_tables.py`."""
    assert RESULTS[name] == derive(KNOWN[name]).packed()
    assert PatternCuts.unpacked(RESULTS[name]) == derive(KNOWN[name])


def test_known_patterns_are_not_derived_when_a_tokenizer_is_wrapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(pattern: str) -> None:
        raise AssertionError(pattern)

    monkeypatch.setattr(safety, "derive", fail)
    assert RESULTS.keys() == KNOWN.keys()
    for pattern in PATTERNS.values():  # some have the characters \r and \n, others their escapes
        cuts_of_pattern(pattern)


def test_a_pattern_is_derived_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[str] = []

    def counted(pattern: str) -> Program:
        times.append(pattern)
        return program_of(pattern)

    monkeypatch.setattr(safety, "program_of", counted)
    for _ in range(3):
        cuts_of_pattern(r"\p{L}+|\p{N}{5}|[^\p{L}]")
    assert len(times) == 1


def test_the_work_for_a_common_pattern_is_bounded() -> None:
    """The automaton runs over one of the symbols that a state can't tell apart."""
    for name in KNOWN:
        program = program_of(KNOWN[name])
        cuts_of(program)
        # The runs of spaces of jais2 are 500 states.
        assert len(program._steps) < (2500 if name == "jais2" else 300), name


# ---- the tables of characters


def test_characters_of_one_kind_have_the_properties_that_the_library_gives_them() -> None:
    """After a new version of Unicode: `python tools/pattern_tables.py --properties`."""
    starts, kinds = alphabet._intervals()
    rng = random.Random(7)
    of_kind: dict[int, list[str]] = {}
    for first, stop, kind in zip(starts, [*starts[1:], 0x110000], kinds, strict=True):
        last = 0xD7FF if first < 0xD800 < stop else stop - 1
        points = {first, last, rng.randint(first, last)}
        of_kind.setdefault(kind, []).extend(map(chr, sorted(points)))
    text = "".join(char for own in of_kind.values() for char in own)
    queries = [rf"\p{{{name}}}" for name in properties.NAMES.split()] + [r"\s", r"\w", r"\d", "."]
    for query in queries:
        split = pre_tokenizers.Split(Regex(f"(?:{query})+"), "removed", invert=True)
        ends = {end for _, place in split.pre_tokenize_str(text) for end in place}
        at = 0
        for own in of_kind.values():
            inside = ends & {*range(at + 1, at + len(own))}
            assert not inside, (query, ascii(text[min(inside)]))
            at += len(own)


def test_the_compositions_are_those_of_unicode() -> None:
    def found(point: int) -> CharClass:
        char = chr(point)
        parts = unicodedata.normalize("NFD", char)
        is_made = parts != char and unicodedata.normalize("NFC", char) == char
        return class_of(parts[0]) if is_made else C.OTHER

    points = [point for point in range(0x20000) if not 0xAC00 <= point < 0xE000]  # no Hangul
    wanted = {point: found(point) for point in points}
    assert alphabet._compositions() == {
        point: own for point, own in wanted.items() if own is not C.OTHER
    }


def test_no_other_character_is_equal_to_an_ascii_letter_than_by_casefolding() -> None:
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x20000)]))
    split = pre_tokenizers.Split(Regex("(?i:[a-z])"), "removed", invert=True)
    found = [char for char, _ in split.pre_tokenize_str(text)]
    assert [*"AZaz"] == [char for char in found if char in "AZaz"]
    assert all(any(map(str.isascii, char.casefold())) for char in found)


def test_every_text_that_one_character_folds_to_is_known() -> None:
    folded = {chr(point).casefold() for point in range(0x20000)}
    assert syntax._folds() == {one for one in folded if len(one) > 1}


# ---- the library's matches


def test_the_automaton_finds_the_matches_of_the_library() -> None:
    rng = random.Random(3)
    n_patterns = n_compared = 0
    while n_patterns < 100:
        pattern = drawn_patterns.pattern(rng)
        try:
            regex = Regex(pattern)
        except Exception:  # noqa: BLE001, S112 (an invalid regex; the library raises Exception)
            continue
        try:
            program = program_of(pattern)
        except Unrecognised:
            continue
        split = pre_tokenizers.Split(regex, "removed", invert=True)
        n_patterns += 1
        samples = program.alphabet.samples
        few = [*rng.sample(samples, 5), *(char for char in "as1 \n" if char in samples)]
        for _ in range(20):
            text = "".join(rng.choices(rng.choice((samples, few)), k=rng.randint(1, 8)))
            want = [place for _, place in split.pre_tokenize_str(text)]
            try:
                found = list(drawn_patterns.matches(program, text))
            except Unrecognised:
                break
            assert found == want, (pattern, text)
            n_compared += 1
    assert n_compared > 1500


def test_the_symbols_of_one_group_have_the_same_step() -> None:
    rng = random.Random(11)
    n_groups = n_symbols = 0
    for _ in range(120):
        try:
            program = program_of(drawn_patterns.pattern(rng))
            states = [program.start, *safety.states_after(program)]
        except Unrecognised:
            continue
        for state in rng.sample(states, min(len(states), 12)):
            groups = program.groups(state)
            assert sum(symbols for _, symbols in groups) == (1 << program.alphabet.n) - 1
            for one, symbols in groups:
                alike = [at for at in range(program.alphabet.n) if symbols >> at & 1]
                assert {program.step(state, at) for at in alike} == {program.step(state, one)}
                n_groups, n_symbols = n_groups + 1, n_symbols + len(alike)
    assert n_symbols > 5 * n_groups > 1000


DIALECT = [
    # (pattern, text, the matches of Oniguruma's Ruby syntax, some of which Python's re differs in)
    (r"\d{1,3}+", "12345", ["12345"]),
    (r"a\d{2}?", "a12 a1", ["a12", "a"]),
    (r"(?i:'s)", "'\u017f 'S", ["'\u017f", "'S"]),
    (r"b$", "b\nb", ["b", "b"]),
    (r"\p{L}++\d|.", "ab1", ["ab1"]),
    (r"[\p{L}&&[^a-c]]+", "abxycz", ["xy", "z"]),
    (r"[^(\s|[.,])]+", "a.b(c d", ["a", "b", "c", "d"]),
    (r"\s+(?!\S)|\s", "  a ", [" ", " ", " "]),
    (r"\d{1,3}(?=(?:\d{3})*\b)", "1234567x 12345", ["12", "345"]),
    (r"a{,2}b", "aaab", ["aab"]),
    # At one place of the pattern, one way waits for a look-ahead and the other for none.
    (r"(?:(?=abc)|)a[bd]", "ad abc abd", ["ad", "ab", "ab"]),
]


@pytest.mark.parametrize(("pattern", "text", "wanted"), DIALECT)
def test_the_dialect_is_that_of_the_library(pattern: str, text: str, wanted: list[str]) -> None:
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    assert [piece for piece, _ in split.pre_tokenize_str(text)] == wanted
    program = program_of(pattern)
    found = drawn_patterns.matches(program, text)
    assert [text[start:stop] for start, stop in found] == wanted


# ---- parity


def test_random_tokenizers_split_parts_as_they_split_the_whole() -> None:
    """The long run: `python -m tests.text.pattern_fuzz`."""
    found = fuzz(seed=1, n_tokenizers=35, n_texts=60)
    assert found.wrong == []
    assert found.n_compared > 1200


@pytest.mark.parametrize("name", KNOWN)
def test_every_allowed_pair_of_a_known_pattern_is_a_safe_cut(name: str) -> None:
    tokenizer = split_by(KNOWN[name])
    tokenizer.normalizer = None
    pairs = allowed(plan_cuts(tokenizer))
    assert list(unsafe_cuts(random.Random(name), tokenizer, pairs, 200)) == []


FAMILIES = {  # the stages of a family, and some cuts that they prove together
    "deepseek_coder": (
        ["newlines", "deepseek_coder_letters", "deepseek_coder_punctuation", "deepseek_cjk"],
        [(C.LETTER, C.SPACE), (C.NEWLINE, C.LETTER), (C.LETTER, C.PUNCTUATION)],
    ),
    "deepseek_llm": (
        ["newlines", "deepseek_letters", "deepseek_punctuation", "trailing_spaces", "numbers"],
        [(C.LETTER, C.SPACE), (C.NEWLINE, C.LETTER), (C.LETTER, C.DIGIT)],
    ),
    "deepseek_v3": (
        ["numbers_by_three", "deepseek_v3_cjk", "deepseek_v3"],
        [(C.LETTER, C.SPACE), (C.DIGIT, C.LETTER), (C.PUNCTUATION, C.SPACE)],
    ),
    "afmoe": (["afmoe_scripts", "deepseek_v3"], [(C.LETTER, C.SPACE), (C.NEWLINE, C.LETTER)]),
    "youtu": (
        ["youtu_scripts", "o200k_single_digits"], [(C.LETTER, C.SPACE), (C.NEWLINE, C.LETTER)],
    ),
    "aya": (["aya_digits", "o200k"], [(C.LETTER, C.SPACE), (C.NEWLINE, C.LETTER)]),
    "laguna": (["laguna_lines", "qwen2"], [(C.LETTER, C.SPACE), (C.NEWLINE, C.LETTER)]),
    "bloom": (
        ["bloom"],
        [(C.LETTER, C.STOP), (C.STOP, C.LETTER), (C.PUNCTUATION, C.SPACE), (C.STOP, C.DIGIT)],
    ),
    "viking": (["bloom", "single_numbers"], [(C.LETTER, C.SPACE), (C.NEWLINE, C.LETTER)]),
    "exaone": (["single_numbers", "gpt2"], [(C.LETTER, C.SPACE), (C.DIGIT, C.DIGIT)]),
    "super_bpe": (["numbers", r"(?=(\d{3})+(?!\d))"], [(C.LETTER, C.DIGIT), (C.DIGIT, C.SPACE)]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stages_of_a_family_prove_their_cuts(name: str) -> None:
    stages_of_it, wanted = FAMILIES[name]
    tokenizer = split_by(*(KNOWN.get(one, one) for one in stages_of_it))
    tokenizer.normalizer = None
    plan = plan_cuts(tokenizer)
    assert all(plan.allows(*pair) for pair in wanted)
    assert list(unsafe_cuts(random.Random(name), tokenizer, allowed(plan), 300)) == []


def test_a_character_that_a_normalizer_may_split_is_judged_as_any_visible_character() -> None:
    """NFD makes a letter and a mark of `\xe9`, and the pattern joins a mark with a space."""
    tokenizer = split_by(r"\p{M}\s?|\p{L}+|\s|[^\p{L}\p{M}\s]+")
    for normalizer, is_safe in ((None, True), (normalizers.NFD(), False)):
        tokenizer.normalizer = normalizer
        is_split = pieces(tokenizer, "\xe9 a") == pieces(tokenizer, "\xe9") + pieces(
            tokenizer, " a"
        )
        assert is_split == is_safe
        assert plan_cuts(tokenizer).allows(C.NON_ASCII_LETTER, C.SPACE) == is_safe


# ---- each condition is needed


def n_unsafe(monkeypatch: pytest.MonkeyPatch, *patterns: str, behavior: str = "isolated") -> int:
    """Return how many of 3,000 random texts change with a cut that the plan allows."""
    derived = lookup.outcomes_of.__wrapped__
    monkeypatch.setattr(lookup, "cuts_of_pattern", lambda pattern: cuts_of(program_of(pattern)))
    if getattr(stages, "outcomes_of") is lookup.outcomes_of:  # noqa: B009 (not exported)
        monkeypatch.setattr(stages, "outcomes_of", derived)
    tokenizer = split_by(*patterns, behavior=behavior)
    tokenizer.normalizer = None
    pairs = allowed(plan_cuts(tokenizer))
    return len(list(unsafe_cuts(random.Random(1), tokenizer, pairs, 3000)))


def always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _same_end_only(program: Program, state: Any, symbol: int) -> bool:
    return program.step(state, symbol).end == program.step(state, program.end_of_text).end


def _no_thread_only(program: Program, state: Any, symbol: int) -> bool:
    return not program.step(state, symbol).state.threads


def _every_newline_is_single(alphabet: Any) -> dict[CharClass, int]:
    return MASKS(alphabet) | {C.NEWLINE_RUN: 1 << alphabet.n}


MASKS = safety.left_masks


def _never_changed(pattern: str, behavior: str, *, invert: bool) -> Any:
    apart, _ = lookup.outcomes_of.__wrapped__(pattern, behavior, invert=invert)
    return apart, frozenset(product(LEFTS, RIGHTS))


DEEPSEEK_V3 = [KNOWN[one] for one in ("numbers_by_three", "deepseek_v3_cjk", "deepseek_v3")]
WEAKENED: dict[str, tuple[Any, str, Any, list[str]]] = {
    "i_before_match": (
        Program, "before_match", always((False, False)), [r"\b\p{L}|\p{N}|\s"],
    ),
    "ii_threads": (safety, "is_ended", _same_end_only, [KNOWN["gpt2"]]),
    "ii_end": (safety, "is_ended", _no_thread_only, [r"\p{L}+$|\p{L}|\s"]),
    "iii_gaps_bloom": (pattern_cuts, "joins", always(False), [KNOWN["bloom"]]),
    "iii_gaps_clip": (pattern_cuts, "joins", always(False), [KNOWN["clip"]]),
    "iii_gaps_deepseek": (pattern_cuts, "joins", always(False), DEEPSEEK_V3),
    "iv_stages": (
        stages, "outcomes_of", _never_changed, [r"\p{N}\p{L}+", r"\p{N}+|\p{L}+|\s+|[^\s]"],
    ),
    "v_newlines": (safety, "left_masks", _every_newline_is_single, [KNOWN["gpt2"]]),
}  # fmt: skip


@pytest.mark.parametrize("name", WEAKENED)
def test_the_fuzz_finds_a_weakened_condition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, weak, patterns = WEAKENED[name]
    with monkeypatch.context() as weakened:
        weakened.setattr(owner, attribute, weak)
        assert n_unsafe(weakened, *patterns) > 0
    assert n_unsafe(monkeypatch, *patterns) == 0


# ---- behaviors


@pytest.mark.parametrize("behavior", pattern_fuzz.BEHAVIORS)
@pytest.mark.parametrize("invert", [False, True])
def test_pieces_are_joined_as_the_library_joins_them(behavior: str, *, invert: bool) -> None:
    """Pieces of "a", which matches, and "-", which does not, on both sides of a cut."""
    split = pre_tokenizers.Split(Regex("a"), behavior, invert=invert)
    name = behavior.title().replace("_", "")
    for left, right in product("a-", repeat=2):
        whole, *parts = (
            [piece for piece, _ in split.pre_tokenize_str(text)]
            for text in (f"a-{left}{right}-a", f"a-{left}", f"{right}-a")
        )
        is_apart = whole == [*parts[0], *parts[1]]
        assert is_apart is not joins(name, left == "a", right == "a", invert=invert)


# ---- refusals

REFUSED = {
    r"\p{L}+|(?<=a)b": "look-behind at character 7",
    r"(?<!a)b": "look-behind at character 0",
    r"a(?>b|bc)": "atomic group at character 1",
    r"(?:ab)++": "possessive repeat of a group at character 6",
    r"(?x: a b)": "option at character 0",
    r"(?<name>a)": "named group at character 0",
    r"(a)\1": r"escape \1 at character 3",
    r"\Aa": r"escape \A at character 0",
    r"a\R": r"escape \R at character 1",
    r"a*": "a match may be empty",
    r"(?:a?)*b": "repeat of an expression that may be empty at character 6",
    r"a{2000}": "more than 1000 repeats at character 1",
    r"(?:a{900}b{900}){9}": "more than 4000 instructions",
    r"a\p{Tifinagh}": "property Tifinagh at character 1",
    r"[a\p{^Tifinagh}]": "property Tifinagh at character 2",
    r"[[:tifinagh:]]": "property tifinagh at character 1",
    r"\bfoo": r"\b or ^ that reads the character before its match",
    r"a(?=(?!bc)b+d)": "look-ahead of several characters in a look-ahead",
    r"(?i:ss)": "ignored case of several characters at character 5",
    r"(?i:[\p{L}])": "ignored case of more than ASCII at character 4",
    "(?i:\xe9)": "ignored case of more than ASCII at character 4",
    r"(?i:[^a])": "ignored case of '\\xdf', which stands for several characters",
    r"(?i:s(?:s)) |[^x]": "group in a group that ignores case at character 5",
    r"(?i:(?:s)s)": "group in a group that ignores case at character 4",
    r"[\xC3\xA9]": r"escape \x in a class at character 1",
    r"[\x{4f60 597d}]+ |[^x]": r"escape \x in a class at character 1",
    r"[\o{351}] |[^x]": r"escape \o in a class at character 1",
    r"[\b]|[^x]": r"escape \b in a class at character 1",
    r"[\cA]|[^x]": r"escape \c in a class at character 1",
    r"[a[:b]c:]d]|[^x]": "[: that begins no POSIX class at character 2",
    r"[\p{Other-Math}]+": r"escape \p in a class at character 1",
    r"\p{Other-Math}+": r"escape \p at character 0",
    r"a\Z": r"escape \Z at character 1",
    r"[ab": "unclosed class at character 0",
    r"(ab": "unclosed group at character 0",
    r"ab)": "unmatched ) at character 2",
    r"a{": "brace that is no quantifier at character 1",
}


@pytest.mark.parametrize("pattern", REFUSED)
def test_a_pattern_that_is_not_modelled_is_refused_by_name_and_place(pattern: str) -> None:
    with pytest.raises(Unrecognised) as refused:
        derive(pattern)
    assert str(refused.value).startswith(REFUSED[pattern])


CATASTROPHIC = (
    r"(?:a|a)+b|.", r"(?:a+)+b|.", r"(?:\p{L}{1,60}\d{0,1}){1,30}",
    r"(?:a|b|ab|ba|aab)*c|.", r"(?=(?:a{1,9}b?){1,9}c)a|(?=(?:[ab]{1,7}){1,9}d)b|.",
)  # fmt: skip


@pytest.mark.parametrize("pattern", CATASTROPHIC)
def test_a_catastrophic_pattern_is_decided_or_refused_in_bounded_time(pattern: str) -> None:
    started = time.process_time()
    with suppress(Unrecognised):
        derive(pattern)
    assert time.process_time() - started < 10


def test_random_patterns_are_parsed_or_refused() -> None:
    """No other exception leaves the parser, whatever it is given."""
    rng = random.Random(5)
    pieces = [*drawn_patterns.CHARS, *r"[](){}|*+?^$\.&:-", "(?", "\\p{", "[:", "&&", "{1,"]
    for _ in range(3000):
        pattern = "".join(rng.choices(pieces, k=rng.randint(0, 10)))
        with suppress(Unrecognised):
            parse(pattern)


def test_many_added_tokens_leave_the_cuts_of_the_pattern() -> None:
    tokenizer = split_by(KNOWN["kimi_k2"])
    tokenizer.add_tokens([AddedToken(f"<|{i}|>", normalized=False) for i in range(20_000)])
    plan = plan_cuts(tokenizer)
    assert plan.refused == ()
    assert plan.allows(C.LETTER, C.SPACE)
    assert len(plan.separators) >= 20_000


def test_wrapping_is_linear_in_the_added_tokens() -> None:
    """A few calls of functions for each token: 9, where 22 took three times as long."""

    def n_calls(n_tokens: int) -> int:
        tokenizer = SYNTHETIC["qwen2"]()
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.add_tokens([AddedToken(f"<|{i}|>", normalized=True) for i in range(n_tokens)])
        calls = 0

        def count(_: Any, event: str, __: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            tokcache.wrap(tokenizer)
        finally:
            sys.setprofile(None)
        return calls

    n_more = 4000
    assert n_calls(2000 + n_more) - n_calls(2000) < 10 * n_more


# ---- tightness


def test_refused_pairs_are_unsafe() -> None:
    """The long run: `python -m tests.text.pattern_fuzz --refused`."""
    found = tightness(seed=2, n_tokenizers=20, n_pairs=6, n_texts=800)
    assert found.n_pairs > 40
    assert len(found.unshown) <= found.n_pairs / 10, found.unshown


def test_every_class_of_the_rules_has_cuts_to_decide() -> None:
    assert {*LEFTS, *RIGHTS} == set(C) - {C.TOKEN_END}
