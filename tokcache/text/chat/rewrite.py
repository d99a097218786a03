"""A chat template in three parts that run apart: before, in and after the loop over the messages.

The parts are compiled from the template's own syntax tree, by the environment of transformers, so
that filters, whitespace and the sandbox are its own. In the loop's part, the loop runs over the
messages that are handed to it, and the name `loop` means an object that knows where in the chat it
is. What a template does with the messages is not analysed here: `running` watches it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import Environment, Template, nodes
from jinja2.defaults import DEFAULT_FILTERS  # type: ignore[attr-defined]

from tokcache.errors import TemplateNotTaken

# Variables of the parts; a template that has names of this kind is not taken apart.
OVER, STEPS, LOOP = "tokcache_over", "tokcache_steps", "tokcache_loop"

CLOCK = "strftime_now"
_GLOBALS = {"range", "dict", "namespace", "raise_exception", CLOCK}
# Attributes of JSON's types.
_ATTRIBUTES = frozenset({*dir(dict), *dir(list), *dir(str)})
_FILTERS = frozenset(DEFAULT_FILTERS) - {"random"}
_STATEMENTS = (
    *(nodes.Output, nodes.For, nodes.If, nodes.Assign, nodes.AssignBlock, nodes.Macro),
    *(nodes.CallBlock, nodes.FilterBlock, nodes.With, nodes.Scope, nodes.Continue, nodes.Break),
)


@dataclass(frozen=True, slots=True)
class Parts:
    """The compiled parts of a template.

    `reads` are the names that any of them reads. `reads_prompt` tells whether one of the first two
    reads `add_generation_prompt`, `has_clock` whether any reads the clock. `names` are the
    environment's.
    """

    environment: Environment
    names: dict[str, Any]
    head: Template
    body: Template
    tail: Template | None
    reads: frozenset[str]
    reads_prompt: bool
    has_clock: bool


def take_apart(template: Template, source: str) -> Parts:
    """Return the parts of a template that transformers has compiled from `source`.

    Errors: TemplateNotTaken.
    """
    environment = template.environment
    head, loop, tail = _split(environment, source)
    _check(environment, [*head, loop, *tail])
    _check_scopes(head, loop, tail)
    macros = [node for node in head if isinstance(node, nodes.Macro)]
    reads = _names([*head, loop], "load")

    over = nodes.Assign(nodes.Name(OVER, "store"), loop.iter)
    first = _compiled(environment, [*head, over])
    # Again from the source: compiling may change a tree.
    head, loop, tail = _split(environment, source)
    macros = [node for node in head if isinstance(node, nodes.Macro)]
    loop.iter = nodes.Name(STEPS, "load")
    kept = {"loop", LOOP, *_namespaces([*head, loop])}
    called = {id(node.node) for node in _all([*head, loop]) if isinstance(node, nodes.Call)}
    has_class = any(
        isinstance(node, nodes.Name) and node.name == "dict" and id(node) not in called
        for node in _all([*head, loop])
    )
    for node in loop.body:
        _rename_loop(node)
        if not has_class:
            _look_up_items(node, kept)
    second = _compiled(environment, [*macros, loop])
    head, loop, tail = _split(environment, source)
    macros = [node for node in head if isinstance(node, nodes.Macro)]
    third = _compiled(environment, [*macros, *tail]) if tail else None
    all_reads = frozenset(reads | _names(tail, "load"))
    prompt, has_clock = "add_generation_prompt" in reads, CLOCK in all_reads
    names = dict(first.globals)
    return Parts(environment, names, first, second, third, all_reads, prompt, has_clock)


def _split(
    environment: Environment, source: str
) -> tuple[list[nodes.Node], nodes.For, list[nodes.Node]]:
    """Return the statements before the last loop over the messages, that loop, and those after."""
    body = environment.parse(source).body
    lists = {"messages"}
    for node in _all(body):
        if not isinstance(node, nodes.Assign) or not isinstance(node.target, nodes.Name):
            continue
        if _names([node.node], "load") & lists:
            lists.add(node.target.name)
    found = [
        index
        for index, node in enumerate(body)
        if isinstance(node, nodes.For) and _names([node.iter], "load") & lists
    ]
    if not found:
        raise TemplateNotTaken("no_loop")
    loop = cast("nodes.For", body[found[-1]])
    if loop.recursive or loop.else_ or loop.test is not None:
        raise TemplateNotTaken("loop_form")
    return body[: found[-1]], loop, body[found[-1] + 1 :]


def _check(environment: Environment, body: Iterable[nodes.Node]) -> None:
    """Refuse what differs between renderings, keeps a state of its own, or is not known."""
    body = list(body)
    known = _names(body, "store") | _names(body, "param") | _macro_names(body)
    for name in _names(body, "load") - known:
        is_unknown = name in environment.globals and name not in _GLOBALS
        if is_unknown or name in ("self", "super"):
            raise TemplateNotTaken("unsteady")
    if any(name == "loop" or name.startswith("tokcache_") for name in known):
        raise TemplateNotTaken("name")
    for node in _all(body):
        if isinstance(node, nodes.Stmt) and not isinstance(node, _STATEMENTS):
            raise TemplateNotTaken("statement")
        if isinstance(node, nodes.Filter) and node.name not in _FILTERS:
            raise TemplateNotTaken("unsteady")
        if (
            isinstance(node, nodes.Test)
            and node.name == "sameas"
            and not all(isinstance(each, nodes.Const) for each in node.args)
        ):
            raise TemplateNotTaken(
                "unsteady"
            )  # in a later rendering equal values may be other objects


def _check_scopes(head: list[nodes.Node], loop: nodes.For, tail: list[nodes.Node]) -> None:
    """Refuse names that would mean something else if the parts are compiled apart.

    Jinja decides by the whole template's assignments whether a name that is not assigned yet is
    looked up among the arguments. And a macro is compiled into every part, with its own name.
    """
    macros = {node.name for node in head if isinstance(node, nodes.Macro)}
    if _names(tail, "store") & (_names([*head, loop], "load") | macros):
        raise TemplateNotTaken("name")
    if macros & _names(head, "store") or _macro_names([loop, *tail]):
        raise TemplateNotTaken("macro")
    n_macros = sum(isinstance(node, nodes.Macro) for node in _all(head))
    if n_macros != len(macros):
        raise TemplateNotTaken("macro")


def _compiled(environment: Environment, body: list[nodes.Node]) -> Template:
    tree = nodes.Template(body, lineno=1)
    tree.set_environment(environment)
    code = environment.compile(tree)
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def _rename_loop(node: nodes.Node) -> None:
    """Rename `loop` in the loop over the messages, but not in the loops inside it."""
    if isinstance(node, nodes.Name) and node.name == "loop":
        node.name = LOOP
    inner = [node.iter, *node.else_] if isinstance(node, nodes.For) else node.iter_child_nodes()
    for child in inner:
        _rename_loop(child)


def _look_up_items(node: nodes.Node, kept: set[str]) -> None:
    """Replace `message.name` by `message["name"]`, which looks for the item first.

    For a dict that is the same unless dicts have an attribute of that name; for objects without
    items, too, but slower, so attributes of the names in `kept` and methods are left as they are.
    The class `dict` has every item (`dict["x"]` is a type), so a template that has it as a value is
    not changed. No other global of the environment has items.
    """
    for name, child in node.iter_fields():
        children = child if isinstance(child, list) else [child]
        made = [
            _as_item(each, kept) if isinstance(each, nodes.Getattr) else each for each in children
        ]
        is_callee = isinstance(node, nodes.Call) and name == "node"
        if made != children and not is_callee:
            setattr(node, name, made if isinstance(child, list) else made[0])
        for each in children if is_callee else made:
            if isinstance(each, nodes.Node):
                _look_up_items(each, kept)


def _as_item(node: nodes.Getattr, kept: set[str]) -> nodes.Expr:
    is_kept = isinstance(node.node, nodes.Name) and node.node.name in kept
    if is_kept or node.ctx != "load" or node.attr in _ATTRIBUTES:
        return node
    return nodes.Getitem(node.node, nodes.Const(node.attr), "load", lineno=node.lineno)


def _namespaces(body: Iterable[nodes.Node]) -> set[str]:
    """Return the names that a namespace is assigned to."""
    found = set()
    for node in _all(body):
        if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
            called = node.node.node if isinstance(node.node, nodes.Call) else None
            if isinstance(called, nodes.Name) and called.name == "namespace":
                found.add(node.target.name)
    return found


def _all(body: Iterable[nodes.Node]) -> list[nodes.Node]:
    return [each for node in body for each in (node, *node.find_all(nodes.Node))]


def _names(body: Iterable[nodes.Node], context: str) -> set[str]:
    found = (each for each in _all(body) if isinstance(each, nodes.Name))
    return {each.name for each in found if each.ctx == context}


def _macro_names(body: Iterable[nodes.Node]) -> set[str]:
    return {each.name for each in _all(body) if isinstance(each, nodes.Macro)}
