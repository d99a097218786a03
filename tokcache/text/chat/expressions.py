"""The expressions of a chat template: what each reads of the list of messages.

Every expression is walked once. It is refused if its value may be another in a longer chat.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jinja2 import nodes
from jinja2.filters import FILTERS

from tokcache.errors import TemplateNotProven


@dataclass(frozen=True, slots=True)
class Messages:
    """A list that begins at one of the messages `first` to `last`; longer chats only extend it.

    Of a list of selected messages (`last` is None) only the order is known.
    """

    first: int
    last: int | None


Names = dict[str, Messages | None]  # None: a value that is the same in every longer chat

# Names whose value differs between two renderings, or that keep a state of their own.
_UNSTEADY = {"strftime_now", "lipsum", "cycler", "joiner", "self", "super"}
_FILTERS = frozenset(FILTERS) - {"random"}
# Attributes of `loop` that don't depend on later messages.
_OF_LOOP = {"index", "index0", "first", "previtem", "depth", "depth0", "cycle"}
# Filters that keep the order of a list, and decide on each item alone.
_POINTWISE = {"list", "select", "reject", "selectattr", "rejectattr"}
_OF_KIND = {"defined", "undefined", "iterable", "sequence", "string", "mapping", "none", "number"}
_PLAIN = (
    *(nodes.Const, nodes.TemplateData, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair),
    *(nodes.Keyword, nodes.Concat, nodes.BinExpr, nodes.UnaryExpr, nodes.Slice, nodes.Operand),
    *(nodes.Compare, nodes.Call, nodes.Getattr, nodes.Getitem, nodes.Filter, nodes.Test),
)


class Expressions:
    """Walks expressions; raises TemplateNotProven at the first part that is not known to be safe.

    `over` is the list of the loop that is being walked, `is_own_loop` whether the name `loop`
    means that loop, and `floor` the least `loop.index0` on the path that is being walked.
    """

    def __init__(self) -> None:
        self.min_messages = 1
        self.over: Messages | None = None
        self.is_own_loop = False
        self.floor = 0

    def value(self, node: nodes.Node, names: Names) -> None:
        """Walk an expression that must not be a list of messages."""
        if self.kind(node, names) is not None:
            raise TemplateNotProven(f"all messages are used as a value: {shown(node)}", node)

    def truth(self, node: nodes.Node, names: Names) -> Messages | None:
        """Walk a condition; a list of messages is true as soon as the chat is long enough."""
        kind = self.kind(node, names)
        if kind is not None:
            self._need(kind, 0, node)
        return kind

    def kind(self, node: nodes.Node, names: Names) -> Messages | None:
        """Walk an expression, and return the list of messages that it is, if it is one."""
        if isinstance(node, nodes.Name):
            return self._name(node, names)
        if isinstance(node, nodes.And | nodes.Or):
            left = self.truth(node.left, names)
            is_true = isinstance(node, nodes.And)
            with self.at_least(floor_of(node.left, is_true, self.is_own_loop)):
                return either([left, self.kind(node.right, names)])
        if isinstance(node, nodes.CondExpr):
            return self._conditional(node, names)
        if isinstance(node, nodes.Not):
            self.truth(node.node, names)
            return None
        if isinstance(node, nodes.Getattr | nodes.Getitem) and self._is_loop(node.node):
            self._of_loop(node)
            return None
        if isinstance(node, nodes.Getitem):
            return self._item(node, names)
        if isinstance(node, nodes.Filter):
            return self._filter(node, names)
        if isinstance(node, nodes.Test):
            self._test(node, names)
            return None
        if isinstance(node, nodes.Compare) and self._compares_length(node, names):
            return None
        if not isinstance(node, _PLAIN):
            raise TemplateNotProven(f"`{type(node).__name__}` is not supported", node)
        for child in node.iter_child_nodes():
            self.value(child, names)
        return None

    def _name(self, node: nodes.Name, names: Names) -> Messages | None:
        if node.name in names and node.name != "loop":
            return names[node.name]
        if node.name in _UNSTEADY:
            raise TemplateNotProven(f"`{node.name}` differs from one rendering to the next", node)
        if self._is_loop(node):
            raise TemplateNotProven("`loop` is used as a value", node)
        return None

    def _is_loop(self, node: nodes.Node) -> bool:
        return self.is_own_loop and isinstance(node, nodes.Name) and node.name == "loop"

    def _of_loop(self, node: nodes.Getattr | nodes.Getitem) -> None:
        name: object = None
        if isinstance(node, nodes.Getattr):
            name = node.attr
        elif isinstance(node.arg, nodes.Const):
            name = node.arg.value
        if name not in _OF_LOOP:
            raise TemplateNotProven(f"`{shown(node)}` depends on later messages", node)

    def _conditional(self, node: nodes.CondExpr, names: Names) -> Messages | None:
        self.truth(node.test, names)
        with self.at_least(floor_of(node.test, True, self.is_own_loop)):
            kinds = [self.kind(node.expr1, names)]
        if node.expr2 is not None:
            with self.at_least(floor_of(node.test, False, self.is_own_loop)):
                kinds.append(self.kind(node.expr2, names))
        return either(kinds)

    def _item(self, node: nodes.Getitem, names: Names) -> Messages | None:
        kind = self.kind(node.node, names)
        if kind is None:
            self.value(node.arg, names)
            return None
        if isinstance(node.arg, nodes.Slice):
            return self._slice(kind, node.arg, node)
        index = self._index(node.arg)
        if index is None or not self._is_past(kind, index, 0):
            raise TemplateNotProven(f"`{shown(node)}` may be a later message", node)
        if not index[0]:
            self._need(kind, index[1], node)
        return None

    def _slice(self, kind: Messages, part: nodes.Slice, node: nodes.Node) -> Messages | None:
        start = (False, 0) if part.start is None else self._index(part.start)
        stop = None if part.stop is None else self._index(part.stop)
        is_step = part.step is None or (
            isinstance(part.step, nodes.Const) and part.step.value in (None, 1)
        )
        if start is not None and is_step and kind.last is not None:
            if part.stop is None and not start[0] and start[1] >= 0:
                return Messages(kind.first + start[1], kind.last + start[1])
            # `messages[:stop]`: a list of messages that are all past.
            is_past = stop is not None and self._is_past(kind, stop, 1)
            if stop is not None and is_past and self._is_past(kind, start, 1):
                if not stop[0]:
                    self._need(kind, max(stop[1] - 1, 0), node)
                return None
        raise TemplateNotProven(f"`{shown(node)}` reaches later messages", node)

    def _index(self, node: nodes.Node) -> tuple[bool, int] | None:
        """Return an index as (whether it counts from `loop.index0`, the number added)."""
        if isinstance(node, nodes.Const) and type(node.value) is int:
            return False, node.value
        if isinstance(node, nodes.Getattr) and self._is_loop(node.node):
            return {"index0": (True, 0), "index": (True, 1)}.get(node.attr)
        if isinstance(node, nodes.Add | nodes.Sub):
            left, right = self._index(node.left), self._index(node.right)
            if left is not None and right is not None and not right[0]:
                is_sum = isinstance(node, nodes.Add)
                return left[0], left[1] + (right[1] if is_sum else -right[1])
        return None

    def _is_past(self, kind: Messages, index: tuple[bool, int], n_more: int) -> bool:
        """Return whether an index is never negative, nor above the current one plus `n_more`."""
        of_loop, number = index
        if kind.last is None:
            return False
        if not of_loop:
            return number >= 0
        over = self.over
        if over is None or number + self.floor < 0:
            return False
        return kind.last + number <= over.first + n_more

    def _filter(self, node: nodes.Filter, names: Names) -> Messages | None:
        if node.name not in _FILTERS:
            raise TemplateNotProven(f"the filter `{node.name}` is not known to be safe", node)
        rest = [*node.args, *node.kwargs]
        rest += [each for each in (node.dyn_args, node.dyn_kwargs) if each is not None]
        for each in rest:
            self.value(each, names)
        kind = None if node.node is None else self.kind(node.node, names)
        if kind is None:
            return None
        if node.name in ("default", "d"):
            self._need(kind, 0, node)  # an empty list may be replaced
            return kind
        if node.name in _POINTWISE:
            return kind if node.name == "list" else Messages(kind.first, None)
        if node.name == "first":
            self._need(kind, 0, node)
            return None
        raise TemplateNotProven(f"`{shown(node)}` reads all messages", node)

    def _test(self, node: nodes.Test, names: Names) -> None:
        kind = self.kind(node.node, names)
        if kind is not None and node.name not in _OF_KIND:
            raise TemplateNotProven(f"all messages are tested: `{node.name}`", node)
        rest = [*node.args, *node.kwargs]
        rest += [each for each in (node.dyn_args, node.dyn_kwargs) if each is not None]
        for each in rest:
            self.value(each, names)

    def _compares_length(self, node: nodes.Compare, names: Names) -> bool:
        """Walk `messages|length > 2`, which is settled as soon as there are more messages."""
        if len(node.ops) != 1 or node.ops[0].op not in ("eq", "ne", "lt", "lteq", "gt", "gteq"):
            return False
        for length, limit in ((node.expr, node.ops[0].expr), (node.ops[0].expr, node.expr)):
            if not isinstance(length, nodes.Filter) or length.name not in ("length", "count"):
                continue
            if not isinstance(limit, nodes.Const) or type(limit.value) is not int:
                continue
            kind = None if length.node is None else self.kind(length.node, names)
            if kind is not None:
                self._need(kind, max(limit.value, 0), node)
                return True
        return False

    def _need(self, kind: Messages, index: int, node: nodes.Node) -> None:
        """Note that a chat must have the message at an index of a list for the claim to hold."""
        if kind.last is None:
            raise TemplateNotProven("selected messages are read by their number", node)
        self.min_messages = max(self.min_messages, kind.last + index + 1)

    @contextmanager
    def at_least(self, floor: int) -> Iterator[None]:
        """Walk what runs only if `loop.index0` is `floor` or more."""
        before, self.floor = self.floor, max(self.floor, floor)
        yield
        self.floor = before


def either(kinds: list[Messages | None]) -> Messages | None:
    """Return the list that may be any of several: each use must be safe for all of them."""
    lists = [kind for kind in kinds if kind is not None]
    if not lists:
        return None
    ends = [kind.last for kind in lists]
    known = [end for end in ends if end is not None]
    last = max(known) if len(known) == len(ends) else None
    return Messages(min(kind.first for kind in lists), last)


def floor_of(test: nodes.Node, is_true: bool, is_own_loop: bool) -> int:
    """Return the least `loop.index0` at which a condition can be true, or not true."""
    if not is_own_loop:
        return 0
    if isinstance(test, nodes.Not):
        return floor_of(test.node, not is_true, is_own_loop)
    if isinstance(test, nodes.And if is_true else nodes.Or):
        assert isinstance(test, nodes.And | nodes.Or)  # noqa: S101 (for the type checker)
        sides = (test.left, test.right)
        return max(floor_of(side, is_true, is_own_loop) for side in sides)
    if _is_attribute(test, "first"):
        return 0 if is_true else 1
    if _is_attribute(test, "index0") or _is_attribute(test, "previtem"):
        return 1 if is_true else 0
    if isinstance(test, nodes.Compare) and len(test.ops) == 1:
        return _floor_of_number(test.expr, test.ops[0].op, test.ops[0].expr, is_true)
    return 0


def _floor_of_number(left: nodes.Node, op: str, right: nodes.Node, is_true: bool) -> int:
    shift = next((n for n in (0, 1) if _is_attribute(left, ("index0", "index")[n])), None)
    if shift is None or not isinstance(right, nodes.Const) or type(right.value) is not int:
        return 0
    number = right.value - shift
    if not is_true:
        opposite = {"eq": "ne", "ne": "eq", "lt": "gteq", "gteq": "lt", "gt": "lteq", "lteq": "gt"}
        op = opposite.get(op, "")
    if op == "gt":
        return max(number + 1, 0)
    if op in ("gteq", "eq"):
        return max(number, 0)
    return 1 if op == "ne" and number == 0 else 0


def _is_attribute(node: nodes.Node, name: str) -> bool:
    if not isinstance(node, nodes.Getattr) or node.attr != name:
        return False
    return isinstance(node.node, nodes.Name) and node.node.name == "loop"


def shown(node: nodes.Node | None) -> str:
    """Return an expression as it may stand in the template, shortened, for a message."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Const):
        return repr(node.value)[:40]
    if isinstance(node, nodes.TemplateData):
        return repr(node.data)[:40]
    if isinstance(node, nodes.Getattr):
        return f"{shown(node.node)}.{node.attr}"
    if isinstance(node, nodes.Getitem):
        return f"{shown(node.node)}[{shown(node.arg)}]"
    if isinstance(node, nodes.Slice):
        ends = [node.start, node.stop] + ([node.step] if node.step is not None else [])
        return ":".join("" if end is None else shown(end) for end in ends)
    if isinstance(node, nodes.Filter):
        return f"{shown(node.node)}|{node.name}"
    if isinstance(node, nodes.Neg):
        return f"-{shown(node.node)}"
    if isinstance(node, nodes.BinExpr):
        return f"{shown(node.left)} {node.operator} {shown(node.right)}"
    return f"({type(node).__name__.lower()})"
