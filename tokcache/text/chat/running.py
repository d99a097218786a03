"""Runs the parts of a chat template, and watches which messages each iteration depends on.

Templates reach the messages only through `Watched` and `Loop`. Both count how many messages a chat
must have before a longer chat could not change anything that was read; then it is *settled*.
Messages are numbered from 0. Reading message 3 is settled by 4 messages. Learning that it is not
the last is settled by 5. Learning that it is the last, or how many there are, can change with the
next message, so no number settles it (`NEVER_SETTLED`). The text of a settled iteration belongs to
every longer chat, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from marshal import dumps, loads
from sys import getsizeof
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Undefined
from jinja2.runtime import Macro
from jinja2.utils import Namespace

from tokcache.errors import TemplateUnusual
from tokcache.text.chat.rewrite import CLOCK, LOOP, OVER, STEPS

if TYPE_CHECKING:
    from tokcache.text.chat.rewrite import Parts

NEVER_SETTLED = 1 << 60  # more messages than any chat has
_MAX_TAIL_BYTES = 256  # a longer text of the last part is not kept
Names = dict[str, Any]
# A chat's messages as bytes, end to end, and where each of them ends.
Frozen = tuple[bytes, tuple[int, ...]]


class Run:
    """One rendering of a chat, whose messages are made of its bytes.

    `n_needed` messages settle everything that was read so far.
    """

    __slots__ = ("_ends", "_keys", "_made", "_normalise", "n_messages", "n_needed", "undefined")

    def __init__(
        self, frozen: Frozen, normalise: Callable[[dict[str, Any]], Any], undefined: type[Undefined]
    ) -> None:
        self._keys, self._ends = frozen
        self._normalise = normalise
        self._made: dict[int, Any] = {}
        self.n_messages = len(self._ends)
        self.n_needed = 0
        self.undefined = undefined

    def message(self, number: int) -> Any:
        """Return a message as transformers passes it to the template."""
        made = self._made.get(number)
        if made is None:
            begin = self._ends[number - 1] if number else 0
            own = loads(self._keys[begin : self._ends[number]])  # noqa: S302 (made by us)
            made = self._made[number] = self._normalise(own)
        return made

    def need(self, n_messages: int) -> None:
        """Note that something was read that is settled once the chat has `n_messages` messages."""
        self.n_needed = max(self.n_needed, n_messages)


def _refuse(*_: object) -> Any:
    raise TemplateUnusual


class Watched:
    """The list of the messages from `start` on; it refuses operations that can't be watched."""

    __slots__ = ("_run", "_start")

    def __init__(self, run: Run, start: int) -> None:
        self._run = run
        self._start = start

    def __getitem__(self, index: Any) -> Any:
        run, start = self._run, self._start
        if type(index) is int and index >= 0:
            number = start + index
            if number < run.n_messages:
                run.need(number + 1)
                return run.message(number)
            run.need(NEVER_SETTLED)
            raise IndexError(index)
        if isinstance(index, slice):
            first = 0 if index.start is None else index.start
            is_simple = index.step in (None, 1) and type(first) is int and first >= 0
            if is_simple and index.stop is None:
                return Watched(run, start + first)
            stop = index.stop
            if is_simple and type(stop) is int and stop >= 0:
                run.need(start + stop if start + stop <= run.n_messages else NEVER_SETTLED)
                numbers = range(start, run.n_messages)[first:stop]
                return [run.message(number) for number in numbers]
        elif type(index) is not int:
            raise TemplateUnusual
        return self.whole()[index]  # from the end, or with steps

    def whole(self) -> list[Any]:
        """Return the list itself; only the chat's end settles it."""
        run = self._run
        run.need(NEVER_SETTLED)
        return [run.message(number) for number in range(self._start, run.n_messages)]

    def __len__(self) -> int:
        self._run.need(NEVER_SETTLED)
        return max(0, self._run.n_messages - self._start)

    def __bool__(self) -> bool:
        is_true = self._run.n_messages > self._start
        self._run.need(self._start + 1 if is_true else NEVER_SETTLED)
        return is_true

    def __iter__(self) -> Iterator[Any]:
        run = self._run
        for number in range(self._start, run.n_messages):
            run.need(number + 1)
            yield run.message(number)
        run.need(NEVER_SETTLED)

    def __reversed__(self) -> Iterator[Any]:
        yield from reversed(self.whole())

    def __contains__(self, value: object) -> bool:
        return value in self.whole()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise TemplateUnusual

    __add__ = __radd__ = __mul__ = __rmul__ = __str__ = __repr__ = __format__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse


