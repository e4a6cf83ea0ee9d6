"""Who may ask: our own names, our own pages, JSON; and where the gateway may listen."""

from __future__ import annotations

import socket

import pytest

from skynet.coordinator.gateway.config import GatewayConfig
from skynet.coordinator.gateway.errors import ApiError
from skynet.coordinator.gateway.gateway import listen
from skynet.coordinator.gateway.guards import Guard, is_json
from skynet.errors import ConfigError

GUARD = Guard.of("127.0.0.2", ["llm.example"])


def check(method: str = "GET", host: str | None = "localhost:8000", **headers: str) -> int:
    """The status that a request with these headers gets; 200 if it passes."""
    pairs = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    pairs += [] if host is None else [(b"host", host.encode("latin-1"))]
    try:
        GUARD.check(method, "http", pairs)
    except ApiError as exc:
        return exc.status
    return 200


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "127.0.0.2", "llm.example:80"]
)
def test_our_own_names_pass(host: str) -> None:
    assert check(host=host) == 200


@pytest.mark.parametrize(
    "host",
    [None, "", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil@localhost", "localhost/x",
     "[::1", "localhost:x", "localhost:99999", "[::2]:8000", "0.0.0.0", "local host", "\xff"],
)  # fmt: skip
def test_any_other_name_is_refused(host: str | None) -> None:
    assert check(host=host) == 403


def test_two_hosts_are_refused() -> None:
    with pytest.raises(ApiError):
        GUARD.check("GET", "http", [(b"host", b"localhost"), (b"host", b"localhost")])


def test_only_our_own_pages_may_ask() -> None:
    assert check(origin="http://localhost:8000") == 200
    for origin in (
        "null",
        "",
        "http://evil.example",
        "https://localhost:8000",
        "http://localhost:3000",
        "http://127.0.0.1:8000",
    ):
        assert check(origin=origin) == 403, origin
    assert check(sec_fetch_site="same-origin") == check(sec_fetch_site="none") == 200
    assert check(sec_fetch_site="cross-site") == check(sec_fetch_site="same-site") == 403
    assert check(sec_fetch_site="cross-site", sec_fetch_mode="navigate") == 200  # a link was followed
    assert check("POST", sec_fetch_site="cross-site", sec_fetch_mode="navigate", content_type="application/json") == 403


def test_a_body_must_say_that_it_is_json() -> None:
    assert is_json("application/json")
    assert is_json("Application/JSON; charset=UTF-8")
    for kind in (
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/json; charset=utf-16",
        "application/jsonp",
    ):
        assert check("POST", content_type=kind) == 415, kind
    assert check("POST") == 415


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("127.0.0.1:9000", "127.0.0.1", 9000), ("localhost:0", "127.0.0.1", 0), ("[::1]:0", "::1", 0),
     ("::1", "::1", 8000), ("127.0.0.1", "127.0.0.1", 8000), ("127.0.0.3:1", "127.0.0.3", 1)],
)  # fmt: skip
def test_an_address_on_loopback_can_be_chosen(text: str, host: str, port: int) -> None:
    config = GatewayConfig.parse(text)
    assert config is not None
    assert (config.host, config.port, config.is_chosen) == (host, port, True)


def test_the_gateway_can_be_off_and_has_a_default() -> None:
    assert GatewayConfig.parse("off") is None
    config = GatewayConfig.parse(None)
    assert config is not None
    assert (config.host, config.port, config.is_chosen) == ("127.0.0.1", 8000, False)


@pytest.mark.parametrize("text", ["0.0.0.0:8000", "192.168.1.4:8000", "[::]:8000", "::", "8.8.8.8:0"])
def test_an_address_that_others_reach_is_refused_without_keys(text: str) -> None:
    with pytest.raises(ConfigError, match="there are no API keys yet"):
        GatewayConfig.parse(text)


@pytest.mark.parametrize("text", ["", "x y", "http://localhost:1", "localhost:99999", "example.org:80", "on"])
def test_what_isnt_an_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--http"):
        GatewayConfig.parse(text)


def test_a_taken_port_is_an_error_only_if_it_was_chosen(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--http 127.0.0.1:{port}: can't listen there"):
            listen(GatewayConfig(port=port, is_chosen=True))
        with listen(GatewayConfig(port=port)) as other:
            assert other.getsockname()[1] not in (0, port)
    assert f"port taken, another is used port={port}" in caplog.text
