"""How patient the engine is, and how much it takes on."""

from __future__ import annotations

from dataclasses import dataclass

from skynet.coordinator.planner import PlannerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Times are in seconds."""

    planner: PlannerConfig
    step_floor_s: float = 2.0  # a step may always take this long before its ranks are asked whether they live
    step_slack: float = 8.0  # and this many times what the plan predicts
    stuck_floor_s: float = 15.0  # a rank that stands still in a step for this long, and 3 such patiences, hangs
    hard_step_s: float = 120.0  # however slow the machines are, a step ends by then
    ping_s: float = 3.0  # a worker that doesn't answer within this, when a step is late, is lost
    max_faults: int = 4  # a request whose steps fail this often in a row, with no worker lost, ends with an error
    max_probes: int = 64  # links measured before one plan
    probe_s: float = 3.0  # how long to wait for measurements
    max_surveys: int = 4  # rounds of them before one plan: what one finds may make another plan look best
    explore_s: float = 1.0  # when idle, near machines that nobody measured are looked for this often
    max_step_s: float = 1.0  # prompts enter in chunks that should take no longer: cancelling waits for a step
    warm_tokens: int = 64  # of running answers that one step builds in a new epoch, while the old one waits
    reunion_s: float = 5.0  # after a restart, workers that served together are waited for this long
    settle_s: float = 0.25  # workers that start together join together: wait this long before the first plan
    tick_s: float = 0.25  # how often leases and deadlines are looked at
    silence_s: float = 30.0  # loading without progress for this long is a fault
    orphan_s: float = 15.0  # an answer whose client is gone is kept for this long
    max_requests: int = 512  # running and waiting; more are refused at once
    max_node_requests: int = 256  # of one node, so that it can't keep the others out
    retry_s: float = 5.0  # the longest pause between two plans that couldn't be carried out
    unfit_s: float = (
        30.0  # without enough workers, one that couldn't load is tried again after this, then twice this...
    )
