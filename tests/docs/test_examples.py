"""Every code block of the documentation and the README runs, and prints the output it shows.

Blocks of one page share their names, as a reader who types them in has them. Python blocks show
their output as `#> text` (`pytest tests/docs --update-examples` writes it). Of shell blocks those
lines run that begin with `tokcache`; the others install, or start servers.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("pytest_examples", reason="needs tokcache[test]")
pytest.importorskip("llama_cpp", reason="needs tokcache[llama]")
pytest.importorskip("xllamacpp", reason="needs tokcache[demo]")

from pytest_examples import CodeExample, EvalExample, find_examples

from tokcache import samples
from tokcache.samples.server_process import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_SERVER = "http://127.0.0.1:8080"  # the address that the pages show
_SHELL = re.compile(r"^ *```sh\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def _examples() -> dict[str, list[CodeExample]]:
    found: dict[str, list[CodeExample]] = {}
    for example in find_examples(*PAGES):
        if not example.prefix.startswith("python"):
            continue
        found.setdefault(str(example.path.relative_to(ROOT)), []).append(example)
    return found


def _commands() -> dict[str, list[str]]:
    found = {}
    for page in PAGES:
        blocks = _SHELL.findall(page.read_text(encoding="utf-8"))
        lines = [line.strip() for block in blocks for line in block.splitlines()]
        if chosen := [line for line in lines if line.startswith("tokcache ")]:
            found[str(page.relative_to(ROOT))] = chosen
    return found


EXAMPLES, COMMANDS = _examples(), _commands()


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder with the files that the pages name: a tokenizer and a model."""
    tokenizer = samples.tiny_tokenizer()
    shutil.copytree(tokenizer.parent, tmp_path / "my-model")
    shutil.copy(tokenizer, tmp_path / "tokenizer.json")
    shutil.copy(samples.tiny_model(), tmp_path / "model.gguf")
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
    page: str, eval_example: EvalExample, request: pytest.FixtureRequest
) -> None:
    names: dict[str, Any] = {}
    for example in EXAMPLES[page]:
        if _SERVER in example.source:
            url = request.getfixturevalue("llama_server")
            example.source = example.source.replace(_SERVER, url)
        if eval_example.update_examples:
            names = eval_example.run_print_update(example, module_globals=names)
            example.source = example.source.replace(request.getfixturevalue("llama_server"), _SERVER)
        else:
            names = eval_example.run_print_check(example, module_globals=names)


@pytest.mark.parametrize("page", COMMANDS)
def test_the_commands_of_a_page_run(page: str, reader: Path) -> None:
    import tokcache  # noqa: PLC0415

    with tokcache.DiskTier(reader / "states") as _:  # the folder that the pages list and prune
        pass
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
