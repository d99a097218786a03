"""Keeps the memory that one system used and freed from affecting the next one's figures."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # from glibc 2.35 on


def in_new_process(
    module: str, function: str, *args: Any, first: str = "", settings: dict[str, str] | None = None
) -> Any:
    """Return the result of a function that is called in a new process; it must be valid JSON.

    `first` is a statement to run there before anything is imported; `settings` are variables of
    its environment.
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
    """Make glibc's malloc use huge pages and keep freed memory.

    Otherwise a system may or may not have to wait for new pages, about 2 us each in a virtual
    machine, depending on the memory that the previous system left: up to ten microseconds per
    prompt, by chance. If the environment does not have the malloc settings, the command is started
    again with them.
    """
    if os.environ.keys().isdisjoint(_HUGE_PAGES):
        os.execve(sys.executable, sys.orig_argv, os.environ | _HUGE_PAGES)  # noqa: S606 (this one)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_MAX, 0)


def settle() -> None:
    """Make malloc sort the blocks that the previous system freed, before the next one is timed.

    A freed tokenizer leaves a million small blocks; glibc looks at 10,000 of them in each call.
    """
    for turn in range(5_000):
        bytes(3_000 + 16 * (turn % 7))
