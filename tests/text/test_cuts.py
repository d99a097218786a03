"""Cut plans: each allowed cut is checked with the tokenizer itself; each refusal has a test."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from tests.text.tokenizers_synthetic import PATTERNS, RANDOM, SYNTHETIC
from tokcache.text.cuts.char_classes import N_CLASSES, CharClass
from tokcache.text.cuts.planner import plan_cuts
from tokcache.text.cuts.scanner import class_behind
from tokcache.text.engines.copying import SegmentEncoder

if TYPE_CHECKING:
    from tokcache.text.cuts.plan import CutPlan

C = CharClass
Build = Callable[[], Tokenizer]
Pair = tuple[CharClass, CharClass]

POSSESSIVE_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# ---- kinds


def _split_by(*patterns: str, **how: Any) -> Build:
    """Return a builder of a byte-level tokenizer that splits by these patterns."""

    def made() -> Tokenizer:
        how.setdefault("behavior", "isolated")
        tokenizer = SYNTHETIC["llama3_isolated"]()
        splits = [pre_tokenizers.Split(Regex(pattern), **how) for pattern in patterns]
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_])
        return tokenizer

    return made


def _with(base: str, **parts: Any) -> Build:
    def made() -> Tokenizer:
        tokenizer = SYNTHETIC[base]()
        for name, part in parts.items():
            setattr(tokenizer, name, part)
        return tokenizer

    return made


def _added(base: str, *tokens: AddedToken) -> Build:
    def made() -> Tokenizer:
        tokenizer = SYNTHETIC[base]()
        tokenizer.add_tokens(list(tokens))
        return tokenizer

    return made


NAMES = (
    "gpt2", "gpt2_prefix_space", "llama3", "cl100k_removed", "cl100k_tiktoken", "bailing", "qwen2",
    "qwen35", "seed_coder", "o200k", "tekken", "deepseek_v3", "falcon", "starcoder",
    "bert_uncased", "bert_no_normalizer", "whitespace", "whitespace_split", "whitespace_digits",
    "punctuation_isolated", "punctuation_merged_with_previous", "punctuation_merged_with_next",
    "punctuation_contiguous", "punctuation_removed", "digits", "digits_individual",
    "xlm_roberta", "unigram_always_split", "unigram_never_split", "bpe_first_split", "llama2",
    "llama2_no_bytes", "phi3", "gemma", "nothing_at_all", "no_pre_tokenizer_fused",
    "strip_accents_qwen2", "nmt_qwen2", "nfd_lowercase_strip_qwen2", "strip_words", "nfkc_words",
    "replace_quotes_qwen2", "replace_spaces_qwen2", "mistral", "bpe_always_unsplit",
    "bpe_never_unsplit", "bpe_first_unsplit",
    "kimi", "deepseek_v2", "deepseek_coder", "bloom", "aya", "laguna", "char_delimiter_space",
    "whitespace_split_punctuation", "punctuation_digits_split",
)  # fmt: skip
KINDS: dict[str, Build] = {name: SYNTHETIC[name] for name in NAMES}
KINDS["cl100k_possessive"] = _split_by(POSSESSIVE_CL100K)

# ---- texts with a cut between two characters

# Several characters of each class, among them letters of contractions.
MANY = "asZ19.(-_'/ \t\r\n\xe9\u4e2d\u0438\u2019\u3002\u0301\xa0\xbd\x0b\u017f\U0001f600"
SOME = "s1._'/ \r\n\xe9\u2019\u0301"
FEW = "s'/ \n"  # characters that patterns look at beyond the next one
N_RANDOM = 1000


class Cut(NamedTuple):
    left: str
    right: str


def _cuts(rng: random.Random) -> Iterator[Cut]:
    """Yield texts in two parts: a pair of characters, with up to two more on each side.

    These are all pairs of MANY with up to one more on one side, all pairs of SOME with one more
    on both sides, all pairs of FEW with up to two more on both sides, and random texts of MANY.
    """
    for left, right in product(MANY, repeat=2):
        for more in ["", *SOME]:
            yield Cut(more + left, right)
            yield Cut(left, right + more)
    for before, left, right, after in product(SOME, repeat=4):
        yield Cut(before + left, right + after)
    around = ["", *FEW, *map("".join, product(FEW, repeat=2))]
    for before, left, right, after in product(around, FEW, FEW, around):
        yield Cut(before + left, right + after)
    for _ in range(N_RANDOM):
        sides = ["".join(rng.choices(MANY, k=rng.randint(1, 3))) for _ in range(2)]
        yield Cut(*sides)


def _class_of_last(text: str, left: CharClass) -> CharClass:
    for char in text:
        left = class_behind(char, left)
    return left


ALL_CUTS = list(dict.fromkeys(_cuts(random.Random(1))))


def _classes(first_left: CharClass) -> list[Pair]:
    lefts = {left: _class_of_last(left, first_left) for left in {one.left for one in ALL_CUTS}}
    return [(lefts[left], class_behind(right[0], lefts[left])) for left, right in ALL_CUTS]


CLASSES = {left: _classes(left) for left in (C.LETTER, C.OTHER)}


class Checked(NamedTuple):
    pairs: set[Pair]
    unsafe: list[Cut]


class Splitter:
    """Splits texts with one variant: into the pieces that the model receives, or into ids.

    Pieces show every boundary; ids show a boundary only if the vocabulary has a token across it.
    Ids are compared where only the vocabulary proves the cuts, and for a sample of all others.
    """

    def __init__(self, encoder: SegmentEncoder, plan: CutPlan) -> None:
        own = encoder.tokenizer
        self.by_pieces = ("model", "BPE without a pre-tokenizer, the vocabulary as proof") not in (
            plan.recognised
        )
        self._encoder = encoder
        self._normalize = own.normalizer.normalize_str if own.normalizer is not None else str
        self._pre_tokenizer = own.pre_tokenizer

    def __call__(self, texts: Sequence[str], *, by_pieces: bool) -> dict[str, list[Any]]:
        distinct = list(dict.fromkeys(texts))
        made = map(self._pieces, distinct) if by_pieces else self._encoder.encode(distinct)
        return dict(zip(distinct, made, strict=True))

    def _pieces(self, text: str) -> list[str]:
        pieces = self._pre_tokenizer.pre_tokenize_str(self._normalize(text))
        return [piece for piece, _ in pieces]


def check(tokenizer: Tokenizer, plan: CutPlan) -> Checked:
    """Compare the split of each text whose cut the plan allows with the splits of its two parts."""
    first, later, inside = plan.variant_of
    splitters = [
        Splitter(SegmentEncoder(tokenizer, one.normalizer, one.pre_tokenizer), plan)
        for one in plan.variants
    ]
    found = Checked(set(), [])
    # The left part may begin the text, follow an added token, or follow another cut.
    for variant, left in {(first, plan.piece_left), (later, plan.piece_left), (inside, C.LETTER)}:
        chosen = [
            (cut, pair)
            for cut, pair in zip(ALL_CUTS, CLASSES[left], strict=True)
            if plan.allows(*pair)
        ]
        found.pairs.update(pair for _, pair in chosen)
        cuts = [cut for cut, _ in chosen]
        whole, part = splitters[variant], splitters[inside]
        found.unsafe.extend(_unsafe(whole, part, cuts, by_pieces=whole.by_pieces))
        found.unsafe.extend(_unsafe(whole, part, cuts[-N_RANDOM // 2 :], by_pieces=False))
    return found


def _unsafe(whole: Splitter, part: Splitter, cuts: list[Cut], *, by_pieces: bool) -> Iterator[Cut]:
    wholes = whole([cut.left + cut.right for cut in cuts], by_pieces=by_pieces)
    lefts = whole([cut.left for cut in cuts], by_pieces=by_pieces)
    rights = part([cut.right for cut in cuts], by_pieces=by_pieces)
    for cut in cuts:
        if wholes[cut.left + cut.right] != lefts[cut.left] + rights[cut.right]:
            yield cut


def _allowed(plan: CutPlan, *, fine: bool = True) -> set[Pair]:
    return {pair for pair in product(C, C) if plan.allows(*pair, fine=fine)}


# ---- allowed cuts are safe


@pytest.mark.parametrize("name", KINDS)
def test_every_allowed_pair_is_a_safe_cut(name: str) -> None:
    tokenizer = KINDS[name]()
    plan = plan_cuts(tokenizer)
    assert plan.off is None
    assert plan.refused == ()
    assert plan.rules
    assert all(rule.reason for rule in plan.rules)
    assert _allowed(plan, fine=False)
    assert _allowed(plan, fine=False) <= _allowed(plan)
    checked = check(tokenizer, plan)
    assert checked.unsafe[:5] == []
    assert checked.pairs == _allowed(plan)  # each allowed pair was checked


UNSAFE = [
    ("gpt2", C.SPACE, C.LETTER),
    ("gpt2", C.APOSTROPHE, C.LETTER),
    ("gpt2", C.NEWLINE_RUN, C.LETTER),
    ("llama3", C.PUNCTUATION, C.NEWLINE),
    ("llama3", C.DIGIT, C.DIGIT),
    ("o200k", C.LETTER, C.APOSTROPHE),
    ("o200k", C.NEWLINE, C.SLASH),
    ("deepseek_v3", C.LETTER, C.LETTER),
    ("starcoder", C.SPACE, C.SPACE),
    ("bert_uncased", C.LETTER, C.DIGIT),
    ("punctuation_merged_with_next", C.PUNCTUATION, C.LETTER),
    ("digits", C.DIGIT, C.DIGIT),
    ("bpe_first_split", C.SPACE, C.LETTER),
    ("llama2", C.LETTER, C.LETTER),
]


@pytest.mark.parametrize(("name", "left", "right"), UNSAFE)
def test_the_check_finds_unsafe_pairs(name: str, left: C, right: C) -> None:
    """Control: allows one unsafe pair, which `check` must find."""
    tokenizer = KINDS[name]()
    plan = plan_cuts(tokenizer)
    assert not plan.allows(left, right)
    wrong = bytearray(N_CLASSES * N_CLASSES)
    wrong[left * N_CLASSES + right] = 1
    checked = check(tokenizer, replace(plan, fine=bytes(wrong)))
    assert checked.pairs == {(left, right)}
    assert checked.unsafe


# ---- patterns

KNOWN_PATTERNS = {
    "gpt2": (PATTERNS["gpt2"],),
    "llama3": (PATTERNS["llama3"],),
    "cl100k_possessive": (POSSESSIVE_CL100K,),
    "cl100k_tiktoken": (PATTERNS["cl100k_tiktoken"],),
    "bailing": (PATTERNS["bailing"],),
    "qwen2": (PATTERNS["qwen2"],),
    "qwen35": (PATTERNS["qwen35"],),
    "seed_coder": (PATTERNS["seed_coder"],),
    "o200k": (PATTERNS["o200k"],),
    "tekken": (PATTERNS["tekken"],),
    "deepseek_v3": tuple(
        PATTERNS[name] for name in ("deepseek_v3_numbers", "deepseek_v3_cjk", "deepseek_v3")
    ),
}


@pytest.mark.parametrize("name", KNOWN_PATTERNS)
@pytest.mark.parametrize("how", [{}, {"behavior": "removed", "invert": True}], ids=["kept", "rest"])
def test_a_pattern_is_recognised_in_every_notation(name: str, how: dict[str, Any]) -> None:
    patterns = KNOWN_PATTERNS[name]
    if how and len(patterns) > 1:
        return  # DeepSeek's first Split would remove everything except numbers
    written = tuple(one.replace("\r", r"\r").replace("\n", r"\n") for one in patterns)
    wanted = _allowed(plan_cuts(_split_by(*patterns)()))
    assert len(wanted) > 50
    assert _allowed(plan_cuts(_split_by(*written, **how)())) == wanted


def _with_a_character_removed(pattern: str) -> Iterator[str]:
    """Yield the pattern without a character, at three places."""
    for at in range(0, len(pattern), len(pattern) // 3):
        yield pattern[:at] + pattern[at + 1 :]


@pytest.mark.parametrize("name", KNOWN_PATTERNS)
def test_every_allowed_pair_of_a_pattern_that_lacks_a_character_is_a_safe_cut(name: str) -> None:
    """Such a pattern is nobody's: its cuts are derived."""
    *before, pattern = KNOWN_PATTERNS[name]
    n_allowed = 0
    for shortened in _with_a_character_removed(pattern):
        try:
            tokenizer = _split_by(*before, shortened)()
        except Exception:  # noqa: BLE001, S112 (an invalid regex; the library raises Exception)
            continue
        plan = plan_cuts(tokenizer)
        assert plan.off is None
        checked = check(tokenizer, plan)
        assert checked.unsafe[:5] == [], shortened
        n_allowed += len(checked.pairs)
    assert n_allowed > 40


