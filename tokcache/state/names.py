"""Names of blocks: a keyed digest over everything that leads to a block.

The name of a block is H(point where it starts, its tokens); the chain starts at
H(fingerprint, scope, kind). A point is the end of a prefix: H of the point where the last block of
the prefix starts, and of that block's tokens up to here. Equal names therefore mean: same model and
settings, same tenant, same tokens from position 0 on. Names address a block in a tier below memory;
its tokens are compared all the same.
"""

from __future__ import annotations

from hashlib import blake2b
from operator import index
from struct import error, pack
from typing import Any, Literal, NamedTuple

from tokcache.errors import InvalidTokens

TOKEN_BYTES = 4
DIGEST_BYTES = 32
_ROOT, _CHILD, _SCOPE = b"tokcache.root.2", b"tokcache.block.2", b"tokcache.scope.2"
_PUBLIC = b"tokcache.public2"

Kind = Literal["free", "aligned", "snapshot"]
"""Blocks of any length; aligned blocks, all of equal length; snapshots."""


class RootKey(NamedTuple):
    """All that decides a state besides its tokens: states equal in both are interchangeable.

    Where a prompt begins with tokens that are public, the chain of the rest starts at position
    `start`, after the prefix whose name is `after`.
    """

    fingerprint: bytes
    scope: str | None
    kind: Kind
    start: int = 0
    after: bytes = b""


def digest(kind: bytes, key: bytes, *fields: bytes) -> bytes:
    """Return the digest of `fields`, delimited by their lengths."""
    state = blake2b(digest_size=DIGEST_BYTES, key=key, person=kind.ljust(16, b"\0"))
    for field in fields:
        # The length goes first: ("ab", "c") and ("a", "bc") must differ.
        state.update(len(field).to_bytes(8, "little"))
        state.update(field)
    return state.digest()


def scope_name(scope: str | None, key: bytes = b"") -> bytes:
    """Return the digest that names a scope; None has one that no str has."""
    if scope is None:
        return digest(_SCOPE, key)
    return digest(_SCOPE, key, scope.encode("utf-8", "surrogatepass"))


def root_name(root_key: RootKey, key: bytes = b"") -> bytes:
    """Return the name that the chains with this root key start from."""
    fields = [root_key.fingerprint, root_key.kind.encode(), scope_name(root_key.scope)]
    if root_key.after:
        fields.append(root_key.after)
    return digest(_ROOT, key, *fields)


def rest_key(root_key: RootKey, public: bytes) -> RootKey:
    """Return the root key of the rest of a prompt, after its public tokens."""
    start = len(public) // TOKEN_BYTES
    return (
        root_key._replace(start=start, after=digest(_PUBLIC, b"", public)) if public else root_key
    )


def child_name(point: bytes, tokens: bytes, key: bytes = b"") -> bytes:
    """Return the name of the block that holds `tokens` (int32, native order) after `point`."""
    return digest(_CHILD, key, point, tokens)


def token_bytes(tokens: object) -> bytes:
    """Return the ids as int32 in native order: of a list, any iterable of integers, or an array.

    Errors: InvalidTokens; the message names the position of the first id that is not an int32.
    Cost:   one copy of an int32 buffer, one pass over anything else.
    """
    if isinstance(tokens, str | bytes | bytearray):
        raise InvalidTokens(
            f"token ids must be integers, not {type(tokens).__name__}; encode a text first: "
            "tok.token_ids(text)"
        )
    try:
        view = memoryview(tokens)  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError):  # ValueError: a NumPy type that no buffer can have
        return _from_integers(tokens)
    if view.ndim != 1:
        raise InvalidTokens(
            f"token ids must be one-dimensional, not {view.ndim}-dimensional; pass one prompt"
        )
    if view.format == "i":
        return view.tobytes()
    if view.format == "O":
        return _from_integers(tokens)
    import numpy as np  # noqa: PLC0415 (60 ms of `import tokcache`)

    values = np.asarray(view)
    if values.dtype.kind not in "iu":
        raise InvalidTokens(f"token ids must be integers, not an array of {values.dtype}")
    limits = np.iinfo(np.int32)
    is_wrong = values > limits.max
    if values.dtype.kind == "i":
        is_wrong |= values < limits.min
    if is_wrong.any():
        position = int(is_wrong.argmax())
        raise _not_int32(position, int(values[position]))
    return values.astype(np.int32).tobytes()


def _from_integers(tokens: object) -> bytes:
    try:
        values: tuple[Any, ...] = tuple(tokens)  # type: ignore[arg-type]  # its error is raised
    except TypeError:
        raise InvalidTokens(
            f"token ids must be a sequence of integers, not {type(tokens).__name__}"
        ) from None
    try:
        return packed_ids(values)
    except (error, TypeError, OverflowError):
        for position, value in enumerate(values):
            try:
                packed_ids((value,))
            except (error, TypeError, OverflowError):
                raise _not_int32(position, value) from None
        raise


def packed_ids(ids: tuple[Any, ...]) -> bytes:
    """Return int32 ids in native order; a fifth of the time of an array or of NumPy.

    Errors: struct.error, TypeError or OverflowError for anything but int32 integers.
    """
    return pack(f"{len(ids)}i", *ids)


def _not_int32(position: int, value: object) -> InvalidTokens:
    # A value that is not a number may be text of a prompt, and is not repeated.
    found = f"{index(value):,}" if hasattr(value, "__index__") else f"a {type(value).__name__}"
    return InvalidTokens(
        f"token ids must be int32 integers (-2,147,483,648 to 2,147,483,647); at position "
        f"{position:,} there is {found}"
    )
