"""What other threads tell the channel's thread, and how they end its waits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Literal, NamedTuple

import zmq

from skynet.errors import StepAborted
from skynet.protocol.ids import PeerId
from skynet.protocol.plan import Epoch
from skynet.protocol.sockets import SocketFactory


class Note(NamedTuple):
    """Something that another thread saw or wants."""

    what: Literal["wake", "relay", "gone", "up", "refused", "down"]
    subject: int | PeerId = 0  # of "gone" the peer, of "up", "refused" and "down" the number of our dial
    connection: int = 0


class Wakeups:
    """Notes, aborts, and the inproc pair that wakes who polls `receiver`."""

    def __init__(self, factory: SocketFactory) -> None:
        self._notes: deque[Note] = deque()
        self._lock = threading.Lock()  # of the sender
        self._sender, self.receiver = factory.pair()
        self._aborted: set[Epoch] = set()
        self._is_interrupted = False

    # -- from any thread -----------------------------------------------------------------------------------------------

    def abort(self, epoch: Epoch | None = None) -> None:
        """End waits with StepAborted: from now on all of this epoch; without one, the present or next."""
        if epoch is None:
            self._is_interrupted = True
        else:
            self._aborted.add(epoch)
        self.post(Note("wake"))

    def post(self, note: Note) -> None:
        """Leave a note and wake the channel's thread. Of a closed channel nothing comes."""
        self._notes.append(note)
        with self._lock:
            if not self._sender.closed:
                try:
                    self._sender.send(b"", zmq.NOBLOCK)
                except zmq.Again:
                    return  # enough wake-ups wait there; the note is read with them

    # -- the channel's thread ------------------------------------------------------------------------------------------

    def take(self) -> Iterator[Note]:
        """The notes so far."""
        while True:
            try:
                self.receiver.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
        while self._notes:
            yield self._notes.popleft()

    def check(self, epoch: Epoch | None) -> None:
        """Raise StepAborted if waits of this epoch, or the present wait, were ended."""
        if self._is_interrupted:
            self._is_interrupted = False
            raise StepAborted("the wait was ended by this worker")
        if self._aborted and epoch in self._aborted:
            raise StepAborted(f"epoch {epoch} is over")

    def forget(self, epoch: Epoch) -> None:
        """This epoch is over: nobody waits in it any more."""
        self._aborted.discard(epoch)

    def close(self) -> None:
        """Close both ends."""
        self.receiver.close(linger=0)
        with self._lock:
            self._sender.close(linger=0)
