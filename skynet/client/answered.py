"""What a coordinator answered, made usable or an error of ours: whoever answers may be out of date or hostile."""

from __future__ import annotations

import json
from typing import Any

from skynet import errors
from skynet.errors import MalformedMessage, RequestFailed, SkyNetError
from skynet.protocol.messages import Answer, Failed


def body_of(answer: Answer) -> dict[str, Any]:
    """The facts in an answer. Raises MalformedMessage."""
    try:
        body = json.loads(answer.body)
    except (ValueError, RecursionError) as exc:
        raise MalformedMessage("the coordinator's answer isn't JSON; is its SkyNet another version?") from exc
    if not isinstance(body, dict):
        raise MalformedMessage(f"the coordinator's answer is {type(body).__name__}, expected an object")
    return body


def as_error(failed: Failed) -> SkyNetError:
    """The coordinator's error as the class it names, if that is one of ours that is made of its text alone."""
    kind = getattr(errors, failed.error, None)
    if isinstance(kind, type) and issubclass(kind, SkyNetError):
        try:
            return kind(failed.text)
        except TypeError:  # it says more than its text, which doesn't cross the wire
            return RequestFailed(f"{failed.error}: {failed.text}")
    return RequestFailed(failed.text)