@pytest.mark.parametrize("at", [0, 1])
def test_every_allowed_pair_after_a_changed_stage_is_a_safe_cut(at: int) -> None:
    patterns = list(KNOWN_PATTERNS["deepseek_v3"])
    patterns[at] = patterns[at].replace("3", "4").replace("\u9fa5", "\u9fa6")
    tokenizer = _split_by(*patterns)()
    checked = check(tokenizer, plan_cuts(tokenizer))
    assert checked.unsafe[:5] == []
    assert len(checked.pairs) > 60


WAYS: list[tuple[dict[str, Any], int]] = [
    ({"behavior": "removed"}, 80),  # the matches are dropped, which cover every text
    ({"behavior": "isolated", "invert": True}, 80),
    ({"behavior": "merged_with_previous"}, 80),
    ({"behavior": "merged_with_next"}, 80),
    ({"behavior": "contiguous"}, 0),  # one piece of all matches
]


@pytest.mark.parametrize(("how", "n_pairs"), WAYS, ids=lambda one: str(one)[:24])
def test_every_allowed_pair_of_another_behavior_is_a_safe_cut(
    how: dict[str, Any], n_pairs: int
) -> None:
    tokenizer = _split_by(PATTERNS["qwen2"], **how)()
    plan = plan_cuts(tokenizer)
    assert len(_allowed(plan)) == n_pairs
    assert check(tokenizer, plan).unsafe[:5] == []


