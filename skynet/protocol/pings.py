"""Pings on a link and their answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from skynet.protocol.codec import Buffer
from skynet.protocol.data_frame import DataFrame, FrameType, control_header

MAX_ECHO_BYTES: Final = 4096


class Probed(NamedTuple):
    """A link as measured."""

    round_trip_s: float  # of 4 KiB each way
    bandwidth_bytes_per_s: float  # one way


class Pings:
    """Which are under way. One thread's."""

    def __init__(self) -> None:
        self._answers: dict[int, memoryview | None] = {}  # awaited; None: not answered yet
        self._num_sent = 0

    def forget(self) -> None:
        """Wait for none of the former ones."""
        self._answers.clear()

    def next(self) -> bytes:
        """The header of one more; its answer is awaited from now on."""
        self._num_sent = (self._num_sent + 1) % (1 << 32)
        self._answers[self._num_sent] = None
        return control_header(FrameType.PING, self._num_sent)

    @property
    def is_waiting(self) -> bool:
        """Whether one of them isn't answered yet."""
        return any(answer is None for answer in self._answers.values())

    def heard(self, frame: DataFrame, reply: Callable[[bytes, Buffer], None]) -> None:
        """A PING or PONG came; `reply` sends a PONG."""
        number = int.from_bytes(frame.header[20:24], "little")
        if frame.type == FrameType.PING:
            echo = frame.payload if frame.payload.nbytes <= MAX_ECHO_BYTES else b""
            reply(control_header(FrameType.PONG, number), echo)
        elif number in self._answers:
            self._answers[number] = frame.payload
