"""The matrix "the ecosystem takes a wrapped tokenizer as a plain one".

    python -m tests.ecosystem

makes a virtual environment outside the repository, installs requirements.txt and this checkout
there, and runs every case three times, each time in a process of its own: with plain tokenizers,
with those that `tokcache.wrap` returns, and with those that transformers loads after
`tokcache.patch_transformers()`. The results are compared with the plain ones for equality. The
table goes to docs/ecosystem.md; the exit status is 1 if any result differs.

`--only WORD` runs the cases whose name contains the word; `--python PATH` uses an environment that
is there already. With TOKCACHE_SHARED_DATA, the real tokenizers there are used besides the
project's own sample. pytest does not collect this folder: no file in it is named test_*.
"""
