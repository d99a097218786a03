"""One adapter per peer; the adapters of a module have the same methods."""
