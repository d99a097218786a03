"""Prints a TemplateAudit: one line a case, then the breaks with their texts, then the cures."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

from tokcache.cli.explain_report import visible
from tokcache.text.chat.audit import Verdict, n_by_verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import Console

    from tokcache.cli.chat_templates import ChatTemplates
    from tokcache.text.chat.audit import CaseResult, TemplateAudit

_TITLE, _VERDICT = 36, 13
_WORDS = {
    Verdict.LEFT_OUT: "not written",
    Verdict.FAILED: "error",
    Verdict.END_TOKEN: "append-only",
}
_STYLES = {Verdict.BREAKS: "bold red", Verdict.APPEND_ONLY: "green", Verdict.END_TOKEN: "green"}
_SAME = 7  # characters by which two breaks are called the same
_MARK = "\u2502"


def print_audit(console: Console, found: ChatTemplates, audit: TemplateAudit) -> None:
    """Print the report of one template."""
    _entry(console, "Template", f"{audit.name}, {audit.n_chars:,} characters")
    _entry(console, "Rendered", f"by {audit.compiled_by}")
    ids = found.why_text_only and f"not compared: {found.why_text_only}"
    if audit.n_different:
        ids = f"NOT the plain tokenizer's in {audit.n_different:,} of {audit.n_compared:,} texts"
    _entry(console, "Ids", ids or f"the plain tokenizer's in all {audit.n_compared:,} texts")
    proof = audit.proof
    few = f", from {proof.min_messages} messages on" if proof.min_messages > 1 else ""
    _entry(console, "Proven", f"yes{few}" if proof.proven else f"no: {proof.reason}")
    n_of = n_by_verdict(audit)
    n_good = n_of[Verdict.APPEND_ONLY] + n_of[Verdict.END_TOKEN]
    tried = f"{n_good} of {len(audit.cases)} cases append-only, {n_of[Verdict.BREAKS]} break"
    _entry(console, "Tried", tried)
    console.print()
    for case in audit.cases:
        line = Text(f"  {case.title:{_TITLE}}")
        word = _WORDS.get(case.verdict, case.verdict.value)
        line.append(f"{word:{_VERDICT}}", _STYLES.get(case.verdict, "dim"))
        line.append(visible(_details(case, audit.unit)))
        console.print(line, soft_wrap=True)
    if audit.broken:
        console.print("\nBreaks")
        for titles, case in _groups(audit.broken):
            _print_break(console, titles, case)
        console.print("\nCures, each tried")
        for text in _cure_lines(audit):
            console.print(Text(text), soft_wrap=True)


def _entry(console: Console, name: str, text: str) -> None:
    console.print(Text(f"{name + ':':11}{visible(text)}"), soft_wrap=True)


def _details(case: CaseResult, unit: str) -> str:
    if case.verdict is Verdict.END_TOKEN:
        return "but for the token that ends an answer"
    if not case.breaks:
        return case.reason or ""
    first = case.breaks[0]
    turns = f"{len(case.breaks)} of {case.n_turns} answers"
    again = f"{case.n_again:,} of {case.n_prompt:,} {unit} again"
    why = f" ({case.reason})" if case.reason else ""
    return f"from messages[{first.message}] ({first.role}) on, {turns}: {again}{why}"


def _groups(broken: Iterable[CaseResult]) -> Iterator[tuple[list[str], CaseResult]]:
    """Yield cases that break in the same way once, with the titles of all of them."""

    def way(case: CaseResult) -> tuple[str, ...]:
        first = case.breaks[0]
        return first.role, first.place, first.shared[-_SAME:], first.rendered[:_SAME]

    for _, alike in groupby(sorted(broken, key=way), key=way):
        cases = list(alike)
        yield [case.title for case in cases], cases[0]


def _print_break(console: Console, titles: list[str], case: CaseResult) -> None:
    first = case.breaks[0]
    console.print(Text(f"  {'; '.join(titles)}"), soft_wrap=True)
    both = (("held", first.held), ("next", first.rendered))
    for name, rest in (("ids ", first.held),) if first.place == "ids" else both:
        line = Text(f"    {name}  \u2026{visible(first.shared)}")
        line.append(f"{_MARK}{visible(rest)}\u2026", "bold")
        console.print(line, soft_wrap=True)


def _cure_lines(audit: TemplateAudit) -> Iterator[str]:
    title_of = {case.name: case.title for case in audit.cases}
    for cure in audit.cures:
        name = f"{cure.switch}={json.dumps(cure.value)}"
        if cure.cures:
            yield f"  {name} makes append-only: {_listed(title_of, cure.cures)}"
        for case, before, after in cure.lessens:
            yield f"  {name} costs less: {title_of[case]}: {after:,} instead of {before:,} again"
        if cure.breaks:
            yield f"  {name} breaks: {_listed(title_of, cure.breaks)}"
    if not audit.switches:
        yield "  none: the template has no switch"
    elif not audit.cures:
        yield f"  none: no value of {', '.join(audit.switches)} helped"


def _listed(title_of: dict[str, str], names: Iterable[str]) -> str:
    return "; ".join(title_of[name] for name in names)
