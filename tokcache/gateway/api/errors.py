"""The errors that a client sees, in the form of the API that it called."""

from __future__ import annotations

from typing import Any

from tokcache.errors import ApiError

# Source: the types of OpenAI's and of Anthropic's errors by HTTP status.
_OPENAI = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    501: "not_supported_error",
    503: "unavailable_error",
    504: "timeout_error",
}
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    501: "invalid_request_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_MAX_MESSAGE = 2_000


def error_body(error: ApiError, *, is_anthropic: bool) -> dict[str, Any]:
    """Return the JSON object that tells a client about an error."""
    message = str(error)[:_MAX_MESSAGE]
    if is_anthropic:
        kind = _ANTHROPIC.get(error.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}}
    kind = error.details.get("type") or _OPENAI.get(error.status, "server_error")
    own = {"message": message, "type": kind, "param": None, "code": error.code}
    return {"error": {**error.details, **own}}


def upstream_error(status: int, found: Any) -> ApiError:
    """Return llama-server's error as one of ours; its text is not from the prompt."""
    error = found.get("error") if isinstance(found, dict) else None
    if not isinstance(error, dict):
        return ApiError(502, f"the llama-server answered with status {status} and no JSON error")
    known = {
        name: error[name]
        for name in ("type", "n_prompt_tokens", "n_ctx")
        if isinstance(error.get(name), str | int)
    }
    code = error.get("code")
    if known.get("type") == "exceed_context_size_error":
        code = "context_length_exceeded"
    return ApiError(
        status if 400 <= status < 600 else 502,  # noqa: PLR2004 (the range of error statuses)
        str(error.get("message") or "the llama-server named no reason"),
        code=str(code) if code is not None else None,
        details=known,
    )
