"""Prefixes that are prefilled before a request needs them, pinned, and kept through restarts."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.integration.models import BLOCK, GREEDY, llama, store, text
from tokcache import TokenIds, cli, samples
from tokcache.errors import (
    InvalidConfig,
    InvalidText,
    InvalidTokens,
    ModelClosed,
    StateError,
)
from tokcache.llama.prewarm import Prewarmed
from tokcache.state.tiers.disk import DiskTier

if TYPE_CHECKING:
    from pathlib import Path

IDS = list(range(5, 405))
SYSTEM = {"role": "system", "content": "You know the import system of Python. " * 12}
TOOLS = [{"type": "function", "function": {"name": "find_module", "parameters": {}}}]
TEXT = "A finder returns a module spec, and a loader creates the module. " * 8
QUESTION = {"role": "user", "content": "How is a package found?"}
MEMORIES = ("llama", "gemma3", "mamba", "lfm2")
WAIT_S = 60


def model(architecture: str) -> Path:
    return samples.tiny_model(architecture=architecture)


def summed(results: list[Prewarmed]) -> list[tuple[int, str | None]]:
    return [(each.n_decoded, each.refusal) for each in results]


@pytest.mark.parametrize("architecture", MEMORIES)
def test_the_first_request_decodes_only_what_is_new(architecture: str, tmp_path: Path) -> None:
    prefixes = [IDS, {"messages": [SYSTEM], "tools": TOOLS}, TEXT]
    n_tokens = []
    for is_restart in (False, True):
        with_disk = store(disk=tmp_path / "states")
        llm = llama(with_disk, model=model(architecture))
        results = llm.prewarm(prefixes)
        assert [each.refusal for each in results] == [None] * 3
        n_decoded = [0, 0, 0] if is_restart else [each.n_tokens for each in results]
        assert [each.n_decoded for each in results] == n_decoded
        n_tokens.append([each.n_tokens for each in results])

        answer = llm.create_completion([*IDS, 7 + is_restart, 9], **GREEDY)
        assert llm.last_reuse.n_decoded == 2
        llm.create_chat_completion([SYSTEM, QUESTION], tools=TOOLS, **GREEDY)
        reuse = llm.last_reuse
        assert reuse.n_in_context + reuse.n_restored >= results[1].n_tokens > 100
        if not is_restart:
            assert reuse.n_decoded == reuse.n_prompt - results[1].n_tokens
        llm.create_completion(TEXT + "And then?", **GREEDY)
        assert llm.last_reuse.n_decoded <= 6
        with_disk._check()
        llm.close()
        with_disk.close()
        plain = llama(model=model(architecture))
        assert text(plain.create_completion([*IDS, 7 + is_restart, 9], **GREEDY)) == text(answer)
        plain.close()
    assert n_tokens[0] == n_tokens[1]


def test_answers_are_equal_in_reproducible_mode() -> None:
    warm = llama(store(), reproducible=True)
    (result,) = warm.prewarm([TokenIds(IDS)])
    assert result == Prewarmed(len(IDS) // BLOCK * BLOCK, len(IDS) // BLOCK * BLOCK)
    plain = llama(reproducible=True)
    prompt = [*IDS, 7, 9]
    answer, expected = (llm.create_completion(prompt, **GREEDY) for llm in (warm, plain))
    assert text(answer) == text(expected)
    assert warm.last_reuse.n_decoded == len(prompt) - result.n_tokens
    assert warm.prewarm([IDS[:7]]) == [Prewarmed(0, 0, "prewarm_empty")]


@pytest.mark.parametrize("architecture", ["llama", "lfm2"])
def test_a_pin_survives_other_prompts_until_it_ends(architecture: str) -> None:
    states = store(max_entries=6)
    llm = llama(states, model=model(architecture))
    llm.prewarm([IDS])

    def n_decoded_after_others(first: int) -> int:
        for n in range(first, first + 8):
            llm.create_completion([1000 - n, *range(30, 130)], max_tokens=1)
        llm.create_completion([*IDS, 7, 9], max_tokens=1)
        states._check()
        return int(llm.last_reuse.n_decoded)

    assert n_decoded_after_others(0) == 2
    assert states.stats().evictions > 0
    assert llm.unpin([IDS]) == 1
    assert n_decoded_after_others(20) > 2
    assert llm.unpin([IDS[::-1]]) == 0


class Decodes:
    """Counts a model's decodes; number `stop_at` waits for `go_on`."""

    def __init__(self, llm: Any, stop_at: int) -> None:
        self.threads: list[int] = []
        self.stopped, self.go_on = threading.Event(), threading.Event()
        self._decode, self._stop_at = llm._ctx.decode, stop_at
        llm._ctx.decode = self

    def __call__(self, batch: Any) -> None:
        self.threads.append(threading.get_ident())
        if len(self.threads) == self._stop_at:
            self.stopped.set()
            assert self.go_on.wait(WAIT_S)
        self._decode(batch)


