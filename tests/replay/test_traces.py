"""Every format is recognised and read; records that can't be read are counted and named."""

from __future__ import annotations

import gzip
import io
import json
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from tokcache.errors import InvalidTrace, MissingExtra, MissingFile
from tokcache.replay.blocks import BlockReplay
from tokcache.replay.prefixes import Prefixes
from tokcache.replay.traces import FORMATS, Request, Skipped, open_trace
from tokcache.replay.traces import source as source_module
from tokcache.replay.traces.chats import neutral_text

if TYPE_CHECKING:
    from pathlib import Path

SYSTEM, ASK, REPLY = "Be short.", "How late is it?", "Ten."
CHAT = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ASK}]
AS_TEXT = f"system: {SYSTEM}\n\nuser: {ASK}\n\nassistant:"
CALL = {"name": "clock", "arguments": {"zone": "UTC"}}
WITH_CALL = [
    *CHAT,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c1", "type": "function", "function": CALL}],
    },
    {"role": "tool", "content": "10:00", "tool_call_id": "c1"},
]
OPENAI_CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "clock", "arguments": '{"zone": "UTC"}'},
}
TRAJECTORY = [*CHAT, {"role": "assistant", "content": REPLY}]


def written(path: Path, *values: Any) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in values), encoding="utf-8")
    return str(path)


def read(path: str, format_name: str | None = None) -> tuple[str, list[Request], Skipped]:
    skipped = Skipped()
    trace = open_trace(path, skipped, format_name)
    found = list(trace.requests())
    trace.source.close()
    return trace.format_name, found, skipped


def text_of(request: Request) -> str:
    if request.text is not None:
        return request.text
    return neutral_text(request.messages, request.tools)


SPAN = {
    "name": "chat m",
    "attributes": {
        "gen_ai.operation.name": "chat",
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.system_instructions": json.dumps([{"type": "text", "content": SYSTEM}]),
        "gen_ai.input.messages": json.dumps(
            [{"role": "user", "parts": [{"type": "text", "content": ASK}]}]
        ),
    },
}
OTLP = {
    "resourceSpans": [
        {
            "scopeSpans": [
                {
                    "spans": [
                        {
                            "name": "chat m",
                            "attributes": [
                                {
                                    "key": key,
                                    "value": {
                                        "intValue"
                                        if key.endswith("tokens")
                                        else "stringValue": str(value)
                                    },
                                }
                                for key, value in SPAN["attributes"].items()  # type: ignore[attr-defined]
                            ],
                        },
                        {"name": "GET /", "attributes": []},
                    ]
                }
            ]
        }
    ]
}
RECORDS: dict[str, tuple[str, Any]] = {
    "chat completion": ("openai", {"model": "m", "messages": CHAT}),
    "parts": (
        "openai",
        {"messages": [CHAT[0], {"role": "user", "content": [{"type": "text", "text": ASK}]}]},
    ),
    "batch of OpenAI": ("openai", {"custom_id": "1", "body": {"messages": CHAT}}),
    "logged with its answer": (
        "openai",
        {"request": {"messages": CHAT}, "response": {"choices": [{"message": {"content": REPLY}}]}},
    ),
    "responses": ("openai", {"instructions": SYSTEM, "input": CHAT[1:]}),
    "messages alone": ("openai", CHAT),
    "completion": ("openai", {"prompt": AS_TEXT}),
    "text alone": ("openai", AS_TEXT),
    "Anthropic": ("anthropic", {"system": SYSTEM, "messages": CHAT[1:]}),
    "Anthropic, blocks": (
        "anthropic",
        {
            "system": [{"type": "text", "text": SYSTEM}],
            "messages": [{"role": "user", "content": [{"type": "text", "text": ASK}]}],
        },
    ),
    "batch of Anthropic": ("anthropic", {"params": {"system": SYSTEM, "messages": CHAT[1:]}}),
    "ShareGPT": (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": SYSTEM},
                {"from": "human", "value": ASK},
                {"from": "gpt", "value": REPLY},
            ]
        },
    ),
    "tau-bench": ("tau-bench", {"task_id": 0, "traj": TRAJECTORY}),
    "SWE-agent, file": ("swe-agent", {"environment": "swe", "history": TRAJECTORY}),
    "SWE-agent, data set": (
        "swe-agent",
        {
            "instance_id": "a-1",
            "trajectory": [
                {"role": "system", "system_prompt": SYSTEM, "text": None},
                {"role": "user", "text": ASK},
                {"role": "ai", "text": REPLY},
            ],
        },
    ),
    "span": ("otel", SPAN),
    "OTLP": ("otel", OTLP),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_is_recognised_and_read(name: str, tmp_path: Path) -> None:
    format_name, record = RECORDS[name]
    path = written(tmp_path / "trace", record, record)
    found_name, requests, skipped = read(path)
    assert (found_name, skipped.named) == (format_name, [])
    assert [text_of(one) for one in requests] == [AS_TEXT, AS_TEXT]


