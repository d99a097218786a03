"""`tokcache demo`: its three backends, exit codes, and messages about bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

import tokcache
from tokcache import TokenIds, cli, samples
from tokcache.cli._common import BAD_INPUT
from tokcache.demo import backends, replay
from tokcache.demo import tokenizers as demo_tokenizers
from tokcache.demo.chat import built_in_prompts
from tokcache.demo.prompts import Message, Prompt, read_prompts
from tokcache.demo.table import duration
from tokcache.errors import InvalidPrompts, MissingFile
from tokcache.text._native import is_native

if TYPE_CHECKING:
    from pathlib import Path

REQUIRED = {"inprocess": ["llama_cpp"], "server": ["xllamacpp", "httpx"], "tokens": []}


def require(backend: str) -> None:
    for name in ("gguf", *REQUIRED[backend]):
        pytest.importorskip(name, reason=f"the demo's {backend} backend needs {name}")


def demo(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["demo", *map(str, arguments)])


def write_chats(path: Path, n_turns: int = 2) -> Path:
    """Write two interleaved chats; each prompt is longer than a block, and the last one repeats."""
    system = "Answer briefly and name the rule. " * 120
    chats: dict[str, list[dict[str, str]]] = {
        topic: [{"role": "system", "content": f"You know about {topic}. {system}"}]
        for topic in ("ferries", "books")
    }
    lines = []
    for turn in range(n_turns):
        for topic, messages in chats.items():
            messages.append({"role": "user", "content": f"Question {turn} about {topic}?"})
            lines.append(json.dumps(messages))
            messages.append({"role": "assistant", "content": f"Answer {turn}."})
    path.write_text("\n".join([*lines, lines[-1]]))
    return path


@pytest.mark.parametrize("backend", REQUIRED)
def test_every_backend_compares_all_tokens_and_finds_them_identical(
    backend: str, tmp_path: Path
) -> None:
    require(backend)
    prompts = write_chats(tmp_path / "chats.jsonl")
    done = demo("--backend", backend, "--prompts", prompts, "--max-tokens", 6)
    assert done.exit_code == 0, done.output
    assert "Prompts:    5, " in done.stdout
    assert "Hit rate:   20% of the texts" in done.stdout
    assert re.search(r"Identical:  yes \([\d,]+ prompt ids", done.stdout)
    assert "a repeated prompt (1)" in done.stdout
    if backend == "tokens":
        assert "tokenization only" in done.stdout
        assert "Time to first token" not in done.stdout
    else:
        without, with_ = decoded(done.stdout)
        assert with_ < without * 0.8
        assert re.search(r"and \d+ greedy tokens compared", done.stdout)


def test_the_times_of_each_prompt_are_written_as_json(tmp_path: Path) -> None:
    prompts = write_chats(tmp_path / "chats.jsonl")
    written = tmp_path / "runs.json"
    done = demo("--backend", "tokens", "--prompts", prompts, "--json", written)
    assert done.exit_code == 0, done.output
    found = json.loads(written.read_text())
    assert [run["kind"] for run in found["prompts"]] == [
        "new",
        "new",
        "continues",
        "continues",
        "again",
    ]
    assert found["differences"] == []
    assert (
        f"Prompts:    5, {sum(run['n_tokens'] for run in found['prompts']):,} tokens" in done.stdout
    )
    assert all(run["without_s"] > 0 < run["with_s"] for run in found["prompts"])
    done = demo(
        "--backend", "tokens", "--prompts", prompts, "--json", tmp_path / "no" / "runs.json"
    )
    assert done.exit_code == 2
    assert "can't be written: No such file" in done.output


def decoded(output: str) -> tuple[int, int]:
    found = re.search(r"prompt tokens decoded\s+([\d,]+)\s+([\d,]+)", output)
    assert found, output
    without, with_ = (int(group.replace(",", "")) for group in found.groups())
    return without, with_


def test_the_built_in_chats_are_interleaved_and_longer_than_several_blocks() -> None:
    prompts = built_in_prompts()
    source = demo_tokenizers.find_tokenizer(None)
    form = demo_tokenizers.chat_format(source, source.load())
    n_tokens = [len(source.load().encode(form.text(prompt)).ids) for prompt in prompts]
    assert min(n_tokens) > 1500
    assert len(set(prompts)) == 16
    assert len(prompts) == 20
    openings = [prompt.messages[0].content[:40] for prompt in prompts]
    assert all(one != other for one, other in pairwise(openings))
    assert all(prompt.messages[-1].role == "user" for prompt in prompts)


def test_the_demo_runs_as_a_program_without_a_model() -> None:
    command = [sys.executable, "-m", "tokcache", "demo", "--backend", "tokens"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert not done.stderr or not is_native()  # the reference implementation is announced
    assert done.stdout.splitlines()[-1].startswith("Identical:  yes (")


class WrongIds:
    """A wrapped tokenizer that gives one wrong id, in call number `at`."""

    def __init__(self, right: Any, at: int) -> None:
        self._right = right
        self._left = at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._right, name)

    def token_ids(self, text: str, *, add_special_tokens: bool = True) -> TokenIds:
        ids: TokenIds = self._right.token_ids(text, add_special_tokens=add_special_tokens)
        self._left -= 1
        return ids if self._left else TokenIds([*ids.tolist()[:-1], 7])


def test_one_wrong_id_ends_with_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrap = tokcache.wrap
    # The first call is the warm-up, five prompts follow.
    monkeypatch.setattr(tokcache, "wrap", lambda tokenizer: WrongIds(wrap(tokenizer), at=6))
    done = demo("--backend", "tokens", "--prompts", write_chats(tmp_path / "chats.jsonl"))
    assert done.exit_code == 1
    assert "Identical:  NO" in done.stdout
    assert re.search(r"Different:  request 5: prompt id \d+ is \d+ without and 7 with", done.stdout)


def test_one_wrong_generated_token_ends_with_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("inprocess")
    cached = backends._InProcessCached.generate

    def shortened(self: Any, ids: TokenIds, n_tokens: int) -> backends.Generation:
        found = cached(self, ids, n_tokens)
        return replace(found, token_ids=found.token_ids[:-1])

    monkeypatch.setattr(backends._InProcessCached, "generate", shortened)
    prompts = write_chats(tmp_path / "chats.jsonl", n_turns=1)
    done = demo("--backend", "inprocess", "--prompts", prompts, "--max-tokens", 3)
    assert done.exit_code == 1
    assert "generated token 2 is" in done.stdout
    assert "and missing with" in done.stdout


def test_plain_texts_are_prompts_without_a_chat_format(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("One\nblock.\n\n\nAnother.\n")
    done = demo("--backend", "tokens", "--prompts", path)
    assert done.exit_code == 0
    assert "Prompts:    2, " in done.stdout
    assert "Chats as" not in done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ('{"prompt": 3}', "line 1: expected"),
        ('{"prompt": "fine"}\n{"prompt"', "line 2: "),
        ('{"prompt": ""}', "line 1: the prompt is empty"),
        ('{"messages": []}', "line 1: expected"),
        ('["text"]', 'line 1: a message must be an object, not "text"'),
        ('[{"role": "user"}]', 'line 1: a message needs "role" and "content"'),
        ('{"prompt": "\\ud800"}', "line 1: character 0 is half of a surrogate pair"),
    ],
)
def test_bad_prompts_end_with_exit_code_2_and_one_line(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    done = demo("--backend", "tokens", "--prompts", path)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_missing_and_unreadable_files_end_with_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"a\xff")
    (tmp_path / "no.json").write_text("{")
    for arguments, message in (
        (("--prompts", tmp_path / "absent"), "no such prompts file"),
        (("--prompts", tmp_path / "binary"), "is not UTF-8 text: byte 1"),
        (("--prompts", tmp_path), "can't be read"),
        (("--tokenizer", tmp_path / "absent.json"), "no such tokenizer file"),
        (("--tokenizer", tmp_path), "no such tokenizer file"),
        (("--tokenizer", tmp_path / "no.json"), "holds no tokenizer"),
        (("--model", tmp_path / "absent.gguf"), "no such model file"),
        (("--tokenizer", samples.tiny_tokenizer(), "--model", "absent"), "no such model file"),
        (("--model", "x", "--backend", "tokens", "--tokenizer", samples.tiny_tokenizer()), "no mo"),
    ):
        done = demo(*arguments)
        assert (done.exit_code, done.stdout) == (2, ""), arguments
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("backend", ["inprocess", "server"])
def test_a_damaged_model_or_one_of_another_tokenizer_ends_with_exit_code_2(
    backend: str, tmp_path: Path, shared_data: Path
) -> None:
    require(backend)
    model = samples.tiny_model()
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(model.read_bytes()[:5000])
    other = shared_data / "tokenizers" / "minimind" / "tokenizer.json"
    for tokenizer, path, message in (
        (other, model, "pass the model's own tokenizer"),
        (samples.tiny_tokenizer(), damaged, "damaged.gguf"),
    ):
        done = demo("--backend", backend, "--tokenizer", tokenizer, "--model", path)
        assert (done.exit_code, done.stdout) == (2, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["phi-3-mini", "minimind"])
def test_a_real_tokenizer_runs_with_a_model_made_for_it(
    name: str, tmp_path: Path, shared_data: Path
) -> None:
    require("inprocess")
    tokenizer = shared_data / "tokenizers" / name
    prompts = write_chats(tmp_path / "chats.jsonl")
    done = demo("--backend", "inprocess", "--tokenizer", tokenizer, "--prompts", prompts)
    assert done.exit_code == 0, done.output
    assert "Chats as:   the tokenizer's template" in done.stdout
    without, with_ = decoded(done.stdout)
    assert with_ < without


def test_without_a_model_for_the_tokenizer_only_tokenization_is_compared(
    tmp_path: Path, shared_data: Path
) -> None:
    tokenizer = shared_data / "tokenizers" / "bert-base-uncased"
    prompts = write_chats(tmp_path / "chats.jsonl")
    done = demo("--tokenizer", tokenizer, "--prompts", prompts)
    assert done.exit_code == 0, done.output
    assert "tokenization only: tokenizer.json holds a WordPiece" in done.stdout
    refused = demo("--tokenizer", tokenizer, "--prompts", prompts, "--backend", "inprocess")
    assert refused.exit_code == 2


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ((), "inprocess"),
        (("llama_cpp",), "server"),
        (("llama_cpp", "httpx"), "tokens"),
        (("llama_cpp", "xllamacpp"), "tokens"),
        (("gguf",), "tokens"),
    ],
)
def test_auto_chooses_the_best_installed_backend(
    missing: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: name not in missing or None)
    chosen, why = backends.choose_backend(has_model=False)
    assert chosen == expected
    assert ("pip install 'tokcache[demo]'" in why) == (expected == "tokens")


def test_blank_lines_separate_plain_prompts_and_stay_in_json_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n \r\n\r\n  three\n")
    assert read_prompts(path) == [Prompt(text="one\ntwo"), Prompt(text="  three")]
    path.write_text('{"prompt": "a\\n\\nb"}\n\n{"messages": [{"role": "user", "content": "c"}]}\n')
    assert read_prompts(path) == [
        Prompt(text="a\n\nb"),
        Prompt.chat([Message("user", "c")]),
    ]


def test_chats_are_rendered_with_the_tokenizers_template(tmp_path: Path) -> None:
    chat = Prompt.chat([Message("user", "Hi")])
    tiny = demo_tokenizers.find_tokenizer(None)
    written = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert demo_tokenizers.chat_format(tiny, tiny.load()).text(chat) == written
    bare = tmp_path / "tokenizer.json"
    bare.write_bytes(tiny.path.read_bytes())
    source = demo_tokenizers.find_tokenizer(str(bare))
    form = demo_tokenizers.chat_format(source, source.load())
    assert (form.name, form.text(chat)) == ("ChatML", written)
    config = {
        "chat_template": "{% if messages|length != 1 %}{{ raise_exception('one!') }}{% endif %}"
        "{{ bos_token }}[{{ messages[0].content }}]",
        "bos_token": {"content": "<b>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    source = demo_tokenizers.find_tokenizer(str(tmp_path))
    form = demo_tokenizers.chat_format(source, source.load())
    assert form.text(chat) == "<b>[Hi]"
    with pytest.raises(InvalidPrompts, match="one!"):
        form.text(Prompt.chat([Message("user", "Hi"), Message("assistant", "Ho")]))


def test_the_version_is_printed() -> None:
    done = CliRunner().invoke(cli.app, ["--version"])
    assert (done.exit_code, done.stdout.strip()) == (0, f"tokcache {tokcache.__version__}")


@pytest.mark.parametrize("command", ["explain", "demo"])
@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"GGUF\x03\x00", "model file"),
        (b"\n\x0e\n\x05<unk>", "SentencePiece"),
        (b"PK\x03", "archive"),
    ],
)
def test_the_error_names_the_kind_of_a_wrong_file_and_the_file_to_pass(
    command: str, start: bytes, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(start + b"\0" * 64)
    arguments = [str(path)] if command == "explain" else ["--tokenizer", str(path)]
    done = CliRunner().invoke(cli.app, [command, *arguments])
    assert done.exit_code == BAD_INPUT
    output = " ".join(done.output.split())
    assert kind in output
    assert "tokenizer.json" in output
    assert "holds no tokenizer" not in output


def test_a_hub_name_that_cannot_be_fetched_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub  # noqa: PLC0415 (slow)

    def fail(*_: object) -> str:
        raise OSError("no such repository\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(MissingFile, match=r"'some/name' is not a file.*no such repository$"):
        demo_tokenizers.find_tokenizer("some/name")


def test_kinds_follow_from_the_prefix_shared_with_earlier_prompts() -> None:
    kind_of = replay._Kinds()
    long = list(range(300))
    assert kind_of("a", long) is replay.Kind.NEW
    assert kind_of("b", [*long, 1]) is replay.Kind.CONTINUES
    assert kind_of("a", long) is replay.Kind.AGAIN
    # The last token is always decoded, so 256 tokens hold no complete reusable block.
    assert kind_of("c", long[:256]) is replay.Kind.NEW
    assert kind_of("d", [5, *long]) is replay.Kind.NEW


def test_durations_are_printed_in_microseconds_milliseconds_or_seconds() -> None:
    assert [duration(s) for s in (4.2e-6, 0.0123, 7.155)] == ["4.2 µs", "12.3 ms", "7.16 s"]