@pytest.mark.parametrize("behavior", ["merged_with_previous", "merged_with_next", "contiguous"])
@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("pattern", [r"\p{L}+", r"[\s.]+", " "])
def test_every_allowed_pair_of_a_pattern_with_gaps_is_a_safe_cut(
    pattern: str, behavior: str, *, invert: bool
) -> None:
    tokenizer = _split_by(pattern, behavior=behavior, invert=invert)()
    plan = plan_cuts(tokenizer)
    assert _allowed(plan)
    assert check(tokenizer, plan).unsafe[:5] == []


# ---- tokenizers for which L1 is off


class CustomPreTokenizer:
    """A pre-tokenizer written in Python."""

    def pre_tokenize(self, text: Any) -> None:
        """Split nothing."""


def _custom() -> Tokenizer:
    return _with("gpt2", pre_tokenizer=pre_tokenizers.PreTokenizer.custom(CustomPreTokenizer()))()


def _sampling() -> Tokenizer:
    tokenizer = SYNTHETIC["unigram_always_split"]()
    tokenizer.model.alpha = 0.5
    tokenizer.model.nbest_size = 4
    return tokenizer


def _text_twice() -> Tokenizer:
    tokenizer = SYNTHETIC["gpt2"]()
    data = json.loads(tokenizer.to_str())
    text = {"Sequence": {"id": "A", "type_id": 0}}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [text, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {},
    }
    return Tokenizer.from_str(json.dumps(data))


