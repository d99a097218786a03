"""Remembered proofs: whether an encoder proved equal to a tokenizer, kept for later processes.

An outcome holds for one tokenizer (its whole JSON), one build of the encoder and of tokenizers,
and one version of the proof. If any of them is another one, the proof is made again. A remembered
"equal" skips most of the proof, not all of it: a sample of the probes is encoded all the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokcache._forks import call_in_child
from tokcache._records import SignedRecords
from tokcache._version import __version__

FOLDER = "engines"
SWITCH = "TOKCACHE_REMEMBER_ENGINES"
_FORMAT = "tokcache.engine1"
_MAX_REASON_CHARS = 1000


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a proof: `reason` is None if the encoder is equal, else why it is not used."""

    reason: str | None


class RememberedProofs:
    """Outcomes of proofs, by identity, in a folder that processes share.

    Errors:  none; a record that can't be read or written counts in `records.refusals`.
    Threads: safe, and after fork.
    """

    def __init__(self) -> None:
        self.records = SignedRecords(FOLDER, SWITCH, "remembered proof of an engine")
        call_in_child(self._after_fork)

    def find(self, identity: bytes) -> Outcome | None:
        """Return the remembered outcome of a proof."""
        body = self.records.find(identity)
        if body is None:
            return None
        try:
            name, reason = json.loads(body)
        except ValueError:
            name, reason = None, None
        if name != identity.hex() or not isinstance(reason, str | None):
            self.records.refuse("damaged", "a remembered proof of an engine is damaged")
            return None
        return Outcome(reason)

    def keep(self, identity: bytes, outcome: Outcome) -> None:
        """Remember the outcome of a proof."""
        reason = outcome.reason and outcome.reason[:_MAX_REASON_CHARS]
        self.records.keep(identity, json.dumps([identity.hex(), reason]).encode())

    def remove(self, identity: bytes) -> None:
        """Remove the outcome of a proof."""
        self.records.remove(identity)

    def _after_fork(self) -> None:
        self.records.start_without_threads()


REMEMBERED = RememberedProofs()


def identity_of(name: str, tokenizer_json: str) -> bytes | None:
    """Return a digest of all that decides whether encoder `name` is equal to a tokenizer.

    None if the builds of the libraries are not known; the proof is then made in each process.

    Cost: a pass over the JSON, mostly without the interpreter lock.
    """
    builds = [_build_of(name), _build_of("tokenizers"), _proof()]
    if None in builds:
        return None
    python = f"{sys.version_info[:2]} {unicodedata.unidata_version} {os.uname().machine}"
    text = "\0".join((_FORMAT, __version__, name, python, *map(str, builds)))
    content = hashlib.sha256(tokenizer_json.encode("utf-8", "surrogatepass")).digest()
    return hashlib.sha256(text.encode() + content).digest()


@cache
def _build_of(package: str) -> str | None:
    """Return a digest of the installed files of a package, as its installer listed them."""
    from importlib import metadata  # noqa: PLC0415 (it takes 30 ms, and is rarely needed)

    try:
        files = metadata.distribution(package).read_text("RECORD") or ""
    except metadata.PackageNotFoundError:
        return None
    lines = [line for line in files.splitlines() if line.startswith(f"{package}/")]
    if not any(".so," in line or ".pyd," in line for line in lines):
        return None  # installed in place: the listed files are not those that are imported
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


@cache
def _proof() -> str | None:
    """Return a digest of the code of the proof."""
    try:
        return hashlib.sha256(Path(__file__).with_name("fast.py").read_bytes()).hexdigest()
    except OSError:
        return None
