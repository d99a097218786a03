"""The texts and chats of the benchmarks: seeded, and the same for every system."""
