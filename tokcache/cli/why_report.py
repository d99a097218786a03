"""Prints what `tokcache why` found, as text for a terminal or as JSON."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from tokcache.cli.explain_report import visible

if TYPE_CHECKING:
    from rich.console import Console

    from tokcache.cli.prompt_tokens import TokenCounts
    from tokcache.differences.classes import Difference, DifferenceClass

_AROUND = 48  # characters shown on each side of a difference
_WORD = 40  # characters up to which the mark grows to whole words
_MARKED = 120  # characters shown of a difference
_STYLES = ("bold red", "bold green")


@dataclass(frozen=True, slots=True)
class Comparison:
    """The first difference between two requests, and its cost.

    `difference` is None for a request with no earlier one to compare it with.
    """

    difference: Difference | None
    n_before: int
    n_after: int
    tokens: TokenCounts | None = None

    def to_dict(self, *, has_text: bool) -> dict[str, Any]:
        """Return the comparison for JSON."""
        found = self.difference
        if found is None:
            return {"class": None}
        shown: dict[str, Any] = {
            "class": found.kind.value,
            "meaning": found.kind.meaning,
            "cure": found.cure,
            "field": found.field,
            "message": found.message,
            "role": found.role,
            "position": found.position,
            "chars": {"shared": found.n_shared, "lost": self.n_lost_chars, "total": self.n_after},
            "tokens": None,
        }
        if self.tokens is not None:
            counts = self.tokens
            shown["tokens"] = {
                "shared": counts.n_shared,
                "lost": counts.n_lost,
                "total": counts.n_tokens,
            }
        if has_text and not found.kind.is_reused:
            shown["before"], shown["after"] = found.before, found.after
        return shown

    @property
    def n_lost_chars(self) -> int:
        """Return the characters behind the difference that would have been reused."""
        return self.difference.n_lost if self.difference is not None else 0

    @property
    def n_lost(self) -> int:
        """Return the lost tokens, or characters without a tokenizer."""
        return self.n_lost_chars if self.tokens is None else self.tokens.n_lost

    @property
    def n_total(self) -> int:
        """Return the tokens of the later prompt, or characters without a tokenizer."""
        return self.n_after if self.tokens is None else self.tokens.n_tokens


@dataclass(frozen=True, slots=True)
class Session:
    """The comparisons of a log: line, line of the nearest earlier request, and comparison."""

    turns: tuple[tuple[int, int | None, Comparison], ...]
    n_skipped: int
    has_tokens: bool

    def causes(self) -> list[tuple[DifferenceClass, int, int]]:
        """Return class, number of turns and cost of each cause, the dearest first."""
        found: defaultdict[DifferenceClass, list[int]] = defaultdict(list)
        for _, _, each in self.turns:
            if each.difference is not None and not each.difference.kind.is_reused:
                found[each.difference.kind].append(each.n_lost)
        causes = [(kind, len(costs), sum(costs)) for kind, costs in found.items()]
        return sorted(causes, key=lambda cause: (-cause[2], -cause[1], cause[0]))

    def to_dict(self, *, has_text: bool) -> dict[str, Any]:
        """Return the session for JSON."""
        return {
            "unit": "tokens" if self.has_tokens else "characters",
            "skipped_lines": self.n_skipped,
            "causes": [
                {"class": kind.value, "turns": n_turns, "lost": lost, "cure": kind.cure}
                for kind, n_turns, lost in self.causes()
            ],
            "turns": [
                {"line": line, "earlier": earlier, **each.to_dict(has_text=has_text)}
                for line, earlier, each in self.turns
            ],
        }


def print_comparison(console: Console, found: Comparison, *, has_text: bool) -> None:
    """Print the first difference between two requests."""
    difference = found.difference
    assert difference is not None  # noqa: S101 (two requests always have one, if only `same`)
    rows = [("Class", Text(f"{difference.kind.value}: {difference.kind.meaning}"))]
    if not difference.kind.is_reused:
        rows.append(("Where", Text(_place(difference))))
        if has_text:
            is_coloured = console.is_terminal and not console.no_color
            for index, (name, text, stop) in enumerate(
                (
                    ("Before", difference.before_text, difference.before_stop),
                    ("After", difference.after_text, difference.after_stop),
                )
            ):
                style = _STYLES[index] if is_coloured else ""
                rows.append((name, marked(text, difference.start, stop, style)))
    rows += [("Cost", Text(_cost(found))), ("To change", Text(difference.cure))]
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(Text(name, style="bold"), value)
    console.print(grid)


def marked(text: str, start: int, stop: int, style: str) -> Text:
    """Return the text around a difference on one line, with the difference in a style or marks."""
    # Whole words are marked, not single letters of them.
    while 0 < start < stop and stop - start < _WORD and text[start - 1].isalnum():
        start -= 1
    while start < stop < len(text) and stop - start < _WORD and text[stop].isalnum():
        stop += 1
    inside = visible(text[start:stop])
    if len(inside) > _MARKED:
        half = _MARKED // 2
        inside = f"{inside[:half]} … {inside[-half:]}"
    low, high = max(0, start - _AROUND), min(len(text), stop + _AROUND)
    left, right = visible(text[low:start]), visible(text[stop:high])
    shown = Text(f"…{left}" if low else left)
    shown.append(inside if style else f"«{inside}»", style)
    shown.append(right + ("…" if high < len(text) else ""))
    return shown


def _place(difference: Difference) -> str:
    role = f" ({difference.role})" if difference.role else ""
    if difference.field:
        return f"{difference.field}{role}, character {difference.position:,}"
    if difference.message is not None:
        return (
            f"in the rendering of messages[{difference.message}]{role}, character"
            f" {difference.position:,} of the prompt"
        )
    return f"character {difference.position:,}"


def _cost(found: Comparison) -> str:
    if found.tokens is None:
        difference = found.difference
        n_shared = 0 if difference is None else difference.n_shared
        return (
            f"{_n(found.n_lost_chars, 'character')} of {found.n_after:,} would have been reused"
            f" after {n_shared:,} equal ones; --tokenizer or --model counts tokens"
        )
    tokens = found.tokens
    return (
        f"{_n(tokens.n_lost, 'token')} of {tokens.n_tokens:,} would have been reused after"
        f" {tokens.n_shared:,} equal ones"
    )


def _n(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def print_session(console: Console, found: Session, *, has_text: bool) -> None:
    """Print a line for each request of a log, and the causes that cost most."""
    unit = "tokens" if found.has_tokens else "characters"
    table = Table(box=None, pad_edge=False)
    for name, is_number in (
        ("Line", True), ("Compared with", True), ("Class", False), ("Where", False),
        (f"Lost {unit}", True), ("Of", True),
    ):  # fmt: skip
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for line, earlier, each in found.turns:
        difference = each.difference
        if difference is None:
            table.add_row(str(line), "", "first of its model", "", "", f"{each.n_total:,}")
            continue
        is_lost = not difference.kind.is_reused
        where = _place(difference) if is_lost else ""
        if is_lost and has_text:
            low = max(difference.start, difference.position - 8)
            shown = (
                visible(text[low : min(stop, low + 24)])
                for text, stop in (
                    (difference.before_text, difference.before_stop),
                    (difference.after_text, difference.after_stop),
                )
            )
            where += ": «{}» → «{}»".format(*shown)
        table.add_row(
            str(line),
            str(earlier),
            difference.kind.value,
            Text(where),
            f"{each.n_lost:,}" if is_lost else "0",
            f"{each.n_total:,}",
        )
    console.print(table)
    console.print()
    causes = found.causes()
    if not causes:
        console.print("Every request continues an earlier one: nothing was lost.")
    for kind, n_turns, lost in causes:
        turns = _n(n_turns, "request")
        console.print(Text(f"{lost:,} {unit} lost to {kind.value} in {turns}. {kind.cure}"))
    if found.n_skipped:
        console.print(f"{_n(found.n_skipped, 'line')} could not be read and was left out.")
    if not found.has_tokens:
        console.print("Counted in characters; --tokenizer or --model counts tokens.")
