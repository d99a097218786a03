"""Compiles chat templates as transformers does, with jinja2 alone, and finds their switches.

A switch is a variable that a caller may pass, such as `enable_thinking`.

Source: transformers/utils/chat_template_utils.py (5.24) for the environment: sandbox, whitespace,
        filters, functions and the tag `generation`.
"""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokcache.text.chat.conversations import FIXED_TEXT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jinja2 import Environment, Template
    from jinja2.parser import Parser

# Variables that transformers itself passes, and functions of the environment: none is a switch.
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception"}
_GIVEN |= {"strftime_now", "continue_final_message"}
# Bounds on the work of trying them, however many a template has.
_MAX_SWITCHES = 12
_MAX_VALUES = 6


class _Generation(Extension):
    """The tag that marks generated text for training; its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


@dataclass(frozen=True, slots=True)
class Switch:
    """A variable that a caller may pass to a template, and the values worth trying."""

    name: str
    values: tuple[str | int | float | bool | None, ...]


def new_environment() -> Environment:
    """Return an environment in which templates are parsed and rendered as transformers does."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def compile_template(source: str) -> Template:
    """Return the compiled template.

    Errors: jinja2.TemplateSyntaxError.
    """
    return new_environment().from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(form: str) -> str:
    return dt.datetime.now().strftime(form)  # noqa: DTZ005 (local time, as transformers)


def _raise(message: str) -> None:
    raise TemplateError(message)


def find_switches(environment: Environment, source: str) -> list[Switch]:
    """Return the first variables, by name, that a caller may pass to a template.

    Those are the variables that it reads, and either never sets or tests with `is defined` or
    `default`. The values of a switch are true, false, the constants that it is compared with (up to
    4), and `FIXED_TEXT`.
    """
    # This call folds constants in the tree that it gets, so the tree is parsed again.
    names = find_undeclared_variables(environment.parse(source))
    names -= _GIVEN | set(environment.globals)
    tree = environment.parse(source)
    stored = {each.name for each in tree.find_all(nodes.Name) if each.ctx != "load"}
    stored |= {each.name for each in tree.find_all(nodes.Macro)}
    arguments = {each.name for each in tree.find_all(nodes.Name) if each.ctx == "param"}
    tested_if_defined = {
        each.node.name
        for each in tree.find_all((nodes.Test, nodes.Filter))
        if isinstance(each.node, nodes.Name) and each.name in {"defined", "undefined", "default"}
    }
    compared: dict[str, list[Any]] = {}
    for comparison in tree.find_all(nodes.Compare):
        sides = [comparison.expr, *(each.expr for each in comparison.ops)]
        for side in sides:
            if isinstance(side, nodes.Name):
                found = [value for other in sides for value in _constants(other)]
                compared.setdefault(side.name, []).extend(found)
    switches = []
    for name in sorted(names - arguments):
        # bos_token and so on come from the tokenizer.
        if name.endswith("_token") or (name in stored and name not in tested_if_defined):
            continue
        values: list[Any] = [True, False]
        for value in compared.get(name, []):
            # 1 == True in Python, so values are compared with their types.
            if (type(value), value) not in {(type(each), each) for each in values}:
                values.append(value)
        switches.append(Switch(name, (*values[:_MAX_VALUES], FIXED_TEXT)))
    return switches[:_MAX_SWITCHES]


def _constants(node: nodes.Node) -> Iterator[str | int | float | bool]:
    """Yield the constants of an operand: a literal, a negative number, or a list of literals."""
    items = node.items if isinstance(node, (nodes.List, nodes.Tuple)) else [node]
    for item in items:
        if isinstance(item, nodes.Const) and isinstance(item.value, str | int | float):
            yield item.value
        elif isinstance(item, nodes.Neg) and isinstance(
            value := getattr(item.node, "value", None), int | float
        ):
            yield -value
