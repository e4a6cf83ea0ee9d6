"""Who may ask at all. A page of somebody else's in the user's browser must not reach a gateway on loopback."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from skynet.coordinator.gateway.errors import ApiError

LOOPBACK_NAMES: Final = ("localhost", "127.0.0.1", "::1")
JSON: Final = "application/json"
Headers = Sequence[tuple[bytes, bytes]]  # names in lower case, as ASGI has them


@dataclass(frozen=True, slots=True)
class Guard:
    """Checks what a request's headers say of where it comes from."""

    names: frozenset[str]  # that a Host header may have

    @classmethod
    def of(cls, host: str, further: Iterable[str] = ()) -> Guard:
        """For a gateway that listens on this address."""
        return cls(frozenset(name.lower() for name in (*LOOPBACK_NAMES, host, *further)))

    def check(self, method: str, scheme: str, headers: Headers) -> None:
        """Raises ApiError: 403 for another's name or page, 415 for a body that a mere form could send."""
        host = _only(headers, b"host")
        name = host_name(host)
        if name is None or name not in self.names:
            raise ApiError(403, "this Host is no name of this gateway", code="host_not_allowed")
        origin = _only(headers, b"origin") if _has(headers, b"origin") else None
        if origin is not None and origin.lower() != f"{scheme}://{host}".lower():
            raise ApiError(403, "requests of other sites' pages are refused", code="origin_not_allowed")
        if _only(headers, b"sec-fetch-site") in ("cross-site", "same-site") and not _is_visit(method, headers):
            raise ApiError(403, "requests of other sites' pages are refused", code="origin_not_allowed")
        if method in ("POST", "PUT", "PATCH") and not is_json(_only(headers, b"content-type")):
            raise ApiError(415, f"send the body as JSON, with Content-Type: {JSON}", code="not_json")


def host_name(host: str) -> str | None:
    """The name in a Host header, without port and brackets; None if it isn't one."""
    if not host or any(sign in host for sign in "/@?#\\ \t"):
        return None
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
        return parts.hostname
    except ValueError:
        return None


def is_json(content_type: str) -> bool:
    """Whether a Content-Type header says JSON, in UTF-8."""
    kind, *parameters = (part.strip().lower() for part in content_type.split(";"))
    return kind == JSON and all(p in ("", "charset=utf-8", 'charset="utf-8"') for p in parameters)


def _is_visit(method: str, headers: Headers) -> bool:
    """Somebody followed a link."""
    return method == "GET" and _only(headers, b"sec-fetch-mode") == "navigate"


def _has(headers: Headers, name: bytes) -> bool:
    return any(key == name for key, _ in headers)


def _only(headers: Headers, name: bytes) -> str:
    """A header's value; empty if it is missing, or there several times."""
    found = [value for key, value in headers if key == name]
    return found[0].decode("latin-1") if len(found) == 1 else ""
