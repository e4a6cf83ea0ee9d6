"""What a model would look like on a set of workers, without loading anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from skynet.coordinator.planner import Layout, Objective, PlannerConfig, plan, plan_as_dict, render_plan
from skynet.coordinator.planner.describe import read_workers
from skynet.coordinator.served import spec_of
from skynet.errors import ConfigError
from skynet.models.embedded import EMBEDDED_NAME
from skynet.models.spec import ModelSpec
from skynet.protocol.ids import WorkerId
from skynet.protocol.profile import LinkProfile, WorkerProfile


def plan_for(
    model: str | None,
    workers_file: str | None,
    profiles: dict[str, Any] | None,
    *,
    objective: str | None,
    layout: str | None,
    dtype: str | None,
    as_json: bool,
    cache_dir: Path,
    hub_endpoint: str | None,
) -> str:
    """A plan as text or JSON, for the workers of a file or of a running swarm (`Swarm.profiles`).

    What isn't said is as in the running swarm: the model it serves, its objective and its pinned layout. Of a file's
    workers it is the embedded model, and latency.

    Raises ConfigError, or CapacityError saying how much memory is missing.
    """
    profiles = profiles or {}
    serves = profiles.get("spec") if model is None and dtype in (None, profiles.get("dtype")) else None
    if serves is not None:
        spec = msgspec.convert(serves, ModelSpec)
    else:
        spec = spec_of(model or str(profiles.get("model", EMBEDDED_NAME)), dtype, cache_dir, hub_endpoint)
    workers, links = read_workers(Path(workers_file)) if workers_file is not None else _from_swarm(profiles)
    try:
        aim = Objective(objective or str(profiles.get("objective", Objective.LATENCY)))
    except ValueError as exc:
        raise ConfigError(f"--objective {objective}: use {', '.join(Objective)}") from exc
    layout = layout or (profiles.get("layout") if model is None else None)
    config = PlannerConfig(objective=aim, layout=Layout.parse(layout) if layout else None)
    if profiles.get("min_context_tokens"):
        config = replace(config, min_context_tokens=int(profiles["min_context_tokens"]))
    made = plan(spec, workers, links, config)
    return json.dumps(plan_as_dict(made)) if as_json else render_plan(made)


def _from_swarm(profiles: dict[str, Any]) -> tuple[dict[WorkerId, WorkerProfile], list[LinkProfile]]:
    workers = msgspec.convert(profiles.get("workers", {}), dict[str, WorkerProfile])
    links = msgspec.convert(profiles.get("links", []), list[LinkProfile])
    return {WorkerId(w): p for w, p in workers.items()}, links
