"""The format of a stored state: it names its root and tokens, and has a checksum or MAC.

    fixed head (magic, version, lengths, digests) | tokens | checksum of all so far
    payload | checksum of everything before it

All integers are little-endian. If the tier has a key, digests are keyed, so that a file does not
show whether it holds a guessed prompt. The checksum is XXH3 (128 bits), which detects damage at
memory speed; with a key a MAC (HMAC-SHA256) takes its place, which detects forgery too. Encrypted
(AES-GCM), tokens and payload are two messages, each bound to all bytes that precede it; checksum
and MAC cover the bytes as stored.

Source: XXH3 is faster than a memcpy of the same bytes; zlib.crc32 took 14 times as long,
        HMAC-SHA256 35 times, blake2b longer still (`python -m bench run states --checksums`).
"""

from __future__ import annotations

import hmac
import os
import struct
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokcache.errors import InvalidConfig, MissingExtra, StateRefused
from tokcache.state.names import (
    DIGEST_BYTES,
    TOKEN_BYTES,
    RootKey,
    child_name,
    digest,
    root_name,
    scope_name,
)
from tokcache.state.tiers import Address, Record

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MAGIC, VERSION = b"TKCSTATE", 1
HMAC_FLAG, ENCRYPTED_FLAG = 1, 2
MAX_TOKENS = 1 << 24  # far above any context; a header that claims more is damaged or hostile
MAX_GCM_BYTES = (1 << 31) - 1  # the limit of the cryptography package for one message
GCM_TAG, NONCE = 16, 12
_HEAD = struct.Struct(f"<8sHHIQQQqqd{NONCE}s{NONCE}s" + f"{DIGEST_BYTES}s" * 6)
HEAD_BYTES = _HEAD.size


@dataclass(frozen=True, slots=True)
class Head:
    """The fixed head of a file.

    Units: `head_bytes` bytes before the payload, `payload_bytes` of it as stored; `created_at`
           seconds since the epoch.
    """

    flags: int
    head_bytes: int
    payload_bytes: int
    position: int
    n_tokens: int
    n_past: int
    priority: int
    created_at: float
    token_nonce: bytes
    payload_nonce: bytes
    scope: bytes
    root: bytes
    fingerprint: bytes
    base: bytes
    name: bytes
    slot: bytes

    def packed(self) -> bytes:
        """Return the bytes of this head."""
        return _HEAD.pack(
            MAGIC,
            VERSION,
            self.flags,
            self.head_bytes,
            self.payload_bytes,
            self.position,
            self.n_tokens,
            self.n_past,
            self.priority,
            self.created_at,
            self.token_nonce,
            self.payload_nonce,
            self.scope,
            self.root,
            self.fingerprint,
            self.base,
            self.name,
            self.slot,
        )

    @staticmethod
    def read(data: bytes, n_file_bytes: int | None = None) -> Head:
        """Return the head that `data` begins with.

        Errors: StateRefused for other data, and, if `n_file_bytes` is given, for a head of a file
                of another size.
        """
        if len(data) < HEAD_BYTES:
            raise StateRefused("damaged")
        magic, version, *fields = _HEAD.unpack_from(data)
        if magic != MAGIC:
            raise StateRefused("damaged")
        if version != VERSION:
            raise StateRefused("other_version")
        head = Head(*fields)
        checksum = head.checksum_bytes
        n_tokens = head.n_tokens * TOKEN_BYTES + head.tag_bytes
        is_absurd = head.n_tokens > MAX_TOKENS or head.flags & ~(HMAC_FLAG | ENCRYPTED_FLAG)
        if is_absurd or head.head_bytes != HEAD_BYTES + n_tokens + checksum:
            raise StateRefused("damaged")
        n_bytes = head.head_bytes + head.payload_bytes + checksum
        if n_file_bytes not in (None, n_bytes) or head.payload_bytes < head.tag_bytes:
            raise StateRefused("damaged")
        return head

    @property
    def checksum_bytes(self) -> int:
        """The length of the checksum or MAC."""
        return 32 if self.flags & HMAC_FLAG else 16

    @property
    def tag_bytes(self) -> int:
        """The bytes that encryption adds to each of the two messages."""
        return GCM_TAG if self.flags & ENCRYPTED_FLAG else 0


def _checked_key(name: str, key: object, lengths: tuple[int, ...]) -> bytes:
    if not isinstance(key, bytes) or not lengths[0] <= len(key) <= lengths[-1]:
        found = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
        raise InvalidConfig(
            f"{name} must be {lengths[0]} to {lengths[-1]} bytes, not {found}; "
            "make one with os.urandom(32)"
        )
    return key


