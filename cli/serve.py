"""`skynet coordinator`, `skynet worker` and `skynet demo`: what runs until it is stopped."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from skynet.client.environment import Environment

from .ask import Coordinator, Invite, MaxTokens, Seed, SwarmName, Temperature
from .common import fail, parse_size, run_async, set_up_logging

Verbosity = Annotated[
    Literal["debug", "info", "warning", "error"], typer.Option("--log-level", help="How much to say.")
]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(
        help="Run the head of a swarm: finds workers, splits the model, answers clients.\n\n"
        "Example: skynet coordinator --model Qwen/Qwen3-0.6B --layout 2x2"
    )(coordinator)
    app.command(
        help="Lend this machine to a swarm; without options it finds one on the local network.\n\n"
        "Example: skynet worker --gpu 0 --memory 8GiB"
    )(worker)
    app.command(
        help="Start a swarm of several workers on this machine, show it, stream one answer and stop everything.\n\n"
        'Example: skynet demo "Once upon a time" --layout 2x2'
    )(demo)


def coordinator(
    model: Annotated[
        str, typer.Option(help="Directory, hub id, or `embedded` for the small model that ships with us.")
    ] = "embedded",
    name: Annotated[str, typer.Option(help="The swarm's name on the local network.")] = "skynet",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the model's own.")] = None,
    objective: Annotated[str, typer.Option(help="What plans aim for: latency, throughput or memory.")] = "latency",
    layout: Annotated[
        str | None, typer.Option(help="Pin the layout, tensor-parallel x pipeline, for example 2x3. Default: planned.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens of one sequence that every replica must hold, up to the model's longest. Default: up to 2048."
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="TCP port for newcomers; the next four carry the rest. 0: any.")
    ] = 47100,
    bind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS",
            help="Listen on this address instead of the local networks'; 0.0.0.0: all. One beyond them forces invites.",
        ),
    ] = None,
    announce: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="Name or address of a router that forwards our ports, for invites; may be given several times.",
        ),
    ] = None,
    admission: Annotated[
        str | None, typer.Option(help="Who may enter: lan, approve or invite. Default: as before, lan at first.")
    ] = None,
    mdns: Annotated[bool, typer.Option(help="Announce the swarm on the local network.")] = True,
    database: Annotated[
        str | None, typer.Option(help="SQLAlchemy URL of the state store. Default: SQLite beside the keys.")
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where the HTTP API listens, on loopback; off: nowhere. Default: 127.0.0.1:8000, or any if taken.",
        ),
    ] = None,
    lease_s: Annotated[float, typer.Option(help="Seconds after which a silent worker counts as lost.")] = 4.0,
    log_level: Verbosity = "info",
) -> None:
    set_up_logging(log_level)
    from skynet.coordinator.server import serve
    from skynet.coordinator.server_config import CoordinatorConfig

    environment = Environment.read()
    try:
        config = CoordinatorConfig(
            model=model,
            name=name,
            dtype=dtype,
            objective=objective,
            layout=layout,
            context_tokens=context,
            port=port,
            bind=tuple(bind or ()),
            announce=tuple(announce or ()),
            admission=admission,
            mdns=mdns,
            database=database,
            lease_s=lease_s,
            config_dir=environment.config_dir,
            cache_dir=environment.cache_dir,
            hub_endpoint=environment.hub_endpoint,
            http=http,
        )
        run_async(serve(config))
    except Exception as exc:
        fail(exc)


def worker(
    gpu: Annotated[int | None, typer.Option(min=0, help="CUDA device number; the same as --device cuda:N.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda:N. Default: the first CUDA device, else the CPU.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="CPU threads to compute with. Default: all cores.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="The most memory this worker takes, for example 8GiB; give it where several share a machine. "
            "Default: 80% of what is free."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Keeps several workers of one machine apart. Default: the device.")
    ] = None,
    coordinator: Coordinator = None,
    swarm: SwarmName = None,
    invite: Invite = None,
    listen: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDRESS", help="Further addresses under which peers reach this machine."),
    ] = None,
    experimental: Annotated[bool, typer.Option(help="Allow devices that nobody has tested.")] = False,
    log_level: Verbosity = "info",
) -> None:
    set_up_logging(log_level)
    memory_bytes = parse_size(memory, "--memory")
    if gpu is not None and device is not None:
        raise typer.BadParameter("both name a device; give one of them", param_hint="--gpu and --device")
    from skynet.protocol.addresses import check_host

    for host in listen or ():
        check_host(host, "--listen")
    from skynet.worker.agent import WorkerConfig, serve  # imports torch, which takes a second

    environment = Environment.read()
    try:
        config = WorkerConfig(
            device=f"cuda:{gpu}" if gpu is not None else device,
            threads=threads,
            memory_bytes=memory_bytes,
            name=name,
            coordinator=coordinator or environment.coordinator,
            swarm=swarm or environment.swarm,
            invite=invite or environment.invite,
            listen=tuple(listen or ()),
            is_experimental=experimental,
            show_progress=sys.stderr.isatty(),
            config_dir=environment.config_dir,
            cache_dir=environment.cache_dir,
            hub_endpoint=environment.hub_endpoint,
        )
        run_async(serve(config))
    except Exception as exc:
        fail(exc)


def demo(
    prompt: Annotated[str, typer.Argument(help="What to continue.")] = "Once upon a time",
    layout: Annotated[str, typer.Option(help="Tensor-parallel x pipeline; so many workers are started.")] = "2x2",
    model: Annotated[str, typer.Option(help="Directory, hub id, or `embedded`.")] = "embedded",
    max_tokens: MaxTokens = 120,
    temperature: Temperature = 0.7,
    seed: Seed = 1,
) -> None:
    from .demo import run_demo

    try:
        run_async(run_demo(prompt, layout, model, max_tokens, temperature, seed))
    except Exception as exc:
        fail(exc)
