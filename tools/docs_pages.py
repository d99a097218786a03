"""Write the parts of the documentation that are made from the code: `python tools/docs_pages.py`.

A page holds `<!-- generated: NAME -->`; the text up to `<!-- end -->` is replaced. With --check
nothing is written, and the exit code is 1 if a page is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import typer

from tokcache import reasons
from tokcache.cli import app
from tokcache.differences import DifferenceClass
from tokcache.llama.memory_type import ARCHITECTURES
from tokcache.llama.reasons import REASONS
from tokcache.llama.server.trust import CURES
from tokcache.text.cuts.char_classes import VISIBLE, CharClass
from tokcache.text.cuts.patterns import KNOWN
from tokcache.text.cuts.regex.lookup import cuts_of_pattern
from tokcache.text.cuts.regex.pattern_cuts import Outcome

DOCS = Path(__file__).resolve().parents[1] / "docs"
_PART = re.compile(r"<!-- generated: (\w+) -->\n(?:.*?<!-- end -->\n)?", re.DOTALL)


def reason_tables() -> str:
    """Return every counted reason with its cause and cure, one table for each counter."""
    return "\n".join(
        f"### {title}\n\n{_counter(title)}\n\n{_table(table)}"
        for title, table in all_tables().items()
    )


def all_tables() -> dict[str, Mapping[str, tuple[str, str]]]:
    """Return the tables of all rooms, by title."""
    tables: dict[str, Mapping[str, tuple[str, str]]] = dict(reasons.TABLES)
    tables["llama.cpp in process"] = {**REASONS, **reasons.LLAMA_REFUSALS}
    tables["llama-server"] = {**CURES, **reasons.SERVER_REFUSALS}
    return tables


_COUNTERS = {
    "Prompts not reused to their end": (
        "`states.stats().misses` and `missed_tokens`, `plan.miss`, `llm.last_reuse.miss`, and "
        "for a llama-server `server.stats().misses` and `server.complete(…).miss`"
    ),
    "Calls answered by the plain tokenizer": "`tok.cache_stats().bypasses`",
    "Texts not put into L0": "`tok.cache_stats().l0.refusals`",
    "Texts, chunks and segments not found in L0 and L1": (
        "`misses_by_reason` of `tok.cache_stats().l0`, `chunk_misses_by_reason` and "
        "`segment_misses_by_reason` of `tok.cache_stats().l1`; the metrics "
        "`tokcache_l0_misses_total`, `tokcache_l1_chunk_misses_total` and "
        "`tokcache_l1_segment_misses_total`"
    ),
    "Texts not cut, chunks not kept (L1)": "`tok.cache_stats().l1.refusals`",
    "Tokenizers whose texts are never cut": "`tok.cache_stats().l1.refusals`, `tokcache explain`",
    "Chats rendered in full": "`tok.cache_stats().render.refusals`",
    "States not stored or not used": "`states.stats().refusals`",
    "llama.cpp in process": "`states.stats().refusals`, and one line in the log",
    "Disk and Redis": (
        "`states.stats().refusals` as `disk: reason` or `redis: reason`, and "
        "`states.stats().disk.refusals`, `states.stats().redis.refusals`"
    ),
    "llama-server": "`server.stats().refusals`",
    "The engine in force": (
        "`tok.cache_stats().engine_reason`, the metric `tokcache_engine_reason`, `tokcache explain`"
    ),
    "Digests of model files, and proofs of engines": "the log",
    "The endpoint `tokcache serve`": (
        "the metric `tokcache_gateway_reasons_total`, and `detail` in answers; their `reason` is "
        "one of the first table (`tokcache_gateway_misses_total`)"
    ),
}


def _counter(title: str) -> str:
    return f"Where it is counted: {_COUNTERS[title]}."


def _table(table: Mapping[str, tuple[str, str]]) -> str:
    rows = [
        f"| `{code}` | {_cell(why)} | {'' if cure == 'nothing to do' else _cell(cure)} |\n"
        for code, (why, cure) in sorted(table.items())
    ]
    return "| reason | why | what to do |\n|---|---|---|\n" + "".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def architectures() -> str:
    """Return the names of the architectures whose states are cached."""
    return ", ".join(f"`{name}`" for name in sorted(ARCHITECTURES)) + ".\n"


def commands() -> str:
    """Return every command's help text and options."""
    group = typer.main.get_command(app)
    return "\n".join(_command("tokcache", group))


