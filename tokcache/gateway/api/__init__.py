"""The forms of the APIs: errors, streams, and the translation of Anthropic messages."""
