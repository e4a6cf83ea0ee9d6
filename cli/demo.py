"""`skynet demo`: a whole swarm on this machine, one answer, and everything stopped again."""

from __future__ import annotations

import asyncio
import time

import typer

from .ask import echo_answer
from .tables import render_status


async def run_demo(prompt: str, layout: str, model: str, max_tokens: int, temperature: float, seed: int) -> None:
    """Start coordinator and workers as processes, show the topology, stream the answer, stop everything."""
    from skynet.client.swarm import Completion, Swarm
    from skynet.errors import WorkerTimeout
    from skynet.testing.local_swarm import LocalSwarm, LocalSwarmConfig

    completion = Completion(prompt=prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)
    started = time.monotonic()

    def say(text: str) -> None:
        typer.echo(f"[{time.monotonic() - started:5.1f} s] {text}", err=True)

    swarm = LocalSwarm(LocalSwarmConfig(layout=layout, model=model))
    try:
        say(f"starting a coordinator and {swarm.num_workers} workers on this machine, layout {layout}")
        await asyncio.to_thread(swarm.start_coordinator)
        for _ in range(swarm.num_workers):
            swarm.start_worker()
        facts = await asyncio.to_thread(swarm.wait_serving)
        say("serving; every link is encrypted and authenticated")
        typer.echo(render_status(facts), err=True)
        typer.echo("", err=True)
        async with Swarm(swarm.client_config) as client:
            typer.echo(prompt, nl=False)
            stream = client.complete(completion)
            async for event in stream:
                echo_answer(event.text)
        typer.echo()
        figures = stream.figures()
        say(
            f"{figures['completion_tokens']} tokens, {figures['tokens_per_s']:.1f} tokens/s, first token after "
            f"{figures['first_token_s']:.2f} s; stopping everything"
        )
    except TimeoutError as exc:
        raise WorkerTimeout(f"this machine's swarm didn't come up: {_in_short(str(exc))}") from exc
    finally:
        await asyncio.to_thread(swarm.stop)


def _in_short(reason: str) -> str:
    """What went wrong, and of a process's log the last line, which says why."""
    what, _, log = reason.partition("; log:\n")
    last = log.strip().rpartition("\n")[2]
    return f"{what}; its last words: {last}" if last else what[:1000]
