"""Asking to enter a swarm, and the listener that is asked: one short exchange over TLS 1.3.

The listener sends a Challenge, reads one Hello of at most 4 KiB, answers with Welcome or Refused, and closes. Each
message is preceded by its length, 4 bytes big endian. Nobody is trusted before the answer, so everything is bounded:
the time of an exchange, connections at once, and how fast one address may come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, cast

from skynet.errors import ConfigError, DiscoveryError, MalformedMessage, ProtocolError, VersionMismatch
from skynet.protocol import hello as wire
from skynet.protocol.address_limits import AddressLimiter, RateLimit, plain_address
from skynet.protocol.hello import Challenge, Envelope, Hello, HelloFactory, Refused, Welcome
from skynet.protocol.identity import PublicKey, SwarmKey, fingerprint_of
from skynet.protocol.possession import ProofSecret
from skynet.protocol.tls import client_context, peer_key, server_context

logger = logging.getLogger(__name__)
MAX_REFUSALS = 256  # different ones that the log has had

Admit = Callable[[Hello, str], Awaitable[Welcome | Refused]]
_LENGTH: Final = struct.Struct(">I")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerConfig:
    """Bounds of what strangers can cost us."""

    request_timeout_s: float = 3.0  # from accept to the last byte of the Hello
    admit_timeout_s: float = 10.0  # for our own decision
    max_connections: int = 256  # one address has at most burst + per_s * request_timeout_s of them
    each_address: RateLimit = field(default_factory=lambda: RateLimit(burst=64, per_s=16))
    all_addresses: RateLimit = field(default_factory=lambda: RateLimit(burst=300, per_s=300))

    def __post_init__(self) -> None:
        if min(self.request_timeout_s, self.admit_timeout_s) <= 0:
            raise ValueError("timeouts must be positive")
        if self.max_connections < 1:
            raise ValueError("at least one connection must be allowed")


@dataclass(slots=True, eq=False)
class _Visit:
    """One connection, from accept to close. Owned by the listener."""

    source: str
    task: asyncio.Task[None] | None = None
    is_started: bool = False  # its task owns the socket
    is_deciding: bool = False  # its Hello is in, our own decision is under way


@dataclass(slots=True)
class ListenerStats:
    """What happened since the start; read it, don't write it."""

    accepted: int = 0
    limited: int = 0  # closed unheard: over its address's rate
    displaced: int = 0  # closed while waiting for its Hello: a newer connection needed the place
    failed: int = 0  # no TLS, no valid Hello, or too slow
    refused: int = 0
    welcomed: int = 0


class _StreamProtocol(asyncio.StreamReaderProtocol):
    """Keeps the transport that the handshake made."""

    transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's aren't of that class
        super().connection_made(transport)


