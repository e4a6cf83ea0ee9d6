"""Who may open a worker's sockets: the peers of its plan, and nobody whom no plan names any more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from skynet.protocol.entrance import COORDINATOR
from skynet.protocol.identity import ProcessKey
from skynet.protocol.ids import PeerId, WorkerId
from skynet.protocol.messages import ModelRef, PeerInfo, Prepare
from skynet.protocol.plan import Epoch, LayerSpan, RankShare, Span, StageAssignment
from skynet.protocol.sockets import SocketFactory
from skynet.worker.welcomed import FETCH_S, PROBE_S, Welcomed

ME = WorkerId("me")
KEYS = {name: ProcessKey.generate().public for name in ("a", "b", "c", COORDINATOR)}


@pytest.fixture
def factory() -> Iterator[SocketFactory]:
    key = ProcessKey.generate()
    made = SocketFactory(key.public, key.secret)
    yield made
    made.close()


def info(name: str) -> PeerInfo:
    return PeerInfo(peer_id=PeerId(name), curve_key=KEYS[name], hosts=("127.0.0.1",), data_port=1, bulk_port=2)


def order(n: int, peers: str, sources: tuple[str, ...]) -> Prepare:
    nothing = Span(0, 0)
    assignment = StageAssignment(
        layers=LayerSpan(0, 1), num_layers=1, stage_index=0, stages=((ME,),), rank=0,
        share=RankShare(heads=nothing, mlp=nothing, expert_mlp=nothing, vocab=nothing),
        num_blocks=1, block_size=16, dtype="float32",
    )  # fmt: skip
    return Prepare(
        epoch=Epoch(1, n),
        model=ModelRef(name="m", revision="", digest="d", manifest_bytes=1),
        assignment=assignment,
        peers=tuple(map(info, peers)),
        sources=tuple(map(info, sources)),
    )


def let_in(factory: SocketFactory, domain: str = "data") -> set[str]:
    return {name for name in KEYS if factory.registry.is_allowed(PeerId(name), domain)}


def test_who_is_in_no_plan_any_more_is_shut_out(factory: SocketFactory) -> None:
    cut: list[PeerId] = []
    factory.registry.on_removed(lambda peer_id, _: cut.append(peer_id))
    welcomed = Welcomed(factory)
    first, second = order(1, "a", ("b", COORDINATOR)), order(2, "a", ("c", COORDINATOR))
    welcomed.only([first], 0.0)
    assert let_in(factory) == {"a", "b"}
    welcomed.only([first, second], 1.0)
    assert let_in(factory) == {"a", "b", "c"}
    welcomed.only([second], 2.0)
    assert let_in(factory) == {"a", "c"}
    assert let_in(factory, "bulk") == {"a", "c", COORDINATOR}
    assert cut == ["b"]


def test_revoked_peer_is_shut_out_at_once_and_the_coordinator_never(factory: SocketFactory) -> None:
    welcomed = Welcomed(factory)
    welcomed.only([order(1, "a", ("b", COORDINATOR))], 0.0)
    welcomed.shut_out([PeerId("b"), PeerId("unknown"), COORDINATOR])
    assert let_in(factory, "bulk") == {"a", COORDINATOR}
    welcomed.nobody()
    assert let_in(factory, "bulk") == {COORDINATOR}


def test_peer_of_a_measurement_comes_in_for_a_while(factory: SocketFactory) -> None:
    welcomed = Welcomed(factory)
    welcomed.to_measure([info("b")], 0.0)
    welcomed.only([order(1, "a", ())], PROBE_S - 1)
    assert let_in(factory) == {"a", "b"}
    welcomed.to_measure([info("a")], PROBE_S)
    welcomed.only([order(1, "a", ())], 3 * PROBE_S)
    assert let_in(factory) == {"a"}


def test_who_loads_what_we_hold_comes_in_for_chunks_alone(factory: SocketFactory) -> None:
    welcomed = Welcomed(factory)
    welcomed.only([order(1, "a", ())], 0.0)
    welcomed.to_fetch([info("a"), info("b")], 0.0)
    assert (let_in(factory), let_in(factory, "bulk")) == ({"a"}, {"a", "b"})
    welcomed.only([order(1, "a", ())], FETCH_S - 1)
    assert let_in(factory, "bulk") == {"a", "b"}
    welcomed.only([order(1, "a", ())], FETCH_S + 1)
    assert let_in(factory, "bulk") == {"a"}
