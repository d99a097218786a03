"""Encoders of uncached text, and the proof that each gives the ids of the tokenizer."""