@pytest.mark.parametrize("name", [x for x, (_, one) in RECORDS.items() if isinstance(one, dict)])
def test_an_array_over_several_lines_is_read(name: str, tmp_path: Path) -> None:
    format_name, record = RECORDS[name]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps([record, record], indent=1))
    assert read(str(path))[0] == format_name
    assert [text_of(one) for one in read(str(path))[1]] == [AS_TEXT, AS_TEXT]


def test_calls_of_tools_are_the_same_in_both_apis(tmp_path: Path) -> None:
    tool = {"name": "clock", "description": "d", "parameters": {"type": "object"}}
    of_openai = {
        "tools": [{"type": "function", "function": tool}],
        "messages": [
            *CHAT,
            {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
            WITH_CALL[-1],
        ],
    }
    of_anthropic = {
        "system": SYSTEM,
        "tools": [{"name": "clock", "description": "d", "input_schema": {"type": "object"}}],
        "messages": [
            CHAT[1],
            {
                "role": "assistant",
                "content": [
                    {"type": "tool_use", "id": "c1", "name": "clock", "input": {"zone": "UTC"}}
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "10:00"}],
            },
        ],
    }
    for name, record in (("openai", of_openai), ("anthropic", of_anthropic)):
        found_name, (request,), _ = read(written(tmp_path / name, record))
        assert found_name == name
        assert request.messages == WITH_CALL
        assert request.tools == [{"type": "function", "function": tool}]


def test_each_reply_of_a_dialogue_is_a_request(tmp_path: Path) -> None:
    turns = [*TRAJECTORY, {"role": "user", "content": "And now?"}, TRAJECTORY[-1]]
    _, requests, _ = read(written(tmp_path / "trace", {"traj": turns}))
    assert [len(one.messages) for one in requests] == [2, 4]
    assert [one.reply for one in requests] == [REPLY, REPLY]


