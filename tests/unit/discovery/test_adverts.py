"""Adverts as bytes that anybody may have sent, and the choice between them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skynet.errors import DiscoveryError, ProtocolError
from skynet.protocol.addresses import Interface
from skynet.protocol.adverts import AdvertBody, SwarmAdvert, choose, pack, unpack, useful_hosts
from skynet.protocol.identity import CERTIFICATE_LIFETIME_S, ProcessKey, PublicKey, SwarmKey

NOW = 1_800_000_000.0
KEY, OTHER_KEY = SwarmKey.generate(), SwarmKey.generate()
CERTIFICATE = ProcessKey.generate().certify(KEY, KEY.public_key, NOW)
HOSTS = tuple(f"fd00:1234:5678:9abc:def0:1234:5678:{i:x}" for i in range(16))
BODY = AdvertBody(name="at home", port=47100, hosts=HOSTS, protocol=1, package="0.1.0", certificate=CERTIFICATE)


class Pins:
    def __init__(self, **names: PublicKey) -> None:
        self.names = names

    def keys_of(self, name: str) -> tuple[PublicKey, ...]:
        return (self.names[name],) if name in self.names else ()


def on_the_wire(strings: dict[str, bytes]) -> dict[bytes, bytes | None]:
    return {key.encode(): value for key, value in strings.items()}


def advert(name: str = "ants", key: SwarmKey = KEY, **changes: object) -> SwarmAdvert:
    made = SwarmAdvert(name=name, swarm_key=key.public_key, port=47100, hosts=("192.168.1.5",))
    return replace(made, **changes)  # type: ignore[arg-type]


def test_an_advert_survives_the_wire_in_strings_of_255_bytes() -> None:
    strings = pack(BODY, KEY, NOW)
    assert all(len(key) + 1 + len(value) <= 255 for key, value in strings.items())
    read = unpack(on_the_wire(strings), NOW)
    assert (read.name, read.port, read.hosts, read.swarm_key) == ("at home", 47100, HOSTS, KEY.public_key)
    assert read.certificate == CERTIFICATE
    assert read.not_after == NOW + CERTIFICATE_LIFETIME_S


def test_an_advert_under_anothers_key_is_refused() -> None:
    forged = on_the_wire(pack(BODY, OTHER_KEY, NOW)) | {b"k": bytes(KEY.public_key)}
    with pytest.raises(ProtocolError, match="signature"):
        unpack(forged, NOW)


def test_an_altered_advert_is_refused() -> None:
    strings = on_the_wire(pack(BODY, KEY, NOW))
    chunk = strings[b"b0"]
    assert chunk is not None
    with pytest.raises(ProtocolError, match="signature"):
        unpack(strings | {b"b0": chunk.replace(b"at home", b"at hame")}, NOW)


def test_an_old_advert_is_refused() -> None:
    with pytest.raises(ProtocolError, match="ended"):
        unpack(on_the_wire(pack(BODY, KEY, NOW)), NOW + CERTIFICATE_LIFETIME_S + 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "x" * 65},
        {"name": ""},
        {"name": "a\x1b[2J"},
        {"port": 0},
        {"hosts": ("evil.example",)},
        {"port": 70000},
    ],
    ids=str,
)
def test_a_signed_advert_that_makes_no_sense_is_refused(changes: dict[str, object]) -> None:
    body = AdvertBody(**{**{f: getattr(BODY, f) for f in BODY.__struct_fields__}, **changes})
    with pytest.raises(ProtocolError, match=r"advert|display"):
        unpack(on_the_wire(pack(body, KEY, NOW)), NOW)


@given(
    base=st.booleans(),
    strings=st.dictionaries(
        st.sampled_from([b"v", b"k", b"s", b"b0", b"b1", b"junk"]), st.one_of(st.none(), st.binary(max_size=255))
    ),
)
def test_whatever_txt_strings_arrive_become_an_advert_or_one_error(
    base: bool, strings: dict[bytes, bytes | None]
) -> None:
    try:
        read = unpack((on_the_wire(pack(BODY, KEY, NOW)) if base else {}) | strings, NOW)
    except ProtocolError:
        return
    assert read.hosts == HOSTS


@given(st.binary(max_size=400))
def test_whatever_a_swarm_signs_becomes_an_advert_or_one_error(data: bytes) -> None:
    import struct

    signed = KEY.sign("advert", KEY.public_key, int(NOW) + 10, data)
    seal = struct.pack(">Q", signed.not_after) + signed.signature
    strings = {b"v": b"1", b"k": bytes(KEY.public_key), b"s": seal, b"b0": data[:240], b"b1": data[240:]}
    with pytest.raises(ProtocolError):
        unpack(strings, NOW)


def test_an_oversized_advert_is_refused_before_anything_is_checked() -> None:
    strings: dict[bytes, bytes | None] = {b"b%d" % i: bytes(255) for i in range(20)}
    with pytest.raises(ProtocolError, match="more than 2048 bytes"):
        unpack(strings, NOW)


# -- which address


LAN = (
    Interface(name="lo", address="127.0.0.1", prefix=8, is_loopback=True),
    Interface(name="eth0", address="192.168.1.20", prefix=24),
)


def test_another_machines_loopback_is_left_out_and_near_addresses_come_first() -> None:
    assert useful_hosts(("10.9.9.9", "fd00::1", "192.168.1.5", "127.0.0.1", "::1"), LAN) == (
        "192.168.1.5",
        "10.9.9.9",
        "fd00::1",
    )


def test_on_the_same_machine_loopback_comes_first() -> None:
    assert useful_hosts(("192.168.1.20", "127.0.0.1"), LAN) == ("127.0.0.1", "192.168.1.20")
    assert useful_hosts(("127.0.0.1", "::1"), LAN) == ("127.0.0.1", "::1")


# -- which swarm


def test_the_only_swarm_is_chosen() -> None:
    assert choose([advert()], None, Pins()) == advert()


def test_nothing_found_says_what_was_tried_and_what_to_do() -> None:
    with pytest.raises(DiscoveryError, match=r"no swarm answered: asked by mDNS.*--coordinator HOST:PORT"):
        choose([], None, Pins())


def test_several_swarms_are_listed_with_their_keys_and_addresses() -> None:
    with pytest.raises(DiscoveryError) as caught:
        choose([advert(), advert("bees", OTHER_KEY, hosts=("fd00::7",))], None, Pins())
    text = str(caught.value)
    assert f"ants (key {KEY.fingerprint}) at 192.168.1.5:47100" in text
    assert f"bees (key {OTHER_KEY.fingerprint}) at [fd00::7]:47100" in text
    assert "--swarm NAME" in text


def test_a_swarm_is_asked_for_by_name_or_by_key() -> None:
    adverts = [advert(), advert("bees", OTHER_KEY)]
    assert choose(adverts, "bees", Pins()).name == "bees"
    assert choose(adverts, KEY.fingerprint, Pins()).name == "ants"
    with pytest.raises(DiscoveryError, match=r"no swarm called 'wasps'.*others that answered: ants .*; bees"):
        choose(adverts, "wasps", Pins())


def test_a_swarm_that_calls_itself_by_another_s_fingerprint_is_not_taken_for_it() -> None:
    with pytest.raises(DiscoveryError, match=f"no swarm called '{KEY.fingerprint}'"):
        choose([advert(KEY.fingerprint, OTHER_KEY)], KEY.fingerprint, Pins())


def test_a_pinned_name_with_another_key_is_another_swarm() -> None:
    impostor = advert(key=OTHER_KEY)
    pins = Pins(ants=KEY.public_key)
    assert choose([impostor, advert()], None, pins) == advert()
    assert choose([impostor, advert()], "ants", pins) == advert()
    for swarm in (None, "ants"):
        with pytest.raises(DiscoveryError, match=rf"ignored, since another key.*--swarm {OTHER_KEY.fingerprint}"):
            choose([impostor], swarm, pins)
    assert choose([impostor], OTHER_KEY.fingerprint, pins) == impostor, "asked for by its key, it is meant"


def test_two_unknown_swarms_of_one_name_are_told_apart_by_key() -> None:
    with pytest.raises(DiscoveryError, match="or its key, where names are equal"):
        choose([advert(), advert(key=OTHER_KEY)], "ants", Pins())


def test_of_two_adverts_of_one_swarm_the_later_counts() -> None:
    old, new = advert(not_after=5, port=1), advert(not_after=6, port=2)
    assert choose([new, old], None, Pins()).port == 2


def test_a_swarm_of_another_version_says_which_side_to_upgrade() -> None:
    with pytest.raises(DiscoveryError, match=r"speaks protocol 2 .*upgrade this side"):
        choose([advert(protocol=2, package="9.0")], None, Pins())


@given(
    adverts=st.lists(
        st.builds(
            advert,
            name=st.sampled_from(["ants", "bees", ""]),
            key=st.sampled_from([KEY, OTHER_KEY]),
            hosts=st.sampled_from([(), ("192.168.1.5",)]),
            protocol=st.sampled_from([0, 1]),
        ),
        max_size=5,
    ),
    swarm=st.sampled_from([None, "ants", "", KEY.fingerprint]),
    is_pinned=st.booleans(),
)
def test_the_choice_is_one_of_the_adverts_or_an_error_in_words(
    adverts: list[SwarmAdvert], swarm: str | None, is_pinned: bool
) -> None:
    pins = Pins(ants=KEY.public_key) if is_pinned else Pins()
    try:
        chosen = choose(adverts, swarm, pins)
    except DiscoveryError as error:
        text = str(error)
    else:
        text = f"any other error fails this test; {chosen}"
        assert chosen in adverts
    assert len(text) > 40
