"""Build the optional native modules; everything else is in pyproject.toml."""

import os

from setuptools import Extension, setup

NATIVE = [
    "tokcache.text._token_ids",
    "tokcache.text._l0",
    "tokcache.text.segments._l1",
    "tokcache.text.chat._freezing",
]
SANITIZERS = os.environ.get("TOKCACHE_SANITIZE", "")  # as gcc names them: address,undefined
COUNTS_LINES = os.environ.get("TOKCACHE_GCOV") == "1"  # gcov then counts the lines of ext/


def flags() -> tuple[list[str], list[str]]:
    """Return the flags of the compiler and of the linker; `tools/check_native.py` sets others."""
    if SANITIZERS:
        both = [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"]
        return ["-O1", "-g", "-fno-omit-frame-pointer", *both], both
    if COUNTS_LINES:
        return ["-O0", "--coverage", "-DNDEBUG"], ["--coverage"]
    return ["-O3", "-DNDEBUG"], []


def native_modules() -> list[Extension]:
    """Return the extensions, or none where Cython is absent or they are switched off."""
    if os.environ.get("TOKCACHE_NO_EXTENSIONS") == "1":
        return []
    from Cython.Build import cythonize  # noqa: PLC0415 (absent where nothing is compiled)

    compiler_flags, linker_flags = flags()
    modules = cythonize(
        [
            Extension(
                name,
                [f"ext/{name.replace('.', '/')}.pyx"],
                extra_compile_args=compiler_flags,
                extra_link_args=linker_flags,
            )
            for name in NATIVE
        ],
        include_path=["ext"],
        language_level=3,
        emit_linenums=COUNTS_LINES,
    )
    for module in modules:
        # After cythonize, which drops it: no compiler, no extension. A check needs them all.
        module.optional = not (SANITIZERS or COUNTS_LINES)
    return modules


setup(ext_modules=native_modules())