@pytest.mark.parametrize("architecture", MEMORIES)
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_prewarm_yields_to_a_request_within_one_decode(
    architecture: str, *, is_stream: bool
) -> None:
    llm = llama(store(), model=model(architecture), n_batch=64)
    decodes = Decodes(llm, stop_at=3)
    done: list[tuple[int, int]] = []
    results: list[Prewarmed] = []

    def warm() -> None:
        results.extend(llm.prewarm([IDS], progress=lambda *each: done.append(each)))

    def ask() -> None:
        answer = llm.create_completion([9, 8, 7], **GREEDY, stream=is_stream)
        assert list(answer)

    warming, asking = threading.Thread(target=warm), threading.Thread(target=ask)
    warming.start()
    assert decodes.stopped.wait(WAIT_S)
    asking.start()
    while not llm._gate._waiting:
        pass
    decodes.go_on.set()
    asking.join(WAIT_S)
    warming.join(WAIT_S)
    threads = decodes.threads
    assert threads[:3] == [warming.ident] * 3
    # The decode in progress ends, and all of the request comes before the next one.
    n_asked = threads.count(asking.ident or 0)
    assert threads[3 : 3 + n_asked] == [asking.ident] * n_asked
    assert n_asked > 0
    # Nothing is decoded twice: it goes on where it was interrupted.
    assert summed(results) == [(len(IDS), None)]
    assert done[-1] == (len(IDS), len(IDS))
    assert [each[0] for each in done] == sorted(each[0] for each in done)
    llm.create_completion([*IDS, 7, 9], max_tokens=1)
    assert llm.last_reuse.n_decoded == 2


def test_a_stream_that_is_being_read_is_not_suspended() -> None:
    llm = llama(store())
    stream = llm.create_completion([9, 8, 7], **GREEDY, stream=True)
    items = [next(stream)]
    suspended: list[Any] = []
    suspend = llm.suspend

    def noted(**how: Any) -> Any:
        suspended.append(how)
        return suspend(**how)

    llm.suspend = noted
    warming = threading.Thread(target=llm.prewarm, args=([IDS],))
    warming.start()
    items += stream
    warming.join(WAIT_S)
    assert not suspended
    assert len(items) > 2


def test_bad_prefixes_are_refused_by_reason_and_the_context_stays() -> None:
    states = store()
    llm = llama(states)
    llm.create_completion(IDS[:50], max_tokens=1)
    held = llm._record.held.copy()
    cases: dict[str, Any] = {
        "prewarm_empty": [],
        "prewarm_too_long": [*range(3, 1003), *range(3, 103)],
        "prewarm_other_model": [5, llm.n_vocab()],
        "prewarm_template_failed": [{"role": "user", "content": 5 + 7j}],
    }
    assert [each.refusal for each in llm.prewarm(cases.values())][:3] == list(cases)[:3]
    assert llm.prewarm([[-1, 5]])[0].refusal == "prewarm_other_model"
    assert np.array_equal(llm._record.held, held)
    assert (
        summed(llm.prewarm([IDS, TokenIds(IDS), np.array(IDS)]))[1:]
        == [(0, "prewarm_duplicate")] * 2
    )
    assert states.stats().refusals["prewarm_duplicate"] == 2
    for wrong, error in (
        ("a text", InvalidText),
        (5, InvalidText),
        ([b"bytes"], InvalidText),
        ([None], InvalidText),
        (["a", "\ud800"], InvalidText),
        ([[1 << 40]], InvalidTokens),
        ([["a", "b"]], InvalidTokens),
        ([{"message": []}], InvalidText),
    ):
        with pytest.raises(error):
            llm.prewarm(wrong)
    with pytest.raises(InvalidConfig, match="prefix_cache"):
        llama().prewarm([IDS])
    with llm._gate.step(), pytest.raises(StateError):
        llm.prewarm([IDS])
    llm.close()
    with pytest.raises(ModelClosed):
        llm.prewarm([IDS])


