"""Writes the seeds again: `python -m tests.fuzz.seeds`. They are small, and made by the project."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

import tokcache
from tests.fuzz.targets import CORPUS, TEXTS, block_file_seed
from tests.text.tokenizers_made import byte_level_bpe
from tokcache.gateway.routing.chain import chat_prompt
from tokcache.gateway.routing.files import Files, SavedFile
from tokcache.text.cuts.patterns import KNOWN

_CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "Today is 2026-11-30 10:00.\nYou help."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "stream": True,
    "n": 1,
}
_MESSAGES: dict[str, Any] = {
    "max_tokens": 5,
    "system": [{"type": "text", "text": "x-anthropic-billing-header: cch=abc;"}],
    "messages": [
        {"role": "user", "content": "Hello"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t",
                    "content": [{"type": "text", "text": "42"}],
                },
                {
                    "type": "image",
                    "source": {"type": "base64", "media_type": "image/png", "data": "AA=="},
                },
            ],
        },
    ],
    "tools": [{"name": "f", "input_schema": {}}],
    "tool_choice": {"type": "any"},
    "thinking": {"type": "enabled", "budget_tokens": 5},
}
_TIMINGS = {"prompt_n": 5, "cache_n": 3, "predicted_n": 2, "prompt_ms": 1.5, "predicted_ms": 2.0}


def main() -> None:
    """Write all seeds."""
    for name, seeds in _seeds().items():
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("[0-9]*"):  # found-* are inputs that found a fault
            path.unlink()
        for number, seed in enumerate(seeds):
            (folder / f"{number:02}").write_bytes(seed)


def _seeds() -> dict[str, list[bytes]]:
    return {
        "cache-file": [_cache_file()],
        "block-file": [block_file_seed()],
        "redis-answers": [
            b"+OK\r\n|$-1\r\n|*1\r\n$1\r\n7\r\n",
            b":1\r\n",
            b"-MOVED 1 a:1\r\n|*0\r\n",
        ],
        "gateway-list": [_gateway_list()],
        "tokenizer-json": [each.to_str().encode() for each in _tokenizers()],
        "pattern": [each.encode() for each in dict.fromkeys(KNOWN.values())],
        "chat-template": [each.encode() for each in _TEMPLATES],
        "gguf": [_gguf()],
        "trace": [_json_lines(each) for each in _TRACES],
        "requests": [
            _dumped(_CHAT) + b"\n--\n" + _dumped({**_CHAT, "tools": []}),
            _dumped(_MESSAGES) + b"\n--\n" + _dumped({"prompt": "id 7f3a", "tokens": [1]}),
            b"a text at 10:00\n--\na text at 10:01",
            _json_lines([{"request": {"body": json.dumps(_CHAT)}, "generated_ids": [1, 2]}]),
        ],
        "gateway-config": [_CONFIG],
        "body": [
            _dumped(_CHAT),
            _dumped(_MESSAGES),
            _dumped({"prompt": "a" * 300, "max_tokens": 1}),
            _dumped({"prompt": [1, 2, 3]}),
            _dumped({"input": [{"role": "user", "content": "a"}], "instructions": "b"}),
        ],
        "events": [_events(each) for each in _STREAMS],
        "server-answer": [_dumped(each) for each in _ANSWERS] + [b'# HELP a b\na{b="c"} 1.5\n'],
    }


def _dumped(found: Any) -> bytes:
    return json.dumps(found).encode()


def _json_lines(found: list[Any]) -> bytes:
    return b"\n".join(map(_dumped, found)) + b"\n"


def _events(found: list[Any]) -> bytes:
    told = [
        b"event: %s\n" % str(each["type"]).encode() if "type" in each else b"" for each in found
    ]
    return b"".join(
        name + b"data: " + _dumped(each) + b"\n\n" for name, each in zip(told, found, strict=True)
    )


def _cache_file() -> bytes:
    wrapped = tokcache.wrap(byte_level_bpe())
    for text in TEXTS:
        wrapped.token_ids(text)
    with tempfile.TemporaryDirectory() as folder:
        wrapped.cache_dump(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()[:-32]


def _gateway_list() -> bytes:
    files = Files(1 << 20)
    chain = chat_prompt(_CHAT, b"k", None).chain()
    files.add(SavedFile("tokcache-a.bin", "pool", chain, 2, 20, 24, 1000, used_at=1.0))
    with tempfile.TemporaryDirectory() as folder:
        files.write_list(Path(folder) / "list")
        return (Path(folder) / "list").read_bytes()


def _tokenizers() -> list[Tokenizer]:
    alphabet = {
        each: number for number, each in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    merged = Tokenizer(models.BPE({**alphabet, "he": 256, "ll": 257}, [("h", "e"), ("l", "l")]))
    merged.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merged.add_special_tokens([AddedToken("<s>", lstrip=True)])
    merged.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 258)])
    words = Tokenizer(models.WordLevel({"hello": 0, "[UNK]": 1}, unk_token="[UNK]"))  # noqa: S106
    words.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces = Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581", -1.0), ("hello", -2.0)], 0))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.add_tokens([AddedToken("wor", single_word=True, normalized=True)])
    return [merged, words, pieces]


def _gguf() -> bytes:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    entries = [
        text(b"general.name") + struct.pack("<I", 8) + text(b"tiny"),
        text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"b"),
        text(b"tokenizer.ggml.scores") + struct.pack("<IIQff", 9, 6, 2, 0.5, 1.0),
        text(b"tokenizer.chat_template") + struct.pack("<I", 8) + text(b"{{ messages }}"),
        text(b"n") + struct.pack("<IQ", 10, 7),
    ]
    return struct.pack("<QQ", 0, len(entries)) + b"".join(entries)


_TEMPLATES = [
    """{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}""",
    """{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}
{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}
{% for m in loop_messages %}
{% if loop.index0 > 0 and messages[loop.index0 - 1].role == 'user' %}x{% endif %}{{ m.content }}
{% endfor %}""",
    """{% macro f(x) %}{{ x }}{% endmacro %}{% set ns = namespace(a=1) %}{% for m in messages %}
{% set ns.a = ns.a + 1 %}{{ f(m['content']) }}{% if loop.last %}!{% endif %}{% endfor %}""",
]
_TRACES: list[list[Any]] = [
    [{"request": _CHAT, "response": {"choices": [{"message": {"content": "a"}}]}}],
    [{"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [1, 2]}] * 2,
    [{"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.1, "input_length": 32, "output_length": 1,
      "type": "text", "turn": 1, "hash_ids": [3, 4]}],
    [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
    [{"traj": [{"role": "user", "content": "a"}]}],
    [{"name": "chat", "attributes": {"gen_ai.usage.input_tokens": 5, "gen_ai.prompt": "[]"}}],
    [_MESSAGES],
]  # fmt: skip
_CONFIG = b"""port = 8000
rules = ["sort_tools"]
max_bytes = "1G"
drain_timeout_s = 1.5
[[upstreams]]
url = "http://127.0.0.1:8080"
[[tenants]]
name = "a"
key_sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
"""
_STREAMS: list[list[Any]] = [
    [
        {"choices": [{"delta": {"role": "assistant", "reasoning_content": "h"}}], "model": "m"},
        {"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [1]}}]},
        {"choices": [{"delta": {"tool_calls": [
            {"index": 0, "id": "1", "function": {"name": "f", "arguments": "{}"}}]}}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}], "timings": _TIMINGS, "usage": {}},
    ],
    [{"choices": [{"text": "a", "finish_reason": "length"}], "timings": _TIMINGS}],
    [{"type": "response.completed", "timings": _TIMINGS, "response": {"id": "r", "output": [
        {"type": "message", "content": [{"type": "output_text", "text": "a"}]}]}}],
    [
        {"type": "message_start", "message": {"usage": {"input_tokens": 1}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"},
         "usage": {"output_tokens": 2, "input_tokens": 3, "cache_read_input_tokens": 1}},
    ],
    [{"error": {"code": 500, "message": "m"}}],
]  # fmt: skip
_ANSWERS: list[Any] = [
    {"status": "ok"},
    {"total_slots": 2, "default_generation_settings": {"n_ctx": 512}, "model_path": "m"},
    [{"id": 0, "n_ctx": 512, "is_processing": False, "n_prompt_tokens": 3},
     {"id": 1, "n_ctx": 1, "state": 1}],
    {"data": [{"meta": {"n_vocab": 5, "n_ctx_train": 9, "n_embd": 2, "n_params": 3, "size": 8}}]},
    [{"id": 0, "scale": 1.0}],
    {"tokens": [1, 2, 3]},
    {"content": "a"},
    {"content": "a", "tokens": [1], "stop": True, "stop_type": "eos", "tokens_evaluated": 8,
     "tokens_cached": 9, "timings": _TIMINGS,
     "completion_probabilities": [{"top_logprobs": [{"id": 1, "logprob": -0.5}]}]},
    {"n_saved": 5, "n_written": 100},
]  # fmt: skip

if __name__ == "__main__":
    main()
