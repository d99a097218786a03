"""The program that renders a chat template in a process of its own: see `process`.

It reads JSON lines from standard input and answers each with one on standard output. The first
holds the template, the others each ask for one rendering.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import jinja2

from tokcache.text.chat.environment import compile_template, find_switches

if TYPE_CHECKING:
    from jinja2 import Template

_MAX_MESSAGE = 300


def main() -> None:
    """Answer requests until standard input ends."""
    # Anything that a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    first = json.loads(sys.stdin.readline())
    try:
        template, answer = _opened(first)
    except Exception as error:  # noqa: BLE001 (whatever a template does is an answer)
        _reply(answers, _failure(error))
        return
    _reply(answers, answer)
    for line in sys.stdin:
        # If the parent is killed, an endless template must not go on without it.
        signal.alarm(int(first["seconds"]) + 5)
        try:
            answer = _rendered(template, json.loads(line), first["max_chars"])
        except Exception as error:  # noqa: BLE001 (same)
            answer = _failure(error)
        signal.alarm(0)
        _reply(answers, answer)


def _reply(answers: IO[str], answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _opened(first: dict[str, Any]) -> tuple[Template, dict[str, Any]]:
    """Compile the template, by transformers if that is asked for and installed."""
    compiler, by = compile_template, f"jinja2 {jinja2.__version__}"
    if first["by_transformers"]:
        try:
            import transformers  # noqa: PLC0415 (optional, slow)
            from transformers.utils import chat_template_utils  # noqa: PLC0415 (same)

            compiler = chat_template_utils._compile_jinja_template  # noqa: SLF001 (has no other)
            by = f"transformers {transformers.__version__}"
        except (ImportError, AttributeError):  # the environment of `environment` is the same
            pass
    _limit_memory(first["max_bytes"])
    signal.alarm(int(first["seconds"]) + 5)
    template = compiler(first["template"])
    switches = find_switches(template.environment, first["template"])
    signal.alarm(0)
    return template, {"by": by, "switches": [asdict(each) for each in switches]}


def _limit_memory(max_bytes: int) -> None:
    """Let the process grow by `max_bytes` and no more, where the system can limit it."""
    try:
        import resource  # noqa: PLC0415 (not on every system)

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError, ValueError):  # the time and the size are limited all the same
        return
    limit = pages * resource.getpagesize() + max_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _rendered(template: Template, request: dict[str, Any], max_chars: int) -> dict[str, Any]:
    clock = dt.datetime.fromisoformat(request["clock"])
    template.environment.globals["strftime_now"] = clock.strftime
    chunks: list[str] = []
    n_chars = 0
    for chunk in template.generate(
        messages=request["messages"],
        tools=request["tools"],
        documents=None,
        add_generation_prompt=request["add_generation_prompt"],
        **request["variables"],
    ):
        n_chars += len(chunk)
        if n_chars > max_chars:
            return {"stopped": f"it writes more than {max_chars:,} characters"}
        chunks.append(chunk)
    return {"text": "".join(chunks)}


def _failure(error: Exception) -> dict[str, Any]:
    text = str(error)[:_MAX_MESSAGE]
    if isinstance(error, jinja2.TemplateSyntaxError):
        return {"invalid": f"line {error.lineno}: {text.splitlines()[0] if text else 'syntax'}"}
    if isinstance(error, MemoryError):
        return {"stopped": "it needs too much memory"}
    if type(error) is jinja2.TemplateError:  # what raise_exception raises
        return {"refused": text}
    return {"failed": f"{type(error).__name__}: {text}"}


if __name__ == "__main__":
    main()
