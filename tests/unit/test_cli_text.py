"""What peers sent is shown to the user as text, whatever is in it."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skynet.cli.ask import full_path  # type: ignore  # its directory is called cli
from skynet.cli.common import (  # type: ignore  # its directory is called cli
    UNPRINTABLE,
    fail,
    printable,
    printable_line,
    set_up_logging,
    set_up_warnings,
)
from skynet.cli.tables import render_status  # type: ignore

from skynet.errors import RequestFailed
from skynet.models.store.store import Progress
from skynet.protocol.plan import Epoch
from skynet.worker.progress import LoadBars

TRICKS = ("[model.safetensors]", "[/x]", "[bold red]loud", ":smile:", "[link=http://a]b")
ESCAPES = "\x1b[2J\x1b]0;title\x07 \x9b1A\r\u202eab\n"


def status_of(text: str) -> dict[str, Any]:
    worker = {
        "id": f"node.{text}", "device": "cuda:0", "device_name": text, "threads": 1, "layers": text, "share": text,
        "weight_bytes": 1, "kv_bytes": 1, "memory_bytes": 1, "link_ms": None, "tokens_per_s": 0.0, "state": text,
    }  # fmt: skip
    replica = {"epoch": text, "layout": text, "phase": text, "num_sequences": 0, "predicted_decode_tokens_per_s": 1.0}
    return {
        "name": text, "fingerprint": text, "epoch": text, "shortage": text, "num_requests": 0, "num_queued": 0,
        "model": {"name": text, "type": text, "num_layers": 2, "dtype": text},
        "workers": [worker], "replicas": [replica],
    }  # fmt: skip


@pytest.mark.parametrize("text", TRICKS)
def test_status_shows_markup_of_peers_as_it_is(text: str) -> None:
    shown = render_status(status_of(text), width=400)
    assert shown.count(text) == 15


def test_no_escape_sequence_of_a_peer_reaches_the_terminal_by_status() -> None:
    shown = render_status(status_of(f"a{ESCAPES}b"), width=400)
    assert not UNPRINTABLE.search(shown)
    assert "\\x1b[2J" in shown
    assert len(shown.splitlines()) == len(render_status(status_of("a")).splitlines()), (
        "a newline in a name begins a line of its own"
    )


def test_workers_of_one_name_are_told_apart_by_their_nodes() -> None:
    facts = status_of("cpu")
    ids = ["abcdefgh.cpu", "abcdexyz.cpu", "zzzzzzzz.cpu", "zzzzzzzz.gpu", "abcdefgh.cpu-2"]
    facts["workers"] = [facts["workers"][0] | {"id": worker} for worker in ids]
    shown = [line.split()[0] for line in render_status(facts, width=400).splitlines()[-6:-1]]
    assert shown == ["abcdef.cpu", "abcdex.cpu", "zzzz.cpu", "gpu", "cpu-2"]


def test_a_directory_is_asked_for_as_the_coordinator_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "./mine", "mine/", f"{tmp_path}/mine/"):
        assert full_path(name) == str(tmp_path / "mine")
    for other in ("embedded", "Qwen/Qwen3-0.6B", "", None):
        assert full_path(other) == other


@given(st.text())
def test_printable_text_has_nothing_a_terminal_obeys(text: str) -> None:
    assert not UNPRINTABLE.search(printable(text))
    assert "\n" not in printable_line(text)
    printable(text).encode("utf-8")


def test_text_in_any_script_is_left_alone() -> None:
    text = "Ωmega, 日本語, שלום, \N{FAMILY}\N{ZERO WIDTH JOINER}\N{WOMAN}\tand\nso on"
    assert printable(text) == text


def test_an_error_that_quotes_a_peer_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail(RequestFailed(f"refused: {ESCAPES}"))
    assert "\x1b" not in capsys.readouterr().err


# -- logs


class Terminal(io.StringIO):
    """Remembers what is written, and says that somebody looks."""

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, set_up: Callable[[], None]) -> Iterator[Terminal]:
    """stderr, with the command's logging on it. (Not a fixture: pytest sets stderr anew for the test itself.)"""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers.clear()
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    set_up()
    try:
        yield terminal
    finally:
        root.handlers[:] = before
        root.setLevel(level)


@pytest.mark.parametrize("set_up", [lambda: set_up_logging("info"), set_up_warnings])
def test_an_event_is_one_printable_line(monkeypatch: pytest.MonkeyPatch, set_up: Callable[[], None]) -> None:
    with terminal(monkeypatch, set_up) as shown:
        logging.getLogger("skynet").warning("refused reason=%s", f"{ESCAPES}2026 INFO forged")
    lines = shown.getvalue().splitlines()
    assert len(lines) == 1
    assert not UNPRINTABLE.search(lines[0])


def test_log_lines_stand_above_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, lambda: set_up_logging("info")) as shown:
        bars = LoadBars(is_shown=True)
        bars.update(Epoch(1, 2), Progress(bytes_total=4, bytes_by_source={"hub": 1}))
        start = len(shown.getvalue())
        logging.getLogger("skynet").info("peer joined")
        first, _, _ = shown.getvalue()[start:].partition("peer joined")
        bars.end(Epoch(1, 2))
        assert "\x1b[2K" in first, "the line was written into the bar"
        assert sys.stderr is shown
