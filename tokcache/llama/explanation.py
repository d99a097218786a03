"""Explanation: a miss with the texts around it, for the caller who asks for his own scope."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokcache.state.reasons import Miss, MissReason

if TYPE_CHECKING:
    from tokcache.differences import Difference


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a prompt was reused no further, with the texts on both sides.

    `shared` is the text that the prompt has in common with the nearest held prefix, `held` the
    beginning of the text with which that goes on ("" if it ends there, or if only a tier below
    memory has it), `new` that of the prompt. repr shows none of them. `difference` has the class of
    the difference and its cure; None without `held`.

    Units: `at_character` code points of the prompt's text.
    """

    miss: Miss
    at_character: int
    difference: Difference | None = None
    shared: str = field(default="", repr=False)
    held: str = field(default="", repr=False)
    new: str = field(default="", repr=False)


def explained(miss: Miss, shared: str, held: str, new: str) -> Explanation:
    """Return the explanation of a miss; the class of a different text is found here."""
    difference = None
    if held and new:
        from tokcache.differences import DifferenceClass, classify  # noqa: PLC0415 (when it is read)

        difference = classify(shared + held, shared + new)
        if miss.reason is MissReason.DIFFERENT_TEXT and difference.kind in (
            DifferenceClass.TEMPLATE,
            DifferenceClass.THINKING,
        ):
            miss = miss._replace(reason=MissReason.TEMPLATE)
    return Explanation(miss, len(shared), difference, shared, held, new)
