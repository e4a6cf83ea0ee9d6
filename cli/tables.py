"""How status looks to people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def human_bytes(count: float) -> str:
    """1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def render_status(facts: dict[str, Any], width: int | None = None) -> str:
    """The swarm in one screen: the model, its workers, its requests."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("worker", "device", "memory", "holds", "share", "link", "tokens/s", "state"):
        table.add_column(column, overflow="fold", no_wrap=column in ("holds", "share", "tokens/s"))
    for worker in facts["workers"]:
        table.add_row(
            worker["id"].split(".", 1)[-1],
            f"{worker['device_name']} ({worker['device']}, {worker['threads']} thread{'s' * (worker['threads'] != 1)})",
            f"{human_bytes(worker['weight_bytes'] + worker['kv_bytes'])} of {human_bytes(worker['memory_bytes'])}",
            worker["layers"] or "-",
            worker["share"] or "-",
            f"{worker['link_ms']:.2f} ms" if worker["link_ms"] is not None else "-",
            f"{worker['tokens_per_s']:.1f}" if worker["tokens_per_s"] else "-",
            worker["state"],
        )
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        model = facts["model"]
        console.print(f"swarm {facts['name']}  key {facts['fingerprint']}  epoch {facts['epoch'] or '-'}", style="bold")
        console.print(f"model {model['name']} ({model['type']}, {model['num_layers']} layers, {model['dtype']})")
        for replica in facts["replicas"]:
            state = f"{replica['layout']} ({replica['phase']}), {replica['num_sequences']} sequences"
            console.print(f"replica {replica['epoch']}: {state}")
        if facts["shortage"]:
            console.print(f"not serving: {facts['shortage']}", style="yellow")
        console.print(table if facts["workers"] else "no workers yet: run `skynet worker` on this or another machine")
        console.print(f"requests: {facts['num_requests']} in progress, {facts['num_queued']} waiting")
    return capture.get().rstrip("\n")
