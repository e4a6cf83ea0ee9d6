"""Commands whose standard streams are closed or full, as services, cron jobs and full disks have it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOBODY = "--coordinator 127.0.0.1:9"  # where nothing listens


def run(command: str, directory: Path) -> tuple[int, str]:
    environment = {**os.environ, "SKYNET_CONFIG_DIR": str(directory), "SKYNET_CACHE_DIR": str(directory)}
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m skynet.cli {command}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", [f"infer x {NOBODY} >&-", f"infer - {NOBODY} <&-", f"chat {NOBODY} 0<&- 1>&- 2>&-"])
def test_closed_streams_change_nothing_about_how_a_command_ends(command: str, tmp_path: Path) -> None:
    code, said = run(command, tmp_path)
    assert code == 4, said
    assert said == "" or said.startswith("error: 127.0.0.1 port 9: can't be reached")


@pytest.mark.parametrize("command", ["--help", "plan --workers docs/examples/workers.yaml"])
def test_an_output_that_cant_be_written_is_one_line_and_a_code(command: str, tmp_path: Path) -> None:
    code, said = run(f"{command} > /dev/full", tmp_path)
    assert (code, said.count("\n")) == (2, 1), said
    assert said.startswith("error: standard output: No space left on device")


def test_an_error_that_cant_be_said_still_has_its_code(tmp_path: Path) -> None:
    assert run(f"infer x {NOBODY} 2> /dev/full", tmp_path)[0] == 4


def test_planning_without_a_swarm_is_told_of_the_file(tmp_path: Path) -> None:
    code, said = run(f"plan --model embedded {NOBODY}", tmp_path)
    assert code == 4
    assert "127.0.0.1 port 9: can't be reached" in said
    assert "--workers FILE" in said
