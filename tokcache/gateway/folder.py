"""The folder of a gateway: one process at a time uses it, and its key makes the digests."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from pathlib import Path

from tokcache._files import atomic_file
from tokcache.errors import InvalidConfig

_KEY_BYTES, _OWNER_BYTES = 32, 4
_MAX_HOLDER_BYTES = 200


class Folder:
    """A folder that is locked from `open` to `close`; the lock ends with the process, too.

    `key` is secret. `owner` is a digest of it that names the gateway's own files in slot folders.

    Errors: InvalidConfig if another gateway uses the folder, or if it can't be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.list_path = path / "files.json"
        self.slots = path / "slots"
        self.key = b""
        self._lock: int | None = None

    @property
    def owner(self) -> str:
        """A public name of this folder's gateway."""
        made = hashlib.blake2b(self.key, digest_size=_OWNER_BYTES, person=b"tokcache-owner")
        return made.hexdigest()

    def open(self, holder: str) -> None:
        """Make the folder and lock it; `holder` is shown to a second gateway that wants it."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._lock = os.open(self.path / "lock", flags, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found = os.read(self._lock, _MAX_HOLDER_BYTES).decode("utf-8", "replace").strip()
                raise InvalidConfig(
                    f"the folder {self.path} is in use by another gateway ({found or 'unknown'});"
                    " stop that one, or name another folder with --folder"
                ) from None
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, holder.encode()[:_MAX_HOLDER_BYTES], 0)
            self.key = self._read_key()
        except OSError as error:
            self.close()
            raise InvalidConfig(
                f"the folder {self.path} can't be used: {error.strerror}; name another with"
                " --folder"
            ) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another gateway use the folder; closing twice does no harm."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _read_key(self) -> bytes:
        path = self.path / "key"
        if not path.exists():
            with atomic_file(path) as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
        key = path.read_bytes()
        if len(key) != _KEY_BYTES:
            raise InvalidConfig(
                f"{path} is damaged; delete it, {self.list_path} and the files in {self.slots}"
            )
        return key
