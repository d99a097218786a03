"""The figures of the gateway, as Prometheus text and for the page. They hold no text of prompts."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokcache.gateway.service import Service

_HELP = {
    "requests_total": "Requests that were answered.",
    "prompt_tokens_total": "Tokens of their prompts.",
    "cached_tokens_total": "Prompt tokens that the llama-server had and did not decode.",
    "restored_tokens_total": "Cached tokens that came from a saved file.",
    "plans_total": "Requests by the source of their prefix: a slot, a file or none.",
    "misses_total": "Requests that were not reused up to their last message, by reason.",
    "missed_tokens_total": "Prompt tokens that were decoded in such requests, by reason.",
    "reasons_total": "Refusals, and requests whose system prompt holds a volatile part.",
    "saves_total": "Slots saved to a file.",
    "saves_skipped_total": "Slots given away unsaved, because saving would spare no time.",
    "restores_total": "Slots restored from a file.",
    "erases_total": "Slots erased before another tenant used them.",
    "evictions_total": "Files deleted to stay within the budget.",
    "aborts_total": "Requests cut off by the client or the server.",
    "rejections_total": "Requests that the llama-server rejected.",
    "failovers_total": "Requests sent again because a server failed before its first byte.",
    "server_starts_total": "Restarts of a llama-server that were noticed.",
    "errors_total": "Errors answered, by status.",
    "tokenizations_total": "Texts tokenized for clients, by the source of their ids.",
    "queue_length": "Requests that wait for a slot.",
    "files": "Saved slots.",
    "file_bytes": "Bytes of saved slots.",
    "slots": "Slots by state.",
    "servers_up": "Servers that answer.",
}


def exposition(service: Service) -> str:
    """Return all figures in Prometheus' text format."""
    lines = []
    for name, samples in _families(service):
        kind = "counter" if name.endswith("_total") else "gauge"
        lines.append(f"# HELP tokcache_gateway_{name} {_HELP[name]}")
        lines.append(f"# TYPE tokcache_gateway_{name} {kind}")
        for label, value in samples:
            shown = "{" + label + "}" if label else ""
            lines.append(f"tokcache_gateway_{name}{shown} {value}")
    return "\n".join(lines) + "\n"


def _families(service: Service) -> Iterable[tuple[str, list[tuple[str, int]]]]:
    router, files = service.router, service.files
    counts = router.counts
    for name, key in (
        ("requests_total", "request"),
        ("prompt_tokens_total", "prompt_tokens"),
        ("cached_tokens_total", "cached_tokens"),
        ("restored_tokens_total", "restored_tokens"),
        ("saves_total", "save"),
        ("saves_skipped_total", "save_skipped"),
        ("restores_total", "restore"),
        ("erases_total", "erase"),
        ("aborts_total", "aborted"),
        ("rejections_total", "rejected"),
    ):
        yield name, [("", counts[key])]
    plans = [(f'plan="{plan}"', counts[f"plan_{plan}"]) for plan in ("slot", "file", "none")]
    yield "plans_total", plans
    for name, missed in (("misses", router.misses), ("missed_tokens", router.missed_tokens)):
        yield f"{name}_total", [(f'reason="{each}"', n) for each, n in sorted(missed.items())]
    reasons = router.reasons + files.refusals
    yield "reasons_total", [(f'reason="{each}"', n) for each, n in sorted(reasons.items())]
    yield "evictions_total", [("", files.n_evictions)]
    yield "failovers_total", [("", service.counts["failover"])]
    yield "server_starts_total", [("", service.counts["server_start"])]
    errors = [(key[6:], n) for key, n in sorted(service.counts.items()) if key[:6] == "error_"]
    yield "errors_total", [(f'status="{status}"', n) for status, n in errors]
    sources = [(f'source="{each}"', service.tokens.counts[each]) for each in ("cache", "server")]
    yield "tokenizations_total", sources
    yield "queue_length", [("", len(router.queue))]
    yield "files", [("", len(files))]
    yield "file_bytes", [("", files.n_bytes)]
    slots = [slot for server in router.servers.values() for slot in server.slots]
    n_busy = sum(slot.is_busy for slot in slots)
    yield "slots", [('state="busy"', n_busy), ('state="idle"', len(slots) - n_busy)]
    yield "servers_up", [("", sum(server.is_up for server in router.servers.values()))]


def status(service: Service) -> dict[str, Any]:
    """Return the figures that the page shows."""
    router = service.router
    counts = router.counts
    return {
        "now": time.time(),
        "servers": [
            {
                "url": server.name,
                "model": server.model,
                "is_up": server.is_up,
                "can_save": server.can_save,
                "tokens_per_s": round(server.tokens_per_s),
                "slots": [
                    {
                        "id": slot.id,
                        "is_busy": slot.is_busy,
                        "is_side": slot.is_side,
                        "is_saved": slot.saved is not None,
                        "n_tokens": slot.n_tokens,
                        "n_uses": slot.n_uses,
                    }
                    for slot in server.slots
                ],
            }
            for server in router.servers.values()
        ],
        "totals": {
            "requests": counts["request"],
            "prompt_tokens": counts["prompt_tokens"],
            "cached_tokens": counts["cached_tokens"],
            "restored_tokens": counts["restored_tokens"],
            "saves": counts["save"],
            "restores": counts["restore"],
            "files": len(service.files),
            "file_bytes": service.files.n_bytes,
            "max_bytes": service.files.max_bytes,
            "queue": len(router.queue),
        },
        "misses": dict(router.misses),
        "reasons": dict(router.reasons + service.files.refusals),
        "recent": [asdict(each) for each in reversed(service.recent)],
    }
