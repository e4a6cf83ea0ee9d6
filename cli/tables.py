"""How status looks to people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from skynet.errors import MalformedMessage

from .common import printable_line


def render_status(facts: dict[str, Any], width: int | None = None) -> str:
    """The swarm in one screen, 80 columns wide where names are short: the model, its workers, its requests.

    Names and reasons come from peers: they are shown as they are, and never obeyed. Raises MalformedMessage.
    """
    try:
        return _render(facts, width)
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as exc:
        raise MalformedMessage(
            f"the coordinator's status can't be shown ({exc!r}); is its SkyNet another version?"
        ) from exc


def _render(facts: dict[str, Any], width: int | None) -> str:
    facts = _printable(facts)
    names = _names([worker["id"] for worker in facts["workers"]])
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    for column in ("worker", "device", "memory", "layers", "share", "link", "tokens/s", "state"):
        table.add_column(column, overflow="fold", no_wrap=column in ("layers", "share", "link", "tokens/s"))
    for worker in facts["workers"]:
        table.add_row(
            names[worker["id"]],
            _device(worker),
            f"{_short_bytes(worker['weight_bytes'] + worker['kv_bytes'])}/{_short_bytes(worker['memory_bytes'])}",
            worker["layers"] or "-",
            (worker["share"] or "-").removeprefix("rank "),
            f"{worker['link_ms']:.2f} ms" if worker["link_ms"] is not None else "-",
            f"{worker['tokens_per_s']:.1f}" if worker["tokens_per_s"] else "-",
            worker["state"],
        )
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        model = facts["model"]
        console.print(f"swarm {facts['name']}  key {facts['fingerprint']}  epoch {facts['epoch'] or '-'}", style="bold")
        console.print(f"model {model['name']} ({model['type']}, {model['num_layers']} layers, {model['dtype']})")
        for replica in facts["replicas"]:
            speed = f"{replica['predicted_decode_tokens_per_s']:.0f} tokens/s expected of one sequence"
            state = f"{replica['layout']} ({replica['phase']}), {replica['num_sequences']} sequences, {speed}"
            console.print(f"replica {replica['epoch']}: {state}")
        if facts["shortage"]:
            console.print(f"not serving: {facts['shortage']}", style="yellow")
        console.print(table if facts["workers"] else "no workers yet: run `skynet worker` on this or another machine")
        console.print(f"requests: {facts['num_requests']} in progress, {facts['num_queued']} waiting")
    return capture.get().rstrip("\n")


def _names(workers: list[str]) -> dict[str, str]:
    """What to call workers, also for `skynet drain`: by name, with the beginning of the node where several share it."""
    names = {}
    for worker in workers:
        node, _, name = worker.partition(".")
        others = [other.partition(".")[0] for other in workers if other != worker and other.partition(".")[2] == name]
        length = next((n for n in range(4, len(node)) if not any(o.startswith(node[:n]) for o in others)), len(node))
        names[worker] = f"{node[:length]}.{name}" if others else name
    return names


def _printable(fact: Any) -> Any:
    if isinstance(fact, str):
        return printable_line(fact)
    if isinstance(fact, dict):
        return {key: _printable(value) for key, value in fact.items()}
    return [_printable(value) for value in fact] if isinstance(fact, list) else fact


def _short_bytes(count: float) -> str:
    """17.4 GiB -> 17G; 1.5 GiB stays 1.5G."""
    for unit in "BKMGT":
        if abs(count) < 1024 or unit == "T":
            break
        count /= 1024
    return f"{count:.1f}{unit}" if round(count, 1) < 10 else f"{count:.0f}{unit}"


def _device(worker: dict[str, Any]) -> str:
    if worker["device"] == "cpu":
        return f"cpu, {worker['threads']} thread{'s' * (worker['threads'] != 1)}"
    return f"{worker['device']}, {worker['device_name']}"
