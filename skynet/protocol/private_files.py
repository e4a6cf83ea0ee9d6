"""Files that only their owner may read: keys and pins. Safe when several processes start at once."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from skynet.errors import ConfigError

LOCK_TIMEOUT_S: Final = 10.0
MAX_PRIVATE_BYTES: Final = 1 << 20
_IS_POSIX: Final = os.name == "posix"


def private_dir(path: Path) -> Path:
    """Create `path` with mode 0700, or check that nobody else can write to it. Raises ConfigError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as exc:
        raise ConfigError(f"{path}: can't be used as a private directory: {exc.strerror}; choose another") from exc
    if _IS_POSIX and status.st_uid not in (os.getuid(), 0):
        raise ConfigError(f"{path}: belongs to user id {status.st_uid}, not to you; choose another directory")
    if _IS_POSIX and status.st_mode & 0o022:
        raise ConfigError(f"{path}: others may write to it (mode {stat.S_IMODE(status.st_mode):04o}); chmod 700 {path}")
    return path


def read_private(path: Path) -> bytes:
    """Read a file that nobody else may read or write. Raises FileNotFoundError or ConfigError."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if _IS_POSIX and status.st_mode & 0o077:
                raise ConfigError(
                    f"{path}: others may read it (mode {stat.S_IMODE(status.st_mode):04o}, expected 0600); "
                    f"chmod 600 {path}, and delete it if somebody may have copied it"
                )
            data = file.read(MAX_PRIVATE_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise ConfigError(f"{path}: can't be read: {exc.strerror}") from exc
    if len(data) > MAX_PRIVATE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_PRIVATE_BYTES} bytes, so it isn't ours; move it away")
    return data


def write_private(path: Path, data: bytes) -> None:
    """Replace `path` atomically by a file of mode 0600. Raises ConfigError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as exc:
        raise ConfigError(f"{path}: can't be written: {exc.strerror}; free space or choose another directory") from exc


def create_private_once(path: Path, make: Callable[[], bytes]) -> bytes:
    """The content of `path`, made by the first process that asks; every process gets the same bytes."""
    try:
        return read_private(path)
    except FileNotFoundError:
        pass
    with locked(path):
        try:
            return read_private(path)
        except FileNotFoundError:
            write_private(path, make())
    return read_private(path)


@contextlib.contextmanager
def locked(path: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold the lock that guards `path` between processes and threads. Raises ConfigError at the deadline."""
    lock_path = path.with_name(f"{path.name}.lock")
    try:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise ConfigError(f"{lock_path}: can't be created: {exc.strerror}; choose another directory") from exc
    try:
        deadline = time.monotonic() + timeout_s
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise ConfigError(f"{lock_path}: another process has held it for {timeout_s:g} s; end that process")
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)  # which also gives the lock back


if _IS_POSIX:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

else:

    def _try_lock(descriptor: int) -> bool:
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
