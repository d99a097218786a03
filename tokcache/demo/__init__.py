"""`tokcache demo`: the same prompts without and with tokcache, timed and compared."""
