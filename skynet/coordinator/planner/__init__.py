"""The planner: a pure function from a model, measured workers and links to a plan (design, section 7)."""

from skynet.coordinator.planner.config import Layout, Objective, PlannerConfig
from skynet.coordinator.planner.decide import plan
from skynet.coordinator.planner.describe import read_workers
from skynet.coordinator.planner.model import (
    Plan,
    Prediction,
    RankPlan,
    ReplicaPlan,
    StagePlan,
    Transition,
    WorkerTransition,
)
from skynet.coordinator.planner.text import plan_as_dict, render_plan

__all__ = [
    "Layout",
    "Objective",
    "Plan",
    "PlannerConfig",
    "Prediction",
    "RankPlan",
    "ReplicaPlan",
    "StagePlan",
    "Transition",
    "WorkerTransition",
    "plan",
    "plan_as_dict",
    "read_workers",
    "render_plan",
]
