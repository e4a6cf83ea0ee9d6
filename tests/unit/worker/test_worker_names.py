"""A worker's name is its own among the workers of one user on one machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from skynet.errors import ConfigError
from skynet.worker.machine import claimed_suffix


def test_a_name_in_use_is_a_wrong_option_and_a_default_one_is_numbered(tmp_path: Path) -> None:
    with claimed_suffix(tmp_path, "cpu", is_fixed=True):
        with (
            pytest.raises(ConfigError, match="--name cpu: a worker of that name runs here already"),
            claimed_suffix(tmp_path, "cpu", is_fixed=True),
        ):
            pass
        with claimed_suffix(tmp_path, "cpu", is_fixed=False) as numbered:
            assert numbered == "cpu-2"
