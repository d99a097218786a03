"""Decides which slot, file or server serves a request; does no I/O but the list of files."""
