"""Random models and swarms for planner tests and benchmarks, the same for the same seed."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

from skynet.coordinator.planner import Objective, Plan, PlannerConfig, plan
from skynet.errors import CapacityError
from skynet.models.costs import model_costs
from skynet.models.fit import held_bytes
from skynet.models.spec import ModelSpec
from skynet.models.split import whole_share
from skynet.protocol.ids import WorkerId
from skynet.protocol.plan import LayerSpan
from skynet.protocol.profile import LinkProfile, WorkerProfile

Workers = dict[WorkerId, WorkerProfile]


def need_bytes(spec: ModelSpec, tokens: int) -> int:
    """The least memory of one replica with KV cache for so many positions."""
    return held_bytes(model_costs(spec), LayerSpan(0, spec.num_layers), whole_share(spec), tokens)


def value(found: Plan) -> float:
    """What the plan's objective minimises, but for the time by which `memory` decides between equals."""
    match found.objective:
        case Objective.THROUGHPUT:
            return 1 / found.batch_tokens_per_s
        case Objective.MEMORY:
            return sum(r.weight_bytes + r.kv_bytes for c in found.replicas for s in c.stages for r in s.ranks)
        case Objective.LATENCY:
            return token_s(found)


def token_s(found: Plan) -> float:
    """Seconds per answer token of a typical request alone."""
    prediction, config = found.replicas[0].prediction, PlannerConfig()
    prompt_s = config.prompt_tokens / prediction.prefill_tokens_per_s
    return 1 / prediction.decode_tokens_per_s + prompt_s / config.answer_tokens


def worker(memory_bytes: int, bandwidth: float = 1e10, flops: float = 4e11, host_id: str = "") -> WorkerProfile:
    return WorkerProfile(
        device="cpu",
        device_name="test",
        threads=1,
        memory_bytes=memory_bytes,
        weight_bytes_per_s={"float32": bandwidth, "bfloat16": bandwidth},
        matmul_flops_per_s={"float32": flops, "bfloat16": flops},
        layer_overhead_s=0.0002,
        host_id=host_id,
    )


def small_spec(rng: random.Random, max_layers: int = 6) -> ModelSpec:
    """A model of a few layers, its dimensions drawn; large enough that bytes matter beside overheads."""
    layers = rng.randint(1, max_layers)
    kv_heads = rng.choice([1, 2, 4, 8])
    is_moe = rng.random() < 0.25
    moe_layers = tuple(i for i in range(layers) if rng.random() < 0.6) if is_moe else ()
    return ModelSpec(
        model_type="qwen3_moe" if is_moe else rng.choice(["llama", "qwen2", "qwen3"]),
        num_layers=layers,
        hidden_size=rng.choice([512, 1024, 2048]),
        num_heads=kv_heads * rng.choice([1, 2, 4]),
        num_kv_heads=kv_heads,
        head_size=rng.choice([64, 128]),
        intermediate_size=rng.choice([1408, 3072, 5632]),
        vocab_size=rng.choice([1000, 16384, 50257]),
        max_positions=rng.choice([512, 4096]),
        is_tied=rng.random() < 0.5,
        num_experts=8 if is_moe else 0,
        experts_per_token=2 if is_moe else 0,
        expert_intermediate_size=768 if is_moe else 0,
        moe_layers=moe_layers,
        qkv_bias=rng.random() < 0.3,
        o_bias=rng.random() < 0.3,
        mlp_bias=rng.random() < 0.3,
    )


def large_spec(num_layers: int = 80) -> ModelSpec:
    """Llama 70B's dimensions: 141 GB in bf16."""
    return ModelSpec(
        model_type="llama",
        num_layers=num_layers,
        hidden_size=8192,
        num_heads=64,
        num_kv_heads=8,
        head_size=128,
        intermediate_size=28672,
        vocab_size=128256,
        max_positions=8192,
    )


def random_workers(rng: random.Random, count: int, need_bytes: int) -> Workers:
    """Unlike machines whose memory together is between half and four times what the model needs."""
    total = need_bytes * rng.choice([0.6, 1.05, 1.3, 2.0, 4.0])
    parts = [rng.uniform(0.3, 1.0) for _ in range(count)]
    return {
        WorkerId(f"w{i:04d}"): worker(
            int(total * part / sum(parts)),
            bandwidth=rng.choice([5e9, 1e10, 2e10, 1e11]) * rng.uniform(0.8, 1.2),
            flops=rng.choice([2e11, 1e12, 1e13]),
        )
        for i, part in enumerate(parts)
    }


def random_links(rng: random.Random, workers: Workers, known: float = 1.0) -> list[LinkProfile]:
    """Machines on one to three sites: near inside, far between; a fraction `known` of the pairs is measured."""
    places = {worker_id: rng.randrange(rng.randint(1, 3)) for worker_id in sorted(workers)}
    links = []
    for a, b in itertools.combinations(sorted(workers), 2):
        if rng.random() < known:
            is_near = places[a] == places[b]
            round_trip = rng.choice([5e-5, 2e-4, 1e-3]) if is_near else rng.choice([2e-3, 2e-2])
            links.append(
                LinkProfile(a=a, b=b, round_trip_s=round_trip, bandwidth_bytes_per_s=rng.choice([1e7, 1e8, 1e9]))
            )
    return links


