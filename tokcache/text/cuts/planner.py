"""Derives the cut plan of a tokenizer from its components.

A cut is safe if T(left) + T(right) = T(left + right) for every left and right. The safe cuts are
derived from the tokenizer's components alone, stage by stage, as pairs of character classes: the
class of the last character of `left` and that of the first of `right` (`char_classes`). Every
rule carries its reason. A component that is not recognised allows no cut, and the plan says so.

1. The ids around a text must be known (`affixes`).
2. The normalizer must map each character of a pair by itself (`normalizers`).
3. A pre-tokenizer that forces a boundary in a pair makes a cut safe (`pre_tokenizers`, `regex`).
4. Where no stage forces a boundary, a BPE vocabulary can prove one: no token spans the pair
   (`vocabulary`).
5. The library finds added tokens before all that, and they may forbid cuts (`added_tokens`); some
   of them in the normalised text (`second_phase`).

Implementation: each step returns its findings, and `plan_cuts` alone puts them together.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokcache.errors import CopyError, Unrecognised
from tokcache.text.cuts.added_tokens import (
    Phases,
    pairs_inside,
    separators,
    why_no_cuts,
    without_unsafe,
)
from tokcache.text.cuts.affixes import find_affixes, find_space_variant, find_variants
from tokcache.text.cuts.char_classes import N_CLASSES
from tokcache.text.cuts.normalizers import (
    Normalizer,
    narrowed,
    read_normalizer,
    rewritten_pairs,
)
from tokcache.text.cuts.plan import CutPlan
from tokcache.text.cuts.pre_tokenizers import forced_cuts, splitting_stages
from tokcache.text.cuts.rules import Findings, Pair, is_coarse, pairs_in_any
from tokcache.text.cuts.second_phase import normalized_contents, unsafe_pairs, why_no_cut_inside
from tokcache.text.cuts.vocabulary import cuts_of_vocabulary, proves_none
from tokcache.text.engines.components import stages_of
from tokcache.text.engines.copying import component_state, why_random

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def plan_cuts(tokenizer: Tokenizer) -> CutPlan:
    """Return the cut plan of `tokenizer`, in which truncation and padding are off.

    Cost: well under a millisecond where a pre-tokenizer forces the cuts; a pass over the
          vocabulary where only the vocabulary can prove them; for a pattern that is not known some
          5 to 15 milliseconds, once in a process.
    """
    reason = why_random(tokenizer.model)
    if reason is not None:
        return CutPlan(off=reason)
    try:
        normalizer, pre_tokenizer, post_processor = (
            json.loads(component_state(component))
            for component in (
                tokenizer.normalizer,
                tokenizer.pre_tokenizer,
                tokenizer.post_processor,
            )
        )
    except CopyError as error:
        return CutPlan(off=error.reason)
    affixes, refused = find_affixes(tokenizer, post_processor)
    if affixes == (None, None):
        return CutPlan("post_processor", refused=refused)

    rules, reading = _find_rules(tokenizer, normalizer, pre_tokenizer)
    found = Findings(refused=refused) + rules
    variants = find_variants(normalizer, pre_tokenizer)
    distinct = tuple(dict.fromkeys(variants))
    phases = Phases.of(tokenizer)
    is_normalized = bool(stages_of(normalizer))
    in_phase = phases.normalized if is_normalized else []  # the second one, found by the library
    contents = normalized_contents(in_phase, distinct)
    off = why_no_cuts(phases, contents, is_normalized=is_normalized)
    if off is not None:
        return CutPlan(off.reason, (), (*found.refused, off.sentence), found.recognised)

    safe = {pair for rule in found.rules for pair in rule.pairs()} - rewritten_pairs(reading)
    why = why_no_cut_inside(contents, reading, variants) if in_phase else None
    if why is not None:
        found, safe = Findings((), found.recognised, (*found.refused, why)), set()
    elif in_phase:
        safe -= unsafe_pairs(in_phase, contents[0], reading)
    separated_by = separators(tokenizer, phases, is_normalized=is_normalized)
    safe = without_unsafe(safe, separated_by)
    inside = pairs_in_any(one.content for one in separated_by)
    coarse = {pair for pair in safe - inside if is_coarse(pair)}
    return CutPlan(
        off=None,
        rules=found.rules,
        refused=found.refused,
        recognised=found.recognised,
        coarse=_matrix(coarse),
        fine=_matrix(safe),
        seams=_matrix(coarse - pairs_inside(phases)),
        separators=separated_by,
        variants=distinct,
        variant_of=tuple(map(distinct.index, variants)),  # type: ignore[arg-type]
        space_variant=-1 if why else find_space_variant(variants, phases.all),
        affixes=affixes,
    )


def _find_rules(
    tokenizer: Tokenizer, normalizer: Any, pre_tokenizer: Any
) -> tuple[Findings, Normalizer]:
    """Return the cuts that normalizer, pre-tokenizer and model allow, without added tokens.

    The second value is the reading of the normalizer.
    """
    try:
        normal = read_normalizer(tokenizer, normalizer)
    except Unrecognised as unknown:
        refused = (f"normalizer {unknown}: cuts at added tokens only",)
        return Findings(refused=refused), Normalizer()
    stages = stages_of(pre_tokenizer)
    names = ", ".join(stage["type"] for stage in stages) or "none"
    recognised = Findings(recognised=(("normalizer", normal.name), ("pre_tokenizer", names)))
    try:
        stages, normal = splitting_stages(stages, normal)
        found = forced_cuts(stages, normal)
    except Unrecognised as unknown:
        refused = (f"pre-tokenizer {unknown}: cuts at added tokens only",)
        return recognised + Findings(refused=refused), normal
    if not found.rules and stages:
        found = proves_none("the pre-tokenizer forces none")
    elif not found.rules:
        found = cuts_of_vocabulary(tokenizer, normal)
    rules = narrowed(found.rules, normal)
    return recognised + Findings(rules, found.recognised, found.refused), normal


def _matrix(pairs: set[Pair]) -> bytes:
    cells = bytearray(N_CLASSES * N_CLASSES)
    for left, right in pairs:
        cells[left * N_CLASSES + right] = 1
    return bytes(cells)