OFF: dict[str, tuple[Build, str, str | None]] = {
    "dropout": (RANDOM["dropout_half"], "bpe_dropout", None),
    "sampling": (_sampling, "unigram_sampling", None),
    "written_in_python": (_custom, "python_component", None),
    "text_named_twice": (_text_twice, "post_processor", "does not name the text exactly once"),
    "overlap": (
        _added("gpt2", AddedToken("ab|cd", normalized=False), AddedToken("cd|ef", normalized=True)),
        "added_tokens_overlap",
        "of the two phases may overlap",
    ),
    "nested": (
        _added("gpt2", AddedToken("<a><b>", normalized=True), AddedToken("<b>", normalized=False)),
        "added_tokens_overlap",
        "of the two phases may overlap",
    ),
    "alike": (
        _added(
            "bert_uncased",
            AddedToken("hello", normalized=True),
            AddedToken("HELLO", normalized=True),
        ),
        "normalized_tokens_alike",
        "two added tokens are equal once normalised",
    ),
}


@pytest.mark.parametrize("name", OFF)
def test_l1_is_off_for_the_stated_reason(name: str) -> None:
    build, off, sentence = OFF[name]
    plan = plan_cuts(build())
    assert plan.off == off
    assert not any(plan.fine)
    assert not any(plan.coarse)
    assert plan.separators == ()
    assert plan.variants == ()
    if sentence is None:
        assert plan.refused == ()
    else:
        assert len(plan.refused) == 1
        assert sentence in plan.refused[0]


