"""Write the table of chat templates: `python tools/template_table.py FOLDER`.

FOLDER/templates.json lists the templates, each with `family`, `file` (a .jinja file in FOLDER, or
a tokenizer_config.json) and `source` (repository, path and commit that it is from). None of
them is part of this project. The table goes to docs/reference/templates.md, between its markers.
"""

from __future__ import annotations

import argparse
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tokcache.text.chat.audit import TemplateAudit, Verdict, audit_template

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "templates.md"
_PART = re.compile(r"(<!-- templates -->\n).*?(<!-- end -->)", re.DOTALL)
# The columns, with the cases that each sums up.
COLUMNS = {
    "plain chat": ("plain",),
    "system": ("system",),
    "tool calls": ("call", "calls"),
    "arguments as a string": ("call_as_text",),
    "thinking": ("thinking", "thinking_call"),
    "trimmed answers": ("spaces", "newlines"),
    "clock": ("clock",),
}
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
_WORDS = {
    Verdict.LEFT_OUT: "not written",
    Verdict.REFUSED: "refused",
    Verdict.FAILED: "error",
    Verdict.STOPPED: "stopped",
}
_GOOD = {Verdict.APPEND_ONLY, Verdict.END_TOKEN}


def table(rows: list[tuple[dict[str, str], TemplateAudit]]) -> str:
    """Return the table in Markdown, one row for each template."""
    head = ["family", *COLUMNS, "proven", "cure", "source"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for listed, audit in rows:
        cells = [_cell(audit, names) for names in COLUMNS.values()]
        proof = "yes" if audit.proof.proven else "no"
        source = f"`{listed['source']}`"
        lines.append(
            "| " + " | ".join([listed["family"], *cells, proof, _cures(audit), source]) + " |"
        )
    return "\n".join(lines) + "\n"


def _cell(audit: TemplateAudit, names: tuple[str, ...]) -> str:
    """Return the worst outcome of some cases, those aside that the template does not take."""
    chosen = [case for case in audit.cases if case.name in names]
    broken = [case for case in chosen if case.verdict is Verdict.BREAKS]
    if broken:
        worst = max(broken, key=lambda case: case.share)
        return f"**no**, {worst.share:.0%}"
    if any(case.verdict in _GOOD for case in chosen):
        return "yes"
    return _WORDS[chosen[0].verdict]


def _cures(audit: TemplateAudit) -> str:
    """Return the switches that make cases of the columns append-only, with these columns."""
    found = []
    for cure in audit.cures:
        cured = [
            title
            for title, names in COLUMNS.items()
            if any(case.name in names for case in audit.broken)
            and all(case.name in cure.cures for case in audit.broken if case.name in names)
        ]
        if cured:
            found.append(f"`{cure.switch}={json.dumps(cure.value)}`: {', '.join(cured)}")
    return "; ".join(found)


def audited(folder: Path, listed: dict[str, str]) -> TemplateAudit:
    """Return the audit of one template of the list, by its text alone."""
    text = (folder / listed["file"]).read_text(encoding="utf-8")
    variables: dict[str, Any] = dict(_TOKENS)
    if listed["file"].endswith(".json"):
        text = json.loads(text)["chat_template"]
    return audit_template(listed["family"], text, variables=variables)


def main() -> None:
    """Audit all templates of a folder, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    listed = json.loads((folder / "templates.json").read_text(encoding="utf-8"))
    listed.sort(key=lambda each: each["family"].lower())
    # Each template is rendered in a process of its own.
    with ThreadPoolExecutor(2) as pool:
        audits = list(pool.map(lambda each: audited(folder, each), listed))
    text = table(list(zip(listed, audits, strict=True)))
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(
        _PART.sub(lambda found: f"{found[1]}\n{text}\n{found[2]}", page), encoding="utf-8"
    )
    print(f"{len(listed)} templates written to {PAGE.relative_to(PAGE.parents[2])}")


if __name__ == "__main__":
    main()
