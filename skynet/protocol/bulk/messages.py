"""What the two ends of a bulk transfer say to each other. `transfer` is chosen by the client, per connection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, get_args

from skynet.errors import TransferCode
from skynet.protocol.codec import Decoder

MAX_NAME_CHARS: Final = 512
MAX_REASON_CHARS: Final = 1000
MAX_OFFSET: Final = 1 << 48
MAX_BLOCK_BYTES: Final = 4 << 20
_MAX_TRANSFER: Final = 1 << 62


def _check(transfer: int, *, name: str = "x", counts: tuple[int, ...] = ()) -> None:
    if not 0 <= transfer < _MAX_TRANSFER:
        raise ValueError(f"impossible transfer number {transfer}")
    if not 0 < len(name) <= MAX_NAME_CHARS:
        raise ValueError(f"a name has 1 to {MAX_NAME_CHARS} characters, this one has {len(name)}")
    if not all(0 <= count <= MAX_OFFSET for count in counts):
        raise ValueError(f"offsets and sizes lie in [0, {MAX_OFFSET}], got {counts}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkGet:
    """Client -> server: "send me these bytes of that, as far as `credit` goes"."""

    kind: ClassVar[str] = "bulk_get"
    transfer: int
    name: str
    offset: int
    size: int | None  # None: to the end
    credit: int  # bytes

    def __post_init__(self) -> None:
        _check(self.transfer, name=self.name, counts=(self.offset, self.size or 0, self.credit))


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkPut:
    """Client -> server: "I have this for you"."""

    kind: ClassVar[str] = "bulk_put"
    transfer: int
    name: str
    size: int | None  # None: not known yet

    def __post_init__(self) -> None:
        _check(self.transfer, name=self.name, counts=(self.size or 0,))


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkReady:
    """Server -> client, after a put: "I have `offset` bytes of it already; go on from there"."""

    kind: ClassVar[str] = "bulk_ready"
    transfer: int
    offset: int
    credit: int

    def __post_init__(self) -> None:
        _check(self.transfer, counts=(self.offset, self.credit))


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkData:
    """Sender -> receiver: one tensor frame (uint8) of bytes from `offset`. Without a frame: "I am still here"."""

    kind: ClassVar[str] = "bulk_data"
    transfer: int
    offset: int

    def __post_init__(self) -> None:
        _check(self.transfer, counts=(self.offset,))


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkCredit:
    """Receiver -> sender: "so many bytes more". 0: "I am still here"."""

    kind: ClassVar[str] = "bulk_credit"
    transfer: int
    credit: int

    def __post_init__(self) -> None:
        _check(self.transfer, counts=(self.credit,))


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkEnd:
    """Sender -> receiver: "that was all, up to byte `offset`". Server -> client, after a put: "and it is stored"."""

    kind: ClassVar[str] = "bulk_end"
    transfer: int
    offset: int

    def __post_init__(self) -> None:
        _check(self.transfer, counts=(self.offset,))


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkError:
    """Either way: this transfer is over."""

    kind: ClassVar[str] = "bulk_error"
    transfer: int
    code: TransferCode
    reason: str

    def __post_init__(self) -> None:
        _check(self.transfer)
        if self.code not in get_args(TransferCode) or len(self.reason) > MAX_REASON_CHARS:
            raise ValueError(f"unknown code {self.code[:32]!r} or a reason of {len(self.reason)} characters")


ClientMessage = BulkGet | BulkPut | BulkData | BulkCredit | BulkEnd | BulkError
ServerMessage = BulkReady | BulkData | BulkCredit | BulkEnd | BulkError
BulkMessage = ClientMessage | ServerMessage


def server_decoder() -> Decoder[ClientMessage]:
    """Decodes what clients send."""
    return Decoder[ClientMessage](BulkGet, BulkPut, BulkData, BulkCredit, BulkEnd, BulkError)


def client_decoder() -> Decoder[ServerMessage]:
    """Decodes what servers send."""
    return Decoder[ServerMessage](BulkReady, BulkData, BulkCredit, BulkEnd, BulkError)
