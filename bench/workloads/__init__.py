"""What the benchmarks encode: seeded, the same for every system."""
