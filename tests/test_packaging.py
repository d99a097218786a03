"""The sdist and the wheel install and work, with and without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

CHECKOUT = Path(__file__).parent.parent
SNIPPET = """
import logging
logging.basicConfig(format="%(name)s: %(message)s")
import tokcache
print(tokcache.L0Cache.__module__)
from tokenizers import Tokenizer, models
for _ in range(2):
    tok = tokcache.wrap(Tokenizer(models.WordLevel({"hello": 5, "[UNK]": 0}, unk_token="[UNK]")))
    assert tok.token_ids("hello") == tok.token_ids("hello") == [5]
assert tok.cache_stats().l0.hits == 1
"""


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, *map(str, command)],
        cwd=CHECKOUT, env={**os.environ, **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def unpack(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (CHECKOUT / "tokcache").is_dir():
        pytest.skip("these tests run on an installed package, without its source tree")
    folder = tmp_path_factory.mktemp("sdist")
    run("-m", "build", "--sdist", "--no-isolation", "--outdir", folder, CHECKOUT)
    return next(folder.glob("*.tar.gz"))


def build_wheel(source: Path, folder: Path, **env: str) -> Path:
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, **env)
    return next(folder.glob("*.whl"))


def test_the_sdist_holds_sources_tests_and_benchmarks(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for needed in (
        "LICENSE", "README.md", "CHANGELOG.md", "setup.py", "ext/tokcache/text/_l0.pyx",
        "ext/tokcache/text/_table.pxd", "ext/tokcache/text/segments/_l1.pyx",
        "ext/tokcache/text/segments/_scan.pxd", "ext/tokcache/text/segments/_segments.pxd",
        "tests/text/test_l0.py", "tests/native/races.c", "bench/exact.py",
        "tokcache/py.typed",
    ):  # fmt: skip
        assert needed in names
    # The C files there are written by hand; all others are made by Cython.
    made = [n for n in names if n.endswith((".so", ".c", ".pyc"))]
    assert not [n for n in made if not n.startswith("tests/native/")]


@pytest.mark.parametrize("compiler", ["real", "none"])
def test_the_wheel_installs_and_wraps_a_tokenizer(
    sdist: Path, tmp_path: Path, compiler: str
) -> None:
    source = unpack(sdist, tmp_path / "source")
    env = {} if compiler == "real" else {"CC": "no-such-compiler", "LDSHARED": "no-such-compiler"}
    wheel = build_wheel(source, tmp_path / "dist", **env)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")  # noqa: S202 (our own wheel)
        native = [n for n in archive.namelist() if n.endswith(".so")]
        assert "tokcache/py.typed" in archive.namelist()
        assert "tokcache/text/_l0.pyi" in archive.namelist()
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{SNIPPET}"
    done = run("-P", "-c", code, TOKCACHE_NO_EXTENSIONS="0")
    if compiler == "real":
        assert len(native) == 4
        assert done.stdout.split() == ["tokcache.text._l0"]
        assert done.stderr == ""
    else:
        assert native == []
        assert done.stdout.split() == ["tokcache.text._reference.l0"]
        assert done.stderr.count("\n") == 1
        assert "native modules were not built" in done.stderr


WITHOUT_EXTRAS = """
import importlib.metadata, sys
from pathlib import Path
from packaging.requirements import Requirement

of_name = {}
for module, names in importlib.metadata.packages_distributions().items():
    for name in names:
        of_name.setdefault(name.lower().replace("-", "_"), set()).add(module)
required = [Requirement(one) for one in importlib.metadata.requires("tokcache")]
core = {one.name for one in required if one.marker is None}
modules = {
    module
    for one in required
    if one.name not in {*core, "tokcache", "pytest", "numpy"}
    for module in of_name.get(one.name.lower().replace("-", "_"), ())
}
assert {"jinja2", "transformers", "httpx", "orjson"} <= modules, modules
sys.modules.update(dict.fromkeys(modules))  # their import raises ModuleNotFoundError

from typer.testing import CliRunner
from tokcache.cli import app
from tokcache.samples import tiny_tokenizer

for command in app.registered_commands:
    done = CliRunner().invoke(app, [command.callback.__name__, "--help"])
    assert done.exit_code == 0, done.output
request = Path("request.json")
request.write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
for line in (
    ["explain", str(tiny_tokenizer())],
    ["demo", "--backend", "tokens"],
    ["why", str(request), str(request)],
    ["replay", str(request), "--tokenizer", str(tiny_tokenizer())],
):
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, (line, done.output, done.exception)
done = CliRunner().invoke(app, ["explain", "--chat", str(tiny_tokenizer())])
assert done.exit_code == 2, done.output
print(done.output.strip().splitlines()[-1])
"""


def test_the_command_needs_none_of_the_extras(tmp_path: Path) -> None:
    done = run("-c", f"import os; os.chdir({str(tmp_path)!r})\n{WITHOUT_EXTRAS}")
    assert "chat templates need jinja2: pip install jinja2" in done.stdout


@pytest.mark.parametrize("version", ["1.0.0rc3", "1.0.0", "1.2.0"])
def test_the_requirements_exclude_tokenizers_versions_with_another_api(version: str) -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    required = [Requirement(one) for one in project["project"]["dependencies"]]
    [tokenizers] = [one for one in required if one.name == "tokenizers"]
    assert tokenizers.specifier.contains("0.23.3")
    assert not tokenizers.specifier.contains(version, prereleases=True)
