"""Every exception tokcache raises, rooted at `TokcacheError`.

Errors of the wrapped libraries pass through unchanged; these are tokcache's own.
"""


class TokcacheError(Exception):
    """The root: `except TokcacheError` catches all that tokcache itself raises."""


class InvalidConfig(TokcacheError, ValueError):
    """A setting has a value that can't work; the message names it, the value and the range."""


class InvalidText(TokcacheError, TypeError):
    """A text was expected; the message names the type that came instead."""


class InvalidTokens(TokcacheError, ValueError):
    """Token ids were expected; the message names what can't be an int32 id."""


class UnsupportedTokenizer(TokcacheError, TypeError):
    """A tokenizer can't be wrapped; the message says which kinds can."""


class VocabularyMismatch(TokcacheError, ValueError):
    """Tokenizer and model don't share a vocabulary; the message names the first difference."""


class InvalidModel(TokcacheError, ValueError):
    """A model file is missing, damaged or not what was asked for."""


class ModelClosed(TokcacheError, RuntimeError):
    """The model was closed, or belongs to the parent of a fork."""


class StateError(TokcacheError, RuntimeError):
    """A KV state could not be saved or restored; the sequence is as it was before."""


class ServerError(TokcacheError, RuntimeError):
    """A llama-server was unreachable or answered with an error; the message holds its words."""


class MissingExtra(TokcacheError, ImportError):
    """An optional library is not installed; the message has the pip command that installs it."""


class MissingFile(TokcacheError, FileNotFoundError):
    """A file that was named does not exist; the message has its path."""


class InvalidPrompts(TokcacheError, ValueError):
    """A file of prompts can't be read; the message has its path and line."""
