"""Several hosts on one machine: network namespaces joined by a switch, with links to cut and to slow down, and NAT.

Needs root and Linux's `ip` and `tc` (NAT also `nft`); `missing()` says in words what isn't there. Nothing touches the
machine's own network: the switch is a bridge in a namespace of its own. Leaving the `with` block ends what runs in the
hosts and removes them.

    with Network() as network:
        box, laptop = network.host("box"), network.host("laptop")
        server = box.start([sys.executable, "server.py"])
        print(laptop.run([sys.executable, "client.py", box.address]).stdout)
        laptop.cut()
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

from skynet.errors import SkyNetError

logger = logging.getLogger(__name__)

COMMAND_TIMEOUT_S: Final = 20.0
STOP_S: Final = 5.0
_networks: Final = itertools.count()


class HostError(SkyNetError):
    """The system refused to build or change a host; the text is what it said."""


def missing(*, nat: bool = False) -> str | None:
    """Why hosts can't be made here; None if they can."""
    for tool in ("ip", "tc", "unshare", *(("nft",) if nat else ())):
        if shutil.which(tool) is None:
            return f"there is no `{tool}` command here"
    probe = f"sn{os.getpid()}-probe"
    try:
        _system("ip", "netns", "add", probe)
    except HostError as exc:
        return f"network namespaces aren't permitted here: {exc}"
    try:
        _system("ip", "-n", probe, "link", "add", "x0", "type", "veth", "peer", "name", "x1")
        if nat:
            _system("ip", "netns", "exec", probe, "nft", "add table ip probe")
    except HostError as exc:
        return f"virtual links or NAT aren't permitted here: {exc}"
    finally:
        _system("ip", "netns", "del", probe)
    return None


