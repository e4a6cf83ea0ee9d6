"""`skynet demo`: a whole swarm on this machine, one answer, and everything stopped again."""

from __future__ import annotations

import asyncio
import sys
import time

import typer

from .tables import render_status


async def run_demo(prompt: str, layout: str, model: str, max_tokens: int, temperature: float, seed: int) -> None:
    """Start coordinator and workers as processes, show the topology, stream the answer, stop everything."""
    from skynet.client.swarm import Completion, Swarm
    from skynet.testing.local_swarm import LocalSwarm, LocalSwarmConfig

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
            completion = Completion(prompt=prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)
            typer.echo(prompt, nl=False)
            stream = client.complete(completion)
            async for event in stream:
                typer.echo(event.text, nl=False)
                sys.stdout.flush()
        typer.echo()
        figures = stream.figures()
        say(
            f"{figures['completion_tokens']} tokens, {figures['tokens_per_s']:.1f} tokens/s, first token after "
            f"{figures['first_token_s']:.2f} s; stopping everything"
        )
    finally:
        await asyncio.to_thread(swarm.stop)
