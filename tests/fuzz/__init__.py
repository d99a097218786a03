"""Fuzzing of all code that reads foreign bytes: `python -m tests.fuzz list` names the targets."""
