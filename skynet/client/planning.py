"""What a model would look like on a set of workers, without loading anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from skynet.coordinator.planner import Layout, Objective, PlannerConfig, plan, plan_as_dict, render_plan
from skynet.coordinator.planner.describe import read_workers
from skynet.coordinator.served import spec_of
from skynet.errors import ConfigError
from skynet.protocol.ids import WorkerId
from skynet.protocol.profile import LinkProfile, WorkerProfile


def plan_for(
    model: str,
    workers_file: str | None,
    profiles: dict[str, Any] | None,
    *,
    objective: str,
    layout: str | None,
    dtype: str | None,
    as_json: bool,
    cache_dir: Path,
    hub_endpoint: str | None,
) -> str:
    """A plan as text or JSON, for the workers of a file or of a running swarm (`Swarm.profiles`).

    Raises ConfigError, or CapacityError saying how much memory is missing.
    """
    spec = spec_of(model, dtype, cache_dir, hub_endpoint)
    workers, links = read_workers(Path(workers_file)) if workers_file is not None else _from_swarm(profiles or {})
    try:
        aim = Objective(objective)
    except ValueError as exc:
        raise ConfigError(f"--objective {objective}: use {', '.join(Objective)}") from exc
    config = PlannerConfig(objective=aim, layout=Layout.parse(layout) if layout else None)
    made = plan(spec, workers, links, config)
    return json.dumps(plan_as_dict(made)) if as_json else render_plan(made)


def _from_swarm(profiles: dict[str, Any]) -> tuple[dict[WorkerId, WorkerProfile], list[LinkProfile]]:
    workers = msgspec.convert(profiles.get("workers", {}), dict[str, WorkerProfile])
    links = msgspec.convert(profiles.get("links", []), list[LinkProfile])
    return {WorkerId(w): p for w, p in workers.items()}, links
