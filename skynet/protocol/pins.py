"""Which key a swarm of a name has: pinned at first sight, so that nobody can take a known swarm's place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from skynet.errors import ConfigError, MalformedMessage
from skynet.protocol.identity import PublicKey, checked_public_key, fingerprint_of
from skynet.protocol.private_files import locked, private_dir, read_private, write_private

FILE_NAME: Final = "pins.json"
MAX_PINS: Final = 4096
MAX_PINNED_ADDRESSES: Final = 16  # of one swarm


@dataclass(frozen=True, slots=True)
class Pin:
    """One swarm this user has met."""

    name: str
    key: str  # hex
    first_seen: float  # seconds since 1970
    addresses: tuple[str, ...] = ()  # HOST:PORT that users gave and where this key answered, latest last

    @property
    def public_key(self) -> PublicKey:
        return checked_public_key(bytes.fromhex(self.key), f"pin of swarm {self.name!r}")


_decoder = msgspec.json.Decoder(tuple[Pin, ...])


class Pins:
    """The swarms a user has met: a 0600 file in the config directory, safe between processes."""

    def __init__(self, config_dir: Path) -> None:
        self._path = private_dir(config_dir) / FILE_NAME

    def all(self) -> tuple[Pin, ...]:
        """Every pin. Raises ConfigError if the file is damaged."""
        try:
            data = read_private(self._path)
        except FileNotFoundError:
            return ()
        try:
            pins = _decoder.decode(data)
            for pin in pins:
                _ = pin.public_key
        except (msgspec.MsgspecError, ValueError, MalformedMessage) as exc:
            raise ConfigError(
                f"{self._path}: isn't a list of pins ({exc}); restore it, or delete it and compare fingerprints again"
            ) from exc
        return pins

    def keys_of(self, name: str) -> tuple[PublicKey, ...]:
        """The keys pinned for a swarm's name: none if it was never seen, several if the user chose to know several."""
        return tuple(pin.public_key for pin in self.all() if pin.name == name)

    def at(self, address: str) -> PublicKey | None:
        """The key that answered at this address, given by the user, when he was last there; None: never seen."""
        return next((pin.public_key for pin in self.all() if address in pin.addresses), None)

    def advice(self, key: PublicKey) -> str:
        """What to do where a known swarm's place is taken by one with this key."""
        return (
            f"if the swarm was set up anew and you trust this key, pass --swarm {fingerprint_of(key)} once, or remove "
            f"the old pin from {self._path}; else don't join"
        )

    def pin(
        self, name: str, key: PublicKey, now: float, *, beside_others: bool = False, address: str | None = None
    ) -> bool:
        """Remember a swarm, and that it answers at `address`; True at first sight (print its fingerprint then).

        Raises ConfigError if another key is pinned for this name, since that is another swarm or somebody who plays it;
        `beside_others`: the user asked for this very key (an invite, its fingerprint), so both are kept. An address
        belongs to the last key pinned for it.
        """
        with locked(self._path):
            pins = self.all()
            known = [pin.public_key for pin in pins if pin.name == name]
            is_first = key not in known
            if is_first and known and not beside_others:
                raise ConfigError(
                    f"{name!r}: this swarm's key is {fingerprint_of(key)}, but {fingerprint_of(known[0])} is pinned; "
                    + self.advice(key)
                )
            news = (*pins, Pin(name, key.hex(), now))[-MAX_PINS:] if is_first else pins
            if address is not None:
                news = tuple(_with_address(pin, address, (pin.name, pin.key) == (name, key.hex())) for pin in news)
            if news != pins:
                self._write(news)
        return is_first

    def _write(self, pins: tuple[Pin, ...]) -> None:
        write_private(self._path, msgspec.json.format(msgspec.json.encode(pins)))


def _with_address(pin: Pin, address: str, is_its: bool) -> Pin:
    """This pin with the address, if it is its, else without; unchanged where that is so already."""
    if is_its == (address in pin.addresses):
        return pin
    others = tuple(known for known in pin.addresses if known != address)
    return replace(pin, addresses=(*others, address)[-MAX_PINNED_ADDRESSES:] if is_its else others)
