"""Where a text may be cut for a tokenizer, and why.

A cut is safe if T(left) + T(right) = T(left + right) for every left and right. Which cuts are is
derived from the tokenizer's components alone, stage by stage, as pairs of character classes: the
class of the last character of `left` and that of the first of `right` (`char_classes`). Every
rule carries its reason; what is not recognised allows no cut, and says so.

- The normalizer must map the characters of a pair each by itself (`_Normalizer`).
- A pre-tokenizer that forces a boundary in a pair makes it safe; stages that split by neighbouring
  characters alone leave the other pairs to the next stage, a pattern ends the search.
- Where nothing forces a boundary, a BPE vocabulary can: no token spans the pair.
- Added tokens are cut out of a text before all that; the scanner finds them as the library does.

What puts something before each text (Prepend, Metaspace, add_prefix_space, Strip) must not do so
in the middle of one: `variants` are the components that a continuation is encoded with.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from tokenizers.models import BPE

from tokcache.text.engines.copying import (
    CopyError,
    added_tokens,
    component_state,
    free_edge,
    is_of_library,
    why_random,
)
from tokcache.text.segments.char_classes import N_CLASSES, VISIBLE, WHITESPACE, CharClass, class_of
from tokcache.text.segments.components import BYTE_NAME, BYTE_NAMES, MARKER, MARKS_BLANKS, stages_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

C = CharClass
VOCABULARY_PROOF = ("model", "BPE without a pre-tokenizer, the vocabulary as proof")
_LONGEST_TOKEN = 256  # of added ones; every place of a text may begin a long one in vain
_MAX_PARTS = 2_000_000  # of added tokens that are compared with each other
Pair = tuple[CharClass, CharClass]

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SIGN_RUN = r" ?[^\s\p{L}\p{N}]+"
_POSSESSIVE = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}"
_CL100K = rf"{_SHORT}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGN_RUN}[\r\n]*|{_SPACES}"
_CL100K_POSSESSIVE = (
    rf"{_POSSESSIVE}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_TIKTOKEN = (
    rf"{_POSSESSIVE}++|\p{{N}}{{1,3}}+| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
_BAILING = rf"{_POSSESSIVE}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_QWEN2 = rf"{_SHORT}|{_WORDS}|\p{{N}}|{_SIGN_RUN}[\r\n]*|{_SPACES}"
_SEED = rf"{_SHORT}|{_WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_QWEN3_5 = (
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"{_UPPER}*{_LOWER}+{_SHORT}?|{_UPPER}+{_LOWER}*{_SHORT}?"
    rf"|\p{{N}}{{1,3}}|{_SIGN_RUN}[\r\n/]*|{_SPACES}"
)
_TEKKEN = rf"{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*|\p{{N}}|{_SIGN_RUN}[\r\n/]*|{_SPACES}"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_NUMBERS = r"\p{N}{1,3}"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"

_LETTERS = frozenset({C.LETTER, C.NON_ASCII_LETTER})
_SIGNS = frozenset({C.PUNCTUATION, C.UNDERSCORE, C.APOSTROPHE, C.SLASH, C.NON_ASCII_PUNCTUATION})
_SPACE = frozenset({C.SPACE})
_DIGITS = frozenset({C.DIGIT})
_MAYBE_WORDS = _LETTERS | _DIGITS | {C.UNDERSCORE, C.NON_ASCII_PUNCTUATION, C.OTHER}
_NEWLINE = frozenset({C.NEWLINE})
_ENDS_OF_LINES = frozenset({C.NEWLINE, C.NEWLINE_RUN, C.RETURN})
_BLANK_LEFT = WHITESPACE | {C.NEWLINE_RUN}


@dataclass(frozen=True, slots=True)
class Rule:
    """Cuts between any class of `left` and any of `right`, with the reason they are safe."""

    name: str
    left: frozenset[CharClass]
    right: frozenset[CharClass]
    reason: str
    is_apart: bool = False  # holds even if the left character becomes several, or a blank

    def pairs(self) -> Iterator[Pair]:
        """Yield every pair of classes that the rule allows a cut between."""
        return ((left, right) for left in self.left for right in self.right)


@dataclass(frozen=True, slots=True)
class Separator:
    """An added token that is found in the raw text and parts it.

    `skips` says that it is passed over and becomes text (`encode_special_tokens`); `opens` that a
    chunk may begin with it whatever stands before.
    """

    content: str
    id: int
    lstrip: bool
    rstrip: bool
    single_word: bool
    in_piece: bool  # found in the second phase: its neighbours are those in its piece
    skips: bool
    opens: bool


@dataclass(frozen=True, slots=True)
class Variant:
    """The components that encode a part of a text, as JSON."""

    normalizer: str
    pre_tokenizer: str


@dataclass(frozen=True, slots=True)
class CutPlan:
    """All that the segment cache needs to know of a tokenizer.

    `off` is why nothing of it may be cut, else None. `coarse` and `fine` are rows of bytes,
    [left * N_CLASSES + right]; fine cuts are looked for only where added tokens were found, coarse
    ones hold beside any added token. `variants` encode a part that begins the text, one behind an
    added token and one at a cut; equal ones are listed once, `variant_of` names each one's. Parts
    that don't stand side by side may be joined at a pair of `seams`; the variant for cuts encodes
    a blank and a part as `blank_variant` the part alone (-1: there is no such variant).
    `affixes` are the ids put before and behind a text, by add_special_tokens, or None if unknown.
    """

    off: str | None
    rules: tuple[Rule, ...] = ()
    refused: tuple[str, ...] = ()
    recognised: tuple[tuple[str, str], ...] = ()
    coarse: bytes = bytes(N_CLASSES * N_CLASSES)
    fine: bytes = bytes(N_CLASSES * N_CLASSES)
    seams: bytes = bytes(N_CLASSES * N_CLASSES)
    separators: tuple[Separator, ...] = ()
    variants: tuple[Variant, ...] = ()
    variant_of: tuple[int, int, int] = (0, 0, 0)
    blank_variant: int = -1
    affixes: tuple[tuple[tuple[int, ...], tuple[int, ...]] | None, ...] = (None, None)

    @property
    def piece_left(self) -> CharClass:
        """The class taken to stand before a piece.

        A newline that begins one is like a newline behind a visible character, unless something
        is put before the piece.
        """
        return C.LETTER if len(self.variants) == 1 else C.OTHER

    def allows(self, left: CharClass, right: CharClass, *, fine: bool = True) -> bool:
        """Return whether a text may be cut between characters of these classes."""
        return bool((self.fine if fine else self.coarse)[left * N_CLASSES + right])


class _Unrecognised(Exception):
    """A component that no rule knows."""


def plan_cuts(tokenizer: Tokenizer) -> CutPlan:
    """Derive where texts may be cut for `tokenizer`, which truncates and pads nothing.

    Cost: well under a millisecond where a pre-tokenizer forces the cuts; a pass over the
          vocabulary where only that can.
    """
    reason = why_random(tokenizer.model)
    if reason is not None:
        return CutPlan(off=reason)
    try:
        states = {
            part: json.loads(component_state(getattr(tokenizer, part)))
            for part in ("normalizer", "pre_tokenizer", "post_processor")
        }
    except CopyError as error:
        return CutPlan(off=error.reason)
    return _Planner(tokenizer, states).plan()


class _Planner:
    """The derivation for one tokenizer; every step adds rules, or a sentence why not."""

    def __init__(self, tokenizer: Tokenizer, states: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.normalizer = states["normalizer"]
        self.pre_tokenizer = states["pre_tokenizer"]
        self.post_processor = states["post_processor"]
        self.refused: list[str] = []
        self.recognised: list[tuple[str, str]] = []

    def plan(self) -> CutPlan:
        affixes = self._affixes()
        if affixes == (None, None):
            return self._off("post_processor")
        rules = self._rules()
        tokens = added_tokens(self.tokenizer)
        by_phase = self._by_phase(tokens)
        variants = self._variants()
        off = self._why_off(by_phase, variants)
        if off is not None:
            return self._off(off)
        if _may_appear(self.normalizer, by_phase[1]):
            self._refuse(
                "an added token is looked for in the normalised text, where other characters may "
                "have become its own: cuts at added tokens of the raw text only"
            )
            rules = []
        separators = self._separators(by_phase)
        coarse, fine, seams = self._matrices(rules, separators, by_phase[1])
        distinct = tuple(dict.fromkeys(variants))
        return CutPlan(
            off=None,
            rules=tuple(rules),
            refused=tuple(self.refused),
            recognised=tuple(self.recognised),
            coarse=coarse,
            fine=fine,
            seams=seams,
            separators=tuple(separators),
            variants=distinct,
            variant_of=tuple(distinct.index(one) for one in variants),  # type: ignore[arg-type]
            blank_variant=self._blank_variant(variants, tokens),
            affixes=affixes,
        )

    def _off(self, reason: str) -> CutPlan:
        return CutPlan(reason, refused=tuple(self.refused), recognised=tuple(self.recognised))

    # ---- rules

    def _rules(self) -> list[Rule]:
        try:
            normal = read_normalizer(self.normalizer)
            self._check_ascii(normal)
        except _Unrecognised as unknown:
            self._refuse(f"normalizer {unknown}: cuts at added tokens only")
            return []
        self.recognised.append(("normalizer", normal.name))
        try:
            rules = self._pre_tokenizer_rules(normal)
        except _Unrecognised as unknown:
            self._refuse(f"pre-tokenizer {unknown}: cuts at added tokens only")
            return []
        return [rule for rule in (self._narrowed(rule, normal) for rule in rules) if rule]

    def _check_ascii(self, normal: Normalizer) -> None:
        """Hold the reading of the normalizer against the component itself."""
        if self.tokenizer.normalizer is None:
            return
        visible = "".join(map(chr, range(0x21, 0x7F)))
        sample = f"a{visible} {visible}a"
        want = sample.replace(" ", normal.space)
        got = self.tokenizer.normalizer.normalize_str(sample).removeprefix(normal.prefix)
        if normal.lowers:
            want = want.lower()
        for string in normal.replaced:
            want, got = want.replace(string, ""), got.replace(string, "")
        if want != got:
            raise _Unrecognised("changes visible ASCII characters")
        if "Precompiled" in normal.name:
            self._check_blanks(normal)

    def _check_blanks(self, normal: Normalizer) -> None:
        """See that a map of characters makes nothing else than a blank of any blank."""
        lines = "a\ta\na\ra"
        marked = "".join(f"a {chr(mark)}" for mark in range(0x300, 0x370)) + "a"
        for sample in (lines, marked):
            got = self.tokenizer.normalizer.normalize_str(sample).removeprefix(normal.prefix)
            kept = sum(char in f"\t\n\r {normal.space}" for char in got)
            if kept != sum(map(sample.count, "\t\n\r ")):
                raise _Unrecognised("changes blanks into something else")

    def _narrowed(self, rule: Rule, normal: Normalizer) -> Rule | None:
        """Drop from a rule the classes that the normalizer may turn into others."""
        left, right = rule.left, rule.right
        if normal.strips:  # only a visible character before and a blank behind are never stripped
            left, right = left & VISIBLE, right & _SPACE
        if not normal.keeps_lines and C.SPACE not in left:
            left = left - _BLANK_LEFT  # a newline becomes a blank, of which no rule here speaks
        if not normal.keeps_beyond:
            beyond = {C.NON_ASCII_LETTER, C.NON_ASCII_PUNCTUATION}
            right = right - beyond
            if not rule.is_apart and (normal.pads_beyond or not right <= WHITESPACE):
                left = left - beyond
            if normal.strips and normal.pads_beyond:  # the blank put behind it would be stripped
                left = left - beyond
        return replace(rule, left=left, right=right) if left and right else None

    def _pre_tokenizer_rules(self, normal: Normalizer) -> list[Rule]:
        stages = stages_of(self.pre_tokenizer)
        self.recognised.append(("pre_tokenizer", ", ".join(s["type"] for s in stages) or "none"))
        if normal.space == MARKER:
            stages = [stage for stage in stages if not _splits_at_blank_only(stage)]
            if stages and stages[0]["type"] != "Metaspace":
                raise _Unrecognised(f"{stages[0]['type']} behind a normalizer that hides blanks")
        if normal.marks_runs and (not stages or stages[0]["type"] != "Metaspace"):
            raise _Unrecognised("finds no blank where the normalizer marked a run of them")
        rules: list[Rule] = []
        for index, stage in enumerate(stages):
            if _hides_blanks(stage) and index + 1 < len(stages):
                raise _Unrecognised("ByteLevel hides blanks from the stages behind it")
            own, is_last = _stage_rules(stage, is_first=index == 0)
            if normal.composes and stage["type"] in _BY_NEIGHBOURS:
                own = [_without_signs(rule) for rule in own]
            rules += own
            if is_last:
                return rules
        return rules or self._vocabulary_rules(normal, stages)

    def _vocabulary_rules(self, normal: Normalizer, stages: list[Any]) -> list[Rule]:
        """Return the pairs that no token of the vocabulary spans."""
        model = self.tokenizer.model
        why = None if not stages else "the pre-tokenizer forces none"
        if why is None and (normal.replaced or normal.composes):
            why = "the normalizer makes one character of several"
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=False) if why is None else {}
        if why is None:
            why = _why_merges_tell_nothing(model, vocabulary)
        if why is not None:
            self._refuse(f"no cut is forced, and the vocabulary proves none: {why}")
            return []
        known = _known_classes(vocabulary, byte_fallback=model.byte_fallback, normal=normal)
        spanned = _spanned_pairs(vocabulary, normal.space)
        self.recognised.append(VOCABULARY_PROOF)
        rules = [
            Rule(
                f"{left.name.lower()} | other",
                frozenset({left}),
                frozenset(right for right in known if (left, right) not in spanned),
                "no token of the vocabulary holds such a pair, so no merge crosses it",
            )
            for left in known
        ]
        return [rule for rule in rules if rule.right]

    # ---- added tokens

    def _by_phase(self, tokens: list[Any]) -> tuple[list[Any], list[Any]]:
        """Return the tokens found in the raw text, and those in the normalised pieces."""
        raw = [token for token in tokens if not token.normalized]
        return raw, [token for token in tokens if token.normalized]

    def _why_tokens_off(self, tokens: list[Any]) -> str | None:
        if any(len(token.content) > _LONGEST_TOKEN for token in tokens):
            self._refuse(f"an added token is longer than {_LONGEST_TOKEN} characters")
            return "long_added_token"
        if free_edge(tokens) is None:
            self._refuse("added tokens hold every character that a separator could begin with")
            return "no_separator"
        takes_blanks = any(token.lstrip or token.rstrip for token in tokens)
        if takes_blanks and any(token.content != token.content.strip() for token in tokens):
            self._refuse("an added token takes blanks that may belong to another one")
            return "added_tokens_overlap"
        return None

    def _why_off(
        self, by_phase: tuple[list[Any], list[Any]], variants: tuple[Variant, ...]
    ) -> str | None:
        reason = self._why_tokens_off([token for phase in by_phase for token in phase])
        _, normalized = by_phase
        if reason is not None or not normalized:
            return reason
        if self.normalizer is not None:
            return self._why_normalized_off(normalized, variants)
        # Found in one pass with the others: allowed only where the order can't matter.
        contents = [[token.content for token in phase] for phase in by_phase]
        if _meet(contents[0], contents[1]) or _meet(contents[1], contents[0]):
            self._refuse("added tokens of both phases overlap each other")
            return "added_tokens_overlap"
        return None

    def _why_normalized_off(
        self, normalized: list[Any], variants: tuple[Variant, ...]
    ) -> str | None:
        if any(token.lstrip or token.rstrip or token.single_word for token in normalized):
            self._refuse("an added token with flags is looked for in the normalised text")
            return "normalized_token_flags"
        names = {self.tokenizer.normalizer.normalize_str(token.content) for token in normalized}
        if len(names) < len(normalized):  # each copy of the tokenizer finds one by chance
            self._refuse("two added tokens are the same once normalised")
            return "normalized_tokens_alike"
        if len(set(variants)) > 1:
            self._refuse("normalised added tokens read otherwise behind a cut")
            return "normalized_token_prefix"
        return None

    def _separators(self, by_phase: tuple[list[Any], list[Any]]) -> list[Separator]:
        found = [*by_phase[0], *(by_phase[1] if self.normalizer is None else [])]
        contents = [token.content for token in found]
        overlapped = _overlapped(contents)
        is_nested = any(b.startswith(a) for a, b in pairwise(sorted(contents)))
        ids = {token.content: i for i, token in self._ids()}
        skip = self.tokenizer.encode_special_tokens
        # The scanner takes a token of the second phase for a piece's end, which it is not: a word
        # that it ends with would be a neighbour.
        ends = {class_of(token.content[-1]) for token in by_phase[1]}
        in_second = set() if ends & _MAYBE_WORDS else {id(token) for token in by_phase[1]}
        return [
            Separator(
                content=token.content,
                id=ids[token.content],
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
                in_piece=id(token) in in_second,
                skips=skip and token.special,
                opens=not (
                    token.lstrip
                    or token.single_word
                    or (skip and token.special)
                    or token.content in overlapped
                    or is_nested
                ),
            )
            for token in found
        ]

    def _ids(self) -> list[tuple[int, Any]]:
        return sorted(self.tokenizer.get_added_tokens_decoder().items())

    def _matrices(
        self, rules: list[Rule], separators: list[Separator], normalized: list[Any]
    ) -> tuple[bytes, bytes, bytes]:
        """Return coarse pairs, fine ones and seams, less those that an added token makes unsafe."""
        pairs = {pair for rule in rules for pair in rule.pairs()}
        for one in separators:
            first, last = class_of(one.content[0]), class_of(one.content[-1])
            if one.lstrip:  # it takes the blanks before it, so none of them may be cut off
                pairs -= {(left, right) for left in _BLANK_LEFT for right in {first, *WHITESPACE}}
            if one.single_word:  # its neighbours count: it is never cut off from one
                pairs -= {(left, first) for left in C if left not in _BLANK_LEFT}
                ends = {last, C.NEWLINE_RUN} if last is C.NEWLINE else {last}
                pairs -= {(end, right) for end in ends for right in C if right not in WHITESPACE}
            if one.skips or one.single_word:
                pairs -= set(_pairs_in(one.content))
        inside = {pair for one in separators for pair in _pairs_in(one.content)}
        coarse = {pair for pair in pairs - inside if _is_coarse(pair)}
        names = [token.content for token in normalized]
        if self.normalizer is not None:
            names += [self.tokenizer.normalizer.normalize_str(name) for name in names]
        seams = coarse.difference(*map(_pairs_in, names))
        return _matrix(coarse), _matrix(pairs), _matrix(seams)

    # ---- what is put around

    def _variants(self) -> tuple[Variant, Variant, Variant]:
        first = Variant(json.dumps(self.normalizer), json.dumps(self.pre_tokenizer))
        later = replace(first, pre_tokenizer=json.dumps(_never_first(self.pre_tokenizer)))
        inside = Variant(
            json.dumps(_without_prefix(self.normalizer)),
            json.dumps(_without_prefix_space(_never_first(self.pre_tokenizer))),
        )
        return first, later, inside

    def _blank_variant(self, variants: tuple[Variant, Variant, Variant], tokens: list[Any]) -> int:
        # A token with a blank could be found where the blank was put.
        is_free = not any(set(token.content) & {" ", MARKER} for token in tokens)
        return 0 if is_free and _puts_a_blank(*variants) else -1

    def _affixes(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]] | None, ...]:
        try:
            around = read_affixes(self.post_processor)
        except _Unrecognised as unknown:
            self._refuse(f"post-processor {unknown}: nothing is known to stand around a text")
            return (None, None)
        plain: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        for text in ("a", "a b"):
            bare = self._encoded(text, add_special_tokens=False)
            if self._encoded(text, add_special_tokens=True) != [*around[0], *bare, *around[1]]:
                self._refuse("the post-processor does more than put ids around")
                return (plain, None)
        return (plain, around)

    def _encoded(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException as error:  # a tokenizer without unk raises bare Exception
            if not is_of_library(error):
                raise
            return []
        return ids

    def _refuse(self, sentence: str) -> None:
        self.refused.append(sentence)


# ---- normalizers


@dataclass(frozen=True, slots=True)
class Normalizer:
    """What a normalizer does to the characters that rules speak of.

    `space` is what a blank becomes, `prefix` what is put before a text; `strips` says that blanks
    at the ends go, `keeps_beyond` that letters and punctuation beyond ASCII keep their class,
    `keeps_lines` that newlines and tabs stay what they are, `pads_beyond` that blanks may appear
    around a character beyond ASCII, `composes` that a mark behind a sign may make it another
    one (U+2260 is no punctuation), `marks_runs` that a run of blanks becomes a marker.
    `replaced` are strings of visible characters or blanks that become another one.
    """

    name: str = "none"
    space: str = " "
    prefix: str = ""
    strips: bool = False
    lowers: bool = False
    keeps_beyond: bool = True
    keeps_lines: bool = True
    pads_beyond: bool = False
    composes: bool = False
    marks_runs: bool = False
    replaced: tuple[str, ...] = ()


def read_normalizer(state: Any) -> Normalizer:
    """Return what a normalizer does; `_Unrecognised` if it may do more than is known."""
    if state is None:
        return Normalizer()
    kind = state["type"]
    read = _READ_NORMALIZER.get(kind)
    if read is None:
        raise _Unrecognised(f"{kind} is not known")
    return read(kind, state)


def _composed(kind: str, _state: Any) -> Normalizer:
    return Normalizer(kind, composes=True)


def _decomposed(kind: str, _state: Any) -> Normalizer:
    return Normalizer(kind, keeps_beyond=False, composes=kind == "NFKC")


def _cleaned(kind: str, state: Any) -> Normalizer:
    return Normalizer(
        kind,
        lowers=state.get("lowercase", False),
        keeps_beyond=False,
        keeps_lines=False,
        pads_beyond=True,
        composes=kind == "Precompiled",
    )


_READ_NORMALIZER: dict[str, Callable[[str, Any], Normalizer]] = {
    "Sequence": lambda _, state: _in_sequence([read_normalizer(o) for o in state["normalizers"]]),
    "NFC": _composed,
    "NFD": _decomposed,
    "NFKC": _decomposed,
    "NFKD": _decomposed,
    "StripAccents": _decomposed,
    "Lowercase": lambda kind, _: Normalizer(kind, lowers=True),
    "Nmt": _cleaned,
    "Precompiled": _cleaned,
    "BertNormalizer": _cleaned,
    "Strip": lambda kind, _: Normalizer(kind, strips=True),
    "Prepend": lambda kind, state: Normalizer(kind, prefix=state["prepend"]),
    "Replace": lambda _, state: _read_replace(state["pattern"], state["content"]),
}


def _read_replace(pattern: dict[str, str], content: str) -> Normalizer:
    string, regex = pattern.get("String"), pattern.get("Regex")
    if string == " " and content == MARKER:
        return Normalizer("Replace", space=MARKER, keeps_beyond=False)
    if regex in (" {2,}", "  +") and content in (" ", MARKER):
        # A run becomes one: forced boundaries never cut it, what the vocabulary proves could.
        return Normalizer("Replace", marks_runs=content == MARKER, replaced=("  ",))
    if string in ("``", "''") and content == '"':
        return Normalizer("Replace", replaced=(string, '"'))
    raise _Unrecognised(f"Replace of {string or regex!r} by {content!r} is not known")


def _in_sequence(parts: list[Normalizer]) -> Normalizer:
    spaces = [one.space for one in parts if one.space != " "]
    return Normalizer(
        name=", ".join(one.name for one in parts) or "none",
        space=spaces[0] if spaces else " ",
        prefix="".join(one.prefix for one in parts),
        strips=any(one.strips for one in parts),
        lowers=any(one.lowers for one in parts),
        keeps_beyond=all(one.keeps_beyond for one in parts),
        keeps_lines=all(one.keeps_lines for one in parts),
        pads_beyond=any(one.pads_beyond for one in parts),
        composes=any(one.composes for one in parts),
        marks_runs=any(one.marks_runs for one in parts),
        replaced=tuple(string for one in parts for string in one.replaced),
    )


# ---- pre-tokenizers


def _splits_at_blank_only(stage: Any) -> bool:
    """Return whether a stage finds nothing where no blank is left."""
    return bool(stage["type"] == "Split" and stage["pattern"] == {"String": " "})


def _hides_blanks(stage: Any) -> bool:
    """Return whether a stage turns blanks into other characters and splits nothing."""
    return bool(stage["type"] == "ByteLevel" and not stage.get("use_regex", True))


def _stage_rules(stage: Any, *, is_first: bool) -> tuple[list[Rule], bool]:
    """Return the rules of one stage, and whether what it leaves open stays open."""
    kind = stage["type"]
    if kind in _BY_NEIGHBOURS:
        return _BY_NEIGHBOURS[kind](stage), False
    if kind == "Metaspace":
        return _metaspace_rules(stage), True
    if kind == "ByteLevel":
        if stage.get("add_prefix_space") and not is_first:
            raise _Unrecognised("ByteLevel puts a blank before every part of a text")
        return (_gpt2_rules(), True) if stage.get("use_regex", True) else ([], False)
    if kind == "Split":
        return _split_rules(stage)
    raise _Unrecognised(f"{kind} is not known")


def _without_signs(rule: Rule) -> Rule:
    """Return a rule that no longer needs a sign to stay one, whatever mark comes behind it."""
    return rule if rule.is_apart else replace(rule, right=rule.right - {C.PUNCTUATION})


def _bert_rules(_stage: Any) -> list[Rule]:
    return [*_blank_rules(), *_sign_rules("isolated")]


def _blank_rules(_stage: Any = None) -> list[Rule]:
    why = "white space separates words and is dropped"
    return [
        Rule("visible | blank", VISIBLE, WHITESPACE, why, is_apart=True),
        Rule("blank | visible", _BLANK_LEFT, VISIBLE, why, is_apart=True),
    ]


def _whitespace_rules(_stage: Any) -> list[Rule]:
    words = _LETTERS | _DIGITS | {C.UNDERSCORE}
    signs = _SIGNS - {C.UNDERSCORE}
    why = "words and punctuation are matched apart"
    return [
        *_blank_rules(),
        Rule("word | punctuation", words, signs, why),
        Rule("punctuation | word", signs, words, why),
    ]


def _sign_rules(behavior: str) -> list[Rule]:
    others = _LETTERS | _DIGITS | WHITESPACE
    rules = []
    if behavior != "mergedwithprevious":
        rules.append(
            Rule("other | punctuation", others, _SIGNS, "a part begins with each punctuation")
        )
    if behavior != "mergedwithnext":
        rules.append(
            Rule("punctuation | other", _SIGNS, others - _NEWLINE, "a part ends with punctuation")
        )
    return rules


def _punctuation_rules(stage: Any) -> list[Rule]:
    return _sign_rules(stage.get("behavior", "Isolated").lower().replace("_", ""))


def _digit_rules(stage: Any) -> list[Rule]:
    others = VISIBLE - _DIGITS | WHITESPACE
    why = "digits are parts of their own"
    rules = [
        Rule("digit | other", _DIGITS, others, why),
        Rule("other | digit", others | {C.NEWLINE_RUN}, _DIGITS, why),
    ]
    if stage.get("individual_digits"):
        rules.append(Rule("digit | digit", _DIGITS, _DIGITS, "every digit is a part of its own"))
    return rules


_BY_NEIGHBOURS = {
    "BertPreTokenizer": _bert_rules,
    "WhitespaceSplit": _blank_rules,
    "Whitespace": _whitespace_rules,
    "Punctuation": _punctuation_rules,
    "Digits": _digit_rules,
}


def _metaspace_rules(stage: Any) -> list[Rule]:
    if stage.get("replacement", MARKER) != MARKER:
        raise _Unrecognised(f"Metaspace with {stage['replacement']!r} is not known")
    if not stage.get("split", True):
        raise _Unrecognised("Metaspace without split forces no boundary")
    why = "a part begins with every blank"
    return [Rule("visible | blank", VISIBLE, _SPACE, why, is_apart=True)]


def _split_rules(stage: Any) -> tuple[list[Rule], bool]:
    pattern = stage["pattern"].get("Regex", "").replace("\r", r"\r").replace("\n", r"\n")
    way = stage["behavior"], bool(stage.get("invert"))
    # What a pattern of _PATTERNS leaves unmatched is nothing, so keeping the matches is the same.
    if way != ("Isolated", False) and (way != ("Removed", True) or pattern not in _PATTERNS):
        raise _Unrecognised(f"Split by {stage['pattern']} ({stage['behavior']}) is not known")
    if pattern == _NUMBERS:  # DeepSeek: one to three digits at a time
        return [rule for rule in _digit_rules({}) if not _is_beyond(rule)], False
    if pattern == _CJK:  # only letters beyond ASCII, and a run of them ends before anything else
        return [], False
    if pattern not in _PATTERNS:
        raise _Unrecognised(f"Split by {pattern or stage['pattern']!r} is not known")
    return _PATTERNS[pattern](), True


def _is_beyond(rule: Rule) -> bool:
    return bool((rule.left | rule.right) <= {C.NON_ASCII_LETTER, C.NON_ASCII_PUNCTUATION})


def _end_rules() -> list[Rule]:
    """Return what every pattern of the GPT family shares."""
    return [
        Rule(
            "visible | space",
            VISIBLE,
            frozenset({C.SPACE, C.TAB}),
            "no alternative goes on from a visible character over a blank",
        ),
        Rule(
            "digit | other",
            _DIGITS,
            _LETTERS | _SIGNS | {C.NEWLINE, C.RETURN},
            "a run of digits ends before anything else",
        ),
    ]


def _letter_rule(right: Iterable[CharClass]) -> Rule:
    why = "a run of letters ends before anything else, and nothing looks further"
    return Rule("letter | other", _LETTERS, frozenset(right), why)


def _gpt2_rules() -> list[Rule]:
    lines = frozenset({C.NEWLINE, C.RETURN})
    return [
        *_end_rules(),
        _letter_rule(_SIGNS | _DIGITS | lines),
        Rule("sign | newline", _SIGNS, lines, "punctuation ends before white space"),
        Rule(
            "sign | word",
            _SIGNS - {C.APOSTROPHE},
            _LETTERS | _DIGITS,
            "punctuation ends before a letter or digit; only an apostrophe can begin with one",
        ),
        Rule(
            "newline | visible",
            _NEWLINE,
            VISIBLE,
            "one newline behind a visible character is a part of its own, followed or not",
        ),
    ]


def _cl100k_rules(newline_before: frozenset[CharClass] = VISIBLE) -> list[Rule]:
    lines = frozenset({C.NEWLINE, C.RETURN})
    return [
        *_end_rules(),
        _letter_rule(_SIGNS | _DIGITS | lines),
        Rule("sign | digit", _SIGNS, _DIGITS, "punctuation ends before a digit"),
        Rule(
            "newline | visible",
            _ENDS_OF_LINES,
            newline_before,
            "white space up to its last newline is one part, whatever comes behind",
        ),
    ]


def _qwen_rules() -> list[Rule]:
    one_digit = Rule("digit | digit", _DIGITS, _DIGITS, "every digit is a part of its own")
    return [*_cl100k_rules(), one_digit]


def _o200k_rules() -> list[Rule]:
    # A contraction belongs to the word before it, and slashes follow newlines into punctuation.
    rules = _cl100k_rules(VISIBLE - {C.SLASH})
    return [
        replace(rule, right=rule.right - {C.APOSTROPHE}) if rule.left == _LETTERS else rule
        for rule in rules
    ]


def _deepseek_rules() -> list[Rule]:
    # A word may begin with a digit; where numbers are split before, that stage forces the cut.
    return [
        replace(rule, right=rule.right - _LETTERS) if rule.left == _DIGITS else rule
        for rule in _cl100k_rules()
    ]


_PATTERNS = {
    _GPT2: _gpt2_rules,
    _CL100K: _cl100k_rules,
    _CL100K_POSSESSIVE: _cl100k_rules,
    _TIKTOKEN: _cl100k_rules,
    _BAILING: _qwen_rules,
    _QWEN2: _qwen_rules,
    _SEED: _qwen_rules,
    _QWEN3_5: _qwen_rules,
    _O200K: _o200k_rules,
    _TEKKEN: _o200k_rules,
    _DEEPSEEK: _deepseek_rules,
}


# ---- vocabularies


def _why_merges_tell_nothing(model: Any, vocabulary: dict[str, int]) -> str | None:
    if not isinstance(model, BPE):
        return "only BPE merges neighbours and nothing else"
    if model.ignore_merges:
        return "a whole text in the vocabulary skips the merges"
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return "the ends of a text are marked"
    if len(set(vocabulary.values())) < len(vocabulary):
        return "one id stands for two tokens, and merges go by ids"
    return None


def _known_classes(
    vocabulary: dict[str, int], *, byte_fallback: bool, normal: Normalizer
) -> list[CharClass]:
    """Return the ASCII classes whose characters are all tokens: none can fuse into an unknown."""
    has_bytes = byte_fallback and _has_plain_bytes(vocabulary)
    missing = {
        class_of(char)
        for char in map(chr, range(128))
        if (normal.space if char == " " else char) not in vocabulary and not has_bytes
    }
    usable = [*sorted(VISIBLE), C.SPACE]
    beyond = {C.NON_ASCII_LETTER, C.NON_ASCII_PUNCTUATION}
    return [one for one in usable if one not in missing and one not in beyond]


def _has_plain_bytes(vocabulary: dict[str, int]) -> bool:
    """Return whether every byte has a token, and no merge goes by the name of one."""
    others = "\n".join(vocabulary.keys() - BYTE_NAMES)
    return vocabulary.keys() >= BYTE_NAMES and not BYTE_NAME.search(others)


def _spanned_pairs(vocabulary: Iterable[str], space: str) -> set[Pair]:
    """Return the pairs of classes that stand side by side in some token."""
    all_chars = "".join(vocabulary)
    between = next(char for char in map(chr, range(0xE000, 0x110000)) if char not in all_chars)
    joined = between.join(vocabulary).replace(space, " ")
    shape = re.sub("[A-Za-z]+", "aa", joined)  # most of it
    inside = (pair for pair in set(pairwise(shape)) if between not in pair)
    return {pair for left, right in inside for pair in _pairs_in(left + right)}


# ---- added tokens


def _may_appear(normalizer: Any, normalized: list[Any]) -> bool:
    """Return whether added tokens may appear in a text that does not hold their characters."""
    return normalizer is not None and bool(normalized)


def _pairs_in(text: str) -> Iterator[Pair]:
    """Yield the pairs of classes inside a text, with every class its left one may have."""
    for left, right in pairwise(map(class_of, text.replace(MARKER, " "))):
        yield left, right
        if left is C.NEWLINE:
            yield C.NEWLINE_RUN, right
        if right is C.NEWLINE_RUN:
            yield left, C.NEWLINE


def _are_many(contents: Iterable[str]) -> bool:
    """Return whether the strings are too many and too long to compare all their parts."""
    return sum(len(content) ** 2 for content in contents) > _MAX_PARTS


def _meet(first: list[str], second: list[str]) -> bool:
    """Return whether an occurrence of a first may share characters with one of a second."""
    if first and second and _are_many([*first, *second]):
        return True
    prefixes = {text[:end] for text in second for end in range(1, len(text) + 1)}
    whole = set(second)
    return any(
        text[start:end] in prefixes and (end == len(text) or text[start:end] in whole)
        for text in first
        for start in range(len(text))
        for end in range(start + 1, len(text) + 1)
    )


def _overlapped(contents: list[str]) -> set[str]:
    """Return the contents that may begin inside an occurrence of another one."""
    if _are_many(contents):
        return set(contents)
    ordered, whole = sorted(contents), set(contents)
    rests = {content[start:] for content in contents for start in range(1, len(content))}
    inside = {rest[:end] for rest in rests for end in range(1, len(rest) + 1)} & whole
    n_open = [0] * (len(ordered) + 1)  # ranges of contents that go on from some rest
    for rest in rests:
        n_open[bisect_left(ordered, rest)] += 1
        n_open[bisect_right(ordered, rest, key=lambda one: one[: len(rest)])] -= 1
    goes_on = {one for one, n in zip(ordered, accumulate(n_open), strict=False) if n}
    return inside | goes_on


def _is_coarse(pair: Pair) -> bool:
    left, right = pair
    return (left in VISIBLE and right is C.SPACE) or (left in _ENDS_OF_LINES and right in VISIBLE)


def _matrix(pairs: set[Pair]) -> bytes:
    cells = bytearray(N_CLASSES * N_CLASSES)
    for left, right in pairs:
        cells[left * N_CLASSES + right] = 1
    return bytes(cells)


# ---- what is put before a text, or around it


def _never_first(state: Any) -> Any:
    """Return a pre-tokenizer that treats no part as the beginning of the text."""
    if state is None:
        return None
    if state["type"] == "Sequence":
        return {**state, "pretokenizers": [_never_first(one) for one in state["pretokenizers"]]}
    if state["type"] == "Metaspace" and state.get("prepend_scheme") == "first":
        return {**state, "prepend_scheme": "never"}
    return state


def _without_prefix_space(state: Any) -> Any:
    """Return a pre-tokenizer that puts nothing before a part that was cut off."""
    if state is None:
        return None
    if state["type"] == "Sequence":
        stages = state["pretokenizers"]
        if not stages:
            return state
        return {**state, "pretokenizers": [_without_prefix_space(stages[0]), *stages[1:]]}
    if state["type"] == "Metaspace":
        return {**state, "prepend_scheme": "never"}
    if state["type"] == "ByteLevel":
        return {**state, "add_prefix_space": False}
    return state


def _without_prefix(state: Any) -> Any:
    """Return a normalizer that neither prepends nor strips at the left end."""
    if state is None:
        return None
    if state["type"] == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    if state["type"] == "Strip":
        return {**state, "strip_left": False}
    if state["type"] == "Sequence":
        return {**state, "normalizers": [_without_prefix(one) for one in state["normalizers"]]}
    return state


def _puts_a_blank(first: Variant, later: Variant, inside: Variant) -> bool:
    """Return whether `first` and `later` put a blank before a part, and nothing else is done."""
    return (
        first == later != inside
        and first.pre_tokenizer == inside.pre_tokenizer
        and stages_of(json.loads(first.normalizer))
        == [{"type": "Prepend", "prepend": MARKER}, MARKS_BLANKS]
    )


def read_affixes(state: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that a post-processor puts before and behind a text."""
    if state is None or state["type"] == "ByteLevel":
        return (), ()
    kind = state["type"]
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (state["cls"][1],), (state["sep"][1],)
    if kind == "TemplateProcessing":
        return _template_affixes(state)
    if kind == "Sequence":
        before: tuple[int, ...] = ()
        behind: tuple[int, ...] = ()
        for one in state["processors"]:
            own = read_affixes(one)
            before, behind = own[0] + before, behind + own[1]
        return before, behind
    raise _Unrecognised(f"{kind} is not known")


def _template_affixes(state: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    sides: list[list[int]] = [[]]
    for piece in state["single"]:
        if "Sequence" in piece:
            sides.append([])
        else:
            name = piece["SpecialToken"]["id"]
            sides[-1] += state["special_tokens"][name]["ids"]
    if len(sides) != 2:  # noqa: PLR2004 (before the text and behind it)
        raise _Unrecognised("TemplateProcessing that names the text not exactly once")
    return tuple(sides[0]), tuple(sides[1])
