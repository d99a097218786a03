"""Why a prompt was reused no further: one enumeration for plans, `Llama`, llama-server, metrics."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class MissReason(StrEnum):
    """Why the tokens after the reused ones had to be decoded.

    `tokcache.reasons.MISSES` has the meaning and the cure of each. No reason depends on another
    scope: whatever only another tenant holds is `never_stored`.
    """

    DIFFERENT_TEXT = "different_text"
    TEMPLATE = "template"
    RE_ENCODING = "re_encoding"
    EVICTED = "evicted"
    EXPIRED = "expired"
    DAMAGED = "damaged"
    SLOWER_THAN_PREFILL = "slower_than_prefill"
    REFUSED = "refused"
    OTHER_FINGERPRINT = "other_fingerprint"
    NEVER_STORED = "never_stored"
    NOT_KNOWN = "not_known"


class Miss(NamedTuple):
    """Where a prompt parts from the nearest held prefix, why, and the cost.

    `detail` says which: the tier and budget that evicted the state, the refusal, the parts of the
    fingerprint that differ. It never has text of a prompt. `held_tokens` are the first ids of the
    nearest held prefix after `at_token`, only where the caller asked for them; repr omits them.

    Units: `at_token` tokens that prompt and nearest held prefix have in common; `n_missed` tokens
           that could have been reused and were not; `n_removed` of them, at least, were held once
           and removed; `seconds` that `n_missed` tokens take by the measured speed of prefilling,
           None before the first measurement; `removed_at` seconds since the epoch.
    """

    reason: MissReason
    at_token: int
    n_missed: int
    seconds: float | None = None
    detail: str = ""
    n_removed: int = 0
    removed_at: float | None = None
    held_tokens: tuple[int, ...] = ()

    def __repr__(self) -> str:
        """Return all fields except the tokens, which are part of a prompt."""
        shown = zip(self._fields[:-1], self, strict=False)
        return f"Miss({', '.join(f'{name}={value!r}' for name, value in shown)})"


# Refusals of a tier during a look-up that mean something else than that the tier did not answer.
_OF_TIERS = {
    "damaged": MissReason.DAMAGED,
    "forged": MissReason.DAMAGED,
    "misfiled": MissReason.DAMAGED,
    "garbage": MissReason.DAMAGED,
    "expired": MissReason.EXPIRED,
    "slower_than_prefill": MissReason.SLOWER_THAN_PREFILL,
}


def reason_of_tier(refusal: str) -> MissReason:
    """Return the reason of a look-up that ended because a tier refused a state."""
    return _OF_TIERS.get(refusal, MissReason.REFUSED)
