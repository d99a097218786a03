"""Prints an Explanation: a few lines, a table of the cut rules, and the sample with its cuts."""

from __future__ import annotations

from collections import Counter
from itertools import groupby, islice
from textwrap import TextWrapper
from typing import TYPE_CHECKING

from rich.cells import cell_len, chop_cells
from rich.table import Table
from rich.text import Text

from tokcache.cli.explanation import Grain, Origin

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rich.console import Console

    from tokcache.cli.by_transformers import ByTransformers
    from tokcache.cli.explanation import Added, Cut, Explanation, Sample, Segment

_NAMED = 6  # added tokens that are listed by name; the rest are counted
_SHOWN_LINES = 100
_NOTE_CHARS = 160
_ADVICE = "; use tokenizers"
_PROVEN = {"proven": "proven equal now", "remembered": "proven equal in an earlier process"}
_INDENT = 13
_SHADES = ("#000000 on #cfe8ff", "#000000 on #ffe9b3")
_TOKEN = "bold #ffffff on #7a3e9d"  # noqa: S105 (a colour)
_GRAINS = {
    Grain.CHUNK: "chunks, segments",
    Grain.SEGMENT: "segments",
    Grain.NONE: "nothing: added tokens or replaced strings forbid it",
}
_ORIGINS = {
    Origin.ENCODED: "by encoding missing text",
    Origin.PARTS: "from cached segments",
    Origin.WHOLE: "from the cached whole text",
}
_MARK = "\u2502"  # printed after a segment; unlike |, it is rare in texts
_SIGNS = {"\n": "\u23ce", "\r": "\u240d", "\t": "\u2409", "\x7f": "\u2421"}


def print_explanation(console: Console, found: Explanation) -> None:
    """Print whether texts and segments are cached, why, and how a sample text is cut."""
    for name, lines in _entries(found):
        for number, line in enumerate(lines):
            _print_entry(console, "" if number else name, line)
    if found.cuts:
        console.print()
        console.print(_rules(found.cuts))
    console.print()
    if found.why_not_parts is None:
        _print_sample(console, found)
    _print_entry(console, "Identical", _identical(found))


def _print_entry(console: Console, name: str, text: str) -> None:
    head = f"{name}:" if name else ""
    # A path or pattern wider than the terminal is not broken, so that it can be copied.
    wrapped = TextWrapper(
        max(1, console.width - _INDENT), break_long_words=False, break_on_hyphens=False
    )
    for line in wrapped.wrap(text):
        console.print(Text(f"{head:{_INDENT}}{line}"), soft_wrap=True)
        head = ""


def _entries(found: Explanation) -> Iterator[tuple[str, list[str]]]:
    n_tokens = f"{_n(found.n_tokens, 'token')}, {found.n_added_tokens:,} of them added"
    yield "Tokenizer", [found.name]
    yield "Model", [f"{found.model}, {n_tokens}"]
    yield "Whole texts", [_cached(found.why_not_whole)]
    if found.why_not_whole is None:
        is_whole = found.why_not_parts is not None or found.cuts
        more = "" if is_whole else ", but cut at added tokens only"
        yield "Segments", [_cached(found.why_not_parts) + more]
    if found.by_transformers is not None:
        yield "Auto class", list(_about_transformers(found.by_transformers))
    yield "Recognised", [f"{name}: {visible(reading)}" for name, reading in found.recognised]
    if found.refused and found.why_not_parts is None:
        yield "Refused", [visible(sentence) for sentence in found.refused]
    if found.why_not_parts is None:
        yield "Added", list(_about_added(found.added_tokens))
        around = "unknown, so texts with special tokens are only cached whole"
        if found.affixes is not None:
            sides = (("before", found.affixes.before), ("after", found.affixes.after))
            shown = [
                f"{place} {' '.join(map(_quoted, map(visible, tokens)))}"
                for place, tokens in sides
                if tokens
            ]
            around = ", ".join(shown) or "nothing"
        yield "Affixes", [around]
        alike = "like the beginning of a text"
        continued = [
            f"{one.place}: {visible('; '.join(one.changes)) or alike}"
            for one in found.continuations
        ]
        yield "Continued", continued or [f"every segment is encoded {alike}"]
        more = "; it encodes missing chunks whole: only --engine tokenizers looks up their segments"
        proven = f", {_PROVEN[found.engine_reason]}" if found.engine_reason in _PROVEN else ""
        engine = [f"{found.engine}{proven}{'' if found.looks_up_segments else more}"]
        for note in found.engine_notes:
            # The line starts with the engine's name, so its error needs no full sentence.
            short = note.replace(" can't encode with this tokenizer:", ":").removesuffix(_ADVICE)
            text = visible(short)
            engine.append(text if len(text) <= _NOTE_CHARS else f"{text[:_NOTE_CHARS]} ...")
        yield "Engine", engine


