"""The ids that a post-processor puts around a text, and the variants that encode its segments.

A component that puts something before each text, or strips its left end (Prepend, Metaspace,
add_prefix_space, Strip), must not do so in the middle of a text. So the segments after the first
one are encoded with variants of the components that don't.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tokcache.errors import Unrecognised
from tokcache.text.cuts.plan import Variant
from tokcache.text.engines.components import MARKER, MARKS_BLANKS, stages_of
from tokcache.text.engines.copying import result_or_error

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokenizers import AddedToken, Tokenizer

    from tokcache.text.cuts.rules import Affixes

    Variants = tuple[Variant, Variant, Variant]


# ---- ids around a text


def find_affixes(
    tokenizer: Tokenizer, post_processor: Any
) -> tuple[tuple[Affixes | None, Affixes | None], tuple[str, ...]]:
    """Return the ids put around a text without and with special tokens, and why they are unknown.

    They are read from the serialised post-processor and verified on two texts.
    """
    try:
        around = read_affixes(post_processor)
    except Unrecognised as unknown:
        reason = f"post-processor {unknown}: the ids around a text are unknown"
        return (None, None), (reason,)
    plain: Affixes = ((), ())
    for text in ("a", "a b"):
        bare = _encoded(tokenizer, text, add_special_tokens=False)
        whole = _encoded(tokenizer, text, add_special_tokens=True)
        if whole != [*around[0], *bare, *around[1]]:
            return (plain, None), ("the post-processor does more than put ids around a text",)
    return (plain, around), ()


def read_affixes(state: Any) -> Affixes:
    """Return the ids that a post-processor, serialised as `state`, puts before and after a text.

    Errors: Unrecognised for a post-processor that may do more.
    """
    if state is None or state["type"] == "ByteLevel":
        return (), ()
    kind = state["type"]
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (state["cls"][1],), (state["sep"][1],)
    if kind == "TemplateProcessing":
        sides: list[list[int]] = [[]]  # the ids before the text, then those after it
        for piece in state["single"]:
            if "Sequence" in piece:
                sides.append([])
            else:
                name = piece["SpecialToken"]["id"]
                sides[-1] += state["special_tokens"][name]["ids"]
        if len(sides) != 2:  # noqa: PLR2004 (before and after)
            raise Unrecognised("TemplateProcessing that does not name the text exactly once")
        return tuple(sides[0]), tuple(sides[1])
    if kind == "Sequence":
        before: tuple[int, ...] = ()
        after: tuple[int, ...] = ()
        for one in state["processors"]:
            own = read_affixes(one)
            before, after = own[0] + before, after + own[1]
        return before, after
    raise Unrecognised(f"{kind} is not known")


def _encoded(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    found = result_or_error(tokenizer.encode, text, add_special_tokens=add_special_tokens)
    return [] if isinstance(found, BaseException) else found.ids


# ---- variants


def find_variants(normalizer: Any, pre_tokenizer: Any) -> Variants:
    """Return the variants for a segment that begins the text, follows an added token or a cut."""
    first = Variant(json.dumps(normalizer), json.dumps(pre_tokenizer))
    later = replace(first, pre_tokenizer=json.dumps(_never_first(pre_tokenizer)))
    inside = Variant(
        json.dumps(_without_prefix(normalizer)),
        json.dumps(_without_prefix_space(_never_first(pre_tokenizer))),
    )
    return first, later, inside


def find_space_variant(variants: Variants, tokens: Iterable[AddedToken]) -> int:
    """Return the index of the variant that only puts a space before a segment, or -1.

    An added token that holds a space could be found at the space put there.
    """
    first, later, inside = variants
    puts_only_a_space = (
        first == later != inside
        and first.pre_tokenizer == inside.pre_tokenizer
        and stages_of(json.loads(first.normalizer))
        == [{"type": "Prepend", "prepend": MARKER}, MARKS_BLANKS]
    )
    if not puts_only_a_space or any({" ", MARKER} & {*token.content} for token in tokens):
        return -1
    return 0


def _never_first(state: Any) -> Any:
    """Return a pre-tokenizer that treats no segment as the beginning of the text."""
    if state is None:
        return None
    if state["type"] == "Sequence":
        return {**state, "pretokenizers": [_never_first(one) for one in state["pretokenizers"]]}
    if state["type"] == "Metaspace" and state.get("prepend_scheme") == "first":
        return {**state, "prepend_scheme": "never"}
    return state


def _without_prefix_space(state: Any) -> Any:
    """Return a pre-tokenizer that puts nothing before a segment."""
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
    """Return a normalizer that neither prepends anything nor strips the left end."""
    if state is None:
        return None
    if state["type"] == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    if state["type"] == "Strip":
        return {**state, "strip_left": False}
    if state["type"] == "Sequence":
        return {**state, "normalizers": [_without_prefix(one) for one in state["normalizers"]]}
    return state
