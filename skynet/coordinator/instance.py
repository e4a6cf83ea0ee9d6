"""One coordinator per configuration directory: two with one swarm key and one store would work against each other."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from skynet.errors import ConfigError
from skynet.protocol.private_files import private_dir

LOCK_NAME: Final = "coordinator.lock"


@contextlib.contextmanager
def sole_coordinator(config_dir: Path) -> Iterator[None]:
    """Hold the directory for this process; the kernel gives it back however the process ends.

    Raises ConfigError naming the process that has it.
    """
    path = private_dir(config_dir) / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise ConfigError(f"{path}: can't be opened ({exc.strerror}); choose another SKYNET_CONFIG_DIR") from exc
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            raise ConfigError(
                f"{config_dir}: a coordinator runs with this directory already (pid {holder or 'unknown'}); stop that "
                "one first, or give this one a SKYNET_CONFIG_DIR of its own"
            ) from exc
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield  # the file stays: whoever waits for another one at its place would hold nothing
    finally:
        os.close(descriptor)
