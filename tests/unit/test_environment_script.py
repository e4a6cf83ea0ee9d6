"""`scripts/environment` on machines that lack something: it says what, and finishes what was left half made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


BACKEND = """
import zipfile


def build_editable(directory, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(f"{directory}/x-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("x-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: x\\nVersion: 1\\n")
        wheel.writestr("x-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("x-1.dist-info/RECORD", "")
    return "x-1-py3-none-any.whl"
"""
PROJECT = """
[project]
name = "x"
version = "1"
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project that needs nothing, so that nothing is fetched."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "environment", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "backend.py").write_text(BACKEND)
    (tmp_path / "constraints.txt").touch()
    return tmp_path


def run(tree: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: text for name, text in os.environ.items() if name != "SKYNET_VENV"} | variables
    return subprocess.run(
        ["bash", str(tree / "scripts" / "environment")],
        env={"PYTHON": sys.executable} | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_a_python_that_cant_make_environments_is_told_which_package_lacks(tree: Path) -> None:
    without = tree / "debian"  # has venv without ensurepip, as long as python3-venv isn't installed
    without.mkdir()
    (without / "ensurepip.py").write_text("raise ModuleNotFoundError('ensurepip')")
    done = run(tree, PYTHONPATH=str(without))
    assert done.returncode == 2
    assert f"apt install python3.{sys.version_info.minor}-venv" in done.stderr
    assert not (tree / ".venv").exists()


def test_an_environment_left_without_pip_gets_one(tree: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tree / ".venv")], check=True, timeout=60)
    done = run(tree)
    assert (done.returncode, done.stdout) == (0, ".venv/bin/python\n"), done.stderr
    assert list((tree / ".venv").glob("ready-*"))
