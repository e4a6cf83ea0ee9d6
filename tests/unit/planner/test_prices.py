"""What plans pay for: relayed and cut links, expert choice, biases, the way to the coordinator; KV of tiny models."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from skynet.coordinator.planner import Layout, Objective, Plan, PlannerConfig, plan
from skynet.coordinator.planner.links import COORDINATOR
from skynet.coordinator.planner.swarm import StepKind, Swarm
from skynet.errors import CapacityError
from skynet.models.config import read_spec
from skynet.models.costs import model_costs
from skynet.models.fit import held_bytes
from skynet.models.spec import ModelSpec
from skynet.models.split import whole_share
from skynet.protocol.ids import WorkerId
from skynet.protocol.plan import LayerSpan
from skynet.protocol.profile import LinkProfile

from .inventory import stage_tensors
from .swarms import Workers, random_links, random_workers, small_spec, worker

CONFIG = PlannerConfig()
SPEC = ModelSpec(
    model_type="llama",
    num_layers=8,
    hidden_size=1024,
    num_heads=16,
    num_kv_heads=8,
    head_size=128,
    intermediate_size=3072,
    vocab_size=16384,
    max_positions=4096,
)
NEED = held_bytes(model_costs(SPEC), LayerSpan(0, 8), whole_share(SPEC), 2048)


def swarm(names: str, part: float, bandwidth: float = 1e10) -> Workers:
    return {WorkerId(name): worker(int(NEED * part), bandwidth) for name in names}


def link(a: str, b: str, round_trip_s: float = 1e-4, bandwidth: float = 1e9, **facts: bool) -> LinkProfile:
    a, b = sorted((a, b))
    return LinkProfile(
        a=WorkerId(a), b=WorkerId(b), round_trip_s=round_trip_s, bandwidth_bytes_per_s=bandwidth, **facts
    )


def decode_s(found: Plan) -> float:
    return 1 / found.replicas[0].prediction.decode_tokens_per_s


def neighbours(found: Plan) -> set[frozenset[str]]:
    """Pairs that talk to each other: ranks of a group, and who hands hidden states to whom."""
    pairs: set[frozenset[str]] = set()
    for assignment in found.assignments().values():
        pairs.update(frozenset(pair) for pair in itertools.combinations(assignment.group, 2))
        if assignment.upstream is not None:
            pairs.add(frozenset((assignment.upstream, assignment.group[assignment.rank])))
    return pairs


def test_two_that_cant_reach_each_other_are_never_neighbours() -> None:
    """With c in the middle a pipeline goes round the cut; a and b are the fastest pair otherwise."""
    workers = swarm("abc", 0.5)
    whole = [link("a", "b"), link("a", "c", 0.002), link("b", "c", 0.002)]
    assert frozenset("ab") in neighbours(plan(SPEC, workers, whole, CONFIG))
    cut = [replace(whole[0], is_cut=True), *whole[1:]]
    found = plan(SPEC, workers, cut, CONFIG)
    assert frozenset("ab") not in neighbours(found)
    assert [stage.worker_ids for stage in found.replicas[0].stages][1] == ("c",)


@pytest.mark.parametrize("objective", list(Objective))
def test_random_swarms_with_cut_links_are_planned_round_them(objective: Objective) -> None:
    planned = 0
    for seed in range(30):
        rng = random.Random(seed)
        spec = small_spec(rng)
        need = held_bytes(model_costs(spec), LayerSpan(0, spec.num_layers), whole_share(spec), 512)
        workers = random_workers(rng, rng.randint(3, 9), need)
        links = [replace(x, is_cut=rng.random() < 0.3) for x in random_links(rng, workers)]
        config = PlannerConfig(objective=objective, min_context_tokens=512)
        cut = {frozenset((x.a, x.b)) for x in links if x.is_cut}
        try:
            found = plan(spec, workers, links, config)
        except CapacityError:
            continue
        planned += 1
        assert not neighbours(found) & cut, seed
        lost = found.worker_ids[0]
        left = {w: p for w, p in workers.items() if w != lost}
        try:
            again = plan(spec, left, links, config, found)
        except CapacityError:
            continue
        assert not neighbours(again) & cut, seed
    assert planned > 8


def test_a_plan_in_force_is_given_up_when_two_of_its_neighbours_are_cut_off() -> None:
    workers = swarm("abc", 0.7)
    whole = [link("a", "b", 0.004), link("a", "c", 0.005), link("b", "c", 0.005)]
    first = plan(SPEC, workers, whole, CONFIG)
    assert neighbours(first) == {frozenset("ab")}
    second = plan(SPEC, workers, [replace(whole[0], is_cut=True), *whole[1:]], CONFIG, first)
    assert neighbours(second) in ({frozenset("ac")}, {frozenset("bc")})


def test_a_cut_that_leaves_no_way_is_named() -> None:
    with pytest.raises(CapacityError, match="1 pair of workers can't reach each other and no plan goes round that"):
        plan(SPEC, swarm("ab", 0.7), [link("a", "b", is_cut=True)], CONFIG)


def test_relayed_transfers_at_the_same_time_share_the_coordinators_link() -> None:
    direct = [link(a, b) for a, b in itertools.combinations("abc", 2)]
    relayed = [replace(x, is_relayed=True) for x in direct]
    wide = StepKind(512, 1, 256)

    def exchange_s(links: list[LinkProfile]) -> float:
        return Swarm(SPEC, swarm("abc", 1), links, CONFIG).group((0, 1, 2)).exchange_s(wide.tokens)

    copy_s = 512 * 1024 * 2 / 1e9
    trip = 1e-4 + CONFIG.exchange_overhead_s
    assert exchange_s(direct) == pytest.approx(trip + min(2 * copy_s, 1e-4 + 2 / 3 * 2 * copy_s))
    assert exchange_s(relayed) == pytest.approx(trip + 1e-4 + 2 / 3 * 6 * copy_s), "six copies pass one machine"


def test_a_relayed_link_nobody_measured_takes_both_legs() -> None:
    """Its own numbers are a guess, as when a worker only said that it reaches a peer through the coordinator."""
    legs = [link("a", COORDINATOR, 0.004, 5e7), link("b", COORDINATOR, 0.006, 2e7)]
    guess = link("a", "b", 1e-5, 1e9, is_relayed=True, is_estimated=True)
    between = Swarm(SPEC, swarm("ab", 1), [*legs, guess], CONFIG).links.between(0, 1)
    assert (between.round_trip_s, between.bandwidth_bytes_per_s, between.is_relayed) == (0.010, 2e7, True)
    measured = replace(guess, is_estimated=False, round_trip_s=0.02)
    assert Swarm(SPEC, swarm("ab", 1), [*legs, measured], CONFIG).links.between(0, 1).round_trip_s == 0.02


def test_a_token_pays_the_way_to_the_coordinator_and_back() -> None:
    near = plan(SPEC, swarm("a", 2), [link("a", COORDINATOR, 0.0002)], CONFIG)
    far = plan(SPEC, swarm("a", 2), [link("a", COORDINATOR, 0.0302)], CONFIG)
    assert decode_s(far) - decode_s(near) == pytest.approx(0.03)


def test_the_worker_near_the_coordinator_is_preferred() -> None:
    ways = [link("a", COORDINATOR, 0.03), link("b", COORDINATOR, 0.001)]
    assert plan(SPEC, swarm("ab", 2), ways, CONFIG).worker_ids == ("b",)


def test_expert_choice_is_a_third_exchange_of_a_mixture_layer() -> None:
    """A slower link costs a mixture layer half a round trip more than a dense one."""
    moe = replace(
        SPEC,
        model_type="qwen3_moe",
        num_experts=8,
        experts_per_token=2,
        expert_intermediate_size=768,
        moe_layers=tuple(range(8)),
    )

    def more_s(spec: ModelSpec) -> float:
        config = replace(CONFIG, layout=Layout(2, 1))
        slow, fast = (plan(spec, swarm("ab", 4), [link("a", "b", trip)], config) for trip in (0.0021, 0.0001))
        return decode_s(slow) - decode_s(fast)

    assert more_s(moe) - more_s(SPEC) == pytest.approx(8 * 0.001, rel=0.01)


@pytest.mark.parametrize(
    ("model_type", "flags", "biased"),
    [
        ("llama", {"attention_bias": True}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("llama", {"mlp_bias": True}, {"gate_proj", "up_proj", "down_proj"}),
        ("qwen2", {}, {"q_proj", "k_proj", "v_proj"}),
        ("qwen3", {"attention_bias": True}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_biases_are_counted_as_transformers_holds_them(
    model_type: str, flags: dict[str, bool], biased: set[str]
) -> None:
    import torch
    import transformers

    fields = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, **flags}
    config = transformers.AutoConfig.for_model(model_type, **fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    spec = read_spec(config.to_dict(), "float32")
    tensors = stage_tensors(spec, LayerSpan(0, 2))
    assert {tensor.name: tensor.shape for tensor in tensors} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {t.name.split(".")[-2] for t in tensors if t.name.endswith(".bias")} == biased
    total = sum(p.numel() * 4 for p in model.parameters())
    assert model_costs(spec).weight_bytes(LayerSpan(0, 2), whole_share(spec)) == total


def test_a_tiny_model_takes_kv_for_some_sequences_and_not_all_the_memory_there_is() -> None:
    short = replace(SPEC, max_positions=256)
    found = plan(short, swarm("a", 50), [], CONFIG)
    assert found.replicas[0].num_blocks * found.block_size == 16 * 256


def test_a_model_of_long_positions_gets_kv_for_one_of_its_longest_where_memory_allows() -> None:
    long = replace(SPEC, max_positions=131072)
    found = plan(long, swarm("a", 50), [], CONFIG)
    assert found.replicas[0].num_blocks * found.block_size == 131072
