"""RenderCache: the text of chats that have been rendered before, for chats that grow.

1. A chat's messages are frozen to bytes, one by one; the settings of the call (template, tools,
   special tokens and so on) as well. Messages of other types than JSON's are not cached.
2. The tree of nodes is walked from the settings' root, one message at a time, as far as the chat is
   known. Every node adds text to that of its parent; the last one has the state of the template at
   that point.
3. The template goes on from there: only what is new is run, and its last part.
4. New nodes take what has been rendered, as far as `running` has seen that it is settled.

Implementation: the node of the first n messages has all text that n messages settle. A template
that looks at the next message leaves the last message's text to the next node. Where a template
reads all messages before its loop (the last user's message, say), or the clock, that part runs
every time, and its result is part of the key.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from marshal import dumps, loads
from sys import getsizeof
from typing import TYPE_CHECKING, Any

from tokcache._forks import call_in_child
from tokcache.errors import RenderingRefused, TemplateNotTaken, TemplateUnusual
from tokcache.stats import RenderStats

if TYPE_CHECKING:
    from jinja2 import Template

    from tokcache.text.chat.rewrite import Parts
    from tokcache.text.chat.running import Head, Names, Point, Run

_log = logging.getLogger("tokcache")

_SCALARS = {str, int, float, bool, type(None)}
_NODE_BYTES = 700  # a node, its dict and its places in two more; measured with sys.getsizeof
_N_PROBED = 2  # the first answers of a template are compared with transformers' own
_MAX_TEMPLATES = 64
_N_TRIED = 64  # renderings after which a template must have gained something


# A message as its names and values if they are all str, else as bytes.
_Key = bytes | tuple[tuple[str, str], ...]


@dataclass(slots=True, eq=False)
class _Node:
    """What one more message adds: text, and the point that the template has reached."""

    key: _Key
    parent: _Node | None = None
    children: dict[_Key, _Node] = field(default_factory=dict)
    depth: int = 0  # the number of messages
    n_bytes: int = 0
    head: Head | None = None
    point: Point | None = None  # None as long as the messages don't settle the first part
    text: str = ""
    is_linked: bool = True


@dataclass(slots=True, eq=False)
class _Root(_Node):
    """The settings of a call; below it are the chats that were rendered with them."""

    place: tuple[_Template, bytes] = field(kw_only=True)
    names: Names = field(kw_only=True)
    scope: str | None = None
    is_volatile: bool = False  # the first part of the template runs every time


@dataclass(slots=True, eq=False)
class _Template:
    """A template, taken apart when it is used again; `why_not` is the reason if it can't be."""

    parts: Parts | None = None
    running: Any = None  # the module, which needs jinja2
    why_not: str = "new_template"
    # Answers still to be compared: of chats not known before, and of others.
    n_to_probe: list[int] = field(default_factory=lambda: [_N_PROBED, _N_PROBED])
    # Of renderings whose first part ran: how many, their messages, and those that were known.
    n_volatile: int = 0
    n_messages: int = 0
    n_known: int = 0


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat to render: the messages, and all that the template may read besides.

    `compile` returns what transformers compiles of a template, `normalise` what it makes of a
    message before it renders it; `plain` renders the chat with transformers.
    """

    messages: Sequence[Any]
    template: str
    settings: Names
    compile: Callable[[str], Template]
    normalise: Callable[[dict[str, Any]], Any]
    plain: Callable[[], str]


class RenderCache:
    """Renders chats, from the text of earlier ones where it is known to be the same.

    Threads: safe, and after fork; the child's cache is empty.
    """

    def __init__(self, max_bytes: int, verify_rate: float) -> None:
        self._max_bytes = max_bytes
        self._verify_rate = verify_rate
        self._rng = random.Random()  # noqa: S311 (a draw, not a secret)
        self._counts: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        self.is_off = max_bytes == 0
        self._n_clears = 0
        self.after_fork()
        call_in_child(self.after_fork)

    def after_fork(self) -> None:
        """Start empty: another thread of the parent may have been changing the tree."""
        self._lock = threading.Lock()
        self._templates: OrderedDict[str, _Template] = OrderedDict()
        self._roots: dict[tuple[_Template, bytes], _Root] = {}
        # The nodes with none below them, the least recently used first.
        self._leaves: OrderedDict[_Node, None] = OrderedDict()
        self._n_nodes = self._n_bytes = 0

    def refuse(self, reason: str) -> None:
        """Count a chat that transformers renders, and why."""
        with self._lock:
            self._refusals[reason] += 1

    def clear(self) -> None:
        """Remove all entries and counters."""
        with self._lock:
            self._n_clears += 1
            self.is_off = self._max_bytes == 0
            self._templates.clear()
            self._roots.clear()
            self._leaves.clear()
            self._n_nodes = self._n_bytes = 0
            self._counts.clear()
            self._refusals.clear()

    def clear_scope(self, scope: str) -> None:
        """Remove the entries of one scope."""
        with self._lock:
            self._n_clears += 1
            below: list[_Node] = [root for root in self._roots.values() if root.scope == scope]
            for node in below:  # grows as it is walked
                below += node.children.values()
            for node in reversed(below):
                self._remove(node)

    def stats(self) -> RenderStats:
        """Return a snapshot of the counters."""
        with self._lock:
            return RenderStats(
                **self._counts,
                refusals=dict(self._refusals),
                n_entries=self._n_nodes,
                n_bytes=self._n_bytes,
            )

    # ---- rendering

    def render(self, chat: Chat, scope: str | None) -> str | None:
        """Return a chat's text; None if transformers has to render it, the reason is counted."""
        messages = list(chat.messages)
        try:
            template = self._template(chat)
            if template.parts is None:
                self.refuse(template.why_not)
                return None
            text, is_known = self._render(template, chat, messages, scope)
            is_probe = template.n_to_probe[is_known] > 0
            if not is_probe and self._rng.random() >= self._verify_rate:
                return text
            template.n_to_probe[is_known] -= is_probe
            plain = self._plain(chat)
            if text != plain and template.parts.has_clock:  # it may have changed between the two
                text, plain = self._render(template, chat, messages, scope)[0], self._plain(chat)
            if text != plain:
                self._turn_off()
        except Exception as error:  # noqa: BLE001 (transformers raises its own, or answers)
            self.refuse(getattr(error, "reason", "failed"))
            return None
        return plain

    def _plain(self, chat: Chat) -> str:
        """Return the text by transformers; if that fails where we did not, the answers differ."""
        self.refuse("verified")
        try:
            return chat.plain()
        except BaseException:
            self._turn_off()
            raise

    def _turn_off(self) -> None:
        self.clear()
        self.is_off = True
        self.refuse("differences")
        _log.error(
            "tokcache rendered a chat otherwise than transformers, which renders all chats of this "
            "tokenizer from now on; please report it, with the chat template"
        )

    def _template(self, chat: Chat) -> _Template:
        """Return a template, taken apart when it is used for the second time.

        That costs several times what transformers needs to compile it.
        """
        with self._lock:
            found = self._templates.get(chat.template)
            if found is None:
                while len(self._templates) >= _MAX_TEMPLATES:
                    self._templates.popitem(last=False)
                self._templates[chat.template] = _Template()
                return _Template()
        if found.parts is None and found.why_not == "new_template":
            from tokcache.text.chat import rewrite, running  # noqa: PLC0415 (they need jinja2)

            found.running, found.why_not = running, "failed"
            try:
                found.parts = rewrite.take_apart(chat.compile(chat.template), chat.template)
            except TemplateNotTaken as error:
                found.why_not = str(error)
        return found

    def _render(
        self, template: _Template, chat: Chat, messages: list[Any], scope: str | None
    ) -> tuple[str, bool]:
        """Return a chat's text, and whether some of its messages were known."""
        parts, running = template.parts, template.running
        assert parts is not None  # noqa: S101 (for the type checker)
        root, n_clears = self._root(template, parts, chat.settings, scope)
        names = {**root.names, "add_generation_prompt": chat.settings["add_generation_prompt"]}
        # From here on the messages are those of the keys: other threads may change the dicts.
        keys = _keys_of(messages)
        normalised: dict[int, Any] = {}

        def message(number: int) -> Any:
            """Return a message as transformers passes it to the template."""
            if number not in normalised:
                key = keys[number]
                own = loads(key) if isinstance(key, bytes) else dict(key)  # noqa: S302 (ours)
                normalised[number] = chat.normalise(own)
            return normalised[number]

        def new_run() -> Run:
            run: Run = running.Run(message, len(keys), parts.environment.undefined)
            return run

        head_key = b""
        known = [] if root.is_volatile else self._walk(root, b"", keys)
        head = known[-1].head if known else None
        if head is None:
            head = running.run_head(parts, names, new_run())
            if root.is_volatile or head.n_needed >= running.UNSETTLED:
                root.is_volatile = True
                head = replace(head, n_needed=0)
                head_key = running.key_of(head)
                known = self._walk(root, head_key, keys)
        n_old = known[-1].depth if known else 0
        for key in keys[n_old:]:
            if isinstance(key, bytes) and not _is_plain(loads(key)):  # noqa: S302 (ours)
                raise RenderingRefused("type")
        point = known[-1].point if known else None
        text, points, tail = running.run_rest(parts, names, new_run(), head, point)
        before = "".join([node.text for node in known]) if known else head.text
        n_known = point.n_done if point is not None else 0
        numbered = [*enumerate(keys[n_old:], n_old + 1)]
        if not known:
            numbered.insert(0, (0, head_key))
        grown = _grown(running, head, points, text, numbered)
        with self._lock:
            self._count(template, len(keys), n_known, is_volatile=root.is_volatile)
            refusal = self._insert(known[-1] if known else root, n_clears, grown)
            if refusal:
                self._refusals[refusal] += 1
        return before + text + tail, n_known > 0

    def _count(
        self, template: _Template, n_messages: int, n_known: int, *, is_volatile: bool
    ) -> None:
        self._counts["hits" if n_known else "misses"] += 1
        self._counts["messages"] += n_messages
        self._counts["hit_messages"] += n_known
        if is_volatile:
            template.n_volatile += 1
            template.n_messages += n_messages
            template.n_known += n_known
            if template.n_volatile >= _N_TRIED and template.n_known * 3 < template.n_messages:
                template.parts, template.why_not = None, "no_gain"

    # ---- the tree

    def _root(
        self, template: _Template, parts: Parts, settings: Names, scope: str | None
    ) -> tuple[_Root, int]:
        """Return the root of the chats with these settings, and the number of clears so far."""
        if not parts.reads_prompt:
            settings = {**settings, "add_generation_prompt": None}
        key = _frozen((scope, settings))
        with self._lock:
            root = self._roots.get((template, key))
            if root is None:
                # Made of the bytes, so that nobody else can change it.
                own = loads(key)[1]  # noqa: S302 (made above)
                if not _is_plain(own):
                    raise RenderingRefused("type")
                names = {**parts.names, **own}
                root = _Root(key, place=(template, key), names=names, scope=scope)
                root.n_bytes = _NODE_BYTES + 4 * len(key)
                self._make_room(root.n_bytes)
                self._roots[template, key] = root
                self._leaves[root] = None
                self._n_nodes += 1
                self._n_bytes += root.n_bytes
            return root, self._n_clears

    def _walk(self, root: _Root, head_key: bytes, keys: list[_Key]) -> list[_Node]:
        """Return the nodes of a chat that have a point, down to the last that is known."""
        path: list[_Node] = []
        with self._lock:
            node = root.children.get(head_key) if head_key else root
            if node is None:
                return path
            path.append(node)
            for key in keys:
                node = node.children.get(key)
                if node is None:
                    break
                path.append(node)
            if path[-1] in self._leaves:
                self._leaves.move_to_end(path[-1])
        return path if path[0].point is not None else [n for n in path if n.point is not None]

    def _insert(self, node: _Node, n_clears: int, grown: list[_Node]) -> str:
        """Link new nodes, each below the one before and the first below `node`.

        Return the reason if they are not kept. The lock is held.
        """
        n_bytes = sum([new.n_bytes for new in grown])
        if n_bytes > self._max_bytes // 2:
            return "oversize"
        self._make_room(n_bytes)
        if n_clears != self._n_clears or not node.is_linked:
            return "cleared"
        for new in grown:
            is_root = new.depth == 0 and not new.key
            found = node if is_root else node.children.get(new.key)
            if found is None:
                node.children[new.key] = found = new
                new.parent = node
                self._leaves.pop(node, None)
                self._leaves[new] = None
                self._n_nodes += 1
                self._n_bytes += new.n_bytes
                self._counts["insertions"] += 1
            elif found.point is None:
                found.head, found.point, found.text = new.head, new.point, new.text
                found.n_bytes += new.n_bytes
                self._n_bytes += new.n_bytes
            node = found
        return ""

    def _make_room(self, n_bytes: int) -> None:
        while self._leaves and self._n_bytes + n_bytes > self._max_bytes:
            self._remove(next(iter(self._leaves)))
            self._counts["evictions"] += 1

    def _remove(self, node: _Node) -> None:
        """Remove a node that has none below it."""
        del self._leaves[node]
        node.is_linked = False
        self._n_nodes -= 1
        self._n_bytes -= node.n_bytes
        if isinstance(node, _Root):
            del self._roots[node.place]
        elif node.parent is not None:
            del node.parent.children[node.key]
            if not node.parent.children:
                self._leaves[node.parent] = None
                self._leaves.move_to_end(node.parent, last=False)


