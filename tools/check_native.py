"""Checks of the native code that the test suite is too short for; CONTRIBUTING.md lists them.

    python tools/check_native.py sanitize [TEST…]     tests on modules built with ASan and UBSan
    python tools/check_native.py lines [TEST…]        the lines of ext/ that no test reaches
    python tools/check_native.py allocations [NAME…]  every allocation of a class fails once
    python tools/check_native.py races                the object-free tables under TSan
    python tools/check_native.py plant                faults that each of these must find

Each needs gcc. `sanitize`, `lines` and `plant` build a copy of the sources, in build/.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
SOURCES = ("tokcache", "ext", "tests", "docs", "setup.py", "pyproject.toml", "README.md")
SANITIZERS = "address,undefined"
# The unit, property and parity tests of the native classes. Not here: tests of the wrappers, which
# reach no other native code and take ten times as long.
TESTS = (
    "l0", "l0_machine", "token_ids", "freezing", "id_lengths", "segment_cache", "beginnings",
    "l1", "l1_collisions", "l1_controls", "l1_traps", "l1_parity", "clear_scope", "warm",
)  # fmt: skip
# They compare counted bytes with resident memory, and ASan's allocator keeps freed blocks.
OF_RESIDENT_MEMORY = "not resident_memory and not huge_chunk_is_released"
SCENARIOS = (
    "l0", "l0_crowd", "l1", "l1_beginnings", "token_ids", "freezing", "id_lengths",
)  # fmt: skip


def copied(name: str) -> Path:
    """Copy the sources to build/NAME, without built modules; return that folder."""
    target = BUILD / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.c.dep")
    for source in SOURCES:
        path = ROOT / source
        if path.is_dir():
            shutil.copytree(path, target / source, ignore=ignored)
        else:
            shutil.copy2(path, target / source)
    for generated in (target / "ext").rglob("*.c"):
        generated.unlink()
    return target


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Return variables with which Python imports the modules in `folder`."""
    shared = ROOT.parent / "shared" / "data"
    found = {"TOKCACHE_SHARED_DATA": str(shared)} if shared.is_dir() else {}
    return {**found, **os.environ, "PYTHONPATH": str(folder), **more}