ON: dict[str, Build] = {
    "dropout_zero": SYNTHETIC["dropout_zero"],
    "no_normalizer": _added("gpt2", AddedToken("hello", normalized=True, lstrip=True)),
    "first_phase": _added("bert_uncased", AddedToken("hello", normalized=False, rstrip=True)),
    "no_overlap": _added(
        "gpt2", AddedToken("ab|", normalized=False), AddedToken("cd", normalized=True)
    ),
}


@pytest.mark.parametrize("name", ON)
def test_l1_stays_on_if_one_condition_for_off_is_missing(name: str) -> None:
    plan = plan_cuts(ON[name]())
    assert plan.off is None
    assert plan.refused == ()
    assert any(plan.coarse)


# ---- tokenizers that allow cuts at added tokens only


def _bpe_without_pre_tokenizer(**settings: Any) -> Build:
    def made() -> Tokenizer:
        tokens = [*map(chr, range(32, 127)), "ab</w>", "##b", "ab"]
        vocabulary = {one: at for at, one in enumerate(tokens)}
        return Tokenizer(models.BPE(vocabulary, [], **settings))

    return made


def _word_piece_without_pre_tokenizer() -> Tokenizer:
    return Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))  # noqa: S106


def _normal(*parts: Any) -> Build:
    return _with("qwen2", normalizer=normalizers.Sequence(list(parts)))


def _pre(*stages: Any, base: str = "gpt2") -> Build:
    return _with(base, pre_tokenizer=pre_tokenizers.Sequence(list(stages)))


_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_MARKS = normalizers.Replace(" ", "\u2581")
_LOWERED = "changes visible ASCII characters"
_UNKNOWN_FORM = "is not known: cuts at added tokens only"
_NO_PROOF = "no cut is forced, and the vocabulary proves none: "