def _grown(
    running: Any, head: Head, points: list[Point], text: str, keys: list[tuple[int, _Key]]
) -> list[_Node]:
    """Return a node for each message that is new, with the text that it settles.

    `text` is that of the iterations from `points[0]` on.
    """
    made = []
    last, following = points[0], points[1:]
    is_first = bool(keys) and keys[0][0] == 0
    for depth, key in keys:
        node = _Node(key, depth=depth)
        made.append(node)
        node.n_bytes = _NODE_BYTES + (
            len(key)
            if isinstance(key, bytes)
            else sum([getsizeof(value) + 120 for _, value in key])  # with the tuples
        )
        if depth < head.n_needed:
            continue
        point = last
        while following and following[0].n_needed <= depth:
            following, new = following[1:], following[0]
            try:
                node.n_bytes += sum([running.data_size(space) for space in new.spaces])
            except TemplateUnusual:  # not a state to go on from
                continue
            point = new
        node.head, node.point = head, point
        node.text = text[last.at : point.at]
        if is_first:
            node.text = head.text + node.text
            node.n_bytes += head.n_bytes
            is_first = False
        node.n_bytes += getsizeof(node.text)
        last = point
    return made


def _frozen(value: Any) -> bytes:
    """Return a value as bytes: equal only if all values, their types and their order are.

    Only objects with a buffer look like others, so new ones are checked as `loads` returns them.
    """
    try:
        return dumps(value, 0)  # this version has no references, which depend on objects' identity
    except ValueError:
        raise RenderingRefused("type") from None


def _keys_of(messages: list[Any]) -> list[_Key]:
    """Return a key of each message."""
    keys: list[_Key] = []
    for message in messages:
        if type(message) is not dict:
            raise RenderingRefused("type")
        items = tuple(message.items())
        for name, value in items:
            if type(value) is not str or type(name) is not str:
                keys.append(_frozen(message))
                break
        else:
            keys.append(items)
    return keys


def _is_plain(value: Any) -> bool:
    """Return whether a value consists of JSON's types alone, and of tuples."""
    kind = type(value)
    if kind is dict:
        return all(type(name) is str for name in value) and all(map(_is_plain, value.values()))
    if kind is list or kind is tuple:
        return all(map(_is_plain, value))
    return kind in _SCALARS
