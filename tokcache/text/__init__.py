"""Text to token ids: the exact-string cache, the engines and the faces of the tokenizers."""