class Host:
    """One machine of a Network; its own interfaces, routes and loopback. Made by `Network`."""

    def __init__(self, name: str, namespace: str, address: str, port: tuple[str, str]) -> None:
        self.name = name
        self.namespace = namespace
        self.address = address  # of eth0
        self._port = port  # the other end of eth0: namespace and interface
        self._processes: list[subprocess.Popen[str]] = []

    @property
    def prefix(self) -> tuple[str, ...]:
        """What goes before a command so that it runs here (as the same process): this host's network and name."""
        return ("ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", _ENTER, self.name)

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Run a command on this host, with pipes for its input and output. It ends with the host at the latest."""
        process = subprocess.Popen(
            [*self.prefix, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        self._processes.append(process)
        return process

    def run(
        self, command: Sequence[str], *, timeout_s: float = 30.0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this host to its end. Raises HostError if it fails or takes longer."""
        process = self.start(command, env)
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as exc:
            raise HostError(f"{self.name}: {command[0]} didn't end within {timeout_s} s") from exc
        if process.returncode:
            raise HostError(f"{self.name}: {command[0]} ended with {process.returncode}: {errors.strip()[-2000:]}")
        return subprocess.CompletedProcess(list(command), 0, output, errors)

    def cut(self) -> None:
        """Lose this host's link without a word: frames vanish, connections stay open and hang."""
        namespace, interface = self._port
        _system("ip", "-n", namespace, "link", "set", interface, "nomaster")

    def mend(self) -> None:
        """Undo `cut`."""
        namespace, interface = self._port
        _system("ip", "-n", namespace, "link", "set", interface, "master", "switch")

    def unplug(self) -> None:
        """Pull the cable: this host's system sees its link go down. `plug` undoes it."""
        namespace, interface = self._port
        _system("ip", "-n", namespace, "link", "set", interface, "down")

    def plug(self) -> None:
        namespace, interface = self._port
        _system("ip", "-n", namespace, "link", "set", interface, "up")

    def part(self, other: Host) -> None:
        """Lose the way between two hosts of one switch without a word; both reach all others. One pair at a time."""
        self._isolate("on")
        other._isolate("on")

    def rejoin(self, other: Host) -> None:
        """Undo `part`."""
        self._isolate("off")
        other._isolate("off")

    def _isolate(self, state: str) -> None:
        namespace, interface = self._port
        _system("ip", "-n", namespace, "link", "set", interface, "type", "bridge_slave", "isolated", state)

    def route(self, network: str, via: str) -> None:
        """Reach `network` through a router."""
        _system("ip", "-n", self.namespace, "route", "replace", network, "via", via)

    def limit(self, bytes_per_s: int) -> None:
        """Slow this host's link to a rate, each way on its own."""
        for namespace, interface in ((self.namespace, "eth0"), self._port):
            shape = ("tbf", "rate", f"{8 * bytes_per_s}bit", "burst", "16kb", "latency", "200ms")
            _system("tc", "-n", namespace, "qdisc", "replace", "dev", interface, "root", *shape)

    def unlimit(self) -> None:
        """Undo `limit`."""
        for namespace, interface in ((self.namespace, "eth0"), self._port):
            _system("tc", "-n", namespace, "qdisc", "del", "dev", interface, "root")

    def stop(self) -> None:
        """End what still runs here."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_S)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        self._processes.clear()


class Network:
    """A switch with hosts on it, 10.<n>.0.0/24, and private networks behind NAT, 10.<n>.<k>.0/24."""

    def __init__(self) -> None:
        index = next(_networks)
        self._prefix = f"sn{os.getpid()}-{index}"
        self._lan = f"10.{100 + index % 100}"
        self._ports = itertools.count(2)
        self._inner = itertools.count(1)
        self._stack = ExitStack()
        self._switch = ""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._stack = stack
            self._switch = self._namespace("switch")
            _system("ip", "-n", self._switch, "link", "add", "switch", "type", "bridge", "mcast_snooping", "0")
            _system("ip", "-n", self._switch, "link", "set", "switch", "up")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def host(self, name: str) -> Host:
        """A new host on the switch."""
        namespace = self._namespace(name)
        number = next(self._ports)
        address = f"{self._lan}.0.{number}"
        port = (self._switch, f"port{number}")
        self._link(namespace, "eth0", f"{address}/24", port)
        _system("ip", "-n", self._switch, "link", "set", port[1], "master", "switch", "up")
        return self._made(Host(name, namespace, address, port))

    def lone_host(self, name: str) -> Host:
        """A new host without any network but its loopback."""
        namespace = self._namespace(name)
        return self._made(Host(name, namespace, "127.0.0.1", (namespace, "lo")))

    def host_behind_nat(self, name: str) -> Host:
        """A new host in a private network; its router is on the switch, lets it out and nobody in."""
        router = self.host(f"{name}-nat")
        host = self._routed(name, router)
        router.run(["nft", _NAT_RULES])
        return host

    def host_beyond(self, name: str, neighbours: Sequence[Host]) -> Host:
        """A new host in another subnet; a router on the switch joins it with these hosts, without NAT."""
        router = self.host(f"{name}-gw")
        host = self._routed(name, router)
        for neighbour in neighbours:
            neighbour.route(f"{host.address.rpartition('.')[0]}.0/24", router.address)
        return host

    def _routed(self, name: str, router: Host) -> Host:
        inner = f"{self._lan}.{next(self._inner)}"
        namespace = self._namespace(name)
        port = (router.namespace, "lan0")
        self._link(namespace, "eth0", f"{inner}.2/24", port)
        _system("ip", "-n", router.namespace, "addr", "add", f"{inner}.1/24", "dev", "lan0")
        _system("ip", "-n", router.namespace, "link", "set", "lan0", "up")
        _system("ip", "-n", namespace, "route", "add", "default", "via", f"{inner}.1")
        router.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])
        return self._made(Host(name, namespace, f"{inner}.2", port))

    def _namespace(self, name: str) -> str:
        namespace = f"{self._prefix}-{name}"
        _system("ip", "netns", "add", namespace)
        self._stack.callback(_remove, namespace)
        _system("ip", "-n", namespace, "link", "set", "lo", "up")
        return namespace

    def _link(self, namespace: str, interface: str, address: str, port: tuple[str, str]) -> None:
        end = ("type", "veth", "peer", "name", port[1], "netns", port[0])
        _system("ip", "-n", namespace, "link", "add", interface, *end)
        _system("ip", "-n", namespace, "addr", "add", address, "dev", interface)
        _system("ip", "-n", namespace, "link", "set", interface, "up")

    def _made(self, host: Host) -> Host:
        self._stack.callback(host.stop)
        return host


# A host has a name and an id of its own, seen by its processes alone.
_ENTER: Final = """
hostname "$0"
if [ -e /etc/machine-id ]; then
  id=$(mktemp) && echo "$0" | md5sum | cut -c1-32 >"$id" && mount --bind "$id" /etc/machine-id && rm "$id"
fi
exec "$@"
"""

_NAT_RULES: Final = """
table ip nat {
  chain out { type nat hook postrouting priority srcnat; oifname "eth0" masquerade; }
  chain through {
    type filter hook forward priority filter; policy drop;
    iifname "lan0" accept; ct state established,related accept;
  }
}
"""


def _remove(namespace: str) -> None:
    try:
        _system("ip", "netns", "del", namespace)
    except HostError as exc:
        logger.warning("namespace left behind name=%s reason=%s", namespace, exc)


def _system(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise HostError(f"{' '.join(command)}: {exc}") from exc
    if done.returncode:
        raise HostError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
