"""Variables of the environment become values in one place, and nothing else of ours looks at them."""

from __future__ import annotations

import re
from pathlib import Path

from skynet.client.environment import OF_LIBRARIES, VARIABLES, Environment

ROOT = Path(__file__).parents[2]


def test_every_variable_is_read_and_an_empty_one_counts_as_absent() -> None:
    read = Environment.read({name: f"/{name}" for name in VARIABLES})
    assert {str(getattr(read, field)) for field in Environment.__slots__} == {f"/{name}" for name in VARIABLES}
    empty = Environment.read(dict.fromkeys(VARIABLES, ""))
    assert empty == Environment.read({})
    assert (empty.coordinator, empty.config_dir) == (None, Path.home() / ".config" / "skynet")


def test_directories_follow_the_desktop_s_variables_and_ours_come_first() -> None:
    homes = {"XDG_CONFIG_HOME": "/conf", "XDG_CACHE_HOME": "/cache"}
    assert Environment.read(homes).config_dir == Path("/conf/skynet")
    assert Environment.read(homes).cache_dir == Path("/cache/skynet")
    assert Environment.read(homes | {"SKYNET_CACHE_DIR": "~/mine"}).cache_dir == Path.home() / "mine"


def test_the_environment_is_read_in_one_module_alone() -> None:
    allowed = {"skynet/client/environment.py", "skynet/testing/processes.py"}  # what a child process inherits
    modules = [*ROOT.glob("skynet/**/*.py"), *ROOT.glob("cli/**/*.py")]
    readers = {
        str(module.relative_to(ROOT))
        for module in modules
        if re.search(r"\bos\.(environ|getenv)|from os import .*(environ|getenv)", module.read_text())
    }
    assert readers <= allowed


def test_every_variable_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in readme for name in (*VARIABLES, *OF_LIBRARIES))
