"""The compute thread with a real data channel and no stage: what orders leave behind, and what they may not break."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from skynet.errors import WorkerError
from skynet.protocol.identity import ProcessKey
from skynet.protocol.ids import PeerId, WorkerId
from skynet.protocol.messages import Busy, PeerInfo, ProbeReport
from skynet.protocol.plan import Epoch
from skynet.protocol.sockets import SocketFactory
from skynet.worker.collectives import SoloGroup
from skynet.worker.compute import MAX_ORDERS, ComputeThread, Drop, Install, MeasureLinks, Report
from skynet.worker.doing import Doing, WatchedGroup

WAIT_S = 10.0


@dataclass
class Bench:
    compute: ComputeThread
    reports: queue.Queue[Report] = field(default_factory=queue.Queue)

    def settle(self) -> None:
        """Every order so far is carried out: this one's report follows them."""
        self.compute.order(MeasureLinks((), True, WorkerId("me")))
        while not isinstance(self.reports.get(timeout=WAIT_S), ProbeReport):
            pass


@pytest.fixture
def bench() -> Iterator[Bench]:
    key = ProcessKey.generate()
    factory = SocketFactory(key.public, key.secret)
    reports: queue.Queue[Report] = queue.Queue()
    compute = ComputeThread(factory, ("127.0.0.1",), torch.device("cpu"), None, reports.put)
    compute.start()
    yield Bench(compute, reports)
    compute.stop()
    assert not compute.is_alive
    factory.close()


def test_aborts_and_drops_of_unknown_epochs_leave_nothing(bench: Bench) -> None:
    for number in range(50):
        epoch = Epoch(1, number)
        bench.compute.abort(epoch)
        bench.compute.order(Drop(epoch))
        bench.compute.abort(epoch)  # the coordinator may discard twice
        bench.compute.order(Drop(epoch))
    bench.settle()
    assert bench.compute.channel is not None
    assert not bench.compute._aborted
    assert not bench.compute.channel._wakeups._aborted


def test_thread_outlives_an_order_that_fails_in_an_unforeseen_way(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.compute.order(Install(Epoch(1, 1), None, None, ()))  # type: ignore[arg-type]
    bench.settle()
    assert bench.compute.is_alive
    assert "order failed order=Install" in caplog.text


def test_peer_with_an_impossible_address_does_not_stop_the_measuring(bench: Bench) -> None:
    key = ProcessKey.generate().public
    bogus = PeerInfo(peer_id=PeerId("w.bogus"), curve_key=key, hosts=("not a host!",), data_port=99999, bulk_port=1)
    bench.compute.order(MeasureLinks((bogus,), False, WorkerId("me")))
    bench.settle()
    assert bench.compute.is_alive


def test_orders_never_wait_and_a_thread_that_takes_none_is_an_error() -> None:
    """The agent's loop must go on beating whatever the compute thread does."""
    key = ProcessKey.generate()
    factory = SocketFactory(key.public, key.secret)
    compute = ComputeThread(factory, ("127.0.0.1",), torch.device("cpu"), None, lambda report: None)
    try:
        for number in range(MAX_ORDERS):
            compute.order(Drop(Epoch(1, number)))
        with pytest.raises(WorkerError, match="hangs"):
            compute.order(Drop(Epoch(2, 1)))
    finally:
        factory.close()


def test_a_step_tells_since_when_it_waits_and_for_whom() -> None:
    doing = Doing()
    assert doing.told() is None
    doing.begin(Epoch(1, 2), 7)
    computing = doing.told()
    assert computing is not None
    assert (computing.epoch, computing.step, computing.waits_for) == (Epoch(1, 2), 7, ())
    seen: list[Busy | None] = []

    class Watched(SoloGroup):
        def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(doing.told())
            return x

    WatchedGroup(Watched(), [PeerId("peer")], doing).all_reduce(torch.zeros(1))
    assert seen[0] is not None
    assert seen[0].waits_for == ("peer",)
    after = doing.told()
    assert after is not None
    assert not after.waits_for
    doing.end()
    assert doing.told() is None
