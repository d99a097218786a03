"""DiskNotices: a line in the log when a folder gets into trouble, and one when that is over."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tokcache.state.tiers.disk.file import reason_of
from tokcache.state.tiers.notices import Notices

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_log = logging.getLogger("tokcache")


class DiskNotices(Notices):
    """The troubles of a folder of states."""

    def __init__(self, path: Path, shown_budget: Callable[[], str]) -> None:
        super().__init__()
        self._path, self._shown_budget = path, shown_budget
        self._unwritable_bytes = 0

    def folder(self, error: OSError | None = None) -> None:
        """Log that the folder can't be opened any more, or can be again."""
        reason = "" if error is None else reason_of(error)
        if not self.is_changed("folder", reason):
            return
        if error is None:
            _log.info("the folder of states %s is there again", self._path)
        elif reason == "missing":
            _log.warning(
                "the folder of states %s is gone, and its states with it; the next write makes it "
                "again. Keep programs that clean up away from it",
                self._path,
            )
        else:
            _log.warning(
                "the folder of states %s can't be opened (%s): no states are found or stored "
                "there; give this user its rights back",
                *(self._path, error.strerror),
            )

    def cure(self, error: OSError) -> str:
        """Return the advice for an error of writing."""
        cures = {
            "full": f"free some space, or lower max_bytes (now {self._shown_budget()})",
            "permission": "give this user the right to write there",
            "missing": "the folder is gone, and the next write makes it again; keep programs that "
            "clean up away from it",
        }
        reason = reason_of(error)
        return cures.get(reason, "look at the folder and its disk")

    def not_written(self, n_bytes: int, error: OSError) -> None:
        """Log why states can't be written any more, where the folder is there."""
        if "folder" in self._troubles:
            return
        self._unwritable_bytes = max(n_bytes, self._unwritable_bytes)
        if self.is_changed("writes", reason_of(error)):
            _log.warning(
                "states can't be written to %s (%s): they are not stored there; %s",
                *(self._path, error.strerror, self.cure(error)),
            )

    def written(self, n_bytes: int) -> None:
        """Log that states can be written again, once one as large as the failed ones was.

        On a disk that is nearly full small states still fit between large ones that do not.
        """
        if n_bytes >= self._unwritable_bytes and self.is_changed("writes"):
            self._unwritable_bytes = 0
            _log.info("states are written to %s again", self._path)

    def oversize(self, fingerprint: bytes, n_bytes: int) -> None:
        """Log, once a model, that a state is larger than the folder may be."""
        if self.is_first(fingerprint):
            _log.warning(
                "a state takes %s bytes, and the folder of states %s may hold %s: states that "
                "large are not stored there; raise max_bytes (logged once a model)",
                *(f"{n_bytes:,}", self._path, self._shown_budget()),
            )
