"""`tokcache why`: two requests, a session's log, chat templates, and input that can't be read."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tokcache import cli, samples
from tokcache.cli import prompt_tokens
from tokcache.cli.why_report import Comparison, marked, print_comparison
from tokcache.differences import DifferenceClass, compare_requests, read_log
from tokcache.differences.request import MAX_TOOLS

RULES = "You answer questions about trains.\nToday is {}.\nBe brief, and name the platform.\n"
ASK = {"role": "user", "content": "When does the train leave?"}
REPLY = {"role": "assistant", "content": "It leaves at noon from platform two."}
LOST = {"role": "user", "content": "I have left my hat in coach five."}
NEXT = {"role": "user", "content": "And the next one?"}


def run(*arguments: object, stdin: bytes | None = None) -> Any:
    return CliRunner().invoke(cli.app, ["why", *map(str, arguments)], input=stdin)


def chat(day: str, *messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    system = {"role": "system", "content": RULES.format(day)}
    return {"model": "m", "messages": [system, *messages], **more}


def written(path: Path, *found: Any) -> Path:
    """Write one JSON value a line."""
    path.write_text("".join(json.dumps(each) + "\n" for each in found), encoding="utf-8")
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Return an earlier request and the next turn, in which the date has changed."""
    before = written(tmp_path / "before.json", chat("Monday, 2 March 2026", ASK))
    after = written(tmp_path / "after.json", chat("Tuesday, 3 March 2026", ASK, REPLY, NEXT))
    return before, after