def large_swarm(num_workers: int, seed: int = 0) -> tuple[Workers, list[LinkProfile]]:
    """Sites of up to 12 machines; each worker measured its link to the coordinator and to at most 8 near candidates."""
    rng = random.Random(seed)
    workers: Workers = {}
    links: dict[tuple[str, str], LinkProfile] = {}
    site: list[WorkerId] = []
    to_coordinator = 0.01
    for i in range(num_workers):
        if not site or len(site) >= rng.randint(1, 12):
            site, to_coordinator = [], rng.choice([0.0005, 0.004, 0.01, 0.03])
        worker_id = WorkerId(f"w{i:04d}")
        workers[worker_id] = worker(
            rng.choice([4, 8, 16, 24, 48]) << 30,
            bandwidth=rng.choice([1e10, 3e10, 3e11, 9e11]) * rng.uniform(0.8, 1.2),
            flops=rng.choice([3e11, 1e12, 5e13]),
        )
        for other in site[-8:]:
            round_trip = rng.choice([1e-4, 2e-4, 5e-4])
            links[other, worker_id] = LinkProfile(
                a=other, b=worker_id, round_trip_s=round_trip, bandwidth_bytes_per_s=rng.choice([1e8, 1e9])
            )
        coordinator = WorkerId("coordinator")
        links["coordinator", worker_id] = LinkProfile(
            a=coordinator, b=worker_id, round_trip_s=to_coordinator, bandwidth_bytes_per_s=3e7
        )
        site.append(worker_id)
    return workers, list(links.values())


def copies(workers: Workers, links: list[LinkProfile], count: int, seed: int = 0) -> tuple[Workers, list[LinkProfile]]:
    """So many copies of a swarm, named at random; between copies nothing is measured."""
    new = [WorkerId(f"c{i:04d}") for i in range(count * len(workers))]
    random.Random(seed).shuffle(new)
    all_workers: Workers = {}
    all_links = []
    for copy in range(count):
        names = dict(zip(workers, new[copy * len(workers) :], strict=False))
        all_workers |= {names[worker_id]: profile for worker_id, profile in workers.items()}
        all_links += [dataclasses.replace(link, a=names[link.a], b=names[link.b]) for link in links]
    return all_workers, all_links


def excess_over_copies(seed: int, num_workers: int, count: int, objective: Objective) -> float | None:
    """Value of the plan for copies of a small swarm to that of its best plan, found exhaustively, copied.

    Below 1 where copies do better together. None: the small swarm can't hold its model.
    """
    rng = random.Random(seed)
    spec = small_spec(rng)
    workers = random_workers(rng, num_workers, need_bytes(spec, 512))
    links = random_links(rng, workers)
    config = PlannerConfig(
        objective=objective, min_context_tokens=512, exact_up_to=num_workers, improvement_threshold=0.0
    )
    try:
        best = plan(spec, workers, links, config)
    except CapacityError:
        return None
    config = dataclasses.replace(config, exact_up_to=PlannerConfig().exact_up_to)
    ratio = value(plan(spec, *copies(workers, links, count, seed), config)) / value(best)
    return ratio * count if objective is Objective.THROUGHPUT else ratio


def thousands(count: int = 1000) -> Iterator[tuple[str, ModelSpec, Workers, list[LinkProfile]]]:
    """Swarms of so many workers in structures that made planning slow: names, models, workers and links."""
    ids = [WorkerId(f"w{i:04d}") for i in range(count)]
    coordinator, spec, gib = WorkerId("coordinator"), large_spec(), 1 << 30
    rng = random.Random(1)

    def like(memory: float, every: int = 1) -> Workers:
        """Like workers, `every` so many of them on one host (1: each alone)."""
        hosts = [f"h{i // every}" if every > 1 else "" for i in range(count)]
        return {w: worker(int(memory * gib), host_id=host) for w, host in zip(ids, hosts, strict=True)}

    def link(a: WorkerId, b: WorkerId, round_trip_s: float) -> LinkProfile:
        return LinkProfile(a=a, b=b, round_trip_s=round_trip_s, bandwidth_bytes_per_s=1e8)

    far = [link(w, coordinator, 0.02 + 0.0001 * i) for i, w in enumerate(ids)]
    near = [link(w, coordinator, 0.001) for w in ids]
    dense = [
        link(ids[i], ids[j], rng.choice([1e-4, 5e-4, 2e-3, 2e-2]))
        for i in range(count)
        for j in range(i + 1, min(count, i + 60))
    ]
    one_layer = large_spec(1)
    mixture = dataclasses.replace(
        spec,
        model_type="qwen3_moe",
        num_experts=64,
        experts_per_token=8,
        expert_intermediate_size=1536,
        moe_layers=tuple(range(1, 80, 2)),
    )
    yield "sites", spec, *large_swarm(count)
    yield "one host", spec, like(16, count), []
    yield "pairs", spec, like(16, 2), far
    yield "far", spec, like(16), far
    for memory in (4.0, 2.2, 1.2, 0.3):
        yield f"far, {memory} GiB", spec, like(memory), far
    for memory in (2.5, 1.0, 0.3):
        yield f"near, {memory} GiB", spec, like(memory), near
    uneven = {w: worker((160 if i % 100 == 0 else 1) * gib) for i, w in enumerate(ids)}
    yield "few large ones", spec, uneven, far
    speeds = {w: worker(16 * gib, bandwidth=(1e10, 1e11)[i % 2]) for i, w in enumerate(ids)}
    yield "two speeds", spec, speeds, far
    yield "dense links", spec, like(16), dense
    yield "dense links, 2 GiB", spec, like(2), dense
    yield "one layer, far", one_layer, like(1), far
    yield "one layer, near", one_layer, like(1), []
    yield "mixture, far", mixture, like(24), far
    yield "mixture, near", mixture, like(3), []
    for seed, size in ((702, 4), (703, 4), (712, 4), (1, 3)):
        rng = random.Random(seed)
        small = small_spec(rng) if seed > 700 else spec
        workers = random_workers(rng, size, need_bytes(small, 2048))
        yield f"copies of {seed}", small, *copies(workers, random_links(rng, workers), count // size, seed)
