"""Workers that load: one that is silent for too long is replaced, one that makes progress may take its time."""

from __future__ import annotations

from skynet.coordinator.served import ServedModel
from skynet.protocol.ids import WorkerId
from skynet.protocol.messages import Finished, LoadProgress, Prepared

from .test_engine import Stage, model, play, until

__all__ = ["model"]  # the fixture
SILENCE_S = 0.5
SLOW = WorkerId("w" * 26 + ".slow")


def test_a_worker_that_loads_without_progress_is_replaced(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        stage.loading.add(SLOW)
        a, _ = stage.join("a"), stage.join("slow")
        client = stage.ask("one")
        await until(lambda: any(SLOW in replica.workers for replica in stage.engine.fleet.preparing))
        b = stage.join("b")
        await client.ended.wait()
        assert isinstance(client.end, Finished)
        assert set(stage.serving()) == {a, b}
        assert stage.evicted == {SLOW}
        await stage.nothing_is_left_over()

    play(model, act, silence_s=SILENCE_S)


def test_a_worker_that_makes_progress_may_load_for_long(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        stage.loading.add(SLOW)
        a, _ = stage.join("a"), stage.join("slow")
        await until(lambda: bool(stage.engine.fleet.preparing))
        (replica,) = stage.engine.fleet.preparing
        clock = stage.engine._clock
        done_at, num_reports = clock() + 2.5 * SILENCE_S, 0

        def reports_until_it_is_done() -> bool:
            nonlocal num_reports
            num_reports += 1
            report = LoadProgress(epoch=replica.epoch, bytes_done=num_reports, bytes_total=1 << 40, bytes_by_source={})
            stage.engine.on_worker(SLOW, report)
            return clock() >= done_at

        await until(reports_until_it_is_done)
        stage.engine.on_worker(SLOW, Prepared(epoch=replica.epoch, weight_bytes=1, kv_bytes=1))
        await until(lambda: set(stage.serving()) == {a, SLOW})
        assert not stage.evicted
        assert stage.engine.replicas == [replica]

    play(model, act, silence_s=SILENCE_S)
