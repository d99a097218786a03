"""Text to token ids: the exact-string cache, the engines and the wrappers of the tokenizers."""
