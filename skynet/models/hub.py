"""Models on the Hugging Face hub: which files a pinned revision has, and any range of their bytes. No torch."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import httpx2  # what huggingface_hub speaks: its session and its errors are httpx2's
from huggingface_hub import (
    HfApi,
    get_session,
    get_token,
    hf_hub_url,
    hf_raise_for_status,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from skynet.errors import ModelError, StepAborted, WeightError
from skynet.models.checkpoint import weight_files

logger = logging.getLogger(__name__)

HUB_ENDPOINT: Final = "https://huggingface.co"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?\Z", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}\Z")
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 5.0
_TRY_AGAIN: Final = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True, kw_only=True)
class HubConfig:
    """How to reach the hub."""

    endpoint: str = HUB_ENDPOINT
    token: str | None = field(default=None, repr=False)  # None: the one that `hf auth login` saved, if any
    is_offline: bool = field(default_factory=is_offline_mode)  # use what is on this machine alone; HF_HUB_OFFLINE
    timeout_s: float = 20.0  # of one connection attempt, and of a silence within an answer
    max_attempts: int = 6  # without a byte in between
    cache_dir: Path | None = None  # huggingface_hub's own cache; None: where it keeps it by default


class HubFile(NamedTuple):
    """A file of a revision."""

    name: str
    num_bytes: int
    sha256: str | None  # of the whole file; None for small ones kept in git


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model pinned to one commit."""

    repo_id: str
    revision: str  # 40 hex digits
    files: tuple[HubFile, ...] = ()

    def file(self, name: str) -> HubFile | None:
        return next((f for f in self.files if f.name == name), None)


class Located(NamedTuple):
    """Where a model is: on this machine, on the hub, or both (a snapshot that huggingface_hub keeps)."""

    local: Path | None
    hub: HubModel | None