class AdmissionListener:
    """Hears Hellos on the given addresses, all on one port, and answers with what `admit` decides.

    `admit` gets only Hellos proven to come from their node, for this swarm and for a fresh challenge. `async with` or
    `start`/`stop` own its tasks; after `start`, `port` is the one it listens on.
    """

    def __init__(
        self,
        swarm_key: SwarmKey,
        admit: Admit,
        hosts: Sequence[str],
        port: int = 0,
        config: ListenerConfig | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.port = port
        self.stats = ListenerStats()
        self._swarm_key, self._admit, self._hosts, self._clock = swarm_key, admit, tuple(hosts), clock
        self._config = config or ListenerConfig()
        self._tls = server_context(swarm_key)
        self._limiter = AddressLimiter(self._config.each_address, self._config.all_addresses)
        self._sockets: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._refusals: dict[tuple[str, str, str], None] = {}  # that were logged, the last ones
        self._visits: dict[_Visit, None] = {}  # in order of arrival

    @property
    def num_connections(self) -> int:
        return len(self._visits)

    async def __aenter__(self) -> AdmissionListener:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def start(self) -> None:
        """Bind and begin to accept. Raises ConfigError naming the address that can't be had."""
        self._sockets, self.port = _bind_all(self._hosts, self.port, backlog=self._config.max_connections)
        loop = asyncio.get_running_loop()
        self._accepting = [loop.create_task(self._accept(s), name="admission-accept") for s in self._sockets]

    async def run(self) -> None:
        """Until cancelled, after `start`. Raises what ended accepting: who lets nobody in any more should end."""
        await asyncio.gather(*self._accepting)

    async def stop(self) -> None:
        """Close everything. May be called twice."""
        tasks = [*self._accepting, *(visit.task for visit in self._visits if visit.task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listening in self._sockets:
            listening.close()
        self._accepting, self._sockets = [], []

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listening)
            except OSError as exc:  # out of file descriptors, or the peer was gone before we looked
                logger.warning("admission can't accept reason=%s", exc)
                await asyncio.sleep(0.1)
                continue
            self._visited(connection, plain_address(str(address[0])))

    def _visited(self, connection: socket.socket, source: str) -> None:
        """Give a new connection a task of its own, or close it."""
        self.stats.accepted += 1
        if not self._limiter.allow(source, asyncio.get_running_loop().time()):
            self.stats.limited += 1
            connection.close()
            return
        self._make_room()
        visit = _Visit(source)
        self._visits[visit] = None
        visit.task = asyncio.get_running_loop().create_task(self._serve(visit, connection), name=f"admission-{source}")
        visit.task.add_done_callback(lambda task: self._left(visit, connection, task))

    def _make_room(self) -> None:
        """At the bound, the connection that has waited longest goes: an honest one is done within milliseconds."""
        if len(self._visits) < self._config.max_connections:
            return
        victim = next((visit for visit in self._visits if not visit.is_deciding), next(iter(self._visits)))
        self.stats.displaced += 1
        del self._visits[victim]
        if victim.task:
            victim.task.cancel()

    def _left(self, visit: _Visit, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._visits.pop(visit, None)
        if not visit.is_started:
            connection.close()
        if not task.cancelled() and (exc := task.exception()):
            logger.error("admission failed source=%s", visit.source, exc_info=exc)

    async def _serve(self, visit: _Visit, connection: socket.socket) -> None:
        visit.is_started = True
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(self._config.request_timeout_s):
                reader, writer = await self._handshake(connection)
                challenge, secret = wire.new_challenge()
                await _send(writer, wire.encode(challenge))
                envelope = await _receive(reader)
            visit.is_deciding = True
            answer = await self._decide(envelope, challenge, secret, visit.source)
            async with asyncio.timeout(self._config.request_timeout_s):
                await _send(writer, wire.encode(answer))
                await _close(writer)
        except (OSError, EOFError, TimeoutError, ProtocolError) as exc:
            self.stats.failed += 1
            logger.debug("admission broken off source=%s reason=%s", visit.source, exc or type(exc).__name__)
        finally:
            if writer is not None:
                writer.transport.abort()

    async def _handshake(self, connection: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=wire.MAX_MESSAGE_BYTES + _LENGTH.size, loop=loop)
        protocol = _StreamProtocol(reader, loop=loop)
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                connection,
                ssl=self._tls,
                ssl_handshake_timeout=self._config.request_timeout_s,
                ssl_shutdown_timeout=self._config.request_timeout_s,
            )
        except BaseException:
            # Cancelled between the end of the handshake and our turn, asyncio would wait for the peer to say goodbye.
            if protocol.transport is not None:
                protocol.transport.abort()
            raise
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def _decide(
        self, envelope: Envelope, challenge: Challenge, secret: ProofSecret, source: str
    ) -> Welcome | Refused:
        try:
            hello = wire.open_hello(envelope, challenge, secret, self._swarm_key.public_key, self._clock())
            answer = await asyncio.wait_for(self._admit(hello, source), self._config.admit_timeout_s)
        except VersionMismatch:
            answer = Refused(code="version", reason=wire.version_advice_for_peer(envelope.protocol, envelope.package))
        except ProtocolError as exc:
            answer = Refused(code="malformed", reason=str(exc)[:1000])
        except TimeoutError:
            logger.warning("admission undecided source=%s after_s=%s", source, self._config.admit_timeout_s)
            answer = Refused(code="busy", reason="the coordinator is busy; try again")
        except Exception:  # a fault of ours may cost this visitor its answer, never the next one
            logger.exception("admission failed source=%s", source)
            answer = Refused(code="internal", reason="the coordinator failed to decide; its log says why")
        if isinstance(answer, Refused):
            self.stats.refused += 1
            self._log_refusal(source, answer)
        else:
            self.stats.welcomed += 1
            logger.info("node admitted peer=%s role=%s source=%s", answer.peer_id, answer.role, source)
        return answer

    def _log_refusal(self, source: str, refused: Refused) -> None:
        """Who waits for approval asks every few seconds: once is enough for the log."""
        said = (source, refused.code, refused.reason)
        level = logging.DEBUG if said in self._refusals else logging.INFO
        logger.log(level, "node refused source=%s code=%s reason=%s", *said)
        self._refusals[said] = None
        while len(self._refusals) > MAX_REFUSALS:
            del self._refusals[next(iter(self._refusals))]


def _bind_all(hosts: Sequence[str], port: int, backlog: int) -> tuple[list[socket.socket], int]:
    """Listening sockets on every host and one port; with port 0 one that is free on all of them."""
    if not hosts:
        raise ConfigError("admission: no address to listen on; pass one by --bind")
    for attempt in range(8 if port == 0 else 1):
        sockets: list[socket.socket] = []
        chosen = port
        try:
            for host in hosts:
                sockets.append(_bind(host, chosen, backlog))
                chosen = sockets[0].getsockname()[1]
        except OSError as exc:
            for opened in sockets:
                opened.close()
            if port == 0 and sockets and attempt < 7:
                continue
            raise ConfigError(
                f"admission: can't listen on {hosts[len(sockets)]} port {chosen}: {exc.strerror or exc}; "
                "choose another port by --port or another address by --bind"
            ) from exc
        return sockets, chosen
    raise AssertionError("the last attempt returns or raises")


def _bind(host: str, port: int, backlog: int) -> socket.socket:
    family, kind, proto, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICHOST
    )[0]
    listening = socket.socket(family, kind, proto)
    try:
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(backlog)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(_LENGTH.pack(len(data)) + data)
    await writer.drain()


async def _receive(reader: asyncio.StreamReader) -> Envelope:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > wire.MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"admission: {length} bytes announced, at most {wire.MAX_MESSAGE_BYTES} are allowed")
    return wire.decode(await reader.readexactly(length))


