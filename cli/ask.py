"""`skynet infer`, `chat`, `status` and `plan`: what asks a running swarm."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from skynet.client.environment import Environment

from .common import fail, printable, printable_line, read_stdin, run_async
from .lines import Lines

if TYPE_CHECKING:
    from skynet.client.swarm import ClientConfig, Completion, Swarm
    from skynet.protocol.messages import ChatMessage

CLEAR_SCREEN = "\x1b[H\x1b[2J"
Coordinator = Annotated[
    str | None,
    typer.Option("--coordinator", help="HOST or HOST:PORT, when it isn't found by itself. Also SKYNET_COORDINATOR."),
]
SwarmName = Annotated[str | None, typer.Option("--swarm", help="Which swarm, when several are found.")]
Invite = Annotated[str | None, typer.Option("--invite", help="An invite, the first time, where the swarm wants one.")]
MaxTokens = Annotated[int, typer.Option(min=1, max=1_000_000, help="Length of an answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, max=100, help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Choose among the likeliest tokens of this total probability.")]
Seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Equal seeds and inputs give equal answers.")]
Timeout = Annotated[
    float, typer.Option(min=0, max=86400, help="Seconds that the answer may wait for workers that hold the model.")
]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(
        help="Complete a prompt; text goes to stdout as it comes, figures to stderr.\n\n"
        'Example: skynet infer "Once upon a time" --max-tokens 80 --temperature 0.7 --seed 1'
    )(infer)
    app.command(help="Talk with the model, turn by turn.\n\nExample: skynet chat --temperature 0.7")(chat)
    app.command(help="Show workers, what they hold and how fast they are.\n\nExample: skynet status --watch")(status)
    app.command(
        help="Show how a model would be laid out, without loading anything.\n\n"
        "Example: skynet plan --model Qwen/Qwen3-0.6B --workers docs/examples/workers.yaml"
    )(plan)


def client_config(coordinator: str | None, swarm: str | None, invite: str | None) -> ClientConfig:
    """Where the swarm is: as the options say, else as the environment says."""
    from skynet.client.swarm import ClientConfig

    environment = Environment.read()
    return ClientConfig(
        coordinator=coordinator or environment.coordinator,
        swarm=swarm or environment.swarm,
        invite=invite or environment.invite,
        config_dir=environment.config_dir,
    )


def infer(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from stdin.")],
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among so many likeliest tokens. 0: all.")] = 0,
    seed: Seed = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End the answer before this text; may be given several times."),
    ] = None,
    min_p: Annotated[
        float, typer.Option(min=0, max=1, help="Leave out tokens less likely than this part of the likeliest's.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(min=0.01, max=100, help="Above 1: tokens of prompt and answer come again less. 1: off.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(min=-2, max=2, help="Taken from the logits of tokens that the answer has.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(min=-2, max=2, help="The same, for each time that the answer has them.")
    ] = 0.0,
    stop_token_id: Annotated[
        list[int] | None,
        typer.Option(min=0, metavar="ID", help="End the answer at this token; may be given several times."),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, max=20, help="With --json: each token's logprob, and those of so many of the likeliest."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with text, token ids and figures.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Refuse to answer if the swarm runs another model.")] = None,
    timeout: Timeout = 300.0,
    coordinator: Coordinator = None,
    swarm: SwarmName = None,
    invite: Invite = None,
) -> None:
    from skynet.client.swarm import Completion, Swarm

    async def run(completion: Completion) -> None:
        async with Swarm(client_config(coordinator, swarm, invite)) as connected:
            answer = await _stream(connected, completion, is_quiet=as_json)
        if as_json:
            typer.echo(json.dumps(answer))

    try:
        completion = Completion(  # refuses wrong values, before anything is looked for
            prompt=read_stdin() if prompt == "-" else prompt, max_tokens=max_tokens, temperature=temperature,
            top_p=top_p, top_k=top_k, seed=seed,
            stop=tuple(stop or ()), timeout_s=timeout, model=full_path(model),
            min_p=min_p, repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, stop_token_ids=tuple(stop_token_id or ()), logprobs=logprobs,
        )  # fmt: skip
        run_async(run(completion))
    except Exception as exc:
        fail(exc)


def full_path(model: str | None) -> str | None:
    """A directory as the coordinator names it; anything else as it is."""
    from pathlib import Path

    directory = Path(model).expanduser() if model else None
    return str(directory.resolve()) if directory is not None and directory.is_dir() else model


async def _stream(swarm: Swarm, completion: Completion, is_quiet: bool) -> dict[str, object]:
    """Print an answer as it comes, then its figures on stderr."""
    answer = swarm.complete(completion)
    async for event in answer:
        if event.notice is not None:
            typer.echo(f"[{printable_line(event.notice)}]", err=True)
        elif event.text and not is_quiet:
            echo_answer(event.text)
    figures = answer.figures()
    if not is_quiet:
        typer.echo()
        typer.echo(
            f"{figures['completion_tokens']} tokens, {figures['tokens_per_s']:.1f} tokens/s, "
            f"first token after {figures['first_token_s']:.2f} s ({printable_line(str(figures['finish_reason']))})",
            err=True,
        )
    return figures


def echo_answer(text: str) -> None:
    """Print a part of an answer at once: byte for byte into files and pipes, without escape sequences on terminals."""
    typer.echo(printable(text) if sys.stdout.isatty() else text, nl=False)
    sys.stdout.flush()


def chat(
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    coordinator: Coordinator = None,
    swarm: SwarmName = None,
    invite: Invite = None,
) -> None:
    from skynet.client.swarm import Completion, Swarm
    from skynet.protocol.messages import ChatMessage

    def ask(turns: list[ChatMessage]) -> Completion:
        return Completion(messages=tuple(turns), max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)

    async def run() -> None:
        async with Swarm(client_config(coordinator, swarm, invite)) as connected:
            turns = [ChatMessage(role="system", content=system)] if system else []
            typer.echo("Type a message; an empty line or Ctrl-D ends.", err=True)
            lines = Lines()
            while line := await lines.next():
                turns = await _turn(connected, [*turns, ChatMessage(role="user", content=line)], ask)

    try:
        run_async(run())
    except Exception as exc:
        fail(exc)


async def _turn(
    swarm: Swarm, turns: list[ChatMessage], ask: Callable[[list[ChatMessage]], Completion]
) -> list[ChatMessage]:
    """The conversation with its answer. When it has outgrown the model's context, its oldest turns are left out."""
    from skynet.errors import PromptTooLong
    from skynet.protocol.messages import ChatMessage

    told = [turn for turn in turns[:1] if turn.role == "system"]
    said = turns[len(told) :]
    while True:
        try:
            figures = await _stream(swarm, ask(told + said), is_quiet=False)
        except PromptTooLong as exc:
            if len(said) == 1:
                typer.echo(f"[not sent: {printable_line(str(exc))}]", err=True)
                return turns[:-1]
            said = said[2:]
            typer.echo("[the conversation has outgrown the model's context; its oldest turn is left out]", err=True)
        else:
            return [*told, *said, ChatMessage(role="assistant", content=str(figures["text"]))]


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every second until interrupted.")] = False,
    coordinator: Coordinator = None,
    swarm: SwarmName = None,
    invite: Invite = None,
) -> None:
    from skynet.client.swarm import Swarm

    from .tables import render_status

    async def run() -> None:
        import asyncio

        async with Swarm(client_config(coordinator, swarm, invite)) as connected:
            while True:
                facts = await connected.status()
                if as_json:
                    typer.echo(json.dumps(facts))
                else:
                    if watch and sys.stdout.isatty():
                        typer.echo(CLEAR_SCREEN, nl=False)
                    typer.echo(render_status(facts))
                if not watch:
                    return
                await asyncio.sleep(1)

    try:
        run_async(run())
    except Exception as exc:
        fail(exc)


