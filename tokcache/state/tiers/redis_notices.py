"""RedisNotices: a line in the log when a Redis gets into trouble, and one when it is out of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from tokcache.state.tiers.notices import Notices
from tokcache.state.tiers.redis_link import Command, Link, Refused

if TYPE_CHECKING:
    from collections.abc import Sequence

_log = logging.getLogger("tokcache")

_CURES = {
    "full": "raise its maxmemory, or set an eviction policy such as allkeys-lru",
    "read_only": "it is a replica; name the primary in the URL",
    "not_persisting": "it can't save its snapshots (MISCONF); see its log and its disk",
    "no_replicas": "too few replicas are connected for its min-replicas-to-write",
}
_COMMANDS = "hget hset eval hlen rename del unlink pexpire persist sadd smembers scan touch"
_NO_RIGHT = Refused("permission")


class RedisNotices(Notices):
    """The troubles of one Redis; `place` is its address, without secrets."""

    def __init__(self, link: Link, namespace: str, max_state_bytes: int) -> None:
        super().__init__()
        self._place, self._has_password = link.place, link.has_password
        self._namespace, self._max_state_bytes = namespace, max_state_bytes
        self._denied: set[str] = set()

    def forget(self) -> None:
        """Begin without troubles and with a new lock: a child finds out for itself."""
        super().forget()
        self._denied = set()

    def no_access(self, reason: str) -> None:
        """Log that the server refuses the user; at once, for that does not pass by itself."""
        if not self.is_changed("link", reason):
            return
        if reason == "permission":
            what = "refuses the user of its URL what it connects with (SELECT, say)"
        elif self._has_password:
            what = "refuses the user or password of its URL"
        else:
            what = "wants a user and password, and its URL has none"
        _log.warning(
            "the Redis at %s %s: no states are found or stored there; give the right ones, "
            "redis://USER:PASSWORD@…, percent-encoded",
            *(self._place, what),
        )

    def no_answer(self, reason: str, n_failures: int, timeout_s: float, retry_s: float) -> None:
        """Log that so many calls in a row got no answer: that is no longer chance."""
        if self.is_changed("link", "away"):
            _log.warning(
                "the Redis at %s failed %d calls in a row (%s): no states are found or stored "
                "there until it answers; check that it runs and that this host reaches it within "
                "timeout_s=%g. It is asked again after %g s, later once a minute",
                *(self._place, n_failures, reason, timeout_s, retry_s),
            )

    def answered(self, commands: Sequence[Command], replies: Sequence[Any]) -> None:
        """Log that there is an answer again, and whether the user lost or has a right again."""
        if self.is_changed("link"):
            _log.info("the Redis at %s answers again: its states are used", self._place)
        if not self._denied and _NO_RIGHT not in replies:
            return
        verdicts = {command[0]: reply for command, reply in zip(commands, replies, strict=False)}
        denied = {name for name, reply in verdicts.items() if reply == _NO_RIGHT}
        with self._lock:
            self._denied = (self._denied - set(verdicts)) | denied
            names = ", ".join(sorted(self._denied))
        if not self.is_changed("rights", "permission" if names else ""):
            return
        if names:
            _log.warning(
                "the user of the Redis at %s may not use %s (NOPERM): states are missed or not "
                "stored; grant it ~%s:* and +%s",
                *(self._place, names, self._namespace, _COMMANDS.replace(" ", " +")),
            )
        else:
            _log.info("the user of the Redis at %s has the rights it needs", self._place)

    def not_written(self, reason: str) -> None:
        """Log why writes were refused several times in a row, where that stays."""
        if reason in _CURES and self.is_changed("writes", reason):
            _log.warning(
                "the Redis at %s stores no more states (%s): %s",
                *(self._place, reason, _CURES[reason]),
            )

    def written(self) -> None:
        """Log that writes are taken again."""
        if self.is_changed("writes"):
            _log.info("the Redis at %s stores states again", self._place)

    def oversize(self, fingerprint: bytes, n_bytes: int) -> None:
        """Log, once a model, that a state is larger than this tier takes."""
        if self.is_first(fingerprint):
            _log.warning(
                "a state of %s bytes is above max_state_bytes=%s of the Redis tier at %s: states "
                "that large are not used there; raise it (said once a model)",
                *(f"{n_bytes:,}", f"{self._max_state_bytes:,}", self._place),
            )
