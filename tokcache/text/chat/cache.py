"""RenderCache: the text of chats that have been rendered before, for chats that grow.

1. A chat's messages are frozen to bytes, as one list; the settings of the call (template, tools,
   special tokens and so on) as well. Values of other types than JSON's are not cached.
2. The tree of chats with these settings is walked as far as the chat is known. What is found there
   is its text, and the state of the template at that point.
3. The template goes on from there: only the new messages are run, and the template's last part.
4. The tree takes what has been rendered, as far as `running` has seen that it is settled.

Implementation: the entry of the first n messages has all text that n messages settle. A template
that looks at the next message leaves the last message's text to the next entry. Where the part of a
template before its loop reads all messages (to find the last question, say) or the clock, that part
runs for every call, and its result is part of the key.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from marshal import loads
from typing import TYPE_CHECKING, Any, NamedTuple

from tokcache._forks import call_in_child
from tokcache.errors import RenderingRefused, TemplateNotTaken, TemplateUnusual
from tokcache.stats import RenderStats
from tokcache.text import _implementation as implementation
from tokcache.text.chat.tree import NO_MESSAGE, ChatTree, Found, Node, Root, Stretch

if TYPE_CHECKING:
    from jinja2 import Template

    from tokcache.text.chat.rewrite import Parts
    from tokcache.text.chat.running import Frozen, Head, Point

_log = logging.getLogger("tokcache")

_N_PROBED = 2  # the first answers of a template are compared with transformers' own
_MAX_TEMPLATES = 64
_N_TRIED = 64  # renderings after which a template must have gained something


@dataclass(slots=True, eq=False)
class CachedTemplate:
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


class Chat(NamedTuple):
    """A chat to render: its messages, and all that the template may read besides.

    `arguments` are those passed on to the template, without the ones that have fields here.
    `normalise` returns what transformers makes of a message before it renders it; `plain` renders
    the chat with transformers.
    """

    messages: Sequence[Any]
    special_tokens: dict[str, str]
    arguments: dict[str, Any]
    tools: Any
    documents: Any
    add_generation_prompt: Any
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
        self.is_off = max_bytes == 0
        self.after_fork()
        call_in_child(self.after_fork)

    def after_fork(self) -> None:
        """Start empty: another thread of the parent may have been changing the tree."""
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        self._templates: OrderedDict[str, CachedTemplate] = OrderedDict()
        # A rendering that goes on while the cache is cleared adds its text to the old tree.
        self._tree = ChatTree(self._max_bytes)
        self._refusals: Counter[str] = Counter()
        self._n_hits = self._n_misses = self._n_messages = self._n_known = 0

    def refuse(self, reason: str) -> None:
        """Count a chat that transformers renders, and why."""
        with self._lock:
            self._refusals[reason] += 1

    def clear(self) -> None:
        """Remove all entries and counters."""
        with self._lock:
            self.is_off = self._max_bytes == 0
            self._start()

    def clear_scope(self, scope: str) -> None:
        """Remove the entries of one scope."""
        with self._lock:
            roots = self._tree.roots.values()
            below: list[Node] = [root for root in roots if root.scope == scope]
            for node in below:  # grows as it is walked
                below += node.children.values()
            for node in reversed(below):
                self._tree.remove(node)

    def stats(self) -> RenderStats:
        """Return a snapshot of the counters."""
        with self._lock:
            return RenderStats(
                hits=self._n_hits,
                misses=self._n_misses,
                messages=self._n_messages,
                hit_messages=self._n_known,
                insertions=self._tree.n_insertions,
                evictions=self._tree.n_evictions,
                refusals=dict(self._refusals),
                n_entries=self._tree.n_entries,
                n_bytes=self._tree.n_bytes,
            )

    # ---- rendering

    def template(
        self, source: str, compile_template: Callable[[str], Template]
    ) -> CachedTemplate | None:
        """Return a template; None if it is left to transformers, the reason is counted.

        It is taken apart when it is used for the second time: that costs several times what
        transformers needs to compile it.
        """
        found = self._templates.get(source)
        if found is None:
            with self._lock:
                while len(self._templates) >= _MAX_TEMPLATES:
                    self._templates.popitem(last=False)
                self._templates[source] = CachedTemplate()
            self.refuse("new_template")
            return None
        if found.parts is None:
            if found.why_not == "new_template":
                _take_apart(found, source, compile_template)
            if found.parts is None:
                self.refuse(found.why_not)
                return None
        return found

    def render(self, template: CachedTemplate, chat: Chat, scope: str | None) -> str | None:
        """Return a chat's text; None if transformers has to render it, the reason is counted."""
        try:
            frozen = implementation.freeze_messages(chat.messages)
            text, is_known = self._render(template, chat, frozen, scope)
            is_probe = template.n_to_probe[is_known] > 0
            if not is_probe and (not self._verify_rate or self._rng.random() >= self._verify_rate):
                return text
            plain = self._plain(chat)
            template.n_to_probe[is_known] -= is_probe
            has_clock = template.parts is not None and template.parts.has_clock
            if text != plain and has_clock:  # it may have changed between the two
                text, _ = self._render(template, chat, frozen, scope)
                plain = self._plain(chat)
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
        except Exception:  # an interruption or a cancellation says nothing about the text
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

    def _render(
        self, template: CachedTemplate, chat: Chat, frozen: Frozen, scope: str | None
    ) -> tuple[str, bool]:
        """Return a chat's text, and whether some of its messages were known."""
        parts, running = template.parts, template.running
        if parts is None:  # another thread has given the template up meanwhile
            raise RenderingRefused(template.why_not)
        prompt = chat.add_generation_prompt
        settings = (
            *(scope, chat.special_tokens, chat.arguments, chat.tools, chat.documents),
            prompt if parts.reads_prompt else None,
        )
        place = template, implementation.freeze(settings)
        keys, ends = frozen
        with self._lock:
            tree = self._tree
            root = tree.roots.get(place) or _new_root(tree, parts, place)
            top: Node = root
            found = None if root.is_volatile else tree.find(root, keys, ends)
        run = running.Run(frozen, chat.normalise, parts.environment.undefined)
        head = found.head if found else None
        if head is None:
            head = running.run_head(parts, {**root.names, "add_generation_prompt": prompt}, run)
        if found is None or head.n_needed >= running.NEVER_SETTLED:
            root.is_volatile = True
            head = replace(head, n_needed=0)
            head_key = running.key_of(head)
            with self._lock:
                top = root.children.get(head_key) or Node(head_key, NO_MESSAGE)
                found = tree.find(top, keys, ends)
            head = found.head or head

        point = found.point
        names = root.names, prompt
        text, points, tail = running.run_rest(parts, names, run, head, point)
        n_known = 0 if point is None else point.n_done
        state, new = _grown(running.data_size, head, points, text, (found, keys, ends))
        with self._lock:
            self._count(template, len(ends), n_known, is_volatile=root.is_volatile)
            refusal = tree.put_top(top, root, state) if state else ""
            if new and not refusal:
                refusal = tree.add(top, found, new, keys, ends)
            if refusal:
                self._refusals[refusal] += 1
        before = [head.text] if point is None else found.texts
        return "".join([*before, text, tail]), n_known > 0

    def _count(
        self, template: CachedTemplate, n_messages: int, n_known: int, *, is_volatile: bool
    ) -> None:
        if n_known:
            self._n_hits += 1
        else:
            self._n_misses += 1
        self._n_messages += n_messages
        self._n_known += n_known
        if is_volatile:
            template.n_volatile += 1
            template.n_messages += n_messages
            template.n_known += n_known
            if template.n_volatile >= _N_TRIED and template.n_known * 3 < template.n_messages:
                template.parts, template.why_not = None, "no_gain"