NO_CUT: dict[str, tuple[Build, str]] = {
    "normalizer_bytes": (_normal(normalizers.ByteLevel()), "normalizer ByteLevel is not known"),
    "normalizer_replaces_regex": (
        _normal(normalizers.Replace(Regex(r"\w+"), " ")),
        r"normalizer Replace of '\\w+' by ' ' is not known",
    ),
    "normalizer_changes_ascii": (_normal(normalizers.Prepend(" "), _MARKS), _LOWERED),
    "pre_tokenizer_delimiter": (
        _pre(pre_tokenizers.CharDelimiterSplit("e")),
        _NO_PROOF + "the pre-tokenizer forces none",  # "e" is one letter of many
    ),
    "pre_tokenizer_scripts": (
        _pre(pre_tokenizers.UnicodeScripts()),
        "pre-tokenizer UnicodeScripts is not known",
    ),
    "metaspace_mark": (
        _pre(pre_tokenizers.Metaspace(replacement="_")),
        "Metaspace with '_' is not known",
    ),
    "metaspace_unsplit_before_another": (
        _pre(pre_tokenizers.Metaspace(split=False), pre_tokenizers.WhitespaceSplit()),
        "Metaspace replaces spaces before the next stage sees them",
    ),
    "metaspace_unsplit_of_unigram": (
        SYNTHETIC["unigram_first_unsplit"],
        _NO_PROOF + "only the tokens of BPE are made by merging neighbours",
    ),
    "prefix_space_not_first": (
        _pre(
            pre_tokenizers.Split(Regex("zz"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True),
        ),
        "ByteLevel puts a space before every pre-token",
    ),
    "spaces_hidden": (
        _with("gpt2", normalizer=_MARKS),
        "ByteLevel after a normalizer that replaces spaces",
    ),
    "pattern_not_modelled": (
        _pre(pre_tokenizers.Split(Regex(r"\d+|(?<=a)b"), "isolated"), _BYTES),
        r"pre-tokenizer Split by '\d+|(?<=a)b': look-behind at character 4",
    ),
    "nothing_forced": (
        SYNTHETIC["bytes_unsplit"],
        _NO_PROOF + "the pre-tokenizer forces none",
    ),
    "unigram_alone": (
        SYNTHETIC["unigram_alone"],
        _NO_PROOF + "only the tokens of BPE are made by merging neighbours",
    ),
    "word_piece_alone": (
        _word_piece_without_pre_tokenizer,
        _NO_PROOF + "only the tokens of BPE are made by merging neighbours",
    ),
    "merges_ignored": (
        _bpe_without_pre_tokenizer(ignore_merges=True),
        _NO_PROOF + "a text that is a token is not merged from its characters",
    ),
    "ends_marked": (
        _bpe_without_pre_tokenizer(end_of_word_suffix="</w>"),
        _NO_PROOF + "the model marks the beginning or end of a text",
    ),
    "beginnings_marked": (
        _bpe_without_pre_tokenizer(continuing_subword_prefix="##"),
        _NO_PROOF + "the model marks the beginning or end of a text",
    ),
}


@pytest.mark.parametrize("name", NO_CUT)
def test_cuts_in_text_are_refused_for_the_stated_reason(name: str) -> None:
    build, sentence = NO_CUT[name]
    plan = plan_cuts(build())
    assert plan.off is None
    assert not any(plan.fine)
    assert plan.rules == ()
    assert len(plan.refused) == 1
    assert sentence in plan.refused[0]
    assert plan.refused[0].endswith("cuts at added tokens only") or sentence == plan.refused[0]


AFTERWARDS = {
    "fixed_length": (
        _pre(pre_tokenizers.WhitespaceSplit(), pre_tokenizers.FixedLength(5)),
        "pre-tokenizer FixedLength is not known",
    ),
    "prefix_space": (
        _pre(
            pre_tokenizers.Digits(),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True),
        ),
        "pre-tokenizer ByteLevel puts a space before every pre-token",
    ),
    "look_behind": (
        _split_by(r"\p{N}+", r"(?<=\S)\s"),
        r"pre-tokenizer Split by '(?<=\S)\s': look-behind at character 0",
    ),
}


