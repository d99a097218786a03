"""Keys of scopes and of adapters: prompts share states only within one of both."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_SCOPE_BYTES = 16
# The key for requests that name no adapters: they use those that the server was started with.
NO_ADAPTERS = b"null"
_MAX_SCALE = 1e30  # a larger int may not fit a float


def scope_key(scope: str | None) -> bytes:
    """Return the key of a scope, which all its namespaces start with."""
    return hashlib.blake2b(repr(scope).encode(), digest_size=_SCOPE_BYTES).digest()


def scope_of(namespace: bytes) -> bytes:
    """Return the key of a namespace's scope."""
    return namespace[:_SCOPE_BYTES]


def namespace_of(scope: str | None, lora: Any = None) -> bytes:
    """Return the namespace of a scope and of adapters."""
    return scope_key(scope) + adapters_key(lora)


def adapters_of(namespace: bytes) -> bytes:
    """Return the key of a namespace's adapters."""
    return namespace[_SCOPE_BYTES:]


def adapters_key(lora: Any) -> bytes:
    """Return one key for all ways to write the same `lora` setting of a request.

    Source: for a missing or empty list llama-server uses the adapters that it was started with. It
    takes the last scale of an id that occurs twice, and 0 for an id that is missing.
    """
    if not lora:
        return NO_ADAPTERS

    def is_adapter(found: Any) -> bool:
        if not isinstance(found, dict):
            return False
        number, scale = found.get("id"), found.get("scale")
        is_number = isinstance(number, int) and not isinstance(number, bool)
        if not is_number or isinstance(scale, bool) or not isinstance(scale, int | float):
            return False
        return abs(scale) < _MAX_SCALE

    if isinstance(lora, list | tuple) and all(map(is_adapter, lora)):
        lora = sorted({each["id"]: float(each["scale"]) for each in lora}.items())
    return json.dumps(lora).encode()