def tokenizer_with(template: str, folder: Path) -> Path:
    """Return a folder with the tiny tokenizer and a chat template."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(samples.tiny_tokenizer().read_bytes())
    config = {"chat_template": template, "bos_token": "<s>", "tokenizer_class": "T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# ---- two requests


def test_the_first_difference_is_marked_on_both_sides(pair: tuple[Path, Path]) -> None:
    done = run(*pair)
    assert done.exit_code == 0, done.output
    shown = " ".join(done.stdout.split())
    assert "date_or_clock: A date or a time changed." in shown
    assert "messages[0].content (system), character 44" in shown
    assert "Today is «Monday, 2 March 2026».⏎Be brief" in shown
    assert "Today is «Tuesday, 3 March 2026».⏎Be brief" in shown
    assert "--tokenizer or --model counts tokens" in shown
    assert "\x1b" not in done.stdout  # no colours in a file


def test_json_has_the_difference_and_its_cost(pair: tuple[Path, Path]) -> None:
    done = json.loads(run(*pair, "--json").stdout)
    assert done["class"] == "date_or_clock"
    assert (done["field"], done["message"], done["position"]) == ("messages[0].content", 0, 44)
    assert done["tokens"] is None
    n_chars = len(RULES.format("")) - 44 + len("day, ") + len(" March 2026") + len(ASK["content"])
    assert done["chars"]["shared"] == 44
    assert done["chars"]["lost"] == n_chars


def test_no_text_of_the_files_is_shown_on_request(pair: tuple[Path, Path], tmp_path: Path) -> None:
    log = written(tmp_path / "log.jsonl", *(json.loads(path.read_text()) for path in pair))
    for arguments in (pair, (*pair, "--json"), (log,), (log, "--json")):
        done = run(*arguments, "--no-text")
        assert done.exit_code == 0
        assert "date_or_clock" in done.stdout
        assert not any(word in done.stdout for word in ("Monday", "Tuesday", "trains", "leave"))


def test_standard_input_is_one_of_the_requests(pair: tuple[Path, Path]) -> None:
    done = run("-", pair[1], "--json", stdin=pair[0].read_bytes())
    assert json.loads(done.stdout)["class"] == "date_or_clock"


def test_plain_texts_are_compared(tmp_path: Path) -> None:
    paths = tmp_path / "a.txt", tmp_path / "b.txt"
    paths[0].write_text("{a prompt that begins with a bracket, id 4f9a20c1}")
    paths[1].write_text("{a prompt that begins with a bracket, id b3c9e177}")
    done = json.loads(run(*paths, "--json").stdout)
    assert (done["class"], done["field"]) == ("uuid_or_random", "")
    assert (done["before"], done["after"]) == ("4f9a20c1", "b3c9e177")


def test_a_terminal_gets_colours_and_control_characters_are_replaced() -> None:
    before, after = "a \x1b[31mred\nthing here", "a \x1b[32mred\nthing here"
    difference = compare_requests(before, after)
    console = Console(
        force_terminal=True, width=100, record=True, file=None, color_system="standard"
    )
    with console.capture() as captured:
        print_comparison(console, Comparison(difference, 1, 1), has_text=True)
    assert "\x1b[1;31m" in captured.get()
    assert "\x1b[1;32m" in captured.get()
    assert "\x1b[31mred" not in captured.get()
    shown = marked(before, difference.start, difference.before_stop, "")
    assert "\x1b" not in shown.plain
    assert "\n" not in shown.plain


def test_a_long_difference_is_shortened() -> None:
    shown = marked("a " + "x" * 500 + " b", 2, 502, "").plain
    assert len(shown) < 140
    assert " … " in shown


# ---- with a tokenizer


def test_tokens_are_counted_in_the_rendered_prompts(pair: tuple[Path, Path]) -> None:
    model = samples.tiny_model()
    done = json.loads(run(*pair, "--model", model, "--json").stdout)
    with prompt_tokens.Prompts(str(model)) as prompts:
        texts = [read_log(path.read_bytes(), "x")[0][0].request for path in pair]
        old, new = (prompts.prompt(text).ids.tolist() for text in texts)
    n_shared = next(at for at, ids in enumerate(zip(old, new, strict=False)) if ids[0] != ids[1])
    assert (done["tokens"]["shared"], done["tokens"]["total"]) == (n_shared, len(new))
    # All but the changed day is in both prompts, up to the first answer.
    n_equal = next(n for n in range(1, len(old)) if old[-n] != new[-n - (len(new) - len(old))])
    assert 20 < done["tokens"]["lost"] <= len(old) - n_shared
    assert n_equal < done["tokens"]["lost"]


THINKING = """\
{%- for message in messages %}<|{{ message.role }}|>
{%- if message.reasoning_content and loop.index0 > messages|length - 3 %}
{{- '<think>' + message.reasoning_content + '</think>' }}{% endif %}
{{- message.content }}<|end|>
{%- for call in message.tool_calls or [] %}{{ call.function.arguments.goal }}{% endfor %}
{%- endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def test_a_session_names_templates_encodings_and_the_costs(tmp_path: Path) -> None:
    folder = tokenizer_with(THINKING, tmp_path / "thinking")
    with prompt_tokens.Prompts(str(folder)) as prompts:
        ids = prompts.encoded("It ").tolist() + prompts.encoded("leaves soon.<|end|>").tolist()
        again = prompts.encoded("It leaves soon.<|end|>").tolist()
    assert ids != again
    soon = {"role": "assistant", "content": "It leaves soon."}
    thought = {**REPLY, "reasoning_content": "Trains leave at noon, as the timetable says."}
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"goal": "x"}'}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    other = {**asked, "tool_calls": [{**call, "id": "c2"}]}
    day = "Monday"
    log = written(
        tmp_path / "log.jsonl",
        {"request": chat(day, ASK), "response": {"choices": [{"token_ids": ids}]}},
        {"request": chat(day, ASK, soon, NEXT)},
        {"request": chat(day, ASK, thought)},
        {"body": json.dumps(chat(day, ASK, thought, NEXT, REPLY))},
        chat(day, LOST, asked, NEXT),
        chat(day, LOST, other, NEXT),
        chat("Tuesday", LOST, other, NEXT),
    )
    found = json.loads(run(log, "--tokenizer", folder, "--json").stdout)
    classes = [turn["class"] for turn in found["turns"]]
    # The template does not write the ids of calls, so the sixth request loses nothing.
    assert classes == [None, "re_encoding", "appended", "template", "other_text", "parameters",
                       "date_or_clock"]  # fmt: skip
    assert [turn["earlier"] for turn in found["turns"]] == [None, 1, 1, 3, 4, 5, 6]
    assert found["unit"] == "tokens"
    dearest = [cause["class"] for cause in found["causes"]]
    assert set(dearest) == {"re_encoding", "template", "other_text", "date_or_clock"}
    losses = [cause["lost"] for cause in found["causes"]]
    assert losses == sorted(losses, reverse=True)
    assert (found["turns"][3]["message"], found["turns"][3]["role"]) == (2, "assistant")


