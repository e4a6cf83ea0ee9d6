"""What `import skynet` offers, and that it costs nothing until it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import skynet


def test_every_name_is_resolved_on_first_use_and_without_torch() -> None:
    code = (
        "import sys, skynet; light = len(sys.modules); names = {n: getattr(skynet, n) for n in skynet.__all__}; "
        "assert all(getattr(v, '__name__', n) == n for n, v in names.items() if n != '__version__'); "
        "assert len(sys.modules) > light; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_importing_the_package_imports_nothing_else_of_ours() -> None:
    code = "import sys, skynet; print([n for n in sys.modules if n.startswith('skynet.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_a_name_that_isnt_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = skynet.Nothing
