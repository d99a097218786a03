"""What a tokenizer puts before a text and after it: ids around the whole, a marker at its start.

The ids are read from the post-processor. What puts something before each text (Prepend, Metaspace,
add_prefix_space, Strip) must not do so in the middle of one: the variants are the components that
a continuation is encoded with.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tokcache.errors import Unrecognised
from tokcache.text.engines.copying import is_of_library
from tokcache.text.segments.components import MARKER, MARKS_BLANKS, stages_of
from tokcache.text.segments.cuts.plan import Variant

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokenizers import Tokenizer

    from tokcache.text.segments.cuts.rules import Affixes

    Variants = tuple[Variant, Variant, Variant]


# ---- ids around a text


def find_affixes(
    tokenizer: Tokenizer, post_processor: Any
) -> tuple[tuple[Affixes | None, Affixes | None], tuple[str, ...]]:
    """Return the ids put around a text without and with special tokens, and why they are unknown.

    They are read from the serialised post-processor and compared with the ids of two texts.
    """
    try:
        around = read_affixes(post_processor)
    except Unrecognised as unknown:
        return (None, None), (f"post-processor {unknown}: nothing is known to stand around a text",)
    plain: Affixes = ((), ())
    for text in ("a", "a b"):
        bare = _encoded(tokenizer, text, add_special_tokens=False)
        whole = _encoded(tokenizer, text, add_special_tokens=True)
        if whole != [*around[0], *bare, *around[1]]:
            return (plain, None), ("the post-processor does more than put ids around",)
    return (plain, around), ()


def read_affixes(state: Any) -> Affixes:
    """Return the ids that a post-processor puts before and after a text.

    Errors: Unrecognised for a post-processor that may do more.
    """
    if state is None or state["type"] == "ByteLevel":
        return (), ()
    kind = state["type"]
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (state["cls"][1],), (state["sep"][1],)
    if kind == "TemplateProcessing":
        return _template_affixes(state)
    if kind == "Sequence":
        before: tuple[int, ...] = ()
        after: tuple[int, ...] = ()
        for one in state["processors"]:
            own = read_affixes(one)
            before, after = own[0] + before, after + own[1]
        return before, after
    raise Unrecognised(f"{kind} is not known")


def _template_affixes(state: Any) -> Affixes:
    sides: list[list[int]] = [[]]
    for piece in state["single"]:
        if "Sequence" in piece:
            sides.append([])
        else:
            name = piece["SpecialToken"]["id"]
            sides[-1] += state["special_tokens"][name]["ids"]
    if len(sides) != 2:  # noqa: PLR2004 (before the text and after it)
        raise Unrecognised("TemplateProcessing that names the text not exactly once")
    return tuple(sides[0]), tuple(sides[1])


def _encoded(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    except BaseException as error:  # a tokenizer without unk raises bare Exception
        if not is_of_library(error):
            raise
        return []
    return ids


# ---- variants


def find_variants(normalizer: Any, pre_tokenizer: Any) -> Variants:
    """Return the components for a text's first part, one after an added token, and one at a cut."""
    first = Variant(json.dumps(normalizer), json.dumps(pre_tokenizer))
    later = replace(first, pre_tokenizer=json.dumps(_never_first(pre_tokenizer)))
    inside = Variant(
        json.dumps(_without_prefix(normalizer)),
        json.dumps(_without_prefix_space(_never_first(pre_tokenizer))),
    )
    return first, later, inside


def find_blank_variant(variants: Variants, contents: Iterable[str]) -> int:
    """Return the variant that puts a space before a part and does nothing else, or -1.

    `contents` are the added tokens: one with a space could be found where the space was put.
    """
    is_free = not any(set(content) & {" ", MARKER} for content in contents)
    return 0 if is_free and _puts_a_space(*variants) else -1


def _puts_a_space(first: Variant, later: Variant, inside: Variant) -> bool:
    """Return whether `first` and `later` put a space before a part, and nothing else is done."""
    return (
        first == later != inside
        and first.pre_tokenizer == inside.pre_tokenizer
        and stages_of(json.loads(first.normalizer))
        == [{"type": "Prepend", "prepend": MARKER}, MARKS_BLANKS]
    )


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
