"""What a model would look like on a set of workers, without loading anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import msgspec

from skynet.coordinator.planner import Layout, Objective, PlannerConfig, plan, plan_as_dict, render_plan
from skynet.coordinator.planner.describe import read_workers
from skynet.coordinator.served import spec_of
from skynet.errors import ConfigError, MalformedMessage
from skynet.models.embedded import EMBEDDED_NAME
from skynet.models.spec import ModelSpec
from skynet.protocol.ids import WorkerId
from skynet.protocol.profile import LinkProfile, WorkerProfile


class _Running(msgspec.Struct, frozen=True):
    """What a running swarm plans with (`Swarm.profiles`), else what planning without one takes."""

    workers: dict[str, WorkerProfile] = {}
    links: list[LinkProfile] = []
    model: str = EMBEDDED_NAME
    dtype: str | None = None
    spec: ModelSpec | None = None
    objective: str = Objective.LATENCY
    layout: str | None = None
    min_context_tokens: int | None = None

    @classmethod
    def read(cls, profiles: dict[str, Any]) -> Self:
        """Raises MalformedMessage."""
        try:
            return msgspec.convert(profiles, cls)
        except msgspec.ValidationError as exc:
            raise MalformedMessage(f"the coordinator's profiles: {exc}; is its SkyNet another version?") from exc


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
    swarm = _Running.read(profiles or {})
    spec = swarm.spec if model is None and dtype in (None, swarm.dtype) else None
    spec = spec or spec_of(model or swarm.model, dtype, cache_dir, hub_endpoint)
    if workers_file is not None:
        workers, links = read_workers(Path(workers_file))
    else:
        workers, links = {WorkerId(w): p for w, p in swarm.workers.items()}, swarm.links
    try:
        aim = Objective(objective or swarm.objective)
    except ValueError as exc:
        raise ConfigError(f"--objective {objective}: use {', '.join(Objective)}") from exc
    layout = layout or (swarm.layout if model is None else None)
    config = PlannerConfig(objective=aim, layout=Layout.parse(layout) if layout else None)
    if swarm.min_context_tokens is not None:
        config = replace(config, min_context_tokens=swarm.min_context_tokens)
    made = plan(spec, workers, links, config)
    return json.dumps(plan_as_dict(made)) if as_json else render_plan(made)
