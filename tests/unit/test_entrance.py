"""Whom a process takes for its swarm: real listeners on loopback, one after the other at the same address."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from skynet.errors import DiscoveryError
from skynet.protocol.admission import AdmissionListener
from skynet.protocol.entrance import EntranceConfig, Ticket, enter
from skynet.protocol.hello import Hello, Welcome
from skynet.protocol.identity import ProcessKey, SwarmKey
from skynet.protocol.pins import Pins
from skynet.protocol.roles import Role

HOST = "127.0.0.1"
HOME, OTHER = SwarmKey.generate(), SwarmKey.generate()


@contextlib.asynccontextmanager
async def swarm_at(port: int, key: SwarmKey, name: str = "home") -> AsyncIterator[AdmissionListener]:
    """A swarm that lets everybody in; the listener's stats tell whether somebody said something to it."""
    process_key = ProcessKey.generate()

    async def admit(hello: Hello, source: str) -> Welcome:
        return Welcome(
            peer_id=hello.peer_id,
            role=hello.role,
            grants=(),
            swarm_name=name,
            coordinator=process_key.certify(key, key.public_key, time.time()),
            ports={"control": 1},
            lease_s=4.0,
            seen_address=source,
        )

    async with AdmissionListener(key, admit, [HOST], port=port) as listener:
        yield listener


async def come(directory: Path, port: int, **options: object) -> Ticket:
    config = EntranceConfig(coordinator=f"{HOST}:{port}", config_dir=directory, **options)  # type: ignore[arg-type]
    return await enter(config, Role.CLIENT, "probe")


async def known_port(directory: Path, name: str = "home") -> int:
    """Where HOME was met once; it is gone now."""
    async with swarm_at(0, HOME, name) as listener:
        assert (await come(directory, listener.port)).is_first_visit
        assert not (await come(directory, listener.port)).is_first_visit
    return listener.port


@pytest.mark.parametrize("name", ["home", "elsewhere"])
def test_another_swarm_at_a_known_address_hears_nothing(tmp_path: Path, name: str) -> None:
    async def main() -> None:
        port = await known_port(tmp_path)
        async with swarm_at(port, OTHER, name) as impostor:
            with pytest.raises(DiscoveryError, match=f"{OTHER.fingerprint}.*{HOME.fingerprint}.*pins.json"):
                await come(tmp_path, port)
            assert impostor.stats.welcomed == impostor.stats.refused == 0

    asyncio.run(main())


def test_a_swarm_that_was_set_up_anew_is_joined_by_its_fingerprint(tmp_path: Path) -> None:
    """From then on the address is the new one's."""

    async def main() -> None:
        port = await known_port(tmp_path)
        async with swarm_at(port, OTHER):
            assert (await come(tmp_path, port, swarm=OTHER.fingerprint)).is_first_visit
            assert (await come(tmp_path, port)).swarm_key == OTHER.public_key
        async with swarm_at(port, HOME):
            with pytest.raises(DiscoveryError, match="another swarm answers there than before"):
                await come(tmp_path, port)

    asyncio.run(main())


def test_a_swarm_s_name_is_compared_with_pins_where_an_address_is_given_too(tmp_path: Path) -> None:
    async def main() -> None:
        await known_port(tmp_path)
        async with swarm_at(0, OTHER) as impostor:  # at another address
            with pytest.raises(DiscoveryError, match=f"{OTHER.fingerprint}.*{HOME.fingerprint}.*pins.json"):
                await come(tmp_path, impostor.port, swarm="home")
            assert impostor.stats.welcomed == 0
        async with swarm_at(0, HOME) as moved:
            assert not (await come(tmp_path, moved.port, swarm="home")).is_first_visit

    asyncio.run(main())


def test_a_swarm_with_another_name_or_fingerprint_than_asked_for_is_not_joined(tmp_path: Path) -> None:
    async def main() -> None:
        async with swarm_at(0, OTHER, "bees") as bees:
            with pytest.raises(DiscoveryError, match=r"called 'bees'.*asks for 'ants'"):
                await come(tmp_path, bees.port, swarm="ants")
            with pytest.raises(DiscoveryError, match=f"{OTHER.fingerprint}.*asks for {HOME.fingerprint}"):
                await come(tmp_path, bees.port, swarm=HOME.fingerprint)
            assert Pins(tmp_path).all() == ()
            assert (await come(tmp_path, bees.port, swarm="bees")).is_first_visit

    asyncio.run(main())


def test_a_process_comes_back_to_its_own_swarm_only(tmp_path: Path) -> None:
    """Whatever is pinned by then, and whatever the swarm calls itself now."""

    async def main() -> None:
        async with swarm_at(0, OTHER) as another:
            with pytest.raises(DiscoveryError, match=f"{OTHER.fingerprint}.*{HOME.fingerprint}"):
                await come(tmp_path, another.port, swarm="home", swarm_key=HOME.public_key)
            assert another.stats.welcomed == 0
        async with swarm_at(0, HOME, "renamed") as own:
            ticket = await come(tmp_path, own.port, swarm="home", swarm_key=HOME.public_key)
            assert ticket.swarm_key == HOME.public_key

    asyncio.run(main())


def test_pins_of_a_version_that_knew_no_addresses_still_count(tmp_path: Path) -> None:
    async def main() -> None:
        port = await known_port(tmp_path)
        file = tmp_path / "pins.json"
        file.write_text(
            json.dumps([{k: pin[k] for k in ("name", "key", "first_seen")} for pin in json.loads(file.read_text())])
        )
        async with swarm_at(port, OTHER) as impostor:
            with pytest.raises(DiscoveryError, match=f"{OTHER.fingerprint}.*{HOME.fingerprint}.*pins.json"):
                await come(tmp_path, port, swarm="home")
            assert impostor.stats.welcomed == 0
        async with swarm_at(port, HOME):
            assert not (await come(tmp_path, port)).is_first_visit
        assert [pin.addresses for pin in Pins(tmp_path).all()] == [(f"{HOST}:{port}",)]

    asyncio.run(main())
