"""The model a coordinator serves: its shape, its files by hash, its tokenizer. No tensors."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from skynet.coordinator.text import AnswerText, TextModel
from skynet.errors import ConfigError, ModelError, PromptTooLong
from skynet.models.checkpoint import build_manifest
from skynet.models.config import read_spec
from skynet.models.embedded import EMBEDDED_DIR, EMBEDDED_NAME
from skynet.models.expected import check_complete
from skynet.models.manifest import Manifest, encode_manifest
from skynet.models.spec import DTYPE_BYTES, ModelSpec
from skynet.protocol.messages import ModelRef, Submit
from skynet.protocol.plan import Dtype

if TYPE_CHECKING:
    from skynet.models.hub import Hub, HubModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Everything about the model that decisions need."""

    ref: ModelRef
    spec: ModelSpec
    text: TextModel
    manifest: Manifest
    directory: Path | None  # a copy on this machine

    def check_length(self, submit: Submit) -> None:
        """Cheaply, before anything is read: raises PromptTooLong for text that can't fit, whatever its tokens are."""
        num_chars = len(submit.prompt or "") + sum(len(message.content) for message in submit.messages)
        limit = self.spec.max_positions * self.text.max_token_chars
        if num_chars > limit:
            raise PromptTooLong(
                f"the prompt has {num_chars} characters, this model takes {limit} at most "
                f"({self.spec.max_positions} tokens of up to {self.text.max_token_chars} characters); shorten it"
            )

    def prompt_ids(self, submit: Submit) -> list[int]:
        """Token ids of what was submitted. Raises ConfigError for what can't be turned into any."""
        name = self.ref.name
        if submit.model is not None and submit.model.rstrip("/") not in (name, name.rpartition("/")[2]):
            raise ConfigError(f"this swarm runs {self.ref.name}, not {submit.model}")
        if submit.prompt is not None:
            ids = self.text.encode(submit.prompt)
        else:
            ids = self.text.encode_chat([{"role": m.role, "content": m.content} for m in submit.messages])
        if not ids:
            raise ConfigError("the prompt is empty; give the model at least one token to continue")
        return ids

    @property
    def eos_ids(self) -> frozenset[int]:
        return self.text.eos_ids

    def answer_text(self, submit: Submit, prompt_ids: Sequence[int]) -> AnswerText:
        """A fresh text of an answer to this."""
        return self.text.answer(submit.stop, prompt_ids, submit.stop_token_ids)


class _Found(NamedTuple):
    """Where a model's files are. At least one of copy and hub model is there."""

    name: str
    small_files: Path  # config.json and tokenizer
    copy: Path | None  # of everything, on this machine
    hub: Hub | None = None
    hub_model: HubModel | None = None


def open_model(
    name: str, dtype: str | None, cache_dir: Path, hub_endpoint: str | None, cancel: threading.Event | None = None
) -> ServedModel:
    """Read what serving a model needs: a directory, a hub id, or the embedded one. Blocking; no tensors are kept.

    Raises ModelError naming the file and the fix; an unsupported architecture is refused before any weight is read.
    Raises StepAborted soon after `cancel` is set.
    """
    found = _find(name, cache_dir, hub_endpoint)
    spec = _read_spec(found, dtype)
    text = TextModel(found.small_files)
    if found.copy is not None:
        manifest = build_manifest(found.copy, cache_dir, _log_progress(name), cancel)
    else:
        from skynet.models.hub_manifest import HubManifestBuilder  # slow to import, and seldom needed

        assert found.hub is not None
        assert found.hub_model is not None
        manifest = HubManifestBuilder(found.hub, found.hub_model, cache_dir, _log_progress(name), cancel).build()
    check_complete(manifest, read_config(found.small_files))
    ref = ModelRef(
        name=found.name,
        revision=found.hub_model.revision if found.hub_model else "",
        digest=str(manifest.digest),
        manifest_bytes=len(encode_manifest(manifest)),
    )
    return ServedModel(ref, spec, text, manifest, found.copy)


def spec_of(name: str, dtype: str | None, cache_dir: Path, hub_endpoint: str | None) -> ModelSpec:
    """A model's shape, from its config.json alone."""
    return _read_spec(_find(name, cache_dir, hub_endpoint), dtype)


def _read_spec(found: _Found, dtype: str | None) -> ModelSpec:
    config = read_config(found.small_files)
    return read_spec(config, checked_dtype(dtype) or stored_dtype(config))


def _find(name: str, cache_dir: Path, hub_endpoint: str | None) -> _Found:
    if name == EMBEDDED_NAME:
        return _Found(name, EMBEDDED_DIR, EMBEDDED_DIR)
    directory = Path(name).expanduser()
    if directory.is_dir():
        return _Found(str(directory.resolve()), directory, directory)
    from skynet.models.hub import Hub, HubConfig  # slow to import, and seldom needed
    from skynet.models.hub_files import hub_small_files

    hub = Hub(HubConfig(endpoint=hub_endpoint) if hub_endpoint else HubConfig())
    located = hub.locate(name)
    if located.local is not None:
        return _Found(name, located.local, located.local, hub, located.hub)
    assert located.hub is not None
    return _Found(name, hub_small_files(hub, located.hub, cache_dir), None, hub, located.hub)


def stored_dtype(config: Mapping[str, object]) -> Dtype:
    """The type that config.json says the weights have; float32 if it doesn't say."""
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    return next((name for name in DTYPE_BYTES if name == stored), "float32")


def _log_progress(name: str) -> Callable[[int, int], None]:
    """Say now and then how far hashing a large model is."""
    said = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal said
        if total and done / total >= said + 0.1 and total > 1 << 30:
            said = done / total
            logger.info("hashing model=%s percent=%d", name, 100 * said)

    return progress


def read_config(directory: Path) -> dict[str, object]:
    """A model's config.json. Raises ModelError naming the file."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ModelError(f"{path}: there is no such file; --model takes a directory in Hugging Face layout") from exc
    except (OSError, ValueError) as exc:
        raise ModelError(f"{path}: unreadable ({exc}); fetch it again") from exc
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds {type(config).__name__}, expected an object")
    return cast("dict[str, object]", config)


def checked_dtype(dtype: str | None) -> Dtype | None:
    """An option's value. Raises ConfigError."""
    if dtype is None:
        return None
    for name in DTYPE_BYTES:
        if name == dtype:
            return name
    raise ConfigError(f"--dtype {dtype}: use {', '.join(DTYPE_BYTES)}")
