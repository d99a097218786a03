"""Renders a chat template in a child process, with limits of time, size and memory.

A template is a program from elsewhere: it may loop for ever, write without end or raise. The child
(`child`) is killed when an answer is late, and started again for the next rendering.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import tokcache
from tokcache.errors import InvalidTemplate, MissingExtra, RenderingFailed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CLOCK = dt.datetime(2024, 5, 17, 10, 30)  # noqa: DTZ001 (strftime_now has no time zone)
_START_S = 120.0  # the child imports transformers, which takes long on a busy machine
_MAX_STOPPED = 3  # a template without end must not take the time limit for every chat
_ROOT = Path(tokcache.__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one rendering may take."""

    seconds: float = 5.0
    max_chars: int = 4_000_000
    max_bytes: int = 1 << 30


class TemplateProcess:
    """A compiled template in a child process.

    Errors: InvalidTemplate if the template can't be compiled; MissingExtra without jinja2.
    """

    def __init__(
        self,
        template: str,
        variables: Mapping[str, Any],
        *,
        by_transformers: bool = False,
        limits: Limits | None = None,
    ) -> None:
        if find_spec("jinja2") is None:
            raise MissingExtra("chat templates need jinja2: pip install jinja2")
        self.limits = limits or Limits()
        self._variables = dict(variables)
        self._opening = {
            "template": template,
            "by_transformers": by_transformers,
            "seconds": self.limits.seconds,
            "max_chars": self.limits.max_chars,
            "max_bytes": self.limits.max_bytes,
        }
        self._child: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self._n_stopped = 0
        found = self._start()
        self.compiled_by: str = found["by"]
        self.switches: dict[str, tuple[Any, ...]] = {
            each["name"]: tuple(each["values"]) for each in found["switches"]
        }

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
        clock: dt.datetime = CLOCK,
    ) -> str:
        """Return the rendering of `messages`, with strftime_now at `clock`.

        Errors: RenderingFailed if the template refuses or fails, or passes a limit.
        """
        if self._n_stopped == _MAX_STOPPED:
            raise RenderingFailed("stopped", f"not tried, after {_MAX_STOPPED} that were stopped")
        if self._child is None:
            self._start()
        answer = self._ask(
            {
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
                "variables": {**self._variables, **(variables or {})},
                "clock": clock.isoformat(),
            },
            self.limits.seconds,
        )
        if "text" in answer:
            return str(answer["text"])
        self._n_stopped += "stopped" in answer
        raise RenderingFailed(*next(iter(answer.items())))

    def close(self) -> None:
        """End the child."""
        child, self._child, self._rest = self._child, None, b""
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> dict[str, Any]:
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._child = subprocess.Popen(
            # -P: a module in the current folder must not stand in for a library.
            [sys.executable, "-P", "-m", "tokcache.text.chat.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries print warnings there as they are imported
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
        )
        answer = self._ask(self._opening, _START_S + self.limits.seconds)
        if "by" in answer:
            return answer
        self.close()
        reason = next(iter(answer.values()))
        raise InvalidTemplate(f"the chat template can't be compiled: {reason}")

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send one line, and return the answer; `stopped` if it does not come in time."""
        child = self._child
        assert child is not None  # noqa: S101 (both callers have started it)
        assert child.stdin is not None  # noqa: S101 (it is a pipe)
        deadline = time.monotonic() + seconds
        try:
            line = memoryview(json.dumps(request).encode() + b"\n")
            while line:
                line = line[child.stdin.write(line) :]
            answer = self._read_line(child, deadline)
        except BrokenPipeError:
            answer = b""
        except TimeoutError:
            self.close()
            return {"stopped": f"it takes more than {self.limits.seconds:g} s"}
        if not answer:
            self.close()
            return {"stopped": "the process that rendered it ended"}
        found: dict[str, Any] = json.loads(answer)
        return found

    def _read_line(self, child: subprocess.Popen[bytes], deadline: float) -> bytes:
        assert child.stdout is not None  # noqa: S101 (it is a pipe)
        parts = [self._rest]
        while b"\n" not in parts[-1]:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([child.stdout], [], [], left)[0]:
                raise TimeoutError
            part = os.read(child.stdout.fileno(), 1 << 20)
            if not part:
                return b""
            parts.append(part)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line
