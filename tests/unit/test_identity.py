"""Keys on disk, what they sign, and pins."""

from __future__ import annotations

import multiprocessing
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from skynet.errors import ConfigError, MalformedMessage, ProtocolError
from skynet.protocol.identity import (
    CERTIFICATE_LIFETIME_S,
    CurveCertificate,
    NodeKey,
    ProcessKey,
    SwarmKey,
    checked_curve_key,
    fingerprint_of,
    node_id_of,
    statement,
)
from skynet.protocol.pins import Pins

NOW = 1_800_000_000.0


def test_a_node_keeps_its_key(tmp_path: Path) -> None:
    first = NodeKey.load_or_create(tmp_path / "config")
    assert NodeKey.load_or_create(tmp_path / "config").public_key == first.public_key
    assert len(first.node_id) == 26
    assert first.node_id == node_id_of(first.public_key)


def test_key_file_and_directory_are_private(tmp_path: Path) -> None:
    NodeKey.load_or_create(tmp_path / "config")
    assert stat.S_IMODE((tmp_path / "config").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "config" / "node.key").stat().st_mode) == 0o600


def _load(directory: Path, barrier: threading.Barrier, found: multiprocessing.SimpleQueue[bytes]) -> None:
    barrier.wait(30)
    found.put(NodeKey.load_or_create(directory).public_key)


def test_processes_that_start_at_once_get_the_same_key(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(4), context.SimpleQueue()
    processes = [context.Process(target=_load, args=(tmp_path / "c", barrier, found)) for _ in range(4)]
    for process in processes:
        process.start()
    keys = {found.get() for _ in processes}
    for process in processes:
        process.join(30)
    assert len(keys) == 1


def test_key_that_others_may_read_is_refused_with_the_fix(tmp_path: Path) -> None:
    NodeKey.load_or_create(tmp_path)
    (tmp_path / "node.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        NodeKey.load_or_create(tmp_path)


def test_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match="chmod 700"):
        NodeKey.load_or_create(tmp_path / "open")


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_damaged_key_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"node\.key"):
        NodeKey.load_or_create(tmp_path)


def test_private_keys_stay_out_of_text() -> None:
    process_key = ProcessKey.generate()
    assert process_key.secret.decode() not in repr(process_key)
    assert "PRIVATE" not in repr(NodeKey.generate())


def test_statement_has_one_reading() -> None:
    """Golden bytes: a signature of version 1 must verify for ever."""
    key = NodeKey.generate().public_key
    assert statement("curve", key, 1, b"subject") == b"skynet/v1/curve\0" + key + b"\0\0\0\0\0\0\0\x01" + b"subject"


def test_certificate_holds_for_thirty_days() -> None:
    node, swarm, process = NodeKey.generate(), SwarmKey.generate(), ProcessKey.generate()
    certificate = process.certify(node, swarm.public_key, NOW)
    for age_s in (0.0, CERTIFICATE_LIFETIME_S - 1.0, -3600.0):  # the last: the verifier's clock is behind
        assert certificate.verify(node.public_key, swarm.public_key, NOW + age_s) == process.public
    with pytest.raises(ProtocolError, match="ended"):
        certificate.verify(node.public_key, swarm.public_key, NOW + CERTIFICATE_LIFETIME_S + 2)
    with pytest.raises(ProtocolError, match="at most"):
        certificate.verify(node.public_key, swarm.public_key, NOW - 3 * 86400)


def test_certificate_is_void_when_anything_it_covers_differs() -> None:
    node, swarm, process = NodeKey.generate(), SwarmKey.generate(), ProcessKey.generate()
    good = process.certify(node, swarm.public_key, NOW)
    other_curve = CurveCertificate(ProcessKey.generate().public, good.not_after, good.signature)
    longer = CurveCertificate(good.curve_key, good.not_after + 1, good.signature)
    other_purpose = node.sign("hello", swarm.public_key, good.not_after, process.public)
    repurposed = CurveCertificate(good.curve_key, good.not_after, other_purpose.signature)
    for certificate in (other_curve, longer, repurposed):
        with pytest.raises(ProtocolError, match="isn't by"):
            certificate.verify(node.public_key, swarm.public_key, NOW)
    with pytest.raises(ProtocolError, match="isn't by"):
        good.verify(node.public_key, SwarmKey.generate().public_key, NOW)
    with pytest.raises(ProtocolError, match="isn't by"):
        good.verify(NodeKey.generate().public_key, swarm.public_key, NOW)


@pytest.mark.parametrize("key", [b"", b"x" * 39, b"\xff" * 40, b"~" * 40])
def test_curve_key_that_is_not_z85_is_malformed(key: bytes) -> None:
    with pytest.raises(MalformedMessage):
        checked_curve_key(key, "test")


def test_swarm_is_pinned_at_first_sight(tmp_path: Path) -> None:
    key = SwarmKey.generate().public_key
    pins = Pins(tmp_path)
    assert pins.keys_of("home") == ()
    assert pins.pin("home", key, NOW) is True
    assert pins.pin("home", key, NOW) is False
    assert Pins(tmp_path).keys_of("home") == (key,)
    assert stat.S_IMODE((tmp_path / "pins.json").stat().st_mode) == 0o600


def test_another_key_for_a_pinned_name_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    known, other = SwarmKey.generate(), SwarmKey.generate()
    pins = Pins(tmp_path)
    pins.pin("home", known.public_key, NOW)
    with pytest.raises(ConfigError, match=f"{other.fingerprint}.*{known.fingerprint}"):
        pins.pin("home", other.public_key, NOW)
    assert pins.keys_of("home") == (known.public_key,)
    assert pins.pin("home", other.public_key, NOW, beside_others=True) is True
    assert set(pins.keys_of("home")) == {known.public_key, other.public_key}


def test_an_address_belongs_to_the_last_swarm_pinned_there(tmp_path: Path) -> None:
    first, second = SwarmKey.generate().public_key, SwarmKey.generate().public_key
    pins = Pins(tmp_path)
    assert pins.at("host:1") is None
    pins.pin("home", first, NOW, address="host:1")
    for number in range(20):
        pins.pin("home", first, NOW, address=f"host:{number}")
    assert pins.at("host:1") is None, "addresses of one swarm are bounded"
    assert pins.at("host:19") == first
    pins.pin("bees", second, NOW, address="host:19")
    assert pins.at("host:19") == second
    assert pins.keys_of("home") == (first,)


def test_pins_made_at_once_are_all_kept(tmp_path: Path) -> None:
    keys = [SwarmKey.generate().public_key for _ in range(8)]
    barrier = threading.Barrier(len(keys))

    def pin(index: int) -> None:
        barrier.wait(30)
        Pins(tmp_path).pin(f"swarm-{index}", keys[index], NOW)

    _in_threads(pin, len(keys))
    assert {p.public_key for p in Pins(tmp_path).all()} == set(keys)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("content", [b"", b"{}", b'[{"name": "x", "key": "zz", "first_seen": 1}]', b'[{"name": 1}]'])
def test_damaged_pins_are_named_and_not_overwritten(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pins.json"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"pins\.json"):
        Pins(tmp_path).pin("home", SwarmKey.generate().public_key, NOW)
    assert path.read_bytes() == content


def test_fingerprint_is_short_and_stable() -> None:
    assert fingerprint_of(bytes(32)) == "mzuh-vlpy-mk6x-o3ep"  # type: ignore[arg-type]


def _in_threads(work: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
