"""Derives the cuts that a Split's pattern allows: its syntax, alphabet, automaton and safety."""