class StateCodec:
    """Writes and reads files with one tier's keys.

    Errors: InvalidConfig for keys of wrong lengths; MissingExtra where a library is not installed.
    Threads: safe.
    """

    def __init__(self, hmac_key: bytes | None = None, encryption_key: bytes | None = None) -> None:
        self._hmac_key = self._aes_key = None
        if hmac_key is not None:
            self._hmac_key = _checked_key("hmac_key", hmac_key, (16, 1024))
        if encryption_key is not None:
            self._aes_key = _checked_key("encryption_key", encryption_key, (16, 24, 32))
            if len(encryption_key) not in (16, 24, 32):
                raise InvalidConfig(
                    f"encryption_key must be 16, 24 or 32 bytes, not {len(encryption_key)}"
                )
            self.flags = ENCRYPTED_FLAG
        else:
            self.flags = 0
        self.flags |= HMAC_FLAG if hmac_key is not None else 0
        self.checksum_bytes = 32 if hmac_key is not None else 16
        self._name_key = b""
        if self._hmac_key is not None or self._aes_key is not None:
            keys = self._hmac_key or b"", self._aes_key or b""
            self._name_key = digest(b"tokcache.names.3", b"", *keys)
        if hmac_key is None:
            _xxhash()  # raises now if it is missing, not at the first write

    @cached_property
    def _aes(self) -> AESGCM:
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415
        except ImportError:
            raise MissingExtra(
                "encryption needs the cryptography package: pip install 'tokcache[crypto]'"
            ) from None
        return AESGCM(self._aes_key or b"")

    def require_libraries(self) -> None:
        """Import the library for encryption, if there is a key for it.

        Errors: MissingExtra.
        """
        if self._aes_key is not None:
            _ = self._aes

    # Names

    def scope(self, scope: str | None) -> bytes:
        """Return this tier's name of a scope."""
        return scope_name(scope, self._name_key)

    def root(self, root_key: RootKey) -> bytes:
        """Return this tier's name of a root."""
        return root_name(root_key, self._name_key)

    def keyed(self, name: bytes) -> bytes:
        """Return this tier's name of a block, a point or a fingerprint."""
        return digest(b"tokcache.file.2", self._name_key, name)

    # Checksum and MAC

    def checksum(self, *parts: bytes | memoryview) -> bytes:
        """Return the checksum of `parts`; with a key, their MAC."""
        if self._hmac_key is not None:
            state: Any = hmac.new(self._hmac_key, digestmod="sha256")
        else:
            state = _xxhash().xxh3_128()
        for part in parts:
            state.update(part)
        made: bytes = state.digest()
        return made

    def verify(self, found: bytes, *parts: bytes | memoryview) -> None:
        """Compare a checksum or MAC in constant time.

        Errors: StateRefused.
        """
        if not hmac.compare_digest(found, self.checksum(*parts)):
            raise StateRefused("forged" if self._hmac_key is not None else "damaged")

    # Writing

    def packed(
        self, address: Address, record: Record, payload: memoryview
    ) -> tuple[bytes, bytes | memoryview, bytes]:
        """Return the bytes before the payload, the payload as stored, and the last checksum."""
        if self._aes_key is not None and payload.nbytes > MAX_GCM_BYTES - GCM_TAG:
            raise StateRefused("too_large_to_encrypt")
        head = self._head(address, record, payload.nbytes).packed()
        tokens = self._encrypted(head, record.tokens, head)
        first = head + tokens
        first += self.checksum(first)
        stored = self._encrypted(head, payload, first, is_payload=True)
        return first, stored, self.checksum(first, stored)

    def _head(self, address: Address, record: Record, n_bytes: int) -> Head:
        tag = GCM_TAG if self._aes_key is not None else 0
        n_tokens = len(record.tokens)
        return Head(
            flags=self.flags,
            head_bytes=HEAD_BYTES + n_tokens + tag + self.checksum_bytes,
            payload_bytes=n_bytes + tag,
            position=address.position,
            n_tokens=n_tokens // TOKEN_BYTES,
            n_past=record.n_past,
            priority=record.priority,
            created_at=time.time(),
            token_nonce=os.urandom(NONCE),
            payload_nonce=os.urandom(NONCE),
            scope=self.scope(address.root_key.scope),
            root=self.root(address.root_key),
            fingerprint=self.keyed(address.root_key.fingerprint),
            base=self.keyed(address.base),
            name=self.keyed(record.name),
            slot=self.keyed(address.slot),
        )

    def _encrypted(
        self, head: bytes, part: bytes | memoryview, bound: bytes, *, is_payload: bool = False
    ) -> Any:
        if self._aes_key is None:
            return part
        fields = _HEAD.unpack(head)
        return self._aes.encrypt(fields[11 if is_payload else 10], part, bound)

    # Reading

    def record(self, head: Head, first: bytes, address: Address) -> Record:
        """Verify the bytes that precede a payload; return the fields stored with it.

        Errors: StateRefused.
        """
        if head.flags != self.flags:
            raise StateRefused("other_keys")
        end = head.head_bytes - head.checksum_bytes
        self.verify(first[end:], first[:end])
        root_key = address.root_key
        expected = (
            self.scope(root_key.scope),
            self.root(root_key),
            self.keyed(root_key.fingerprint),
            self.keyed(address.base),
            self.keyed(address.slot),
        )
        found = (head.scope, head.root, head.fingerprint, head.base, head.slot)
        is_equal = hmac.compare_digest(b"".join(found), b"".join(expected))
        if not is_equal or head.position != address.position:
            raise StateRefused("misfiled")
        stored = first[HEAD_BYTES:end]
        tokens = bytes(self._decrypted(head.token_nonce, stored, first[:HEAD_BYTES]))
        name = address.slot if root_key.kind == "snapshot" else child_name(address.base, tokens)
        if not hmac.compare_digest(self.keyed(name), head.name):
            raise StateRefused("misfiled")
        return Record(name, tokens, head.n_past, head.priority)

    def opened_payload(self, head: Head, first: bytes, stored: memoryview, checksum: bytes) -> Any:
        """Verify a payload as it is stored; return it decrypted.

        Errors: StateRefused.
        """
        self.verify(checksum, first, stored)
        return self._decrypted(head.payload_nonce, stored, first)

    def _decrypted(self, nonce: bytes, part: bytes | memoryview, bound: bytes) -> Any:
        if self._aes_key is None:
            return part
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 (an extra)

        try:
            return self._aes.decrypt(nonce, part, bound)
        except InvalidTag:
            raise StateRefused("forged") from None


def _xxhash() -> Any:
    try:
        import xxhash  # noqa: PLC0415 (where a disk is used)
    except ImportError:
        raise MissingExtra("tiers below memory need xxhash: pip install xxhash") from None
    return xxhash
