"""Benchmarks: `python -m bench list | run NAME | all | compare`."""
