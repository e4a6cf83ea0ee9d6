"""What gets installed is what is in the tree: every package is listed, and a wheel holds every module and data file."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def sources() -> dict[str, Path]:
    """Path inside the installed tree -> file in ours; `cli/` is installed as `skynet.cli`."""
    found = {}
    for top, installed in ((ROOT / "skynet", "skynet"), (ROOT / "cli", "skynet/cli")):
        for file in top.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".pyc":
                found[f"{installed}/{file.relative_to(top)}"] = file
    return found


def test_every_folder_with_modules_is_a_listed_package() -> None:
    with_modules = {str(Path(path).parent).replace("/", ".") for path in sources() if path.endswith(".py")}
    assert sorted(SETUPTOOLS["packages"]) == sorted(with_modules)
    assert all(f"{package.replace('.', '/')}/__init__.py" in sources() for package in with_modules)


def test_what_we_ship_and_its_tests_are_type_checked() -> None:
    assert {"skynet", "cli", "tests"} <= set(PROJECT["tool"]["mypy"]["files"])
    assert PROJECT["tool"]["mypy"]["strict"] is True


def test_a_wheel_holds_every_module_and_every_data_file(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools", reason="building a wheel needs setuptools")
    wanted = next(r for r in PROJECT["build-system"]["requires"] if r.startswith("setuptools"))
    if wanted.rpartition("=")[2] != setuptools.__version__:
        pytest.skip(f"needs {wanted}, there is setuptools {setuptools.__version__}")
    tree = tmp_path / "tree"  # building writes beside the sources
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("skynet", "cli"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = (
        f"import sys; from setuptools import build_meta; sys.argv = ['build'];build_meta.build_wheel({str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        inside = {info.filename: info.file_size for info in opened.infolist() if ".dist-info/" not in info.filename}
        scripts = next(opened.read(n).decode() for n in opened.namelist() if n.endswith("entry_points.txt"))
    assert inside == {path: file.stat().st_size for path, file in sources().items()}
    assert "skynet = skynet.cli.main:main" in scripts
