"""Every exception tokcache raises, rooted at `TokcacheError`.

Errors of the wrapped libraries pass through unchanged; these are tokcache's own.
"""


class TokcacheError(Exception):
    """The root: `except TokcacheError` catches all that tokcache itself raises."""


class InvalidConfig(TokcacheError, ValueError):
    """A setting has a value that can't work; the message names it, the value and the range."""


class InvalidText(TokcacheError, TypeError):
    """A text was expected; the message names the type that came, or where a lone surrogate is."""


class InvalidScope(TokcacheError, TypeError):
    """A scope is not a str or None; the message names the type that came instead."""


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


class ServerUnreachable(ServerError):
    """No connection to a llama-server, or it broke; what the server did is not known."""


class ServerRefused(ServerUnreachable):
    """Nothing listens at a llama-server's address."""


class ServerTimeout(ServerError):
    """A llama-server did not answer in time, or none of its slots became free in time."""


class RequestRejected(ServerError):
    """A llama-server rejected a request (4xx); `status` is the HTTP status."""

    status: int = 400


class KeyRejected(RequestRejected):
    """A llama-server wants an API key, or another one (401, 403)."""


class PromptTooLong(RequestRejected):
    """A prompt does not fit into the context of a slot."""


class ServerFailed(ServerError):
    """A llama-server failed to answer a request (5xx); `status` is the HTTP status."""

    status: int = 500


class ServerLoading(ServerFailed):
    """A llama-server is up and still loads its model (503)."""


class ServerUnsupported(ServerFailed):
    """A llama-server was started without what a request needs (501); the message names it."""


class InvalidAnswer(ServerError):
    """A server answered what no llama-server answers; the message says what was found where."""


class InvalidFilename(TokcacheError, ValueError):
    """A name of a slot file is not one that tokcache makes; names from outside are refused."""


class MissingExtra(TokcacheError, ImportError):
    """An optional library is not installed; the message has the pip command that installs it."""


class MissingFile(TokcacheError, FileNotFoundError):
    """A file that was named does not exist; the message has its path."""


class InvalidPrompts(TokcacheError, ValueError):
    """A file of prompts can't be read; the message has its path and line."""


class InvalidCacheFile(TokcacheError, ValueError):
    """A cache file is damaged or of another tokenizer; the message says which, nothing changed."""


class NothingCached(TokcacheError, RuntimeError):
    """A tokenizer's answers are never kept: nothing to dump or load; the message says why."""


class TokenizerChanged(TokcacheError, RuntimeError):
    """The tokenizer was changed while a cache file was loaded; what was loaded is not used."""
