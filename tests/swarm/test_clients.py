"""Several clients at once, and clients that go away in the middle."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skynet.client.swarm import Completion, CompletionStream, Swarm
from skynet.testing.local_swarm import LocalSwarm

from .conftest import Oracle, User, end

PROMPTS = ("Once upon a time", "The old lamp", "One day", "In the garden", '"Where is it?"', "Who are you?")
NUM_TOKENS = 24
TURN = 64  # sequences that one replica runs at a time


async def finished(stream: CompletionStream) -> CompletionStream:
    async for _ in stream:
        pass
    return stream


async def until_idle(swarm: Swarm) -> dict[str, Any]:
    """The first status without requests."""
    facts = await swarm.status()
    while facts["num_requests"]:
        facts = await swarm.status(newer_than=facts["revision"])
    return facts


def test_six_clients_at_once_all_get_their_own_answers(swarm: LocalSwarm, embedded_oracle: Oracle) -> None:
    async def ask(prompt: str) -> CompletionStream:
        async with Swarm(swarm.client_config) as client:
            return await finished(client.complete(Completion(prompt=prompt, max_tokens=NUM_TOKENS, ignore_eos=True)))

    async def ask_all(_: Swarm) -> list[CompletionStream]:
        return await asyncio.gather(*map(ask, PROMPTS))

    for prompt, stream in zip(PROMPTS, swarm.run(ask_all), strict=True):
        expected = embedded_oracle.answer_ids(embedded_oracle.encode(prompt), NUM_TOKENS)
        assert stream.token_ids == expected, prompt
        assert stream.text == embedded_oracle.decode(expected)


def test_who_asks_once_does_not_wait_for_all_of_who_asks_often(swarm: LocalSwarm, tmp_path: Path) -> None:
    """One user fills the replica and has as many requests waiting again; the other user's one comes before these."""
    ended: list[str] = []

    async def ask(client: Swarm, name: str) -> None:
        await finished(client.complete(Completion(prompt=PROMPTS[0], max_tokens=16, ignore_eos=True)))
        ended.append(name)

    async def both(greedy: Swarm) -> None:
        async with asyncio.TaskGroup() as tasks, Swarm(replace(swarm.client_config, config_dir=tmp_path)) as modest:
            often = [tasks.create_task(ask(greedy, "often")) for _ in range(2 * TURN)]
            revision = -1
            while (facts := await greedy.status(newer_than=revision))["num_requests"] < TURN + 1:
                revision = facts["revision"]
            assert not all(task.done() for task in often)
            await ask(modest, "once")

    swarm.run(both)
    assert ended.count("often") == 2 * TURN
    assert ended.index("once") < 2 * TURN - 1, "the request of the modest user came last"


def test_an_interrupted_infer_is_cancelled_at_once(swarm: LocalSwarm, user: User) -> None:
    options = ("--temperature", "1", "--seed", "3", "--max-tokens", "400")
    whole = swarm.complete(Completion(prompt=PROMPTS[0], temperature=1, seed=3, max_tokens=400))
    process = user.start("infer", PROMPTS[0], *options)
    assert process.stdout is not None
    try:
        begun = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=20)
    finally:
        end(process)
    facts = swarm.run(until_idle, 5)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert whole.text.startswith((begun + rest).rstrip("\n"))
    assert len(begun + rest) < len(whole.text)
    assert facts["replicas"][0]["num_sequences"] == 0
    assert facts["replicas"][0]["num_free_blocks"] > 0


def test_leaving_an_answer_early_cancels_it(swarm: LocalSwarm) -> None:
    async def taste(client: Swarm) -> dict[str, Any]:
        stream = client.complete(Completion(prompt=PROMPTS[0], max_tokens=1500, ignore_eos=True))
        events = aiter(stream)
        await anext(events)
        assert (await client.status())["num_requests"] == 1
        await events.aclose()  # type: ignore[attr-defined]
        return await until_idle(client)

    done_before = swarm.status()["replicas"][0]["tokens_done"]
    facts = swarm.run(taste, 30)
    assert facts["replicas"][0]["tokens_done"] - done_before < 1500


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_the_shortest_answers_are_complete(num_tokens: int, swarm: LocalSwarm, embedded_oracle: Oracle) -> None:
    stream = swarm.complete(Completion(prompt=PROMPTS[0], max_tokens=num_tokens))
    expected = embedded_oracle.answer_ids(embedded_oracle.encode(PROMPTS[0]), num_tokens)
    assert (stream.token_ids, stream.text) == (expected, embedded_oracle.decode(expected))


FLOOD = """
import asyncio, sys, time
from pathlib import Path
from skynet.client.swarm import ClientConfig, Swarm
from skynet.protocol.codec import encode
from skynet.protocol.messages import Ping

async def main(address, home):
    async with Swarm(ClientConfig(coordinator=address, config_dir=Path(home))) as client:
        await client.status()
        port, frames = client._link._port, encode(Ping(nonce=1))
        print("begins", flush=True)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            for _ in range(200):
                port.send(frames)
            await asyncio.sleep(0)

asyncio.run(main(*sys.argv[1:]))
"""


def test_a_flood_of_one_client_leaves_the_others_their_answers_and_newcomers_their_way_in(
    swarm: LocalSwarm, user: User, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{swarm.port}"
    flooding = subprocess.Popen(
        [sys.executable, "-c", FLOOD, address, str(tmp_path / "flooder")],
        env=user.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert flooding.stdout is not None
    assert swarm.coordinator is not None

    async def ask(old: Swarm) -> None:
        begun = asyncio.Event()

        async def stream() -> None:
            async for _ in old.complete(Completion(prompt=PROMPTS[0], max_tokens=200, ignore_eos=True)):
                begun.set()

        async with asyncio.timeout(15), asyncio.TaskGroup() as tasks:
            tasks.create_task(stream())
            await begun.wait()
            async with Swarm(replace(swarm.client_config, config_dir=tmp_path / "newcomer")) as newcomer:
                await finished(newcomer.complete(Completion(prompt=PROMPTS[1], max_tokens=8)))

    try:
        assert flooding.stdout.readline() == "begins\n"
        swarm.run(ask)
        swarm.coordinator.wait_for("flooded by", 15)
        assert flooding.poll() is None, "it had ended before the others were served"
    finally:
        flooding.kill()
        flooding.communicate(timeout=10)
