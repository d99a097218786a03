"""Reads what a normalizer does to characters, and takes from the rules what it makes unsafe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tokcache.errors import Unrecognised
from tokcache.text.segments.char_classes import VISIBLE, WHITESPACE
from tokcache.text.segments.components import MARKER
from tokcache.text.segments.cuts.rules import NON_ASCII, SPACE, WHITESPACE_LEFT, C, Rule

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class Normalizer:
    """The effects of a normalizer on the characters that rules speak of.

    `space` is what a space becomes, `prefix` what is put before a text; `strips` says that
    whitespace at the ends goes, `keeps_non_ascii` that non-ASCII letters and punctuation keep
    their class, `keeps_lines` that newlines and tabs stay what they are, `pads_non_ascii` that
    spaces may appear around a non-ASCII character, `composes` that a mark after punctuation may
    make it another character (U+2260 is no punctuation), `marks_runs` that a run of spaces becomes
    a marker. `replaced` are strings of visible characters or spaces that become another one.
    """

    name: str = "none"
    space: str = " "
    prefix: str = ""
    strips: bool = False
    lowers: bool = False
    keeps_non_ascii: bool = True
    keeps_lines: bool = True
    pads_non_ascii: bool = False
    composes: bool = False
    marks_runs: bool = False
    replaced: tuple[str, ...] = ()


def read_normalizer(tokenizer: Tokenizer, state: Any) -> Normalizer:
    """Return what the normalizer of `tokenizer`, serialised as `state`, does.

    The reading is compared with the component itself on every visible ASCII character.

    Errors: Unrecognised if it may do more than is known.
    """
    found = _read(state)
    if tokenizer.normalizer is not None:
        _check_ascii(tokenizer.normalizer, found)
        if "Precompiled" in found.name:
            _check_whitespace(tokenizer.normalizer, found)
    return found


def narrowed(rules: Iterable[Rule], normalizer: Normalizer) -> tuple[Rule, ...]:
    """Drop from rules the classes that the normalizer may turn into others."""
    kept = (_narrowed(rule, normalizer) for rule in rules)
    return tuple(rule for rule in kept if rule.left and rule.right)


def _narrowed(rule: Rule, normalizer: Normalizer) -> Rule:
    left, right = rule.left, rule.right
    if normalizer.strips:  # never stripped: a visible character before, a space after
        left, right = left & VISIBLE, right & SPACE
    if not normalizer.keeps_lines and C.SPACE not in left:
        left = left - WHITESPACE_LEFT  # a newline becomes a space, of which no rule here speaks
    if not normalizer.keeps_non_ascii:
        right = right - NON_ASCII
        if not rule.is_apart and (normalizer.pads_non_ascii or not right <= WHITESPACE):
            left = left - NON_ASCII
        if normalizer.strips and normalizer.pads_non_ascii:  # the space after it would be stripped
            left = left - NON_ASCII
    return replace(rule, left=left, right=right)


def _check_ascii(component: Any, found: Normalizer) -> None:
    """Compare the reading with the component: ASCII must come out as read."""
    visible = "".join(map(chr, range(0x21, 0x7F)))
    sample = f"a{visible} {visible}a"
    want = sample.replace(" ", found.space)
    got = component.normalize_str(sample).removeprefix(found.prefix)
    if found.lowers:
        want = want.lower()
    for string in found.replaced:
        want, got = want.replace(string, ""), got.replace(string, "")
    if want != got:
        raise Unrecognised("changes visible ASCII characters")


def _check_whitespace(component: Any, found: Normalizer) -> None:
    """See that a map of characters turns whitespace into nothing but whitespace."""
    lines = "a\ta\na\ra"
    marked = "".join(f"a {chr(mark)}" for mark in range(0x300, 0x370)) + "a"
    for sample in (lines, marked):
        got = component.normalize_str(sample).removeprefix(found.prefix)
        kept = sum(char in f"\t\n\r {found.space}" for char in got)
        if kept != sum(map(sample.count, "\t\n\r ")):
            raise Unrecognised("changes blanks into something else")


# ---- reading


def _read(state: Any) -> Normalizer:
    if state is None:
        return Normalizer()
    kind = state["type"]
    read = READERS.get(kind)
    if read is None:
        raise Unrecognised(f"{kind} is not known")
    return read(kind, state)


def _composed(kind: str, _state: Any) -> Normalizer:
    return Normalizer(kind, composes=True)


def _decomposed(kind: str, _state: Any) -> Normalizer:
    return Normalizer(kind, keeps_non_ascii=False, composes=kind == "NFKC")


def _cleaned(kind: str, state: Any) -> Normalizer:
    return Normalizer(
        kind,
        lowers=state.get("lowercase", False),
        keeps_non_ascii=False,
        keeps_lines=False,
        pads_non_ascii=True,
        composes=kind == "Precompiled",
    )


READERS: dict[str, Callable[[str, Any], Normalizer]] = {
    "Sequence": lambda _, state: _in_sequence([_read(one) for one in state["normalizers"]]),
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
        return Normalizer("Replace", space=MARKER, keeps_non_ascii=False)
    if regex in (" {2,}", "  +") and content in (" ", MARKER):
        # A run becomes one: forced boundaries never cut it, what the vocabulary proves could.
        return Normalizer("Replace", marks_runs=content == MARKER, replaced=("  ",))
    if string in ("``", "''") and content == '"':
        return Normalizer("Replace", replaced=(string, '"'))
    raise Unrecognised(f"Replace of {string or regex!r} by {content!r} is not known")


def _in_sequence(parts: list[Normalizer]) -> Normalizer:
    spaces = [one.space for one in parts if one.space != " "]
    return Normalizer(
        name=", ".join(one.name for one in parts) or "none",
        space=spaces[0] if spaces else " ",
        prefix="".join(one.prefix for one in parts),
        strips=any(one.strips for one in parts),
        lowers=any(one.lowers for one in parts),
        keeps_non_ascii=all(one.keeps_non_ascii for one in parts),
        keeps_lines=all(one.keeps_lines for one in parts),
        pads_non_ascii=any(one.pads_non_ascii for one in parts),
        composes=any(one.composes for one in parts),
        marks_runs=any(one.marks_runs for one in parts),
        replaced=tuple(string for one in parts for string in one.replaced),
    )
