"""How much work a plan takes, in swarms of a thousand workers: counted, so that the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import pytest

from skynet.coordinator.planner import Layout, Objective, Plan, PlannerConfig, decide
from skynet.coordinator.planner.swarm import Swarm
from skynet.errors import CapacityError
from skynet.models.spec import ModelSpec
from skynet.protocol.profile import LinkProfile

from .swarms import Workers, copies, need_bytes, random_links, random_workers, small_spec, thousands

MOST_WORK = 3 * PlannerConfig().total_work  # what is begun is finished, and a last resort tried in any case


def planned(
    monkeypatch: pytest.MonkeyPatch,
    spec: ModelSpec,
    workers: Workers,
    links: list[LinkProfile],
    config: PlannerConfig,
    current: Plan | None = None,
) -> tuple[Plan | None, int]:
    """A plan, or None where there is no room; and the work it took."""
    made: list[Swarm] = []

    def remembered(*arguments: object) -> Swarm:
        made.append(Swarm(*arguments))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(decide, "Swarm", remembered)
    try:
        found = decide.plan(spec, workers, links, config, current)
    except CapacityError:
        found = None
    return found, made[0].work


def test_work_is_bounded_where_a_thousand_far_workers_can_share_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(702)
    spec = small_spec(rng)
    workers = random_workers(rng, 4, need_bytes(spec, 512))
    swarm = copies(workers, random_links(rng, workers), 250, 702)
    config = PlannerConfig(objective=Objective.THROUGHPUT, min_context_tokens=512)
    found, work = planned(monkeypatch, spec, *swarm, config)
    assert found is not None
    assert 1000 < work <= MOST_WORK


def cases() -> Iterator[tuple[str, ModelSpec, Workers, list[LinkProfile], PlannerConfig]]:
    for name, spec, workers, links in thousands():
        for objective in Objective:
            yield name, spec, workers, links, PlannerConfig(objective=objective)
            if spec.num_layers == 80 and name in ("one host", "pairs", "far", "sites"):
                for layout in ("4x80", "2x40", "1x80"):
                    yield (
                        name,
                        spec,
                        workers,
                        links,
                        PlannerConfig(objective=objective, layout=Layout.parse(layout)),
                    )


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_work_is_bounded_in_a_thousand_workers_of_every_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    """First plans, and plans after a loss and after a join."""
    num_plans = 0
    for name, spec, workers, links, config in cases():
        what = f"{name} {config.objective} {config.layout}"
        plan_it = partial(planned, monkeypatch, spec)
        found, work = plan_it(workers, links, config)
        assert work <= MOST_WORK, f"{what}: {work}"
        if found is not None:
            num_plans += 1
            lost = found.worker_ids[0]
            fewer = {worker_id: profile for worker_id, profile in workers.items() if worker_id != lost}
            left = [link for link in links if lost not in (link.a, link.b)]
            after, work = plan_it(fewer, left, config, found)
            assert work <= MOST_WORK, f"{what} after a loss: {work}"
            _, work = plan_it(workers, links, config, after)
            assert work <= MOST_WORK, f"{what} after a join: {work}"
    assert num_plans > 40
