"""The reference implementation of L0Cache and TokenIds: plain Python, to read and test against."""
