"""How a coordinator is run: what its command's options say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from skynet.coordinator.gateway.config import GatewayConfig
from skynet.coordinator.planner import Layout, Objective, PlannerConfig
from skynet.errors import ConfigError
from skynet.protocol.addresses import check_host, local_interfaces, plain_ip


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorConfig:
    """What to serve, to whom, and where state lies."""

    model: str = "embedded"
    name: str = "skynet"
    dtype: str | None = None
    objective: str = "latency"
    layout: str | None = None
    context_tokens: int | None = None
    port: int = 47100
    bind: tuple[str, ...] = ()
    announce: tuple[str, ...] = ()  # further names or addresses for invites: of a router that forwards our ports
    admission: str | None = None  # None: as the store remembers, `lan` at first
    mdns: bool = True
    database: str | None = None
    lease_s: float = 4.0
    config_dir: Path
    cache_dir: Path
    hub_endpoint: str | None = None
    http: str | None = None  # HOST:PORT, or `off`; None: the default, or another port if that is taken

    def check_name(self) -> None:
        """Raises ConfigError for a name that can't be announced."""
        if not 1 <= len(self.name) <= 64 or not self.name.isprintable():
            raise ConfigError(f"--name {self.name[:64]!r}: give 1 to 64 printable characters")

    def check_hosts(self) -> None:
        """Raises ConfigError naming the address that can't be listened on or announced."""
        for host in self.announce:
            check_host(host, "--announce")
        own = {str(interface.ip) for interface in local_interfaces()}
        for host in self.bind:
            address = plain_ip(host)
            if address is None:
                raise ConfigError(f"--bind {host}: isn't an address; give one of {', '.join(sorted(own))}")
            if not address.is_unspecified and not address.is_loopback and str(address) not in own:
                raise ConfigError(
                    f"--bind {host}: this machine hasn't that address but {', '.join(sorted(own))}; for that of a "
                    f"router that forwards to it use --bind 0.0.0.0 --announce {host}"
                )

    def gateway(self) -> GatewayConfig | None:
        """None: no gateway. Raises ConfigError naming the option."""
        return GatewayConfig.parse(self.http)

    def planner(self) -> PlannerConfig:
        """Raises ConfigError naming the option."""
        try:
            objective = Objective(self.objective)
        except ValueError as exc:
            raise ConfigError(f"--objective {self.objective}: use {', '.join(Objective)}") from exc
        layout = Layout.parse(self.layout) if self.layout else None
        if self.context_tokens is None:
            return PlannerConfig(objective=objective, layout=layout)
        if self.context_tokens < 1:
            raise ConfigError(f"--context {self.context_tokens}: at least 1 token")
        return PlannerConfig(objective=objective, layout=layout, min_context_tokens=self.context_tokens)
