"""Finds out whether a llama-server honours `id_slot` in its own /v1/messages."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokcache.gateway.servers.upstream import Upstream

_OK = 200
# A server that ignores `id_slot` takes one slot three times (the most similar) or each in turn
# (the least recently used), so no such server passes all three by chance.
_ASKED = (1, 1, 0)


async def pins_messages(upstream: Upstream, n_slots: int) -> bool:
    """Return whether three short messages ran in the slots that they asked for.

    False for a server of one slot, and for one that does not list which request a slot had last.

    Errors: ServerError.
    Cost:   three decodes of a short prompt, in slots whose contents it replaces.
    """
    if n_slots < len(set(_ASKED)):
        return False

    async def last_tasks() -> dict[Any, Any]:
        """Return the number of the last request of each slot."""
        status, found = await upstream.get("/slots")
        listed = found if status == _OK and isinstance(found, list) else []
        return {each.get("id"): each.get("id_task") for each in listed if isinstance(each, dict)}

    messages = [{"role": "user", "content": "hi"}]
    before = await last_tasks()
    if not before:
        return False
    for wanted in _ASKED:
        body = {"model": "any", "max_tokens": 1, "messages": messages, "id_slot": wanted}
        status, _ = await upstream.post("/v1/messages", json.dumps(body).encode())
        after = await last_tasks()
        if status != _OK or {each for each in after if after[each] != before.get(each)} != {wanted}:
            return False
        before = after
    return True
