"""Every exception tokcache raises, rooted at `TokcacheError`.

Errors of the wrapped libraries pass through unchanged; these are tokcache's own. The last group is
caught inside tokcache and turned into a counted reason or an error of the first group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


class TokcacheError(Exception):
    """The base class: `except TokcacheError` catches every error that tokcache itself raises."""


class InvalidConfig(TokcacheError, ValueError):
    """A setting has an unusable value; the message names the setting, the value and the range."""


class InvalidText(TokcacheError, TypeError):
    """An argument is not a text; the message has its type, or the place of a lone surrogate."""


class InvalidScope(TokcacheError, TypeError):
    """A scope is neither a str nor None; the message names its type."""


class InvalidTokens(TokcacheError, ValueError):
    """An argument does not hold token ids; the message names the value that is not an int32 id."""


class UnsupportedTokenizer(TokcacheError, TypeError):
    """A tokenizer can't be wrapped; the message says which kinds can."""


class VocabularyMismatch(TokcacheError, ValueError):
    """Tokenizer and model have different vocabularies; the message names the first difference."""


class InvalidModel(TokcacheError, ValueError):
    """A model file is missing, damaged or of another kind than was asked for."""


class ModelClosed(TokcacheError, RuntimeError):
    """The model was closed, or belongs to the parent of a fork."""


class StateError(TokcacheError, RuntimeError):
    """A KV state could not be saved or restored; the sequence is unchanged."""


class TierUnavailable(TokcacheError, RuntimeError):
    """A tier below memory can't be used now; the message has the cause and the cure."""


class ServerError(TokcacheError, RuntimeError):
    """A llama-server was unreachable or answered with an error; the message quotes the error."""


class ServerUnreachable(ServerError):
    """The connection failed or broke; the server may or may not have handled the request."""


class ServerRefused(ServerUnreachable):
    """Nothing listens at the llama-server's address."""


class ServerTimeout(ServerError):
    """A llama-server did not answer in time, or none of its slots became free in time."""


class RequestRejected(ServerError):
    """A llama-server rejected a request (4xx); `status` is the HTTP status."""

    status: int = 400


class KeyRejected(RequestRejected):
    """A llama-server needs an API key, or rejected the given one (401, 403)."""


class PromptTooLong(RequestRejected):
    """A prompt does not fit into a slot's context."""


class ServerFailed(ServerError):
    """A llama-server failed to answer a request (5xx); `status` is the HTTP status."""

    status: int = 500


class ServerLoading(ServerFailed):
    """A llama-server is still loading its model (503)."""


class ServerUnsupported(ServerFailed):
    """A llama-server was started without an option that a request needs (501).

    The message names the option.
    """


class InvalidAnswer(ServerError):
    """A server's answer is not one of a llama-server; the message names the field and its value."""


class FileChanged(TokcacheError, OSError):
    """A file on disk is no longer the loaded one, so its digest would be another file's."""


class InvalidFilename(TokcacheError, ValueError):
    """A slot file's name was not made by tokcache; names from outside are refused."""


class MissingExtra(TokcacheError, ImportError):
    """An optional library is not installed; the message has the pip command for it."""


class MissingFile(TokcacheError, FileNotFoundError):
    """A named file does not exist; the message has its path."""


class InvalidPrompts(TokcacheError, ValueError):
    """A file of prompts can't be read; the message has its path and line."""


class InvalidRequest(TokcacheError, ValueError):
    """A request can't be compared with another one; the message names the field or the line."""


class InvalidTemplate(TokcacheError, ValueError):
    """A chat template is missing or can't be compiled; the message has the line and the error."""


class TemplateNotProven(TokcacheError, ValueError):
    """A construct of a chat template is not known to be safe; `line` is its place."""

    def __init__(self, why: str, node: Any) -> None:
        super().__init__(why)
        self.why, self.line = why, node.lineno


class TemplateNotTaken(TokcacheError, ValueError):
    """A chat template can't be taken apart; the text is the counted reason."""


class TemplateUnusual(TokcacheError, RuntimeError):
    """A chat template does something that cannot be watched; transformers renders it."""

    reason = "unusual"


class RenderingRefused(TokcacheError, ValueError):
    """Transformers has to render this chat; `reason` is the counted one."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class InvalidTrace(TokcacheError, ValueError):
    """A trace can't be read; the message has its path, the line or item, and the cause."""


class InvalidCacheFile(TokcacheError, ValueError):
    """A cache file is damaged or of another tokenizer; the message says which. Nothing changed."""


class NothingCached(TokcacheError, RuntimeError):
    """A tokenizer's answers are never cached, so nothing can be dumped or loaded.

    The message says why.
    """


class TokenizerChanged(TokcacheError, RuntimeError):
    """The tokenizer was changed while a cache file was loaded; the loaded entries are not used."""


# ---- caught inside tokcache: callers do not see these


class Abandoned(TokcacheError):
    """The thread that was encoding this text failed on another text; ask again."""


class CopyError(TokcacheError, RuntimeError):
    """A tokenizer can't be copied with proof; `reason` is the key of the counter."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the tokenizer can't be copied with proof: {reason}")
        self.reason = reason


class ChoiceDiscarded(TokcacheError):
    """Nobody needs the choice of an engine any more."""


class FastEncoderUnavailable(TokcacheError, RuntimeError):
    """An encoder is not installed or can't encode with this tokenizer; `reason` says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} can't encode with this tokenizer: {reason}; use tokenizers")
        self.reason = reason


class Unrecognised(TokcacheError):
    """No rule knows a component of a tokenizer; the text names the component."""


class Unsure(TokcacheError):
    """The text next to an added token can't be classified, so no cut is proven there."""


class IdLengthUnknown(TokcacheError):
    """The length in bytes of a token id's text is not known."""


class NotFromIds(TokcacheError):
    """A call can't be answered from token ids; the text is the key of the counter."""


class Malformed(TokcacheError):
    """A record of a trace is not one of its format; the text has the cause, and no prompt text."""


class RenderingFailed(TokcacheError):
    """A chat template did not render a chat.

    `kind` is `refused` if the template says so itself, `failed` if it raised another error, and
    `stopped` if it passed a limit of time, size or memory; `reason` is its error or the limit.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind = kind
        self.reason = reason


class Damaged(TokcacheError):
    """A cache file is damaged; the text follows the file's path in a message."""


class StateRefused(TokcacheError):
    """Stored bytes can't be used; the text is the key of the counter."""


class LinkFailed(TokcacheError):
    """A Redis did not answer as a Redis does; the text is the key of the counter."""


class ApiError(TokcacheError):
    """An error that is answered with an HTTP status; the message names the cure.

    Units: `retry_after_s` goes into the header Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        retry_after_s: int | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s
        # Members of llama-server's own error, such as n_ctx and n_prompt_tokens.
        self.details = dict(details or {})


class QueueFull(TokcacheError):
    """The queue has no room; try again after `retry_after_s`."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s