async def _close(writer: asyncio.StreamWriter) -> None:
    """Close in order, so that the peer gets all we sent; a peer that breaks off instead is no concern of ours."""
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


# -- the side that asks -----------------------------------------------------------------------------------------------


class Admission(NamedTuple):
    """A coordinator's welcome, and the key that its swarm has proven to hold: pin it at first sight."""

    welcome: Welcome
    swarm_key: PublicKey


class _NotHeardError(Exception):
    """The listener had no place for us right now, was too busy to decide, or failed to."""


@dataclass(slots=True)
class _Attempt:
    """One try at one address."""

    host: str
    port: int
    pinned_key: PublicKey | None
    check_key: Callable[[PublicKey], None] | None
    hello: HelloFactory
    clock: Callable[[], float]
    tls: ssl.SSLContext = field(default_factory=client_context)

    @property
    def where(self) -> str:
        return f"{self.host} port {self.port}"

    async def run(self) -> Admission:
        try:
            reader, writer = await asyncio.open_connection(
                self.host,
                self.port,
                ssl=self.tls,
                server_hostname="",
                limit=wire.MAX_MESSAGE_BYTES + _LENGTH.size,
                ssl_shutdown_timeout=1.0,
            )
        except (ConnectionResetError, ssl.SSLEOFError) as exc:
            raise _NotHeardError from exc
        try:
            return await self._ask(reader, writer)
        except (EOFError, ConnectionError) as exc:  # asking twice is harmless: a node redeems an invite once
            raise _NotHeardError from exc
        finally:
            writer.transport.abort()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Admission:
        swarm_key = peer_key(writer.get_extra_info("ssl_object"))
        if self.pinned_key is not None and swarm_key != self.pinned_key:
            raise DiscoveryError(
                f"{self.where}: another swarm answers there, its key is {fingerprint_of(swarm_key)}, expected "
                f"{fingerprint_of(self.pinned_key)}; check the address, or join that swarm by its own name"
            )
        if self.check_key is not None:
            self.check_key(swarm_key)
        challenge = (await _receive(reader)).open(Challenge)
        await _send(writer, self.hello(challenge, swarm_key))
        answer = await _receive(reader)
        if answer.kind == Refused.kind:
            refusal = answer.open(Refused)
            if refusal.code in ("busy", "internal"):
                raise _NotHeardError(str(refusal.error()))
            raise refusal.error()
        welcome = answer.open(Welcome)
        welcome.coordinator.verify(swarm_key, swarm_key, self.clock())
        return Admission(welcome, swarm_key)


async def request_admission(
    host: str,
    port: int,
    *,
    pinned_key: PublicKey | None,
    hello: HelloFactory,
    timeout_s: float = 10.0,
    clock: Callable[[], float] = time.time,
    check_key: Callable[[PublicKey], None] | None = None,
) -> Admission:
    """Ask the coordinator at `host` to let this process in; one that is busy or failed to decide is asked again until
    `timeout_s` has passed.

    With `pinned_key`, nothing is said to a coordinator with another key, nor to one whose key `check_key` raises for.
    Raises DiscoveryError (nobody there, or another swarm), AwaitingApproval, AdmissionRefused, VersionMismatch, another
    ProtocolError, or what `check_key` raises.
    """
    attempt = _Attempt(host, port, pinned_key, check_key, hello, clock)
    pause_s, last = 0.05, ""
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    return await attempt.run()
                except _NotHeardError as exc:
                    last = str(exc)
                    await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
                    pause_s = min(2 * pause_s, 2.0)
    except TimeoutError as exc:
        raise DiscoveryError(
            f"{attempt.where}: no answer to a request for admission within {timeout_s:g} s; check that the coordinator "
            "runs and isn't overloaded" + (f" (it last said: {last})" if last else "")
        ) from exc
    except ssl.SSLError as exc:
        raise DiscoveryError(f"{attempt.where}: doesn't speak TLS 1.3 ({exc.reason}); is a coordinator there?") from exc
    except (EOFError, OSError) as exc:
        raise DiscoveryError(
            f"{attempt.where}: can't be reached ({exc}); check the address, and that the coordinator runs"
        ) from exc
