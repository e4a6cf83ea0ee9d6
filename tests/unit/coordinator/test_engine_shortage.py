"""Answers that have begun, and swarms that lose the memory to go on with them."""

from __future__ import annotations

import pytest

from skynet.coordinator.served import ServedModel
from skynet.protocol.ids import RequestId
from skynet.protocol.messages import Failed, Finished

from .test_engine import CLIENT, Client, Stage, model, play, start, until

__all__ = ["model"]  # the fixture
LONG = 1900
SMALL = 13 << 19  # two of them hold the model with a cache of fewer tokens, whatever is tried
ENOUGH = 9 << 20  # two hold as many only if their plan is made for it


async def begun_on_a_large_worker(stage: Stage) -> Client:
    await start(stage, "large")
    client = stage.ask("long", max_tokens=LONG)
    await until(lambda: len(client.token_ids) > 5)
    return client


async def lose_all_but_two(stage: Stage, memory_bytes: int) -> int:
    """How many tokens of one sequence the two can hold."""
    (large,) = stage.serving()
    small = {stage.join("s1", memory_bytes), stage.join("s2", memory_bytes)}
    stage.kill(large)
    await until(lambda: set(stage.serving()) == small)
    (replica,) = stage.engine.replicas
    return replica.scheduler.blocks.num_blocks * 16


@pytest.fixture(scope="module")
def undisturbed(model: ServedModel) -> list[int]:
    async def act(stage: Stage) -> None:
        client = await begun_on_a_large_worker(stage)
        await client.ended.wait()

    return next(iter(play(model, act, layout=None).clients.values())).token_ids


def test_plans_leave_room_for_answers_that_have_begun(model: ServedModel, undisturbed: list[int]) -> None:
    async def act(stage: Stage) -> None:
        client = await begun_on_a_large_worker(stage)
        assert await lose_all_but_two(stage, ENOUGH) >= LONG
        await client.ended.wait()
        assert isinstance(client.end, Finished)
        assert client.token_ids == undisturbed
        assert not [notice for notice in stage.notices if "missing" in notice]

    play(model, act, layout=None)


def test_an_answer_that_no_longer_fits_waits_and_goes_on_when_a_worker_joins(
    model: ServedModel, undisturbed: list[int]
) -> None:
    async def act(stage: Stage) -> None:
        client = await begun_on_a_large_worker(stage)
        assert await lose_all_but_two(stage, SMALL) < LONG
        await until(lambda: any("MiB of it are missing" in notice for notice in stage.notices))
        had = len(client.token_ids)
        other = stage.ask("short")  # others are served meanwhile
        await other.ended.wait()
        assert isinstance(other.end, Finished)
        refused = stage.ask("never begun", max_tokens=LONG)
        assert isinstance(refused.end, Failed)
        assert "MiB of it are missing" in refused.end.text
        assert (client.end, len(client.token_ids)) == (None, had)
        stage.join("large again")
        await client.ended.wait()
        assert isinstance(client.end, Finished), client.end
        assert client.token_ids == undisturbed
        await stage.nothing_is_left_over()

    play(model, act, layout=None)


def test_an_answer_that_no_longer_fits_ends_when_it_has_waited_long_enough(model: ServedModel) -> None:
    async def act(stage: Stage) -> None:
        client = await begun_on_a_large_worker(stage)
        assert await lose_all_but_two(stage, SMALL) < LONG
        request = stage.engine.requests.by_id[CLIENT.partition(".")[0], RequestId("long")]
        request.wait_until = stage.engine._clock()
        await client.ended.wait()
        assert isinstance(client.end, Failed)
        assert client.end.text.startswith("waited 300 s for workers: ")
        assert "MiB of it are missing" in client.end.text

    play(model, act, layout=None)


def test_an_answer_that_a_client_brings_back_waits_for_a_cache_that_holds_it(model: ServedModel) -> None:
    """The coordinator was restarted and knows nothing of it; so many workers aren't back yet."""

    async def act(stage: Stage) -> None:
        await start(stage, "s1", "s2", memory_bytes=ENOUGH)
        client = stage.clients[RequestId("long")] = Client(token_ids=[300, 301, 302])
        stage.ask("long", max_tokens=LONG)
        await until(lambda: any("MiB of it are missing" in notice for notice in stage.notices))
        stage.join("large")
        await client.ended.wait()
        assert isinstance(client.end, Finished)
        assert len(client.token_ids) == LONG

    play(model, act, layout=None)
