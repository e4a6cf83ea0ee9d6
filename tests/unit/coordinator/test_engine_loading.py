"""Workers that load: who is silent is replaced, who makes progress may take long, and others serve meanwhile."""

from __future__ import annotations

from skynet.coordinator.served import ServedModel
from skynet.protocol.ids import RequestId, WorkerId
from skynet.protocol.messages import Finished, LoadProgress, Prepared
from skynet.protocol.steps import SequencePart

from .test_engine import CLIENT, Stage, model, play, until

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


def test_who_leaves_serves_on_until_others_can_go_on_at_once(model: ServedModel) -> None:
    """Answers grow while the new replica loads, and its first step goes on where the old one's last ended."""

    async def act(stage: Stage) -> None:
        leaver, _ = stage.join("a"), stage.join("b")
        await until(lambda: bool(stage.serving()))
        (old,) = stage.engine.replicas
        client = stage.ask("long", "The weather " * 20, max_tokens=1500)
        await until(lambda: len(client.token_ids) > 5)
        stage.loading.add(SLOW)
        stage.join("slow")
        stage.engine.drain(leaver)
        await until(lambda: any(SLOW in replica.workers for replica in stage.engine.fleet.preparing))
        (fresh,) = stage.engine.fleet.preparing
        had = len(client.token_ids)
        await until(lambda: len(client.token_ids) > had + 50)
        assert stage.engine.replicas == [old]
        stage.engine.on_worker(SLOW, Prepared(epoch=fresh.epoch, weight_bytes=1, kv_bytes=1))
        await until(lambda: stage.engine.replicas == [fresh])
        await until(lambda: leaver in stage.released)

        def sampled() -> list[SequencePart]:
            parts = [part for step in stage.steps if step.epoch == fresh.epoch for part in step.parts]
            return [part for part in parts if part.sample is not None]

        await until(lambda: bool(sampled()))
        assert len(sampled()[0].token_ids) <= 2, "the cache was built ahead, but for what the old one's last step added"
        assert not stage.notices
        stage.engine.cancel(CLIENT, RequestId("long"))
        await stage.nothing_is_left_over()

    play(model, act)
