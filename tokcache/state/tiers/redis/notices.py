"""RedisNotices: a line in the log when a Redis gets into trouble, and one when that is over.

The causes and cures that `RedisTier.check` puts into its error are here, too.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from tokcache.state.tiers.notices import Notices
from tokcache.state.tiers.redis.commands import Command, Refused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokcache.state.tiers.redis.link import Link

_log = logging.getLogger("tokcache")

_WRITE_CURES = {
    "full": "raise its maxmemory, or set an eviction policy such as allkeys-lru",
    "read_only": "it is a replica; name the primary in the URL",
    "not_persisting": "it can't save its snapshots (MISCONF); see its log and its disk",
    "no_replicas": "too few replicas are connected for its min-replicas-to-write",
}
_TROUBLES = {
    "garbage": "does not answer as a Redis does; check the host and port of the URL, and whether "
    "it wants TLS (rediss://)",
    "loading": "is still loading its data; try again in a while",
    "busy": "is busy with a script; stop that with SCRIPT KILL, or try again in a while",
    "cluster_down": "is not part of a cluster that works: see CLUSTER INFO there; for a single "
    "server leave out is_cluster=True",
    "moved": "is a node of a cluster; make the tier with is_cluster=True",
    "wrong_type": "has other keys where the tier keeps its own; choose another namespace",
}
_COMMANDS = "hget hset eval hlen rename del unlink pexpire persist sadd smembers scan touch"
_NO_RIGHT = Refused("permission")


class RedisNotices(Notices):
    """The troubles of one Redis.

    Units: `timeout_s` seconds that a call may take, `max_state_bytes` bytes of a state.
    """

    def __init__(
        self, link: Link, namespace: str, *, timeout_s: float, max_state_bytes: int
    ) -> None:
        super().__init__()
        self._place, self._has_password = link.place, link.has_password
        self._namespace, self._timeout_s = namespace, timeout_s
        self._max_state_bytes = max_state_bytes
        self._denied: set[str] = set()

    def after_fork_in_child(self) -> None:
        """Make a new lock, and start without troubles."""
        super().after_fork_in_child()
        self._denied = set()

    def explained(self, reason: str, error: BaseException | None = None) -> str:
        """Return the cause and the cure of a call that failed for that reason."""
        if reason in ("auth", "permission"):
            return f"the Redis at {self._place} {self._why_no_access(reason)}"
        if reason == "unreachable":
            # redis-py's own words are not repeated: they may contain parts of the URL.
            step, words = error, "no answer"
            while step is not None:
                if isinstance(step, OSError) and step.strerror:
                    words = step.strerror
                step = step.__cause__ or step.__context__
            return (
                f"the Redis at {self._place} can't be reached ({words}); check that it runs, that "
                "this host reaches it, and the host and port of the URL"
            )
        if reason == "timeout":
            return (
                f"the Redis at {self._place} did not answer within timeout_s={self._timeout_s:g}; "
                "check the host and port of the URL and whether it wants TLS (rediss://), or allow "
                "more time"
            )
        if reason in _WRITE_CURES:
            return f"the Redis at {self._place} stores no states ({reason}): {_WRITE_CURES[reason]}"
        other = f"refused a command ({reason}); the tier needs Redis 6 or newer, or Valkey"
        return f"the Redis at {self._place} {_TROUBLES.get(reason, other)}"

    def explained_rights(self, names: Sequence[str]) -> str:
        """Return the cause and the cure where a user may not use these commands."""
        return (
            f"the user of the Redis at {self._place} may not use {', '.join(names)} (NOPERM): "
            f"states are missed or not stored; grant it ~{self._namespace}:* and "
            f"+{_COMMANDS.replace(' ', ' +')}"
        )

    def _why_no_access(self, reason: str) -> str:
        if reason == "permission":
            cause = "refuses the user of its URL a command that every connection sends (SELECT)"
        elif self._has_password:
            cause = "refuses the user or password of its URL"
        else:
            cause = "wants a user and password, and its URL has none"
        return (
            f"{cause}: no states are found or stored there; give the right ones, "
            "redis://USER:PASSWORD@…, percent-encoded"
        )

    def no_access(self, reason: str) -> None:
        """Log that the server refuses the user; at once, for that does not pass by itself."""
        if self.is_changed("link", reason):
            _log.warning("the Redis at %s %s", self._place, self._why_no_access(reason))

    def no_answer(self, reason: str, n_failures: int, retry_s: float) -> None:
        """Log that `n_failures` calls in a row got no answer, which is no longer chance."""
        if self.is_changed("link", "away"):
            _log.warning(
                "the Redis at %s failed %d calls in a row (%s): no states are found or stored "
                "there until it answers; check that it runs and that this host reaches it within "
                "timeout_s=%g. It is asked again after %g s, later once a minute",
                *(self._place, n_failures, reason, self._timeout_s, retry_s),
            )

    def answered(self, commands: Sequence[Command], replies: Sequence[Any]) -> None:
        """Log that there is an answer again, and whether the user lost or has a right again."""
        if self.is_changed("link"):
            _log.info("the Redis at %s answers again: its states are used", self._place)
        if not self._denied and _NO_RIGHT not in replies:
            return
        verdicts = {command[0]: reply for command, reply in zip(commands, replies, strict=False)}
        denied = {name for name, reply in verdicts.items() if reply == _NO_RIGHT}
        with self.lock:
            self._denied = (self._denied - set(verdicts)) | denied
            names = sorted(self._denied)
        if not self.is_changed("rights", "permission" if names else ""):
            return
        if names:
            _log.warning("%s", self.explained_rights(names))
        else:
            _log.info("the user of the Redis at %s has the rights it needs", self._place)

    def not_written(self, reason: str) -> None:
        """Log why writes were refused several times in a row, for a reason that stays."""
        if reason in _WRITE_CURES and self.is_changed("writes", reason):
            _log.warning(
                "the Redis at %s stores no more states (%s): %s",
                *(self._place, reason, _WRITE_CURES[reason]),
            )

    def not_removed(self, reason: str, ttl_s: float | None) -> None:
        """Log that states may be left that were to be removed; each time."""
        stays = "until they are removed" if ttl_s is None else f"for {ttl_s:,.0f} s"
        _log.warning(
            "states could not be removed from the Redis at %s (%s): they may stay there %s",
            *(self._place, reason, stays),
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
                "that large are not used there; raise it (logged once a model)",
                *(f"{n_bytes:,}", f"{self._max_state_bytes:,}", self._place),
            )
