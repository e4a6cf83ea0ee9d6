"""A local HTTP server that behaves like the hub: model info, redirects to a second host, ranges, broken connections."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "Test/Tiny-Model"
TOKEN = "hf_secret"


class FakeHub:
    """What the server has, how it misbehaves, and what it saw. Two ports: the API, and the storage it redirects to."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.break_after: int | None = None  # bytes of an answer, once per number in `breaks_left`
        self.breaks_left = 0
        self.failures_left = 0  # answers of 503
        self.is_gated = False
        self.ignores_range = False
        self.corrupt: str | None = None  # a file whose first byte arrives wrong
        self.requests: list[tuple[str, str, str | None]] = []  # (host kind, path, Range)
        self.storage_authorizations: list[str | None] = []
        self.lock = threading.Lock()
        self.endpoint = self.storage = ""

    def served(self, name: str) -> bytes:
        data = self.files[name]
        return bytes([data[0] ^ 1]) + data[1:] if self.corrupt == name else data

    def ranges_of(self, name: str) -> list[str | None]:
        return [r for kind, path, r in self.requests if kind == "storage" and path.endswith(name)]

    def info(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
            siblings.append(entry)
        return {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}


def _handler(hub: FakeHub, is_storage: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            with hub.lock:
                hub.requests.append(("storage" if is_storage else "api", path, self.headers.get("Range")))
            if is_storage:
                with hub.lock:
                    hub.storage_authorizations.append(self.headers.get("Authorization"))
                self._storage(path.rpartition("/")[2])
            elif path.startswith("/api/models/"):
                self._info(path)
            else:
                self._resolve(path)

        def _info(self, path: str) -> None:
            if not path.startswith(f"/api/models/{REPO}"):
                self._error(404, "RepoNotFound")
            elif path.removeprefix(f"/api/models/{REPO}") not in ("", "/revision/main", f"/revision/{COMMIT}"):
                self._error(404, "RevisionNotFound")
            else:
                self._answer(200, json.dumps(hub.info()).encode(), {"Content-Type": "application/json"})

        def _resolve(self, path: str) -> None:
            matched = re.match(rf"/{REPO}/resolve/{COMMIT}/([^/]+)\Z", path)
            if hub.is_gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._error(401, "GatedRepo")
            elif matched is None or matched[1] not in hub.files:
                self._error(404, "EntryNotFound")
            else:
                headers = {"Location": f"{hub.storage}/blobs/{matched[1]}", "X-Repo-Commit": COMMIT, "ETag": '"x"'}
                self._answer(302, b"", headers)

        def _storage(self, name: str) -> None:
            with hub.lock:
                fails, hub.failures_left = hub.failures_left > 0, max(0, hub.failures_left - 1)
            if fails:
                self._error(503, "")
                return
            data, status, headers = hub.served(name), 200, {"ETag": '"x"'}
            stated = re.match(r"bytes=(\d+)-(\d+)\Z", self.headers.get("Range", ""))
            if stated and not hub.ignores_range:
                start, end = int(stated[1]), min(int(stated[2]) + 1, len(data))
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
                data, status = data[start:end], 206
            self._answer(status, data, headers)

        def _error(self, status: int, code: str) -> None:
            self._answer(status, b"{}", {"X-Error-Code": code} if code else {})

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with hub.lock:
                cut = is_storage and hub.break_after is not None and hub.breaks_left > 0 and len(body) > hub.break_after
                hub.breaks_left -= cut
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body[: hub.break_after] if cut else body)
            self.close_connection = self.close_connection or cut

    return Handler


@contextlib.contextmanager
def fake_hub(directory: Path) -> Iterator[FakeHub]:
    """Serves a checkpoint directory as repository REPO."""
    hub = FakeHub({p.name: p.read_bytes() for p in sorted(directory.iterdir())})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, is_storage)) for is_storage in (False, True)]
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{s.server_address[1]}" for s in servers)
    threads = [threading.Thread(target=s.serve_forever, args=(0.02,)) for s in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()
