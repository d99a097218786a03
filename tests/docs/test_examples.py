"""Every code block of the documentation and the README runs, and prints the output it shows.

Blocks of one page share their names, as a reader who types them in has them. A Python block shows
its output in lines `# → text` below each print. Of shell blocks those lines run that begin with
`tokcache`; the others install packages or start servers.

Sybil finds the blocks: it keeps a page's line numbers in tracebacks, and needs no other package.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("sybil", reason="needs tokcache[test]")
pytest.importorskip("llama_cpp", reason="needs tokcache[llama]")
pytest.importorskip("xllamacpp", reason="needs tokcache[demo]")

from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser

from tokcache import samples
from tokcache.samples.server_process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_SERVER = "http://127.0.0.1:8080"  # the address that the pages show
_SHOWN = re.compile(r"^ *# → (.*)$", re.MULTILINE)
_SHELL = re.compile(r"^ *```sh\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def _run(example: Example) -> str | None:
    """Run a block in its page's namespace; return a message if it prints something else."""
    source = example.parsed
    if _SERVER in source:
        source = source.replace(_SERVER, example.namespace["_llama_server"]())
    printed = io.StringIO()
    code = compile("\n" * example.parsed.line_offset + source, example.path, "exec")
    example.namespace["__name__"] = "__page__"
    with contextlib.redirect_stdout(printed):
        exec(code, example.namespace)  # noqa: S102 (our own pages)
    shown = [found[1] for found in _SHOWN.finditer(source)]
    lines = printed.getvalue().splitlines()
    return None if lines == shown else f"{example.path} shows {shown}, and prints {lines}"


PYTHON = Sybil([CodeBlockParser("python", _run)], path=str(ROOT))


def _commands() -> dict[str, list[str]]:
    found = {}
    for page in PAGES:
        blocks = _SHELL.findall(page.read_text(encoding="utf-8"))
        lines = [line.strip() for block in blocks for line in block.splitlines()]
        if chosen := [line for line in lines if line.startswith("tokcache ")]:
            found[str(page.relative_to(ROOT))] = chosen
    return found


EXAMPLES = [
    str(page.relative_to(ROOT)) for page in PAGES if "```python" in page.read_text(encoding="utf-8")
]
COMMANDS = _commands()


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder with the files that pages name: a tokenizer, a model, requests, prompts."""
    tokenizer = samples.tiny_tokenizer()
    shutil.copytree(tokenizer.parent, tmp_path / "my-model")
    shutil.copy(tokenizer, tmp_path / "tokenizer.json")
    shutil.copy(samples.tiny_model(), tmp_path / "model.gguf")
    for path in (ROOT / "docs/assets/why").iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "rules.txt").write_text("Answer in one sentence. " * 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def llama_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the tiny model, with a folder of slots."""
    folder = tmp_path_factory.mktemp("slots")
    process = ServerProcess(
        samples.tiny_model(), n_ctx=1024, n_slots=2, block_tokens=64, n_threads=1,
        slot_folder=folder,
    )  # fmt: skip
    try:
        yield process.url
    finally:
        process.close()


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("page", EXAMPLES)
def test_the_examples_of_a_page_run_and_print_their_output(
    page: str, request: pytest.FixtureRequest
) -> None:
    document = PYTHON.parse(ROOT / page)
    document.namespace["_llama_server"] = lambda: request.getfixturevalue("llama_server")
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize("page", COMMANDS)
def test_the_commands_of_a_page_run(page: str, reader: Path) -> None:
    import tokcache  # noqa: PLC0415

    tokcache.DiskTier(reader / "states").close()  # the folder that the pages list and prune
    for line in COMMANDS[page]:
        command = [sys.executable, "-m", "tokcache", *shlex.split(line, comments=True)[1:]]
        done = subprocess.run(  # noqa: S603 (our own pages)
            command,
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert done.returncode == 0, (line, done.stdout, done.stderr)
