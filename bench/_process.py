"""Gives every system a process of its own, so that none affects the next one's figures."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # from glibc 2.35 on


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


class Worker:
    """An object in a process of its own, which waits for its turns.

    `factory` names a callable as "module:name"; `settings` are variables of the process's
    environment; packages are looked for in the folder `side` first. Errors: what a method raises
    there is raised here.
    """

    def __init__(
        self,
        factory: str,
        *args: Any,
        settings: dict[str, str] | None = None,
        side: str | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, factory, args, side), daemon=True
        )
        with _environment(settings or {}):
            self._process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, *args: Any) -> Any:
        """Return the result of a method."""
        self._pipe.send((method, args))
        return self._receive()

    def _receive(self) -> Any:
        try:
            is_good, found = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a worker ended with {self._process.exitcode}") from None
        if not is_good:
            raise found
        return found

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError, OSError):
            self._pipe.send(None)
        self._process.join()
        self._pipe.close()


def _work(pipe: Connection, factory: str, args: tuple[Any, ...], side: str | None) -> None:
    if side is not None:
        sys.path.insert(0, side)
    module, name = factory.split(":")
    it: Any = None
    question: Any = ("", args)
    with contextlib.suppress(EOFError):
        while question is not None:
            method, given = question
            try:
                if it is None:
                    it, found = getattr(importlib.import_module(module), name)(*given), None
                else:
                    found = getattr(it, method)(*given)
            except Exception as error:  # noqa: BLE001 (any is raised again at the other end)
                pipe.send((False, error))
            else:
                pipe.send((True, found))
            question = pipe.recv()


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def keep_memory() -> None:
    """Make glibc's malloc keep freed memory.

    Otherwise a system may or may not have to wait for new pages, about 2 us each in a virtual
    machine, depending on the memory that was freed before: up to ten microseconds per prompt, by
    chance. A process that was started with HUGE_PAGES in its environment gets huge ones.
    """
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
