"""The proof, by a chat template's syntax tree, that a longer chat only appends text.

Implementation: a walk over the tree that follows one kind of value, the list of messages and the
lists cut from its beginning. Everything else that a template can compute from the permitted uses of
such a list (a message at a fixed index, the current message, an earlier one) is the same for every
longer chat, so it needs no tracking. A use that is not known to be safe is refused.

1. Before the loop over the messages, only messages at fixed indexes are read.
2. In the loop, only the current and earlier messages are read. In the first iteration
   `messages[loop.index0 - 1]` is the last message, so it needs a condition that excludes that one.
3. After the loop, text appears only under a condition on `add_generation_prompt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateSyntaxError, nodes

from tokcache.errors import TemplateNotProven
from tokcache.text.chat.environment import new_environment
from tokcache.text.chat.expressions import (
    Expressions,
    Messages,
    Names,
    either,
    floor_of,
    shown,
)

_MAX_MIN_MESSAGES = 4  # a claim about longer chats alone would say little
_TEXT_AFTER = "text after the messages without a generation prompt"


@dataclass(frozen=True, slots=True)
class Proof:
    """Whether a longer chat's text begins with the shorter one's, without a generation prompt.

    Units: the claim is about chats of at least `min_messages` messages; `reason` names the
           construct that prevents the proof, and `line` its line in the template (0 if none).
    """

    proven: bool
    reason: str = ""
    line: int = 0
    min_messages: int = 1


@lru_cache(maxsize=256)
def prove_append_only(template: str) -> Proof:
    """Return whether each rendering of a chat is the beginning of those of longer chats.

    A template that is not proven may still append only; `reason` says where the proof ends.
    """
    try:
        tree = parse(template)
        prover = _Prover()
        prover.walk(tree.body, {"messages": Messages(0, 0)})
        prover.check_macros()
    except TemplateSyntaxError as error:
        return Proof(
            False, f"line {error.lineno}: not a valid template: {error.message}", error.lineno
        )
    except TemplateNotProven as refused:
        return Proof(False, f"line {refused.line}: {refused.why}", refused.line)
    except RecursionError:
        return Proof(False, "the template is nested too deeply")
    if not prover.has_loop:
        return Proof(False, "there is no loop over the messages")
    n_messages = prover.reads.min_messages
    if n_messages > _MAX_MIN_MESSAGES:
        return Proof(False, f"the text depends on whether there are {n_messages} messages")
    return Proof(True, min_messages=n_messages)


def parse(template: str) -> nodes.Template:
    """Parse a template as transformers does.

    Errors: jinja2.TemplateSyntaxError.
    """
    return new_environment().parse(template)


class _Prover:
    """One walk over a template's statements; raises TemplateNotProven at an unsafe one.

    There is a method `_walk_…` for each supported class of statement.
    """

    def __init__(self) -> None:
        self.has_loop = False
        self.reads = Expressions()
        self._lists: set[str] = {"messages"}  # all names that were ever a list of messages
        self._in_macros: list[tuple[set[str], nodes.Node]] = []

    def walk(self, body: list[nodes.Node], names: Names) -> None:
        """Walk statements in their order; `names` changes as they assign."""
        for node in body:
            walk: Callable[[Any, Names], None] | None
            walk = getattr(self, f"_walk_{type(node).__name__.lower()}", None)
            if walk is None:
                raise TemplateNotProven(f"`{type(node).__name__}` is not supported", node)
            walk(node, names)

    def _walk_output(self, node: nodes.Output, names: Names) -> None:
        is_after = self.has_loop and self.reads.over is None
        for each in node.nodes:
            if is_after and not (isinstance(each, nodes.TemplateData) and not each.data):
                raise TemplateNotProven(f"{_TEXT_AFTER}: {shown(each)}", each)
            self.reads.value(each, names)

    def _walk_if(self, node: nodes.If, names: Names) -> None:
        had_loop = self.has_loop
        floor = self.reads.floor
        branches = []
        loops = []
        for test, body in [(node.test, node.body), *((e.test, e.body) for e in node.elif_)]:
            is_skipped = had_loop and self.reads.over is None and _needs_prompt(test)
            if not is_skipped:
                self.reads.truth(test, names)
                own, self.has_loop = dict(names), had_loop
                with self.reads.at_least(floor_of(test, True, self.reads.is_own_loop)):
                    self.walk(body, own)
                branches.append(own)
                loops.append(self.has_loop)
            self.reads.floor = max(self.reads.floor, floor_of(test, False, self.reads.is_own_loop))
        own, self.has_loop = dict(names), had_loop
        self.walk(node.else_, own)
        self.reads.floor = floor
        self.has_loop = any([self.has_loop, *loops])
        branches.append(own)
        for name in set().union(*branches):
            names[name] = either([branch.get(name) for branch in branches])

    def _walk_for(self, node: nodes.For, names: Names) -> None:
        over = self.reads.kind(node.iter, names)
        if over is None:
            self._walk_inner(node, names)
            return
        if self.has_loop or self.reads.over is not None:
            raise TemplateNotProven("a second loop over the messages", node)
        if node.recursive:
            raise TemplateNotProven("a recursive loop over the messages", node)
        if node.else_:
            raise TemplateNotProven("`else` of the loop over the messages", node.else_[0])
        own = dict(names)
        self._bind(node.target, own)
        if node.test is not None:
            self.reads.truth(node.test, own)
            over = Messages(over.first, None)
        self.reads.over, self.reads.is_own_loop = over, True
        self.walk(node.body, own)
        self.reads.over, self.reads.is_own_loop, self.has_loop = None, False, True

    def _walk_inner(self, node: nodes.For, names: Names) -> None:
        """Walk a loop over other things, whose `loop` is not that of the messages."""
        own = dict(names)
        self._bind(node.target, own)
        if node.test is not None:
            self.reads.truth(node.test, own)
        is_own, self.reads.is_own_loop = self.reads.is_own_loop, False
        with self._without_loop(node):
            self.walk(node.body, own)
        self.reads.is_own_loop = is_own
        self.walk(node.else_, dict(names))

    def _walk_assign(self, node: nodes.Assign, names: Names) -> None:
        kind = self.reads.kind(node.node, names)
        if kind is not None and not isinstance(node.target, nodes.Name):
            raise TemplateNotProven("the messages are stored in an object", node)
        self._bind(node.target, names, kind, node.node)

    def _walk_assignblock(self, node: nodes.AssignBlock, names: Names) -> None:
        if node.filter is not None:
            self.reads.value(node.filter, names)
        over = self.reads.over
        if self.has_loop and over is None:  # after the loop, but this text is not output
            self.reads.over = Messages(0, None)
        with self._without_loop(node):
            self.walk(node.body, dict(names))
        self.reads.over = over
        self._bind(node.target, names)

    def _walk_scope(self, node: nodes.Scope, names: Names) -> None:
        self.walk(node.body, dict(names))

    def _walk_with(self, node: nodes.With, names: Names) -> None:
        own = dict(names)
        for target, value in zip(node.targets, node.values, strict=True):
            self.reads.value(value, names)
            self._bind(target, own)
        self.walk(node.body, own)

    def _walk_filterblock(self, node: nodes.FilterBlock, names: Names) -> None:
        if self.has_loop and self.reads.over is None:
            raise TemplateNotProven(_TEXT_AFTER, node)
        self.reads.value(node.filter, names)
        with self._without_loop(node):
            self.walk(node.body, dict(names))

    def _walk_callblock(self, node: nodes.CallBlock, names: Names) -> None:
        if self.has_loop and self.reads.over is None:
            raise TemplateNotProven(_TEXT_AFTER, node)
        self.reads.value(node.call, names)
        self._walk_function(node, names)

    def _walk_macro(self, node: nodes.Macro, names: Names) -> None:
        self._walk_function(node, names)
        names[node.name] = None

    def _walk_function(self, node: nodes.Macro | nodes.CallBlock, names: Names) -> None:
        """Walk the body of a macro, which may run anywhere: no list of messages is known in it."""
        own: Names = dict.fromkeys(names)
        for argument in node.args:
            self._bind(argument, own)
        for default in node.defaults:
            self.reads.value(default, names)
        inner = _Prover()
        inner.reads.over = Messages(0, None)  # its text is a value, wherever the macro stands
        inner.walk(node.body, own)
        self._in_macros += inner._in_macros
        bound = {argument.name for argument in node.args}
        loaded = {n.name for n in node.find_all(nodes.Name) if n.ctx == "load"} - bound
        self._in_macros.append((loaded, node))

    def check_macros(self) -> None:
        """Refuse macros that read a list of messages otherwise than as an argument."""
        for loaded, node in self._in_macros:
            if loaded & self._lists:
                raise TemplateNotProven("a macro or call block reads the messages", node)
            if isinstance(node, nodes.CallBlock) and "loop" in loaded:
                raise TemplateNotProven("a call block reads `loop`", node)

    def _walk_continue(self, node: nodes.Continue, names: Names) -> None:
        """Nothing to walk: later messages have no part in it."""

    _walk_break = _walk_continue

    def _bind(
        self,
        target: nodes.Node,
        names: Names,
        kind: Messages | None = None,
        value: nodes.Node | None = None,
    ) -> None:
        """Bind the names of an assignment's target; attributes of a namespace are not names."""
        if isinstance(target, nodes.Tuple):
            for each in target.items:
                self._bind(each, names)
        if not isinstance(target, nodes.Name):
            return
        is_false = isinstance(value, nodes.Const) and value.value is False
        if target.name == "loop" or (target.name == "add_generation_prompt" and not is_false):
            raise TemplateNotProven(f"`{target.name}` is assigned", target)
        names[target.name] = kind
        if kind is not None:
            self._lists.add(target.name)

    @contextmanager
    def _without_loop(self, node: nodes.Node) -> Iterator[None]:
        """Refuse a loop over the messages in statements that run repeatedly, or not in place."""
        before = self.has_loop
        yield
        if self.has_loop and not before:
            raise TemplateNotProven(
                f"the loop over the messages is inside `{type(node).__name__}`", node
            )


def _needs_prompt(test: nodes.Node) -> bool:
    """Return whether a condition is false whenever `add_generation_prompt` is False."""
    if isinstance(test, nodes.Name):
        return test.name == "add_generation_prompt"
    if isinstance(test, nodes.And):
        return _needs_prompt(test.left) or _needs_prompt(test.right)
    if isinstance(test, nodes.Or):
        return _needs_prompt(test.left) and _needs_prompt(test.right)
    if isinstance(test, nodes.Test):
        return test.name == "true" and _needs_prompt(test.node)
    if isinstance(test, nodes.Compare) and len(test.ops) == 1:
        value = test.ops[0].expr
        is_true = isinstance(value, nodes.Const) and value.value is True
        return test.ops[0].op == "eq" and is_true and _needs_prompt(test.expr)
    return False