def test_images_are_left_out_and_counted(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": ASK}, {"type": "image_url", "image_url": {"url": "data:"}}]
    record = {"messages": [{"role": "user", "content": parts}]}
    _, (request,), _ = read(written(tmp_path / "trace", record))
    assert (request.n_left_out, request.messages[0]["content"]) == (1, ASK)


def test_spans_without_messages_have_counts_only(tmp_path: Path) -> None:
    span = {"name": "chat m", "attributes": {"gen_ai.usage.input_tokens": 12}}
    _, (request,), _ = read(written(tmp_path / "trace", span))
    assert (request.has_text, request.n_tokens) == (False, 12)


def test_ids_of_prompt_and_reply_are_taken_from_the_answer(tmp_path: Path) -> None:
    answer = {"prompt_token_ids": [1, 2], "choices": [{"text": REPLY, "token_ids": [3]}]}
    record = {"request": {"prompt": ASK}, "response": answer}
    _, (request,), _ = read(written(tmp_path / "trace", record))
    assert (request.prompt_ids, request.reply_ids) == ([1, 2], [3])


# ---- hash traces


def blocks(path: str) -> tuple[str, int, list[tuple[list[int], int, int]], Skipped]:
    skipped = Skipped()
    trace = open_trace(path, skipped)
    found = [
        (list(ids), n, some.scope)
        for some in trace.blocks()
        for ids, n in zip(some.ids, some.n_tokens, strict=True)
    ]
    trace.source.close()
    return trace.format_name, trace.block_tokens, found, skipped


def test_mooncake_and_bailian_are_told_apart(tmp_path: Path) -> None:
    row = {"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [4, 5]}
    expected = [([4, 5], 700, 1)]
    assert blocks(written(tmp_path / "a", row))[:3] == ("mooncake", 512, expected)
    row |= {"chat_id": 1, "parent_chat_id": -1, "turn": 1, "type": "text"}
    assert blocks(written(tmp_path / "b", row))[:3] == ("bailian", 16, expected)


def test_requests_of_subagents_are_in_the_order_of_their_times(tmp_path: Path) -> None:
    def one(t: float, n: int) -> dict[str, Any]:
        return {"t": t, "type": "n", "in": n, "out": 1, "hash_ids": list(range(n // 64))}

    agent = {"t": 10.0, "type": "subagent", "requests": [one(0.0, 64), one(5.0, 128)]}
    session = {"id": "x", "block_size": 64, "hash_id_scope": "local"}
    path = written(tmp_path / "a", {**session, "requests": [one(0.0, 192), agent, one(12.0, 256)]})
    name, block_tokens, found, _ = blocks(path)
    assert (name, block_tokens) == ("kv-cache-tester", 64)
    assert [n for _, n, _ in found] == [192, 64, 256, 128]


def test_local_ids_of_sessions_differ_and_global_ones_do_not(tmp_path: Path) -> None:
    session = {"requests": [{"t": 0, "in": 64, "hash_ids": [1]}]}
    local = written(tmp_path / "a", session, session)
    assert [scope for _, _, scope in blocks(local)[2]] == [2, 3]
    shared = {**session, "hash_id_scope": "global"}
    assert [scope for _, _, scope in blocks(written(tmp_path / "b", shared, shared))[2]] == [0, 0]


def test_ids_of_real_traces_stand_for_all_tokens_before_them(shared_data: Path) -> None:
    """The counting relies on it: an id has one predecessor."""
    files = [shared_data / "traces/mooncake/conversation_trace.jsonl"]
    files += sorted((shared_data / "traces/claude-code").glob("*.json"))
    for file in files:
        before: dict[int, int] = {}
        for ids, n_tokens, _ in blocks(str(file))[2]:
            assert len(ids) >= n_tokens // 512
            for left, right in pairwise([-1, *ids]):
                assert before.setdefault(right, left) == left


# ---- bad input


def test_broken_lines_are_counted_by_number_and_skipped(tmp_path: Path) -> None:
    good = json.dumps({"messages": CHAT}).encode()
    lines = [good, b'{"messages": [', b"", '{"prompt": "caf\xe9"}'.encode("latin-1"), good,
             b'{"messages": 3}', b'{"messages": [{"role": 1}]}', b"[" * 100_000]  # fmt: skip
    path = tmp_path / "trace"
    path.write_bytes(b"\n".join(lines))
    name, requests, skipped = read(str(path))
    assert (name, len(requests), skipped.n) == ("openai", 2, 5)
    places = [one.split(": ")[0].rsplit(" ", 1)[1] for one in skipped.named]
    assert places == ["2", "4", "6", "7", "8"]
    assert "UTF-8" in skipped.named[1]


def rows_of_blocks(n: int) -> list[bytes]:
    return [
        json.dumps({"timestamp": at, "input_length": 700, "hash_ids": [at, at + 1]}).encode()
        for at in range(n)
    ]


def test_broken_lines_of_a_hash_trace_are_counted_by_number_and_skipped(tmp_path: Path) -> None:
    """Lines are parsed many at a time; two values on a line and half of one are no two lines."""
    lines = rows_of_blocks(5000)
    broken = {
        2: b'{"hash_ids": [', 3: b"", 1000: b'{"input_length": 5, "hash_ids": 7}', 2000: b"\xff",
        3000: b'{"hash_ids": [1]}', 3001: lines[0] + b"," + lines[1], 4999: b'"words',
    }  # fmt: skip
    for number, line in broken.items():
        lines[number - 1] = line
    path = tmp_path / "trace"
    path.write_bytes(b"\n".join(lines))
    _, _, found, skipped = blocks(str(path))
    assert found == [
        ([at, at + 1], 700, 1) for at in range(5000) if at + 1 not in broken
    ]  # fmt: skip
    places = [int(one.split(": ")[0].rsplit(" ", 1)[1]) for one in skipped.named]
    assert places == [number for number in broken if number != 3]
    assert "words" not in " ".join(skipped.named)


@pytest.mark.parametrize(
    "wrong",
    [{"hash_ids": [1, 2.5]}, {"hash_ids": ["a secret"]}, {"hash_ids": [1 << 70]},
     {"input_length": "5"}, {"input_length": -1}, {"input_length": 5.5}, {"hash_ids": None},
     {"input_length": 10**18}],
    ids=["share", "text", "large", "length-text", "negative", "length-share", "null", "too-long"],
)  # fmt: skip
def test_ids_that_are_no_integers_are_named_by_number(wrong: Any, tmp_path: Path) -> None:
    row = {"input_length": 1024, "hash_ids": [1, 2]}
    path = written(tmp_path / "trace", row, row | wrong, row)
    skipped = Skipped()
    trace = open_trace(path, skipped)
    replay = BlockReplay(Prefixes)
    assert sum(replay.run(trace)) == 2
    trace.source.close()
    assert skipped.n == 1
    assert "line 2: " in skipped.named[0]
    assert "secret" not in skipped.named[0]


def test_unsigned_hashes_of_64_bits_are_ids(tmp_path: Path) -> None:
    row = {"input_length": 1024, "hash_ids": [1 << 63, (1 << 64) - 1]}
    skipped = Skipped()
    trace = open_trace(written(tmp_path / "trace", row, row), skipped)
    replay = BlockReplay(Prefixes)
    assert sum(replay.run(trace)) == 2
    trace.source.close()
    assert (skipped.n, replay.prefixes.hit_rates([float("inf")])[0]) == (0, 0.5)  # type: ignore[union-attr]


def test_a_session_with_a_time_that_is_no_number_is_skipped(tmp_path: Path) -> None:
    """JSON has no NaN, but Python's reader of values on several lines takes it."""
    path = tmp_path / "trace"
    path.write_text('{"requests": [{"t": NaN,\n"in": 64, "hash_ids": [1]}]}')
    why = f"{path}, item 1: a request has no t, in or hash_ids"
    assert blocks(str(path))[2:] == ([], Skipped(n=1, named=[why]))


def test_a_folder_says_how_its_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidTrace, match=r"is a folder; name its files"):
        open_trace(str(tmp_path), Skipped())


def test_a_loop_of_links_is_an_error(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.symlink_to(other)
    other.symlink_to(one)
    with pytest.raises(InvalidTrace, match="Too many levels of symbolic links"):
        open_trace(str(one), Skipped())


@pytest.mark.parametrize("where", ["body", "response", "choice"])
def test_token_ids_without_text_are_a_prompt(where: str, tmp_path: Path) -> None:
    choice: dict[str, Any] = {"token_ids": [3]}
    answer: dict[str, Any] = {"choices": [choice]}
    record: dict[str, Any] = {"response": answer}
    {"body": record, "response": answer, "choice": choice}[where]["prompt_token_ids"] = [1, 2]
    name, (request,), skipped = read(written(tmp_path / "trace", record))
    assert (name, request.prompt_ids, request.reply_ids) == ("openai", [1, 2], [3])
    assert skipped.n == 0


def test_strict_stops_at_the_first_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(json.dumps({"messages": CHAT}) + "\nsecret words\n")
    trace = open_trace(str(path), Skipped(is_strict=True))
    with pytest.raises(InvalidTrace, match="line 2: not a JSON value") as raised:
        list(trace.requests())
    assert "secret" not in str(raised.value)
    trace.source.close()


def test_a_broken_item_ends_an_array_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    record = json.dumps({"traj": TRAJECTORY})
    path.write_text(f"[\n{record},\n{record},\n{{broken}},\n{record}]")
    name, requests, skipped = read(str(path))
    assert (name, len(requests), skipped.n) == ("tau-bench", 2, 1)
    assert "item 3" in skipped.named[0]
    assert "nothing after it" in skipped.named[0]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]"])
def test_an_empty_file_has_no_requests(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    assert read(str(path))[1:] == ([], Skipped())


def test_an_unknown_shape_is_an_error_that_names_the_formats(tmp_path: Path) -> None:
    path = written(tmp_path / "trace", {"colour": "a secret"})
    with pytest.raises(InvalidTrace, match="keys colour; --format names one of") as raised:
        open_trace(path, Skipped())
    assert "secret" not in str(raised.value)
    assert all(name in str(raised.value) for name in FORMATS)
    with pytest.raises(InvalidTrace, match="no format 'x'"):
        open_trace(path, Skipped(), "x")


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(MissingFile, match="no such trace"):
        open_trace("/nowhere", Skipped())


def test_plain_texts_are_between_empty_lines_or_on_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"one\r\ntwo\r\n\r\n\r\nthree\n\n\xff\n")
    name, requests, skipped = read(str(path))
    assert (name, [one.text for one in requests]) == ("text", ["one\ntwo", "three"])
    assert skipped.n == 1
    assert [one.text for one in read(str(path), "lines")[1]] == ["one", "two", "three"]


def test_other_encodings_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    record = json.dumps({"prompt": "café"}, ensure_ascii=False)
    for encoding in ("utf-8-sig", "utf-16"):
        for text in (record + "\n" + record, f"[\n{record},\n{record}]"):
            path = tmp_path / "trace"
            path.write_bytes(text.encode(encoding))
            assert [one.text for one in read(str(path))[1]] == ["café", "café"]


# ---- compression and standard input


def test_gzip_is_read_and_a_truncated_end_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace"  # the name does not matter
    lines = b"".join(json.dumps({"prompt": f"text {n}"}).encode() + b"\n" for n in range(200_000))
    packed = gzip.compress(lines)
    path.write_bytes(packed)
    assert len(read(str(path))[1]) == 200_000
    path.write_bytes(packed[: len(packed) // 2])
    _, requests, skipped = read(str(path))
    assert 50_000 < len(requests) < 200_000
    assert "the file ends" in skipped.named[-1]


def test_a_truncated_hash_trace_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "trace.gz"
    packed = gzip.compress(b"\n".join(rows_of_blocks(20_000)))
    path.write_bytes(packed[: len(packed) // 2])
    _, _, found, skipped = blocks(str(path))
    assert 5000 < len(found) < 20_000
    assert skipped.n == 1
    assert f"after line {len(found)}: the file ends" in skipped.named[0]


def test_a_hash_trace_in_utf_16_or_without_a_last_line_feed_is_read(tmp_path: Path) -> None:
    text = b"\n".join(rows_of_blocks(3)).decode()
    for number, content in enumerate((text.encode("utf-16"), b"\xef\xbb\xbf" + text.encode())):
        path = tmp_path / f"{number}"
        path.write_bytes(content)
        assert [ids for ids, _, _ in blocks(str(path))[2]] == [[0, 1], [1, 2], [2, 3]]


def test_a_line_that_is_too_long_is_named_and_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokcache.replay.traces.source.MAX_RECORD_BYTES", 1 << 17)
    first, last = rows_of_blocks(2)
    path = tmp_path / "trace"
    path.write_bytes(b"\n".join([first, b'{"hash_ids": [' + b"1," * (1 << 18), last]))
    _, _, found, skipped = blocks(str(path))
    assert [ids for ids, _, _ in found] == [[0, 1], [1, 2]]
    assert [one.split(", ")[1] for one in skipped.named] == ["line 2: longer than 0 MiB"]


def test_zstd_is_read(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="the extra `replay` is not installed")
    path = tmp_path / "trace"
    frame = zstandard.compress(json.dumps({"prompt": ASK}).encode() + b"\n")
    path.write_bytes(frame + frame)
    assert [one.text for one in read(str(path))[1]] == [ASK, ASK]


def test_zstd_without_its_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / "trace"
    path.write_bytes(b"\x28\xb5\x2f\xfd rest")
    with pytest.raises(MissingExtra, match="pip install"):
        open_trace(str(path), Skipped())


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = gzip.compress(json.dumps({"prompt": ASK}).encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))
    assert [one.text for one in read("-")[1]] == [ASK]


def test_without_orjson_the_same_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "loads", json.loads)
    test_broken_lines_are_counted_by_number_and_skipped(tmp_path)
    for name in RECORDS:
        test_a_record_is_recognised_and_read(name, tmp_path)


def test_a_longer_first_line_than_the_first_bytes_is_read(tmp_path: Path) -> None:
    long = "word " * 400_000
    path = written(tmp_path / "trace", {"prompt": long}, {"prompt": ASK})
    assert [len(one.text or "") for one in read(path)[1]] == [len(long), len(ASK)]
