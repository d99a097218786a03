"""`tokcache replay` as a user runs it: real traces, bad input, an interrupt, and its page."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from tests.text.implementations import REFERENCE
from tokcache.cli import app
from tokcache.replay.result import written_size
from tokcache.replay.summary import duration

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
SECRET = "xylophone"  # noqa: S105 (a word of the prompts)


def run(*args: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["replay", *map(str, args)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def chats(path: Path, n: int = 30) -> Path:
    """Write a request log of chats that grow."""
    rows = []
    for chat in range(n // 5):
        messages: list[dict[str, str]] = [
            {"role": "system", "content": f"You answer in short sentences. {'Rule. ' * 80}"}
        ]
        for turn in range(5):
            asked = f"Question {turn} of chat {chat} about {SECRET}? " * 4
            messages += [{"role": "user", "content": asked}]
            rows.append({"model": "m", "messages": list(messages)})
            messages += [{"role": "assistant", "content": f"Answer {turn} of {chat}. " * 6}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def figures(path: Path, *args: str | Path) -> dict[str, Any]:
    code, output = run(path, "--json", path.with_suffix(".json"), *args)
    assert code == 0, output
    found: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return found


def test_a_request_log_is_replayed(tmp_path: Path) -> None:
    log = chats(tmp_path / "log")
    code, output = run(log, "--prefill-rate", "1000", "--kv-bytes-per-token", "1000")
    assert code == 0, output
    assert "On these 30 prompts" in output
    assert "tokcache.PrefixStateCache(ram_bytes=" in output
    assert SECRET not in output
    found = figures(log)
    curves = {one["name"]: one for one in found["curves"]}
    assert set(curves) == {"L0", "L1", "states"}
    assert curves["states"]["unlimited"] > 0.7
    assert found["n_prompts"] == 30
    assert SECRET not in json.dumps(found)


def test_digests_alone_have_the_same_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    REFERENCE.use(monkeypatch)
    monkeypatch.setattr(os, "urandom", b"\7".__mul__)  # both replays cut texts at the same places
    log = chats(tmp_path / "log")
    first, second = figures(log), figures(log, "--no-text")
    assert second["tokenization"]["with_s"] is None
    for one, other in zip(first["curves"], second["curves"], strict=True):
        assert one["unlimited"] == other["unlimited"]


def test_replies_encoded_again_add_hits(tmp_path: Path) -> None:
    turns = [
        {"from": role, "value": f"{role} says {n}. " * 40}
        for n in range(4)
        for role in ("human", "gpt")
    ]
    log = tmp_path / "log"
    log.write_text(json.dumps({"conversations": turns}))
    rates = [
        figures(log, "--generated", how)["curves"][-1]["unlimited"] for how in ("ids", "reencoded")
    ]
    assert rates[1] > rates[0] + 0.1


def test_spans_without_text_are_counted_and_said(tmp_path: Path) -> None:
    log = tmp_path / "log"
    span = {"name": "chat m", "attributes": {"gen_ai.usage.input_tokens": 12}}
    log.write_text(2 * (json.dumps(span) + "\n"))
    code, output = run(log)
    assert code == 0
    assert "2 requests with 24 prompt tokens have no text" in output


@pytest.mark.parametrize("content", ["", "[]", "\n\n"])
def test_an_empty_file_is_no_error(content: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(content)
    code, output = run(log)
    assert (code, "no requests" in output) == (0, True), output


def test_bad_input_is_one_line_with_exit_code_2(tmp_path: Path) -> None:
    log = chats(tmp_path / "log")
    broken = tmp_path / "broken"
    broken.write_text(log.read_text() + "{\n")
    cases: list[tuple[list[str | Path], str]] = [
        (["/nowhere"], "no such trace: /nowhere"),
        ([log, "--sample", "0"], "--sample must be above 0"),
        ([log, "--sample", "2"], "from 0 to 1"),
        ([log, "--prefill-rate", "-1"], "above 0"),
        ([log, "--format", "x"], "no format 'x'"),
        ([log, "--tokenizer", "/nowhere.json"], "no such tokenizer file"),
        ([log, "--model", "/nowhere.gguf"], "no such model file"),
        ([log, "--state-bytes", "4GB"], "--state-bytes"),
        ([broken, "--strict"], "line 31: not a JSON value"),
        ([log, "--json", "/nowhere/x"], "can't be written: no such folder: /nowhere"),
        ([log, "--state-bytes", "4G"], "add --kv-bytes-per-token or --model"),
    ]
    for args, message in cases:
        code, output = run(*args)
        assert (code, message in output) == (2, True), (args, output)
        assert "Traceback" not in output
    code, output = run(broken)
    assert (code, "1 record\n" in output, "line 31" in output) == (0, True, True)


def test_files_that_do_not_fit_are_named_before_any_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokcache.replay.run.TextReplay.add", lambda *_: pytest.fail("replayed"))
    log, ids = chats(tmp_path / "log"), tmp_path / "ids"
    ids.write_text('{"hash_ids": [1], "input_length": 512}')
    code, output = run(log, ids)
    assert (code, "has texts" in output, "replay them one by one" in output) == (2, True, True)
    code, output = run(log, tmp_path / "absent")
    assert (code, "no such trace" in output) == (2, True)


def test_a_trace_of_which_nothing_could_be_read_is_no_success(tmp_path: Path) -> None:
    code, output = run(chats(tmp_path / "log", 5), "--format", "mooncake")
    assert (code, "No record could be read (5 records skipped)" in output) == (2, True), output


def test_the_summary_says_little_where_little_is_saved(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one text of a few words\n")
    code, output = run(log)
    assert code == 0, output
    first = output.splitlines()[0]
    assert first.startswith("On this prompt, states would save the prefill of less than 1% of the ")
    assert "of a tiny sample tokenizer" in first


def test_the_summary_has_the_hits_of_the_size_that_was_timed(tmp_path: Path) -> None:
    """The least size with nearly all hits has fewer than the default size."""
    log = chats(tmp_path / "log")
    l1 = next(one for one in figures(log)["curves"] if one["name"] == "L1")
    output = run(log)[1]
    shown = re.search(r"cache of the default size would find (\d+)% of the characters", output)
    assert shown is not None, output
    assert int(shown[1]) == pytest.approx(100 * l1["unlimited"], abs=2)


def test_a_log_of_token_ids_needs_no_tokenizer(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(2 * (json.dumps({"prompt": list(range(64))}) + "\n"))
    code, output = run(log)
    assert code == 0, output
    assert "The token ids are those of the trace" in output
    assert "tiny" not in output
    assert "template" not in output


@pytest.mark.parametrize("kv", [1, 57_344, 1_000_000])
def test_the_settings_can_be_pasted(kv: int, tmp_path: Path) -> None:
    log = chats(tmp_path / "log")
    found = figures(log, "--kv-bytes-per-token", str(kv))
    names: dict[str, Any] = {}
    exec(found["config"], names)  # noqa: S102 (our own code)
    assert names["config"].l1_max_bytes >= 4 << 20
    states = next(one for one in found["curves"] if one["name"] == "states")
    with contextlib.closing(names["states"]) as cache:
        assert cache.ram_bytes >= states["knee_size"]
    assert 'max_bytes = "' in found["config"]


def test_a_file_that_can_not_be_written_costs_no_figure(tmp_path: Path) -> None:
    code, output = run(chats(tmp_path / "log"), "--json", tmp_path)
    assert (code, "can't be written: Is a directory" in output) == (2, True)
    assert "On these 30 prompts" in output


def test_a_closed_output_costs_no_file(tmp_path: Path) -> None:
    log, written = chats(tmp_path / "log"), tmp_path / "figures"
    command = [sys.executable, "-m", "tokcache", "replay", str(log), "--json", str(written)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:  # noqa: S603 (our own code)
        assert process.stdout is not None
        process.stdout.close()
    assert json.loads(written.read_text())["n_prompts"] == 30


def test_a_model_measures_prefill_and_states(tmp_path: Path) -> None:
    from tokcache.samples import tiny_model, tiny_tokenizer  # noqa: PLC0415

    model = tiny_model(tiny_tokenizer())
    found = figures(chats(tmp_path / "log"), "--model", str(model))
    prefill = found["prefill"]
    assert prefill["tokens_per_s"] > 0
    assert prefill["kv_bytes_per_token"] > 100
    assert prefill["restore_tokens_per_s"] > 0
    assert "measured" in prefill["how"]
    assert found["curves"][-1]["unit"] == "bytes"


@contextlib.contextmanager
def interruptible_children() -> Iterator[None]:
    """Where the tests run in the background they ignore interrupts, and a child inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_writes_the_figures_up_to_then(tmp_path: Path) -> None:
    """The trace comes through a pipe that stays open, so the replay can't have ended."""
    line = chats(tmp_path / "log", 5).read_bytes()
    written = tmp_path / "figures"
    command = [sys.executable, "-m", "tokcache", "replay", "-", "--json", str(written)]
    with (
        interruptible_children(),
        subprocess.Popen(  # noqa: S603 (our own code)
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process,
    ):
        assert process.stdin is not None
        n = 0
        while n < 2_000_000:  # more than the first bytes, so that some are replayed
            n += process.stdin.write(line)
        process.stdin.flush()
        time.sleep(5)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, (output, errors)
    found = json.loads(written.read_text())
    assert found["is_partial"]
    assert found["n_prompts"] > 0
    assert b"Interrupted" in output


def test_all_shared_traces_are_replayed(shared_data: Path, tmp_path: Path) -> None:
    traces = shared_data / "traces"
    sessions = sorted((traces / "claude-code").glob("*.json"))
    for files, unlimited in (
        ([traces / "mooncake/conversation_trace.jsonl"], 0.374),
        (sessions, 0.921),
    ):
        written = tmp_path / "figures"
        code, output = run(*files, "--json", written)
        assert code == 0, output
        found = json.loads(written.read_text())
        assert found["curves"][0]["unlimited"] == pytest.approx(unlimited, abs=0.001)
        assert found["n_skipped"] == 0


def test_the_requests_of_the_demo_are_replayed(tmp_path: Path) -> None:
    log = tmp_path / "requests"
    demo = ["demo", "--backend", "tokens", "--requests", str(log)]
    done = CliRunner().invoke(app, demo)
    assert done.exit_code == 0, done.output
    found = figures(log)
    assert (found["n_prompts"], found["n_skipped"]) == (20, 0)
    # The same texts; their number of tokens is that of a tokenizer trained on this Python's manual.
    assert f"{found['n_tokens']:,} prompt ids" in done.output
    assert 60_000 < found["n_tokens"] < 66_000


def test_sizes_and_times_are_written_to_be_read() -> None:
    assert [written_size(n) for n in (1, 2048, 5 << 20, (5 << 20) + 1)] == ["1K", "2K", "5M", "6M"]
    assert [duration(s) for s in (0, 2e-6, 0.25, 90, 4000, 9000)] == [
        "0 s",
        "2 µs",
        "250 ms",
        "90 s",
        "66.7 min",
        "2.5 h",
    ]


# ---- the page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("jinja2", "matplotlib"):
        pytest.importorskip(name, reason="the extra `replay` is not installed")
    folder = tmp_path_factory.mktemp("page")
    html = folder / "page.html"
    log = chats(folder / "log <b>&", 60)
    args = ("--prefill-rate", "1000", "--kv-bytes-per-token", "57344")
    code, output = run(log, "--html", html, *args)
    assert code == 0, output
    return html


def test_the_page_is_one_file_without_text_of_prompts(page: Path) -> None:
    text = page.read_text()
    assert SECRET not in text
    assert "log &lt;b&gt;&amp;" in text
    loaded = re.findall(r'(?:src|href|action)\s*=\s*"([^"]*)"|url\(([^)]*)\)|@import', text)
    assert all(a.startswith(("#", "data:,")) or b.startswith("#") for a, b in loaded), loaded
    assert "<script" not in text
    for title in ("Hit rate of prefix states", "Time saved", "Latency of tokenization",
                  "Misses by reason", "Bytes by tier", "Costliest prompts"):  # fmt: skip
        assert f"<h2>{title}</h2>" in text
    assert "Below 1 MiB an L1 has up to four points less" in text
    assert "Restoring states counts as no time; --model measures it." in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def browsed(page: Path, folder: Path) -> tuple[str, list[str], list[str]]:
    """Return the page's elements, the console's lines, and the URLs that the page asked for."""
    if BROWSER is None:
        pytest.skip("needs Debian's chromium")
    log = folder / "net.json"
    done = subprocess.run(  # noqa: S603 (the browser that is installed)
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={folder / 'browser'}", "--window-size=390,900", f"--log-net-log={log}",
         "--virtual-time-budget=2000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    # The browser asks for updates and dictionaries of its own, but not on behalf of a file.
    asked = re.findall(r'site=file://[^}]*}","url":"([^"]*)"', log.read_text())
    return done.stdout, console, [url for url in asked if not url.startswith("file:")]


def test_the_page_in_a_browser_has_no_error_and_loads_nothing(page: Path, tmp_path: Path) -> None:
    shown, console, asked = browsed(page, tmp_path)
    assert (console, asked) == ([], [])
    assert shown.count("<svg") == 6
    loading = tmp_path / "loading.html"
    loading.write_text(page.read_text().replace("<main>", '<main><img src="http://127.0.0.1:9/x">'))
    assert "http://127.0.0.1:9/x" in browsed(loading, tmp_path)[2]


def test_without_its_libraries_a_page_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, output = run(chats(tmp_path / "log"), "--html", tmp_path / "x.html")
    assert (code, "pip install 'tokcache[replay]'" in output) == (2, True)
