r"""Runs a pattern over the symbols of its alphabet: ordered threads, the most preferred first.

A state is the ordered list of ways in which a match may go on after the characters read. Reading
the next symbol, or the end of the text, tells whether the match is decided:

1. Each thread follows its instructions up to those that read a character. A condition on the next
   character (`$`, `(?!\S)`) is judged with the symbol at hand, the one before it is remembered.
2. A thread that reaches the end of the pattern ends the match before the symbol, and all threads
   after it are dropped, because they are less preferred. Those after a thread that does so whatever
   comes are dropped one symbol earlier.
3. A look-ahead over several characters runs along with its thread. A match with such a look-ahead
   is kept in the list, at its place, until the look-ahead is decided.
4. A state tells few symbols apart: `Program.groups` are the sets of those with the same step.

Source: Russ Cox, "Regular Expression Matching: the Virtual Machine Approach" (2009), Pike's VM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tokcache.errors import Unrecognised
from tokcache.text.cuts.regex.syntax import Chars, Choice, Look, Node, Place, Repeat, Row

if TYPE_CHECKING:
    from tokcache.text.cuts.regex.alphabet import Alphabet

_MAX_INSTRUCTIONS = 4000
_MAX_THREADS = 200
MATCHED = -1  # the `at` of a thread whose match only waits for its look-aheads


class Ahead(NamedTuple):
    """A look-ahead that is not decided yet, and where in it the next symbol may be read."""

    is_negative: bool
    at: frozenset[int]


class Thread(NamedTuple):
    """A way in which a match may go on; `end` orders the ends of those that are MATCHED."""

    at: int
    aheads: frozenset[Ahead]
    end: int


class State:
    """The threads, the most preferred first, and what conditions know of the character before.

    `before` is (is a character of a word, is a newline), or None before the match. Equal states of
    one program are one object, so that they are compared and hashed by identity. `reads` are the
    (symbols, where they lead) of all threads in order, None if a condition decides about one. They
    end with the first thread that ends the match whatever comes. `looks` are the sets of symbols
    that decide about a thread, as bits of `Program._looked_at`.
    """

    __slots__ = ("before", "looks", "reads", "threads")

    def __init__(
        self,
        threads: tuple[Thread, ...],
        before: tuple[bool, bool] | None,
        reads: list[tuple[int, int]] | None,
        looks: int,
    ) -> None:
        self.threads = threads
        self.looks = looks
        self.before = before
        self.reads = reads


class _At:
    """All that is known of a thread at a place of the program that waits for no look-ahead.

    `reads` and `looks` as in State. `always_ends`: it ends the match before any symbol.
    """

    __slots__ = ("always_ends", "looks", "reads", "thread")

    def __init__(self, thread: Thread, reads: list[tuple[int, int]] | None, looks: int) -> None:
        self.thread = thread
        self.reads = reads
        self.looks = looks
        self.always_ends = reads is not None and bool(reads) and reads[-1][1] == MATCHED


class Step(NamedTuple):
    """The state after a symbol, and the end of the match that it decides.

    `end` is None if no match is decided, HERE for one that ends before the symbol, or the `end` of
    a thread that was MATCHED. `ends[i]` is the old end of the threads whose `end` is `i` in the
    new state.
    """

    state: State
    end: int | None
    ends: tuple[int, ...]


HERE = 1 << 30
_NO_AHEADS: frozenset[Ahead] = frozenset()


# Named tuples would be shorter, but each such class takes a quarter of a millisecond to make.


class _Read:
    __slots__ = ("next", "symbols")

    def __init__(self, symbols: int, then: int) -> None:
        self.symbols = symbols
        self.next = then


class _Fork:
    __slots__ = ("targets",)

    def __init__(self, targets: tuple[int, ...]) -> None:
        self.targets = targets


class _Ahead:
    __slots__ = ("is_negative", "next", "start")

    def __init__(self, start: int, is_negative: bool, then: int) -> None:
        self.start = start
        self.is_negative = is_negative
        self.next = then


class _Place:
    __slots__ = ("kind", "next")

    def __init__(self, kind: str, then: int) -> None:
        self.kind = kind
        self.next = then


class _End:
    """The end of the pattern, or of a look-ahead."""


class Program:
    """A pattern as instructions. The symbol `alphabet.n` stands for the end of the text."""

    def __init__(self, node: Node, alphabet: Alphabet) -> None:
        self.alphabet = alphabet
        self.end_of_text = alphabet.n
        self._code: list[_Read | _Fork | _Ahead | _Place | _End] = [_End()]
        self._reads_before = False
        start = self._compile(node, 0)
        self._states: dict[tuple[tuple[Thread, ...], tuple[bool, bool] | None], State] = {}
        self._plain_states: dict[tuple[tuple[int, ...], tuple[bool, bool] | None], State] = {}
        self._places: dict[int, _At] = {}
        self._unconditional: dict[int, list[tuple[int, int]] | None] = {}
        self._looked_at: dict[int, int] = {}  # sets of symbols, and the bit of each
        self._groups: dict[int, list[tuple[int, int]]] = {}
        self.start = self._state((Thread(start, _NO_AHEADS, 0),), None)
        self._followed: dict[tuple[int, object, int], list[tuple[int, frozenset[Ahead]]]] = {}
        self._steps: dict[tuple[State, int], Step] = {}

    def step(self, state: State, symbol: int) -> Step:
        """Return the step from a state by a symbol.

        Errors: Unrecognised if a condition reads the character before the match, for look-aheads
                inside look-aheads, and beyond `_MAX_THREADS`.
        """
        key = state, symbol
        found = self._steps.get(key)
        if found is None:
            if state.reads is None:
                found = self._step(state, symbol)
            else:
                found = self._unconditional_step(state.reads, symbol)
            self._steps[key] = found
        return found

    def groups(self, state: State) -> list[tuple[int, int]]:
        """Return (one symbol, all of them) for each set of symbols with the same step of a state.

        The end of the text is in none of them.
        """
        bits = state.looks
        found = self._groups.get(bits)
        if found is None:
            looked_at = [symbols for symbols, bit in self._looked_at.items() if bits & bit]
            if self._reads_before:  # the state after the symbol remembers these
                looked_at += [self.alphabet.word, self.alphabet.newline]
            by_answers: dict[tuple[bool, ...], list[int]] = {}
            for symbol in self.alphabet.alike:
                answers = tuple(bool(symbols >> symbol & 1) for symbols in looked_at)
                by_answers.setdefault(answers, []).append(symbol)
            alike = self.alphabet.alike
            found = [(own[0], sum(alike[one] for one in own)) for own in by_answers.values()]
            self._groups[bits] = found
        return found

    # ---- compiling

    def _compile(self, node: Node, then: int) -> int:
        """Add the instructions of a node that goes on at `then`; return where it starts."""
        if isinstance(node, Chars):
            return self._add(_Read(self.alphabet.chars[node.query], then))
        if isinstance(node, Row):
            for part in reversed(node.parts):
                then = self._compile(part, then)
            return then
        if isinstance(node, Choice):
            return self._add(_Fork(tuple(self._compile(one, then) for one in node.options)))
        if isinstance(node, Look):
            return self._add(_Ahead(self._compile(node.node, 0), node.is_negative, then))
        if isinstance(node, Place):
            self._reads_before |= node.kind in ("word", "no_word", "line_start")
            return self._add(_Place(node.kind, then))
        return self._compile_repeat(node, then)

    def _compile_repeat(self, node: Repeat, then: int) -> int:
        def fork(again: int) -> int:
            return self._add(_Fork((again, then) if node.is_greedy else (then, again)))

        if node.high is None:
            loop = self._add(_Fork(()))  # filled in below
            body = self._compile(node.node, loop)
            self._code[loop] = _Fork((body, then) if node.is_greedy else (then, body))
            start = loop
        else:
            start = then
            for _ in range(node.high - node.low):
                start = fork(self._compile(node.node, start))
        for _ in range(node.low):
            start = self._compile(node.node, start)
        return start

    def _add(self, instruction: _Read | _Fork | _Ahead | _Place | _End) -> int:
        if len(self._code) == _MAX_INSTRUCTIONS:
            raise Unrecognised(f"more than {_MAX_INSTRUCTIONS} instructions")
        self._code.append(instruction)
        return len(self._code) - 1

    # ---- running

    def _step(self, state: State, symbol: int) -> Step:
        threads: list[Thread] = []
        seen: dict[int, list[frozenset[Ahead]]] = {}
        end = None

        def keep(thread: Thread) -> None:
            # A thread at the same place that waits for less is preferred, whatever comes.
            others = seen.setdefault(thread.at, [])
            if not any(one <= thread.aheads for one in others):
                others.append(thread.aheads)
                threads.append(thread)

        for thread in state.threads:
            aheads = self._advanced(thread.aheads, state.before, symbol)
            if aheads is None:
                continue
            if thread.at == MATCHED:
                followed = [(MATCHED, frozenset[Ahead]())]
            else:
                followed = self._follow(thread.at, state.before, symbol)
            is_last = False
            for at, more in followed:
                waits = aheads | more
                own_end = thread.end if thread.at == MATCHED else HERE
                if at == MATCHED and not waits:
                    end = own_end
                    break
                keep(Thread(at, waits, own_end if at == MATCHED else 0))
                is_last = not waits and self._at(at).always_ends
                if is_last:
                    break
            if is_last or end is not None:
                break
        if len(threads) > _MAX_THREADS:
            raise Unrecognised(f"more than {_MAX_THREADS} threads")
        ends = sorted({thread.end for thread in threads if thread.at == MATCHED})
        ordered = tuple(
            thread._replace(end=ends.index(thread.end)) if thread.at == MATCHED else thread
            for thread in threads
        )
        return Step(self._state(ordered, self._before(symbol)), end, tuple(ends))

    def _unconditional_step(self, reads: list[tuple[int, int]], symbol: int) -> Step:
        """Return the step of a state in which no thread waits and no condition is judged."""
        after = [then for symbols, then in reads if symbols >> symbol & 1]
        end = None
        if after and after[-1] == MATCHED:  # any symbol reads it, and no thread is after it
            end = HERE
            after.pop()
        places = tuple(dict.fromkeys(after))
        if len(places) > _MAX_THREADS:
            raise Unrecognised(f"more than {_MAX_THREADS} threads")
        return Step(self._plain_state(places, self._before(symbol)), end, ())

    def _state(self, threads: tuple[Thread, ...], before: tuple[bool, bool] | None) -> State:
        """Return the one state with these threads."""
        if before is not None and not any(thread.aheads for thread in threads):
            return self._plain_state(tuple(thread.at for thread in threads), before)
        state = self._states.get((threads, before))
        if state is None:
            looks = 0
            for thread in threads:
                if thread.at != MATCHED:
                    looks |= self._at(thread.at).looks
                for ahead in thread.aheads:
                    for at in ahead.at:
                        looks |= self._at(at).looks
            is_waiting = any(thread.aheads for thread in threads)
            reads = None if is_waiting else self._at(threads[0].at).reads  # the start
            state = self._states[threads, before] = State(threads, before, reads, looks)
        return state

    def _plain_state(self, places: tuple[int, ...], before: tuple[bool, bool] | None) -> State:
        """Return the one state of threads that wait for no look-ahead, by their places."""
        state = self._plain_states.get((places, before))
        if state is None:
            threads: list[Thread] = []
            reads: list[tuple[int, int]] = []
            looks = 0
            is_conditional = False
            for at in places:
                found = self._places.get(at) or self._at(at)
                threads.append(found.thread)
                looks |= found.looks
                if found.reads is None:
                    is_conditional = True
                else:
                    reads += found.reads
                    if found.always_ends:
                        break
            if len(threads) < len(places):
                state = self._plain_state(places[: len(threads)], before)
            else:
                state = State(tuple(threads), before, None if is_conditional else reads, looks)
            self._plain_states[places, before] = state
        return state

    def _at(self, at: int) -> _At:
        found = self._places.get(at)
        if found is None:
            reads = self._unconditional_from(at)
            code = self._code[at]
            looked_at = [code.symbols] if isinstance(code, _Read) else self._looked_at_from(at)
            looks = 0
            for one in looked_at:
                looks |= self._looked_at.setdefault(one, 1 << len(self._looked_at))
            found = self._places[at] = _At(Thread(at, _NO_AHEADS, 0), reads, looks)
        return found

    def _looked_at_from(self, at: int) -> set[int]:
        """Return the sets of symbols that decide about a thread here."""
        symbols, seen, rest = set[int](), set[int](), [at]
        while rest:
            here = rest.pop()
            if here in seen:
                continue
            seen.add(here)
            code = self._code[here]
            if isinstance(code, _Read):
                symbols.add(code.symbols)
            elif isinstance(code, _Fork):
                rest.extend(code.targets)
            elif isinstance(code, _Ahead):
                rest += (code.start, code.next)
            elif isinstance(code, _Place):
                is_word = code.kind in ("word", "no_word")
                symbols.add(self.alphabet.word if is_word else self.alphabet.newline)
                rest.append(code.next)
        return symbols

    def _before(self, symbol: int) -> tuple[bool, bool] | None:
        if not self._reads_before:
            return (False, False)
        alphabet = self.alphabet
        return bool(alphabet.word >> symbol & 1), bool(alphabet.newline >> symbol & 1)

    def _follow(
        self, at: int, before: tuple[bool, bool] | None, symbol: int
    ) -> list[tuple[int, frozenset[Ahead]]]:
        """Return where a thread may be after a symbol, and its new look-aheads, in order.

        MATCHED says that the match ends before the symbol.
        """
        key = at, before, symbol
        found = self._followed.get(key)
        if found is not None:
            return found
        reads = self._unconditional_from(at)
        if reads is not None:
            return [(then, _NO_AHEADS) for symbols, then in reads if symbols >> symbol & 1]
        found = []
        seen = set()
        rest: list[tuple[int, frozenset[Ahead]]] = [(at, frozenset())]
        while rest:
            here = rest.pop()
            if here in seen:
                continue
            seen.add(here)
            at, aheads = here
            code = self._code[at]
            if isinstance(code, _End):
                found.append((MATCHED, aheads))
            elif isinstance(code, _Read):
                if code.symbols >> symbol & 1:
                    found.append((code.next, aheads))
            elif isinstance(code, _Fork):
                rest.extend((target, aheads) for target in reversed(code.targets))
            elif isinstance(code, _Place):
                if self._is_true(code.kind, before, symbol):
                    rest.append((code.next, aheads))
            else:
                own = Ahead(code.is_negative, frozenset({code.start}))
                more = self._advanced(frozenset({own}), before, symbol)
                if more is not None:
                    rest.append((code.next, aheads | more))
        self._followed[key] = found
        return found

    def _unconditional_from(self, at: int) -> list[tuple[int, int]] | None:
        """Return the (symbols, where they lead) that may be read from here, in order.

        The end of the pattern is read by any symbol, so it is the last. None if a condition is on
        the way to them.
        """
        if at in self._unconditional:
            return self._unconditional[at]
        code = self._code[at]
        found: list[tuple[int, int]] | None = []
        if isinstance(code, _Read):
            found = [(code.symbols, code.next)]
        else:
            seen, rest = set(), [at]
            while rest and found is not None:
                here = rest.pop()
                if here in seen:
                    continue
                seen.add(here)
                code = self._code[here]
                if isinstance(code, _Fork):
                    rest.extend(reversed(code.targets))
                elif isinstance(code, _Read):
                    found.append((code.symbols, code.next))
                elif isinstance(code, _End):
                    found.append((-1, MATCHED))
                    break
                else:
                    found = None
        self._unconditional[at] = found
        return found

    def _advanced(
        self, aheads: frozenset[Ahead], before: tuple[bool, bool] | None, symbol: int
    ) -> frozenset[Ahead] | None:
        """Return the look-aheads that a symbol does not decide, or None if one of them fails."""
        if not aheads:
            return aheads
        rest = []
        for ahead in aheads:
            next_at: set[int] = set()
            is_found = False
            for at in ahead.at:
                for target, more in self._follow(at, before, symbol):
                    if more:
                        raise Unrecognised("look-ahead of several characters in a look-ahead")
                    is_found |= target == MATCHED or self._ends(target)
                    next_at.add(target)
            if is_found or not next_at:
                if is_found == ahead.is_negative:
                    return None
            else:
                rest.append(Ahead(ahead.is_negative, frozenset(next_at)))
        return frozenset(rest)

    def _ends(self, at: int) -> bool:
        """Return whether the end can be reached from here whatever comes next."""
        rest, seen = [at], set()
        while rest:
            at = rest.pop()
            code = self._code[at]
            if isinstance(code, _End):
                return True
            if isinstance(code, _Fork) and at not in seen:
                seen.add(at)
                rest.extend(code.targets)
        return False

    def _is_true(self, kind: str, before: tuple[bool, bool] | None, symbol: int) -> bool:
        alphabet = self.alphabet
        is_end = symbol == self.end_of_text
        if kind == "end":
            return is_end
        if kind == "line_end":
            return is_end or bool(alphabet.newline >> symbol & 1)
        was_word, was_newline = self.before_match() if before is None else before
        if kind == "line_start":
            return was_newline and not is_end
        is_word = bool(alphabet.word >> symbol & 1)
        return (was_word != is_word) == (kind == "word")

    def before_match(self) -> tuple[bool, bool]:
        """Refuse a condition that reads the character before the match: it may be of another match.

        Errors: Unrecognised, always.
        """
        raise Unrecognised(r"\b or ^ that reads the character before its match")
