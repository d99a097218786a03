"""Build the optional native modules; everything else is in pyproject.toml."""

import os

from setuptools import Extension, setup

NATIVE = [
    "tokcache.text._token_ids",
    "tokcache.text._l0",
    "tokcache.text.segments._l1",
    "tokcache.text.chat._freezing",
]


def native_modules() -> list[Extension]:
    """Return the extensions, or none where Cython is absent or they are switched off."""
    if os.environ.get("TOKCACHE_NO_EXTENSIONS") == "1":
        return []
    from Cython.Build import cythonize  # noqa: PLC0415 (absent where nothing is compiled)

    modules = cythonize(
        [
            Extension(
                name,
                [f"ext/{name.replace('.', '/')}.pyx"],
                extra_compile_args=["-O3", "-DNDEBUG"],
            )
            for name in NATIVE
        ],
        include_path=["ext"],
        language_level=3,
    )
    for module in modules:
        module.optional = True  # after cythonize, which drops it: no compiler, no extension
    return modules


setup(ext_modules=native_modules())