# ---- sessions without a tokenizer


def test_each_request_is_compared_with_the_nearest_earlier_one(tmp_path: Path) -> None:
    other = {"role": "user", "content": "What is a buffer stop?"}
    log = written(
        tmp_path / "log.jsonl",
        chat("Monday", ASK),
        {**chat("Monday", other), "model": "n"},
        {"request": {"body": chat("Monday", other)}},
        chat("Monday", ASK, REPLY, NEXT),
        {"postData": {"text": json.dumps(chat("Monday", other, REPLY, NEXT))}},
        chat("Friday", ASK, REPLY, NEXT),
    )
    found = json.loads(run(log, "--json").stdout)
    assert [turn["earlier"] for turn in found["turns"]] == [None, None, 1, 1, 3, 5]
    classes = [turn["class"] for turn in found["turns"]]
    assert classes == [None, None, "other_text", "appended", "appended", "date_or_clock"]
    shown = run(log).stdout
    assert "Counted in characters" in shown
    assert "first of its model" in " ".join(shown.split())


def test_a_session_that_only_grows_loses_nothing(tmp_path: Path) -> None:
    log = written(tmp_path / "log.jsonl", chat("Monday", ASK), chat("Monday", ASK, REPLY, NEXT))
    assert "nothing was lost" in run(log).stdout


def test_har_files_and_lists_of_requests_are_logs(tmp_path: Path) -> None:
    requests = chat("Monday", ASK), chat("Friday", ASK)
    entries = [{"request": {"postData": {"text": json.dumps(each)}}} for each in requests]
    for found in ({"log": {"entries": entries}}, list(requests)):
        path = tmp_path / "log.json"
        path.write_text(json.dumps(found))
        turns = json.loads(run(path, "--json").stdout)["turns"]
        assert [turn["class"] for turn in turns] == [None, "date_or_clock"]


