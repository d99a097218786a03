"""Runs other libraries over plain and wrapped tokenizers and compares the results.

    python -m tests.ecosystem

creates a virtual environment outside the repository, installs requirements.txt and this checkout
in it, and runs every case three times, each time in a new process: with plain tokenizers, with
tokenizers that `tokcache.wrap` returns, and with tokenizers that transformers loads after
`tokcache.patch_transformers()`. The results must equal those of the plain tokenizers. The table is
written to docs/ecosystem.md; the exit status is 1 if any result differs.

`--only WORD` runs the cases whose name contains the word; `--python PATH` uses an existing
environment. With TOKCACHE_SHARED_DATA the real tokenizers in that folder are used besides the
project's own sample. pytest does not collect this folder: no file in it is named test_*.
"""