def plan(
    model: Annotated[
        str | None,
        typer.Option(help="Directory, hub id, or `embedded`. Default: what the running swarm serves, else `embedded`."),
    ] = None,
    workers: Annotated[
        str | None, typer.Option(help="YAML file that describes workers. Default: the running swarm's.")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="latency, throughput or memory. Default: the running swarm's, else latency.")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="Pin the layout, for example 2x3.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the model's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    coordinator: Coordinator = None,
    swarm: SwarmName = None,
    invite: Invite = None,
) -> None:
    from skynet.client.planning import plan_for
    from skynet.client.swarm import Swarm
    from skynet.errors import DiscoveryError

    environment = Environment.read()

    async def profiles() -> dict[str, object]:
        try:
            async with Swarm(client_config(coordinator, swarm, invite)) as connected:
                return await connected.profiles()
        except DiscoveryError as exc:
            raise DiscoveryError(f"{exc}; or describe workers in a file and name it by --workers FILE") from exc

    try:
        text = plan_for(
            model, workers, run_async(profiles()) if workers is None else None, objective=objective, layout=layout,
            dtype=dtype, as_json=as_json, cache_dir=environment.cache_dir, hub_endpoint=environment.hub_endpoint,
        )  # fmt: skip
        typer.echo(printable(text))
    except Exception as exc:
        fail(exc)
