"""Metrics of the caches for monitoring systems."""