def _about_transformers(found: ByTransformers) -> Iterator[str]:
    """Yield what a user of `AutoTokenizer` gets, where it is not what the file says."""
    if found.why_not is not None:
        yield f"AutoTokenizer can't load these files: {visible(found.why_not)}"
        return
    unlike = " and ".join(found.unlike_file).replace("_", "-")
    yield f"AutoTokenizer gives {found.class_name}, " + (
        f"with another {unlike}" if unlike else "as in the file"
    )
    if found.why_not_whole is not None:
        yield f"whole texts {_cached(found.why_not_whole)}"
        return
    where = "" if found.has_cuts or found.why_not_parts else ", but cut at added tokens only"
    yield f"segments {_cached(found.why_not_parts)}{where}"
    if unlike:
        yield from (f"{name}: {visible(reading)}" for name, reading in found.recognised)
        yield from map(visible, found.refused)


def _cached(why_not: str | None) -> str:
    return "cached" if why_not is None else f"not cached: {visible(why_not)}"


def _about_added(added: Sequence[Added]) -> Iterator[str]:
    if not added:
        yield "no tokens"
    opening = [one for one in added if one.opens]
    if opening:
        yield f"{len(opening):,} cut out, and a chunk may begin there: {_named(opening)}"
    others = sorted(
        (one for one in added if not one.opens),
        key=lambda one: (not one.is_cut_out, one.why_not or "", one.id),
    )
    for (is_cut_out, why), group in groupby(others, lambda one: (one.is_cut_out, one.why_not)):
        some = list(group)
        place = "cut out, but no chunk begins there" if is_cut_out else "left in the text"
        yield f"{len(some):,} {place} ({why}): {_named(some)}"


def _named(added: Sequence[Added]) -> str:
    names = " ".join(_quoted(visible(one.content)) for one in added[:_NAMED])
    return names + (f" and {len(added) - _NAMED:,} more" if len(added) > _NAMED else "")


def _quoted(name: str) -> str:
    return f'"{name}"' if " " in name else name