@pytest.mark.parametrize("name", AFTERWARDS)
def test_the_stages_before_an_unknown_one_force_their_cuts(name: str) -> None:
    build, sentence = AFTERWARDS[name]
    tokenizer = build()
    plan = plan_cuts(tokenizer)
    assert plan.refused == (f"{sentence}: only the cuts that the stages before it force",)
    checked = check(tokenizer, plan)
    assert checked.unsafe[:5] == []
    assert len(checked.pairs) > 15


def test_a_plain_bpe_vocabulary_proves_cuts() -> None:
    plan = plan_cuts(_bpe_without_pre_tokenizer()())
    assert plan.refused == ()
    assert plan.allows(C.DIGIT, C.LETTER)
    assert not plan.allows(C.LETTER, C.LETTER)  # the token "ab"
    assert not plan.allows(C.PUNCTUATION, C.LETTER)  # the token "##b"


def test_an_unknown_post_processor_refuses_texts_with_special_tokens() -> None:
    around = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    after = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    plan = plan_cuts(_with("gpt2", post_processor=processors.Sequence([around, after]))())
    assert plan.refused == ("the post-processor does more than put ids around a text",)
    assert plan.affixes == (((), ()), None)
    assert any(plan.fine)
    plan = plan_cuts(_with("gpt2", post_processor=around)())
    assert plan.refused == ()
    assert plan.affixes == (((), ()), ((0,), ()))


# ---- cuts that added tokens forbid


def _pairs_lost_by(base: str, *tokens: AddedToken) -> set[Pair]:
    before, now = plan_cuts(SYNTHETIC[base]()), plan_cuts(_added(base, *tokens)())
    assert now.off is None
    assert _allowed(now) < _allowed(before)
    return _allowed(before) - _allowed(now)


def test_lstrip_removes_cuts_between_a_newline_and_the_token() -> None:
    gone = _pairs_lost_by("llama3_isolated", AddedToken("<t>", lstrip=True, normalized=False))
    assert gone == {(left, C.PUNCTUATION) for left in (C.RETURN, C.NEWLINE, C.NEWLINE_RUN)}


def test_single_word_removes_cuts_next_to_the_token() -> None:
    gone = _pairs_lost_by("gpt2", AddedToken("_", single_word=True, normalized=False))
    assert {(C.LETTER, C.UNDERSCORE), (C.UNDERSCORE, C.LETTER)} <= gone
    assert all(C.UNDERSCORE in pair for pair in gone)


# ---- added tokens that are searched for in the normalised text


def test_an_empty_sequence_is_no_normalizer() -> None:
    """DeepSeek V3 and V4: the scanner finds the tokens of both phases in the raw text."""
    token = AddedToken("<x>", normalized=True)
    build = _added("deepseek_v3", token)
    tokenizer = build()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Sequence([])])
    assert plan_cuts(tokenizer) == replace(
        plan_cuts(build()), variants=plan_cuts(tokenizer).variants
    )


def test_a_token_in_normalised_text_removes_the_pairs_inside_it() -> None:
    gone = _pairs_lost_by("qwen2", AddedToken("x1 b", normalized=True))
    assert gone == {(C.LETTER, C.DIGIT), (C.DIGIT, C.SPACE)}


def test_a_composed_letter_in_a_token_removes_the_pair_of_its_base() -> None:
    """The text may hold the letter and its mark: NFC composes them."""
    gone = _pairs_lost_by("qwen2", AddedToken("1\xe9", normalized=True))
    assert gone == {(C.DIGIT, C.LETTER), (C.DIGIT, C.NON_ASCII_LETTER)}


