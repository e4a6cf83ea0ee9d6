"""What a request is answered when it can't be served: a status, and words that say what to change."""

from __future__ import annotations

from typing import Final

from skynet.protocol.messages import Failed

KINDS: Final = {  # as OpenAI calls them, by status
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

UNREAD: Final = frozenset({403, 408, 413, 415})  # a body that nobody reads may be on its way: its connection ends


class ApiError(Exception):
    """An answer without what was asked for. Each dialect has its own form for it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @property
    def kind(self) -> str:
        """What sort of error this is, in OpenAI's words."""
        return KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    @property
    def headers(self) -> dict[str, str]:
        """What goes with the status."""
        found = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return found | {"Connection": "close"} if self.status in UNREAD else found


def from_failed(failed: Failed, param: str | None, retry_after_s: int) -> ApiError:
    """What the engine says of a request, as a status. `param` holds the prompt."""
    text = failed.text
    match failed.error:
        case "PromptTooLong" | "CapacityError":
            return ApiError(400, text, param=param, code="context_length_exceeded")
        case "ConfigError" | "ModelError" | "ValueError":
            return ApiError(400, text, param=param)
        case "QueueFull":
            return ApiError(429, text, code="queue_full", retry_after_s=retry_after_s)
        case "NotServed":
            return ApiError(503, text, code="no_workers", retry_after_s=retry_after_s)
        case _:
            return ApiError(500, text)


def openai_body(error: ApiError) -> dict[str, object]:
    """OpenAI's form, which is also ours where no dialect has its own."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}
