"""Single operations timed by pytest-benchmark: `pytest bench/micro --benchmark-only`.

Compare with an earlier run: `--benchmark-autosave`, then `--benchmark-compare`. Every operation of
the text caches runs with the native modules and with the reference implementation.
"""
