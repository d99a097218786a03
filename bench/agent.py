"""A real coding agent through `tokcache serve`, and the tokens prefilled for its requests.

1. mini-swe-agent, in an environment of its own (`--python`), mends a small program. It talks to
   `tokcache serve`, and that to a scripted llama-server, whose answers are prepared tool calls and
   which keeps each request.
2. The requests of all runs are replayed at the same time on two real llama-servers of four slots,
   with everything shut down and started again half-way: bare servers with their --cache-ram get
   them round robin, the others through `tokcache serve`.
3. The least possible is the number of distinct prefixes of all prompts, in tokens.

Make the environment with `python -m venv DIR && DIR/bin/pip install mini-swe-agent`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from bench.gateway import BARE, MAX_OVER_LEAST, OURS, Bare, ask, least, systems

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench._report import Report

PACKAGES = ("xllamacpp", "starlette", "uvicorn", "httpx")
UNIT = "tokens prefilled over the least possible"
BAR = "at most 1.05 times the least"
IN_ALL: tuple[str, ...] = ()
N_ANSWER = 16
DONE = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
PROGRAM = '''"""Figures of a list of numbers."""


def mean(values):
    return sum(values) / len(values)


def median(values):
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def spread(values):
    return max(values) - min(values)
'''
# A task, and the commands with which a model could solve it.
TASKS = {
    "mean() raises ZeroDivisionError for an empty list; it should return 0.0.": (
        "ls -la",
        "cat figures.py",
        "python -c 'import figures; figures.mean([])'",
        r"sed -i 's|return sum(values) .*|return sum(values) / (len(values) or 1)|' figures.py",
        "python -c 'import figures; print(figures.mean([]), figures.mean([1, 2]))'",
        "git diff --no-index /dev/null figures.py | head -30",
        DONE,
    ),
    "median() of an even number of values should be the mean of the two in the middle.": (
        "ls",
        "cat figures.py",
        "python -c 'import figures; print(figures.median([1, 2, 3, 4]))'",
        "grep -n 'ordered' figures.py",
        r"sed -i 's|return ordered.*|at = len(values) // 2|' figures.py",
        r"sed -i '/at = len/a \    return (ordered[at] + ordered[~at]) / 2' figures.py",
        "python -c 'import figures; print(figures.median([1, 2, 3, 4]), figures.median([3]))'",
        "cat figures.py",
        DONE,
    ),
    "spread() should accept any iterable, not only lists.": (
        "ls -la",
        "sed -n 1,20p figures.py",
        "python -c 'import figures; print(figures.spread(iter([1, 5])))'",
        r"sed -i 's|return max|values = list(values)\n    return max|' figures.py",
        "python -c 'import figures; print(figures.spread(iter([1, 5])))'",
        DONE,
    ),
}


class Scripted(ThreadingHTTPServer):
    """A llama-server as the gateway sees it, with prepared answers; it keeps each request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commands: tuple[str, ...] = ()
        self.bodies: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Scripted

    def do_GET(self) -> None:
        # Vision: the gateway neither saves slots nor asks for probabilities.
        props = {"total_slots": 1, "default_generation_settings": {"n_ctx": 32768},
                 "model_path": "scripted.gguf", "build_info": "b1", "media_marker": "boot",
                 "modalities": {"vision": True}}  # fmt: skip
        known = {"/props": props, "/v1/models": {"data": []}, "/lora-adapters": [], "/slots": []}
        self._send(json.dumps(known[self.path]).encode(), "application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        step = len(self.server.bodies)
        self.server.bodies.append(body)
        arguments = json.dumps({"command": self.server.commands[step]})
        deltas: list[dict[str, Any]] = [
            {"role": "assistant", "content": None},
            {"content": f"Step {step + 1}: I run a command and look at its output."},
            {"tool_calls": [{"index": 0, "id": f"call_{step}", "type": "function",
                             "function": {"name": "bash", "arguments": ""}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": arguments}}]},
        ]  # fmt: skip
        told = [{"index": 0, "delta": each, "finish_reason": None} for each in deltas]
        chunks: list[dict[str, Any]] = [{"choices": [each]} for each in told]
        timings = {"cache_n": 0, "prompt_n": 100, "prompt_ms": 1.0, "predicted_n": 9}
        last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}
        chunks += [last, {"choices": [], "usage": {}, "timings": timings}]
        common = {"id": f"chatcmpl-{step}", "created": 1, "model": "scripted"}
        events = [f"data: {json.dumps({**common, **each})}\n\n" for each in chunks]
        self._send("".join([*events, "data: [DONE]\n\n"]).encode(), "text/event-stream")

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base's name)
        """Print nothing."""


@contextlib.contextmanager
def served(upstream: str, folder: Path) -> Iterator[str]:
    """Run `tokcache serve` in front of a server and yield its URL."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tokcache", "serve", "--upstream", upstream]
    command += ["--port", str(port), "--folder", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 (our own)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).is_success:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def record(python: Path, task: str, commands: tuple[str, ...]) -> list[dict[str, Any]]:
    """Let the agent work on a task, check that it ran each command, and return its requests."""
    with tempfile.TemporaryDirectory(prefix="tokcache-agent-") as name, Scripted() as upstream:
        folder = Path(name)
        work = folder / "work"
        work.mkdir()
        (work / "figures.py").write_text(PROGRAM)
        upstream.commands = commands
        threading.Thread(target=upstream.serve_forever, daemon=True).start()
        with served(upstream.url, folder / "own") as url:
            arguments = ["-y", "--exit-immediately", "-l", "0", "-t", task, "-m", "openai/scripted"]
            arguments += ["-c", "mini.yaml", "-c", "model.cost_tracking=ignore_errors"]
            done = subprocess.run(  # noqa: S603 (the agent that the user named)
                [python, "-m", "minisweagent.run.mini", *arguments, "-o", folder / "run.json"],
                cwd=work,
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": name,
                    "OPENAI_API_KEY": "any",
                    "OPENAI_API_BASE": f"{url}/v1",
                    "MSWEA_CONFIGURED": "true",
                    "MSWEA_GLOBAL_CONFIG_DIR": str(folder / "config"),
                    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it asks the network for prices
                },
            )
        upstream.shutdown()
        if done.returncode or len(upstream.bodies) != len(commands):
            raise RuntimeError(
                f"the agent ended with {done.returncode} after {len(upstream.bodies)} of"
                f" {len(commands)} requests:\n{(done.stdout + done.stderr)[-2000:]}"
            )
        told = json.loads((folder / "run.json").read_text())
        assert told["info"]["exit_status"] == "Submitted", told["info"]
        assert (work / "figures.py").read_text() != PROGRAM, "the commands changed nothing"
    kept = ("messages", "tools")
    return [{key: body[key] for key in kept if key in body} for body in upstream.bodies]


async def replay(system: Bare, runs: list[list[dict[str, Any]]]) -> tuple[int, int]:
    """Send the requests of each run one after the other; return the tokens prefilled, and all."""
    n_prefilled = n_prompt = 0

    async def one(bodies: list[dict[str, Any]]) -> None:
        nonlocal n_prefilled, n_prompt
        for body in bodies:
            _, timings, _ = await ask(client, system.url(), {**body, "max_tokens": N_ANSWER})
            n_prefilled += timings["prompt_n"]
            n_prompt += timings["prompt_n"] + timings["cache_n"]

    async with httpx.AsyncClient(timeout=600, trust_env=False) as client:
        await asyncio.gather(*map(one, runs))
    return n_prefilled, n_prompt


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--python", type=Path, help="a Python that has mini-swe-agent")
    parser.add_argument("--runs", type=int, default=2, help="runs of each task, all at a time")


def run(options: argparse.Namespace, report: Report) -> None:
    """Record the agent's requests and replay them on both systems."""
    if options.python is None:
        report.skip("--python names no Python with mini-swe-agent")
        return
    runs = [
        record(options.python, f"{task} Seen in version {number}.", commands)
        for number in range(options.runs)
        for task, commands in TASKS.items()
    ]
    prompts = [body["messages"] for bodies in runs for body in bodies]
    over: dict[str, float] = {}
    notes: dict[str, str] = {}
    sizes = set()
    with systems() as (bare, ours):
        for name, system in ((BARE, bare), (OURS, ours)):
            first = asyncio.run(replay(system, [bodies[: len(bodies) // 2] for bodies in runs]))
            system.stop()
            system.start()
            rest = asyncio.run(replay(system, [bodies[len(bodies) // 2 :] for bodies in runs]))
            system.show_reasons()
            n_prefilled, n_prompt = first[0] + rest[0], first[1] + rest[1]
            over[name] = n_prefilled / asyncio.run(least(system.urls[0], prompts))
            notes[name] = f"{n_prefilled:,} of {n_prompt:,} tokens"
            sizes.add(n_prompt)
    title = f"{len(runs)} runs of the agent, {len(prompts)} requests"
    report.check("both systems got the same prompts", is_right=len(sizes) == 1)
    report.table(f"{title}: prefilled over the least", "x", over, base=BARE, notes=notes)
    report.bar("prefilled over the least", over[OURS], MAX_OVER_LEAST, most=True)