def _rules(cuts: Sequence[Cut]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("Cut between", max_width=22)
    table.add_column("Ends", max_width=16)
    table.add_column("Because", overflow="fold")
    by_reason: dict[tuple[Grain, str], list[Cut]] = {}
    for cut in cuts:
        by_reason.setdefault((cut.grain, cut.reason), []).append(cut)
    for (grain, reason), alike in by_reason.items():
        places = "\n".join(cut.name for cut in alike)
        names = [cut.name.partition(" | ") for cut in alike]
        if len({right for _, _, right in names}) == 1:
            places = f"{', '.join(left for left, _, _ in names)} | {names[0][2]}"
        table.add_row(Text(places), _GRAINS[grain], Text(reason))
    return table


# ---- the sample


def _print_sample(console: Console, found: Explanation) -> None:
    sample = found.sample
    if sample.why_uncut:
        n_chars = _n(len(sample.text), "character")
        _print_entry(console, "Sample", f"{n_chars}, not cut: {sample.why_uncut}")
        return
    _print_entry(console, "Sample", _counts(sample))
    is_coloured = console.is_terminal and not console.no_color and console.color_system is not None

    def all_lines() -> Iterator[Text]:
        """Yield a heading for each chunk, then the lines of its segments."""
        rest = list(reversed(sample.segments))
        for number, chunk in enumerate(sample.chunks, start=1):
            own = []
            while rest and rest[-1].start < chunk.stop:
                own.append(rest.pop())
            sizes = f"{_n(chunk.stop - chunk.start, 'character')}, {_n(len(own), 'segment')}"
            yield Text(f"-- chunk {number}: {sizes}", style="dim")
            yield from _folded(_pieces(sample.text, own, is_coloured=is_coloured), console.width)

    lines = all_lines()
    for line in islice(lines, _SHOWN_LINES):
        console.print(line, soft_wrap=True)
    if next(lines, None) is not None:
        console.print(Text("-- the rest is not shown; --json prints all of it", style="dim"))
    console.print()


def _n(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _counts(sample: Sample) -> str:
    n_tokens = sum(one.is_token for one in sample.segments)
    return (
        f"{_n(len(sample.text), 'character')} in {_n(len(sample.chunks), 'chunk')} and"
        f" {_n(len(sample.segments), 'segment')}, {n_tokens:,} of them added tokens"
    )


def _pieces(
    text: str, segments: Iterable[Segment], *, is_coloured: bool
) -> Iterator[tuple[str, str]]:
    """Yield the text and style of each segment; without colours a mark ends each segment."""
    for index, one in enumerate(segments):
        written = visible(text[one.start : one.stop], keeps_lines=True)
        if is_coloured:
            yield written, _TOKEN if one.is_token else _SHADES[index % len(_SHADES)]
        else:
            # The mark goes before a line break, so that it is on the line of its segment.
            is_line = written.endswith("\n")
            written = written.removesuffix("\n")
            written = f"\u00ab{written}\u00bb" if one.is_token else written
            yield f"{written}{_MARK}" + ("\n" if is_line else ""), ""


def _folded(pieces: Iterable[tuple[str, str]], width: int) -> Iterator[Text]:
    """Yield lines of at most `width` cells, broken after a line end or before a segment."""
    line = Text()
    for written, style in pieces:
        for part in written.splitlines(keepends=True):
            shown = part.rstrip("\n")
            if line and line.cell_len + cell_len(shown) > width:
                yield line
                line = Text()
            *full, last = chop_cells(shown, width) or [""]
            yield from (Text(row, style) for row in full)  # full rows; `line` is empty here
            line.append(last, style)
            if part.endswith("\n"):
                yield line
                line = Text()
    if line:
        yield line


def visible(text: str, *, keeps_lines: bool = False) -> str:
    """Return `text` with every control character replaced, so that it can't control a terminal."""
    shown = "".join(
        _SIGNS.get(char)
        or (chr(0x2400 + ord(char)) if char < " " else "")
        or (char if char.isprintable() else char.encode("unicode_escape").decode())
        for char in text
    )
    return shown.replace(_SIGNS["\n"], _SIGNS["\n"] + "\n") if keeps_lines else shown


# ---- the proof


def _identical(found: Explanation) -> str:
    if found.why_not_compared is not None:
        return f"not compared: {visible(found.why_not_compared)}"
    for answer in found.answers:
        if answer.difference:
            return f"NO: {answer.difference} ({_ORIGINS[answer.origin]}, engine {answer.engine})"
    sizes = " and ".join(f"{size:,}" for size in sorted({one.n_tokens for one in found.answers}))
    counts = Counter(answer.origin for answer in found.answers)
    origins = ", ".join(f"{how} ({counts[one]})" for one, how in _ORIGINS.items() if counts[one])
    return f"yes, {sizes} ids compared with the plain tokenizer's; {origins}"
