"""Decides whose request it is: API keys, the scope of each, and its limits.

Keys are configured as SHA-256 digests, so the configuration holds no secret. A presented key is
compared with every digest in constant time; how long that takes depends on neither the key nor the
position of its tenant. Without configured tenants every request belongs to one open tenant.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from tokcache.errors import ApiError
from tokcache.gateway.config import TenantConfig

_KEY_BYTES = 32
_MINUTE_S = 60.0
_MAX_WAIT_S = 3600


def new_key() -> tuple[str, str]:
    """Return a random API key and the digest that the configuration takes."""
    key = f"tc-{secrets.token_urlsafe(_KEY_BYTES)}"
    return key, digest_of(key)


def digest_of(key: str) -> str:
    """Return the digest of an API key, as the configuration takes it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(eq=False, slots=True)
class Tenant:
    """One tenant and the use that it makes of the gateway now.

    Units: `tokens` that it may still use; they refill to `config.tokens_per_minute` in a minute and
           fall below 0 after a request that used more than were left.
    """

    config: TenantConfig
    n_in_flight: int = 0
    tokens: float = math.inf
    refilled_at: float = 0.0

    @property
    def scope(self) -> str | None:
        """The scope of its slots and files; None only for the open tenant."""
        return self.config.scope

    def start(self, now: float) -> None:
        """Count a request, or raise ApiError 429 if a limit is reached."""
        config = self.config
        if config.max_in_flight and self.n_in_flight >= config.max_in_flight:
            raise ApiError(
                429,
                f"this key already has {self.n_in_flight} requests in flight; wait for one to end",
                code="too_many_in_flight",
                retry_after_s=1,
            )
        if config.tokens_per_minute:
            per_s = config.tokens_per_minute / _MINUTE_S
            refilled = self.tokens + (now - self.refilled_at) * per_s
            self.tokens = min(float(config.tokens_per_minute), refilled)
            self.refilled_at = now
            if self.tokens <= 0:
                wait_s = min(_MAX_WAIT_S, math.ceil((1 - self.tokens) / per_s))
                raise ApiError(
                    429,
                    f"this key used its {config.tokens_per_minute:,} tokens a minute; wait"
                    f" {wait_s} s",
                    code="tokens_per_minute",
                    retry_after_s=wait_s,
                )
        self.n_in_flight += 1

    def end(self) -> None:
        """Count the end of a request."""
        self.n_in_flight -= 1

    def charge(self, n_tokens: int) -> None:
        """Count the tokens of prompt and answer that a request used, also one that was cut off."""
        if self.config.tokens_per_minute:
            self.tokens -= n_tokens


@dataclass(slots=True)
class Tenants:
    """All tenants of a gateway.

    Errors: ApiError 401 for a missing or unknown key, 429 from `Tenant.start`.
    """

    configs: tuple[TenantConfig, ...]
    _by_digest: dict[str, Tenant] = field(default_factory=dict)
    _open: Tenant | None = None

    def __post_init__(self) -> None:
        self._by_digest = {each.key_sha256: Tenant(each) for each in self.configs}
        self._open = None if self.configs else Tenant(TenantConfig(name="open", is_admin=True))

    @property
    def is_open(self) -> bool:
        """Return whether no keys are configured."""
        return self._open is not None

    def find(self, headers: Mapping[str, str]) -> Tenant:
        """Return the tenant whose key the headers present."""
        if self._open is not None:
            return self._open
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        presented = bearer.strip() if kind.lower() == "bearer" else ""
        presented = presented or headers.get("x-api-key", "")
        digest = digest_of(presented)
        found = None
        for known, tenant in self._by_digest.items():
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise ApiError(
                401,
                "this gateway needs an API key: send it as 'Authorization: Bearer KEY' or"
                " 'x-api-key: KEY'",
                code="invalid_api_key",
            )
        return found