def test_a_cache_that_is_too_small_or_a_full_disk_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = llama(store(ram_bytes=200_000))
    assert llm.prewarm([IDS])[0].refusal == "prewarm_not_kept"

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    states = store(disk=tmp_path / "states")
    llm = llama(states)
    with monkeypatch.context() as patched:
        patched.setattr("tokcache.state.tiers.disk.files.write_temporary", full)
        assert summed(llm.prewarm([IDS])) == [(len(IDS), "prewarm_not_written")]
        assert states.stats().refusals["disk: full"] > 0
        llm.create_completion([*IDS, 7, 9], max_tokens=1)
        assert llm.last_reuse.n_decoded == 2
    # Once there is room, the same call writes the missing states and decodes nothing.
    assert summed(llm.prewarm([IDS])) == [(0, None)]
    states.close()


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_a_template_without_openers_is_warmed_to_where_prompts_part(architecture: str) -> None:
    llm = llama(store(), model=model(architecture))
    _use(llm, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:")
    (result,) = llm.prewarm([[SYSTEM]])
    assert result.refusal is None
    llm.create_chat_completion([SYSTEM, QUESTION], max_tokens=1)
    reuse = llm.last_reuse
    assert reuse.n_decoded == reuse.n_prompt - result.n_tokens < reuse.n_prompt / 2
    _use(llm, "{{ raise_exception('never') }}")
    assert llm.prewarm([[SYSTEM]])[0].refusal == "prewarm_template_failed"
    llm.chat_handler = lambda **_: None
    assert llm.prewarm([[SYSTEM]])[0].refusal == "prewarm_chat_handler"


def _use(llm: Any, template: str) -> None:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # noqa: PLC0415

    formatter = Jinja2ChatFormatter(template, "</s>", "<s>", stop_token_ids=[])
    llm._chat_handlers[llm.chat_format] = formatter.to_chat_handler()


def test_scopes_do_not_share_warm_prefixes() -> None:
    llm = llama(store())
    assert [each.refusal for each in llm.prewarm([TEXT, IDS], scope="tenant-a")] == [None] * 2
    assert llm.tokenizer_._recent[0] == "tenant-a"  # its texts are that tenant's, too
    llm.create_completion([*IDS, 7, 9], max_tokens=1, scope="tenant-b")
    assert llm.last_reuse.n_decoded == len(IDS) + 2
    llm.create_completion([*IDS, 7, 9], max_tokens=1, scope="tenant-a")
    assert llm.last_reuse.n_decoded == 2
    assert llm.unpin([IDS], scope="tenant-b") <= llm.unpin([IDS], scope="tenant-a") == 1


# The command line


def warm(*arguments: object) -> Any:
    words = ["states", "warm", "--set", "n_ctx=1024", *map(str, arguments)]
    return CliRunner().invoke(cli.app, words, env={"COLUMNS": "200"})


def test_the_command_warms_a_folder_for_a_later_llama(tmp_path: Path) -> None:
    prompts, path = tmp_path / "prompts", samples.tiny_model()
    prompts.mkdir()
    (prompts / "text.txt").write_text(TEXT)
    body = {"messages": [SYSTEM], "tools": TOOLS, "model": path.stem, "temperature": 0.5}
    (prompts / "chat.json").write_text(json.dumps(body))
    (prompts / "ids.json").write_text(json.dumps({"prompt": IDS}))
    (prompts / "notes.md").write_text("No prompt.")
    for has_decoded in (True, False):
        result = warm(path, prompts)
        assert result.exit_code == 0, result.output
        assert result.output.count("warm") == 3
        assert (re.search(r" 400 +│ 400 ", result.output) is not None) == has_decoded
    tier = DiskTier(prompts / "states")
    assert all(file.is_pinned for file in tier.files())
    llm = llama(store(disk=tier, block_tokens=256), n_batch=2048)
    llm.wait_for_fingerprint()
    llm.create_completion([*IDS, 7, 9], max_tokens=1)
    assert llm.last_reuse.n_restored == len(IDS)


def test_the_command_refuses_prompts_by_reason(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    assert warm(samples.tiny_model(), prompts).exit_code == 2
    prompts.mkdir()
    empty = warm(samples.tiny_model(), prompts)
    assert empty.exit_code == 2
    assert "has no prompts" in empty.stderr
    (prompts / "good.txt").write_text(TEXT)
    for wrong in ("foo", "n_contexts=7", "scope=x", 'n_ctx="many"'):
        refused = warm(samples.tiny_model(), prompts, "--set", wrong)
        assert (refused.exit_code, "--set" in refused.stderr) == (2, True), wrong
    files = {
        "other.json": json.dumps({"messages": [SYSTEM], "model": "another"}),
        "other.txt": "<|start_header_id|>system<|end_header_id|>Be brief.",
        "ids.json": json.dumps({"prompt": [5, 1 << 20]}),
        "huge.json": json.dumps({"prompt": [1 << 40]}),
        "list.json": "[1]",
        "broken.json": "{",
        "none.json": "{}",
        "long.txt": TEXT * 40,
        "good.txt": TEXT,
        "same.txt": TEXT,
    }
    for name, content in files.items():
        (prompts / name).write_text(content)
    (prompts / "bytes.txt").write_bytes(b"\xff\xfe")
    result = warm(samples.tiny_model(), prompts, "--disk", tmp_path / "states")
    assert result.exit_code == 1, result.output
    rows = {line.split("│")[1].strip(): line for line in result.output.splitlines() if "│" in line}
    assert "warm" in rows.pop("good.txt").split("│")[4]
    reasons = {
        "other.json": "prewarm_other_model",
        "other.txt": "prewarm_other_model",
        "ids.json": "prewarm_other_model",
        "long.txt": "prewarm_too_long",
        "same.txt": "prewarm_duplicate",
        "list.json": "no JSON object",
        "broken.json": "can't be read",
        "bytes.txt": "can't be read",
        "none.json": "neither",
        "huge.json": "",
    }
    assert rows.keys() >= reasons.keys()
    for name, reason in reasons.items():
        assert reason in rows[name]