class Loop:
    """The `loop` that a template sees while it goes over the messages from `start` on."""

    depth = 1
    depth0 = 0

    def __init__(self, run: Run, start: int) -> None:
        self._run = run
        self.start = start

    def go_to(self, index: int) -> None:
        """Go to an iteration."""
        self.index0 = index
        self.index = index + 1
        self.first = index == 0

    @property
    def last(self) -> bool:
        """Whether there is no later message, as far as the chat goes now."""
        number = self.start + self.index0 + 1
        is_last = number >= self._run.n_messages
        self._run.need(NEVER_SETTLED if is_last else number + 1)
        return is_last

    @property
    def length(self) -> int:
        """The number of messages of the loop."""
        self._run.need(NEVER_SETTLED)
        return self._run.n_messages - self.start

    @property
    def revindex(self) -> int:
        """The number of messages left, this one included."""
        return self.length - self.index0

    @property
    def revindex0(self) -> int:
        """The number of messages left."""
        return self.length - self.index

    @property
    def previtem(self) -> Any:
        """The message before."""
        if self.first:
            return self._run.undefined("there is no previous item")
        return self._run.message(self.start + self.index0 - 1)

    @property
    def nextitem(self) -> Any:
        """The message after."""
        if self.last:
            return self._run.undefined("there is no next item")
        return self._run.message(self.start + self.index0 + 1)

    def cycle(self, *values: Any) -> Any:
        """Return the values in turn."""
        if not values:
            raise TemplateUnusual
        return values[self.index0 % len(values)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise TemplateUnusual

    __call__ = __len__ = __iter__ = __bool__ = __str__ = __repr__ = __format__ = _refuse
    __eq__ = __ne__ = __hash__ = _refuse


@dataclass(frozen=True, slots=True)
class Head:
    """The result of a template's first part: its text, and the values of its variables.

    `values` are data. `lists` has, for each variable that holds the messages from a number on, that
    number. `spaces` are the namespaces, the only objects that a template can change; each with the
    variables that hold it and its first attributes. `tails` are the texts of the last part for
    `add_generation_prompt` True and False, if they depend on nothing else; `n_bytes` counts both.
    """

    text: str
    values: Names
    lists: dict[str, int]
    spaces: tuple[tuple[tuple[str, ...], Names], ...]
    n_needed: int
    start: int
    n_bytes: int
    tails: dict[bool, str] = field(default_factory=dict)


class Point(NamedTuple):
    """A place between two iterations, at which a later rendering may go on.

    Units: `n_done` iterations have run and `n_needed` messages settle them; `at` is the number of
    characters of the loop's text before this place.
    """

    n_done: int
    n_needed: int
    at: int
    spaces: tuple[Names, ...]


def run_head(parts: Parts, settings: Names, run: Run) -> Head:
    """Run the first part of a template; `settings` has the environment's globals, too.

    Errors: TemplateUnusual; every error of the template.
    """
    names = {**settings, "messages": Watched(run, 0)}
    _watch_clock(parts, names, run)
    context = parts.environment.context_class(parts.environment, names, None, {})
    text = "".join(parts.head.root_render_func(context))
    n_bytes = 2 * getsizeof(text)  # and once more in its key
    if parts.tail is not None:
        n_bytes += 2 * _MAX_TAIL_BYTES
    values: Names = {}
    lists: dict[str, int] = {}
    spaces: dict[int, tuple[list[str], Names]] = {}
    for name, value in context.vars.items():
        if type(value) is Watched:
            lists[name] = value._start  # noqa: SLF001 (ours)
        elif isinstance(value, Namespace):
            attributes = vars_of(value)
            spaces.setdefault(id(value), ([], dict(attributes)))[0].append(name)
            n_bytes += data_size(attributes)
        elif not isinstance(value, Macro):
            values[name] = value
            n_bytes += 0 if isinstance(value, Undefined) else data_size(value)
    start = lists.pop(OVER, None)
    if start is None:
        raise TemplateUnusual
    if "messages" not in context.vars:
        lists["messages"] = 0
    kept = tuple((tuple(names), attributes) for names, attributes in spaces.values())
    return Head(text, values, lists, kept, run.n_needed, start, n_bytes)


def run_rest(
    parts: Parts, settings: tuple[Names, Any], run: Run, head: Head, point: Point | None
) -> tuple[str, list[Point], str]:
    """Run the loop from a point on, and the last part.

    `settings` are the names with their values, and `add_generation_prompt`. Return the loop's text,
    the points between iterations, and the last part's text.

    Errors: TemplateUnusual; every error of the template.
    """
    names, prompt = settings
    names = {**names, "add_generation_prompt": prompt, **head.values}
    for name, start in head.lists.items():
        names[name] = Watched(run, start)
    spaces: list[Namespace] = []
    if head.spaces:
        space_class: Any = parts.names["namespace"]
        firsts = [first for _, first in head.spaces] if point is None else point.spaces
        spaces = [space_class(each) for each in firsts]
        for (own_names, _), space in zip(head.spaces, spaces, strict=True):
            names.update(dict.fromkeys(own_names, space))
    if parts.has_clock:
        _watch_clock(parts, names, run)

    chunks: list[str] = []
    points: list[Point] = []
    n_done, run.n_needed = (0, head.n_needed) if point is None else (point.n_done, point.n_needed)
    names[LOOP] = loop = Loop(run, head.start)
    names[STEPS] = _steps(run, loop, n_done, (spaces, chunks, points))
    environment = parts.environment
    context = environment.context_class(environment, names, None, {})
    for chunk in parts.body.root_render_func(context):
        chunks.append(chunk)  # noqa: PERF402 (`_steps` reads the list)

    tail = ""
    if parts.tail is not None:
        # A tail that reads no message and no namespace is the same for every chat with this head.
        is_kept = type(prompt) is bool and not spaces
        known_tail = head.tails.get(prompt) if is_kept else None
        if known_tail is None:
            run.n_needed = 0
            context = environment.context_class(environment, names, None, {})
            known_tail = "".join(parts.tail.root_render_func(context))
            if is_kept and not run.n_needed and getsizeof(known_tail) <= _MAX_TAIL_BYTES:
                head.tails[prompt] = known_tail
        tail = known_tail
    return "".join(chunks), points, tail


def _steps(
    run: Run, loop: Loop, n_done: int, noted: tuple[list[Namespace], list[str], list[Point]]
) -> Iterator[Any]:
    """Yield the messages of the loop, and add the points between them to the last list."""
    spaces, chunks, points = noted
    first = loop.start
    n_items = run.n_messages - first
    at = n_counted = 0
    index = n_done
    while True:
        if run.n_needed < NEVER_SETTLED:
            n_chunks = len(chunks)
            while n_counted < n_chunks:
                at += len(chunks[n_counted])
                n_counted += 1
            states = tuple([dict(vars_of(space)) for space in spaces]) if spaces else ()
            points.append(Point(index, run.n_needed, at, states))
        if index >= n_items:
            return
        loop.go_to(index)
        run.need(first + index + 1)
        yield run.message(first + index)
        index += 1


def key_of(head: Head) -> bytes:
    """Return a first part's result as bytes, equal only for equal results.

    Errors: TemplateUnusual if it holds something else than data.
    """
    try:  # version 0 has no references to equal objects, so equal values are equal bytes
        return dumps((head.text, head.values, head.lists, head.spaces, head.start), 0)
    except ValueError:
        raise TemplateUnusual from None


def data_size(value: Any) -> int:
    """Return about how many bytes a value takes.

    Errors: TemplateUnusual if it holds an object that is not data: it may keep a state.
    """
    try:
        return len(dumps(value, 0))
    except ValueError:
        raise TemplateUnusual from None


def vars_of(space: Namespace) -> Names:
    """Return the attributes of a namespace."""
    found: Names = getattr(space, "_Namespace__attrs")  # noqa: B009 (there is no other way)
    return found


def _watch_clock(parts: Parts, names: Names, run: Run) -> None:
    """Replace the clock by one that notes when it is read: no later text has that time.

    A clock that the caller passed is left alone.
    """
    if not parts.has_clock or CLOCK not in parts.names or names[CLOCK] is not parts.names[CLOCK]:
        return
    clock: Callable[..., Any] = names[CLOCK]

    def watched_clock(*args: Any, **kwargs: Any) -> Any:
        run.need(NEVER_SETTLED)
        return clock(*args, **kwargs)

    names[CLOCK] = watched_clock