def _command(name: str, command: object) -> list[str]:
    found = []
    below = getattr(command, "commands", {})
    if name != "tokcache":
        help_text = re.sub(r"\s+", " ", getattr(command, "help", "") or "")
        found.append(f"## `{name}`\n\n{help_text}\n")
        rows = [_option(each) for each in getattr(command, "params", []) if each.name != "help"]
        if rows:
            found.append("| | default | meaning |\n|---|---|---|\n" + "".join(rows))
    for key in below:
        found += _command(f"{name} {key}", below[key])
    return found


def _option(option: object) -> str:
    opts = getattr(option, "opts", [])
    is_argument = getattr(option, "param_type_name", "") == "argument"
    name = str(getattr(option, "name", "")).upper() if is_argument else opts[-1]
    default = getattr(option, "default", None)
    shown = "" if default is None or callable(default) or default is False else f"`{default}`"
    help_text = getattr(option, "help", None) or ""
    return f"| `{name}` | {shown} | {_cell(help_text)} |\n"


def differences() -> str:
    """Return the classes of differences between two prompts."""
    rows = [f"| `{kind.value}` | {kind.meaning} | {kind.cure} |\n" for kind in DifferenceClass]
    return "| class | meaning | what to change |\n|---|---|---|\n" + "".join(rows)


def patterns() -> str:
    """Return the known patterns, and the cuts that each allows as the only stage."""
    rows = []
    for name, pattern in KNOWN.items():
        cuts = cuts_of_pattern(pattern)
        apart = {
            pair for pair in cuts.kept if cuts.outcome(pair, "Isolated", invert=False) is APART
        }
        proven = [shown for shown, pairs in _SHOWN.items() if pairs <= apart]
        rows.append(f"| `{name}` | {_origin(name)} | {', '.join(proven) or 'none alone'} |\n")
    return "| pattern | tested with | cuts |\n|---|---|---|\n" + "".join(rows)


APART = Outcome.APART
_SHOWN = {
    "visible \\| space": {(left, CharClass.SPACE) for left in VISIBLE},
    "letter \\| space": {(CharClass.LETTER, CharClass.SPACE)},
    "newline \\| letter": {(CharClass.NEWLINE, CharClass.LETTER)},
    "newlines \\| letter": {(CharClass.NEWLINE_RUN, CharClass.LETTER)},
    "letter \\| `.` or `,`": {(CharClass.LETTER, CharClass.STOP)},
    "letter \\| other punctuation": {(CharClass.LETTER, CharClass.PUNCTUATION)},
    "letter \\| digit": {(CharClass.LETTER, CharClass.DIGIT)},
    "digit \\| digit": {(CharClass.DIGIT, CharClass.DIGIT)},
}
_REAL = {  # patterns of tokenizer files that the tests read
    "gpt2": "GPT-2, OLMo 1, MiniMind, SmolLM2",
    "qwen2": "Qwen2.5",
    "deepseek_v3": "DeepSeek V3",
    "deepseek_v3_cjk": "DeepSeek V3",
    "numbers_by_three": "DeepSeek V3",
}


def _origin(name: str) -> str:
    return f"real: {_REAL[name]}" if name in _REAL else "synthetic"


PARTS: dict[str, Callable[[], str]] = {
    "reasons": reason_tables,
    "architectures": architectures,
    "cli": commands,
    "differences": differences,
    "patterns": patterns,
}


def filled(page: str) -> str:
    """Return a page with its generated parts as the code is now."""

    def part(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- generated: {name} -->\n\n{PARTS[name]()}\n<!-- end -->\n"

    return _PART.sub(part, page)


def main() -> int:
    """Fill all pages, or compare them with the code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if old")
    check = parser.parse_args().check
    is_old = False
    for path in sorted(DOCS.rglob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            is_old = True
            print(f"{'out of date' if check else 'written'}: {path.relative_to(DOCS.parent)}")
            if not check:
                path.write_text(after, encoding="utf-8")
    return int(check and is_old)


if __name__ == "__main__":
    sys.exit(main())
