"""The audit of chat templates finds each kind of break at its message, and each cure that works."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("jinja2", reason="chat templates need jinja2")

import tokcache
from tests.text import chat_templates_broken as templates
from tokcache import samples
from tokcache.demo.tokenizers import find_tokenizer
from tokcache.errors import InvalidTemplate, MissingExtra, RenderingFailed
from tokcache.text.chat import process as chat_process
from tokcache.text.chat.audit import Encoder, TemplateAudit, Verdict, audit_template
from tokcache.text.chat.conversations import Mode, all_cases
from tokcache.text.chat.environment import compile_template, find_switches
from tokcache.text.chat.process import Limits, TemplateProcess

if TYPE_CHECKING:
    from pathlib import Path

    from tokcache.text.chat.audit import CaseResult

N_TURNS = 3
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
FAST = Limits(seconds=0.5, max_chars=1_000_000, max_bytes=200 << 20)


def audit(template: str, *names: str, **options: Any) -> TemplateAudit:
    cases = [case for case in all_cases(N_TURNS) if not names or case.name in names]
    return audit_template("tried", template, variables=TOKENS, cases=cases, **options)


def result(found: TemplateAudit, name: str) -> CaseResult:
    return next(case for case in found.cases if case.name == name)


def verdicts(found: TemplateAudit) -> dict[str, Verdict]:
    return {case.name: case.verdict for case in found.cases}


def tiny() -> Encoder:
    plain = find_tokenizer(None).load()
    wrapped = tokcache.wrap(plain)
    return Encoder(
        lambda text: wrapped.token_ids(text, add_special_tokens=False),
        lambda text: plain.encode(text, add_special_tokens=False).ids,
    )


# ---- no break


def test_an_append_only_template_passes_every_case() -> None:
    found = audit(templates.APPEND_ONLY)
    assert set(verdicts(found).values()) == {Verdict.APPEND_ONLY}, verdicts(found)
    assert len(found.cases) == 20
    assert found.is_append_only
    assert found.proof.proven
    assert (found.unit, found.switches, found.cures) == ("characters", (), ())
    assert all(case.n_again == 0 < case.n_prompt for case in found.cases)


def test_ids_are_compared_with_the_plain_tokenizers() -> None:
    found = audit(samples.CHAT_TEMPLATE, "plain", "system", encoder=tiny())
    assert found.is_append_only
    assert found.unit == "tokens"
    assert (found.n_compared > 10, found.n_different) == (True, 0)
    wrong = Encoder(list, lambda text: [*text, "!"])
    assert audit(samples.CHAT_TEMPLATE, "plain", encoder=wrong).n_different > 0


# ---- each kind of break, at its message

# The case that shows it, the first message that is written otherwise, and where.
BREAKS = {
    "DROPS_THINKING": ("thinking", 1, "answer"),
    "OPENS_THINKING": ("plain", 1, "prompt"),
    "TRIMS": ("spaces", 1, "answer"),
    "SYSTEM_LAST": ("system", 0, "prompt"),
    "SYSTEMS_FIRST": ("late_system", 1, "prompt"),
    "QUOTES_ARGUMENTS": ("call_as_text", 2, "answer"),
    "LAST_IMAGE": ("images", 0, "prompt"),
    "HEADS_LAST": ("continue", 1, "prompt"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_found_at_its_message(name: str) -> None:
    case, message, place = BREAKS[name]
    found = audit(getattr(templates, name), case, "plain")
    broken = result(found, case)
    assert broken.verdict is Verdict.BREAKS
    first = broken.breaks[0]
    assert (first.message, first.place) == (message, place), first
    chat = next(each for each in all_cases(N_TURNS) if each.name == case)
    assert first.role == chat.steps[message].role
    assert first.held[0] != first.rendered[0]
    assert 0 < first.n_again <= first.n_held
    assert broken.n_again == sum(each.n_again for each in broken.breaks)
    assert not found.is_append_only
    assert not found.proof.proven or name in {"TRIMS", "OPENS_THINKING", "QUOTES_ARGUMENTS"}


def test_the_cost_of_a_break_is_the_held_text_after_it() -> None:
    found = result(audit(templates.TRIMS, "spaces"), "spaces")
    answer = next(step for step in all_cases(N_TURNS)[0].steps if step.role == "assistant")
    held_again = f"  {answer.marks[0]}  <|end|>"
    assert [each.n_again for each in found.breaks] == [len(held_again)] * N_TURNS
    assert [each.message for each in found.breaks] == [1, 3, 5]
    assert held_again.startswith(found.breaks[0].held)


def test_thinking_before_a_tool_call_is_dropped_when_the_user_speaks_again() -> None:
    found = result(audit(templates.DROPS_THINKING, "thinking_call"), "thinking_call")
    # After the call comes its result, so the call is not the last message any more.
    assert [each.message for each in found.breaks][:2] == [2, 4]
    assert found.n_turns == len(found.breaks) == 2 * N_TURNS


def test_another_end_token_costs_nothing() -> None:
    found = audit(templates.OTHER_END, "plain", "no_prompt", "call")
    assert verdicts(found) == {
        "plain": Verdict.END_TOKEN,
        "call": Verdict.END_TOKEN,
        "no_prompt": Verdict.END_TOKEN,
    }
    assert found.is_append_only


def test_ids_that_are_merged_across_prompt_and_answer_are_a_break() -> None:
    # The prompt ends with a newline, and the answer begins with two: one token for all three.
    encoder = Encoder(_newlines_joined, _newlines_joined)
    found = audit(samples.CHAT_TEMPLATE, "newlines", "plain", encoder=encoder)
    assert result(found, "plain").verdict is Verdict.APPEND_ONLY
    assert result(found, "newlines").verdict is Verdict.BREAKS
    first = result(found, "newlines").breaks[0]
    assert first.place == "ids"
    assert first.shared.endswith("assistant\n")
    assert first.held.startswith("\n\nAnswer")


def _newlines_joined(text: str) -> list[int]:
    """Return an id for each character, and one for a run of newlines."""
    ids: list[int] = []
    for char in text:
        if char == "\n" and ids and ids[-1] >= 1 << 21:
            ids[-1] += 1
        else:
            ids.append(1 << 21 if char == "\n" else ord(char))
    return ids


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("DATED", "the clock: it changes daily"),
        ("TIMED", "the clock: it changes every minute"),
        ("RANDOM", "two renderings of one chat differ at the same time"),
    ],
)
def test_a_clock_is_found_by_two_clocks(name: str, reason: str) -> None:
    found = audit(getattr(templates, name), "clock")
    if name == "TIMED":  # a day and an hour later
        assert result(found, "clock").breaks[0].rendered[:1] in "0123456789"
    assert result(found, "clock").verdict is Verdict.BREAKS
    assert result(found, "clock").reason == reason
    assert result(found, "clock").breaks[0].message == 0
    assert len(result(found, "clock").breaks) == N_TURNS


# ---- cures


def test_a_switch_that_cures_is_named_with_its_value() -> None:
    found = audit(templates.DROPS_THINKING, "plain", "thinking", "thinking_call")
    assert found.switches == ("keep_thoughts",)
    (cure,) = found.cures
    assert (cure.switch, cure.value) == ("keep_thoughts", True)
    assert cure.cures == ("thinking", "thinking_call")
    assert (cure.lessens, cure.breaks) == ((), ())


def test_values_come_from_the_comparisons_of_the_template() -> None:
    found = audit(templates.OPENS_THINKING, "plain", "thinking")
    assert [(cure.switch, cure.value) for cure in found.cures] == [("effort", "none")]
    assert "plain" in found.cures[0].cures


def test_a_fixed_date_cures_a_clock() -> None:
    found = audit(templates.DATED, "clock", "plain")
    assert [cure.switch for cure in found.cures] == ["date_string"]
    assert found.cures[0].cures == ("clock",)
    assert audit(templates.TIMED, "clock").cures == ()


def test_a_switch_that_harms_other_cases_says_so() -> None:
    template = templates.DROPS_THINKING.replace(
        "{%- if add_generation_prompt %}",
        "{%- if keep_thoughts %}{{ messages | length }}{% endif %}{%- if add_generation_prompt %}",
    )
    # With the switch the number of messages follows the last one, so every chat breaks.
    assert audit(template, "plain", "thinking").cures == ()
    template = (
        "{% if keep_thoughts and messages[0].role == 'system' %}{{ messages | length }}{% endif %}"
        + templates.DROPS_THINKING
    )
    (cure,) = audit(template, "plain", "system", "thinking").cures
    assert (cure.cures, cure.breaks) == (("thinking",), ("system",))


def test_a_switch_that_lowers_the_cost_is_named_as_such() -> None:
    template = templates.TRIMS.replace(
        "message.content | trim",
        "message.content.rstrip() if keeps_start is defined else message.content | trim",
    )
    found = audit(template, "spaces")
    assert found.cures[0].cures == ()
    ((case, before, after),) = found.cures[0].lessens
    assert (case, after < before) == ("spaces", True)
    assert after == N_TURNS * len("  <|end|>")


def test_switches_are_variables_that_a_caller_may_pass() -> None:
    source = (
        "{% macro part(content) %}{% if content is defined %}{{ content }}{% endif %}{% endmacro %}"
        "{% set system = '' %}{% if not day is defined %}{% set day = 'x' %}{% endif %}"
        "{% if keep == -1 or keep in [2, 3] %}{{ bos_token + system + day }}{% endif %}"
        "{% for message in messages %}{{ part(message.content) }}{{ namespace(a=1).a }}{% endfor %}"
    )
    found = find_switches(compile_template(source).environment, source)
    values = {each.name: each.values for each in found}
    assert values == {
        "day": (True, False, "1 January 2024"),
        "keep": (True, False, -1, 2, 3, "1 January 2024"),
    }


# ---- templates that refuse, fail or leave out


def test_a_refused_case_is_reported_and_the_others_go_on() -> None:
    found = audit(templates.REFUSES_SYSTEM, "plain", "system", "call")
    assert verdicts(found) == {
        "plain": Verdict.APPEND_ONLY,
        "system": Verdict.REFUSED,
        "call": Verdict.REFUSED,
    }
    assert result(found, "system").reason == "Only users and assistants may speak."
    assert found.is_append_only


def test_texts_that_are_not_written_are_named() -> None:
    found = audit(templates.REFUSES_SYSTEM.replace("raise_exception('Only", "('Only"), "thinking")
    assert result(found, "thinking").verdict is Verdict.LEFT_OUT
    assert result(found, "thinking").reason == "thinking"
    found = audit(samples.CHAT_TEMPLATE, "tools", "call", "images")
    assert result(found, "tools").reason == "tools"
    assert result(found, "call").reason == "tool calls"
    assert result(found, "images").verdict is Verdict.FAILED
    assert not found.is_rendered


def test_contents_are_lists_where_a_template_takes_nothing_else() -> None:
    found = audit(templates.LISTS_ONLY, "plain", "spaces", "continue", "images")
    assert verdicts(found) == {
        "plain": Verdict.APPEND_ONLY,
        "images": Verdict.LEFT_OUT,
        "spaces": Verdict.APPEND_ONLY,
        "continue": Verdict.APPEND_ONLY,
    }


@pytest.mark.parametrize(
    ("name", "verdict", "reason"),
    [
        ("ENDLESS", Verdict.STOPPED, "it takes more than 0.5 s"),
        ("HUGE", Verdict.STOPPED, "it writes more than 1,000,000 characters"),
        ("GREEDY", Verdict.STOPPED, "it needs too much memory"),
        ("RAISES", Verdict.FAILED, "UndefinedError: "),
        ("DEEP", Verdict.FAILED, "RecursionError: "),
    ],
)
def test_a_template_that_fails_fails_one_case(name: str, verdict: Verdict, reason: str) -> None:
    opened = partial(TemplateProcess, limits=FAST)
    found = audit(getattr(templates, name), "plain", "system", "spaces", open_process=opened)
    assert result(found, "system").verdict is verdict
    assert (result(found, "system").reason or "").startswith(reason)
    assert result(found, "plain").verdict is Verdict.APPEND_ONLY
    assert result(found, "spaces").verdict is Verdict.APPEND_ONLY


def test_a_template_without_end_does_not_take_the_time_limit_for_every_case() -> None:
    opened = partial(TemplateProcess, limits=FAST)
    template = templates.ENDLESS.replace("messages[0].role == 'system'", "true")
    start = time.monotonic()
    found = audit(template, open_process=opened)
    assert time.monotonic() - start < 60
    assert set(verdicts(found).values()) == {Verdict.STOPPED}
    assert {case.reason for case in found.cases} == {"not tried, after 3 that were stopped"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% for %}", r"can't be compiled: line 2: "),
        ("{{ messages | no_such_filter }}", r"can't be compiled: line 1: No filter named"),
        ("{% endfor %}", r"can't be compiled: line 1: "),
        ("{{ " + "(" * 5000 + " }}", r"can't be compiled: "),
    ],
    ids=["unfinished", "unknown filter", "unopened", "deep"],
)
def test_a_template_that_cant_be_compiled_is_an_error_of_one_line(
    source: str, message: str
) -> None:
    with pytest.raises(InvalidTemplate, match=message) as caught:
        audit(source, "plain")
    assert "\n" not in str(caught.value)


def test_a_killed_renderer_is_started_again() -> None:
    with TemplateProcess(templates.APPEND_ONLY, {}) as opened:
        message = [{"role": "user", "content": "Hello"}]
        before = opened.render(message)
        assert opened._child is not None
        opened._child.kill()
        opened._child.wait()
        with pytest.raises(RenderingFailed, match="the process that rendered it ended"):
            opened.render(message)
        assert opened.render(message) == before == "<|user|>Hello<|end|>\n"


def test_a_module_in_the_current_folder_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("jinja2", "json", "tokcache"):
        tmp_path.joinpath(f"{name}.py").write_text(f"open('imported {name}', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    with TemplateProcess(templates.APPEND_ONLY, {}) as opened:
        text = opened.render([{"role": "user", "content": "Hello"}])
    assert text == "<|user|>Hello<|end|>\n"
    assert not list(tmp_path.glob("imported *"))


def test_without_jinja2_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_process, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match="pip install jinja2"):
        audit(templates.APPEND_ONLY, "plain")


def test_a_made_up_text_is_in_no_other_one() -> None:
    for case in all_cases(40):
        marks = [mark for step in case.steps for mark in step.marks]
        assert len(marks) == len(set(marks))
        assert not any(one in other for one in marks for other in marks if one != other)
        assert case.mode in Mode


# ---- real templates

# The cases that break, and those that are cured, of the templates in the shared data.
REAL = {
    "qwen2.5": ({"call_as_text"}, set()),
    "phi-3-mini": (set(), set()),
    "deepseek-v3": ({"late_system", "call_as_text"}, set()),
    "minimind": (
        {"thinking", "thinking_inline", "thinking_call", "newlines"},
        {"thinking", "thinking_inline", "thinking_call"},
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_template_breaks_where_it_is_known_to(name: str, shared_data: Path) -> None:
    config = shared_data / "tokenizers" / name / "tokenizer_config.json"
    template = json.loads(config.read_text(encoding="utf-8"))["chat_template"]
    found = audit(template)
    broken, cured = REAL[name]
    assert {case.name for case in found.broken} == broken
    assert {each for cure in found.cures for each in cure.cures} == cured
    if name == "minimind":  # in every thinking turn
        assert len(result(found, "thinking").breaks) == N_TURNS
        assert found.cures[0].switch == "open_thinking"


MADE = """
{%- set mark = {'a': 1, 'b': [true, none], 'c': 'é<&>'} %}
    {% for m in messages %}
        {% if loop.index0 == 3 %}
            {% break %}
        {% endif %}
  {{ m.role }}: {{ m.content }}
        {% if m.role == 'assistant' %}
    {% generation %}{{ mark | tojson }}, {{ mark | tojson(indent=2) }}{% endgeneration %}

        {% else %}
            {% continue %}
        {% endif %}
    {% endfor %}
{% if add_generation_prompt %}{{ strftime_now('%Y') }}{% endif %}
"""


def test_templates_are_rendered_as_by_transformers() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": role, "content": f" {role}\n"} for role in 3 * ("user", "assistant")]
    given = {"messages": messages, "add_generation_prompt": True}
    expected = utils._compile_jinja_template(MADE).render(**given)
    assert compile_template(MADE).render(**given) == expected
    assert expected.count("user") == 4
    assert "é<&>" in expected


def test_transformers_renders_as_the_projects_own_environment(shared_data: Path) -> None:
    pytest.importorskip("transformers", reason="needs tokcache[hf]")
    config = shared_data / "tokenizers" / "minimind" / "tokenizer_config.json"
    template = json.loads(config.read_text(encoding="utf-8"))["chat_template"]
    template = "{% generation %}{{ strftime_now('%d') }}{% endgeneration %}" + template
    own, other = (audit(template, by_transformers=chosen) for chosen in (False, True))
    assert own.compiled_by.startswith("jinja2")
    assert other.compiled_by.startswith("transformers")
    assert replace(own, compiled_by="") == replace(other, compiled_by="")