class Hub:
    """Asks one endpoint. Thread-safe; every wait is bounded by the config."""

    def __init__(self, config: HubConfig | None = None) -> None:
        self.config = config or HubConfig()
        self._api = HfApi(endpoint=self.config.endpoint, token=self.config.token)

    def locate(self, name: str, revision: str | None = None) -> Located:
        """A directory, or a hub id at a revision (a branch, a tag, a commit; None: its default branch).

        Raises ModelError that says what to change.
        """
        if name and Path(name).is_dir():
            return Located(Path(name), None)
        if not _HUB_ID.match(name):
            raise ModelError(f"{name}: neither a directory nor a hub id such as Qwen/Qwen3-0.6B; check the path")
        if self.config.is_offline:
            local = self.snapshot(name, revision)
            if local is None:
                raise ModelError(
                    f"{name}: not on this machine and offline mode is on; go online once, or give a directory"
                )
            return Located(local, None)
        model = self.resolve(name, revision)
        return Located(self.snapshot(name, model.revision), model)

    def snapshot(self, repo_id: str, revision: str | None) -> Path | None:
        """A complete copy that huggingface_hub keeps on this machine. Asks nobody."""
        found = try_to_load_from_cache(repo_id, "config.json", cache_dir=self.config.cache_dir, revision=revision)
        if not isinstance(found, str):
            return None
        directory = Path(found).parent
        try:
            return directory if all((directory / file).is_file() for file in weight_files(directory)) else None
        except WeightError:
            return None

    def resolve(self, repo_id: str, revision: str | None = None) -> HubModel:
        """Pin a model to a commit and list its files. Raises ModelError (not found, gated, no network)."""
        with self._errors(repo_id):
            info = self._api.model_info(repo_id, revision=revision, files_metadata=True, timeout=self.config.timeout_s)
            if not _COMMIT.match(str(info.sha)):
                raise ModelError(
                    f"{repo_id}: {self.config.endpoint} names no commit for it; try again later, or give a directory"
                )
            files = tuple(
                HubFile(s.rfilename, s.size, s.lfs.sha256 if s.lfs else None)
                for s in info.siblings or ()
                if isinstance(s.size, int) and s.size >= 0 and "/" not in s.rfilename
            )
            return HubModel(repo_id, str(info.sha), files)

    def stream(
        self, model: HubModel, name: str, offset: int, size: int, cancel: threading.Event | None = None
    ) -> Generator[bytes, None, None]:
        """Bytes [offset, offset + size) of a file, block by block, resumed after a broken connection.

        Raises ModelError (no network, gated, ...), WeightError (no such file), StepAborted (cancelled).
        """
        cancel = cancel or threading.Event()
        end, failures = offset + size, 0
        while offset < end:
            try:
                for block in self._range(model, name, offset, end):
                    if cancel.is_set():
                        raise StepAborted(f"{model.repo_id}/{name}: loading was cancelled")
                    offset, failures = offset + len(block), 0
                    yield block
                if offset < end:
                    raise httpx2.ReadError(f"the answer ended {end - offset} bytes early")
            except httpx2.HTTPError as exc:
                failures += 1
                status = exc.response.status_code if isinstance(exc, HfHubHTTPError) else None
                if failures >= self.config.max_attempts or (status is not None and status not in _TRY_AGAIN):
                    with self._errors(model.repo_id, name):
                        raise
                logger.debug("hub download resumed file=%s offset=%d reason=%s", name, offset, exc)
                cancel.wait(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (failures - 1)))

    def _range(self, model: HubModel, name: str, offset: int, end: int) -> Iterator[bytes]:
        """One request; whole blocks of [offset, end) until it ends or breaks."""
        url = hf_hub_url(model.repo_id, name, revision=model.revision, endpoint=self.config.endpoint)
        headers = {"Range": f"bytes={offset}-{end - 1}", "Accept-Encoding": "identity", "User-Agent": "skynet-swarm"}
        if (token := self.config.token or get_token()) is not None:
            headers["Authorization"] = f"Bearer {token}"  # dropped by the session when it is redirected to another host
        with get_session().stream("GET", url, headers=headers, timeout=self.config.timeout_s) as response:
            if response.is_error:
                response.read()
            hf_raise_for_status(response)
            at = _first_byte(response, offset)
            for block in response.iter_raw():
                wanted = block[max(0, offset - at) : max(0, end - at)]  # a server that ignores Range sends all
                at += len(block)
                if wanted:
                    yield wanted
                if at >= end:
                    return

    @contextlib.contextmanager
    def _errors(self, repo_id: str, name: str = "") -> Iterator[None]:
        """The hub's errors as ours, with what to do."""
        subject, endpoint = f"{repo_id}/{name}" if name else repo_id, self.config.endpoint
        try:
            yield
        except GatedRepoError as exc:
            raise ModelError(
                f"{subject}: gated; accept its terms at {endpoint}/{repo_id}, then log in "
                "with `hf auth login` or set HF_TOKEN"
            ) from exc
        except RepositoryNotFoundError as exc:
            raise ModelError(
                f"{subject}: not found at {endpoint}, or private; check the id, or log in with `hf auth login`"
            ) from exc
        except RevisionNotFoundError as exc:
            raise ModelError(f"{subject}: has no such revision at {endpoint}; check its name there") from exc
        except EntryNotFoundError as exc:
            raise WeightError(
                f"{subject}: the revision has no such file at {endpoint}; choose another model or revision"
            ) from exc
        except HFValidationError as exc:
            raise ModelError(f"{subject}: not a hub id: {exc}; check its spelling") from exc
        except OfflineModeIsEnabled as exc:
            raise ModelError(f"{subject}: HF_HUB_OFFLINE is set; unset it, or give a directory") from exc
        except HfHubHTTPError as exc:
            raise ModelError(f"{subject}: {endpoint} answered {exc.response.status_code}; try again later") from exc
        except httpx2.HTTPError as exc:
            raise ModelError(
                f"{subject}: {endpoint} can't be reached ({exc}); check the network, or give a directory"
            ) from exc


def _first_byte(response: httpx2.Response, offset: int) -> int:
    """Where the answer's bytes start in the file."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise httpx2.ReadError(f"the answer came as {response.headers['Content-Encoding'][:32]}, asked for plain bytes")
    if response.status_code != 206:
        return 0
    stated = re.match(r"bytes (\d{1,18})-", response.headers.get("Content-Range", ""))
    if stated is None or int(stated[1]) != offset:
        raise httpx2.ReadError(
            f"asked for byte {offset}, got {response.headers.get('Content-Range', 'an unstated range')[:64]}"
        )
    return offset
