"""Keeps what one system leaves behind in a process out of the next one's figures."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # from glibc 2.35 on


def apart(
    module: str, function: str, *args: Any, first: str = "", settings: dict[str, str] | None = None
) -> Any:
    """Return what a function returns, as JSON, in a process of its own.

    `first` is a statement to run there before anything is imported, `settings` variables of its
    environment.
    """
    code = (
        f"{first}\nimport json, {module}\nprint(json.dumps({module}.{function}(*{list(args)!r})))"
    )
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | (settings or {}),
    )
    return json.loads(done.stdout.splitlines()[-1])


def without_page_faults() -> None:
    """Have malloc use huge pages and keep what is freed, where it is glibc's.

    Else whoever comes next waits for new pages, about 2 us each in a virtual machine, or does not:
    by what the system before left where. Ten microseconds a prompt, by chance. The command is
    started anew if its environment does not say how malloc shall work.
    """
    if os.environ.keys().isdisjoint(_HUGE_PAGES):
        os.execve(sys.executable, sys.orig_argv, os.environ | _HUGE_PAGES)  # noqa: S606 (this one)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_MAX, 0)


def settle() -> None:
    """Have malloc sort now what the system before freed, not on the time of the next one.

    A freed tokenizer leaves a million small blocks; glibc looks at 10,000 of them in each call.
    """
    for turn in range(5_000):
        bytes(3_000 + 16 * (turn % 7))
