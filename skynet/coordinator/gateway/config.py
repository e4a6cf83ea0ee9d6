"""Where the gateway listens, and how much it takes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from skynet.errors import ConfigError
from skynet.protocol.addresses import parse_endpoint, plain_ip

DEFAULT_PORT: Final = 8000
OFF: Final = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """Times are in seconds."""

    host: str = "127.0.0.1"  # an address; loopback
    port: int = DEFAULT_PORT  # 0: any that is free
    is_chosen: bool = False  # by hand: if it is taken, that is an error
    names: tuple[str, ...] = ()  # further ones that a Host header may have
    max_body_bytes: int = 4 << 20  # more than the longest prompt takes, however it is escaped
    body_s: float = 30.0  # for a request's body to come
    wait_s: float = 60.0  # for workers, until a request is told that there are none
    deadline_s: float = 900.0  # for a whole answer
    max_connections: int = 2048
    max_prompts: int = 64  # of one request
    max_choices: int = 128  # of one request, all its prompts together
    max_messages: int = 4096  # of one conversation
    default_chat_tokens: int = 1024  # where a conversation doesn't say how long its answer may be
    default_completion_tokens: int = 16  # as OpenAI has it
    retry_after_s: int = 2

    @classmethod
    def parse(cls, text: str | None) -> GatewayConfig | None:
        """What `--http` says; None: no gateway. Raises ConfigError."""
        if text is None:
            return cls()
        if text.strip().lower() == OFF:
            return None
        is_any_port = text.rstrip().endswith(":0") and not text.rstrip().endswith("::0")
        try:
            host, port = parse_endpoint(text.rstrip().removesuffix(":0") if is_any_port else text, DEFAULT_PORT)
        except ConfigError as exc:
            raise ConfigError(f"--http: {exc}, or {OFF}") from exc
        address = plain_ip("127.0.0.1" if host.lower() == "localhost" else host)
        if address is None:
            raise ConfigError(f"--http {text}: {host!r} isn't an address; give one, for example 127.0.0.1:{port}")
        if not address.is_loopback:
            raise ConfigError(
                f"--http {text}: there are no API keys yet, and without them everybody who reaches {host} could use "
                f"the swarm; listen on 127.0.0.1:{port}, and reach it from elsewhere through an SSH tunnel"
            )
        return cls(host=str(address), port=0 if is_any_port else port, is_chosen=True)