def test_the_guide_shows_real_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    docs = Path(__file__).parents[1] / "docs"
    page = without_token_counts((docs / "guides/comparing.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(docs / "assets/why")
    monkeypatch.setenv("COLUMNS", "100")
    runs = (("before.json", "after.json", "--model", samples.tiny_model()), ("session.jsonl",))
    for arguments in runs:
        shown = "\n".join(line.rstrip() for line in run(*arguments).stdout.splitlines())
        assert f"```text\n{without_token_counts(shown)}\n```\n" in page


def without_token_counts(text: str) -> str:
    """Return `text` without its counts of tokens.

    The tiny tokenizer is trained on this Python's manual, so that another Python counts others.
    """
    line = r"\d+ tokens of \d+ would have been reused after \d+ equal ones"
    return re.sub(line, "N tokens of N would have been reused after N equal ones", text)


# ---- input that can't be read


def refused(*arguments: object, stdin: bytes | None = None) -> str:
    """Return the one line on standard error of a run that ends with exit code 2."""
    done = run(*arguments, stdin=stdin)
    assert done.exit_code == 2, done.output
    assert isinstance(done.exception, SystemExit)  # no traceback
    assert done.stdout == ""
    assert done.stderr.startswith("tokcache: ")
    assert done.stderr.count("\n") == 1
    return str(done.stderr)


BAD = {
    "broken": (b'{"messages": [', "is not JSON: Expecting value"),
    "deep": (b'{"messages": ' + b"[" * 200_000, "nested too deeply"),
    "empty": (b"", "is empty"),
    "blank": (b" \n\n", "is empty"),
    "binary": (b"GGUF\x03\x00\x00\x00", "is a binary file"),
    "latin-1": ("naïve".encode("latin-1"), "is not UTF-8 text: byte 2"),
    "no request": (b'{"temperature": 1}', "needs `messages`, `input` or `prompt`; found"),
    "no messages": (b'{"messages": []}', "`messages` is empty"),
    "role": (b'{"messages": [{"role": "robot", "content": "hi"}]}', 'has the role "robot"'),
    "content": (b'{"messages": [{"role": "user", "content": 7}]}', "messages[0].content must be"),
    "message": (b'{"messages": ["hi"]}', "messages[0] must be an object, not str"),
    "model": (b'{"model": 7, "messages": [{"role": "user"}]}', "`model` must be a text"),
    "ids": (b'{"prompt": [1, 2, 3]}', "`prompt` must be one text"),
    "log": (b'{"prompt": "a"}\n{"prompt": "b"}\n', "pass it alone"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_request_that_cannot_be_read_is_named(name: str, pair: tuple[Path, Path]) -> None:
    data, message = BAD[name]
    assert message in refused("-", pair[1], stdin=data)


def test_requests_of_two_models_are_not_compared(tmp_path: Path) -> None:
    one = written(tmp_path / "one.json", chat("Monday", ASK))
    other = written(tmp_path / "other.json", {**chat("Monday", ASK), "model": "n"})
    assert "name two models, 'm' and 'n'" in refused(one, other)
    text = tmp_path / "text.txt"
    text.write_text("a text")
    assert "one request is a plain text" in refused(one, text)


def test_broken_lines_of_a_log_are_named_and_can_be_left_out(tmp_path: Path) -> None:
    log = written(tmp_path / "log.jsonl", chat("Monday", ASK), chat("Friday", ASK))
    with log.open("a") as file:
        file.write('{"messages": [{"role": "us\n{"level": "info"}\n')
    message = refused(log)
    assert "log.jsonl, line 3: Unterminated string" in message
    assert "(and 1 more)" in message
    done = run(log, "--skip-broken")
    assert done.exit_code == 0
    assert "2 lines could not be read" in done.stdout
    assert "holds no request" in refused("-", "--skip-broken", stdin=b'{"level": "info"}\n')
    assert "one list of messages" in refused("-", stdin=json.dumps([ASK, REPLY]).encode())


def test_huge_lists_of_tools_are_compared_up_to_a_limit(tmp_path: Path) -> None:
    tools = [{"name": f"tool_{n}", "parameters": {"type": "object"}} for n in range(MAX_TOOLS)]
    most = written(tmp_path / "most.json", chat("Monday", ASK, tools=tools))
    turned = written(tmp_path / "turned.json", chat("Monday", ASK, tools=tools[::-1]))
    assert json.loads(run(most, turned, "--json").stdout)["class"] == "reordered"
    more = written(tmp_path / "more.json", chat("Monday", ASK, tools=[*tools, tools[0]]))
    assert f"has {MAX_TOOLS + 1:,} entries; at most {MAX_TOOLS:,}" in refused(most, more)


def test_options_that_do_not_fit_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert "only one of BEFORE and AFTER" in refused("-", "-")
    assert "no such file" in refused(tmp_path / "none.json", pair[1])
    assert "can't be read" in refused(tmp_path, pair[1])
    assert "not both" in refused(*pair, "--tokenizer", "x", "--model", "y")
    assert "takes a GGUF" in refused(*pair, "--model", pair[0])
    assert "no such model file" in refused(*pair, "--model", tmp_path / "none.gguf")


TEMPLATES = {
    "syntax": ("{% for %}", "can't be compiled: line 1"),
    "refuses": ("{{ raise_exception('only two roles') }}", "refuses these messages: only two"),
    "endless": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "was stopped: it takes more than 1 s",
    ),
    "none": ("", "has no chat template"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_does_not_render_is_named(
    name: str, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_tokens, "_LIMITS", replace(prompt_tokens._LIMITS, seconds=1))
    template, message = TEMPLATES[name]
    folder = tokenizer_with(template, tmp_path / "tokenizer")
    if name == "none":
        (folder / "tokenizer_config.json").write_text("{}")
    assert message in refused(*pair, "--tokenizer", folder)


def test_every_class_has_a_meaning_and_a_cure() -> None:
    for kind in DifferenceClass:
        assert kind.meaning.endswith(".")
        assert kind.cure.endswith(".")