def run(folder: Path, env: Mapping[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder`; its errors are part of its output."""
    return subprocess.run(  # noqa: S603 (our own commands)
        command, cwd=folder, env=env, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def build(folder: Path, **switches: str) -> None:
    """Build the native modules of a copy in their places."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = run(folder, environment(folder, **switches), *command)
    if done.returncode:
        sys.exit(f"the build failed\n{done.stdout[-4000:]}")


def library_of_gcc(name: str) -> str:
    """Return the path of a library that gcc comes with."""
    done = run(ROOT, os.environ, "gcc", f"-print-file-name={name}")
    return done.stdout.strip()


def paths_of(tests: Sequence[str]) -> list[str]:
    """Return the files of tests, given as paths or as names of files in tests/text."""
    return [
        name if "/" in name else f"tests/text/test_{name}.py" for name in (tests or TESTS)
    ]  # fmt: skip


def pytest(folder: Path, env: Mapping[str, str], paths: Sequence[str], *more: str) -> bool:
    """Run each file of tests in a process of its own; print its last line; return if all pass."""
    passed = True
    for path in paths:
        options = ["-q", "-p", "no:cacheprovider", "--timeout=0", *more]
        done = run(folder, env, sys.executable, "-m", "pytest", path, *options)
        print(f"{path}: {done.stdout.strip().splitlines()[-1]}", flush=True)
        if done.returncode:
            found = re.search(r"==\d+==ERROR.*|runtime error: .*", done.stdout)
            print(done.stdout[found.start() :][:4000] if found else done.stdout[-4000:])
            passed = False
    return passed


# ---- address and undefined behaviour


def sanitized_environment(folder: Path) -> dict[str, str]:
    """Return variables with which Python loads the sanitizers first."""
    return environment(
        folder,
        LD_PRELOAD=f"{library_of_gcc('libasan.so')} {library_of_gcc('libubsan.so')}",
        ASAN_OPTIONS="detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
        UBSAN_OPTIONS="print_stacktrace=1:abort_on_error=1",
        PYTHONMALLOC="malloc",  # so that each object is a block of its own
    )


def sanitize(tests: Sequence[str], folder: Path | None = None) -> bool:
    """Run tests on modules that abort at the first wrong access or undefined operation."""
    if folder is None:
        folder = copied("sanitized")
    build(folder, TOKCACHE_SANITIZE=SANITIZERS)
    env = sanitized_environment(folder)
    return pytest(folder, env, paths_of(tests), "-k", OF_RESIDENT_MEMORY)


# ---- lines


def lines(tests: Sequence[str]) -> bool:
    """Print each line of ext/ that has code which no test runs."""
    folder = copied("lines")
    build(folder, TOKCACHE_GCOV="1")
    passed = pytest(folder, environment(folder), paths_of(tests))
    counts: dict[str, dict[int, int]] = defaultdict(dict)
    for data in sorted((folder / "build").rglob("*.gcda")):
        relative = str(data.relative_to(folder))
        found = json.loads(run(folder, os.environ, "gcov", "--json-format", "-t", relative).stdout)
        for source in found["files"]:
            of_file = counts[source["file"]]
            for line in source["lines"]:
                at = line["line_number"]
                of_file[at] = max(of_file.get(at, 0), line["count"])
    n_lines = n_missed = 0
    for name in sorted(counts):
        path = folder / "ext" / name
        if not name.startswith("tokcache/") or not path.is_file():
            continue
        code = lines_of_code(path)
        reached = {at: n for at, n in counts[name].items() if at in code}
        missed = [at for at in sorted(reached) if not reached[at]]
        n_lines += len(reached)
        n_missed += len(missed)
        for at in missed:
            print(f"ext/{name}:{at}: {code[at].strip()}")
    print(f"{n_lines - n_missed:,} of {n_lines:,} lines reached, {n_missed} not")
    return passed


def lines_of_code(path: Path) -> dict[int, str]:
    """Return the lines that can run: no declarations, imports, docstrings or rests of arguments.

    Cython gives the code that it makes for a class or a signature the number of such a line.
    """
    found = {}
    text = path.read_text()
    text = re.sub(r'"""(?s:.*?)"""', lambda match: "\n" * match[0].count("\n"), text)
    text = re.sub(r"^from [^\n]* cimport \([^)]*\)", _emptied, text, flags=re.MULTILINE)
    for at, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        is_declaration = re.match(
            r"(cdef|cpdef|def|class|ctypedef|@|from|import|cimport|#|\))", bare
        ) and not re.match(r"cdef [^()]*=", bare)
        if bare and not is_declaration:
            found[at] = line
    return found


def _emptied(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n")


# ---- allocations and races


def allocations(names: Sequence[str], folder: Path = ROOT) -> bool:
    """Let each allocation of the scenarios fail once."""
    library = BUILD / "failing_allocations.so"
    library.parent.mkdir(exist_ok=True)
    source = str(ROOT / "tests/native/failing_allocations.c")
    flags = ["-O2", "-shared", "-fPIC", "-fno-builtin"]
    if run(ROOT, os.environ, "gcc", *flags, source, "-o", str(library)).returncode:
        sys.exit("gcc can't compile tests/native/failing_allocations.c")
    env = environment(folder, LD_PRELOAD=str(library), PYTHONMALLOC="malloc")
    passed = True
    for name in names or SCENARIOS:
        command = [sys.executable, "-X", "faulthandler", "-m"]
        done = run(folder, env, *command, "tests.native.failing_allocations", name)
        print(done.stdout.strip()[-3000:], flush=True)
        passed &= done.returncode == 0
    return passed


def races(modes: Sequence[str] = ("locked", "apart"), folder: Path = ROOT) -> bool:
    """Run the tables in threads; the sanitizer reports any race between them."""
    program = built_races(folder, BUILD / "races")
    passed = True
    for mode in modes:
        env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
        done = run(folder, env, str(program), mode)
        print(f"{mode}: {done.stdout.strip()[:3000]}", flush=True)
        passed &= done.returncode == 0
    return passed


def built_races(folder: Path, into: Path) -> Path:
    """Build the driver of the tables; it contains none of the Python code in the generated C."""
    into.mkdir(parents=True, exist_ok=True)
    made, program = into / "tables.c", into / "races"
    tests = folder / "tests/native"
    cython = [sys.executable, "-m", "cython", "-3", "-I", str(folder / "ext")]
    include = sysconfig.get_paths()["include"]
    gcc = ["gcc", "-fsanitize=thread", "-O1", "-g", "-w", "-fno-pie", "-no-pie", f"-I{include}"]
    gcc += ["-ffunction-sections", "-Wl,--gc-sections", "-Wl,--unresolved-symbols=ignore-all"]
    for command in (
        [*cython, str(tests / "tables.pyx"), "-o", str(made)],
        [*gcc, str(made), str(tests / "races.c"), "-lpthread", "-o", str(program)],
    ):
        done = run(folder, os.environ, *command)
        if done.returncode:
            sys.exit(f"{command[0]} failed\n{done.stdout[-4000:]}")
    return program


# ---- planted faults


def plant() -> bool:
    """Build the sources with one fault after the other; each must be found."""
    found = {
        "an off-by-one in a copy, by ASan": not planted(
            "ext/tokcache/text/segments/_keys.pxd",
            "memcpy(into, t.data + start * width, (stop - start) * width)",
            "memcpy(into, t.data + start * width, (stop - start) * width + 1)",
            lambda folder: sanitize(["segment_cache"], folder),
        ),
        "a lost free, by failing allocations": not planted(
            "ext/tokcache/text/chat/_freezing.pyx",
            "        return PyBytes_FromStringAndSize(<char*> out.data, out.n_bytes)\n"
            "    finally:\n        PyMem_Free(out.data)",
            "        return PyBytes_FromStringAndSize(<char*> out.data, out.n_bytes)\n"
            "    except RenderingRefused:\n        PyMem_Free(out.data)\n        raise",
            frozen_without_memory,
        ),
        "a counter that a look-up writes, by TSan": not planted(
            "tests/native/tables.pyx",
            "    if entry == NULL:\n        why_missing",
            "    (<Tables*> tables).clock += 1\n    if entry == NULL:\n        why_missing",
            lambda folder: races(["locked"], folder),
        ),
        "a write without the lock, by TSan": not races(["planted"]),
    }
    for name, is_found in found.items():
        print(f"{name}: {'found' if is_found else 'NOT FOUND'}")
    return all(found.values())


def frozen_without_memory(folder: Path) -> bool:
    """Build a copy, and let each allocation of its `freezing` fail once."""
    build(folder)
    return allocations(["freezing"], folder)


def planted(path: str, right: str, wrong: str, check: Callable[[Path], bool]) -> bool:
    """Return whether a check passes on a copy of the sources with a fault in one file."""
    folder = copied("planted")
    text = (folder / path).read_text()
    if text.count(right) != 1:
        sys.exit(f"{path} has changed: the fault can't be planted")
    (folder / path).write_text(text.replace(right, wrong))
    return check(folder)


def main() -> int:
    """Run the command that the arguments name; return its exit status."""
    command, *rest = sys.argv[1:] or ["help"]
    if command == "sanitize":
        return not sanitize(rest)
    if command == "lines":
        return not lines(rest)
    if command == "allocations":
        return not allocations(rest)
    if command == "races":
        return not races()
    if command == "plant":
        return not plant()
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main())
