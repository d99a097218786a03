"""Encoders of uncached text, each admitted only once it has proven equal."""
