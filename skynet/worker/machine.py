"""What a worker takes of the machine it runs on: a name among the user's workers, addresses, the machine's identity."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from skynet.errors import ConfigError, DiscoveryError, ProtocolError
from skynet.protocol.hello import checked_suffix


@contextlib.contextmanager
def claimed_suffix(config_dir: Path, wanted: str, is_fixed: bool) -> Iterator[str]:
    """A worker suffix that no other live process of this user and machine has; a free one is stable across restarts."""
    try:
        checked_suffix(wanted)
    except ProtocolError as exc:
        raise ConfigError(f"--name {wanted}: {exc}") from exc
    directory = config_dir / "workers"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for number in range(1, 1000):
        suffix = wanted if number == 1 else f"{wanted}-{number}"
        descriptor = os.open(directory / f"{suffix}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            if is_fixed:
                raise ConfigError(f"--name {wanted}: a worker of that name runs here already; choose another") from None
            continue
        try:
            yield suffix
        finally:
            os.close(descriptor)
        return
    raise DiscoveryError("a thousand workers run here already")


def bindable(hosts: Sequence[str]) -> tuple[str, ...]:
    """Those of the announced addresses that this machine has itself (one behind NAT is announced but not bound)."""
    return tuple(host for host in hosts if _can_bind(host)) or ("127.0.0.1",)


def _can_bind(host: str) -> bool:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def host_id() -> str:
    """The same for all workers that share a machine's memory, and for no others.

    Copies of one disk image have the same machine-id, containers of one machine different ones: the kernel's own id
    comes first.
    """
    for path in ("/proc/sys/kernel/random/boot_id", "/etc/machine-id"):
        with contextlib.suppress(OSError):
            if found := Path(path).read_text(encoding="ascii", errors="replace").strip()[:36]:
                return found
    return socket.gethostname()[:64]
