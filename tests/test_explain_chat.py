"""`tokcache explain --chat` for each kind of source, its exit codes, and bad input."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("jinja2", reason="chat templates need jinja2")

from typer.testing import CliRunner

from tests.text import chat_templates_broken as templates
from tokcache import cli, samples
from tokcache.cli.chat_templates import find_chat_templates
from tokcache.config import CacheConfig
from tokcache.text.wrappers.gguf_tokenizer import read_gguf_strings

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = CacheConfig(engine="tokenizers")


def run(*arguments: object) -> Any:
    chosen = ["explain", "--chat", "--turns", "2", "--engine", "tokenizers"]
    return CliRunner().invoke(cli.app, [*chosen, *map(str, arguments)])


def written(folder: Path, text: str, name: str = "chat.jinja") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def tokenizer_with(folder: Path, **config: object) -> Path:
    """Return a folder of the tiny tokenizer, with other entries in its configuration."""
    shutil.copytree(samples.tiny_tokenizer().parent, folder / "model", dirs_exist_ok=True)
    path = folder / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return path.parent


# ---- the report


def test_an_append_only_file_is_reported_by_its_text(tmp_path: Path) -> None:
    done = run(written(tmp_path, templates.APPEND_ONLY))
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert "Ids:       not compared: a template file has no tokenizer; give one with" in done.stdout
    assert "Proven:    yes" in lines
    assert "Tried:     20 of 20 cases append-only, 0 break" in lines
    assert sum(line.endswith("append-only  ") for line in lines) == 20
    assert "Breaks" not in lines


def test_breaks_and_cures_are_shown_with_their_texts(tmp_path: Path) -> None:
    done = run(written(tmp_path, templates.DROPS_THINKING))
    assert done.exit_code == 1
    (line,) = [each for each in done.stdout.splitlines() if "as reasoning_content  " in each]
    assert "breaks       from messages[1] (assistant) on, 2 of 2 answers: " in line
    assert "characters again" in line
    # The excerpts begin in the question, and part after the heading of the answer.
    (held,) = [line for line in done.stdout.splitlines() if line.startswith("    held")][:1]
    (after,) = [line for line in done.stdout.splitlines() if line.startswith("    next")][:1]
    assert "number 001?<|end|>\u23ce<|assistant|>\u2502<think>Thought 001: the map" in held
    assert "number 001?<|end|>\u23ce<|assistant|>\u2502Answer 001: river number 001" in after
    (cure,) = [each for each in done.stdout.splitlines() if each.startswith("  keep_thoughts")]
    assert cure.startswith("  keep_thoughts=true makes append-only: thinking, as reasoning_content")
    none = run(written(tmp_path, templates.TRIMS))
    assert none.stdout.splitlines()[-1] == "  none: the template has no switch"


def test_control_characters_of_a_template_are_not_printed(tmp_path: Path) -> None:
    template = "{{ raise_exception('\x1b[31mno\x07') }}"
    done = run(written(tmp_path, template))
    assert done.exit_code == 2
    assert "\x1b" not in done.stdout
    assert "\x07" not in done.stdout
    assert "refused" in done.stdout


# ---- where templates come from


def test_a_tokenizers_ids_are_compared() -> None:
    done = run(samples.tiny_tokenizer().parent, "--json")
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    (template,) = found["templates"]
    assert (found["why_text_only"], template["name"]) == (None, "default")
    assert (template["unit"], template["n_different"]) == ("tokens", 0)
    assert template["n_compared"] > 20
    assert template["proof"]["proven"]
    verdicts = {case["name"]: case["verdict"] for case in template["cases"]}
    assert verdicts["plain"] == verdicts["system"] == "append-only"
    # An answer's first newline is read as one token with the prompt's last.
    assert verdicts["newlines"] == "breaks"
    by_file = find_chat_templates(str(samples.tiny_tokenizer()), None, CONFIG)
    assert list(by_file.templates.values()) == [samples.CHAT_TEMPLATE]
    assert by_file.by_transformers


def test_a_file_can_be_encoded_by_a_tokenizer(tmp_path: Path) -> None:
    path = written(tmp_path, samples.CHAT_TEMPLATE)
    done = run(path, "--tokenizer", samples.tiny_tokenizer(), "--json")
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    assert (found["why_text_only"], found["templates"][0]["unit"]) == (None, "tokens")


def test_named_templates_are_reported_one_by_one(tmp_path: Path) -> None:
    listed = [
        {"name": "default", "template": templates.APPEND_ONLY},
        {"name": "tool_use", "template": templates.REFUSES_SYSTEM},
    ]
    folder = tokenizer_with(tmp_path, chat_template=listed)
    done = run(folder)
    assert done.exit_code == 1, done.output
    assert [line for line in done.stdout.splitlines() if line.startswith("Template:")] == [
        f"Template:  {each['name']}, {len(each['template']):,} characters" for each in listed
    ]
    extra = folder / "additional_chat_templates"
    extra.mkdir()
    written(extra, templates.TRIMS, "rag.jinja")
    found = find_chat_templates(str(folder), None, CONFIG)
    assert list(found.templates) == ["default", "tool_use", "rag"]
    # A file of its own comes before the configuration.
    written(folder, samples.CHAT_TEMPLATE, "chat_template.jinja")
    found = find_chat_templates(str(folder), None, CONFIG)
    assert found.templates["default"] == samples.CHAT_TEMPLATE


def test_a_ggufs_template_is_found(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = samples.tiny_model()
    found = find_chat_templates(str(model), None, CONFIG)
    assert found.templates == {"default": samples.CHAT_TEMPLATE}
    assert found.encoder is not None
    assert not found.by_transformers
    # The tokenizer of another pattern is not built, and the template is still there.
    other = tmp_path / "other.gguf"
    other.write_bytes(model.read_bytes().replace(b"qwen2", b"bloom", 1))
    found = find_chat_templates(str(other), None, CONFIG)
    assert found.templates == {"default": samples.CHAT_TEMPLATE}
    assert found.encoder is None
    assert "by the pattern 'bloom'" in (found.why_text_only or "")


def test_named_templates_of_a_gguf_are_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    writer = gguf.GGUFWriter(tmp_path / "named.gguf", "llama")
    writer.add_chat_template(
        [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_gguf_strings(tmp_path / "named.gguf", "tokenizer.chat_template") == {
        "tokenizer.chat_template": "one",
        "tokenizer.chat_template.tool_use": "two",
    }


# ---- bad input


def test_bad_input_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    binary = tmp_path / "binary.jinja"
    binary.write_bytes(b"\xff\xfe\x00{{")
    huge = written(tmp_path, "-" * (5 << 20), "huge.jinja")
    broken = written(tmp_path, "{% for %}", "broken.jinja")
    without = tokenizer_with(tmp_path, chat_template=None)
    cases = {
        (str(tmp_path / "absent.jinja"),): "no such template file: ",
        (str(tmp_path / "absent"),): "no such tokenizer file: ",
        (str(binary),): "can't be read as UTF-8 text: ",
        (str(huge),): "is larger than 4 MiB: not a template",
        (str(broken),): "the chat template can't be compiled: line 1: ",
        (str(without),): "has no chat template; pass the folder of a chat model, or a .jinja file",
        (str(without), "--text", "x"): "leave it out with --chat",
    }
    for arguments, message in cases.items():
        done = run(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert done.stdout == ""
        assert message in done.stderr
        assert done.stderr.startswith("tokcache: ")
        assert done.stderr.count("\n") == 1
    written(without, "[]", "chat_template.json")
    assert "is not an object of JSON" in run(without).stderr
    done = CliRunner().invoke(cli.app, ["explain", "--tokenizer", "x", str(without)])
    assert (done.exit_code, "--tokenizer goes with --chat" in done.stderr) == (2, True)
