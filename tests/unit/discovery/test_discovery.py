"""mDNS on this machine's loopback: finding, settling, and ignoring what hostile hosts say."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from skynet.protocol.addresses import Interface
from skynet.protocol.adverts import SERVICE_TYPE, AdvertBody, SwarmAdvert, choose, pack
from skynet.protocol.discovery import Advertiser, discover, instance_label
from skynet.protocol.identity import ProcessKey, PublicKey, SwarmKey

LOOPBACK = (Interface(name="lo", address="127.0.0.1", prefix=8, is_loopback=True),)


class Pins:
    def keys_of(self, name: str) -> tuple[PublicKey, ...]:
        return ()


def ours(adverts: list[SwarmAdvert], *keys: SwarmKey) -> list[SwarmAdvert]:
    """Without those of other swarms that run on this machine just now."""
    return [advert for advert in adverts if advert.swarm_key in {key.public_key for key in keys}]


async def search(key: SwarmKey, timeout_s: float = 5.0) -> list[SwarmAdvert]:
    return ours(await discover(timeout_s, key.fingerprint, Pins(), interfaces=LOOPBACK), key)


def test_processes_of_one_machine_find_each_other_and_quickly() -> None:
    async def run() -> None:
        key = SwarmKey.generate()
        certificate = ProcessKey.generate().certify(key, key.public_key, time.time())
        advertiser = Advertiser("at home", key, 47100, ["127.0.0.1"], certificate=certificate, interfaces=LOOPBACK)
        await advertiser.start()
        try:
            started = time.monotonic()
            (advert,) = await search(key)
            assert time.monotonic() - started < 4
            assert (advert.name, advert.hosts, advert.port) == ("at home", ("127.0.0.1",), 47100)
            assert advert.certificate == certificate
        finally:
            await advertiser.stop()
            await advertiser.stop()
        assert await search(key, 0.5) == []

    asyncio.run(run())


def test_two_coordinators_of_one_name_are_both_found_and_told_apart() -> None:
    async def run() -> None:
        keys = [SwarmKey.generate(), SwarmKey.generate()]
        advertisers = [
            Advertiser("home", key, 47100 + i, ["127.0.0.1"], interfaces=LOOPBACK) for i, key in enumerate(keys)
        ]
        try:
            for advertiser in advertisers:
                await advertiser.start()
            found = ours(await discover(5, None, Pins(), interfaces=LOOPBACK, settle_s=1.0), *keys)
            assert {advert.port for advert in found} == {47100, 47101}
            assert choose(found, keys[1].fingerprint, Pins()).port == 47101
        finally:
            for advertiser in advertisers:
                await advertiser.stop()

    asyncio.run(run())


def test_a_swarm_that_starts_while_we_search_is_found() -> None:
    async def run() -> None:
        key = SwarmKey.generate()
        advertiser = Advertiser("late", key, 47100, ["127.0.0.1"], interfaces=LOOPBACK)
        async with asyncio.TaskGroup() as tasks:
            searching = tasks.create_task(search(key))
            await asyncio.sleep(0)  # the search asks first
            await advertiser.start()
            try:
                assert [advert.name for advert in await searching] == ["late"]
            finally:
                await advertiser.stop()

    asyncio.run(run())


def test_hostile_adverts_are_ignored_with_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "skynet")
    key, liar = SwarmKey.generate(), SwarmKey.generate()
    good = AdvertBody(name="good", port=47100, hosts=("127.0.0.1",), protocol=1, package="0.1.0")
    hostile: dict[str, dict[str, bytes]] = {
        "empty": {},
        "garbage": {"v": b"1", "k": b"\xff" * 32, "s": bytes(72), "b0": b"\xc1" * 200},
        "huge": {"v": b"1", **{f"b{i}": bytes(240) for i in range(20)}},
        "forged": {**pack(good, liar, time.time()), "k": bytes(key.public_key)},
    }

    async def run() -> None:
        zeroconf = AsyncZeroconf(interfaces=["127.0.0.1"])
        advertiser = Advertiser("good", key, 47100, ["127.0.0.1"], interfaces=LOOPBACK)
        try:
            infos = [
                AsyncServiceInfo(
                    SERVICE_TYPE,
                    f"{name}-{key.fingerprint}.{SERVICE_TYPE}",
                    port=1,
                    addresses=[bytes(4)],
                    properties=strings,
                    server=f"{name}-{key.fingerprint}.local.",
                )
                for name, strings in hostile.items()
            ]
            await asyncio.gather(*[zeroconf.async_register_service(i, cooperating_responders=True) for i in infos])
            await advertiser.start()
            found = ours(await discover(5, key.fingerprint, Pins(), interfaces=LOOPBACK, settle_s=2.0), key, liar)
            assert [advert.name for advert in found] == ["good"]
        finally:
            await advertiser.stop()
            await zeroconf.async_unregister_all_services()
            await zeroconf.async_close()

    asyncio.run(run())
    lines = [r.getMessage() for r in caplog.records if "advert" in r.getMessage() and key.fingerprint in r.getMessage()]
    assert {line.split("name='")[1].split("-")[0] for line in lines} == set(hostile)


def test_where_mdns_is_impossible_nothing_is_found_and_nothing_breaks(caplog: pytest.LogCaptureFixture) -> None:
    nowhere = (Interface(name="eth9", address="192.0.2.199", prefix=24),)  # not an address of this machine

    async def run() -> None:
        assert await discover(1, None, Pins(), interfaces=nowhere) == []
        assert await discover(1, None, Pins(), interfaces=()) == []
        advertiser = Advertiser("x", SwarmKey.generate(), 47100, ["192.0.2.199"], interfaces=nowhere)
        await advertiser.start()
        await advertiser.stop()

    asyncio.run(run())
    assert "not announced" in caplog.text


@pytest.mark.parametrize("name", ["home", "東京 " * 16, "a.b/c", "x" * 64, "...", "Ann's box"])
def test_an_instance_label_is_one_short_dns_label(name: str) -> None:
    label = instance_label(name, SwarmKey.generate().fingerprint, "abcdef")
    assert len(label.encode()) <= 63
    assert "." not in label