def _take_apart(
    template: CachedTemplate, source: str, compile_template: Callable[[str], Template]
) -> None:
    from tokcache.text.chat import rewrite, running  # noqa: PLC0415 (they need jinja2)

    template.running = running
    try:
        template.parts = rewrite.take_apart(compile_template(source), source)
    except TemplateNotTaken as error:
        template.why_not = str(error)
    except Exception:  # noqa: BLE001 (transformers raises it again)
        template.why_not = "failed"


def _new_root(tree: ChatTree, parts: Parts, place: tuple[CachedTemplate, bytes]) -> Root:
    """Return a new root, which is in the tree. The lock is held.

    Its values are made of the bytes, so that nobody else can change them.

    Errors: RenderingRefused if they do not fit into the budget.
    """
    scope, special_tokens, arguments, tools, documents, prompt = loads(place[1])  # noqa: S302
    names = {**parts.names, **special_tokens, **arguments, "tools": tools, "documents": documents}
    names["add_generation_prompt"] = prompt
    stretch = NO_MESSAGE._replace(n_state_bytes=5 * len(place[1]))
    root = Root(b"", stretch, place=place, names=names, scope=scope)
    if refusal := tree.add_root(root):
        raise RenderingRefused(refusal)
    return root


def _grown(
    data_size: Callable[[Any], int],
    head: Head,
    points: list[Point],
    text: str,
    chat: tuple[Found, bytes, tuple[int, ...]],
) -> tuple[Stretch | None, Stretch | None]:
    """Return the state before the first message, if it is new, and the messages that are new.

    `text` is that of the iterations from `points[0]` on; `chat` tells how far the chat was known,
    its messages as bytes, and where each ends.
    """
    found, keys, ends = chat
    state, before, n_state_bytes = None, "", 0
    last = points[0]
    if found.point is None:
        n_state_bytes = head.n_bytes + sum(map(data_size, last.spaces))
        if head.n_needed:
            before = head.text
        else:
            cut = len(head.text)
            state = NO_MESSAGE._replace(
                points=(last,), cuts=(cut,), text=head.text, head=head, n_state_bytes=n_state_bytes
            )
            n_state_bytes = 0
    n_known = found.n_messages
    if n_known == len(ends):
        return state, None

    settled, cut, n_used = found.point, 0, 1
    made, cuts = [], []
    for depth in range(n_known + 1, len(ends) + 1):
        if depth >= head.n_needed:
            while n_used < len(points) and points[n_used].n_needed <= depth:
                try:
                    n_state_bytes += sum(map(data_size, points[n_used].spaces))
                    last = points[n_used]
                except TemplateUnusual:  # not a state to go on from
                    pass
                n_used += 1
            settled, cut = last, len(before) + last.at
        made.append(settled)
        cuts.append(cut)
    begin = ends[n_known - 1] if n_known else 0
    own_ends = tuple([end - begin for end in ends[n_known:]])
    new = Stretch(
        first=n_known + 1,
        keys=keys[begin:],
        ends=own_ends,
        points=tuple(made),
        cuts=tuple(cuts),
        text="" if settled is None else before + text[: last.at],
        head=None if settled is None else head,
        n_state_bytes=n_state_bytes,
    )
    return state, new