@pytest.mark.parametrize(
    ("flag", "gone"),
    [
        ("lstrip", {(C.NEWLINE, C.PUNCTUATION), (C.RETURN, C.PUNCTUATION)}),
        ("rstrip", {(C.PUNCTUATION, C.SPACE), (C.PUNCTUATION, C.TAB)}),
        ("single_word", {(C.LETTER, C.PUNCTUATION), (C.PUNCTUATION, C.DIGIT)}),
    ],
)
def test_a_flag_removes_the_pairs_that_it_looks_over(flag: str, gone: set[Pair]) -> None:
    settings: dict[str, Any] = {flag: True, "normalized": True}
    assert _pairs_lost_by("qwen2", AddedToken("%", **settings)) >= gone


ONLY_AT_TOKENS: dict[str, tuple[Build, str]] = {
    "prepend": (
        _added("llama2", AddedToken("hello", normalized=True)),
        "which begins with more than the text itself",
    ),
    "prefix_space": (
        _with("gpt2_prefix_space", normalizer=normalizers.NFC()),
        "the text after each of them begins with a space put there",
    ),
}


@pytest.mark.parametrize("name", ONLY_AT_TOKENS)
def test_what_begins_a_text_leaves_only_cuts_at_raw_tokens(name: str) -> None:
    build, sentence = ONLY_AT_TOKENS[name]
    tokenizer = build()
    tokenizer.add_tokens([AddedToken("hello", normalized=True)])
    plan = plan_cuts(tokenizer)
    assert plan.off is None
    assert not any(plan.fine)
    assert plan.separators
    assert plan.space_variant == -1
    assert sentence in plan.refused[0]


# ---- strings that the normalizer replaces


def test_no_text_is_cut_next_to_a_replaced_string() -> None:
    plan = plan_cuts(_normal(normalizers.Replace("e\tx", "E"))())
    lost = _allowed(plan_cuts(SYNTHETIC["qwen2"]())) - _allowed(plan)
    assert lost
    assert all(C.LETTER in pair for pair in lost)
    assert plan.allows(C.DIGIT, C.SPACE)


_CHATGLM = (("\n", "<n>"), ("\t", "<|tab|>"), ("   ", "<|blank_3|>"), ("  ", "<|blank_2|>"))


def test_whitespace_that_becomes_names_leaves_cuts_between_visible_characters() -> None:
    """ChatGLM's: two halves of a run of spaces would have other names."""
    names = [normalizers.Replace(*each) for each in _CHATGLM]
    plan = plan_cuts(_with("gpt2", normalizer=normalizers.Sequence(names))())
    whitespace = {C.SPACE, C.TAB, C.NEWLINE, C.NEWLINE_RUN}
    assert plan.allows(C.DIGIT, C.LETTER)
    assert not any(whitespace & set(pair) for pair in _allowed(plan))
    plan = plan_cuts(_with("llama2", normalizer=normalizers.Sequence(names))())
    assert plan.refused == (_NO_PROOF + r"the normalizer replaces '\n' by '<n>'",)


def test_a_replacement_that_ends_in_whitespace_removes_cuts_after_a_newline() -> None:
    plan = plan_cuts(_normal(normalizers.Replace("@", " "))())
    assert not plan.allows(C.NEWLINE, C.LETTER)
    assert plan_cuts(_normal(normalizers.Replace("@", "x"))()).allows(C.NEWLINE, C.LETTER)


def test_a_token_with_a_space_inside_removes_chunk_ends_between_letter_and_space() -> None:
    """A chunk that ended inside "New York" would hide the token."""
    before = plan_cuts(SYNTHETIC["gpt2"]())
    plan = plan_cuts(_added("gpt2", AddedToken("New York", normalized=False))())
    assert _allowed(plan) == _allowed(before)
    gone = _allowed(before, fine=False) - _allowed(plan, fine=False)
    assert gone == {(C.LETTER, C.SPACE)}
