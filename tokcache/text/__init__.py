"""Text to token ids: the caches of texts and segments, the engines and the tokenizer wrappers."""
