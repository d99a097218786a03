"""What a block is called: a keyed digest over all that leads to it.

The name of a block is H(name of its parent, its tokens); the chain starts at
H(fingerprint, scope). Equal names therefore mean: same model and settings, same tenant, same
tokens from position 0 on. Names address a block in a tier; the tokens are compared all the same.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from tokcache.errors import InvalidTokens

TOKEN_BYTES = 4
DIGEST_BYTES = 32
_ROOT, _CHILD = b"tokcache.root.1", b"tokcache.block.1"


def _digest(kind: bytes, key: bytes, *fields: bytes) -> bytes:
    state = blake2b(digest_size=DIGEST_BYTES, key=key, person=kind.ljust(16, b"\0"))
    for field in fields:
        # The length goes first: ("ab", "c") and ("a", "bc") must differ.
        state.update(len(field).to_bytes(8, "little"))
        state.update(field)
    return state.digest()


def root_name(fingerprint: bytes, scope: str | None, key: bytes = b"") -> bytes:
    """Return the name that a chain of this model and scope starts from; None is no scope's name."""
    if scope is None:
        return _digest(_ROOT, key, fingerprint)
    return _digest(_ROOT, key, fingerprint, scope.encode("utf-8", "surrogatepass"))


def child_name(parent: bytes, tokens: bytes, key: bytes = b"") -> bytes:
    """Return the name of the block that holds `tokens` (int32, native order) after `parent`."""
    return _digest(_CHILD, key, parent, tokens)


def token_bytes(tokens: object) -> bytes:
    """Return the ids as int32 in native order: one copy of a buffer, one pass over a list.

    Errors: InvalidTokens for what holds no int32 ids.
    """
    try:
        view = memoryview(tokens)  # type: ignore[arg-type]
    except TypeError:
        return _from_integers(tokens)
    if view.format != "i" or view.ndim != 1:
        raise InvalidTokens(
            "a buffer of token ids must be one-dimensional int32 (format 'i'), "
            f"not {view.ndim}-dimensional of format {view.format!r}"
        )
    return view.tobytes()


def _from_integers(tokens: object) -> bytes:
    try:
        return array("i", tokens).tobytes()  # type: ignore[call-overload, no-any-return]
    except (TypeError, OverflowError) as error:
        raise InvalidTokens(f"token ids must be int32 integers: {error}") from None
