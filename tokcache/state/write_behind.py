"""WriteBehind: a bounded queue of writes, and the thread that does them off the request path."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tokcache._forks import Forkable, tell_of_forks

_log = logging.getLogger("tokcache")

_EXIT_S = 10.0  # how long the end of the interpreter waits for the writes of each queue


@dataclass(slots=True)
class Job:
    """One write: `run` does it, `done` is called after it, or when it is dropped."""

    scope: str | None
    n_bytes: int
    run: Callable[[], object]
    done: Callable[[], object] = lambda: None


_WRITERS: weakref.WeakSet[WriteBehind] = weakref.WeakSet()


def _finish() -> None:
    for writer in list(_WRITERS):
        writer.close(_EXIT_S)


atexit.register(_finish)


class WriteBehind(Forkable):
    """Jobs of one tier, in the order in which they came.

    Units:  `max_bytes` bytes of payloads that wait; one larger job is accepted when none waits.
            `max_jobs` jobs.
    Threads: safe. A forked child starts with an empty queue: the parent does the queued jobs.
    """

    fork_rank = 1

    def __init__(self, label: str, max_bytes: int, max_jobs: int = 10_000) -> None:
        self._label = label
        self.max_bytes, self.max_jobs = max_bytes, max_jobs
        # Reentrant: the garbage collector may call `end` from anywhere.
        self._condition = threading.Condition(threading.RLock())
        self._waiting: deque[Job] = deque()
        self._n_bytes = 0
        self._running: Job | None = None
        self._is_closed = False
        self._thread: threading.Thread | None = None
        tell_of_forks(self)
        _WRITERS.add(self)

    def put(self, job: Job) -> bool:
        """Queue a job; False, and nothing was queued, if it is full."""
        with self._condition:
            is_over = self._n_bytes + job.n_bytes > self.max_bytes and self._n_bytes > 0
            if self._is_closed or is_over or len(self._waiting) >= self.max_jobs:
                return False
            if self._thread is None and not self._start():
                return False
            self._waiting.append(job)
            self._n_bytes += job.n_bytes
            self._condition.notify_all()
            return True

    def _start(self) -> bool:
        name = f"tokcache-{self._label}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter ends, or the system has no more threads
            return False
        self._thread = thread
        return True

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.run()
            except Exception:  # noqa: BLE001  (a tier counts its own failures; the queue goes on)
                _log.warning("a write to %s failed", self._label, exc_info=True)
            job.done()
            with self._condition:
                self._n_bytes -= job.n_bytes
                self._running = None
                self._condition.notify_all()
            job = None

    def _next(self) -> Job | None:
        with self._condition:
            while not self._waiting:
                if self._is_closed:
                    return None
                self._condition.wait()
            self._running = self._waiting.popleft()
            return self._running

    def discard(self, scopes: Callable[[str | None], bool]) -> int:
        """Drop the jobs of these scopes, wait for one that runs; return the number dropped."""
        with self._condition:
            doomed = [job for job in self._waiting if scopes(job.scope)]
            kept = [job for job in self._waiting if not scopes(job.scope)]
            self._waiting = deque(kept)
            self._n_bytes -= sum(job.n_bytes for job in doomed)
            while self._running is not None and scopes(self._running.scope):
                self._condition.wait()
        for job in doomed:
            job.done()
        return len(doomed)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all queued jobs are done; False if that took too long."""
        with self._condition:
            return self._condition.wait_for(
                lambda: not self._waiting and self._running is None, timeout_s
            )

    def close(self, timeout_s: float | None = None) -> bool:
        """Write queued jobs and end the thread; False if that took too long."""
        is_flushed = self.flush(timeout_s)
        with self._condition:
            self._is_closed = True
            thread, self._thread = self._thread, None
            self._condition.notify_all()
        if is_flushed and thread is not None and thread is not threading.current_thread():
            thread.join()
        return is_flushed

    def end(self) -> None:
        """Accept no more jobs; the thread writes the queued ones and ends. Does not wait."""
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()

    def before_fork(self) -> None:
        """Wait until no queue operation is half done."""
        self._condition.acquire()

    def after_fork_in_parent(self) -> None:
        """Release the lock."""
        self._condition.release()

    def after_fork_in_child(self) -> None:
        """Leave queued jobs to the parent."""
        self._condition = threading.Condition(threading.RLock())
        self._waiting, self._n_bytes, self._running = deque(), 0, None
        self._thread = None
